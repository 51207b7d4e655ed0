"What `lsuv_init` is told: options it takes, and those it refuses."
import pytest
import torch
from checked import init, samples
from fingerprint import fingerprint
from networks import Logged, Mod
from torch import nn

from fastai_lsuv import lsuv_init


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
