"Units that are found by what operates on a weight, judged by a mode that knows nothing of the package."
from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import Mod
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.observe.operations import GROUPED


def param(*shape): return nn.Parameter(torch.randn(*shape)*0.02)


class Net(nn.Module):
    "Parameters by name, and a forward that is a function of them and the input."
    def __init__(self, forward, **params):
        super().__init__()
        self.f = forward
        for n, p in params.items(): setattr(self, n, p)
    def forward(self, *args): return self.f(self, *args)


def x(n=256, width=16): return torch.randn(n, width)*3


def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


FORMS = {  # By name: the forward, the shape of `w`, the shape of `b` or `None`, and how the row is named
    'F.linear': (lambda m, x: F.linear(x, m.w, m.b), (24, 16), (24,), 'w'),
    'F.linear by name': (lambda m, x: F.linear(x, bias=m.b, weight=m.w), (24, 16), (24,), 'w'),
    '@': (lambda m, x: x @ m.w, (16, 24), None, 'w'),
    '@ from the left': (lambda m, x: m.w @ x.T, (24, 16), None, 'w'),
    '@ transposed': (lambda m, x: x @ m.w.T, (24, 16), None, 'w'),
    'matmul': (lambda m, x: torch.matmul(x[:, None], m.w), (16, 24), None, 'w'),
    'mm': (lambda m, x: torch.mm(x, m.w), (16, 24), None, 'w'),
    'x.mm': (lambda m, x: x.mm(m.w), (16, 24), None, 'w'),
    'addmm': (lambda m, x: torch.addmm(m.b, x, m.w), (16, 24), (24,), 'w'),
    'addmm with a row': (lambda m, x: torch.addmm(m.b[None], x, m.w), (16, 24), (24,), 'w'),
    'addmm with factors': (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), (16, 24), (24,), 'w'),
    'bmm': (lambda m, x: torch.bmm(x.view(-1, 4, 4).transpose(0, 1), m.w), (4, 4, 12), None, 'w'),
    'baddbmm': (lambda m, x: torch.baddbmm(m.b, x.view(-1, 4, 4).transpose(0, 1), m.w), (4, 4, 12), (4, 1, 12), 'w'),
    'einsum': (lambda m, x: torch.einsum('ni,oi->no', x, m.w), (24, 16), None, 'w'),
    'einsum into heads': (lambda m, x: torch.einsum('bi, ihd', x, m.w), (16, 3, 8), None, 'w'),
    'einsum with an ellipsis': (lambda m, x: torch.einsum('...i,io->...o', x[:, None], m.w), (16, 24), None, 'w'),
    'einsum from a list': (lambda m, x: torch.einsum('ni,io->no', [x, m.w]), (16, 24), None, 'w'),
    'einsum by head': (lambda m, x: torch.einsum('bhi,hio->bho', x.view(-1, 2, 8), m.w), (2, 8, 12), None, 'w'),
    'tensordot': (lambda m, x: torch.tensordot(x, m.w, dims=([1], [1])), (24, 16), None, 'w'),
    'conv1d': (lambda m, x: F.conv1d(x[:, None], m.w, m.b, padding=1), (6, 1, 3), (6,), 'w'),
    'conv2d in groups': (lambda m, x: F.conv2d(x.view(-1, 4, 2, 2), m.w, m.b, padding=1, groups=2), (8, 2, 3, 3), (8,),
                         'w'),
    'conv_transpose1d': (lambda m, x: F.conv_transpose1d(x.view(-1, 4, 4), m.w, m.b), (4, 6, 3), (6,), 'w'),
    'conv_transpose1d in groups': (lambda m, x: F.conv_transpose1d(x.view(-1, 4, 4), m.w, m.b, 1, 0, 0, 2), (4, 3, 3),
                                   (6,), 'w'),
    'a slice of rows': (lambda m, x: F.linear(x, m.w[4:20]), (24, 16), None, 'w[4:20]'),
    'a slice of columns': (lambda m, x: x @ m.w[:, 3:20], (16, 24), None, 'w[:, 3:20]'),
    'one of several': (lambda m, x: F.linear(x, m.w[2], m.b[2]), (3, 24, 16), (3, 24), 'w[2]'),
    'reshaped': (lambda m, x: x @ m.w.view(16, -1), (16, 4, 6), None, 'w'),
    'expanded': (lambda m, x: torch.bmm(x.view(4, -1, 16), m.w.expand(4, -1, -1)), (16, 24), None, 'w'),
    'contiguous': (lambda m, x: F.linear(x, m.w.T.contiguous()), (16, 24), None, 'w'),
    'cast': (lambda m, x: F.linear(x.double(), m.w.to(torch.float64), m.b.double()), (24, 16), (24,), 'w'),
    'cast and transposed': (lambda m, x: x.double() @ m.w.double().t(), (24, 16), None, 'w'),
    'cast twice': (lambda m, x: x @ m.w.double().t().float().contiguous(), (24, 16), None, 'w'),
    'part of a copy': (lambda m, x: x @ m.w.clone()[:, 2:12], (16, 24), None, 'w[:, 2:12]'),
    'times a number': (lambda m, x: F.linear(x, m.w*0.25, m.b), (24, 16), (24,), 'w'),
    'divided by a tensor': (lambda m, x: F.linear(x, m.w/torch.tensor(4.), m.b), (24, 16), (24,), 'w'),
}


