"`layer_stats` with a loss: the gradients by layer against autograd by hand, and what must stay as it was."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastai_lsuv import layer_stats
from tests.fingerprint import fingerprint

GRADIENTS = ['grad_std', 'weight_grad']


def data(n=16, classes=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(classes, (n,), generator=g)


def conv_net(inplace=True, p=0.5, act=nn.ReLU):
    torch.manual_seed(1)
    act = act(inplace=True) if inplace else act()
    return nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Dropout(p), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
                         nn.ReLU(), nn.Flatten(), nn.Linear(8*16, 5))


def cross_entropy(x, y): return lambda model: F.cross_entropy(model(x), y)


def by_hand(model, names, loss):
    "What autograd gives for the outputs of some layers and for their weights, in training mode without dropout."
    model = deepcopy(model).train()
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
        if isinstance(m, nn.ReLU): m.inplace = False
    outs = {n: [] for n in names}
    layers = dict(model.named_modules())
    for n in names:
        layers[n].register_forward_hook(lambda m, a, o, n=n: outs[n].append(o) or o.retain_grad())
    loss(model).backward()
    def std(n): return torch.cat([o.grad.double().flatten() for o in outs[n]]).std().item()
    def ratio(n): return (layers[n].weight.grad.double().norm()/layers[n].weight.detach().double().norm()).item()
    return {n: (std(n), ratio(n)) for n in names}


def check(model, x, loss, names):
    expected = by_hand(model, names, loss)
    stats = layer_stats(model, x, loss=loss)
    assert [r.name for r in stats] == names
    for r in stats:
        assert (r.grad_std, r.weight_grad) == pytest.approx(expected[r.name], rel=1e-4), r.name
    return stats


@pytest.mark.parametrize('inplace', [False, True])
def test_values_are_those_of_autograd(inplace):
    x, y = data()
    model = conv_net(inplace)
    stats = check(model, x, cross_entropy(x, y), ['0', '3', '7'])
    plain = layer_stats(model, x)
    assert stats.pairs == plain.pairs and stats.n_passes == plain.n_passes + 1


def test_a_layer_that_runs_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 4),nn.Linear(4, 2)
        def forward(self, x): return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(32, 4)
    check(model, x, lambda m: m(x).square().mean(), ['a', 'b'])


def test_weights_that_no_layer_applies():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up,self.down = nn.Parameter(torch.randn(2, 4, 6)),nn.Linear(6, 2)
        def forward(self, x): return self.down(torch.tanh(x @ self.up[0]) + torch.tanh(x @ self.up[1].detach()))
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(16, 4)
    stats = layer_stats(model, x, loss=lambda m: m(x).square().mean())
    out = (x @ model.up[0]).detach().requires_grad_()
    hidden = torch.tanh(out) + torch.tanh(x @ model.up[1].detach())
    model.down(hidden).square().mean().backward()
    row = next(r for r in stats if r.name == 'up[0]')
    assert row.grad_std == pytest.approx(out.grad.std().item(), rel=1e-5)
    grad,weight = x.T @ out.grad, model.up[0].detach()
    assert row.weight_grad == pytest.approx((grad.norm()/weight.norm()).item(), rel=1e-5)


def test_attention_and_layer_norm():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=.3, batch_first=True)
    x = torch.randn(4, 6, 8)
    def loss(m): return m(x)[..., 0].square().mean()
    stats = layer_stats(model, x, loss=loss)
    quiet = layer_stats(nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), x, loss=loss)
    assert len(stats) == len(quiet) and all(r.weight_grad > 0 for r in stats)
    assert all(r.grad_std > 0 for r in stats)
    names = ['linear1', 'linear2']
    model.dropout.p = model.dropout1.p = model.dropout2.p = model.self_attn.dropout = 0.
    for n, (std, ratio) in by_hand(model, names, loss).items():
        assert (stats[n].grad_std, stats[n].weight_grad) == pytest.approx((std, ratio), rel=1e-4)


class Attend(nn.Module):
    "Attention, with or without parts that come after the projections. `spelled_out` does the same in small steps."
    def __init__(self, batch_first=True, batched=True, **kwargs):
        super().__init__()
        self.attn,self.batched = nn.MultiheadAttention(8, 2, batch_first=batch_first, **kwargs),batched

    def forward(self, q, k, v): return self.attn(q, k, v, need_weights=False)[0]

    def spelled_out(self, q, k, v):
        a = self.attn
        weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight) if a.in_proj_weight is None \
            else a.in_proj_weight.chunk(3)
        biases = a.in_proj_bias.chunk(3) if a.in_proj_bias is not None else (None,)*3
        qkv = [F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases)]
        for t in qkv: t.retain_grad()
        parts = qkv
        if not a.batch_first and self.batched: parts = [t.transpose(0, 1) for t in parts]
        if a.bias_k is not None:
            more = [b.expand(len(q), 1, -1) for b in (a.bias_k, a.bias_v)]
            parts = [parts[0], *(torch.cat([t, b], 1) for t, b in zip(parts[1:], more))]
        heads = [t.unflatten(-1, (2, 4)).transpose(-3, -2) for t in parts]
        out = a.out_proj(F.scaled_dot_product_attention(*heads).transpose(-3, -2).flatten(-2))
        return (out.transpose(0, 1) if not a.batch_first and self.batched else out), qkv


