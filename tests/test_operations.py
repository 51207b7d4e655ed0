"Units that are found by what operates on a weight, judged by a mode that knows nothing of the package."
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from networks import Mod, param
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.observe.operations import GROUPED


class Net(Mod): "Parameters by name, and a forward that is a function of them and the input."


def x(n=256, width=16): return torch.randn(n, width)*3
def groups(x): return x.view(-1, 4, 4).transpose(0, 1)
def std_of(model): return model(x(1000)).detach().float().std().item()


FORMS = {  # By name: the forward, the shape of `w`, the shape of `b` if there is one
    'F.linear': (lambda m, x: F.linear(x, m.w, m.b), (24, 16), (24,)),
    'F.linear by name': (lambda m, x: F.linear(x, bias=m.b, weight=m.w), (24, 16), (24,)),
    '@': (lambda m, x: x @ m.w, (16, 24)),
    '@ from the left': (lambda m, x: m.w @ x.T, (24, 16)),
    '@ transposed': (lambda m, x: x @ m.w.T, (24, 16)),
    'matmul': (lambda m, x: torch.matmul(x[:, None], m.w), (16, 24)),
    'mm': (lambda m, x: torch.mm(x, m.w), (16, 24)),
    'x.mm': (lambda m, x: x.mm(m.w), (16, 24)),
    'addmm': (lambda m, x: torch.addmm(m.b, x, m.w), (16, 24), (24,)),
    'addmm with a row': (lambda m, x: torch.addmm(m.b[None], x, m.w), (16, 24), (24,)),
    'addmm with factors': (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), (16, 24), (24,)),
    'bmm': (lambda m, x: torch.bmm(groups(x), m.w), (4, 4, 12)),
    'baddbmm': (lambda m, x: torch.baddbmm(m.b, groups(x), m.w), (4, 4, 12), (4, 1, 12)),
    'einsum': (lambda m, x: torch.einsum('ni,oi->no', x, m.w), (24, 16)),
    'einsum into heads': (lambda m, x: torch.einsum('bi, ihd', x, m.w), (16, 3, 8)),
    'einsum with an ellipsis': (lambda m, x: torch.einsum('...i,io->...o', x[:, None], m.w), (16, 24)),
    'einsum from a list': (lambda m, x: torch.einsum('ni,io->no', [x, m.w]), (16, 24)),
    'einsum by head': (lambda m, x: torch.einsum('bhi,hio->bho', x.view(-1, 2, 8), m.w), (2, 8, 12)),
    'tensordot': (lambda m, x: torch.tensordot(x, m.w, dims=([1], [1])), (24, 16)),
    'conv1d': (lambda m, x: F.conv1d(x[:, None], m.w, m.b, padding=1), (6, 1, 3), (6,)),
    'conv2d in groups': (lambda m, x: F.conv2d(x.view(-1, 4, 2, 2), m.w, m.b, 1, 1, groups=2), (8, 2, 3, 3), (8,)),
    'transposed': (lambda m, x: F.conv_transpose1d(x.view(-1, 4, 4), m.w, m.b), (4, 6, 3), (6,)),
    'transposed in groups': (lambda m, x: F.conv_transpose1d(x.view(-1, 4, 4), m.w, m.b, 1, 0, 0, 2), (4, 3, 3), (6,)),
    'a slice of rows': (lambda m, x: F.linear(x, m.w[4:20]), (24, 16)),
    'a slice of columns': (lambda m, x: x @ m.w[:, 3:20], (16, 24)),
    'one of several': (lambda m, x: F.linear(x, m.w[2], m.b[2]), (3, 24, 16), (3, 24)),
    'reshaped': (lambda m, x: x @ m.w.view(16, -1), (16, 4, 6)),
    'expanded': (lambda m, x: torch.bmm(x.view(4, -1, 16), m.w.expand(4, -1, -1)), (16, 24)),
    'contiguous': (lambda m, x: F.linear(x, m.w.T.contiguous()), (16, 24)),
    'cast': (lambda m, x: F.linear(x.double(), m.w.to(torch.float64), m.b.double()), (24, 16), (24,)),
    'cast and transposed': (lambda m, x: x.double() @ m.w.double().t(), (24, 16)),
    'cast twice': (lambda m, x: x @ m.w.double().t().float().contiguous(), (24, 16)),
    'part of a copy': (lambda m, x: x @ m.w.clone()[:, 2:12], (16, 24)),
    'times a number': (lambda m, x: F.linear(x, m.w*0.25, m.b*0.25), (24, 16), (24,)),
    'divided by a tensor': (lambda m, x: F.linear(x, m.w/torch.tensor(4.), m.b/4), (24, 16), (24,)),
    'plus any tensor': (lambda m, x: torch.addmm(0.1*x, x, m.w), (16, 16)),
}
PARTS = {  # What the row is called, and how many numbers the operation takes
    'a slice of rows': ('w[4:20]', 256),
    'a slice of columns': ('w[:, 3:20]', 272),
    'one of several': ('w[2]', 384),
    'part of a copy': ('w[:, 2:12]', 160),
}


