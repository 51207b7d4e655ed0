"How a unit is corrected: in closed form, by running it again, or between passes."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from checked import init, quietly, samples, statuses
from lesson11 import ConvLayer, lesson11
from networks import NETWORKS, Mod, mlp
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init

new_norm = torch.nn.utils.parametrizations.weight_norm


def block(i, o, inplace=False): return nn.Sequential(nn.Linear(i, o), nn.ReLU(inplace))


# --- containers

def test_a_container_is_measured_after_its_activation_and_owns_its_first_layer():
    net = nn.Sequential(block(16, 32, True), block(32, 8, True))
    rows = init(net, samples(256), modules=['0', '1'], order='std')
    assert statuses(rows) == {'0': 'ok', '1': 'ok'} and rows['0'].kind == 'Sequential' and rows['0'].mean > 0.3


@pytest.mark.parametrize('preinit', [None, 'orthogonal'])
@pytest.mark.parametrize('calls', [1, 2, 5])
def test_a_bias_before_a_relu_does_not_move_its_mean_and_is_left(calls, preinit):
    "Shifting it would kill the activations."
    def forward(self, x):
        for _ in range(calls):
            x = 3*self.block(x)
        return x
    net = Mod(forward, block=block(16, 16))
    bias = net.block[0].bias.detach().clone()
    rows = init(net, samples(256), modules='block', preinit=preinit)
    assert rows['block'].status == 'no bias' and torch.equal(net.block[0].bias, bias*(preinit is None))


def test_a_container_that_overwrites_its_input():
    def forward(self, x):
        x *= 2
        return torch.tanh(self.lin(x))*3
    net = nn.Sequential(nn.Linear(16, 16), Mod(forward, lin=nn.Linear(16, 16)), nn.Linear(16, 4))
    rows = init(net, samples(256), modules=['0', '1', '2'], preinit='orthogonal')
    assert rows['1'].status == 'ok' and rows['2'].std == pytest.approx(1, abs=1e-3)


def test_small_weights_beside_large_biases_are_not_unresponsive():
    net = lesson11()
    for l in net[:5]:
        l.conv.weight.data *= 1e-2
    rows = init(net, torch.randn(32, 1, 28, 28), modules=ConvLayer, preinit=None)
    assert set(statuses(rows).values()) == {'ok'}


# --- several calls

@pytest.mark.parametrize('name', ['shared_head_on_a_pyramid', 'recurrent_conv', 'recurrent_residual', 'elman_rnn'])
def test_statistics_are_pooled_over_the_calls_without_biases_too(name):
    rows = init(*NETWORKS[f'hand/{name}'](), order='std')
    assert set(statuses(rows).values()) <= {'ok', 'no bias'}


# --- numbers

class Mine(nn.Linear):  # is run again to be measured
    def forward(self, x): return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize('net', [
    Mod(lambda self, x: self.b(self.a(self.a(x))), a=nn.Linear(16, 16), b=new_norm(nn.Linear(16, 16))),
    nn.Sequential(Mine(16, 16)),
], ids=['called twice', 'run again'])
def test_under_autocast_the_cast_weight_is_not_stale(net):
    with torch.autocast('cpu', torch.bfloat16):
        assert set(statuses(init(net, 9*samples())).values()) == {'ok'}


def test_in_place_activations_do_not_reach_the_statistics():
    model, batch = NETWORKS['hand/inplace_activations']()
    before = layer_stats(model, batch)
    model[1].inplace = model[3].inplace = False
    assert layer_stats(model, batch).pairs == before.pairs
    model[1].inplace = model[3].inplace = True
    assert max(abs(r.std - 1) for r in lsuv_init(model, batch)) < 1e-3


@pytest.mark.parametrize('target', [1e-4, 0.01, 100.])
def test_a_target_far_from_one(target):
    rows = init(mlp(16, 16, 4), samples(), target_std=target, preinit='orthogonal')
    for r in rows.values():
        assert r.status == 'ok' and r.std == pytest.approx(target, rel=2e-3) and abs(r.mean) < 2e-3*target + 1e-5


# --- others' hooks

@pytest.mark.parametrize('wrap', [
    lambda layer: layer,
    new_norm,
    torch.nn.utils.weight_norm,
    lambda layer: nn.Sequential(layer, nn.LeakyReLU()),
], ids=['plain', 'weight norm', 'old weight norm', 'container'])
@pytest.mark.parametrize('in_place', [False, True])
def test_a_pre_hook_that_changes_the_input_is_applied_once(wrap, in_place):
    net = nn.Sequential(nn.Linear(16, 16), wrap(nn.Linear(16, 8)), nn.Linear(8, 4))
    net[1].register_forward_pre_hook(lambda m, a: (a[0].mul_(3) if in_place else a[0]*3,))
    for m in net[1].modules():
        m.register_full_backward_hook(lambda m, i, o: None)  # and these do no harm
    rows = init(net, samples(256), modules=['0', '1', '2'], order='std')
    assert set(statuses(rows).values()) == {'ok'}
    if not in_place:
        assert rows['1'].std == pytest.approx(1, abs=2e-3) and rows['2'].std == pytest.approx(1, abs=2e-3)


