"`layer_stats` with a loss: the gradients by layer against autograd by hand, and what must stay as it was."
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mod, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastai_lsuv import layer_stats
from fastai_lsuv.observe.operations import GROUPED

GRADIENTS = ['grad_std', 'weight_grad']


@pytest.fixture
def x(): return torch.randn(16, 3, 8, 8)


def conv_net(inplace=True):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=inplace), nn.Dropout(), nn.Conv2d(8, 8, 3),
                         nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*16, 5))


def squares(x): return lambda model: model(x)[..., 0].square().mean()


def by_hand(model, names, loss):
    "What autograd gives for the outputs of some layers and for their weights, in training mode without dropout."
    model = deepcopy(model).train()
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
        if isinstance(m, nn.MultiheadAttention): m.dropout = 0.
        if isinstance(m, nn.ReLU): m.inplace = False
    outs,layers = {n: [] for n in names},dict(model.named_modules())
    for n in names:
        layers[n].register_forward_hook(lambda m, a, o, n=n: outs[n].append(o) or o.retain_grad())
    loss(model).backward()
    def std(n): return torch.cat([o.grad.double().flatten() for o in outs[n]]).std().item()
    def ratio(n): return (layers[n].weight.grad.double().norm()/layers[n].weight.detach().double().norm()).item()
    return {n: (std(n), ratio(n)) for n in names}


def twice(self, x): return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


MODELS = {  # A model, the shape of its mini-batch, and the layers that are compared
    'convs': (lambda: conv_net(False), (16, 3, 8, 8), ['0', '3', '7']),
    'in-place activations': (lambda: conv_net(True), (16, 3, 8, 8), ['0', '3', '7']),
    'a layer that runs twice': (lambda: Mod(twice, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), (32, 4), ['a', 'b']),
    'attention and norms': (lambda: nn.TransformerEncoderLayer(8, 2, 16, .3, batch_first=True), (4, 6, 8),
                            ['linear1', 'linear2']),
}


@pytest.mark.parametrize('name', MODELS)
def test_values_are_those_of_autograd(name):
    make,shape,names = MODELS[name]
    model,x = make(),torch.randn(shape)
    stats,plain = layer_stats(model, x, loss=squares(x)),layer_stats(model, x)
    for n, values in by_hand(model, names, squares(x)).items():
        assert (stats[n].grad_std, stats[n].weight_grad) == pytest.approx(values, rel=1e-4), n
    assert all(r.grad_std > 0 and r.weight_grad > 0 for r in stats)
    assert stats.pairs == plain.pairs and stats.n_passes == plain.n_passes + 1
    with torch.no_grad():
        assert layer_stats(model, x, loss=squares(x)).rows == stats.rows and not torch.is_grad_enabled()


@pytest.mark.parametrize('apply, parts', [
    (lambda x, w: x @ w[0], {'up[0]': slice(None)}),
    pytest.param(lambda x, w: GROUPED[0](x, w, offs=torch.tensor([16, 32, 64], dtype=torch.int32)),
                 {'up[0]': slice(0, 16), 'up[1]': slice(16, 32), 'up[2]': slice(32, 64)},
                 marks=pytest.mark.skipif(not GROUPED, reason='this torch has no grouped product')),
], ids=['a part of a parameter', 'the rows of an expert'])
def test_weights_that_no_layer_applies(apply, parts):
    outs = []
    def forward(m, x):
        outs.append(apply(x, m.up))
        return m.head(outs[-1].tanh())
    model,x = Mod(forward, up=nn.Parameter(torch.randn(3, 16, 16)/4), head=nn.Linear(16, 4)),torch.randn(64, 16)
    loss = squares(x)
    grad,of_weight = torch.autograd.grad(loss(model), [outs[0], model.up])
    stats = layer_stats(model, x, loss=loss)
    for i, (name, rows) in enumerate(parts.items()):
        assert stats[name].grad_std == pytest.approx(grad[rows].std().item(), rel=1e-4)
        ratio = of_weight[i].norm()/model.up[i].norm()
        assert stats[name].weight_grad == pytest.approx(ratio.item(), rel=1e-4)


