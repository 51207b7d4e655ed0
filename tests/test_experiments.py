"Experiments: a tiny run of each, and the command line."
import pandas as pd
import pytest
import torch
from torch import nn

from fastai_lsuv.experiments.__main__ import EXPERIMENTS, main
from fastai_lsuv.experiments.activations import activations, cell
from fastai_lsuv.experiments.batchnorm import batchnorm, step_cost
from fastai_lsuv.experiments.batchsize import batchsize, summary
from fastai_lsuv.experiments.depth import best, depth
from fastai_lsuv.experiments.networks import fitnet4
from fastai_lsuv.experiments.port import PORT, WITH, WITHOUT, port
from fastai_lsuv.experiments.starts import STARTS, fill, start
from fastai_lsuv.experiments.study import pair, pm, table
from fastai_lsuv.experiments.thread import BEFORE, THREAD, thread
from fastai_lsuv.experiments.why import DOCUMENT, normals, why
from fastai_lsuv.loops import ORDERS

pytestmark = pytest.mark.usefixtures('axes')

def saved(out, *names):
    "The tables that an experiment wrote; its picture is there."
    pictures = list(out.glob('*.png'))
    assert len(pictures) == 1 and pictures[0].read_bytes()[:4] == b'\x89PNG' and pictures[0].stat().st_size > 5000
    assert {p.stem for p in out.glob('*.csv')} == set(names)
    return [pd.read_csv(out/f'{n}.csv') for n in names]


def test_thread(tmp_path, capsys):
    pairs = thread(n=128, epochs=1, lsuv_bs=64, seeds=1, out=str(tmp_path))
    written,trained = saved(tmp_path, 'thread', 'thread_training')
    assert len(pairs) == len(written) == 6*5 and len(trained) == 6 and list(written.layer.unique()) == [1, 2, 3, 4, 5]
    by = pairs.groupby('order')['mean']
    for order in ('std mean', 'mean+std', 'mean std mean std'): assert by.get_group(order).abs().max() < 1e-6
    assert by.get_group('mean std').min() > .02 and by.get_group('std').min() > .3
    assert (pairs[pairs.order != BEFORE]['std'] - 1).abs().max() < 1e-5 and (pairs[pairs.order == BEFORE]['std'] - 1).abs().min() > .05
    assert pairs[(pairs.order == 'mean std') & (pairs.layer == 1)].thread_mean.unique() == pytest.approx([0.3387000262737274])
    assert pairs[pairs.order == 'std'].thread_mean.isna().all() and set(THREAD) < set(ORDERS)
    assert trained.accuracy.between(0, 1).all() and (trained.seconds > 0).all()
    said = capsys.readouterr().out
    assert re.search(r'order="mean std" +the thread\'s\n\(0\.', said) and '(0.3387, 1.0000)' in said and 'thread.png' in said


@pytest.mark.slow
def test_port(tmp_path, capsys):
    df = port(n=200, epochs=2, lrs='0.1,0.001', seeds=2, bs=50, out=str(tmp_path))
    [written] = saved(tmp_path, 'port')
    assert len(df) == len(written) == 2*2*2*2 and set(df.arm) == {WITH, WITHOUT}
    row = written[(written.arm == WITHOUT) & (written.lr == .001) & (written.epoch == 2) & (written.seed == 1)].iloc[0]
    assert row.document == .8925 and written[(written.arm == WITHOUT) & (written.lr == .1)].document.isna().all()
    again = port(n=200, epochs=1, lrs='0.1', seeds=1, bs=50, out=str(tmp_path))
    assert again.accuracy.tolist() == df[(df.lr == .1) & (df.epoch == 1) & (df.seed == 1)].accuracy.tolist()  # seeded
    said = capsys.readouterr().out
    assert 'with LSUV, lr 0.1' in said and '97.77' in said and 'LSUV took ' in said


def test_the_documents_table_is_whole(): assert [len(v) for v in PORT.values()] == [10]*4 and PORT[WITH, .1][-1] == 98.96


@pytest.mark.slow
def test_activations(tmp_path, capsys):
    df = activations(n=64, size=8, width=.1, depth=.3, epochs=1, seeds=1, acts='maxout,relu', inits='LSUV,msra', margin=.9, out=str(tmp_path))
    [written] = saved(tmp_path, 'activations')
    assert list(written.columns) == ['network', 'activation', 'init', 'seed', 'epoch', 'accuracy', 'train_loss', 'valid_loss', 'seconds']
    assert len(df) == 2*2*2 and set(df.activation) == {'maxout', 'ReLU'} and set(df.network) == {'plain', 'residual'} and set(df.init) == {'LSUV', 'MSRA'}
    assert 'failed' in capsys.readouterr().out  # no run is 90 points above chance


