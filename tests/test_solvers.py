"How a unit is corrected: in closed form, by running it again, or between passes."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from checked import init, quietly, samples, statuses
from lesson11 import ConvLayer, lesson11
from networks import NETWORKS, Mod, cnn
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init

# --- containers

def test_a_container_is_measured_after_its_activation_and_owns_its_first_layer():
    block = lambda i, o: nn.Sequential(nn.Linear(i, o), nn.ReLU(inplace=True))
    net = nn.Sequential(block(16, 32), block(32, 8))
    rows = init(net, samples(256), modules=['0', '1'], order='std')
    assert statuses(rows) == {'0': 'ok', '1': 'ok'} and rows['0'].kind == 'Sequential' and rows['0'].mean > 0.3


def test_a_bias_before_a_relu_does_not_move_its_mean_and_is_left():
    net = nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.ReLU()))
    bias = net[0][0].bias.detach().clone()
    rows = init(net, samples(256), modules='0', preinit=None)
    # Shifting the bias would kill the activations, so it is as it was.
    assert rows['0'].status == 'no bias' and torch.equal(net[0][0].bias, bias)


@pytest.mark.parametrize('calls', [2, 5])
def test_nor_is_it_moved_between_passes_where_the_container_is_called_again(calls):
    def forward(self, x):
        for _ in range(calls):
            x = 3*self.block(x)
        return x
    net = Mod(forward, block=nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    rows = init(net, samples(256), modules='block', preinit='orthogonal')
    assert rows['block'].status == 'no bias' and net.block[0].bias.abs().max() == 0


def test_a_container_that_overwrites_its_input():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(16, 16)
        def forward(self, x):
            x *= 2
            return torch.tanh(self.lin(x))*3
    net = nn.Sequential(nn.Linear(16, 16), Doubling(), nn.Linear(16, 4))
    rows = init(net, samples(256), modules=['0', '1', '2'], preinit='orthogonal')
    assert rows['1'].status == 'ok' and rows['2'].std == pytest.approx(1, abs=1e-3)


def test_small_weights_beside_large_biases_are_not_unresponsive():
    net = lesson11()
    for l in net[:5]:
        l.conv.weight.data *= 1e-2
    rows = init(net, torch.randn(32, 1, 28, 28), modules=ConvLayer, preinit=None)
    assert set(statuses(rows).values()) == {'ok'}


# --- several calls

@pytest.mark.parametrize('name', [
    'hand/shared_head_on_a_pyramid',
    'hand/recurrent_conv',
    'hand/recurrent_residual',
    'hand/elman_rnn',
])
@pytest.mark.parametrize('order', ['std mean', 'std'])
def test_statistics_are_pooled_over_the_calls(name, order):
    model, batch = NETWORKS[name]()
    rows = init(model, batch, order=order)
    assert set(statuses(rows).values()) <= {'ok', 'no bias'}


def test_a_layer_called_at_two_scales_is_right_for_both_together():
    net = Mod(lambda self, x: (self.head(x), self.head(10*x[:7])), head=nn.Linear(16, 8, bias=False))
    x = samples()
    init(net, x)
    a, b = net(x)
    assert torch.cat([a, b]).std().item() == pytest.approx(1, abs=1e-2) and b.std() > 2*a.std()


# --- numbers

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half(dtype):
    net = cnn(3, 16, 16, 8).to(dtype)
    rows = init(net, torch.randn(16, 3, 12, 12, dtype=dtype))
    assert set(statuses(rows).values()) == {'ok'} and net[0].weight.dtype == dtype
    assert max(abs(r.std - 1) for r in rows.values()) < 0.02


def test_under_autocast_the_cast_weight_is_not_stale():
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    net = Mod(lambda self, x: self.b(self.a(self.a(x))), a=nn.Linear(16, 16), b=normed)
    with torch.autocast('cpu', torch.bfloat16):
        assert set(statuses(init(net, 9*samples())).values()) == {'ok'}
    class Mine(nn.Linear):  # is run again to be measured
        def forward(self, x): return F.linear(x, self.weight, self.bias)
    with torch.autocast('cpu', torch.bfloat16):
        assert statuses(init(nn.Sequential(Mine(16, 16)), 9*samples())) == {'0': 'ok'}


def test_in_place_activations_do_not_reach_the_statistics():
    model, batch = NETWORKS['hand/inplace_activations']()
    before = layer_stats(model, batch)
    model[1].inplace = model[3].inplace = False
    assert layer_stats(model, batch).pairs == before.pairs
    model[1].inplace = model[3].inplace = True
    assert max(abs(r.std - 1) for r in lsuv_init(model, batch)) < 1e-3


@pytest.mark.parametrize('target', [1e-4, 0.01, 100.])
def test_a_target_far_from_one(target):
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    rows = init(net, samples(), target_std=target, preinit='orthogonal')
    for r in rows.values():
        assert r.status == 'ok' and r.std == pytest.approx(target, rel=2e-3) and abs(r.mean) < 2e-3*target + 1e-5


# --- others' hooks


@pytest.mark.parametrize('wrap', [
    lambda layer: layer,
    torch.nn.utils.parametrizations.weight_norm,
    torch.nn.utils.weight_norm,
    lambda layer: nn.Sequential(layer, nn.LeakyReLU()),
])
@pytest.mark.parametrize('in_place', [False, True])
def test_a_pre_hook_that_changes_the_input_is_applied_once(wrap, in_place):
    net = nn.Sequential(nn.Linear(16, 16), wrap(nn.Linear(16, 8)), nn.Linear(8, 4))
    net[1].register_forward_pre_hook(lambda m, a: (a[0].mul_(3) if in_place else a[0]*3,))
    rows = init(net, samples(256), modules=['0', '1', '2'], order='std')
    assert set(statuses(rows).values()) == {'ok'}
    if not in_place:
        assert rows['1'].std == pytest.approx(1, abs=2e-3) and rows['2'].std == pytest.approx(1, abs=2e-3)


def test_full_backward_hooks_do_no_harm():
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=False), nn.Linear(16, 8))
    for m in net:
        m.register_full_backward_hook(lambda m, i, o: None)
    assert set(statuses(init(net, samples())).values()) == {'ok'}


