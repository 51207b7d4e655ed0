"What a unit is made of: weights and biases that modules keep in many ways."
import pytest
import torch
from checked import init, samples, statuses
from networks import NETWORKS
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastai_lsuv import lsuv_init


def numbers(params): return [p.detach().clone() for p in params]


def test_a_weight_behind_a_property():
    "The numbers that a property makes are new each time, and may lie where another's lay."
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin,self.log = nn.Linear(16, 16),0.
        def forward(self, x): return self.lin(x)*2.718281828**self.log
        @property
        def weight(self): return 2.718281828**self.log
        @weight.setter
        def weight(self, v):
            self.log = torch.tensor(v).log().item()
    net = nn.Sequential(*[Scaled() for _ in range(4)])
    was = numbers(net.parameters())
    assert set(statuses(init(net, 5*samples(), modules=Scaled, preinit=None)).values()) == {'ok'}
    assert all(map(torch.equal, was[::2], [m.lin.weight for m in net])) and all(m.log != 0 for m in net)


def test_a_frozen_weight_with_a_gain_that_learns():
    from timm.layers import ScaledStdConv2d
    new,old = parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3))
    net = nn.Sequential(ScaledStdConv2d(3, 8, 3), new, old)
    frozen = [net[0].weight, new.parametrizations.weight.original1, old.weight_v]
    for p in frozen: p.requires_grad_(False)
    was = numbers(frozen)
    assert set(statuses(init(net, torch.randn(8, 3, 12, 12))).values()) == {'ok'} and all(map(torch.equal, frozen, was))


# --- weights that are computed

def test_weight_norm_old_and_new():
    model,batch = NETWORKS['hand/weight_norm']()
    assert set(statuses(init(model, batch)).values()) == {'ok'}
    old = model[0]
    torch.testing.assert_close(old.weight, torch._weight_norm(old.weight_v, old.weight_g, 0))  # it is not stale
    norms = torch.linalg.vector_norm(model[2].weight.flatten(1), dim=1)
    assert norms.allclose(model[2].parametrizations.weight.original0.flatten())


def test_pruned():
    model,batch = NETWORKS['hand/pruned']()
    assert set(statuses(init(model, batch)).values()) == {'ok'} and (model[0].weight == 0).float().mean() == 0.5
    torch.testing.assert_close(model[0].weight, model[0].weight_orig*model[0].weight_mask)


@pytest.mark.parametrize('wrap', [torch.nn.utils.spectral_norm, parametrizations.spectral_norm,
                                  parametrizations.orthogonal], ids=lambda f: f'{f.__module__}.{f.__name__}')
def test_what_cannot_be_scaled_is_put_back_and_said_so(wrap):
    net = nn.Sequential(nn.Linear(16, 16), wrap(nn.Linear(16, 16)), nn.Linear(16, 16))
    was = numbers(net[1].state_dict().values())
    rows = init(net, samples(), target_std=lambda name, module: 3. if name == '1' else 1., preinit=None)
    assert statuses(rows) == {'0': 'ok', '1': 'unresponsive', '2': 'ok'} and rows['1'].passes == 0
    assert all(map(torch.equal, net[1].state_dict().values(), was))


def test_standardized_weights_are_scaled_through_their_gain():
    model,batch = NETWORKS['hand/standardized']()
    was = numbers([model[0].weight, model[4].weight])
    rows = init(model, batch, preinit=None)
    assert statuses(rows) == {'0': 'unresponsive', '2': 'unresponsive', '4': 'ok', '6': 'ok'}
    assert all(map(torch.equal, was, [model[0].weight, model[4].weight])) and (model[4].gain != 1).all()


def test_a_parametrization_of_ones_own():
    class Symmetric(nn.Module):
        def forward(self, w): return w.triu() + w.triu(1).T
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    parametrize.register_parametrization(net[0], 'weight', Symmetric())
    rows = init(net, 7*samples())
    assert statuses(rows) == {'0': 'ok', '1': 'ok'} and torch.equal(net[0].weight, net[0].weight.T)


# --- one number a channel

def test_transposed_convs_by_channel():
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3))
    x = torch.randn(16, 4, 8, 8)
    init(net, x, per_channel=True)
    o = net[0](x)
    assert (o.std((0, 2, 3)) - 1).abs().max() < 1e-3 and o.mean((0, 2, 3)).abs().max() < 1e-3


def test_per_channel_where_the_knob_has_no_value_for_each_channel():
    net = nn.Sequential(nn.Linear(16, 8), torch.nn.utils.weight_norm(nn.Linear(8, 8), dim=None))
    with pytest.raises(ValueError, match='per_channel: 1.weight_g does not hold a value for each of 8 channels'):
        lsuv_init(net, samples(), per_channel=True)
