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


def measured(model, x):
    "What `model` gives as it is measured, and what its norm layers tell of the mini-batch."
    watch = NormWatch()
    with measuring(model, watch), torch.no_grad(): out = model(x)
    return out, watch.spread


# --- norm layers: samples that are alike

def near(eps): return pytest.approx(1e-8/(1e-8 + eps), rel=0.01)
def copies(noise, *shape): return torch.randn(1, *shape)*(1 + noise*torch.randn(32, *shape))
def nearly_one(): return 1 + torch.tensor([-1e-4, 1e-4]).repeat(32)[:, None].expand(64, 8)


NONE,ALL = pytest.approx(0., abs=1e-6),1.
BATCHES = {  # The share of variance that eps leaves, and what gives the samples
    'copies': (NONE, lambda: copies(0, 8)),
    'copies with rounding noise': (NONE, lambda: copies(6e-8, 8)),
    'copies of constant images': (NONE, lambda: copies(6e-8, 8, 1, 1).expand(32, 8, 3, 3)),
    'float32 noise in float64': (NONE, lambda: copies(6e-8, 8).double()),
    'off by less than eps': (near(1e-5), nearly_one),
    'standard': (ALL, lambda: torch.randn(64, 8)),
    'off zero': (ALL, lambda: torch.randn(64, 8)*3 + 100),
    'small': (ALL, lambda: torch.randn(64, 8)*1e-2),
    'near zero': (ALL, lambda: torch.randn(64, 8)*1e-4),
    'very near zero': (ALL, lambda: torch.randn(64, 8)*1e-12),
    'two samples': (ALL, lambda: torch.randn(2, 8)),
    'zeros': (ALL, lambda: torch.zeros(64, 8)),
    'most channels dead': (ALL, lambda: torch.randn(64, 8)*(torch.arange(8) > 6)),
    'one image': (ALL, lambda: torch.randn(1, 8, 6, 6)),
    'copies of an image that varies': (ALL, lambda: torch.randn(1, 8, 6, 6).expand(16, 8, 6, 6))}


@pytest.mark.parametrize('kind', BATCHES)
@pytest.mark.parametrize('options', [dict(), dict(affine=False), dict(track_running_stats=False)], ids=str)
def test_what_a_batch_norm_tells_of_samples(kind, options):
    spread,make = BATCHES[kind]
    x = make()
    norm = nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d
    assert measured(norm(8, **options).to(x.dtype), x)[1] == spread


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


class Frozen(nn.BatchNorm1d):
    "It normalizes by its running statistics."
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize('norm, x', [(Frozen(8), lambda: copies(0, 8)), (nn.BatchNorm1d(8, eps=1e-12), nearly_one)],
                         ids=['running statistics', 'small eps'])
def test_a_batch_norm_for_which_it_does_not_matter_that_samples_are_alike(norm, x):
    assert measured(norm, x())[1] == 1.


NORMS = {
    'layer': lambda: nn.LayerNorm((8, 4, 4)),
    'layer, channels last': lambda: nn.LayerNorm(4),
    'group': lambda: nn.GroupNorm(4, 8),
    'one group': lambda: nn.GroupNorm(1, 8),
    'instance': lambda: nn.InstanceNorm2d(8),
    'instance, affine': lambda: nn.InstanceNorm2d(8, affine=True),
    'instance, tracking': lambda: nn.InstanceNorm2d(8, track_running_stats=True)}


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('x, spread', [
    pytest.param(lambda: torch.full((4, 8, 4, 4), 3.), 0., id='constant'),
    pytest.param(lambda: 1 + torch.tensor([-1e-4, 1e-4]).expand(4, 8, 4, 2).repeat(1, 1, 1, 2), 1e-3, id='nearly so'),
    pytest.param(lambda: torch.randn(4, 8, 4, 4), 1., id='standard'),
    pytest.param(lambda: torch.randn(4, 8, 4, 4) + 50, 1., id='off zero'),
    pytest.param(lambda: torch.randn(4, 8, 4, 4)*1e-5, 1., id='near zero'),
    pytest.param(lambda: torch.zeros(4, 8, 4, 4), 1., id='zeros')])
