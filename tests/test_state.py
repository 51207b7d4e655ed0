"""What `lsuv_init` and `layer_stats` leave as it was.

That is all but weights and biases when they succeed, and all of it when they fail."""
import random
import warnings
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from checked import init, samples
from fingerprint import contents, fingerprint
from lesson11 import ConvLayer, LearnableConvLayer, lesson11
from networks import Mod
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init


class Stateful(nn.Module):
    "Everything that a forward pass may leave behind."
    def __init__(self):
        super().__init__()
        self.conv,self.bn = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8)
        self.drop,self.frozen_bn = nn.Dropout(0.3),nn.BatchNorm2d(8)
        self.old = torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))
        self.container = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.rnn = nn.LSTM(8, 8, num_layers=2, dropout=0.4, batch_first=True)
        self.attn = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.emb = nn.Embedding(5, 8, max_norm=0.5)
        self.start,self.started = nn.Parameter(torch.zeros(1, 8, 1, 1)),False  # as an ActNorm takes its start from data
        self.head = nn.Linear(8, 4)
        self.calls,self.log,self.by_name,self.counts = 0,[],{'std': []},Counter()
        self.hidden,self.pair = torch.zeros(2, 1, 8),(torch.zeros(3), [0])
        self.array,self.rng = np.zeros(3),random.Random(3)
        self.register_buffer('ema', torch.zeros(8))
        self.register_buffer('mask', torch.ones(8).expand(3, 8))
        self.register_buffer('none', None)
        self.sparse = torch.eye(3).to_sparse()
        self.frozen_bn.eval()
        self.drop.eval()
        self.spectral.eval()
        self.trap = None

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
        if self.trap is not None:
            self.trap()
        x = x.flatten(2).transpose(1, 2) + self.emb.weight.mean() + self.emb(torch.arange(4)).mean()
        y, (self.hidden, self.cell) = self.rnn(x)
        self.pair[0].add_(1)
        self.pair[1].append(1)
        self.array += self.rng.random()
        return self.head(self.attn(x, y, y)[0].mean(1))


def stateful(): return Stateful(), torch.randn(8, 3, 6, 6)
MODULES = ['conv', 'old', 'spectral', 'container', 'attn', 'head']