def net_of(form):
    forward,w,*b = FORMS[form]
    return Net(forward, w=param(*w), b=param(*b[0]) if b else None)


@pytest.mark.parametrize('order', ['std mean', 'mean+std'])
@pytest.mark.parametrize('form', FORMS)
def test_an_operation_on_a_parameter_is_a_layer(form, order):
    model = net_of(form)
    was = model.w.detach().clone()
    name,numbers = PARTS.get(form, ('w', was.numel()))
    batches = [x() for _ in range(6)]
    before = next(r for r in layer_stats(model, batches[0]) if r.name == name)
    assert before.std == pytest.approx(model(batches[0]).std().item(), rel=1e-4) and torch.equal(model.w, was)
    report = quietly(model, batches, order=order)
    assert [(r.name, r.kind) for r in report if r.status != 'not called'] == [(name, 'Net')]
    assert report[0].status in ('ok', 'no bias') and report[0].shape == tuple(model(batches[0]).shape)
    assert std_of(model) == pytest.approx(1, abs=0.1)
    assert model.b is None or abs(model(x(1000)).mean()) < 0.1
    assert (model.w != was).sum() == numbers  # the rest stays as it was


MATRICES = {  # Of weights: (matrices, out, in)
    'F.linear': lambda w: w[None],
    '@': lambda w: w.T[None],
    '@ from the left': lambda w: w[None],
    'einsum into heads': lambda w: w.flatten(1).T[None],
    'bmm': lambda w: w.mT,
    'conv2d in groups': lambda w: w.flatten(1).view(2, 4, -1),
    'transposed in groups': lambda w: w.view(2, 2, 3, 3).transpose(1, 2).flatten(2),
    'cast and transposed': lambda w: w[None],
    'a slice of columns': lambda w: w[:, 3:20].T[None],
}


@pytest.mark.parametrize('form', MATRICES)
def test_the_start_is_orthonormal_by_the_fan_of_the_operation(form):
    model = net_of(form)
    report = quietly(model, x(), preinit='orthogonal')
    m = MATRICES[form](model.w.detach()/report[0].gain)
    gram = m @ m.mT if m.shape[1] <= m.shape[2] else m.mT @ m
    assert torch.allclose(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=1e-4)


@pytest.mark.parametrize('form', [
    'F.linear', '@', '@ from the left', 'addmm', 'addmm with factors', 'bmm', 'baddbmm', 'einsum by head',
    'einsum into heads', 'conv2d in groups', 'transposed in groups', 'cast',
    'times a number', 'divided by a tensor', 'plus any tensor'])
def test_per_channel(form):
    model = net_of(form)
    report = quietly(model, x(2000) + 1, per_channel=True)
    dim = {'@ from the left': 0, 'conv2d in groups': 1, 'transposed in groups': 1}.get(form, -1)
    std = model(x(2000) + 1).detach().transpose(0, dim).flatten(1).std(1)
    assert report.ok and report.n_passes == 2 and (std - 1).abs().max() < 0.1


def experts(n=3):
    def forward(m, x): return sum((x[i::n] @ m.up[i] + m.bias[i]).relu().mean() for i in range(n - 1))
    return Net(forward, up=param(n, 16, 24), bias=param(n, 24))


EXPERTS = ['a.up[0]', 'a.up[1]', 'a.up[2]']


@pytest.mark.parametrize('modules, names', [
    (None, [*EXPERTS, 'lin']),
    ('a.up', EXPERTS),
    ('a.up*', EXPERTS),
    ('a.up[1]', ['a.up[1]']),
    ([nn.Linear, 'a.up[0]'], ['a.up[0]', 'lin']),
    (nn.Linear, ['lin']),
    (Net, EXPERTS),
    pytest.param(lambda m: isinstance(m, Net), EXPERTS, id='a function'),
], ids=str)
def test_modules_selects_them_by_name_and_by_what_holds_them(modules, names):
    outer = Mod(lambda self, x: self.a(x) + self.lin(x).mean(), a=experts(), lin=nn.Linear(16, 8))
    report = quietly(outer, x(), modules=modules)
    assert sorted(r.name for r in report) == names
    spoken_for = {n for r in report for n in r.weights} | report.outside.keys()
    assert spoken_for >= {'a.up', 'a.bias', 'lin.weight'}
    assert report.outside.get('lin.weight') == (None if 'lin' in names else 'not selected')


