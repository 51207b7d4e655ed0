"A model is measured as it trains, but nothing is dropped at random, and norm layers tell of samples that are alike."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import Mod
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.observe.conditions import NormWatch, measuring


def spread_of(model, x):
    "What the norm layers of `model` tell of a mini-batch."
    watch = NormWatch()
    with measuring(model, watch), torch.no_grad():
        model(x)
    return watch.spread


# --- norm layers: samples that are alike

def copies(n, *shape, noise=0.):
    "Copies of one sample, each number off by a share of itself."
    return torch.randn(1, *shape)*(1 + noise*torch.randn(n, *shape))


magnitudes = st.floats(-9, 3).map(lambda e: 10**e) | st.just(0.)


@given(st.lists(st.tuples(magnitudes, magnitudes), max_size=6), st.sampled_from([0., 1e-5, 1e-3]),
       st.sampled_from([torch.float32, torch.float16]))
def test_the_spread_is_the_share_that_eps_leaves_where_samples_are_alike(groups, eps, dtype):
    "By its definition: groups that vary enough are not looked at one by one, and this must not show."
    mean,var = torch.tensor([m for m, _ in groups]),torch.tensor([v for _, v in groups])
    noise = (4*torch.finfo(dtype).eps)**2
    live = [(m, v if v > noise*m**2 else 0.) for m, v in zip(mean.tolist(), var.tolist()) if m or v]
    spread = sum(v/(v + eps) if v else 0. for _, v in live)/max(len(live), 1)
    alike = live and sum(v for _, v in live) < .01*sum(v + m**2 for m, v in live)
    watch = NormWatch()
    watch.see(mean, var, eps, dtype)
    assert watch.normed and watch.spread == pytest.approx(spread if alike and spread < .1 else 1., rel=1e-4)


@pytest.mark.parametrize('x', [
    pytest.param(lambda: copies(32, 8), id='copies'),
    pytest.param(lambda: copies(32, 8, noise=6e-8), id='copies with rounding noise'),
    pytest.param(lambda: copies(32, 8, 1, 1, noise=6e-8).expand(32, 8, 3, 3), id='copies of constant images'),
    pytest.param(lambda: copies(32, 8, noise=6e-8).double(), id='float32 noise in float64'),
])
def test_batch_norm_of_copies_of_one_sample(x):
    x = x()
    norm = nn.BatchNorm1d(8) if x.dim() == 2 else nn.BatchNorm2d(8)
    assert spread_of(norm.to(x.dtype), x) < 1e-6


def test_batch_norm_of_samples_that_differ_by_less_than_its_eps_allows():
    x = 1 + torch.tensor([-1e-4, 1e-4]).repeat(32)[:, None].expand(64, 8)
    assert spread_of(nn.BatchNorm1d(8), x) == pytest.approx(1e-8/(1e-8 + 1e-5), rel=0.01)
    assert spread_of(nn.BatchNorm1d(8, eps=1e-12), x) == 1.  # it leaves them a std of 1


@pytest.mark.parametrize('x', [
    pytest.param(lambda: torch.randn(64, 8), id='standard'),
    pytest.param(lambda: torch.randn(64, 8)*3 + 100, id='off zero'),
    pytest.param(lambda: torch.randn(64, 8)*1e-2, id='small'),
    pytest.param(lambda: torch.randn(64, 8)*1e-4, id='near zero'),
    pytest.param(lambda: torch.randn(64, 8)*1e-12, id='very near zero'),
    pytest.param(lambda: torch.randn(2, 8), id='two samples'),
    pytest.param(lambda: torch.zeros(64, 8), id='zeros'),
    pytest.param(lambda: torch.randn(64, 8)*(torch.arange(8) > 6), id='most channels dead'),
    pytest.param(lambda: torch.randn(1, 8, 6, 6), id='one image'),
    pytest.param(lambda: torch.randn(1, 8, 6, 6).expand(16, 8, 6, 6), id='copies of an image that varies'),
])
@pytest.mark.parametrize('options', [dict(), dict(affine=False), dict(track_running_stats=False)], ids=str)
def test_batch_norm_of_samples_that_differ(x, options):
    x = x()
    norm = nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d
    assert spread_of(norm(8, **options), x) == 1.


def test_batch_norm_with_running_statistics_does_not_look_at_the_batch():
    class Frozen(nn.BatchNorm1d):
        def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
    assert spread_of(Frozen(8), copies(32, 8)) == 1.


