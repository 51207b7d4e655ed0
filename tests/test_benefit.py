"The study of whether LSUV helps: its runs can be stopped, its tables say what the runs say, its networks are right."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from experiments import benefit as study
from experiments import tasks
from experiments.benefit import APART, BESIDE_NORMS, SCALES, STARTS, arms, before_norms, benefit, steps_to
from experiments.data import InputError, get_images
from experiments.ledger import Ledger
from experiments.signal import begun, between_samples, by_layer, signal, summary
from experiments.verdict import at_best_rate, behind, compared, counts, gains, picture, rates, scores, steps
from experiments.zoo import GPT, ZOO, _resnet
from fastai_lsuv import lsuv_init

pytestmark = pytest.mark.usefixtures('axes')
RATES = {'Adam': [.001, .01], 'SGD': [.1]}


# --- a study that can be stopped

def test_a_ledger_knows_what_is_done(tmp_path):
    path = tmp_path/'a'/'runs.csv'
    ledger = Ledger(path, ['name', 'seed'], ['score'])
    ledger.add(dict(name='a, b', seed=1, score='0.5', more=3))
    assert dict(name='a, b', seed=1) in ledger and dict(name='a, b', seed=2) not in ledger
    again = Ledger(path, ['name', 'seed'], ['score'])
    again.add(dict(name='c', seed=2, score=''))
    df = Ledger(path, ['name', 'seed'], ['score']).df()
    assert df.name.tolist() == ['a, b', 'c'] and df.seed.tolist() == [1, 2] and df.score.tolist()[0] == .5
    assert len(path.read_text().splitlines()) == 3


def test_a_ledger_drops_a_line_that_was_cut_off(tmp_path):
    path = tmp_path/'runs.csv'
    path.write_text('name,seed,score\na,1,0.5\nb,1,0.')
    ledger = Ledger(path, ['name', 'seed'], ['score'])
    assert dict(name='b', seed=1) not in ledger and len(ledger) == 1
    ledger.add(dict(name='b', seed=1, score=.25))
    assert path.read_text() == 'name,seed,score\na,1,0.5\nb,1,0.25\n'


def test_a_ledger_refuses_another_commands_file(tmp_path):
    path = tmp_path/'runs.csv'
    path.write_text('name,loss\na,1\n')
    with pytest.raises(InputError, match=r'runs.csv: its columns are name, loss; .* name, seed, score'):
        Ledger(path, ['name', 'seed'], ['score'])


def test_without_a_file_the_ledger_is_in_memory():
    ledger = Ledger(None, ['name'], ['score'])
    ledger.add(dict(name='a', score=1))
    assert dict(name='a') in ledger and ledger.df().score.tolist() == [1]


def test_the_first_seed_comes_first():
    jobs = arms(['CNN ReLU', 'MLP', 'CNN batch norm'], RATES, 2)
    assert [j['seed'] for j in jobs] == sorted(j['seed'] for j in jobs)
    first = [tuple(j.values()) for j in jobs if j['seed'] == 1 and j['lr'] in (.01, .1)]
    starts = {(n, opt): [j[2] for j in first if j[:2] == (n, opt)] for n in ZOO for opt in RATES}
    assert starts['CNN ReLU', 'Adam'] == starts['CNN ReLU', 'SGD'] == starts['MLP', 'Adam'] == list(STARTS)
    assert not starts['MLP', 'SGD'] and starts['CNN batch norm', 'SGD'] == BESIDE_NORMS
    assert len({tuple(j.items()) for j in jobs}) == len(jobs)


def test_a_second_start_goes_on(tmp_path, monkeypatch, capsys):
    options = dict(scale='ci', networks='MLP', lrs='0.01', out=str(tmp_path))
    first = benefit(seeds=1, **options)
    of = list(STARTS)
    assert first.start.tolist() == of
    assert first.normalized.where(~first.undone, '6 of 6').fillna('').tolist() == ['', *['6 of 6']*6]
    assert not first.undone[:2].any() and first.score.nunique() > 1
    ran = []
    real = study.run
    monkeypatch.setattr(study, 'run', lambda *args: ran.append(args[2]) or real(*args))
    second = benefit(seeds=2, **options)
    assert [j['seed'] for j in ran] == [2]*len(of) and len(second) == 2*len(of)
    assert second[second.seed == 1].score.tolist() == first.score.tolist()
    assert 'Points behind the best' in capsys.readouterr().out
    assert (tmp_path/'benefit.png').read_bytes()[:4] == b'\x89PNG'