# --- models that take a gradient in their forward

class Layer(nn.Sequential):
    def __init__(self, *shape: int):
        super().__init__(nn.Linear(*shape), nn.Softplus())


class Energy(nn.Module):
    "A net whose forward takes the gradient of what it puts out, as a force field does. In training it keeps its graph."
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @torch.enable_grad()
    def forward(self, x):
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
    model = Energy(deepcopy(plain))
    model.register_forward_hook(lambda m, args, out: forces.append(out[1].detach().clone()))
    for m in (plain, model):
        torch.manual_seed(0)
        assert all(r.status == 'ok' for r in lsuv_init(m, x, **kwargs))
    for p, q in zip(model.net.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)
    model(x)
    torch.testing.assert_close(forces[1], forces[-1])  # the second pass runs on the new weights


def test_a_model_that_uses_a_weight_ahead_of_its_layer_and_takes_a_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc,self.out,self.head = nn.Linear(6, 6),nn.Linear(6, 1),nn.Linear(6, 4)
        @torch.enable_grad()
        def forward(self, x):
            x = x.detach().requires_grad_()
            h = self.enc(torch.tanh(F.linear(x, self.enc.weight.t())))
            force, = torch.autograd.grad(self.out(torch.tanh(h)).sum(), x)
            return self.head(force)
    rows = {r.name: r.status for r in quietly(Tied(), samples(64, 6), order='std')}
    assert rows == {'enc.weight': 'ok', 'enc': 'tied', 'out': 'ok', 'head': 'ok'}


def test_biases_that_the_model_makes_differ_between_passes():
    "The moments of the whole do not tell what differing biases add to its variance. Those of channels are taken."
    passes = []

    def forward(self, x):
        passes.append(None)
        if len(passes) == 2:
            with torch.no_grad(): self.layer.bias.copy_(torch.linspace(-1, 1, 8))
        return self.layer(x)

    torch.manual_seed(0)
    net = Mod(forward, layer=nn.Linear(16, 8))
    report = lsuv_init(net, [samples(256) for _ in range(6)])
    assert report['layer'].status == 'ok' and report.n_passes == 3


@pytest.mark.parametrize('preinit', ['orthogonal', None])
def test_a_shared_bias_belongs_to_the_first_layer_that_runs(preinit):
    net = Mod(lambda self, x: self.b(F.relu(self.a(x))), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    net.b.bias = net.a.bias
    x = torch.randn(256, 16) + 1
    report = lsuv_init(net, x, preinit=preinit)
    with torch.no_grad(): a = net.a(x)
    assert (a.mean().item(), a.std().item()) == pytest.approx((0, 1), abs=1e-2) and report['a'].status == 'ok'
    b = report['b']
    assert b.std == pytest.approx(1, abs=0.1) and b.status == ('no bias' if abs(b.mean) > 0.1 else 'ok')


def test_a_bias_that_does_not_move_the_mean_is_tried_once():
    net = Mod(lambda self, x: self.head(self.block(x)), block=nn.Sequential(nn.Linear(16, 32), nn.ReLU()),
              head=nn.Linear(32, 8))
    runs = []
    net.block[1].register_forward_hook(lambda *_: runs.append(1))
    report = quietly(net, (torch.randn(64, 16) for _ in range(20)), modules=['block', 'head'], batch_tol=0.02)
    assert report['block'].status in ('no bias', 'off')
    assert len(runs)/report.n_passes < 8  # 10 and more where each pass tries the bias again


@pytest.mark.parametrize('shape', [(1,), (16, 1)])
def test_a_gain_that_two_layers_share_belongs_to_the_first_that_runs(shape):
    class Standardized(nn.Linear):
        def __init__(self, gain):
            super().__init__(16, 16)
            self.gain = gain
        def forward(self, x):
            w = self.weight - self.weight.mean(1, keepdim=True)
            return F.linear(x, self.gain*w/w.std(1, keepdim=True), self.bias)

    torch.manual_seed(0)
    gain = nn.Parameter(torch.ones(shape))
    net = nn.Sequential(Standardized(gain), nn.ReLU(), Standardized(gain), nn.ReLU(), nn.Linear(16, 4))
    report = quietly(net, [samples(128) for _ in range(12)])
    assert [r.status for r in report] == ['ok', 'tied', 'ok'] and report.n_passes < 6