@pytest.mark.parametrize('order', ['std mean', 'mean+std'])
@pytest.mark.parametrize('form', FORMS)
def test_an_operation_on_a_parameter_is_a_layer(form, order):
    forward, w, b, name = FORMS[form]
    torch.manual_seed(0)
    model = Net(forward, w=param(*w), b=None if b is None else param(*b))
    was = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [x() for _ in range(6)]
    report = quiet(lsuv_init, model, batches, order=order)
    assert [(r.name, r.kind) for r in report if r.status != 'not called'] == [(name, 'Net')]
    assert report[0].status in ('ok', 'no bias'), report
    with torch.no_grad():
        out = model(x(1000)).float()
    assert out.std().item() == pytest.approx(1, abs=0.1) and report[0].shape == tuple(model(batches[0]).shape)
    if b is not None:
        assert abs(out.mean().item()) < 0.1
    changed = (model.w != was['w']).sum()  # what the operation does not take stays as it was
    assert changed == {'w[4:20]': 256, 'w[:, 3:20]': 272, 'w[2]': 384, 'w[:, 2:12]': 160}.get(name, model.w.numel())


@pytest.mark.parametrize('form', ['F.linear', '@', '@ from the left', 'einsum into heads', 'bmm', 'conv2d in groups',
                                  'conv_transpose1d in groups', 'cast and transposed', 'a slice of columns'])
def test_the_start_is_orthonormal_by_the_fan_of_the_operation(form):
    forward, w, b, name = FORMS[form]
    torch.manual_seed(0)
    model = Net(forward, w=param(*w), b=None if b is None else param(*b))
    report = quiet(lsuv_init, model, x(), preinit='orthogonal')
    scaled = model.w.detach()/report[0].gain
    matrices = {  # (matrices, out, in)
        'F.linear': lambda w: w[None], '@': lambda w: w.T[None], '@ from the left': lambda w: w[None],
        'einsum into heads': lambda w: w.flatten(1).T[None], 'bmm': lambda w: w.mT,
        'conv2d in groups': lambda w: w.flatten(1).view(2, 4, -1),
        'conv_transpose1d in groups': lambda w: w.view(2, 2, 3, 3).transpose(1, 2).flatten(2),
        'cast and transposed': lambda w: w[None], 'a slice of columns': lambda w: w[:, 3:20].T[None],
    }[form](scaled)
    gram = matrices @ matrices.mT if matrices.shape[1] <= matrices.shape[2] else matrices.mT @ matrices
    assert torch.allclose(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=1e-4)