@pytest.mark.parametrize('kwargs', [
    {}, dict(bias=False), dict(dropout=.5), dict(kdim=6, vdim=5), dict(batch_first=False), dict(add_bias_kv=True),
    dict(batched=False), dict(kdim=6, vdim=5, batch_first=False, bias=False)], ids=str)
def test_projections_of_attention(kwargs):
    torch.manual_seed(0)
    model = Attend(**kwargs)
    size = (4, 6) if model.batched else (6,)
    batch = tuple(torch.randn(*size, n) for n in (8, model.attn.kdim, model.attn.vdim))
    if model.batched:  # fewer queries than keys
        batch = (batch[0][:, :5] if model.attn.batch_first else batch[0][:3], *batch[1:])
    stats = layer_stats(model, batch, loss=lambda m: m(*batch).square().mean())
    out,qkv = model.spelled_out(*batch)
    model.train().attn.dropout = 0.
    assert torch.allclose(out, model(*batch), atol=1e-6)
    out.square().mean().backward()
    *projections,last = stats
    assert [r.grad_std for r in projections] == pytest.approx([t.grad.std().item() for t in qkv], rel=1e-4)
    assert last.name == 'attn' and last.grad_std > 0 and all(r.weight_grad > 0 for r in stats)
    packed = model.attn.in_proj_weight
    if packed is None: return
    ratios = [(g.norm()/w.norm()).item() for g, w in zip(packed.grad.chunk(3), packed.detach().chunk(3))]
    assert [r.weight_grad for r in projections] == pytest.approx(ratios, rel=1e-4)


def test_modules_without_a_weight():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(32, 4)
    [row] = layer_stats(model, x, modules=nn.Tanh, loss=lambda m: m(x).square().mean())
    out = model[:2](x).detach().requires_grad_()
    model[2](out).square().mean().backward()
    assert row.grad_std == pytest.approx(out.grad.std().item(), rel=1e-5) and row.weight_grad is None


