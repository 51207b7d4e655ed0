"""What `lsuv_init` and `layer_stats` leave as it was.

That is all but weights and biases when they succeed, and all of it when they fail."""
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checked import init, quietly, samples
from fingerprint import contents, fingerprint
from lesson11 import ConvLayer, LearnableConvLayer, lesson11
from networks import Mod
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init


class FrozenDict(dict):
    "As the models of `diffusers` hold their configuration."
    def _refuse(self, *args, **kwargs): raise RuntimeError("a FrozenDict cannot be changed")
    __setitem__ = __delitem__ = setdefault = pop = update = clear = _refuse


class Stateful(nn.Module):
    "Everything that a forward pass may leave behind, and what cannot be written to."
    def __init__(self):
        super().__init__()
        self.conv,self.bn = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8)
        self.drop,self.frozen_bn = nn.Dropout(0.3).eval(),nn.BatchNorm2d(8).eval()
        self.old = torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)).eval()
        self.container = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.rnn = nn.LSTM(8, 8, num_layers=2, dropout=0.4, batch_first=True)
        self.attn = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.emb = nn.Embedding(9000, 8, max_norm=0.5)
        self.start,self.started = nn.Parameter(torch.zeros(1, 8, 1, 1)),False  # as an ActNorm takes its start from data
        self.bank = nn.Parameter(torch.zeros(9, 8), requires_grad=False)  # a memory of samples
        self.head,self.config,self.fixed = nn.Linear(8, 4),FrozenDict(n=1),np.broadcast_to(np.zeros(1), (3, 3))
        self.calls,self.log,self.by_name,self.counts = 0,[],{'std': []},Counter()
        self.hidden,self.pair = torch.zeros(2, 1, 8),(torch.zeros(3), [0])
        self.array,self.rng = np.zeros(3),random.Random(3)
        self.register_buffer('ema', torch.zeros(8))
        self.register_buffer('mask', torch.ones(8).expand(3, 8))
        self.register_buffer('none', None)
        self.sparse = torch.eye(3).to_sparse()
        self.trap = lambda: None

    def forward(self, x):
        if not self.started:
            self.start.data.copy_(x.mean())
            self.started = True
        self.calls += 1
        self.log.append(x.shape)
        self.by_name['std'].append(x.std().item())
        self.counts['x'] += 1
        x = self.frozen_bn(self.drop(self.bn(self.conv(x)))) + self.start
        self.ema.lerp_(x.mean((0, 2, 3)), 0.1)
        x = self.container(self.spectral(self.old(x)))
        self.trap()
        x = x.flatten(2).transpose(1, 2) + self.emb.weight.mean() + self.emb(torch.arange(4)).mean()
        y,(self.hidden, self.cell) = self.rnn(x)
        self.bank[:8] = x[:, 0].detach()
        self.pair[0].add_(1)
        self.pair[1].append(1)
        self.array += self.rng.random()
        return self.head(self.attn(x, y, y)[0].mean(1))


def stateful(): return Stateful(), torch.randn(8, 3, 6, 6)
MODULES = ['conv', 'old', 'spectral', 'container', 'attn', 'head']


def test_on_success_nothing_but_weights_and_biases_changes():
    (model, x),log = stateful(),[]
    for m in (model, model.conv, model.head):
        m.register_forward_hook(lambda m, a, o: log.append('after'))
        m.register_forward_pre_hook(lambda m, a: log.append('before'))
    was,params = fingerprint(model, weights=False),{n: contents(p) for n, p in model.named_parameters()}
    version = model.conv.weight._version
    report = quietly(model, iter([x, x*3]), modules=MODULES, preinit='orthogonal')
    now = fingerprint(model, weights=False)
    changed = {n for n, p in model.named_parameters() if contents(p) != params[n]}
    del was['old']['weight'], now['old']['weight']  # computed from its parameters
    assert now == was
    assert all(n.startswith(('conv.', 'old.', 'container.0.', 'attn.', 'head.', 'spectral.')) for n in changed)
    assert {'conv.weight', 'old.weight_g', 'container.0.weight', 'head.bias', 'attn.out_proj.weight'} <= changed
    assert report.n_passes >= 3 and report['conv'].status == 'ok'
    assert model.conv.weight._version > version, "autograd knows of the write"
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ['bank']
    assert log.count('before') == log.count('after') >= 3*report.n_passes, "others' hooks run"