def quietly(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


def test_on_success_nothing_but_weights_and_biases_changes():
    model, x = stateful()
    was, params = fingerprint(model, weights=False), {n: contents(p) for n, p in model.named_parameters()}
    report = quietly(lsuv_init, model, iter([x, x*3]), modules=MODULES, preinit='orthogonal')
    now = fingerprint(model, weights=False)
    changed = {n for n, p in model.named_parameters() if contents(p) != params[n]}
    del was['old']['weight'], now['old']['weight']  # computed from its parameters
    assert now == was
    units = ('conv.', 'old.', 'container.0.', 'attn.', 'head.', 'spectral.')
    assert changed and all(n.startswith(units) for n in changed)
    assert {'conv.weight', 'old.weight_g', 'container.0.weight', 'head.bias', 'attn.out_proj.weight'} <= changed
    assert report.n_passes >= 3 and report['conv'].status == 'ok'
    assert [p.requires_grad for p in model.parameters()] == [True]*len(params)


def test_layer_stats_changes_nothing_at_all():
    model, x = stateful()
    was = fingerprint(model)
    layer_stats(model, x)
    layer_stats(model, x, modules=MODULES)
    assert fingerprint(model) == was


ERRORS = [RuntimeError('out of memory'), KeyboardInterrupt(), StopIteration()]


@pytest.mark.parametrize('error', ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('at', [1, 2, 3])
def test_a_forward_that_fails_in_any_pass(error, at):
    model, x = stateful()
    passes = []
    def trap():
        passes.append(1)
        if len(passes) == at: raise error
    model.trap = trap
    was = fingerprint(model)
    with pytest.raises(type(error)):
        quietly(lsuv_init, model, [x, 3*x, 9*x, 27*x], modules=MODULES)
    assert len(passes) == at and fingerprint(model) == was


@pytest.mark.parametrize('unit', MODULES)
@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_hook_that_fails_at_any_unit(unit, when):
    model, x = stateful()
    m, calls = model.get_submodule(unit), []
    def fail(*args):
        calls.append(1)
        if len(calls) > 1: raise KeyboardInterrupt
    m.register_forward_pre_hook(fail) if when == 'before' else m.register_forward_hook(fail)
    was = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        quietly(lsuv_init, model, [x, 3*x, 9*x], modules=MODULES)
    assert fingerprint(model) == was


@pytest.mark.parametrize('option', ['preinit', 'batches', 'target_std', 'get_input'])
def test_a_function_of_the_users_that_fails(option):
    model, x = stateful()
    calls = []
    def fail(*args):
        calls.append(1)
        if len(calls) > 2: raise ZeroDivisionError
        return x*3**len(calls) if option == 'get_input' else 1.
    def batches():
        yield x
        yield 3*x
        fail()
        fail()
        fail()
    options = dict(batches=batches()) if option == 'batches' else {'batches': [x, x, x, x], option: fail}
    was = fingerprint(model)
    with pytest.raises(ZeroDivisionError):
        quietly(lsuv_init, model, modules=MODULES, **options)
    assert fingerprint(model) == was


@pytest.mark.parametrize('bad', [float('nan'), 'shape'])
def test_a_third_mini_batch_that_is_bad(bad):
    model, x = stateful()
    third = torch.full_like(x, bad) if bad != 'shape' else torch.randn(8, 4, 6, 6)
    was = fingerprint(model)
    with pytest.raises((ValueError, RuntimeError)):
        quietly(lsuv_init, model, [x, 3*x, third], modules=MODULES)
    assert fingerprint(model) == was


@pytest.mark.parametrize('layer', [ConvLayer, LearnableConvLayer])
def test_what_stands_behind_properties_is_put_back_too(layer):
    model = lesson11(layer, sub=0.25)
    def trap(*args):
        if float(model[0].bias) != -0.25: raise RuntimeError
    model[4].register_forward_pre_hook(trap)
    was = fingerprint(model)
    with pytest.raises(RuntimeError):
        lsuv_init(model, torch.randn(8, 1, 28, 28), modules=ConvLayer)
    assert fingerprint(model) == was and float(model[0].bias) == -0.25


def hooks_of(model):
    "The forward hooks of each module, in their order."
    return [(list(m._forward_hooks.items()), list(m._forward_pre_hooks.items()), dict(m._forward_hooks_with_kwargs))
            for m in model.modules()]


def test_others_hooks_stay_in_place_and_in_order():
    model, x = stateful()
    log = []
    for m in (model, model.conv, model.head):
        m.register_forward_hook(lambda m, a, o: log.append('after'))
        m.register_forward_pre_hook(lambda m, a: log.append('before'))
    was = hooks_of(model)
    quietly(lsuv_init, model, x, modules=MODULES)
    assert hooks_of(model) == was
    assert log.count('before') == log.count('after') >= 6


def test_modes_of_a_mixed_model_and_dropout():
    model, x = stateful()
    model.eval()
    model.container.train()
    seen = []
    def see(m, args, out): seen.append((m.training, model.drop.p, model.rnn.dropout, model.attn.dropout))
    model.bn.register_forward_hook(see)
    modes = {n: m.training for n, m in model.named_modules()}
    quietly(lsuv_init, model, x, modules=MODULES)
    assert {n: m.training for n, m in model.named_modules()} == modes and set(seen) == {(True, 0., 0., 0.)}
    assert (model.drop.p, model.rnn.dropout, model.attn.dropout) == (0.3, 0.4, 0.2)


def test_gradients_stay():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.grad = torch.ones(4, 4)
    assert lsuv_init(model, torch.randn(32, 4)).ok
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4)) and model[0].weight.is_leaf


def test_global_randomness_is_not_used_without_preinit():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    x = torch.randn(16, 4)
    state = torch.get_rng_state()
    lsuv_init(model, x, preinit=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_bringing_lazy_layers_to_life_leaves_the_rest_as_it_was():
    def forward(self, x):
        self.log.append(1)
        self.hidden += 1
        return self.lin(x)
    model = Mod(forward, lin=nn.LazyLinear(3), log=[], hidden=torch.zeros(2))
    assert lsuv_init(model, torch.randn(32, 4)).ok
    assert model.log == [] and model.hidden.sum() == 0 and model.training and model.lin.training


def test_in_inference_mode_and_under_no_grad():
    x = torch.randn(64, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
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


class OddMemory(nn.Module):
    """Layers whose weights lie in memory in every way.

    They are of other types, transposed, channels-last, with gaps, expanded, of a few bytes, or empty."""
    def __init__(self):
        super().__init__()
        self.cl = nn.Conv2d(3, 7, 3, bias=False).to(memory_format=torch.channels_last)
        self.transposed,self.gaps = nn.Linear(7, 5),nn.Linear(5, 5)
        self.f64,self.bf16 = nn.Linear(5, 3).double(),nn.Linear(3, 3).bfloat16()
        self.transposed.weight = nn.Parameter(torch.randn(7, 5).t())
        self.gaps.weight = nn.Parameter(torch.randn(10, 10)[::2, ::2])
        self.bf16.bias = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).expand(3), requires_grad=False)
        self.last,self.empty = nn.Linear(3, 1),nn.Linear(0, 4)
        self.scale = nn.Parameter(torch.randn(2, 5)[:, :1].expand(2, 3), requires_grad=False)

    def forward(self, x):
        x = self.gaps(self.transposed(self.cl(x).mean((2, 3))))
        x = self.bf16(self.f64(x.double()).bfloat16()).float()
        self.empty(x[:, :0])
        return self.last(x)