def test_the_mean_of_a_loss_without_reduction():
    x, y = data()
    model = conv_net()
    a = layer_stats(model, x, loss=cross_entropy(x, y))
    b = layer_stats(model, x, loss=lambda m: F.cross_entropy(m(x), y, reduction='none'))
    assert [r.grad_std for r in a] == pytest.approx([r.grad_std for r in b], rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(k=st.floats(1e-3, 1e3), depth=st.integers(1, 6), seed=st.integers(0, 99))
def test_gradients_scale_with_the_loss(k, depth, seed):
    torch.manual_seed(seed)
    model, x = nn.Sequential(*[nn.Linear(5, 5) for _ in range(depth)]).double(), torch.randn(9, 5).double()
    one = layer_stats(model, x, loss=lambda m: m(x).square().mean())
    many = layer_stats(model, x, loss=lambda m: k*m(x).square().mean())
    for a, b in zip(one, many):
        assert (b.grad_std, b.weight_grad) == pytest.approx((k*a.grad_std, k*a.weight_grad), rel=1e-9)


# --- what has no gradient

def test_no_gradient_reaches_behind_frozen_layers():
    x, y = data()
    model = conv_net(inplace=False)
    model[0].requires_grad_(False)
    first, second, last = layer_stats(model, x, loss=cross_entropy(x, y))
    assert first.grad_std is None and first.weight_grad is None and second.grad_std > 0 and last.weight_grad > 0
    model[0].requires_grad_(True)
    model[3].weight.requires_grad_(False)
    first, second, last = layer_stats(model, x, loss=cross_entropy(x, y))
    assert second.grad_std > 0 and second.weight_grad is None and first.weight_grad > 0


def test_a_layer_that_the_loss_does_not_use():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.main,self.aux = nn.Linear(4, 2),nn.Linear(4, 2)
        def forward(self, x): return self.main(x), self.aux(x)
    model, x = Aux(), torch.randn(8, 4)
    main, aux = layer_stats(model, x, loss=lambda m: m(x)[0].square().mean())
    assert main.grad_std > 0 and aux.grad_std is None and aux.weight_grad is None


def test_a_weight_of_zeros():
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    nn.init.zeros_(model.weight)
    nn.init.ones_(model.bias)
    assert layer_stats(model, x, loss=lambda m: m(x).square().mean())[0].weight_grad == float('inf')
    assert layer_stats(model, x, loss=lambda m: (0*m(x)).sum())[0].weight_grad == 0


def test_they_are_absent_unless_asked_for():
    x, y = data()
    model = conv_net()
    plain, asked = layer_stats(model, x), layer_stats(model, x, loss=cross_entropy(x, y))
    assert all(r.grad_std is None and r.weight_grad is None for r in plain)
    assert not set(GRADIENTS) & set(plain.df()) and 'grad' not in str(plain)
    assert asked.df()[GRADIENTS].gt(0).all(axis=None)
    head = str(asked).splitlines()[2]
    assert 'grad std' in head and 'grad/weight' in head and 'grad/weight' in asked._repr_html_()


# --- what stays as it was

@pytest.mark.parametrize('training', [True, False])
def test_nothing_changes(training):
    x, y = data()
    model = conv_net().train(training)
    F.cross_entropy(deepcopy(model)(x), y)
    model[0].weight.grad = kept = torch.ones_like(model[0].weight)
    was,grads = fingerprint(model),kept.clone()
    before = torch.get_rng_state()
    layer_stats(model, x, loss=cross_entropy(x, y))
    assert fingerprint(model) == was and torch.equal(torch.get_rng_state(), before)
    assert model[0].weight.grad is kept and torch.equal(kept, grads)
    assert all(p.grad is None for n, p in model.named_parameters() if n != '0.weight')


@pytest.mark.parametrize('at', ['forward', 'loss', 'backward'])
def test_a_loss_that_fails(at):
    x, y = data()
    model = conv_net()
    model[0].weight.grad = kept = torch.ones_like(model[0].weight)
    was = fingerprint(model)
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise MemoryError('at the backward')
    def loss(m):
        if at == 'forward': return m(x[:, :2])
        if at == 'loss': raise MemoryError('at the loss')
        return Fails.apply(m(x)).sum()
    with pytest.raises((MemoryError, RuntimeError)):
        layer_stats(model, x, loss=loss)
    assert fingerprint(model) == was and model[0].weight.grad is kept


def test_under_no_grad():
    x, y = data()
    model = conv_net()
    loss = cross_entropy(x, y)
    expected = layer_stats(model, x, loss=loss)
    with torch.no_grad():
        assert layer_stats(model, x, loss=loss).rows == expected.rows
        assert not torch.is_grad_enabled()


def test_checkpointed_layers_give_the_same():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.on = nn.Linear(4, 4),nn.Linear(4, 2),False
        def forward(self, x):
            x = x.requires_grad_()
            def first(x): return self.a(x).tanh()
            return self.b(checkpoint(first, x, use_reentrant=False) if self.on else first(x))
    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(8, 4)
    plain = layer_stats(model, x, loss=lambda m: m(x).square().mean())
    model.on = True
    again = layer_stats(model, x, loss=lambda m: m(x).square().mean())
    assert [(r.grad_std, r.weight_grad) for r in again] == [(r.grad_std, r.weight_grad) for r in plain]


# --- bad losses

@pytest.mark.parametrize('loss,error,says', [
    (3, TypeError, 'loss: got 3; it takes a function of the model'),
    (lambda m: m(data()[0]).sum().item(), TypeError, 'loss: it gives a float; .* a tensor'),
    (lambda m: m(data()[0]).sum().detach(), ValueError, 'loss: no gradient .*'),
    (lambda m: torch.zeros(()), ValueError, 'loss: no gradient .*'),
    (lambda m: torch.zeros((), requires_grad=True), ValueError, 'loss: no gradient .*'),
])
def test_bad_losses(loss, error, says):
    model = conv_net()
    was = fingerprint(model)
    with pytest.raises(error, match=says):
        layer_stats(model, data()[0], loss=loss)
    assert fingerprint(model) == was


def test_a_frozen_model_has_no_gradient():
    x, y = data()
    with pytest.raises(ValueError, match='loss: no gradient .*`requires_grad`'):
        layer_stats(conv_net().requires_grad_(False), x, loss=cross_entropy(x, y))


def test_an_expert_has_the_gradient_of_its_rows():
    "Experts in one parameter, each of which gets some rows of a grouped product."
    grouped_mm = getattr(F, 'grouped_mm', None) or getattr(torch, '_grouped_mm', None)
    if grouped_mm is None: pytest.skip('this torch has no grouped product')

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts,self.head = nn.Parameter(torch.randn(3, 16, 16)/4),nn.Linear(16, 4)

        def forward(self, x):
            self.out = grouped_mm(x, self.experts, offs=torch.tensor([16, 32, 64], dtype=torch.int32))
            return self.head(self.out)

    torch.manual_seed(0)
    model,x = Experts(),torch.randn(64, 16)
    def loss(model): return model(x).square().mean()
    grad, = torch.autograd.grad(loss(model), [model.out])
    del model.out
    rows = {r.name: r.grad_std for r in layer_stats(model, x, loss=loss)}
    expected = {f'experts[{i}]': part.std().item() for i, part in enumerate(grad.split([16, 16, 32]))}
    assert {n: rows[n] for n in expected} == pytest.approx(expected, rel=1e-4)
