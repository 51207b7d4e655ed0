"Experiments: a tiny run of each, and the command line."
import re
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from experiments.__main__ import EXPERIMENTS, main
from experiments.activations import activations, cell
from experiments.batchnorm import batchnorm, how_far
from experiments.batchsize import batchsize
from experiments.checkpoints import Checkpoint, epochs_so_far
from experiments.data import InputError
from experiments.depth import best, depth
from experiments.networks import deep_relu, fitnet4
from experiments.port import PORT, WITH, WITHOUT, port
from experiments.starts import STARTS, mirrored, start
from experiments.study import pm, table
from experiments.thread import BEFORE, THREAD, thread
from experiments.why import DOCUMENT, why
from fastai_lsuv.demo import pair
from fastai_lsuv.measure.loops import ORDERS

pytestmark = pytest.mark.usefixtures('axes')
TINY = dict(n=64, size=8, width=.1, depth=.3)  # a small FitNet-4 on few small images


def saved(out, *names):
    "The tables that an experiment wrote. Its picture must be there, too."
    [picture] = out.glob('*.png')
    assert picture.read_bytes()[:4] == b'\x89PNG' and picture.stat().st_size > 5000
    assert {p.stem for p in out.glob('*.csv')} == set(names)
    return [pd.read_csv(out/f'{n}.csv') for n in names]


def test_thread(tmp_path, capsys):
    pairs = thread(n=128, epochs=1, lsuv_bs=64, seeds=1, out=str(tmp_path))
    written,trained = saved(tmp_path, 'thread', 'thread_training')
    assert len(pairs) == len(written) == 6*5 and len(trained) == 6
    assert list(written.layer.unique()) == [1, 2, 3, 4, 5]
    by = pairs.groupby('order')['mean']
    for order in ('std mean', 'mean+std', 'mean std mean std'): assert by.get_group(order).abs().max() < 1e-6
    assert by.get_group('mean std').min() > .02 and by.get_group('std').min() > .3
    off = (pairs['std'] - 1).abs()
    assert off[pairs.order != BEFORE].max() < 1e-5 and off[pairs.order == BEFORE].min() > .05
    first = pairs[(pairs.order == 'mean std') & (pairs.layer == 1)]
    assert first.thread_mean.unique() == pytest.approx([0.3387000262737274])
    assert pairs[pairs.order == 'std'].thread_mean.isna().all() and set(THREAD) < set(ORDERS)
    assert trained.accuracy.between(0, 1).all() and (trained.seconds > 0).all()
    said = capsys.readouterr().out
    assert re.search(r'order="mean std" +the thread\'s\n\(0\.\d{4}, 1\.0000\) +\(0\.3387, 1\.0000\)\n', said)
    assert 'thread.png' in said


@pytest.mark.slow
def test_port(tmp_path, capsys):
    df = port(n=200, epochs=2, lrs='0.1,0.001', seeds=2, bs=50, out=str(tmp_path))
    [written] = saved(tmp_path, 'port')
    assert len(df) == len(written) == 2*2*2*2 and set(df.arm) == {WITH, WITHOUT}
    assert [len(v) for v in PORT.values()] == [10]*4 and PORT[WITH, .1][-1] == 98.96  # the document's table
    without = written[written.arm == WITHOUT]
    row = without[(without.lr == .001) & (without.epoch == 2) & (without.seed == 1)].iloc[0]
    assert row.document == .8925 and without[without.lr == .1].document.isna().all()
    again = port(n=200, epochs=1, lrs='0.1', seeds=1, bs=50, out=str(tmp_path))
    same = df[(df.lr == .1) & (df.epoch == 1) & (df.seed == 1)]
    assert again.accuracy.tolist() == same.accuracy.tolist()  # the seed decides
    said = capsys.readouterr().out
    assert 'with LSUV, lr 0.1' in said and '97.77' in said and 'LSUV took ' in said


@pytest.mark.slow
def test_activations(tmp_path, capsys):
    df = activations(acts='maxout,relu', inits='LSUV,msra', margin=.9, epochs=1, seeds=1, out=str(tmp_path), **TINY)
    [written] = saved(tmp_path, 'activations')
    assert list(written.columns) == [
        'network', 'activation', 'init', 'seed', 'epoch', 'accuracy', 'train_loss', 'valid_loss', 'seconds']
    assert len(df) == 2*2*2 and set(df.activation) == {'maxout', 'ReLU'}
    assert set(df.network) == {'plain', 'residual'} and set(df.init) == {'LSUV', 'MSRA'}
    assert 'failed' in capsys.readouterr().out  # no run is 90 points above chance