@pytest.mark.parametrize('form', ['F.linear', '@', '@ from the left', 'addmm', 'bmm', 'einsum by head',
                                  'einsum into heads', 'conv2d in groups', 'conv_transpose1d in groups', 'cast'])
def test_per_channel(form):
    forward, w, b, _ = FORMS[form]
    torch.manual_seed(0)
    model = Net(forward, w=param(*w), b=None if b is None else param(*b))
    report = quiet(lsuv_init, model, x(2000), per_channel=True)
    out = model(x(2000)).detach()
    dim = {'@ from the left': 0, 'conv2d in groups': 1, 'conv_transpose1d in groups': 1}.get(form, -1)
    std = out.transpose(0, dim).flatten(1).std(1)
    assert report[0].status in ('ok', 'no bias') and (std - 1).abs().max() < 0.1


def experts(n=3):
    def forward(m, x): return sum((x[i::n] @ m.up[i] + m.bias[i]).relu().mean() for i in range(n - 1))
    return Net(forward, up=param(n, 16, 24), bias=param(n, 24))


@pytest.mark.parametrize('modules, names', [
    (None, ['up[0]', 'up[1]', 'lin', 'up[2]']),
    ('up', ['up[0]', 'up[1]', 'up[2]']),
    ('up*', ['up[0]', 'up[1]', 'up[2]']),
    ('up[1]', ['up[1]']),
    ([nn.Linear, 'up[0]'], ['up[0]', 'lin']),
    (nn.Linear, ['lin']),
    (Net, ['up[0]', 'up[1]', 'up[2]']),
    (lambda m: isinstance(m, Net), ['up[0]', 'up[1]', 'up[2]']),
])
def test_modules_selects_them_by_name_and_by_what_holds_them(modules, names):
    torch.manual_seed(0)
    outer = Mod(lambda self, x: self.a(x) + self.lin(x).mean(), a=experts(), lin=nn.Linear(16, 8))
    names = [n if n == 'lin' else f'a.{n}' for n in names]
    if isinstance(modules, str): modules = f'a.{modules}'
    if isinstance(modules, list): modules = [modules[0], f'a.{modules[1]}']
    report = quiet(lsuv_init, outer, x(), modules=modules)
    assert sorted(r.name for r in report) == sorted(names)
    spoken_for = {n for r in report for n in r.weights} | report.outside.keys()
    assert spoken_for >= {'a.up', 'a.bias', 'lin.weight'}
    if 'lin' not in names:
        assert report.outside['lin.weight'] == 'not selected'


def test_a_name_that_is_no_module_and_no_parameter():
    with pytest.raises(ValueError, match="no module of Sequential matches 'down'"):
        lsuv_init(nn.Sequential(experts()), x(), modules='down')
    with pytest.raises(ValueError, match='no module'):  # that of a layer is no unit of its own
        lsuv_init(nn.Sequential(experts(), nn.Linear(1, 1)), x(), modules='1.weight')


def test_a_model_that_applies_no_weight():
    emb = nn.Sequential(nn.Embedding(9, 4))
    was = emb[0].weight.detach().clone()
    with pytest.raises(ValueError, match='no conv, linear or attention layer, and applies no weight'):
        lsuv_init(emb, torch.randint(0, 9, (8,)))
    assert torch.equal(emb[0].weight, was)


def test_a_function_as_the_start_gets_linear_layers():
    started = []
    def start(layer):
        started.append((type(layer), tuple(layer.weight.shape), layer.in_features, layer.out_features))
        nn.init.constant_(layer.weight, 0.5)
        layer.weight.data[0] = -0.5
    model = Net(lambda m, x: torch.bmm((x @ m.a).view(-1, 4, 6).transpose(0, 1), m.w), a=param(16, 24),
                w=param(4, 6, 3))
    report = quiet(lsuv_init, model, x(), preinit=start)
    assert started == [(nn.Linear, (24, 16), 16, 24), *[(nn.Linear, (3, 6), 6, 3)]*4]
    assert report.ok and torch.equal(model.a[:, 0], -model.a[:, 1]) and torch.equal(model.w[2, :, 0], -model.w[2, :, 1])


