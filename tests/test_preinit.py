"The weights that LSUV starts from: orthonormal ones, or a function's of the user."
import pytest
import torch
from checked import init, samples, statuses
from fingerprint import fingerprint
from networks import Mod
from torch import nn
from torch.nn.utils import parametrize

from fastai_lsuv import lsuv_init
from fastai_lsuv.start import orthogonal_


# --- orthonormal weights

def test_orthogonal_weights_by_group_and_through_parametrizations():
    weight_norm,old_weight_norm = torch.nn.utils.parametrizations.weight_norm,torch.nn.utils.weight_norm
    grouped,normed = nn.Conv2d(8, 8, 1, groups=2),weight_norm(nn.Conv2d(8, 8, 1))
    old = old_weight_norm(nn.Conv2d(8, 4, 1))
    net = nn.Sequential(grouped, normed, old)
    init(net, torch.randn(8, 8, 6, 6), order='std', preinit='orthogonal')
    for w in (net[0].weight[:4], net[0].weight[4:], net[1].weight, net[2].weight):
        w = w.flatten(1)
        gram = w @ w.T
        torch.testing.assert_close(gram, torch.eye(len(w))*gram[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('narrow', ['', 'autocast', 'medium'])
def test_small_orthogonal_weights_are_those_of_torch(narrow):
    "They are wide, tall and nearly square. Products may be taken in half precision."
    precision = torch.get_float32_matmul_precision()
    try:
        if narrow == 'medium':
            torch.set_float32_matmul_precision('medium')
        for out, into in [(32, 576), (100, 40), (40, 40), (40, 60), (8, 64), (64, 3), (1, 50)]:
            layer, want = nn.Linear(into, out), torch.empty(out, into)
            torch.manual_seed(out)
            with torch.autocast('cpu', torch.bfloat16, enabled=narrow == 'autocast'):
                orthogonal_(layer)
            torch.manual_seed(out)
            nn.init.orthogonal_(want)
            assert torch.equal(layer.weight, want)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_parametrization_whose_inverse_fails():
    "It may refuse a weight. Any other error is the user's to see, and nothing is changed."
    class Halves(nn.Module):
        def __init__(self, error):
            super().__init__()
            self.error = error
        def forward(self, w): return w/2
        def right_inverse(self, w):
            if self.training: raise self.error
            return 2*w
    def net(error):
        net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()
        parametrize.register_parametrization(net[0], 'weight', Halves(error).eval())
        return net.train()
    for error in (ValueError('not in the manifold'), NotImplementedError()):
        assert statuses(init(net(error), 7*samples(), preinit='orthogonal')) == {'0': 'ok', '1': 'ok'}
    model = net(torch.OutOfMemoryError('too large'))
    was = fingerprint(model)
    with pytest.raises(torch.OutOfMemoryError, match='too large'):
        lsuv_init(model, samples(), preinit='orthogonal')
    assert fingerprint(model) == was


def test_weights_of_zeros_and_frozen_ones_stay():
    "So does the state of the generator. The biases stay, too."
    zero,frozen = nn.Linear(200, 200),nn.Linear(200, 200)
    nn.init.zeros_(zero.weight)
    frozen.weight.requires_grad_(False)
    was,state = fingerprint(nn.ModuleList([zero, frozen])),torch.get_rng_state()
    for layer in zero, frozen: orthogonal_(layer)
    assert fingerprint(nn.ModuleList([zero, frozen])) == was and torch.equal(torch.get_rng_state(), state)


# --- functions of the user's

def test_preinit_functions():
    started = []
    def start(m):
        started.append(m)
        nn.init.constant_(m.weight, 1.)
        m.weight.data[0] *= -1
    attending = Mod(lambda self, x: self.attn(x, x, x)[0], attn=nn.MultiheadAttention(4, 2, batch_first=True))
    net = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), attending)
    init(net, torch.randn(8, 5, 16), preinit=start)
    layers = [m for m in started if m in set(net.modules())]
    assert layers == [net[0], net[2].attn.out_proj] and (net[0].weight[0] == -net[0].weight[1]).all()
    others = [m for m in started if m not in layers]  # stand for the projections of query, key and value
    assert [type(m) for m in others] == [nn.Linear]*3 and all(m.weight.shape == (4, 4) for m in others)
    assert (net[2].attn.in_proj_weight[8] == -net[2].attn.in_proj_weight[9]).all()


def test_a_preinit_that_puts_new_parameters_in_place_of_the_old():
    net = nn.Sequential(nn.Linear(16, 4))
    weight = net[0].weight  # an optimizer may hold it
    def start(m):
        m.weight = nn.Parameter(torch.ones_like(m.weight))
    x = samples()
    assert init(net, x, preinit=start)['0'].status == 'ok'
    assert net[0].weight is weight and (weight == weight[0, 0]).all()
    assert net(x).std().item() == pytest.approx(1, abs=1e-3)
