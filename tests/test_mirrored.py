"The mirrored start: where the symmetry test finds that it holds, and what a network is that has it."
import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from fastai.basics import Callback
from fingerprint import fingerprint
from hypothesis import given
from hypothesis import strategies as st
from learners import learner
from networks import NETWORKS, Mod, images, mlp, param
from torch import nn

from fastai_lsuv import LSUVCallback, lsuv_init

ACTS = [nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Hardswish, nn.ReLU6, nn.Mish]


def starts(model, batch, **options):
    "The start of each layer by name, and the report."
    report = quietly(model, batch, preinit='mirrored', **options)
    return {r.name: r.start for r in report}, report


def all_mirrored(model, batch):
    found,report = starts(model, batch, order='std')
    return report.ok and set(found.values()) == {'mirrored'}


def in_pairs(w, dim=0): return torch.equal(w.transpose(0, dim)[::2], -w.transpose(0, dim)[1::2])


def assert_odd(model, x):
    with torch.no_grad(): y,z = model.eval()(x),model(-x)
    torch.testing.assert_close(z, -y, atol=1e-4, rtol=1e-4)
    assert y.std() > 0.1


# --- what a mirrored network is

@st.composite
def chains(draw):
    "A chain of layers without norms, and a mini-batch: linear, or convs with pooling and a flatten before the head."
    act,depth = draw(st.sampled_from(ACTS[:4])),draw(st.integers(1, 5))
    widths = [draw(st.integers(1, 6))*4 for _ in range(depth)]
    if draw(st.booleans()): return mlp(5, *widths, 3, act=act), torch.randn(32, 5)
    layers,i,side = [],3,16
    for o in widths:
        groups = draw(st.sampled_from([1, 2])) if i % 4 == 0 else 1
        layers += [nn.Conv2d(i, o, 3, padding=1, groups=groups, bias=draw(st.booleans())), act()]
        if act is nn.ReLU and side > 4 and draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2))
            side //= 2
        if draw(st.booleans()): layers.append(nn.Dropout(0.3))
        i = o
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(i*side**2, 4)), torch.randn(16, 3, 16, 16)


@given(chains())
def test_a_chain_without_norms_is_odd(chain):
    model,x = chain
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert all_mirrored(model, x)
    assert_odd(model, x)
    assert all(in_pairs(m.weight) for m in layers[:-1])
    assert all(in_pairs(m.weight, 1) for m in layers[1:] if isinstance(m, nn.Conv2d))
    assert not any(m.bias is not None and m.bias.any() for m in layers)


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('norm', [nn.Identity, nn.BatchNorm1d, nn.LayerNorm])
def test_rectifiers(act, norm):
    layers = nn.Linear(8, 16), norm(16), act(), nn.Dropout(0.5), nn.Linear(16, 16), norm(16), act(), nn.Linear(16, 3)
    model,x = nn.Sequential(*layers),torch.randn(64, 8)
    assert all_mirrored(model, x)
    if norm is nn.Identity: assert_odd(model, x)


@pytest.mark.parametrize('act, why', [
    (nn.Tanh, 'no activation between layers'),
    (nn.SELU, 'no activation between layers'),
    (nn.ELU, 'no activation between layers'),
    (lambda: Mod(lambda self, x: F.relu(x)**2), 'no activation between layers'),
    (nn.Identity, 'there is no rectifier'),
    (lambda: Mod(lambda self, x: x.unflatten(1, (-1, 2)).amax(2)), "no layer's input keeps"),
    (nn.Sigmoid, 'no activation between layers'),
], ids=['tanh', 'SELU', 'ELU', 'squared', 'none', 'maxout', 'sigmoid'])
@pytest.mark.parametrize('norm', [nn.Identity, nn.BatchNorm1d, nn.LayerNorm])
def test_other_activations_keep_their_weights(act, why, norm):
    layers = nn.Linear(8, 16), norm(16), act(), nn.LazyLinear(16), norm(16), act(), nn.LazyLinear(4)
    model,x = nn.Sequential(*layers),torch.randn(64, 8)
    model(x)
    kept = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=f'No layer starts mirrored: {why}.*All keep their weights'):
        report = lsuv_init(model, x, preinit='mirrored', order='std')
    quietly(kept, x, preinit=None, order='std')
    assert {r.start for r in report} == {'kept'} and 'start mirrored' not in report.summary
    assert all(map(torch.equal, model.state_dict().values(), kept.state_dict().values()))