@pytest.mark.parametrize('kwargs', [
    {}, dict(bias=False), dict(dropout=.5), dict(kdim=6, vdim=5), dict(batch_first=False), dict(add_bias_kv=True),
    dict(kdim=6, vdim=5, batch_first=False, bias=False)], ids=str)
@pytest.mark.parametrize('batched', [True, False])
def test_projections_of_attention(kwargs, batched, monkeypatch):
    "Those by hand are taken where torch hands the projections on."
    attn = nn.MultiheadAttention(8, 2, **{'batch_first': True, **kwargs})
    model = Mod(lambda self, *args: self.attn(*args, need_weights=False)[0], attn=attn)
    size = (4, 6) if batched else (6,)
    batch = tuple(torch.randn(*size, n) for n in (8, attn.kdim, attn.vdim))
    if batched:  # fewer queries than keys
        batch = (batch[0][:, :5] if attn.batch_first else batch[0][:3], *batch[1:])
    def loss(m): return m(*batch).square().mean()
    *projections,last = stats = layer_stats(model, batch, loss=loss)
    given,attention = [],F.scaled_dot_product_attention
    def note(q, k, v, *args, **kwargs):
        for t in (q, k, v):
            t.retain_grad()
            given.append(t)
        return attention(q, k, v, *args, **kwargs)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', note)
    attn.dropout = 0.
    loss(model).backward()
    n = 1 if 'add_bias_kv' in kwargs else 0  # the last key and value are no projections
    grads = [t.grad[..., :t.shape[-2] - n*(t is not given[0]), :] for t in given]
    assert [r.grad_std for r in projections] == pytest.approx([g.std().item() for g in grads], rel=1e-4)
    assert last.name == 'attn' and last.grad_std > 0 and all(r.weight_grad > 0 for r in stats)
    packed = attn.in_proj_weight
    if packed is None: return
    ratios = [(g.norm()/w.norm()).item() for g, w in zip(packed.grad.chunk(3), packed.detach().chunk(3))]
    assert [r.weight_grad for r in projections] == pytest.approx(ratios, rel=1e-4)


def test_modules_without_a_weight():
    model,x = mlp(4, 4, 1, act=nn.Tanh),torch.randn(32, 4)
    [row] = layer_stats(model, x, modules=nn.Tanh, loss=squares(x))
    out = model[:2](x).detach().requires_grad_()
    model[2](out).square().mean().backward()
    assert row.grad_std == pytest.approx(out.grad.std().item(), rel=1e-5) and row.weight_grad is None