def test_without_a_start_the_weight_is_scaled():
    model = Net(lambda m, x: x @ m.w, w=param(16, 24))
    was = model.w.detach().clone()
    row = quiet(lsuv_init, model, x(), preinit=None)[0]
    assert torch.allclose(model.w, was*row.gain, rtol=1e-4) and row.status in ('ok', 'no bias')


def test_a_frozen_parameter_is_left_as_it_is():
    model = Net(lambda m, x: x @ m.w @ m.v, w=param(16, 24), v=param(24, 8))
    model.w.requires_grad_(False)
    was = model.w.detach().clone()
    report = quiet(lsuv_init, model, x())
    assert {r.name: r.status for r in report} == {'w': 'frozen', 'v': 'ok'} and torch.equal(model.w, was)


def test_an_error_puts_it_back():
    def forward(m, x):
        out = x @ m.w
        if m.fails: raise RuntimeError('late')
        return out
    model = Net(forward, w=param(16, 24))
    model.fails,was = True,model.w.detach().clone()
    with pytest.raises(RuntimeError, match='late'):
        lsuv_init(model, x())
    assert torch.equal(model.w, was)


def test_a_far_worse_loss_puts_it_back():
    model = Net(lambda m, x: x @ m.w, w=param(16, 24))
    was,data = model.w.detach().clone(),x()
    report = quiet(lsuv_init, model, data, loss=lambda m: m(data).square().mean() + 1e-6)
    assert report.undone and torch.equal(model.w, was) and report[0].status == 'undone'
    assert report[0].std == pytest.approx((data @ was).std().item(), rel=1e-3)


@pytest.mark.parametrize('form', [lambda x: torch.mul(x, other=2.), lambda x: x.div(other=2.)])
def test_a_number_that_is_given_by_name(form):
    model = Net(lambda m, x: form(x @ m.w) @ m.v, w=param(16, 24), v=param(24, 8))
    assert quiet(lsuv_init, model, x()).ok


@pytest.mark.parametrize('form, w, b', [
    (lambda m, x: torch.addmm(0.1*x, x, m.w), (16, 16), None),
    (lambda m, x: torch.baddbmm(m.b, x.view(-1, 4, 4).transpose(0, 1), m.w), (4, 4, 12), (4, 1, 12))])
def test_per_channel_of_a_sum_with_any_tensor(form, w, b):
    model = Net(form, w=param(*w), b=None if b is None else param(*b))
    report = quiet(lsuv_init, model, x(2000), per_channel=True)
    std = model(x(2000)).detach().flatten(0, -2).std(0)
    assert report.n_passes == 2 and report.ok and (std - 1).abs().max() < 0.1


@pytest.mark.skipif(not GROUPED, reason='this torch has no grouped_mm')
def test_a_grouped_product_of_stacked_groups():
    model = Net(lambda m, x: GROUPED[-1](x, m.w), w=nn.Parameter(0.02*torch.randn(4, 16, 24).bfloat16()))
    assert quiet(lsuv_init, model, torch.randn(4, 64, 16).bfloat16()).ok


class Tripled(nn.Linear):
    def forward(self, x): return 3*super().forward(x)


class LowRank(nn.Linear):  # as LoRA adds to a layer
    def __init__(self, *args):
        super().__init__(*args)
        self.a,self.b = param(4, self.in_features),param(self.out_features, 4)
    def forward(self, x): return super().forward(x) + x @ self.a.T @ self.b.T/30


class Rectified(nn.Linear):
    def forward(self, x): return F.relu(F.linear(x, self.weight, self.bias))