@pytest.mark.slow
def test_batchnorm(tmp_path, capsys):
    df = batchnorm(epochs=2, seeds=1, rounds=3, bs=32, out=str(tmp_path), **TINY)
    written,steps = saved(tmp_path, 'batchnorm', 'batchnorm_steps')
    assert len(df) == len(written) == 3*2 and len(steps) == 2*3 and (steps.seconds > 0).all()
    assert list(df.arm.unique()) == ['LSUV', 'batch norm', 'neither']
    assert all(of.seconds.is_monotonic_increasing for _, of in df.groupby('arm'))
    assert 'Batch norm adds ' in capsys.readouterr().out


def test_batchsize(tmp_path, capsys):
    df = batchsize(sizes='8,512', draws=3, seeds=1, out=str(tmp_path), **TINY | dict(n=600))
    written,by = saved(tmp_path, 'batchsize', 'batchsize_summary')
    assert len(df) == len(written) == 2*3*(1 + 1 + 2 + 2 + 2) and list(by['size']) == [8, 512]
    small,large = by.to_dict('records')
    assert small['spread'] > 2*large['spread'] and small['off'] > large['off']
    assert large['bias'] == 0 and large['within'] == 1
    assert df[df['size'] == 512].std_unseen.sub(1).abs().max() < .1
    assert 'within 0.1' in capsys.readouterr().out


def test_why(tmp_path, capsys):
    df = why(seeds=2, out=str(tmp_path))
    written,layers = saved(tmp_path, 'why', 'why_network')
    assert len(df) == len(written) == 7*2 and len(layers) == 3*2*2*6
    assert list(df.case.unique()) == list(DOCUMENT)
    assert df['std'].tolist() == why(seeds=2, out='')['std'].tolist()  # the seeds decide
    std = df.groupby('case', sort=False)['std'].mean()
    for case in DOCUMENT: assert std[case] == pytest.approx(DOCUMENT[case][1], rel=.15), case
    after = layers[layers.when == 'after']
    assert after['mean'].abs().max() < 1e-3 and (after['std'] - 1).abs().max() < 1e-3
    last = layers[(layers.when == 'before') & (layers.weights == 'std 2') & (layers.layer == 6)]
    assert last['std'].min() > 1e7
    assert '6.06118e+07' in capsys.readouterr().out


@pytest.mark.slow
def test_depth(tmp_path, capsys):
    df = depth(n=128, width=8, depths='2,4', inits='PyTorch,LSUV', lrs='0.1,0.0001', epochs=1, out=str(tmp_path))
    [written] = saved(tmp_path, 'depth')
    assert len(df) == len(written) == 4*2*2*2 and set(df.depth) == {2, 4}
    assert set(df.init) == {'PyTorch', 'LSUV "std"', 'LSUV "std mean"', 'LSUV "std", mirrored'}
    assert 'best of 2 learning rates' in capsys.readouterr().out


def test_numbers_are_written_with_their_spread():
    df = pd.DataFrame(dict(a=['y', 'y', 'x', 'x'], b=[2, 1, 2, 2], v=[.5, .25, .1, .3]))
    t = table(df, 'a', 'b', 'v')
    assert t.index.tolist() == ['y', 'x'] and t.columns.tolist() == [2, 1]
    assert t.values.tolist() == [['50.0', '25.0'], ['20.0 ± 14.1', '']]
    assert pm(pd.Series([1.])) == '1.000' and pm(pd.Series([1., 2.]), 1) == '1.5 ± 0.7'
    assert cell(pd.Series([.5, .6]), .2) == '55.0 ± 7.1' and cell(pd.Series([.1, .15]), .2) == 'failed'
    assert cell(pd.Series([.5, .1, .5]), .2) == '50.0 ± 0.0 (1 failed)' and cell(pd.Series([.5]), .2) == '50.0'
    assert pair(3e-8, 1.0000001) == pair(-3e-8, .99999) == '(0.0000, 1.0000)'
    assert pair(-.22859585, 12.34567) == '(-0.2286, 12.3457)'


def test_the_best_learning_rate_is_that_of_the_mean():
    rows = [('a', .1, 1, .9), ('a', .1, 2, .1), ('a', .01, 1, .6), ('a', .01, 2, .6),
            ('b', .1, 1, .5), ('b', .01, 1, .4)]
    kept = best(pd.DataFrame(rows, columns=['init', 'lr', 'seed', 'accuracy']).assign(depth=2))
    assert kept.lr.tolist() == [.01, .01, .1] and kept.init.tolist() == ['a', 'a', 'b']


