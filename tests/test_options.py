"What `lsuv_init` is told: options it takes, and those it refuses."
import inspect
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from checked import init, samples
from fingerprint import fingerprint
from networks import Logged, Mod
from torch import nn

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, layer_stats, lsuv_init
from fastai_lsuv.measure import Target
from fastai_lsuv.run import Options
from fastai_lsuv.units import layer_unit

# --- what is refused

X = torch.randn(32, 4)
NAN = torch.full((32, 4), float('nan'))
NOT_POSITIVE = [
    (0, ValueError),
    (-1., ValueError),
    (float('nan'), ValueError),
    (float('inf'), ValueError),
    ('1', TypeError),
    (None, TypeError),
    (True, TypeError),
]
BAD = [
    ('order', 'std variance', ValueError),
    ('order', '', ValueError),
    ('order', 3, TypeError),
    *[(name, value, error) for name in ('tol', 'batch_tol', 'target_std') for value, error in NOT_POSITIVE],
    ('target_std', lambda n, m: 0., ValueError),
    ('target_std', lambda n, m: 'x', TypeError),
    ('target_mean', float('nan'), ValueError),
    ('target_mean', None, TypeError),
    ('target_mean', True, TypeError),
    ('max_iter', 0, ValueError),
    ('max_iter', -3, ValueError),
    ('max_iter', 2.5, ValueError),
    ('max_iter', True, ValueError),
    ('max_iter', '3', TypeError),
    ('max_iter', None, TypeError),
    ('preinit', 'kaiming', ValueError),
    ('preinit', 3, TypeError),
    ('preinit', nn.init.kaiming_normal_, TypeError),
    ('modules', [], ValueError),
    ('modules', 'nope', ValueError),
    ('modules', '*.conv', ValueError),
    ('modules', nn.LSTM, ValueError),
    ('modules', lambda m: False, ValueError),
    ('modules', nn.Linear(1, 1), ValueError),
    ('modules', 3, TypeError),
    ('modules', ['lin', 3], TypeError),
    ('modules', ['lin', 'nope'], ValueError),
    ('modules', nn.ReLU, ValueError),
    ('batches', [], ValueError),
    ('batches', iter(()), ValueError),
    ('batches', None, TypeError),
    ('batches', 3, TypeError),
    ('batches', [None], TypeError),
    ('batches', ['x'], TypeError),
    ('batches', NAN, ValueError),
    ('batches', [NAN], ValueError),
    ('batches', (X, {'y': NAN}), ValueError),
    ('n_inp', 0, ValueError),
    ('n_inp', 1.5, ValueError),
    ('n_inp', True, ValueError),
    ('get_input', 3, TypeError),
    ('loss', 3, TypeError),
]


@pytest.mark.parametrize('name, value, error', BAD, ids=[f'{n}-{k}' for k, (n, _, _) in enumerate(BAD)])
def test_bad_arguments_are_named_before_anything_is_changed(name, value, error):
    model = Logged().eval()
    was = fingerprint(model)
    with pytest.raises(error) as e:
        lsuv_init(model, **{'batches': X, name: value})
    assert str(e.value).startswith(name) and any(w in str(e.value) for w in ('takes', 'holds no'))
    assert fingerprint(model) == was


@pytest.mark.parametrize('name, value', [
    ('tol', np.bool_(True)),
    ('max_iter', np.bool_(True)),
    ('target_mean', np.array(1.)),
    ('target_std', torch.tensor(1.)),
    ('tol', 1 + 0j),
    ('max_iter', np.float64(3)),
])
def test_numbers_of_other_kinds_that_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f'^{name}: got '):
        lsuv_init(Logged(), X, **{name: value})


@pytest.mark.parametrize('order, meant', [
    ('Std Mean', 'std mean'),
    ('mean,std', 'mean std'),
    ('std, mean', 'std mean'),
    (['std', 'mean'], 'std mean'),
    (('mean', 'std'), 'mean std'),
    ('std -> mean', 'std mean'),
    ('Mean + Std', 'mean+std'),
    ('std maen', 'std mean'),
    ('variance', 'std'),
    ('Variance, Average', 'std mean'),
    ('MEAN', 'mean'),
    ('std variance', None),
    ('mean+', None),
    ('stdmean', None),
    ('first', None),
    (3, None),
    ('', None),
])
def test_an_order_that_looks_like_a_known_one_is_answered_with_it(order, meant):
    for call in (lambda: lsuv_init(Logged(), X, order=order), lambda: LSUVCallback(order=order)):
        with pytest.raises((TypeError, ValueError), match="^order: .*the words 'mean' and 'std'") as e: call()
        assert ('did you mean' in str(e.value)) == (meant is not None)
        if meant is not None: assert f'did you mean order={meant!r}? It takes' in str(e.value)