def test_layer_stats_changes_nothing_at_all():
    model,x = stateful()
    was = fingerprint(model)
    layer_stats(model, x)
    layer_stats(model, x, modules=MODULES)
    assert fingerprint(model) == was


# --- whatever fails, all is put back

def fails(error, at, gives=lambda n: None):
    "A function that raises in its call number `at`."
    calls = []
    def f(*args):
        calls.append(1)
        if len(calls) == at: raise error
        return gives(len(calls))
    return f


def check_put_back(model, batches, error, **options):
    was = fingerprint(model)
    with pytest.raises(error): quietly(model, batches, **options)
    assert fingerprint(model) == was


@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt(), StopIteration()], ids=repr)
@pytest.mark.parametrize('at', [1, 2, 3])
def test_a_forward_that_fails_in_any_pass(error, at):
    model,x = stateful()
    model.trap = fails(error, at)
    check_put_back(model, [x, 3*x, 9*x, 27*x], type(error), modules=MODULES)


@pytest.mark.parametrize('unit', MODULES)
@pytest.mark.parametrize('register', [nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook])
def test_a_hook_that_fails_at_any_unit(unit, register):
    model,x = stateful()
    register(model.get_submodule(unit), fails(KeyboardInterrupt, 2))
    check_put_back(model, [x, 3*x, 9*x], KeyboardInterrupt, modules=MODULES)


@pytest.mark.parametrize('option', ['preinit', 'target_std', 'get_input'])
def test_a_function_of_the_users_that_fails(option):
    model,x = stateful()
    f = fails(ZeroDivisionError, 3, lambda n: x*3**n if option == 'get_input' else 1.)
    check_put_back(model, [x]*4, ZeroDivisionError, modules=MODULES, **{option: f})


@pytest.mark.parametrize('third, error', [
    (lambda x: x*float('nan'), ValueError), (lambda x: torch.randn(8, 4, 6, 6), RuntimeError),
    (fails(ZeroDivisionError, 1), ZeroDivisionError)], ids=['nan', 'shape', 'error'])
def test_a_third_mini_batch_that_is_bad(third, error):
    model,x = stateful()
    check_put_back(model, (f(x) for f in (lambda x: x, lambda x: 3*x, third)), error, modules=MODULES)


class BoxedConvLayer(ConvLayer):
    "Its shift lies in an object that nobody looks into."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.box = SimpleNamespace(sub=self.relu.sub)
    def forward(self, x):
        self.relu.sub = self.box.sub
        return super().forward(x)
    @property
    def bias(self): return -self.box.sub
    @bias.setter
    def bias(self, v): self.box.sub = -v


@pytest.mark.parametrize('layer', [ConvLayer, LearnableConvLayer, BoxedConvLayer])
def test_what_stands_behind_properties_is_put_back_too(layer):
    model = lesson11(layer, sub=0.25)
    def trap(*args):
        if float(model[0].bias) != -0.25: raise RuntimeError
    model[4].register_forward_pre_hook(trap)
    check_put_back(model, torch.randn(8, 1, 28, 28), RuntimeError, modules=ConvLayer)
    assert float(model[0].bias) == -0.25


def test_a_sparse_weight_is_changed_and_put_back_when_anything_is_raised():
    model,x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)),torch.randn(64, 8)
    model[0].weight = w = nn.Parameter(model[0].weight.detach().relu().to_sparse_csr())
    hook = model[1].register_forward_hook(fails(ZeroDivisionError, 1))
    check_put_back(model, x, ZeroDivisionError, preinit=None)
    hook.remove()
    report = quietly(model, x, preinit=None)
    assert report.ok and model[0].weight is w and abs(model[0](x).std().item() - 1) < 2e-3


@pytest.mark.parametrize('preinit', ['orthogonal', None])
def test_weights_made_in_inference_mode_are_initialized_and_put_back(preinit):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1))
    hook = model.register_forward_hook(fails(ZeroDivisionError, 1))
    check_put_back(model, torch.randn(64, 6), ZeroDivisionError, preinit=preinit)
    hook.remove()
    assert quietly(model, torch.randn(64, 6), preinit=preinit).ok


# --- what the model writes by itself

class Constrained(nn.Linear):
    "As in EEGNet: its forward keeps the norm of its weight small."
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