def test_a_function_as_the_start_gets_linear_layers():
    started = []
    def start(layer):
        started.append((type(layer), tuple(layer.weight.shape), layer.in_features, layer.out_features))
        nn.init.constant_(layer.weight, 0.5)
        layer.weight.data[0] = -0.5
    def forward(m, x): return torch.bmm((x @ m.a).view(-1, 4, 6).transpose(0, 1), m.w)
    model = Net(forward, a=param(16, 24), w=param(4, 6, 3))
    report = quietly(model, x(), preinit=start)
    assert started == [(nn.Linear, (24, 16), 16, 24), *[(nn.Linear, (3, 6), 6, 3)]*4]
    assert report.ok and torch.equal(model.a[:, 0], -model.a[:, 1]) and torch.equal(model.w[2, :, 0], -model.w[2, :, 1])


def test_an_error_and_a_far_worse_loss_put_a_parameter_back():
    def forward(m, x):
        out = x @ m.w
        if m.fails: raise RuntimeError('late')
        return out
    model,data = Net(forward, w=param(16, 24), fails=True),x()
    was = model.w.detach().clone()
    with pytest.raises(RuntimeError, match='late'):
        lsuv_init(model, data)
    assert torch.equal(model.w, was)
    model.fails = False
    report = quietly(model, data, loss=lambda m: m(data).square().mean() + 1e-6)
    assert report.undone and torch.equal(model.w, was) and report[0].status == 'undone'
    assert report[0].std == pytest.approx((data @ was).std().item(), rel=1e-3)


OFFS = torch.tensor([100, 180, 256], dtype=torch.int32)


@pytest.mark.skipif(not GROUPED, reason='this torch has no grouped_mm')
@pytest.mark.parametrize('forward, size, names', [
    (lambda m, x: GROUPED[0](x, m.w, OFFS), (256, 16), ['w[0]', 'w[1]', 'w[2]']),
    (lambda m, x: GROUPED[0](x, m.w, offs=OFFS), (256, 16), ['w[0]', 'w[1]', 'w[2]']),
    (lambda m, x: GROUPED[-1](x, m.w), (3, 64, 16), ['w']),
], ids=['rows by position', 'rows by name', 'stacked groups'])
def test_groups_of_a_product_are_rows(forward, size, names):
    model = Net(forward, w=nn.Parameter(0.02*torch.randn(3, 16, 24).bfloat16()))
    report = quietly(model, torch.randn(size).bfloat16())
    assert report.ok and [r.name for r in report] == names


# --- layers whose forward does more, or less, than apply their weight

class Own(nn.Linear):
    "A linear layer with a forward of its own."
    def __init__(self, forward, *shape, **params):
        super().__init__(*shape)
        self.f = forward
        for k, p in params.items():
            setattr(self, k, p)
    def forward(self, x): return self.f(self, nn.Linear.forward(self, x), x)


def lora(m, out, x): return out + x @ m.a @ m.b/30


LAYERS = {
    'triples': lambda i, o: Own(lambda m, out, x: 3*out, i, o),
    'adds, as LoRA does': lambda i, o: Own(lora, i, o, a=param(i, 4), b=param(4, o)),
    'rectifies': lambda i, o: Own(lambda m, out, x: F.relu(out), i, o),
    'is alone': lambda i, o: Own(lambda m, out, x: out, i, o),
}


@pytest.mark.parametrize('preinit', [None, 'orthogonal', 'mirrored'])
@pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)
def test_ok_of_a_layer_speaks_of_what_the_layer_puts_out(layer, preinit):
    model = nn.Sequential(layer(16, 32), nn.ReLU(), layer(32, 8))
    report,out = quietly(model, x(2000), preinit=preinit),x(2000)
    for name, m in model.named_children():
        out = m(out)
        if name in ('0', '2'):
            assert report[name].status in ('ok', 'no bias') and abs(out.std() - 1) < 0.1
            assert report[name].std == pytest.approx(out.std().item(), rel=0.1)


def test_a_weight_inside_of_a_transform_is_outside_with_the_reason():
    def forward(m, x): return torch.func.vmap(lambda row: row @ m.up @ m.inside)(x) @ m.head
    report = quietly(Net(forward, up=param(16, 24), inside=param(24, 24), head=param(24, 8)), x())
    assert [r.name for r in report] == ['head'] and report.outside == dict.fromkeys(['up', 'inside'], 'in transform')
    for text in (str(report), report._repr_html_()): assert 'in transform: a transform of' in text