def test_a_run_depends_on_its_seed_alone():
    job = dict(network='MLP', optimizer='Adam', start='orthonormal', lr=.01, seed=1)
    def go(**more): return study.run(ZOO['MLP'], lambda name: tasks.diabetes(), job | more, SCALES['ci'])['loss']
    torch.manual_seed(5)
    assert go() == go() and go() != go(seed=2)


@pytest.mark.parametrize('options,says', [
    (dict(scale='large'), "--scale: got 'large'; it takes any of ci, small, medium"),
    (dict(networks='CNN'), "--networks: got 'CNN'; it takes any of CNN ReLU"),
    (dict(seeds=0), '--seeds: got 0'), (dict(sgd_lrs='x'), "--sgd-lrs: got 'x'"),
])
def test_bad_options(options, says):
    with pytest.raises(InputError, match=says):
        benefit(out='', **options)


def test_layers_before_a_norm_are_left_out():
    images = get_images(n=64, size=16)
    task,x = tasks.classify(images),images.train[0][:16]
    for name in ('CNN batch norm', 'ResNet batch norm', 'xresnet batch norm'):
        torch.manual_seed(0)
        model = ZOO[name].build(task)
        was = {n: t.clone() for n, t in model.state_dict().items()}
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        found = before_norms(model, x)
        assert found == layers[:-1] and all(torch.equal(was[n], t) for n, t in model.state_dict().items())
        job = dict(network=name, optimizer='Adam', start='kept' + APART, lr=.01, seed=1)
        assert study.run(ZOO[name], lambda of: task, job, SCALES['ci'])['normalized'] == '1 of 1'
    assert before_norms(ZOO['CNN ReLU'].build(task), x) == []


@pytest.mark.parametrize('start', [s for s in STARTS if 'mirrored' in s])
def test_mirrored_networks_start_mirrored(start):
    task = tasks.classify(get_images(n=64, size=16))
    x,_ = task.dls(16).train.one_batch()
    for name in SCALES['medium'].networks:
        if ZOO[name].normed: continue
        model = ZOO[name].build(task)
        report = lsuv_init(model, x, **STARTS[start])
        assert sum(row.start == 'mirrored' for row in report) >= len(report) - 2, name


# --- what the runs say

def runs(*rows):
    "Rows of (network, start, lr, seed, score)."
    df = pd.DataFrame(rows, columns=['network', 'start', 'lr', 'seed', 'score'])
    count = np.where(df.score > .5, 10/df.score, np.nan)
    return df.assign(optimizer='Adam', share=1 - df.score, **{'steps_0.5': count})


RUNS = runs(
    ('a', 'built', .1, 1, .9), ('a', 'built', .1, 2, .1), ('a', 'built', .01, 1, .6), ('a', 'built', .01, 2, .62),
    ('a', 'lsuv', .1, 1, .8), ('a', 'lsuv', .1, 2, .8), ('a', 'lsuv', .01, 1, .05), ('a', 'lsuv', .01, 2, .05),
    ('b', 'built', .1, 1, .7), ('b', 'built', .1, 2, .7), ('b', 'lsuv', .1, 1, .705), ('b', 'lsuv', .1, 2, .705),
    ('c', 'built', .1, 1, .9), ('c', 'built', .1, 2, .9), ('c', 'lsuv', .1, 1, .4), ('c', 'lsuv', .1, 2, .4))


def test_the_best_rate_is_that_of_the_mean():
    best = at_best_rate(RUNS)
    assert best[(best.network == 'a') & (best.start == 'built')].lr.unique() == [.01]
    assert scores(RUNS).loc['a'].tolist() == ['61.0 ± 1.4', '80.0 ± 0.0']


def test_a_rate_counts_if_every_seed_trains():
    t = rates(RUNS)
    assert t.loc['a'].tolist() == ['1 of 2', '1 of 2']  # one seed of `built` fails at .1
    assert t.loc['c', 'lsuv'] == '1 of 1'


def test_steps_of_the_rate_that_gets_there_first():
    t = steps(RUNS)
    assert t.loc['a', 'lsuv'] == '12' and t.loc['c', 'lsuv'] == '-' and t.loc['a', 'built'] == '16'


def test_verdicts():
    versus = compared(RUNS, 'built').set_index('network')
    assert versus.verdict.to_dict() == dict(a='ahead', b='level', c='behind')
    assert versus.ahead.to_dict() == pytest.approx(dict(a=.19, b=.005, c=-.5))
    assert counts(versus.reset_index()).loc['lsuv'].tolist() == [1, 1, 1]