@pytest.mark.parametrize('act', [nn.ReLU, nn.GELU])
def test_means_are_zero_before_a_bias_moves_and_the_second_pass_finds_each_std_right(act):
    model,x = mlp(10, *[32]*20, 4, act=act),3 + torch.randn(64, 10)
    found,report = starts(model, x, order='std')
    assert report.ok and set(found.values()) == {'mirrored'} and all(r.passes <= 1 for r in report)
    assert report.n_passes == 5  # three on four samples, one that corrects, one that verifies
    assert all(abs(r.mean) < 1e-5 and abs(r.std - 1) < 1e-3 for r in report.rows[:-1])


def test_gradients_through_a_hundred_layers():
    model,x,outs = mlp(16, *[64]*100, 4),torch.randn(64, 16),[]
    quietly(model, x, preinit='mirrored', order='std')
    def keep(m, args, out):
        out.retain_grad()
        outs.append(out)
    for m in model[:-1:2]:
        m.register_forward_hook(keep)
    F.cross_entropy(model(x), torch.arange(64) % 4).backward()
    stds = [o.grad.std().item() for o in outs]
    assert len(stds) == 100 and max(stds) < 3*min(stds)


# --- where it holds

@pytest.mark.parametrize('name, n, of', [
    ('torchvision/squeezenet1_1', 26, 26),
    ('torchvision/vgg11', 11, 11),
    ('torchvision/alexnet', 8, 8),
    ('torchvision/resnet18', 21, 21),
    ('torchvision/densenet121', 121, 121),
    ('torchvision/vit', 8, 26),  # the two layers of each MLP
    ('torchvision/mobilenet_v2', 2, 53),  # a depthwise layer takes no pairs
    ('timm/nfnet_skipinit', 14, 14),  # weights are standardized
    ('hand/recurrent_conv', 0, 3),
    ('hand/shared_head_on_a_pyramid', 0, 4),
    ('hand/weight_norm', 0, 4),
    ('hand/frozen', 2, 3),
    ('hand/compiled', 3, 3),
    ('hand/bfloat16', 3, 3),
    ('torch_geometric/gcn', 3, 3),  # it does not take four samples of a graph
])
def test_networks(name, n, of):
    found,report = starts(*NETWORKS[name]())
    assert (list(found.values()).count('mirrored'), len(found)) == (n, of)
    if n: assert f'{n} of {of} layers start mirrored' in report.summary and 'mirrored' in str(report)
    assert all(r.status != 'off' for r in report)
    if 'vit' in name: assert all(('mlp' in n) == (s == 'mirrored') for n, s in found.items())


def convs(n, groups):
    conv,transposed = getattr(nn, f'Conv{n}d'),getattr(nn, f'ConvTranspose{n}d')
    model = nn.Sequential(conv(3, 8, 3), nn.ReLU(), transposed(8, 12, 3, groups=groups), nn.LeakyReLU(),
                          conv(12, 8, 3, groups=groups), nn.GELU(), transposed(8, 4, 3))
    return model, torch.randn(8, 3, *[6]*n)


def branches():
    "With a shuffle, a concatenation, an addition and a skip."
    def forward(self, x):
        a = F.relu(self.stem(x))
        b = torch.cat([F.relu(self.left(a)), F.max_pool2d(F.relu(self.right(a)), 3, 1, 1)], 1)
        shuffled = b.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        c = F.relu(self.mix(shuffled) + self.skip(a))
        return self.head(F.adaptive_avg_pool2d(c, 2).flatten(1))
    convs = dict(stem=nn.Conv2d(3, 16, 3, padding=1), left=nn.Conv2d(16, 8, 1), right=nn.Conv2d(16, 8, 3, padding=1),
                 mix=nn.Conv2d(16, 16, 1), skip=nn.Conv2d(16, 16, 1))
    return Mod(forward, **convs, head=nn.Linear(64, 5)), images(16, 8)


def operations():
    "Weights that no layer applies, one by `addmm`, as in GPT-2."
    def forward(self, x): return F.gelu(torch.addmm(self.b, x, self.w)) @ self.v
    return Mod(forward, b=param(16), w=param(8, 16), v=param(16, 4)), torch.randn(32, 8)


