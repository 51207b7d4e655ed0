"What is a unit, what it owns, and what becomes of it."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from checked import init, quietly, samples, statuses
from lesson11 import ConvLayer, lesson11
from networks import Mod, cnn, mlp
from torch import nn

from fastai_lsuv import lsuv_init
from fastai_lsuv.units import select_modules

# --- selection

def net_of_blocks():
    block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), block, nn.Flatten(), nn.Linear(8*36, 4))


@pytest.mark.parametrize('modules, names', [
    (None, ['0', '2.0', '2.2', '4']),
    (nn.Conv2d, ['0', '2.0', '2.2']),
    ((nn.Linear, nn.BatchNorm2d), ['1', '4']),
    ('2.*', ['2.0', '2.1', '2.2']),
    ('2.[02]', ['2.0', '2.2']),
    (lambda m: getattr(m, 'in_channels', 0) == 8, ['2.0', '2.2']),
    (['4', nn.Conv2d], ['0', '2.0', '2.2', '4']),
    ({'4'}, ['4']),
    ([lambda m: isinstance(m, nn.Linear), '0', '0'], ['0', '4']),
])
def test_what_modules_selects(modules, names):
    assert [n for n, _ in select_modules(net_of_blocks(), modules)] == names


def test_a_module_can_be_given_itself():
    net = net_of_blocks()
    assert [n for n, _ in select_modules(net, [net[4], net[2][0]])] == ['2.0', '4']


@pytest.mark.parametrize('net, modules, says', [
    (net_of_blocks(), nn.Linear(1, 1), 'Linear is not in the model'),
    (net_of_blocks(), 'a', "no module of Sequential matches 'a'.*Names here: '0', '1', '2'"),
    (lesson11(), (ConvLayer, nn.Conv2d), "modules: '0' and '0.conv' inside it are both selected"),
    (mlp(4, 4, 4), [nn.Linear, '1'], r"modules: '1' \(ReLU\) has no conv, linear or attention layer"),
    (nn.Sequential(nn.LSTM(4, 4)), '0', "'0'.*LSTM.*has no"),
    (mlp(4, 4, 4), '0.weight', 'no module'),  # that of a layer is no unit of its own
    (nn.Sequential(nn.Flatten(), nn.PReLU()), None, 'no conv, linear or attention layer, and applies no weight'),
])
def test_what_cannot_be_selected(net, modules, says):
    with pytest.raises(ValueError, match=says):
        lsuv_init(net, torch.randn(8, 1, 28, 28), modules=modules)


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight,self.shift = nn.Parameter(torch.rand(16, 8)),nn.Parameter(torch.zeros(8))
    def forward(self, x): return torch.relu(x @ self.weight)*2 + self.shift


@pytest.mark.parametrize('net, modules, expected', [
    # Each owns another layer.
    (nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))), ['0', '0.2'], ['ok', 'ok']),
    (nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), [nn.Linear, nn.LayerNorm], ['ok', 'ok']),
    (nn.Sequential(Mine(), nn.Linear(8, 4)), [Mine, nn.Linear], ['no bias', 'ok']),
], ids=['a container and a layer inside', 'a norm', "a layer of one's own"])
def test_whatever_has_a_weight_can_be_named(net, modules, expected):
    for m in net.modules():
        if isinstance(m, nn.LayerNorm): nn.init.constant_(m.weight, 3.)
    assert [*statuses(init(net, samples(), modules=modules, preinit=None)).values()] == expected


@pytest.mark.parametrize('modules', [
    nn.Linear,
    [nn.Linear, nn.MultiheadAttention],
    '*.out_proj',
    lambda m: isinstance(m, nn.Linear),
])
def test_whoever_selects_what_an_attention_holds_means_the_attention(modules):
    rows = init(nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)), torch.randn(8, 5, 16),
                modules=modules)
    assert '0.self_attn' in rows and not any('out_proj' in n for n in rows)
    assert set(statuses(rows).values()) == {'ok'}


# --- shared and frozen weights

def test_two_layers_with_one_weight_are_one_unit():
    model = Mod(lambda self, x: (self.a(x), self.b(3*F.relu(self.a(x)))), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    model.b.weight = model.a.weight
    x = samples()
    row, = quietly(model, x, order='std')
    assert (row.name, row.status) == ('a', 'ok') and model.b.weight is model.a.weight
    with torch.no_grad(): a,b = model(x)
    assert torch.cat([a, a, b]).std().item() == pytest.approx(1, abs=0.1)


def test_of_two_layers_with_one_weight_the_second_is_never_called():
    net = Mod(lambda self, x: self.a(x), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    net.b.weight = net.a.weight
    bias = net.b.bias.detach().clone()
    assert statuses(init(net, 5*samples())) == {'a': 'ok'} and torch.equal(net.b.bias, bias)


def test_frozen():
    net = cnn(3, 8, 8, 8)
    net[0].requires_grad_(False)
    nn.init.constant_(net[2].bias, 5.).requires_grad_(False)  # a mean that no weight is likely to make up for
    was = deepcopy(net)
    with pytest.warns(UserWarning, match='- frozen: 0[.] '):
        report = lsuv_init(net, torch.randn(16, 3, 8, 8) + 1)
    assert [r.status for r in report] == ['frozen', 'no bias', 'ok']
    for a, b in zip(net.parameters(), was.parameters()):
        assert a.requires_grad == b.requires_grad and (a.requires_grad or torch.equal(a, b))


# --- outputs that no weight can normalize, and what "ok" means

def test_not_finite():
    net = nn.Sequential(nn.Linear(16, 16), Mod(lambda self, x: x.log()), nn.Linear(16, 4))
    weight = net[2].weight.detach().clone()
    rows = init(net, samples(), preinit=None)
    assert statuses(rows) == {'0': 'ok', '2': 'non-finite'} and torch.equal(net[2].weight, weight)


@pytest.mark.parametrize('seed', range(5))
def test_ok_means_that_the_mean_is_right_too(seed):
    torch.manual_seed(seed)
    x,net = samples(),nn.Linear(16, 1)
    row, = quietly(net, iter([x, x + 2]), max_iter=1)
    with torch.no_grad(): mean = net(x + 2).mean().item()
    assert row.mean == pytest.approx(mean, abs=1e-4)
    assert row.status == ('ok' if abs(mean) <= 3/8 else 'off')  # three standard errors of 64 samples


def test_with_per_channel_one_channel_that_is_far_off_is_not_ok():
    def identity(layer):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = samples(256, 64)
    wide = x*torch.tensor([5.] + [1.]*63)
    report = quietly(nn.Linear(64, 64), iter([x, wide]), per_channel=True, preinit=identity, max_iter=1)
    assert report[0].status == 'off'


def test_a_start_counts_as_a_pass_that_changed_the_layer():
    x = torch.linalg.qr(samples(256))[0]*16
    report = lsuv_init(nn.Linear(16, 16), x, order='std', tol=0.5, preinit='orthogonal')
    assert report[0].gain == 1 and report[0].passes == 1 and report.ok


def test_what_ran_before_its_input_changed_is_not_called_ok():
    def forward(self, x, flag):
        h = self.t(x)
        if flag: self.b(h)
        return self.c(F.relu(h))
    net = Mod(forward, t=nn.Linear(16, 64), b=nn.Linear(64, 64), c=nn.Linear(64, 8))
    batches = [(samples(), 1), *[(3*samples(), 0) for _ in range(5)]]
    assert [(r.name, r.status) for r in quietly(net, batches)] == [('t', 'ok'), ('b', 'off'), ('c', 'ok')]