def test_a_lead_within_its_error_is_level():
    noisy = runs(('a', 'built', .1, 1, .5), ('a', 'built', .1, 2, .5),
                 ('a', 'lsuv', .1, 1, .45), ('a', 'lsuv', .1, 2, .65))
    assert compared(noisy, 'built').verdict.tolist() == ['level']


def test_points_behind_the_best():
    t = behind(RUNS, ['built', 'lsuv'])
    assert t['mean'].to_dict() == dict(built=6.5, lsuv=16.7) and t['most'].to_dict() == dict(built=19., lsuv=50.)
    assert t['on'].to_dict() == dict(built='a, Adam', lsuv='c, Adam')
    assert t['best or within a point'].to_dict() == dict(built=2, lsuv=2)


def test_points_gained_over_the_default():
    t = gains(RUNS, ['built', 'lsuv'], 'built')
    each = np.array([19, .5, -50])  # networks a, b and c
    assert t.index.tolist() == ['lsuv'] and t.loc['lsuv', 'gain'] == pytest.approx(each.mean(), abs=.06)
    assert t.loc['lsuv', 'error'] == pytest.approx(each.std(ddof=1)/3**.5, abs=.06)
    sgd = RUNS[RUNS.network == 'a'].assign(optimizer='SGD', score=lambda d: d.score.where(d.start == 'built', 1.))
    t = gains(pd.concat([RUNS, sgd]), ['built', 'lsuv'], 'built')  # 19 and 39 points on network a count as 29
    assert t.loc['lsuv', 'gain'] == pytest.approx((29 + .5 - 50)/3, abs=.06)


def test_another_optimizer_has_rows_of_its_own():
    both = pd.concat([RUNS, RUNS.assign(optimizer='SGD')])
    assert list(scores(both).index) == ['a', 'b', 'c', 'a, SGD', 'b, SGD', 'c, SGD']


def test_picture_shows_each_start():
    fig = picture(RUNS, ['built', 'lsuv'])
    assert [ax.get_title() for ax in fig.axes] == ['at the best learning rate', 'mean over 2 learning rates']
    built,_ = (line for line in fig.axes[0].get_lines())
    assert list(built.get_xdata()) == pytest.approx([61, 70, 90])


def test_steps_to_shares_of_the_constant_loss():
    assert steps_to([2., 1.7, .9, .6, .4], 2.) == {'steps_0.9': 2, 'steps_0.75': 3, 'steps_0.5': 3, 'steps_0.25': 5}
    assert steps_to([2.], 2.)['steps_0.9'] == '' and steps_to([float('nan')], 2.)['steps_0.9'] == ''


# --- the tasks and the networks

@pytest.fixture(scope='module')
def images(): return get_images(n=64, size=8)


def test_what_a_constant_answer_scores():
    assert tasks.entropy(torch.tensor([0, 0, 1, 1])) == pytest.approx(math.log(2))
    assert tasks.entropy(torch.tensor([[2, 2]])) == 0
    assert tasks.explained(torch.zeros(4, 1), torch.tensor([[1.], [-1], [1], [-1]])) == 0
    assert tasks.accuracy(torch.tensor([[[1., 0], [0, 1]]]), torch.tensor([[0, 0]])) == .5


def test_a_segment_is_told_by_its_class(images):
    x,y = next(iter(tasks.segment(images).dls(8).train))
    assert y.shape == (8, 8, 8) and y.max() <= 10
    for one in y: assert len(one.unique()) == 2 and (one == 0).any()  # the background, and one class
    pred = nn.functional.one_hot(torch.where(y > 0, y, 1), 11).movedim(-1, 1).float()
    assert tasks._foreground(pred, y) == 1 and tasks.accuracy(pred, y) < 1


@pytest.mark.parametrize('make', [tasks.diabetes, tasks.tumours, tasks.pages, tasks.characters])
def test_tasks_are_the_same_each_time_and_hold_out_a_fifth(make):
    a,b = make(),make()
    n,held = (len(part) for part in (a.dls(16).train_ds, a.dls(16).valid_ds))
    assert a.constant == b.constant and .15 < held/(n + held) < .27
    x,y = a.dls(16).valid.one_batch()[0],b.dls(16).valid.one_batch()[0]
    assert torch.equal(x, y)


def test_characters_are_to_be_predicted_by_those_before():
    x,y = tasks.characters().dls(16).train.one_batch()
    assert torch.equal(x[:, 1:], y[:, :-1])
    model = GPT(tasks.characters())
    other = x.clone()
    other[:, 20:] = 5
    out,new = model(x),model(other)
    assert torch.allclose(out[:, :, :20], new[:, :, :20], atol=1e-6) and not torch.allclose(out, new)