def test_a_cell_says_how_many_failed():
    assert cell(pd.Series([.5, .6]), .2) == '55.0 ± 7.1' and cell(pd.Series([.1, .15]), .2) == 'failed'
    assert cell(pd.Series([.5, .1, .5]), .2) == '50.0 ± 0.0 (1 failed)' and cell(pd.Series([.5]), .2) == '50.0'


@pytest.mark.slow
def test_batchnorm(tmp_path, capsys):
    df = batchnorm(n=64, size=8, width=.1, depth=.3, epochs=2, seeds=1, rounds=3, bs=32, out=str(tmp_path))
    written,steps = saved(tmp_path, 'batchnorm', 'batchnorm_steps')
    assert len(df) == len(written) == 3*2 and list(df.arm.unique()) == ['LSUV', 'batch norm', 'neither'] and len(steps) == 2*3
    for _, of in df.groupby('arm'): assert of.seconds.is_monotonic_increasing
    assert 'Batch norm adds ' in capsys.readouterr().out


def test_step_cost_trains_each_model():
    models = {k: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for k in 'ab'}
    was = {k: m[1].weight.detach().clone() for k, m in models.items()}
    steps = step_cost(models, torch.randn(8, 4, 1, 1), torch.randint(0, 2, (8,)), 3)
    assert steps.groupby('network').size().tolist() == [3, 3] and (steps.seconds > 0).all()
    assert not any(torch.equal(was[k], m[1].weight) for k, m in models.items())


def test_batchsize(tmp_path, capsys):
    df = batchsize(n=600, size=8, width=.1, depth=.3, sizes='8,512', draws=3, seeds=1, out=str(tmp_path))
    written,by = saved(tmp_path, 'batchsize', 'batchsize_summary')
    assert len(df) == len(written) == 2*3*(1 + 1 + 2 + 2 + 2) and list(by['size']) == [8, 512]
    small,large = by.to_dict('records')
    assert small['spread'] > 2*large['spread'] and small['off'] > large['off'] and large['bias'] == 0 and large['within'] == 1
    assert df[df['size'] == 512].std_unseen.sub(1).abs().max() < .1
    assert 'within 0.1' in capsys.readouterr().out


def test_batchsize_sums_up():
    df = pd.DataFrame([dict(seed=1, size=s, draw=d, layer=1, scale=v, std_unseen=u) for s, d, v, u in
                       [(8, 1, 1., .8), (8, 2, 3., 1.2), (16, 1, 4., 1.05), (16, 2, 4., .95)]])
    by = summary(df).to_dict('records')
    assert by[0]['spread'] == pytest.approx(2**.5/2) and by[0]['bias'] == .5 and by[0]['within'] == 0 and by[0]['off'] == pytest.approx(.2)
    assert by[1]['spread'] == 0 and by[1]['bias'] == 0 and by[1]['within'] == 1


def test_why(tmp_path, capsys):
    df = why(seeds=2, out=str(tmp_path))
    written,layers = saved(tmp_path, 'why', 'why_network')
    assert len(df) == len(written) == 7*2 and len(layers) == 3*2*2*6 and list(df.case.unique()) == list(DOCUMENT)
    std = df.groupby('case', sort=False)['std'].mean()
    for case in DOCUMENT: assert std[case] == pytest.approx(DOCUMENT[case][1], rel=.15), case
    after = layers[layers.when == 'after']
    assert after['mean'].abs().max() < 1e-3 and (after['std'] - 1).abs().max() < 1e-3
    assert layers[(layers.when == 'before') & (layers.weights == 'std 2') & (layers.layer == 6)]['std'].min() > 1e7
    assert '6.06118e+07' in capsys.readouterr().out


def test_normals_are_seeded():
    a,b,c = normals(100, 10, 1), normals(100, 10, 1), normals(100, 10, 2)
    assert all((a[k] == b[k]).all() and (a[k] != c[k]).any() for k in DOCUMENT) and a['six products, std 2'].shape == (10, 10)


@pytest.mark.slow
def test_depth(tmp_path, capsys):
    df = depth(n=128, width=8, depths='2,4', inits='PyTorch,LSUV', lrs='0.1,0.0001', epochs=1, seeds=2, out=str(tmp_path))
    [written] = saved(tmp_path, 'depth')
    assert len(df) == len(written) == 3*2*2*2 and set(df.depth) == {2, 4} and set(df.init) == {'PyTorch', 'LSUV "std"', 'LSUV "std mean"'}
    assert 'best of 2 learning rates' in capsys.readouterr().out