# --- models that take a gradient in their forward

class Layer(nn.Sequential):
    def __init__(self, *shape: int):
        super().__init__(nn.Linear(*shape), nn.Softplus())


@torch.enable_grad()
def force(self, x):
    "The gradient of what a net puts out, as in a force field. In training it keeps its graph."
    x = x.detach().requires_grad_()
    energy = self.net(x)
    force, = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
    return energy, -force


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(preinit=None),
    dict(order='std', per_channel=True),
    dict(order='std', modules=Layer),
], ids=str)
def test_a_model_that_takes_a_gradient_in_its_forward(kwargs):
    plain,x,forces = nn.Sequential(Layer(6, 32), Layer(32, 32), nn.Linear(32, 1)),samples(256, 6),[]
    model = Mod(force, net=deepcopy(plain))
    model.register_forward_hook(lambda m, args, out: forces.append(out[1].detach().clone()))
    for m in (plain, model):
        torch.manual_seed(0)
        assert lsuv_init(m, x, **kwargs).ok
    for p, q in zip(model.net.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)
    model(x)
    torch.testing.assert_close(forces[1], forces[-1])  # the second pass runs on the new weights


def test_a_model_that_uses_a_weight_ahead_of_its_layer_and_takes_a_gradient():
    @torch.enable_grad()
    def forward(self, x):
        x = x.detach().requires_grad_()
        h = self.enc(torch.tanh(F.linear(x, self.enc.weight.t())))
        force, = torch.autograd.grad(self.out(torch.tanh(h)).sum(), x)
        return self.head(force)
    net = Mod(forward, enc=nn.Linear(6, 6), out=nn.Linear(6, 1), head=nn.Linear(6, 4))
    rows = {r.name: r.status for r in quietly(net, samples(64, 6), order='std')}
    assert rows == {'enc.weight': 'ok', 'enc': 'tied', 'out': 'ok', 'head': 'ok'}


# --- biases and gains

def test_biases_that_the_model_makes_differ_between_passes():
    "The moments of the whole do not tell what differing biases add to its variance. Those of channels are taken."
    passes = []
    def forward(self, x):
        passes.append(None)
        if len(passes) == 2:
            with torch.no_grad(): self.layer.bias.copy_(torch.linspace(-1, 1, 8))
        return self.layer(x)
    report = lsuv_init(Mod(forward, layer=nn.Linear(16, 8)), [samples(256) for _ in range(6)])
    assert report['layer'].status == 'ok' and report.n_passes == 3


@pytest.mark.parametrize('preinit', ['orthogonal', None])
def test_a_shared_bias_belongs_to_the_first_layer_that_runs(preinit):
    net,x = mlp(16, 16, 16),samples(256) + 1
    net[2].bias = net[0].bias
    a, b = lsuv_init(net, x, preinit=preinit)
    with torch.no_grad(): out = net[0](x)
    assert (out.mean().item(), out.std().item()) == pytest.approx((0, 1), abs=1e-2) and a.status == 'ok'
    assert b.std == pytest.approx(1, abs=0.1) and b.status == ('no bias' if abs(b.mean) > 0.1 else 'ok')


def test_a_bias_that_does_not_move_the_mean_is_tried_once():
    net,runs = Mod(lambda self, x: self.head(self.block(x)), block=block(16, 32), head=nn.Linear(32, 8)),[]
    net.block[1].register_forward_hook(lambda *_: runs.append(1))
    report = quietly(net, (samples() for _ in range(20)), modules=['block', 'head'], batch_tol=0.02)
    assert report['block'].status in ('no bias', 'off')
    assert len(runs)/report.n_passes < 8  # 10 and more where each pass tries the bias again


class Standardized(nn.Linear):
    def __init__(self, gain):
        super().__init__(16, 16)
        self.gain = gain
    def forward(self, x):
        w = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, self.gain*w/w.std(1, keepdim=True), self.bias)


@pytest.mark.parametrize('shape', [(1,), (16, 1)])
def test_a_gain_that_two_layers_share_belongs_to_the_first_that_runs(shape):
    gain = nn.Parameter(torch.ones(shape))
    net = nn.Sequential(Standardized(gain), nn.ReLU(), Standardized(gain), nn.ReLU(), nn.Linear(16, 4))
    report = quietly(net, [samples(128) for _ in range(12)])
    assert [r.status for r in report] == ['ok', 'tied', 'ok'] and report.n_passes < 6