def test_norms_within_a_sample_tell_of_it_and_do_what_they_do_in_training(norm, x, spread):
    norm,x = NORMS[norm](),x()
    plain = deepcopy(norm).train()
    out,told = measured(norm, x)
    assert told == pytest.approx(spread, rel=0.02, abs=1e-9)
    assert torch.equal(out, plain(x)) and all(map(torch.equal, norm.buffers(), plain.buffers()))


@pytest.mark.parametrize('norm', ['layer', 'group', 'instance, affine'])
@pytest.mark.parametrize('weight', [0., 0.01, 100.])
def test_the_weight_of_a_norm_does_not_make_samples_alike(norm, weight):
    norm = NORMS[norm]()
    nn.init.constant_(norm.weight, weight)
    assert measured(norm, torch.randn(4, 8, 4, 4))[1] == 1.
    if weight: assert measured(norm, torch.full((4, 8, 4, 4), 3.))[1] == 0.


def test_the_smallest_spread_of_all_norms_counts():
    layers = nn.ModuleList(nn.BatchNorm1d(8, eps=eps) for eps in (1e-5, 1e-4, 1e-6))
    model = Mod(lambda self, x: [norm(x) for norm in self.norms], norms=layers)
    assert measured(model, nearly_one())[1] == near(1e-4)


# --- norm layers: all else is as in training

@pytest.mark.parametrize('dtype, of_norm, close', [
    (torch.float32, torch.float32, 1e-6),
    (torch.float64, torch.float64, 1e-12),
    (torch.float16, torch.float16, 2e-3),
    (torch.bfloat16, torch.bfloat16, 2e-2),
    (torch.bfloat16, torch.float32, 1e-6)])
@pytest.mark.parametrize('momentum', [None, 0., 0.1, 1.])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('track', [True, False])
def test_batch_norm_does_what_it_does_in_training(dtype, of_norm, close, momentum, affine, track):
    norm = nn.BatchNorm2d(6, momentum=momentum, affine=affine, track_running_stats=track).to(of_norm)
    for p in norm.parameters(): nn.init.normal_(p)
    if track:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    plain = deepcopy(norm).train()
    for scale in (1, 3, 10):
        x = (torch.randn(8, 6, 5, 5)*scale + 2).to(dtype)
        torch.testing.assert_close(measured(norm, x)[0], plain(x), rtol=0, atol=0)
    for got, want in zip(norm.buffers(), plain.buffers()):
        torch.testing.assert_close(got, want, rtol=close, atol=close)


def test_batch_norm_passes_gradients_on():
    norm,x = nn.BatchNorm1d(4),torch.randn(16, 4, requires_grad=True)
    def gradient(): return torch.autograd.grad(norm(x).square().sum(), x)[0]
    with measuring(norm, NormWatch()): got = gradient()
    torch.testing.assert_close(got, gradient())


def test_batch_norm_of_one_value_a_channel_is_refused_as_in_training():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        measured(nn.BatchNorm1d(4), torch.randn(1, 4))


@pytest.mark.parametrize('norm', [nn.LayerNorm(16), nn.GroupNorm(2, 16)])
def test_a_norm_layer_inside_a_transform_of_torch_func(norm):
    def forward(self, x): return torch.func.vmap(lambda row: self.norm(row[None])[0])(self.lin(x))
    assert lsuv_init(Mod(forward, lin=nn.Linear(20, 16), norm=norm), torch.randn(64, 20)).ok


# --- dropout

def attention(x, *args, **kwargs):
    q = x.reshape(4, 4, 16, 4)
    return F.scaled_dot_product_attention(q, q, q, *args, **kwargs)


def multi_head(x, p, **kwargs):
    q,three = x.reshape(16, 8, 8),torch.eye(8).repeat(3, 1)
    given = q, q, q, 8, 2, three, None, None, None, False, p, three[:8], None
    return F.multi_head_attention_forward(*given, **kwargs)[0]


OF_TORCH = [torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout,
            torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_]
IN_F = [F.dropout, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout]
DROPOUTS = {
    **{f.__name__: lambda x, f=f: f(x.clone(), 0.5, True) for f in OF_TORCH},
    **{f'{f.__name__} by keyword': lambda x, f=f: f(x.clone(), p=0.5, train=True) for f in OF_TORCH},
    **{f'F.{f.__name__}': lambda x, f=f: f(x.clone(), 0.5, True, True) for f in IN_F},
    **{f'F.{f.__name__} by keyword': lambda x, f=f: f(input=x, p=0.5, training=True) for f in IN_F},
    'F.dropout by default': F.dropout,
    'F.dropout1d': lambda x: F.dropout1d(x.view(16, 16, 4)).view_as(x),
    'native_dropout': lambda x: torch.native_dropout(x, 0.5, True)[0]}