def test_the_best_learning_rate_is_that_of_the_mean():
    rows = [dict(init='a', depth=2, lr=lr, seed=s, accuracy=acc) for lr, s, acc in [(.1, 1, .9), (.1, 2, .1), (.01, 1, .6), (.01, 2, .6)]]
    rows += [dict(init='b', depth=2, lr=lr, seed=1, accuracy=acc) for lr, acc in [(.1, .5), (.01, .4)]]
    kept = best(pd.DataFrame(rows))
    assert kept.lr.tolist() == [.01, .01, .1] and kept.init.tolist() == ['a', 'a', 'b']


@pytest.mark.parametrize('name', STARTS)
def test_starts(name):
    torch.manual_seed(0)
    model = fitnet4(width=.25, depth=.3)
    was = [p.detach().clone() for p in model.parameters()]
    cbs = start(model, name, 'mean std')
    same = [torch.equal(p, w) for p, w in zip(model.parameters(), was)]
    assert all(same) if name == 'PyTorch' else not any(same)
    assert [cb.options['order'] for cb in cbs] == (['mean std'] if name == 'LSUV' else [])
    w = model[2].weight.flatten(1)  # 8 -> 12 channels, or as many: 72 inputs each
    if name in ('LSUV', 'orthonormal'): assert torch.allclose(w @ w.T, torch.eye(len(w)), atol=1e-5)
    if name == 'MSRA': assert w.std().item() == pytest.approx((2/w.shape[1])**.5, rel=.1)
    if name == 'Xavier': assert w.abs().max() <= (6/(9*(8 + len(w))))**.5
    if name != 'PyTorch': assert not any(m.bias.any() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def test_fill_may_keep_the_biases():
    model = nn.Linear(3, 3)
    was = model.bias.detach().clone()
    fill(model, nn.init.zeros_, zero_bias=False)
    assert not model.weight.any() and torch.equal(model.bias, was)


def test_tables():
    df = pd.DataFrame(dict(a=['y', 'y', 'x', 'x'], b=[2, 1, 2, 2], v=[.5, .25, .1, .3]))
    t = table(df, 'a', 'b', 'v')
    assert t.index.tolist() == ['y', 'x'] and t.columns.tolist() == [2, 1] and t.loc['y', 2] == '50.0' and t.loc['x', 2] == '20.0 ± 14.1' and t.loc['x', 1] == ''
    assert pm(pd.Series([1.])) == '1.000' and pm(pd.Series([1., 2.]), 1) == '1.5 ± 0.7'


# --- the command line

def test_without_a_name_it_lists_them(capsys):
    assert main([]) == main(['--help']) == 0
    said = capsys.readouterr().out
    for name in EXPERIMENTS: assert f'\n  {name} ' in said
    assert len(EXPERIMENTS) == 7
    assert "'nothing' is no experiment" in main(['nothing']) and 'thread' in main(['nothing'])


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_help_lists_the_options(name, capsys):
    with pytest.raises(SystemExit) as e: main([name, '--help'])
    said = capsys.readouterr().out
    assert e.value.code == 0 and f'usage: python -m fastai_lsuv.experiments {name}' in said
    for option in ('--seeds', '--out'): assert option in said
    assert name == 'why' or '--data' in said and '--download' in said and '--n ' in said


@pytest.mark.parametrize('args,says', [
    ('thread --data /no/such', '--data: got .*/no/such'),
    ('thread --seeds 0', '--seeds: got 0; it takes a positive number'),
    ('thread --lsuv-bs 0', '--lsuv-bs: got 0'),
    ('port --lrs 0.1,x', "--lrs: got '0.1,x'; it takes positive numbers separated by commas"),
    ('port --lrs 0', "--lrs: got '0'"),
    ('activations --acts gelu', "--acts: got 'gelu'; it takes any of maxout, ReLU, VLReLU, tanh, sigmoid, separated by commas"),
    ('activations --inits ,', "--inits: got ','; it takes any of LSUV"),
    ('batchnorm --init LSUV', "--init: got 'LSUV'"),
    ('batchnorm --act relu,tanh', "--act: got 'relu,tanh'; it takes one of maxout"),
    ('batchsize --sizes 8,16.5', "--sizes: got '8,16.5'; it takes positive whole numbers"),
    ('batchsize --sizes 2000 --size 8', '--sizes: got 2000; .* gives at most 1437'),
    ('depth --depths 0', "--depths: got '0'"),
])
def test_bad_options_are_named(args, says, tmp_path):
    import re
    error = main([*args.split(), '--out', str(tmp_path)])
    assert isinstance(error, str) and re.search(says, error), error
    assert not list(tmp_path.iterdir())


def test_a_command(tmp_path, capsys):
    assert main(['why', '--seeds', '1', '--width', '20', '--nums', '500', '--out', str(tmp_path/'a'/'b')]) is None
    assert saved(tmp_path/'a'/'b', 'why', 'why_network')[0].seed.unique().tolist() == [1]
