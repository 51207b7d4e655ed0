"What is a unit, what it owns, and what becomes of it."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from checked import init, quietly, samples, statuses
from lesson11 import ConvLayer, lesson11
from networks import NETWORKS, Mod, cnn
from torch import nn

from fastai_lsuv import lsuv_init
from fastai_lsuv.units import Selection, select_modules

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
    with pytest.raises(ValueError, match='Linear is not in the model'):
        select_modules(net, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no module of Sequential matches 'a'.*Names here: '0', '1', '2'"):
        select_modules(net, 'a')


def test_subclasses_are_units():
    class MyConv(nn.Conv2d): pass
    chosen = Selection(nn.Sequential(MyConv(3, 4, 1), nn.LazyLinear(3))).layers
    assert [type(m).__name__ for _, m in chosen] == ['MyConv', 'LazyLinear']


def test_a_container_and_a_layer_inside_it_cannot_both_scale_the_same_weight():
    net = lesson11()
    with pytest.raises(ValueError, match="modules: '0' and '0.conv' inside it are both selected"):
        lsuv_init(net, torch.randn(8, 1, 28, 28), modules=(ConvLayer, nn.Conv2d))
    block = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    assert statuses(init(block, samples(), modules=['0', '0.2'])) == {'0': 'ok', '0.2': 'ok'}  # each its own


def test_a_container_without_a_layer_is_no_unit():
    with pytest.raises(ValueError, match=r"modules: '2' \(ReLU\) has no conv, linear or attention layer"):
        lsuv_init(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()), samples(8, 4), modules=[nn.Linear, '2'])
    with pytest.raises(ValueError, match="'0'.*LSTM.*has no"):
        lsuv_init(nn.Sequential(nn.LSTM(4, 4)), samples(8, 4), modules='0')


def test_a_norm_can_be_named():
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    nn.init.constant_(net[1].weight, 3.)
    rows = init(net, samples(), modules=[nn.Linear, nn.LayerNorm], preinit=None)
    assert statuses(rows) == {'0': 'ok', '1': 'ok'} and net[1].weight.mean().item() == pytest.approx(1, abs=0.01)


def test_a_layer_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight,self.shift = nn.Parameter(torch.rand(16, 8)),nn.Parameter(torch.zeros(8))
        def forward(self, x): return torch.relu(x @ self.weight)*2 + self.shift
    rows = init(nn.Sequential(Mine(), nn.Linear(8, 4)), samples(), modules=[Mine, nn.Linear])
    assert rows['0'].status == 'no bias' and rows['1'].status == 'ok'


def test_attention_is_normalized_through_its_output_projection():
    net = Mod(lambda self, x: self.attn(x, x, x)[0], attn=nn.MultiheadAttention(16, 4, dropout=0.3, batch_first=True))
    rows = init(net.eval(), torch.randn(16, 10, 16))
    assert list(rows) == [*(f'attn.in_proj_weight[{c}]' for c in 'qkv'), 'attn']
    assert all(r.status == 'ok' for r in rows.values()) and net.attn.dropout == 0.3


@pytest.mark.parametrize('modules', [
    nn.Linear,
    [nn.Linear, nn.MultiheadAttention],
    '*.out_proj',
    lambda m: isinstance(m, nn.Linear),
])
def test_whoever_selects_what_an_attention_holds_means_the_attention(modules):
    enc = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    names = [n for n, _ in select_modules(nn.Sequential(enc), modules)]
    assert names[0] == '0.self_attn' and not any('out_proj' in n for n in names)
    assert set(statuses(init(nn.Sequential(enc), torch.randn(8, 5, 16), modules=modules)).values()) == {'ok'}


# --- shared and frozen weights

def test_tied_to_an_embedding():
    model, batch = NETWORKS['hand/tied_embedding']()
    emb = model.emb.weight.detach().clone()
    assert statuses(init(model, batch)) == {'mix': 'ok', 'decoder': 'tied'} and torch.equal(model.emb.weight, emb)


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
    was, bias = deepcopy(net[0]), net[2].bias.detach().clone()
    with pytest.warns(UserWarning, match='- frozen: 0[.] '):
        report = lsuv_init(net, torch.randn(16, 3, 8, 8) + 1)
    assert [r.status for r in report] == ['frozen', 'no bias', 'ok']
    assert torch.equal(net[0].weight, was.weight) and torch.equal(net[0].bias, was.bias)
    assert torch.equal(net[2].bias, bias)
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, False, True, True]


# --- outputs that no weight can normalize

def test_fed_zeros_and_zero_initialized_layers_stay_as_they_are():
    model, batch = NETWORKS['hand/fed_zeros']()
    rows = init(model, batch)
    assert statuses(rows) == {'stem': 'ok', 'after': 'no signal', 'head': 'ok'} and rows['after'].gain == 1
    model, batch = NETWORKS['hand/zero_initialized']()
    assert init(model, batch)['2'].status == 'constant' and not model[2].weight.any() and not model[2].bias.any()


def test_not_finite():
    net = nn.Sequential(nn.Linear(16, 16), Mod(lambda self, x: x.log()), nn.Linear(16, 4))
    weight = net[2].weight.detach().clone()
    rows = init(net, samples(), preinit=None)
    assert statuses(rows) == {'0': 'ok', '2': 'non-finite'} and torch.equal(net[2].weight, weight)


@pytest.mark.parametrize('seed', range(5))
def test_ok_means_that_the_mean_is_right_too(seed):
    torch.manual_seed(seed)
    x = torch.randn(64, 16)
    net = nn.Linear(16, 1)
    row, = quietly(net, iter([x, x + 2]), max_iter=1)
    with torch.no_grad(): mean = net(x + 2).mean().item()
    assert row.mean == pytest.approx(mean, abs=1e-4)
    assert row.status == ('ok' if abs(mean) <= 3/8 else 'off')  # three standard errors of 64 samples


def test_with_per_channel_one_channel_that_is_far_off_is_not_ok():
    x = torch.randn(256, 64)
    wide = x.clone()
    wide[:, 0] *= 5
    report = quietly(nn.Linear(64, 64), iter([x, wide]), per_channel=True, preinit=_identity, max_iter=1)
    assert report[0].status == 'off'


def _identity(layer):
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)


def test_a_start_counts_as_a_pass_that_changed_the_layer():
    net = nn.Linear(16, 16)
    report = lsuv_init(net, torch.linalg.qr(torch.randn(256, 16))[0]*16, order='std', tol=0.5, preinit='orthogonal')
    assert report[0].gain == 1 and report[0].passes == 1 and report.ok


def test_what_ran_before_its_input_changed_is_not_called_ok():
    class Routes(nn.Module):
        def __init__(self):
            super().__init__()
            self.t,self.b,self.c = nn.Linear(16, 64),nn.Linear(64, 64),nn.Linear(64, 8)
        def forward(self, x, flag):
            h = self.t(x)
            if flag: self.b(h)
            return self.c(F.relu(h))

    batches = [(torch.randn(64, 16), 1), *[(torch.randn(64, 16)*3, 0) for _ in range(5)]]
    assert [(r.name, r.status) for r in quietly(Routes(), batches)] == [('t', 'ok'), ('b', 'off'), ('c', 'ok')]