ATTENTION = {  # With dropout, and without
    'positional': (lambda x: attention(x, None, 0.5), attention),
    'by keyword': (lambda x: attention(x, dropout_p=0.5), attention),
    'causal': (lambda x: attention(x, dropout_p=0.5, is_causal=True), lambda x: attention(x, is_causal=True)),
    'multi-head': (lambda x: multi_head(x, 0.5), lambda x: multi_head(x, 0.)),
    'multi-head by keyword': (lambda x: multi_head(x, 0.5, training=True, need_weights=False),
                              lambda x: multi_head(x, 0., need_weights=False))}


@pytest.mark.parametrize('drops, want', [
    *(pytest.param(f, lambda x: x, id=name) for name, f in DROPOUTS.items()),
    *(pytest.param(*both, id=f'attention, {name}') for name, both in ATTENTION.items())])
def test_functional_dropout_is_off_and_back_on_afterwards(drops, want):
    x = torch.randn(16, 4, 4, 4) + 5
    model = Mod(lambda self, x: drops(x))
    state = torch.get_rng_state()
    got = measured(model, x)[0]
    assert torch.equal(got, want(x)) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(x), model(x)) and not torch.equal(model(x), got)


class DropPath(nn.Module):
    "As timm's: by its own attribute and mode."
    drop_prob = 0.5
    def forward(self, x): return x*(torch.rand(len(x), 1) > self.drop_prob) if self.training else x


def renamed(cls, name, *args, **kwargs): return type(name, (cls,), {})(*args, **kwargs)


@pytest.mark.parametrize('module', [
    nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5),
    *(renamed(DropPath, name) for name in ('DropPath', 'StochasticDepth', 'MyDropout', 'DropBlock2d', 'Drop'))],
    ids=lambda m: type(m).__name__)
@pytest.mark.parametrize('training', [True, False])
def test_dropout_modules_are_off_and_as_they_were_afterwards(module, training):
    model,x = nn.Sequential(module).train(training),torch.randn(64, 4)
    def attributes(): return {k: v for k, v in vars(module).items() if k != 'training'}
    was = attributes()
    assert torch.equal(measured(model, x)[0], x) and attributes() == was
    assert not torch.equal(model.train()(x), model(x))


def with_auxiliary_head(self, x):
    x = F.relu(self.body(x))
    return (self.head(x), self.aux(x)) if self.training else self.head(x)


@pytest.mark.parametrize('name', ['DropletNet', 'DropNet', 'DropPathNet', 'StochasticNet'])
@pytest.mark.parametrize('training', [True, False])
def test_a_model_whose_name_holds_drop_is_measured_in_training(name, training):
    layers = dict(body=nn.Linear(8, 16), head=nn.Linear(16, 4), aux=nn.Linear(16, 2))
    model,x = renamed(Mod, name, with_auxiliary_head, **layers).train(training),torch.randn(64, 8)
    assert {r.name: r.status for r in lsuv_init(model, x)} == {'body': 'ok', 'head': 'ok', 'aux': 'ok'}
    assert [r.name for r in layer_stats(model, x)] == ['body', 'head', 'aux']
    assert [m.training for m in model.modules()] == [training]*4


# --- a model's own train mode

class Froze(nn.BatchNorm1d):
    "Its `train` keeps it in eval mode."
    def train(self, mode=True): return super().train(False)


def with_own_train(n):
    "A module whose own `train` is an attribute."
    module = nn.BatchNorm1d(n)
    module.train = lambda mode=True: nn.Module.train(module, False)
    return module


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('make', [Froze, with_own_train])
def test_a_train_method_of_the_models_own_is_called_in_whatever_mode_the_model_is(make, training):
    model = nn.Sequential(make(4), nn.BatchNorm1d(4))
    for m in model: m.training = training
    with measuring(model, NormWatch()): assert [m.training for m in model.modules()] == [True, False, True]