def test_the_mean_of_a_loss_without_reduction(x):
    model,y = conv_net(),torch.randint(5, (16,))
    a,b = (layer_stats(model, x, loss=lambda m: F.cross_entropy(m(x), y, reduction=r)) for r in ('mean', 'none'))
    assert [r.grad_std for r in a] == pytest.approx([r.grad_std for r in b], rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(k=st.floats(1e-3, 1e3), depth=st.integers(1, 6), seed=st.integers(0, 99))
def test_gradients_scale_with_the_loss(k, depth, seed):
    torch.manual_seed(seed)
    model,x = nn.Sequential(*[nn.Linear(5, 5) for _ in range(depth)]).double(),torch.randn(9, 5).double()
    one,many = (layer_stats(model, x, loss=lambda m: times*m(x).square().mean()) for times in (1, k))
    for a, b in zip(one, many):
        assert (b.grad_std, b.weight_grad) == pytest.approx((k*a.grad_std, k*a.weight_grad), rel=1e-9)


# --- what has no gradient

def test_no_gradient_reaches_behind_frozen_layers(x):
    model = conv_net(inplace=False)
    model[0].requires_grad_(False)
    first, second, last = layer_stats(model, x, loss=squares(x))
    assert first.grad_std is None and first.weight_grad is None and second.grad_std > 0 and last.weight_grad > 0
    model[0].requires_grad_(True)
    model[3].weight.requires_grad_(False)
    first, second, last = layer_stats(model, x, loss=squares(x))
    assert second.grad_std > 0 and second.weight_grad is None and first.weight_grad > 0
    with pytest.raises(ValueError, match='loss: no gradient .*`requires_grad`'):
        layer_stats(model.requires_grad_(False), x, loss=squares(x))


def test_a_layer_that_the_loss_does_not_use():
    def forward(self, x): return self.main(x), self.aux(x)
    model,x = Mod(forward, main=nn.Linear(4, 2), aux=nn.Linear(4, 2)),torch.randn(8, 4)
    main, aux = layer_stats(model, x, loss=lambda m: m(x)[0].square().mean())
    assert main.grad_std > 0 and aux.grad_std is None and aux.weight_grad is None


def test_a_weight_of_zeros():
    model,x = nn.Linear(4, 2),torch.randn(8, 4)
    nn.init.zeros_(model.weight)
    nn.init.ones_(model.bias)
    assert layer_stats(model, x, loss=lambda m: m(x).square().mean())[0].weight_grad == float('inf')
    assert layer_stats(model, x, loss=lambda m: (0*m(x)).sum())[0].weight_grad == 0


def test_they_are_absent_unless_asked_for(x):
    model = conv_net()
    plain,asked = layer_stats(model, x),layer_stats(model, x, loss=squares(x))
    assert all(r.grad_std is None and r.weight_grad is None for r in plain)
    assert not set(GRADIENTS) & set(plain.df()) and 'grad' not in str(plain)
    assert asked.df()[GRADIENTS].gt(0).all(axis=None)
    head = str(asked).splitlines()[2]
    assert 'grad std' in head and 'grad/weight' in head and 'grad/weight' in asked._repr_html_()


# --- what stays as it was

class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise MemoryError('at the backward')


def failing(model): raise MemoryError('at the loss')


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('loss, error', [
    (lambda m: m(torch.ones(2, 3, 8, 8)).square().mean(), None),
    (lambda m: m(torch.ones(2, 2, 8, 8)), RuntimeError),
    (failing, MemoryError),
    (lambda m: Fails.apply(m(torch.ones(2, 3, 8, 8))).sum(), MemoryError),
], ids=['fine', 'fails in the forward', 'fails in the loss', 'fails in the backward'])
def test_nothing_changes(training, loss, error, x):
    model = conv_net().train(training)
    model[0].weight.grad = kept = torch.ones_like(model[0].weight)
    was,before = fingerprint(model),torch.get_rng_state()
    with pytest.raises(error) if error else nullcontext(): layer_stats(model, x, loss=loss)
    assert fingerprint(model) == was and torch.equal(torch.get_rng_state(), before)
    assert model[0].weight.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for n, p in model.named_parameters() if n != '0.weight')


def test_checkpointed_layers_give_the_same():
    def forward(self, x):
        def first(x): return self.a(x).tanh()
        x = x.requires_grad_()
        return self.b(checkpoint(first, x, use_reentrant=False) if self.on else first(x))
    model,x = Mod(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2), on=False),torch.randn(8, 4)
    plain = layer_stats(model, x, loss=squares(x))
    model.on = True
    again = layer_stats(model, x, loss=squares(x))
    assert [(r.grad_std, r.weight_grad) for r in again] == [(r.grad_std, r.weight_grad) for r in plain]


@pytest.mark.parametrize('loss,error,says', [
    (3, TypeError, 'loss: got 3; it takes a function of the model'),
    (lambda m: m(torch.ones(2, 3, 8, 8)).sum().item(), TypeError, 'loss: it gives a float; .* a tensor'),
    (lambda m: m(torch.ones(2, 3, 8, 8)).sum().detach(), ValueError, 'loss: no gradient .*'),
    (lambda m: torch.zeros(()), ValueError, 'loss: no gradient .*'),
    (lambda m: torch.zeros((), requires_grad=True), ValueError, 'loss: no gradient .*'),
], ids=['a number', 'gives a float', 'detached', 'not of the model', 'of something else'])
def test_bad_losses(loss, error, says, x):
    model = conv_net()
    was = fingerprint(model)
    with pytest.raises(error, match=says):
        layer_stats(model, x, loss=loss)
    assert fingerprint(model) == was