@pytest.mark.parametrize('name', ZOO)
def test_each_network_trains_a_step(name):
    entry = ZOO[name]
    images = get_images(n=64, size=entry.size)
    task = study._TASKS[entry.task](lambda: images)
    torch.manual_seed(0)
    model = entry.build(task)
    *xb,yb = task.dls(16).train.one_batch()
    out = model.train()(*xb)
    out = out[0] if isinstance(out, tuple) else out
    loss = task.loss(out, yb)
    loss.backward()
    assert loss.item() < 3*task.constant + 1 and 0 <= task.score(out, yb) <= 1 or entry.task == 'diabetes'
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def weights_by_shape(model):
    "Std of a weight by its shape, and whether there is no bias."
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {(m.weight.shape, m.bias is None): m.weight.std().item() for m in layers}


def test_the_resnet_is_torchvisions(images):
    torch.manual_seed(0)
    model,other = _resnet(tasks.classify(images), width=64),resnet18(num_classes=10)
    ours,theirs = list(model.parameters()),list(other.parameters())
    ours[0],theirs[0] = ours[0].flatten()[:0],theirs[0].flatten()[:0]  # the stems differ
    assert sorted(p.shape for p in ours) == sorted(p.shape for p in theirs)
    a,b = weights_by_shape(model),weights_by_shape(other)
    both = set(a) & set(b)
    assert len(both) == 11 and [a[k] for k in both] == pytest.approx([b[k] for k in both], rel=.03)
    x = images.train[0][:4]
    assert model(x).shape == (4, 10) and not torch.equal(model(x), model(x.flip(0)))


def test_a_unet_with_batch_norm_has_no_bias_before_it(images):
    task = tasks.segment(images)
    plain,norm = (list(ZOO[name].build(task).modules()) for name in ('U-Net', 'U-Net batch norm'))
    convs = [m for m in norm if type(m) is nn.Conv2d]
    assert [m.bias is None for m in convs] == [True]*10 + [False]  # the head has one
    kinds = [type(m) for m in norm]
    assert kinds.count(nn.BatchNorm2d) == 10
    assert [k for k in kinds if k is not nn.BatchNorm2d] == [type(m) for m in plain]


def test_a_unet_is_trained_for_longer():
    job,at = dict(optimizer='Adam', start='as built', lr=.01, seed=1),SCALES['ci']
    images = get_images(n=at.n, size=at.size)
    def taken(name):
        done = study.run(ZOO[name], lambda of: study._TASKS[of](lambda: images), job | dict(network=name), at)
        return done['steps']
    assert [taken(name) for name in ('CNN ReLU', 'U-Net', 'U-Net batch norm')] == [2, 6, 6]


# --- why some starts fail

def test_variance_between_samples():
    assert between_samples(torch.ones(4, 1)*torch.arange(4.)) == 0
    assert between_samples(torch.arange(4.)[:, None]*torch.ones(1, 3)) == pytest.approx(1)


def test_layers_tell_of_samples_and_gradients():
    torch.manual_seed(0)
    x,y = torch.randn(64, 6),torch.randint(3, (64,))
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    options = dict(order='std', last=.1)
    rows = by_layer(begun(model, options, x), x, y)
    assert options == dict(order='std', last=.1)
    assert [r['layer'] for r in rows] == [1, 2] and [r['std'] for r in rows] == pytest.approx([1, .1], abs=1e-3)
    assert rows[1]['between'] == pytest.approx(between_samples(model(x)))
    t = summary(pd.DataFrame(rows).assign(start='s'))
    ratio = rows[0]['grad_std']/rows[1]['grad_std']
    share = 100*rows[1]['between']
    assert t['variance between samples, last layer, %'].tolist() == [f'{share:.1f} to {share:.1f}']
    assert float(t['gradient std, first over last'].iloc[0]) == pytest.approx(ratio, rel=.05)


@pytest.mark.slow
def test_signal(tmp_path, capsys):
    df = signal(n=64, depth=4, width=.1, lrs='0.01,0.001', epochs=1, seeds=1, draws=2, out=str(tmp_path))
    trained = pd.read_csv(tmp_path/'signal_training.csv')
    assert len(trained) == (5 + 6)*2 and df.start.nunique() == 6 and df.seed.max() == 2
    assert df.groupby('network', sort=False).layer.max().tolist() == [19, 4]
    assert 'gradient over weight' in capsys.readouterr().out and (tmp_path/'signal.png').exists()