def test_attention_by_views_of_larger_parameters():
    def forward(m, x):
        x = (x @ m.up).view(-1, 6, 16)
        return F.multi_head_attention_forward(x, x, x, 16, 4, m.w[48:], m.b[48:], None, None, False, 0., m.out, None)[0]
    model = Net(forward, up=param(16, 96), w=param(96, 16), b=param(96), out=param(16, 16))
    report = quietly(model, x())
    assert report.ok and report.n_passes == 2 and len(report) == 5


# --- autocast, compilers, several uses

def test_a_start_is_seen_under_autocast():
    def forward(m, x): return m.lin((x @ m.w).relu() @ m.v)
    model = Net(forward, w=param(16, 24), v=param(24, 8), lin=nn.Linear(8, 8))
    with torch.autocast('cpu', torch.bfloat16):
        assert quietly(model, x(), preinit='orthogonal', baseline=True).n_passes == 4
        was = model(data := x())
        quietly(model, data, target_std=9., loss=lambda m: m(data).square().mean())
        assert torch.equal(model(data), was)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model = Net(lambda m, x: F.linear(x, m.w, m.b).relu() @ m.v, w=param(24, 16), b=param(24), v=param(24, 8))
    with torch.autocast('cpu', dtype):
        report = quietly(model, x())
        assert report.ok and {r.name for r in report} == {'w', 'v'} and std_of(model) == pytest.approx(1, abs=0.1)


def test_compiled_checkpointed_and_wrapped():
    inner = torch.compile(Net(lambda m, x: (x @ m.w).relu(), w=param(16, 24)), backend='eager')
    model = Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=False) @ m.v, v=param(24, 8), inner=inner)
    report = quietly(nn.DataParallel(model), x())
    assert report.ok and [r.name for r in report] == ['inner._orig_mod.w', 'v']
    assert std_of(model) == pytest.approx(1, abs=0.1)


def test_where_the_words_of_outside_come_from():
    def forward(m, x, ids):
        x = m.rnn(x + m.emb(ids) + m.pos_embed + m.token)[0]
        return m.lin(x*m.gate.sigmoid())
    model = Net(forward, pos_embed=param(10, 16), token=param(1, 1, 16), gate=param(10, 16), unused=param(3, 3),
                emb=nn.Embedding(7, 16), rnn=nn.GRU(16, 16, batch_first=True), lin=nn.Linear(16, 4))
    report = quietly(model, (torch.randn(8, 10, 16), torch.randint(0, 7, (8, 10))))
    assert report.outside == {'emb.weight': 'embedding', 'rnn.weight_ih_l0': 'recurrent', 'gate': 'not linear',
                              'rnn.weight_hh_l0': 'recurrent', 'pos_embed': 'embedding', 'token': 'vector',
                              'unused': 'not called'}
    assert report.coverage == pytest.approx(64/sum(p.numel() for p in model.parameters() if p.dim() > 1))
    assert report.summary.endswith(' % of the weights are outside these layers (see `report.outside`).')


def test_tokens_in_rows_are_no_samples():
    "GPT-2 puts the tokens of all samples in rows. Tokens of a sample are alike, and tell less than as many samples."
    model = Net(lambda m, x: (x.flatten(0, 1) @ m.w).view(len(x), -1, 24), w=param(16, 24))
    data = torch.randn(8, 1, 16).expand(8, 500, 16) + 0.01*torch.randn(8, 500, 16)
    low, high = quietly(model, data)[0].mean_range
    assert high - low > 2  # three standard errors of eight samples either way


def test_a_small_weight_behind_a_norm_is_scaled_and_not_faint():
    "Its output is small because the weight is, and not because the norm lets little through."
    model = Mod(lambda self, x: F.linear(self.norm(x), self.w[1]), norm=nn.BatchNorm1d(16))
    model.w = nn.Parameter(1e-4*torch.randn(2, 24, 16))
    was = model.w.detach().clone()
    report = quietly(model, torch.randn(256, 16), modules='w[1]', preinit=None)
    assert [(r.name, r.status) for r in report] == [('w[1]', 'ok')] and report[0].gain > 1000
    assert torch.allclose(model.w[1], was[1]*report[0].gain, rtol=1e-4) and torch.equal(model.w[0], was[0])


def test_a_bilinear_layer_may_be_given_a_parameter():
    "The parameter is an input there, not a weight."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.p,self.layer = nn.Parameter(torch.randn(64, 5)),nn.Bilinear(4, 5, 8)
        def forward(self, x): return F.bilinear(x, self.p, self.layer.weight, self.layer.bias)
    report = quietly(Net(), torch.randn(64, 4))
    assert [(r.name, r.status) for r in report] == [('layer', 'ok')]