def test_how_far_a_run_went():
    rows = [('LSUV', 1, 1, .5), ('LSUV', 1, 2, .6), ('LSUV', 1, 3, .9),
            ('batch norm', 1, 1, .55), ('batch norm', 1, 2, .7)]
    df = pd.DataFrame(rows, columns=['arm', 'seed', 'epoch', 'accuracy'])
    assert how_far(df) == 'the first 2 of 230 epochs, 1 seed: LSUV 60.0 %, batch norm 70.0 %'
    both = pd.concat([df, df.assign(seed=2)])
    assert how_far(both, 2) == 'all 2 epochs, 2 seeds: LSUV 60.0 ± 0.0 %, batch norm 70.0 ± 0.0 %'


@pytest.mark.parametrize('name', STARTS)
def test_starts(name):
    model = fitnet4(width=.25, depth=.3)
    was = [p.detach().clone() for p in model.parameters()]
    cbs = start(model, name, 'mean std')
    same = [torch.equal(p, w) for p, w in zip(model.parameters(), was)]
    assert all(same) if name == 'PyTorch' else not any(same)
    assert [cb.options['order'] for cb in cbs] == (['mean std'] if name == 'LSUV' else [])
    w = model[2].weight.flatten(1)  # a row an output channel, with 72 inputs
    if name in ('LSUV', 'orthonormal'): assert torch.allclose(w @ w.T, torch.eye(len(w)), atol=1e-5)
    if name == 'MSRA': assert w.std().item() == pytest.approx((2/w.shape[1])**.5, rel=.1)
    if name == 'Xavier': assert w.abs().max() <= (6/(9*(8 + len(w))))**.5
    biases = [m.bias for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert name == 'PyTorch' or not any(b.any() for b in biases)


@pytest.mark.parametrize('act', [nn.ReLU, nn.GELU, nn.SiLU, partial(nn.LeakyReLU, .1)])
@pytest.mark.parametrize('width', [8, 7, 1])
def test_mirrored_weights_make_the_network_linear(act, width):
    convs = nn.Conv2d(3, width, 3), act(), nn.Conv2d(width, 2*width, 3, stride=2), act()
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(8*width, width), act(), nn.Linear(width, 3)).double()
    mirrored(model)
    a,b = torch.randn(2, 5, 3, 7, 7).double()
    linear = torch.allclose(model(a - 3*b), model(a) - 3*model(b), atol=1e-9)
    assert linear == (width == 8)  # an odd number of units cannot pair up
    assert model(a).std(0).min() > 1e-3 and not any(m.bias.any() for m in model.modules() if hasattr(m, 'bias'))


@pytest.mark.parametrize('layer,name', [(nn.Conv2d(8, 8, 3, groups=8), '1.weight'), (nn.Embedding(3, 8), '1.weight'),
                                        (nn.ConvTranspose2d(8, 8, 2), '1.weight'),
                                        (nn.MultiheadAttention(8, 2), '1.in_proj_weight')])
def test_mirrored_weights_take_a_chain_of_plain_layers(layer, name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Linear(8, 2))
    was = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"model: '{name}' is no weight of a Conv2d without groups"): mirrored(model)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), was))


def test_mirrored_weights_are_orthonormal_before_they_are_paired():
    model = deep_relu(4, 10, 3, width=6)
    cbs = start(model, 'LSUV', 'std', pairs=True)
    first,*_,last = (m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear))
    assert [cbs[0].options[k] for k in ('order', 'preinit')] == ['std', None]
    for half, other in ((first[:3], first[3:]), (last[:, :3], last[:, 3:])):
        assert torch.allclose(half @ half.T, torch.eye(3), atol=1e-6) and torch.equal(half, -other)


def test_without_a_name_it_lists_them(capsys):
    assert main([]) == main(['--help']) == 0
    said = capsys.readouterr().out
    assert len(EXPERIMENTS) == 9 and all(f'\n  {name} ' in said for name in EXPERIMENTS)
    assert "'nothing' is no experiment" in main(['nothing']) and 'thread' in main(['nothing'])


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_help_lists_the_options(name, capsys):
    with pytest.raises(SystemExit, match='0'): main([name, '--help'])
    said = capsys.readouterr().out
    options = ['--seeds', '--out'] + ['--data', '--download', '--n ']*(name != 'why')
    assert f'usage: python -m experiments {name}' in said and all(o in said for o in options) and 'kwargs' not in said