NORMS = {
    'layer': lambda **kw: nn.LayerNorm((8, 4, 4), **kw),
    'layer, channels last': lambda **kw: nn.LayerNorm(4, **kw),
    'group': lambda **kw: nn.GroupNorm(4, 8, **kw),
    'one group': lambda **kw: nn.GroupNorm(1, 8, **kw),
    'instance': lambda **kw: nn.InstanceNorm2d(8, **kw),
    'instance, affine': lambda **kw: nn.InstanceNorm2d(8, affine=True, **kw),
    'instance, tracking': lambda **kw: nn.InstanceNorm2d(8, track_running_stats=True, **kw),
}


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('x, spread', [
    pytest.param(lambda: torch.full((4, 8, 4, 4), 3.), 0., id='constant'),
    pytest.param(lambda: 1 + torch.tensor([-1e-4, 1e-4]).expand(4, 8, 4, 2).repeat(1, 1, 1, 2), 1e-3, id='nearly so'),
    pytest.param(lambda: torch.randn(4, 8, 4, 4), 1., id='standard'),
    pytest.param(lambda: torch.randn(4, 8, 4, 4) + 50, 1., id='off zero'),
    pytest.param(lambda: torch.randn(4, 8, 4, 4)*1e-5, 1., id='near zero'),
    pytest.param(lambda: torch.zeros(4, 8, 4, 4), 1., id='zeros'),
])
def test_norms_within_a_sample(norm, x, spread):
    assert spread_of(NORMS[norm](), x()) == pytest.approx(spread, rel=0.02, abs=1e-9)


@pytest.mark.parametrize('norm', ['layer', 'group', 'instance, affine'])
@pytest.mark.parametrize('weight', [0., 0.01, 100.])
def test_the_weight_of_a_norm_does_not_make_samples_alike(norm, weight):
    norm = NORMS[norm]()
    nn.init.constant_(norm.weight, weight)
    assert spread_of(norm, torch.randn(4, 8, 4, 4)) == 1.
    if weight:
        assert spread_of(norm, torch.full((4, 8, 4, 4), 3.)) == 0.


def test_the_smallest_spread_of_all_norms_counts_until_the_watch_is_reset():
    watch,x = NormWatch(),1 + torch.tensor([-1e-4, 1e-4]).repeat(32)[:, None].expand(64, 8)
    layers = [nn.BatchNorm1d(8, eps=eps) for eps in (1e-5, 1e-6, 1e-4)]
    model = Mod(lambda self, x: [norm(x) for norm in self.norms], norms=nn.ModuleList(layers))
    with measuring(model, watch), torch.no_grad():
        model(x)
    assert watch.spread == pytest.approx(1e-8/(1e-8 + 1e-4), rel=0.01)
    watch.reset()
    assert watch.spread == 1.


# --- norm layers: all else is as in training

@pytest.mark.parametrize('dtype, of_norm, close', [
    (torch.float32, torch.float32, 1e-6),
    (torch.float64, torch.float64, 1e-12),
    (torch.float16, torch.float16, 2e-3),
    (torch.bfloat16, torch.bfloat16, 2e-2),
    (torch.bfloat16, torch.float32, 1e-6),
])
@pytest.mark.parametrize('momentum', [None, 0., 0.1, 1.])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('track', [True, False])
def test_batch_norm_does_what_it_does_in_training(dtype, of_norm, close, momentum, affine, track):
    norm = nn.BatchNorm2d(6, momentum=momentum, affine=affine, track_running_stats=track).to(of_norm)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if track:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    plain = deepcopy(norm).train()
    for scale in (1, 3, 10):
        x = (torch.randn(8, 6, 5, 5)*scale + 2).to(dtype)
        want = plain(x)
        with measuring(norm, NormWatch()):
            got = norm(x)
        assert got.dtype == want.dtype and torch.equal(got, want)
    for (name, got), want in zip(norm.named_buffers(), plain.buffers()):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=close, atol=close, msg=lambda m: f'{name}: {m}')


def test_batch_norm_passes_gradients_on():
    norm,x = nn.BatchNorm1d(4),torch.randn(16, 4, requires_grad=True)
    with measuring(norm, NormWatch()):
        norm(x).square().sum().backward()
    got,x.grad = x.grad,None
    norm(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_batch_norm_of_one_value_a_channel_is_refused_as_in_training():
    norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match='more than 1 value per channel'), measuring(norm, NormWatch()):
        norm(torch.randn(1, 4))


@pytest.mark.parametrize('norm', NORMS)
def test_other_norms_do_what_they_do_in_training(norm):
    norm,x = NORMS[norm](),torch.randn(4, 8, 4, 4)
    plain = deepcopy(norm).train()
    with measuring(norm, NormWatch()):
        assert torch.equal(norm(x), plain(x))
    assert all(map(torch.equal, norm.buffers(), plain.buffers()))


# --- dropout

