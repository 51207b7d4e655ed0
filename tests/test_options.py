"What `lsuv_init` is told: options it takes, and those it refuses."
import inspect
import pickle
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from checked import init, samples
from fingerprint import fingerprint
from networks import Logged
from torch import nn

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, layer_stats, lsuv_init

X = torch.randn(32, 4)
NAN = torch.full((32, 4), float('nan'))

# --- what is refused

REFUSED = [  # The argument, the error, and values
    ('order', ValueError, 'std variance', ''),
    ('order', TypeError, 3),
    *[(name, ValueError, 0, -1., float('nan'), float('inf')) for name in ('tol', 'batch_tol', 'target_std')],
    *[(name, TypeError, '1', None, True) for name in ('tol', 'batch_tol', 'target_std')],
    ('tol', TypeError, np.bool_(True), 1 + 0j),
    ('target_std', ValueError, lambda name, module: 0.),
    ('target_std', TypeError, lambda name, module: 'x', torch.tensor(1.)),
    ('target_mean', ValueError, float('nan')),
    ('target_mean', TypeError, None, True, np.array(1.)),
    ('max_iter', ValueError, 0, -3, 2.5, True, np.float64(3)),
    ('max_iter', TypeError, '3', None, np.bool_(True)),
    ('preinit', ValueError, 'kaiming'),
    ('preinit', TypeError, 3, nn.init.kaiming_normal_),
    ('modules', ValueError, [], 'nope', '*.conv', ['lin', 'nope'], nn.LSTM, nn.ReLU, nn.Linear(1, 1), lambda m: False),
    ('modules', TypeError, 3, ['lin', 3]),
    ('batches', ValueError, [], iter(()), NAN, [NAN], (X, {'y': NAN})),
    ('batches', TypeError, None, 3, [None], ['x']),
    ('n_inp', ValueError, 0, 1.5, True),
    ('get_input', TypeError, 3),
    ('loss', TypeError, 3),
]


@pytest.mark.parametrize('name, error, value', [(name, error, v) for name, error, *values in REFUSED for v in values])
def test_bad_arguments_are_named_before_anything_is_changed(name, error, value):
    model = Logged().eval()
    was = fingerprint(model)
    with pytest.raises(error, match=f'(?s)^{name}.*(takes|holds no)'): lsuv_init(model, **{'batches': X, name: value})
    assert fingerprint(model) == was


ORDERS = [  # What is meant, and how it is written
    ('std mean', 'Std Mean', 'std, mean', ['std', 'mean'], 'std -> mean', 'std maen', 'Variance, Average'),
    ('mean std', 'mean,std', ('mean', 'std')),
    ('mean+std', 'Mean + Std', 'mean & std'),
    ('std', 'variance'),
    ('mean', 'MEAN'),
    (None, 'std variance', 'mean+', 'stdmean', 'first', 3, ''),
]


@pytest.mark.parametrize('meant, order', [(meant, order) for meant, *orders in ORDERS for order in orders])
def test_an_order_that_looks_like_a_known_one_is_answered_with_it(meant, order):
    for call in (lambda: lsuv_init(Logged(), X, order=order), lambda: LSUVCallback(order=order)):
        with pytest.raises((TypeError, ValueError), match="^order: .*the words 'mean' and 'std'") as e: call()
        assert ('did you mean' in str(e.value)) == (meant is not None)
        assert meant is None or f'did you mean order={meant!r}? It takes' in str(e.value)


@pytest.mark.parametrize('f, name, says', [
    (lsuv_init, 'needed_mean', "did you mean 'target_mean'?"),
    (lsuv_init, 'std_tol', "did you mean 'tol'?"),
    (lsuv_init, 'max_attempts', "did you mean 'max_iter'?"),
    (lsuv_init, 'maxiter', "did you mean 'max_iter'?"),
    (layer_stats, 'batches', "did you mean 'batch'?"),
    (layer_stats, 'max_attempts', "it takes model, batch, modules, n_inp, get_input, loss"),
    (LSUVCallback, 'do_orthonorm', "LSUVCallback has no such argument; did you mean 'preinit'?"),
    (LSUVCallback, 'min_sample', "did you mean 'min_samples'?"),
])  # test_messages.py has more
def test_an_unknown_argument_is_answered_with_the_one_that_is_meant(f, name, says):
    with pytest.raises(TypeError, match=f'^{name}: .*{re.escape(says)}'): f(**{name: 1})


def test_what_answers_unknown_arguments_shows_its_own_signature():
    for f in (lsuv_init, layer_stats, LSUVCallback, ActivationStatsRecorder):
        kinds = {p.kind for p in inspect.signature(f).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, f
    assert lsuv_init.__name__ == 'lsuv_init' and lsuv_init.__doc__.startswith('Initialize `model`')
    assert pickle.loads(pickle.dumps(lsuv_init)) is lsuv_init


# --- what is taken

@pytest.mark.parametrize('mean, std', [
    (np.float32(0.5), np.float64(2.)),
    (np.int64(1), np.int32(2)),
    (Fraction(1, 2), Fraction(2)),
    (-1, 3),
])
def test_numbers_of_any_kind_are_taken(mean, std):
    model,x = nn.Linear(4, 8),torch.randn(64, 4)
    assert lsuv_init(model, (x, x), target_mean=mean, target_std=std, tol=np.float32(1e-3), batch_tol=np.float64(0.1),
                     max_iter=np.int64(3), n_inp=np.int64(1)).ok
    assert (model(x).mean().item(), model(x).std().item()) == pytest.approx((float(mean), float(std)), abs=2e-3)


@pytest.mark.parametrize('order', ['std', 'std std'])
def test_a_target_mean_without_a_mean_loop_warns_the_caller(order):
    with pytest.warns(UserWarning) as said:
        assert lsuv_init(nn.Linear(4, 8), X, order=order, target_mean=0.5)[0].status == 'ok'
        LSUVCallback(order=order, target_mean=0.5)
    assert {str(w.message) for w in said} == {f"target_mean: got 0.5, but order={order!r} has no mean loop, so "
                                              "target_mean has no effect; add 'mean' to the order"}
    assert [w.filename for w in said] == [__file__]*2


@pytest.mark.parametrize('order, mean', [('std', 0), ('std mean', 0.5), ('mean+std', 0.5)])
def test_no_warning_where_the_target_mean_is_aimed_at_or_zero(order, mean):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        lsuv_init(nn.Linear(4, 8), torch.randn(64, 4), order=order, target_mean=mean)


def test_a_target_for_each_unit():
    asked = []
    def target(name, module):
        asked.append((name, type(module)))
        return 0.5 if name == '2' else 1.
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    rows = init(net, samples(), target_std=target)
    assert asked == [(n, nn.Linear) for n in '024'] and list(rows) == list('024')
    assert [r.std for r in rows.values()] == pytest.approx([1, 0.5, 1], abs=1e-3)


@pytest.mark.parametrize('argument', ['modules', 'exclude'])
def test_a_name_that_matches_nothing_is_answered_with_what_there_is(argument):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=f"{argument}: no module of Sequential matches 'head'") as e:
        lsuv_init(model, X, **{argument: 'head'})
    assert "Names here: '0', '1', '2'" in str(e.value) and 'no layer applies' not in str(e.value)