@pytest.mark.parametrize('at', [1, 2])
def test_a_layer_that_writes_its_own_weight(at):
    model = nn.Sequential(Constrained(16, 16), nn.Linear(16, 4))
    was = fingerprint(model)
    layer_stats(model, samples())
    assert fingerprint(model) == was
    model.register_forward_hook(fails(ZeroDivisionError, at))
    check_put_back(model, samples(), ZeroDivisionError)


def test_a_frozen_weight_that_the_forward_moves_is_put_back():
    def forward(self, x):
        q = self.q(x)
        with torch.no_grad():
            for a, b in zip(self.q.parameters(), self.k.parameters()): b.data = b.data*.9 + a.data*.1
            return q @ self.k(x).T
    model = Mod(forward, q=nn.Linear(20, 64), k=nn.Linear(20, 64).requires_grad_(False))
    was = fingerprint(model.k)
    assert quietly(model, torch.randn(64, 20))['k'].status == 'frozen'
    assert fingerprint(model.k) == was


def test_a_small_parameter_that_shares_the_memory_of_weights():
    model,flat = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)),torch.randn(400)/4
    model[0].weight,model[2].weight = nn.Parameter(flat[16:272].view(16, 16)),nn.Parameter(flat[272:].view(8, 16))
    model[1].flat = nn.Parameter(flat)
    assert {r.status for r in init(model, samples()).values()} == {'ok'}


def test_gradients_are_those_from_before_though_the_forward_calls_backward():
    @torch.enable_grad()
    def forward(self, x):
        x = x.detach().requires_grad_()
        self.net(x).sum().backward()
        return self.head(x.grad)
    model = Mod(forward, net=nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1)), head=nn.Linear(6, 4))
    model(samples(64, 6))
    model.net[0].bias.grad = None
    was = {n: p.grad for n, p in model.named_parameters()}
    kept = {n: g.clone() for n, g in was.items() if g is not None}
    init(model, samples(64, 6))
    assert len(kept) == 3 and all(p.grad is was[n] for n, p in model.named_parameters())
    assert all(torch.equal(was[n], g) for n, g in kept.items())


# --- modes, random numbers, inputs

def test_modes_dropout_and_random_numbers_of_a_model_in_mixed_modes():
    model,x = stateful()
    model.eval().container.train()
    seen = []
    def see(m, args, out): seen.append((m.training, model.drop.p, model.rnn.dropout, model.attn.dropout))
    model.bn.register_forward_hook(see)
    modes,state = {n: m.training for n, m in model.named_modules()},torch.get_rng_state()
    quietly(model, x, modules=MODULES, preinit=None)
    assert {n: m.training for n, m in model.named_modules()} == modes and set(seen) == {(True, 0., 0., 0.)}
    assert (model.drop.p, model.rnn.dropout, model.attn.dropout) == (0.3, 0.4, 0.2)
    assert torch.equal(torch.get_rng_state(), state)


def test_bringing_lazy_layers_to_life_leaves_the_rest_as_it_was():
    def forward(self, x):
        self.log.append(1)
        self.hidden += 1
        return self.lin(x)
    model = Mod(forward, lin=nn.LazyLinear(3), log=[], hidden=torch.zeros(2))
    assert lsuv_init(model, torch.randn(32, 4)).ok
    assert model.log == [] and model.hidden.sum() == 0 and model.training and model.lin.training


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_a_model_can_be_trained_that_was_initialized_without_gradients(mode):
    model,x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),torch.randn(64, 4)
    model[3].register_forward_hook(lambda m, a, o: None)
    with mode():
        assert lsuv_init(model, x).ok
    model(x).sum().backward()


@pytest.mark.parametrize('kind', ['sparse', 'sparse_csr', 'sparse_csc'])
def test_a_sparse_input(kind):
    def forward(self, x, adj): return self.b(torch.relu(adj @ self.a(x)))
    model = Mod(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    adj = getattr(torch.eye(32) + torch.eye(32).roll(1, 0), f'to_{kind}')()
    assert lsuv_init(model, (torch.randn(32, 4), adj)).ok
    (adj._values() if kind == 'sparse' else adj.values()).fill_(np.nan)
    with pytest.raises(ValueError, match='holds NaNs'): lsuv_init(model, (torch.randn(32, 4), adj))