def attended(x, function):
    "`function` of a query, key and value made of `x`."
    q = x.reshape(4, 4, 16, 4)
    return function(q, q, q)


def multi_head(x, **kwargs):
    q = x.reshape(16, 8, 8)
    weights = torch.eye(8).repeat(3, 1)
    return F.multi_head_attention_forward(q, q, q, 8, 2, weights, None, None, None, False, 0.5, torch.eye(8), None,
                                          **kwargs)[0]


DROPOUTS = {
    'dropout': lambda x: F.dropout(x),
    'dropout, p': lambda x: F.dropout(x, 0.5),
    'dropout, positional': lambda x: F.dropout(x, 0.5, True),
    'dropout, keyword': lambda x: F.dropout(input=x, p=0.5, training=True),
    'dropout, in place': lambda x: F.dropout(x.clone(), 0.5, True, True),
    'dropout, in place by keyword': lambda x: F.dropout(x.clone(), inplace=True),
    'dropout1d': lambda x: F.dropout1d(x.view(16, 16, 4), 0.5),
    'dropout1d, positional': lambda x: F.dropout1d(x.view(16, 16, 4), 0.5, True),
    'dropout2d': lambda x: F.dropout2d(x, 0.5),
    'dropout2d, keyword': lambda x: F.dropout2d(x, p=0.5, training=True, inplace=False),
    'dropout3d': lambda x: F.dropout3d(x[..., None], 0.5),
    'dropout3d, in place': lambda x: F.dropout3d(x[..., None].clone(), 0.5, True, True),
    'alpha': lambda x: F.alpha_dropout(x, 0.5, True),
    'alpha, keyword': lambda x: F.alpha_dropout(x, p=0.5, training=True),
    'alpha, in place': lambda x: F.alpha_dropout(x.clone(), 0.5, True, True),
    'feature alpha': lambda x: F.feature_alpha_dropout(x, 0.5, True),
    'feature alpha, keyword': lambda x: F.feature_alpha_dropout(x, training=True),
    'torch.dropout': lambda x: torch.dropout(x, 0.5, True),
    'torch.dropout, keyword': lambda x: torch.dropout(x, p=0.5, train=True),
    'torch.dropout, mixed': lambda x: torch.dropout(x, 0.5, train=True),
    'torch.dropout_': lambda x: torch.dropout_(x.clone(), 0.5, True),
    'torch.feature_dropout': lambda x: torch.feature_dropout(x, 0.5, True),
    'torch.native_dropout': lambda x: torch.native_dropout(x, 0.5, True)[0],
    'attention, positional': lambda x: attended(x, lambda *a: F.scaled_dot_product_attention(*a, None, 0.5)),
    'attention, keyword': lambda x: attended(x, lambda *a: F.scaled_dot_product_attention(*a, dropout_p=0.5)),
    'attention, causal': lambda x: attended(
        x, lambda *a: F.scaled_dot_product_attention(*a, dropout_p=0.5, is_causal=True)),
    'multi-head attention': lambda x: multi_head(x),
    'multi-head attention, keyword': lambda x: multi_head(x, training=True, need_weights=False),
}


@pytest.mark.parametrize('kind', DROPOUTS)
def test_functional_dropout_is_off_and_back_on_afterwards(kind):
    "Two runs give the same, nothing is random, and dropout outside is as it was."
    x,function = torch.randn(16, 4, 4, 4) + 5,DROPOUTS[kind]
    model = Mod(lambda self, x: function(x), lin=nn.Linear(1, 1))
    state = torch.get_rng_state()
    with measuring(model, NormWatch()):
        got = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    if 'attention' not in kind:
        assert torch.equal(got.flatten(), x.flatten())
    with measuring(model, NormWatch()):
        assert torch.equal(model(x), got)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x)) and not torch.equal(model(x), got)


def test_attention_without_dropout_is_that_of_zero_dropout():
    x = torch.randn(16, 4, 4, 4)
    model = Mod(lambda self, x: attended(x, lambda *a: F.scaled_dot_product_attention(*a, dropout_p=0.5)))
    with measuring(model, NormWatch()):
        got = model(x)
    assert torch.equal(got, attended(x, F.scaled_dot_product_attention))


class DropPath(nn.Module):
    "As timm's: by its own attribute and mode."
    drop_prob = 0.5
    def forward(self, x): return x*(torch.rand(len(x), 1) > self.drop_prob) if self.training else x


class StochasticDepth(DropPath): pass
class MyDropout(DropPath): pass
class DropBlock2d(DropPath): pass
class Drop(DropPath): pass