@pytest.mark.parametrize('make', [*(partial(convs, n, groups) for n in (1, 2, 3) for groups in (1, 2)), branches,
                                  operations])
def test_it_holds_through_convs_branches_and_operations(make):
    model,x = make()
    assert all_mirrored(model, x)
    assert_odd(model, x)


def test_layers_that_decline_and_what_must_match_them_are_kept():
    "An odd width, a frozen layer, one called twice, one of zeros."
    def of(model, **options): return [*starts(model, torch.randn(32, 8), **options)[0].values()]
    assert of(mlp(8, 16, 15, 16, 4)) == ['mirrored']*4  # columns, then rows
    model = mlp(8, 16, 16, 16, 4)
    model[2].weight.requires_grad_(False)
    assert of(model) == ['kept', 'kept', 'mirrored', 'mirrored']
    assert of(mlp(8, 16, 16, 16, 4), exclude='2')[1:] == ['mirrored', 'mirrored']
    twice = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    assert of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), twice, twice, nn.Linear(16, 4))) == ['kept']*3
    zero = mlp(8, 16, 16, 4)
    for p in zero[-1].parameters():
        nn.init.zeros_(p)
    assert of(zero) == ['mirrored', 'mirrored', 'kept'] and not zero[-1].weight.any()


# --- what is left undisturbed

def test_everything_else_is_as_without_it():
    "Buffers, modes, hooks, other parameters; and the test consumes no random numbers."
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 8, 3),
                          nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8*16, 4))
    x = images(16, 8)
    model[4].eval()
    model(x).sum().backward()
    was,norm = fingerprint(model, weights=False),copy.deepcopy(model[1])
    state = random.getstate(), np.random.get_state()[1].tobytes()
    quietly(model, x, preinit='mirrored')
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == state
    assert fingerprint(model, weights=False) == was and all(map(torch.equal, model[1].parameters(), norm.parameters()))
    tanh,x = mlp(8, 8, 8, act=nn.Tanh),torch.randn(32, 8)
    state = torch.get_rng_state()
    quietly(tanh, x, preinit='mirrored')
    assert torch.equal(torch.get_rng_state(), state)


def test_in_a_learner_training_sees_what_it_would_have_seen():
    def seen(preinit):
        class Seen(Callback):
            def after_batch(self): xs.append(self.xb[0].sum().item())
        xs,learn = [],learner(cbs=[LSUVCallback(preinit=preinit), Seen()])
        learn.fit(2)
        return xs, learn.lsuv.report, torch.get_rng_state()
    (a,report,end),(b,_,also) = seen('mirrored'),seen(None)
    assert a == b and len(a) and torch.equal(end, also)
    assert any(r.start == 'mirrored' for r in report)


def test_a_failure_in_the_test_puts_all_back():
    "The model stumbles over the noise: nothing is mirrored. Ctrl-C ends it, and nothing is changed."
    class Picky(nn.Module):
        error,calls = ValueError('strange numbers'),0
        def forward(self, x):
            Picky.calls += 1
            if Picky.calls in (1, 2): raise self.error
            return x
    model,x = nn.Sequential(nn.Linear(8, 16), Picky(), nn.ReLU(), nn.Linear(16, 4)),torch.randn(32, 8)
    with pytest.warns(UserWarning, match='No layer starts mirrored: the model does not run.*strange numbers'):
        lsuv_init(model, x, preinit='mirrored')
    Picky.error,Picky.calls,was = KeyboardInterrupt(),0,fingerprint(model)
    with pytest.raises(KeyboardInterrupt): lsuv_init(model, x, preinit='mirrored')
    assert fingerprint(model) == was


def test_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setattr('fastai_lsuv.start.start.is_sharded', lambda p: True)
    model,x = mlp(8, 16, 4),torch.randn(32, 8)
    was = fingerprint(model)
    with pytest.raises(ValueError, match='^preinit: .*sharded'): lsuv_init(model, x, preinit='mirrored')
    assert fingerprint(model) == was


def test_the_report_has_a_column_of_starts_only_with_it():
    plain,report = quietly(mlp(8, 16, 4), torch.randn(32, 8)),starts(mlp(8, 16, 4), torch.randn(32, 8))[1]
    assert {r.start for r in plain} == {None} and 'start' not in plain.df() and 'start' not in str(plain).split()
    assert 'start' in report.df()