@pytest.mark.parametrize('args,says', [
    ('thread --data /no/such', '--data: got .*/no/such'),
    ('thread --seeds 0', '--seeds: got 0; it takes a positive number'),
    ('thread --lsuv-bs 0', '--lsuv-bs: got 0'),
    ('port --lrs 0.1,x', "--lrs: got '0.1,x'; it takes positive numbers separated by commas"),
    ('port --lrs 0', "--lrs: got '0'"),
    ('activations --acts gelu',
     "--acts: got 'gelu'; it takes any of maxout, ReLU, VLReLU, tanh, sigmoid, separated by commas"),
    ('activations --inits ,', "--inits: got ','; it takes any of LSUV"),
    ('batchnorm --init LSUV', "--init: got 'LSUV'"),
    ('batchnorm --act relu,tanh', "--act: got 'relu,tanh'; it takes one of maxout"),
    ('batchnorm --scale big', "--scale: got 'big'; it takes any of small, quarter, paper"),
    ('batchsize --sizes 8,16.5', "--sizes: got '8,16.5'; it takes positive whole numbers"),
    ('batchsize --sizes 2000 --size 8', '--sizes: got 2000; .* gives at most 1437'),
    ('depth --depths 0', "--depths: got '0'"),
])
def test_bad_options_are_named(args, says, tmp_path):
    error = main([*args.split(), '--out', str(tmp_path)])
    assert isinstance(error, str) and re.search(says, error), error
    assert not list(tmp_path.iterdir())


def test_a_command(tmp_path):
    assert main(['why', '--seeds', '1', '--width', '20', '--nums', '500', '--out', str(tmp_path/'a'/'b')]) is None
    assert saved(tmp_path/'a'/'b', 'why', 'why_network')[0].seed.unique().tolist() == [1]


@pytest.mark.parametrize('arm,times', [('LSUV', 0), ('batch norm', 0), ('LSUV mirrored', 1)])
def test_the_mirrored_arm(arm, times, monkeypatch):
    began = []
    monkeypatch.setattr('experiments.starts.mirrored', lambda model: began.append(mirrored(model)))
    df = batchnorm(epochs=1, seeds=1, rounds=1, arms=arm, bs=32, out='', **TINY)
    assert len(began) == times and df.arm.tolist() == [arm]


def without_time(df): return df.drop(columns='seconds').reset_index(drop=True)


@pytest.mark.parametrize('arm', ['LSUV', 'batch norm'])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(arm, tmp_path, monkeypatch):
    options = dict(seeds=1, arms=arm, rounds=1, bs=16, drops='1,2', out='', **TINY)
    whole = batchnorm(epochs=3, **options)
    save,saves = Checkpoint.after_epoch,[]

    def save_and_stop(self):
        saves.append(save(self))
        if len(saves) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(Checkpoint, 'after_epoch', save_and_stop)
    options['checkpoints'] = str(tmp_path)
    with pytest.raises(InputError, match=f'{tmp_path}: there is no checkpoint'): epochs_so_far(tmp_path)
    with pytest.raises(KeyboardInterrupt): batchnorm(epochs=3, **options)
    monkeypatch.undo()
    [path] = tmp_path.glob('*.pt')
    assert torch.load(path, weights_only=False)['epochs'] == 2
    pd.testing.assert_frame_equal(without_time(epochs_so_far(tmp_path)), without_time(whole)[:2])
    again = batchnorm(epochs=3, **options)
    assert again.epoch.tolist() == [1, 2, 3] and again.seconds.is_monotonic_increasing
    pd.testing.assert_frame_equal(without_time(again), without_time(whole))
    pd.testing.assert_frame_equal(batchnorm(epochs=3, **options), again)  # nothing is left to do
    with pytest.raises(InputError, match=r'was made with lr 0.01; this run has 0.02'):
        batchnorm(epochs=4, lr=.02, **options)


def test_the_learning_rate_drops(monkeypatch):
    seen = []
    monkeypatch.setattr('experiments.study._Epochs.after_train', lambda cb: seen.append(cb.opt.hypers[0]['lr']))
    batchnorm(epochs=4, seeds=1, arms='neither', rounds=1, bs=32, lr=.5, drops='1,3', out='', **TINY)
    assert seen == pytest.approx([.5, .05, .05, .005])


@pytest.mark.parametrize('options, epochs', [({}, 230), (dict(epochs=3), 3)])  # 3: the beginning of the same schedule
def test_the_papers_scale(options, epochs, monkeypatch):
    class Stop(Exception): pass

    def runs(images, bs, n, epochs, drops, checkpoints): raise Stop(images.train[0].shape[-1], bs, epochs, drops)
    monkeypatch.setattr('experiments.batchnorm.Runs', runs)
    with pytest.raises(Stop) as e: batchnorm(scale='paper', n=32, **options)
    assert e.value.args == (32, 128, epochs, [100, 150, 200])