@pytest.mark.parametrize('f, name, says', [
    (lsuv_init, 'needed_std', "needed_std: lsuv_init has no such argument; did you mean 'target_std'?"),
    (lsuv_init, 'needed_mean', "did you mean 'target_mean'?"),
    (lsuv_init, 'std_tol', "did you mean 'tol'?"),
    (lsuv_init, 'max_attempts', "did you mean 'max_iter'?"),
    (lsuv_init, 'maxiter', "did you mean 'max_iter'?"),
    (lsuv_init, 'cuda', "leave it out: the model runs on the device that holds it"),
    (layer_stats, 'batches', "did you mean 'batch'?"),
    (layer_stats, 'max_attempts', "it takes model, batch, modules, n_inp, get_input, loss"),
    (LSUVCallback, 'do_orthonorm', "do_orthonorm: LSUVCallback has no such argument; did you mean 'preinit'?"),
    (LSUVCallback, 'min_sample', "did you mean 'min_samples'?"),
    (ActivationStatsRecorder, 'with_hist', "ActivationStatsRecorder has no such argument; did you mean 'hist'?"),
])
def test_an_unknown_argument_is_answered_with_the_one_that_is_meant(f, name, says):
    with pytest.raises(TypeError, match=f'^{name}: ') as e: f(**{name: 1})
    assert says in str(e.value)


def test_what_answers_unknown_arguments_shows_its_own_signature():
    for f in (lsuv_init, layer_stats, LSUVCallback, ActivationStatsRecorder):
        kinds = {p.kind for p in inspect.signature(f).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, f
    assert lsuv_init.__name__ == 'lsuv_init' and lsuv_init.__doc__.startswith('Initialize `model`')
    assert pickle.loads(pickle.dumps(lsuv_init)) is lsuv_init


# --- what is taken

@pytest.mark.parametrize('options', [
    dict(target_mean=np.float32(0.5), target_std=np.float64(2.)),
    dict(target_mean=np.int64(1), target_std=np.int32(2)),
    dict(target_mean=Fraction(1, 2), target_std=Fraction(2)),
    dict(target_mean=-1, target_std=3),
])
def test_numbers_of_any_kind_are_targets(options):
    model,x = nn.Linear(4, 8),torch.randn(64, 4)
    assert lsuv_init(model, x, tol=np.float32(1e-3), batch_tol=np.float64(0.1), max_iter=np.int64(3), **options).ok
    assert model(x).mean().item() == pytest.approx(float(options['target_mean']), abs=2e-3)
    assert model(x).std().item() == pytest.approx(float(options['target_std']), abs=2e-3)


def test_n_inp_may_be_numpys():
    x = torch.randn(64, 4)
    assert lsuv_init(nn.Linear(4, 8), (x, x), n_inp=np.int64(1)).ok


def test_options_hold_what_was_given_and_no_more():
    given = dict(order='std', modules=None, exclude=None, preinit=None, target_mean=0., target_std=2., tol=0.01,
                 batch_tol=0.2, max_iter=3, per_channel=True, baseline=False)
    assert vars(Options.of(dict(given, model=1, loss=None))) == given
    target = Options.of(given).target(layer_unit('lin', nn.Linear(2, 2)))
    assert target == Target((('std',),), 0., 2., 0.01, 0.2, True)


@pytest.mark.parametrize('order', ['std', 'std std'])
def test_a_target_mean_without_a_mean_loop_warns(order):
    with pytest.warns(UserWarning) as said:
        assert lsuv_init(nn.Linear(4, 8), X, order=order, target_mean=0.5)[0].status == 'ok'
    assert [str(w.message) for w in said] == [f"target_mean: got 0.5, but order={order!r} has no mean loop, so "
                                              "target_mean has no effect; add 'mean' to the order"]


@pytest.mark.parametrize('options', [
    dict(order='std'),
    dict(order='std', target_mean=0),
    dict(order='std mean', target_mean=0.5),
    dict(order='mean+std', target_mean=0.5),
])
def test_no_warning_where_the_target_mean_is_aimed_at_or_zero(options):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        lsuv_init(nn.Linear(4, 8), torch.randn(64, 4), **options)


# --- targets

def test_a_target_for_each_unit():
    depth = 4
    def forward(self, x):
        for b in self.blocks:
            x = x + b(x)
        return self.head(x)
    block = lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    net = Mod(forward, blocks=nn.ModuleList([block() for _ in range(depth)]), head=nn.Linear(16, 4))
    asked = []
    def target(name, module):
        asked.append((name, type(module)))
        return depth**-0.5 if name.endswith('.2') else 1.
    rows = init(net, samples(), target_std=target)
    assert asked == [(n, nn.Linear) for n in rows]
    for n, r in rows.items():
        assert r.std == pytest.approx(0.5 if n.endswith('.2') else 1, abs=1e-3)


def test_numbers_of_numpy_are_numbers():
    options = dict(target_std=np.float32(2), max_iter=np.int64(3), tol=np.float64(1e-3), target_mean=np.float32(1))
    row, = lsuv_init(nn.Linear(16, 8), torch.randn(64, 16), **options)
    assert (row.mean, row.std) == pytest.approx((1, 2), abs=1e-3)
    assert lsuv_init(nn.Linear(16, 8), [(torch.randn(64, 16), 0)], n_inp=np.int64(1)).ok


def test_the_warning_of_an_unused_target_points_at_the_caller():
    with pytest.warns(UserWarning, match='target_mean') as said:
        lsuv_init(nn.Linear(16, 8), torch.randn(64, 16), order='std', target_mean=1.)
        LSUVCallback(order='std', target_mean=1.)
    assert [w.filename for w in said] == [__file__]*2