@pytest.mark.parametrize('module', [
    nn.Dropout(0.5),
    nn.AlphaDropout(0.5),
    nn.FeatureAlphaDropout(0.5),
    DropPath(),
    StochasticDepth(),
    MyDropout(),
    DropBlock2d(),
    Drop(),
], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize('training', [True, False])
def test_dropout_modules_are_off_and_as_they_were_afterwards(module, training):
    model,x = nn.Sequential(module).train(training),torch.randn(64, 4)
    def attributes(): return {k: v for k, v in vars(module).items() if k != 'training'}
    was = attributes()
    with measuring(model, NormWatch()):
        assert torch.equal(model(x), x)
    assert attributes() == was
    assert torch.equal(model.train()(x), model(x)) is False


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_dropout_is_back_on_after_an_error(error):
    layers = nn.Dropout(0.5), nn.LSTM(4, 4, 2, dropout=0.3), nn.MultiheadAttention(4, 2, dropout=0.2)
    model,x = nn.Sequential(*layers),torch.ones(64, 4)
    with pytest.raises(error), measuring(model, NormWatch()):
        assert (model[0].p, model[1].dropout, model[2].dropout) == (0., 0., 0.)
        raise error
    assert (model[0].p, model[1].dropout, model[2].dropout) == (0.5, 0.3, 0.2)
    assert not torch.equal(F.dropout(x), x)


# --- a model's own train mode

class Froze(nn.BatchNorm1d):
    "Its `train` keeps it in eval mode."
    def train(self, mode=True): return super().train(False)


def with_own_train(module):
    "A module whose own `train` is an attribute."
    module.train = lambda mode=True: nn.Module.train(module, False)
    return module


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('make', [Froze, lambda n: with_own_train(nn.BatchNorm1d(n))])
def test_a_train_method_of_the_models_own_is_called_in_whatever_mode_the_model_is(make, training):
    model = nn.Sequential(make(4), nn.BatchNorm1d(4))
    for m in model: m.training = training
    with measuring(model, NormWatch()):
        assert [m.training for m in model.modules()] == [True, False, True]


def test_a_module_that_its_parent_alone_knows_is_put_in_train_mode():
    class Parent(nn.Module):
        def children(self): yield from self.hidden

    model = Parent()
    object.__setattr__(model, 'hidden', [nn.BatchNorm1d(4).eval()])
    with measuring(model, NormWatch()):
        assert model.hidden[0].training


@pytest.mark.parametrize('mode', [False, None])
def test_a_module_in_eval_mode_inside_a_model_in_train_mode_is_measured_in_training(mode):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)))
    model[1][0].training = mode
    with measuring(model, NormWatch()):
        assert all(m.training is True for m in model.modules())


# --- models by the name of Drop

class DropletNet(nn.Module):
    "A network of droplets, whose auxiliary head is called only in training."
    def __init__(self):
        super().__init__()
        self.body,self.head,self.aux = nn.Linear(8, 16),nn.Linear(16, 4),nn.Linear(16, 2)
    def forward(self, x):
        x = F.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class DropNet(DropletNet): pass
class DropPathNet(DropletNet): pass
class StochasticNet(DropletNet): pass


@pytest.mark.parametrize('net', [DropletNet, DropNet, DropPathNet, StochasticNet])
@pytest.mark.parametrize('training', [True, False])
def test_a_model_whose_name_holds_drop_is_measured_in_training(net, training):
    model,x = net().train(training),torch.randn(64, 8)
    assert {r.name: r.status for r in lsuv_init(model, x)} == {'body': 'ok', 'head': 'ok', 'aux': 'ok'}
    assert [r.name for r in layer_stats(model, x)] == ['body', 'head', 'aux']
    assert [m.training for m in model.modules()] == [training]*4


@pytest.mark.parametrize('drop', [torch.alpha_dropout, torch.feature_alpha_dropout, torch.alpha_dropout_,
                                  torch.feature_dropout_, torch.feature_alpha_dropout_], ids=lambda f: f.__name__)
def test_no_builtin_dropout_drops(drop):
    seen = []

    def forward(self, x):
        seen.append(drop(x.clone(), 0.5, self.training))
        return self.lin(seen[-1])

    net,x = Mod(forward, lin=nn.Linear(16, 8)),torch.randn(64, 16)
    lsuv_init(net, x)
    assert all(torch.equal(s, x) for s in seen)


@pytest.mark.parametrize('norm', [nn.LayerNorm(16), nn.GroupNorm(2, 16)])
def test_a_norm_layer_inside_a_transform_of_torch_func(norm):
    def forward(self, x): return torch.func.vmap(lambda row: self.norm(row[None])[0])(self.lin(x))

    assert lsuv_init(Mod(forward, lin=nn.Linear(20, 16), norm=norm), torch.randn(64, 20)).ok