def test_weights_in_any_kind_of_memory_are_put_back():
    model,seen = OddMemory(),[]
    def look(*args):
        seen.append([p.detach().clone() for p in model.parameters()])
        if len(seen) == 3: raise RuntimeError('stop')
    model.cl.register_forward_pre_hook(look)
    was = fingerprint(model)
    model(x := torch.randn(16, 3, 6, 6))
    with pytest.raises(RuntimeError, match='stop'):
        quietly(lsuv_init, model, x)
    changed = [not torch.equal(a, b) for a, b in zip(seen[0], seen[2])]
    assert changed[:6] == [False] + [True]*5 and fingerprint(model) == was


def test_a_sparse_weight():
    "It is changed. It is put back when anything is raised."
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    w = nn.Parameter(model[0].weight.detach().relu().to_sparse_csr())
    model[0].weight = w
    x,was = torch.randn(64, 8),fingerprint(model)
    hook = model[1].register_forward_hook(lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError):
        quietly(lsuv_init, model, x, preinit=None)
    hook.remove()
    assert fingerprint(model) == was
    report = quietly(lsuv_init, model, x, preinit=None)
    assert report.ok and model[0].weight is w and abs(model[0](x).std().item() - 1) < 2e-3


def test_weights_made_in_inference_mode_are_put_back():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1))
    was = fingerprint(model)
    for preinit in ('orthogonal', None):
        hook = model.register_forward_hook(lambda *args: 1/0)
        with pytest.raises(ZeroDivisionError):
            quietly(lsuv_init, model, torch.randn(64, 6), preinit=preinit)
        hook.remove()
        assert fingerprint(model) == was


# --- a restore that cannot half-fail

class FrozenDict(OrderedDict):
    "As `diffusers` keeps the config of every model."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            setattr(self, key, value)
        self.__frozen = True

    def _refuse(self, *args, **kwargs):
        raise Exception(f"You cannot use it on a {type(self).__name__} instance.")
    __delitem__ = setdefault = pop = update = _refuse

    def __setattr__(self, name, value):
        if hasattr(self, '__frozen'):
            self._refuse()
        super().__setattr__(name, value)

    def __setitem__(self, name, value):
        if hasattr(self, '_FrozenDict__frozen'):
            self._refuse()
        super().__setitem__(name, value)


def read_only():
    a = np.arange(3.)
    a.flags.writeable = False
    return a


REFUSERS = {'frozen dict': lambda: FrozenDict({f'k{i}': i for i in range(29)}), 'read-only array': read_only,
            'array of no dimensions': lambda: np.array(1.5),
            'broadcast array': lambda: np.broadcast_to(np.zeros(1), (3, 3))}


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('kind', REFUSERS)
def test_an_attribute_that_refuses_writes(kind, fails):
    "It must not make `lsuv_init` raise, nor leave the config empty and the weights changed."
    model, x = stateful()
    model.conv.refuser = model.refuser = refuser = REFUSERS[kind]()
    def add(m, args, out):
        m.refuser += 1
    if kind == 'array of no dimensions':
        model.conv.register_forward_hook(add)
    if fails:
        model.head.register_forward_hook(lambda *args: 1/0)
    was, params = fingerprint(model, weights=False), [contents(p) for p in model.parameters()]
    if fails:
        with pytest.raises(ZeroDivisionError):
            quietly(lsuv_init, model, x, modules=MODULES)
    else:
        assert quietly(lsuv_init, model, x, modules=MODULES)['conv'].status == 'ok'
    now = fingerprint(model, weights=False)
    for m in (was, now):
        del m['old']['weight']
    assert now == was and (params == [contents(p) for p in model.parameters()]) == fails and model.refuser is refuser
    assert kind != 'frozen dict' or list(refuser.items()) == [(f'k{i}', i) for i in range(29)]


