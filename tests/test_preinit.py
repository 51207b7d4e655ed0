"The weights that LSUV starts from: orthonormal ones, or a function's of the user."
import pytest
import torch
from checked import init, samples, statuses
from fingerprint import fingerprint
from networks import Mod
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastai_lsuv import lsuv_init
from fastai_lsuv.start import orthogonal_


def test_orthogonal_weights_by_group_and_through_parametrizations():
    normed,old = parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),nn.utils.weight_norm(nn.Conv2d(8, 4, 1))
    net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), normed, old)
    init(net, torch.randn(8, 8, 6, 6), order='std', preinit='orthogonal')
    for w in net[0].weight[:4], net[0].weight[4:], net[1].weight, net[2].weight:
        gram = w.flatten(1) @ w.flatten(1).T
        torch.testing.assert_close(gram, torch.eye(len(w))*gram[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('narrow', ['', 'autocast', 'medium'])
def test_small_orthogonal_weights_are_those_of_torch(narrow, request):
    "They are wide, tall and nearly square. Products may be taken in half precision."
    request.addfinalizer(lambda was=torch.get_float32_matmul_precision(): torch.set_float32_matmul_precision(was))
    if narrow == 'medium': torch.set_float32_matmul_precision('medium')
    for out, into in [(32, 576), (100, 40), (40, 40), (40, 60), (8, 64), (64, 3), (1, 50)]:
        layer,want = nn.Linear(into, out),torch.empty(out, into)
        torch.manual_seed(out)
        with torch.autocast('cpu', torch.bfloat16, enabled=narrow == 'autocast'): orthogonal_(layer)
        torch.manual_seed(out)
        assert torch.equal(layer.weight, nn.init.orthogonal_(want))


@pytest.mark.parametrize('error, is_refusal', [
    (ValueError('not in the manifold'), True),
    (NotImplementedError(), True),
    (torch.OutOfMemoryError('too large'), False),
], ids=lambda v: type(v).__name__)
def test_a_parametrization_may_refuse_a_weight_and_any_other_error_is_raised(error, is_refusal):
    class Halves(nn.Module):
        def forward(self, w): return w/2
        def right_inverse(self, w):
            if self.training: raise error
            return 2*w
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    parametrize.register_parametrization(net[0], 'weight', Halves().eval())
    net.train()
    if is_refusal:
        assert statuses(init(net, 7*samples(), preinit='orthogonal')) == {'0': 'ok', '1': 'ok'}
        return
    was = fingerprint(net)
    with pytest.raises(type(error)): lsuv_init(net, samples(), preinit='orthogonal')
    assert fingerprint(net) == was


def test_weights_of_zeros_and_frozen_ones_stay():
    "So does the state of the generator. The biases stay, too."
    net = nn.ModuleList([nn.Linear(200, 200), nn.Linear(200, 200)])
    nn.init.zeros_(net[0].weight)
    net[1].weight.requires_grad_(False)
    was,state = fingerprint(net),torch.get_rng_state()
    for layer in net: orthogonal_(layer)
    assert fingerprint(net) == was and torch.equal(torch.get_rng_state(), state)


def test_a_function_of_the_user_starts_layers_and_the_projections_of_attention():
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


def test_a_function_that_puts_new_parameters_in_place_of_the_old():
    net,x = nn.Sequential(nn.Linear(16, 4)),samples()
    weight = net[0].weight  # an optimizer may hold it
    def start(m):
        m.weight = nn.Parameter(torch.ones_like(m.weight))
    assert init(net, x, preinit=start)['0'].status == 'ok'
    assert net[0].weight is weight and (weight == weight[0, 0]).all()
    assert net(x).std().item() == pytest.approx(1, abs=1e-3)