class Alone(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize('preinit', [None, 'orthogonal', 'mirrored'])
@pytest.mark.parametrize('layer', [Tripled, LowRank, Rectified, Alone])
def test_ok_of_a_layer_speaks_of_what_the_layer_puts_out(layer, preinit):
    torch.manual_seed(0)
    model = nn.Sequential(layer(16, 32), nn.ReLU(), layer(32, 8))
    report,out = quiet(lsuv_init, model, x(2000), preinit=preinit),x(2000)
    for name, m in model.named_children():
        out = m(out)
        if name in ('0', '2'):
            assert report[name].status in ('ok', 'no bias') and abs(out.std() - 1) < 0.1
            assert report[name].std == pytest.approx(out.std().item(), rel=0.1)


def test_a_layer_whose_weight_only_its_parent_applies():
    model = Mod(lambda self, x: F.linear(x, self.lin.weight, self.lin.bias), lin=Tripled(16, 8))
    report = quiet(lsuv_init, model, x(2000))
    assert [r.name for r in report] == ['lin'] and abs(model(x(2000)).std() - 1) < 0.1


def test_a_weight_inside_of_a_transform_is_outside_with_the_reason():
    model = Net(lambda m, x: x @ m.up, up=param(16, 24))
    model.f,f = lambda m, x: torch.func.vmap(lambda row: f(m, row) @ m.inside)(x) @ m.head,model.f
    model.inside,model.head = param(24, 24),param(24, 8)
    report = quiet(lsuv_init, model, x())
    assert [r.name for r in report] == ['head'] and report.outside == dict.fromkeys(['up', 'inside'], 'in transform')
    for text in (str(report), report._repr_html_()): assert 'in transform: a transform of' in text


@pytest.mark.skipif(not GROUPED, reason='this torch has no grouped_mm')
@pytest.mark.parametrize('by_name', [False, True])
def test_groups_of_a_product_are_rows(by_name):
    offs = torch.tensor([100, 180, 256], dtype=torch.int32)
    def forward(m, x): return GROUPED[0](x, m.w, offs=offs) if by_name else GROUPED[0](x, m.w, offs)
    model = Net(forward, w=nn.Parameter(0.02*torch.randn(3, 16, 24).bfloat16()))
    report = quiet(lsuv_init, model, x().bfloat16())
    assert report.ok and [r.name for r in report] == ['w[0]', 'w[1]', 'w[2]']


def test_attention_by_views_of_larger_parameters():
    def forward(m, x):
        x = (x @ m.up).view(-1, 6, 16)
        return F.multi_head_attention_forward(x, x, x, 16, 4, m.w[48:], m.b[48:], None, None, False, 0., m.out, None)[0]
    model = Net(forward, up=param(16, 96), w=param(96, 16), b=param(96), out=param(16, 16))
    report = quiet(lsuv_init, model, x())
    assert report.ok and report.n_passes == 2 and len(report) == 5


def test_a_start_is_seen_under_autocast():
    model = Net(lambda m, x: (x @ m.w).relu() @ m.v, w=param(16, 24), v=param(24, 8))
    model.lin = nn.Linear(8, 8)
    model.f,f = lambda m, x: m.lin(f(m, x)),model.f
    with torch.autocast('cpu', torch.bfloat16):
        assert quiet(lsuv_init, model, x(), preinit='orthogonal', baseline=True).n_passes == 4
        was = model(data := x())
        quiet(lsuv_init, model, data, target_std=9., loss=lambda m: m(data).square().mean())
        assert torch.equal(model(data), was)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    torch.manual_seed(0)
    model = Net(lambda m, x: F.linear(x, m.w, m.b).relu() @ m.v, w=param(24, 16), b=param(24), v=param(24, 8))
    with torch.autocast('cpu', dtype):
        report = quiet(lsuv_init, model, x())
        assert report.ok and {r.name for r in report} == {'w', 'v'}
        assert model(x(1000)).float().std().item() == pytest.approx(1, abs=0.1)


def test_compiled_checkpointed_and_wrapped():
    torch.manual_seed(0)
    def forward(m, x): return torch.utils.checkpoint.checkpoint(m.inner, x, use_reentrant=False) @ m.v
    model = Net(forward, v=param(24, 8))
    model.inner = torch.compile(Net(lambda m, x: (x @ m.w).relu(), w=param(16, 24)), backend='eager')
    report = quiet(lsuv_init, nn.DataParallel(model), x())
    assert report.ok and [r.name for r in report] == ['inner._orig_mod.w', 'v']
    assert model(x(1000)).std().item() == pytest.approx(1, abs=0.1)


def test_a_layer_that_gets_its_input_twice_is_pooled():
    torch.manual_seed(0)
    model = Net(lambda m, x: torch.cat([F.linear(x, m.w), 3*x @ m.w.T]), w=param(24, 16))
    report = quiet(lsuv_init, model, [x() for _ in range(8)])
    assert len(report) == 1 and model(x(1000)).std().item() == pytest.approx(1, abs=0.1)


def test_layer_stats_measures_operations():
    model = Net(lambda m, x: x @ m.w, w=param(16, 24))
    data,was = x(),model.w.detach().clone()
    report = layer_stats(model, data)
    assert [(r.name, r.weights) for r in report] == [('w', ('w',))] and torch.equal(model.w, was)
    assert report[0].std == pytest.approx((data @ was).std().item(), rel=1e-4)


def test_where_the_words_of_outside_come_from():
    def forward(m, x, ids):
        x = m.rnn(x + m.emb(ids) + m.pos_embed + m.token)[0]
        return m.lin(x*m.gate.sigmoid())
    model = Net(forward, pos_embed=param(10, 16), token=param(1, 1, 16), gate=param(10, 16), unused=param(3, 3))
    model.emb,model.rnn,model.lin = nn.Embedding(7, 16),nn.GRU(16, 16, batch_first=True),nn.Linear(16, 4)
    report = quiet(lsuv_init, model, (torch.randn(8, 10, 16), torch.randint(0, 7, (8, 10))))
    assert report.outside == {'emb.weight': 'embedding', 'rnn.weight_ih_l0': 'recurrent', 'gate': 'not linear',
                              'rnn.weight_hh_l0': 'recurrent', 'pos_embed': 'embedding', 'token': 'vector',
                              'unused': 'not called'}
    assert report.coverage == pytest.approx(64/sum(p.numel() for p in model.parameters() if p.dim() > 1))
    assert report.summary.endswith(' % of the weights are outside these layers (see `report.outside`).')


def test_tokens_in_rows_are_no_samples():
    "GPT-2 puts the tokens of all samples in rows. Tokens of a sample are alike, and tell less than as many samples."
    torch.manual_seed(0)
    model = Net(lambda m, x: (x.flatten(0, 1) @ m.w).view(len(x), -1, 24), w=param(16, 24))
    data = torch.randn(8, 1, 16).expand(8, 500, 16) + 0.01*torch.randn(8, 500, 16)
    low, high = quiet(lsuv_init, model, data)[0].mean_range
    assert high - low > 2  # three standard errors of eight samples either way


def test_a_small_weight_behind_a_norm_is_not_faint():
    "Its output is small because the weight is, and not because the norm lets little through."
    def forward(self, x): return F.linear(self.norm(x), self.w[1])

    torch.manual_seed(0)
    model = Mod(forward, norm=nn.BatchNorm1d(16))
    model.w = nn.Parameter(1e-4*torch.randn(2, 24, 16))
    report = quiet(lsuv_init, model, torch.randn(256, 16), modules='w[1]', preinit=None)
    assert [(r.name, r.status) for r in report] == [('w[1]', 'ok')] and report['w[1]'].gain > 1000