def beside(e):
    "What is told beside an exception, in its notes or, before Python 3.11, as its context."
    return ''.join(getattr(e, '__notes__', [])) + str(e.__context__)


def sealed_by_the_forward():
    "A model whose forward writes to an array, and then seals it."
    def forward(self, x):
        if self.seen.flags.writeable:
            self.seen += 1
            self.seen.flags.writeable = False
        self.log.append(1)
        self.norm(x)
        if self.fails: raise ZeroDivisionError('of the forward')
        return self.lin(x)
    return Mod(forward, lin=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), seen=np.zeros(2), log=[], fails=False)


class Bank(nn.Module):
    "Its forward writes to a parameter that is no unit's, as a memory bank does."
    def __init__(self, n, data=False):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.bank = nn.Parameter(torch.zeros(n, 4), requires_grad=False)
        self.data = data
        self.fails = False

    def forward(self, x):
        (self.bank.data if self.data else self.bank)[:8] = x[:8].detach()
        if self.fails: raise ZeroDivisionError
        return self.lin(x)


@pytest.mark.parametrize('data', [False, True])
def test_a_small_parameter_that_the_forward_writes(data):
    model = Bank(2**14, data)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert lsuv_init(model, torch.randn(32, 4)).ok
    assert not model.bank.any()


class Constrained(nn.Linear):
    "As in EEGNet: its forward keeps the norm of its weight small."
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


@pytest.mark.parametrize('at', [0, 1, 2])
def test_a_layer_that_writes_its_own_weight(at):
    model,calls = nn.Sequential(Constrained(16, 16), nn.Linear(16, 4)),[]
    def fail(*args):
        calls.append(1)
        if len(calls) == at: raise ZeroDivisionError
    model.register_forward_hook(fail)
    was = fingerprint(model)
    if at:
        with pytest.raises(ZeroDivisionError): quietly(lsuv_init, model, samples())
    else: layer_stats(model, samples())
    assert fingerprint(model) == was


def test_a_small_parameter_that_shares_the_memory_of_weights():
    model,flat = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)),torch.randn(400)/4
    model[0].weight,model[2].weight = nn.Parameter(flat[16:272].view(16, 16)),nn.Parameter(flat[272:].view(8, 16))
    model[1].flat = nn.Parameter(flat)
    report = init(model, samples())
    assert {r.status for r in report.values()} == {'ok'}


def test_gradients_are_those_from_before():
    "So it is where a model calls `backward` in its forward."
    class Backward(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.head = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1)),nn.Linear(6, 4)
        @torch.enable_grad()
        def forward(self, x):
            x = x.detach().requires_grad_()
            self.net(x).sum().backward()
            return self.head(x.grad)
    model = Backward()
    model(samples(64, 6))
    model.net[0].bias.grad = None
    was = {n: p.grad for n, p in model.named_parameters()}
    kept = {n: g.clone() for n, g in was.items() if g is not None}
    init(model, samples(64, 6))
    assert len(kept) == 3 and all(p.grad is was[n] for n, p in model.named_parameters())
    for n, g in kept.items():
        assert torch.equal(was[n], g)


@pytest.mark.parametrize('array', [np.array(3.), np.arange(3.)], ids=['0-d', 'read-only'])
def test_arrays_that_cannot_be_written_are_no_obstacle(array):
    array.flags.writeable = False
    net = nn.Sequential(nn.Linear(16, 8))
    net.scale = array
    assert lsuv_init(net, torch.randn(64, 16)).ok and net.scale is array


def test_a_frozen_weight_that_the_forward_moves_is_put_back():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.q,self.k = nn.Linear(20, 64),nn.Linear(20, 64).requires_grad_(False)
        def forward(self, x):
            q = self.q(x)
            with torch.no_grad():
                for a, b in zip(self.q.parameters(), self.k.parameters()): b.data = b.data*.9 + a.data*.1
                return q @ self.k(x).T

    net = Momentum()
    was = [p.clone() for p in net.k.parameters()]
    assert quietly(lsuv_init, net, torch.randn(64, 20))['k'].status == 'frozen'
    assert all(map(torch.equal, net.k.parameters(), was))
