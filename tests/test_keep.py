"What is remembered is put back: all that objects hold, weights, gradients; whatever fails, and whoever interrupts."
import random
import signal
import threading
from collections import Counter, OrderedDict, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fingerprint import fingerprint
from torch import nn

from fastai_lsuv.keep import Snapshot, Weights, gradients_aside, memory, snapshot, uninterrupted


def no(*args, **kwargs): raise TypeError('it refuses writes')


REFUSES = dict.fromkeys(('__setitem__', '__delitem__', 'update', 'clear', 'pop', 'append', 'extend', 'add'), no)
StubbornDict,StubbornList,StubbornSet,StubbornOrdered = (type('Stubborn', (c,), REFUSES)
                                                        for c in (dict, list, set, OrderedDict))


class Unlike:
    "It cannot be compared, asked for its truth, or printed."
    __eq__ = __bool__ = __repr__ = no
    __hash__ = object.__hash__


@pytest.fixture
def kinds(monkeypatch):
    "How each kind of thing is read and written, to be changed by a test."
    monkeypatch.setattr(snapshot, '_KINDS', {**snapshot._KINDS})
    snapshot._kind.cache_clear()
    yield snapshot._KINDS
    snapshot._kind.cache_clear()


def module(**attributes):
    m = nn.Module()
    vars(m).update(attributes)
    return m


def stubborn_ordered(d):
    o = StubbornOrdered()
    for k, v in d.items(): OrderedDict.__setitem__(o, k, v)
    return o


BACK_DOORS = {
    'dict': (lambda: StubbornDict(a=1, b=2), lambda d: (dict.__delitem__(d, 'a'), dict.__setitem__(d, 'c', 3)),
             lambda d: list(dict.items(d))),
    'ordered': (lambda: stubborn_ordered({'a': 1, 'b': 2}), lambda d: OrderedDict.move_to_end(d, 'a'),
                lambda d: list(OrderedDict.items(d))),
    'list': (lambda: StubbornList([1, 2, 3]), lambda v: (list.pop(v), list.append(v, 7), list.append(v, 8)), list),
    'set': (lambda: StubbornSet({1, 2}), lambda v: set.add(v, 3), sorted),
    'empty': (lambda: {}, lambda d: d.update(a=1), dict),
    'empty ordered': (OrderedDict, lambda d: d.update(a=1), dict),
    'empty list': (list, lambda v: v.append(1), list),
    'empty set': (set, lambda v: v.add(1), list),
    'counter': (lambda: Counter('aab'), lambda c: c.update('b'), lambda c: sorted(c.items())),
    'defaultdict': (lambda: defaultdict(list, a=[1]), lambda d: (d['a'].append(2), d['b']),
                    lambda d: sorted(d.items()))}


@pytest.mark.parametrize('kind', BACK_DOORS)
@pytest.mark.parametrize('wrap', [lambda v: v, lambda v: (v,)], ids=['attribute', 'in a tuple'])
def test_a_collection_is_put_back_even_if_it_refuses_writes(kind, wrap):
    make, change, items = BACK_DOORS[kind]
    held = make()
    s, was = Snapshot([module(held=wrap(held))]), items(make())
    for _ in range(2):
        change(held)
        assert items(held) != was
        s.restore()
        assert items(held) == was


def test_keys_and_values_that_cannot_be_compared():
    k, v = Unlike(), Unlike()
    m = module(d={k: v}, o=OrderedDict({k: v}), s={k}, l=[v], t=(v,), own=v)
    s = Snapshot([m])
    m.d[k], m.o['x'], m.l[0], m.own = Unlike(), 1, Unlike(), Unlike()
    m.s.add(1)
    s.restore()
    assert m.own is v and m.l[0] is v and m.d[k] is v and [*m.o] == [*m.s] == [k]


def test_attributes_that_are_added_deleted_and_changed():
    class Stiff(nn.Module):
        __setattr__ = __delattr__ = no
        def __getattribute__(self, name): raise RuntimeError(name)
    m = Stiff.__new__(Stiff)
    d = object.__getattribute__(m, '__dict__')
    d.update(n=1, gone=2)
    s = Snapshot([m])
    d.update(n=2, extra=3)
    del d['gone']
    s.restore()
    assert d == {'n': 1, 'gone': 2}


def test_any_object_and_cycles():
    a, b = [], {}
    a.append(b)
    b.update(a=a, b=b)
    o = SimpleNamespace(a=a, log=[], x=torch.zeros(2))
    o.o = o
    s = Snapshot([o])
    a.append(1), b.update(x=1), o.log.append(1), o.x.add_(1)
    o.more = 1
    s.restore()
    assert len(a) == 1 and list(b) == ['a', 'b'] and list(vars(o)) == ['a', 'log', 'x', 'o']
    assert o.log == [] and not o.x.any()


def test_how_far_down_is_looked():
    "Three collections deep, whichever way something is reached first; objects inside are not opened."
    deepest, shared, inner = [0], [[[1]]], SimpleNamespace(n=0)
    m = module(a=[{'b': (torch.zeros(1), shared)}], deep=[[[[deepest]]]], shared=shared, inner=inner, layer=[nn.ReLU()])
    s = Snapshot([m])
    m.a[0]['b'][0].add_(1), shared[0][0].append(2), deepest.append(1)
    inner.n, m.layer[0].inplace = 1, True
    s.restore()
    assert not m.a[0]['b'][0].any() and shared == [[[1]]] and deepest == [0, 1] and inner.n == 1 and m.layer[0].inplace


def test_a_long_list_is_copied_and_not_looked_into():
    inner = [1]
    m = module(long=[inner]*1001)
    s = Snapshot([m])
    m.long[0] = None
    inner.append(2)
    s.restore()
    assert m.long[0] is inner and inner == [1, 2]


def test_hooks_parameters_buffers_and_modules():
    m = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    m[0].register_forward_hook(lambda *args: None)
    was, weight = fingerprint(m), m[0].weight
    s = Snapshot(m.modules())
    for k in [k for k in vars(m[0]) if 'hooks' in k and vars(m[0])[k] is not None]: vars(m[0])[k][99] = no
    handle = m[0].register_forward_pre_hook(no)
    m[1].running_mean = torch.ones(2)
    m[1].register_buffer('late', torch.ones(1))
    m[0].weight = nn.Parameter(torch.ones(2, 2))
    m.add_module('more', nn.ReLU())
    m.eval()
    m.new = 1
    s.restore()
    handle.remove()
    assert fingerprint(m) == was and m[0].weight is weight
    m[0].weight.data.fill_(7)
    s.restore()
    assert (m[0].weight == 7).all()


def test_a_model_that_hooks_itself_is_undone_together_with_its_note():
    class Net(nn.Linear):
        hooked, got = False, ()
        def forward(self, x):
            if not self.hooked: self.handle = self.register_forward_hook(lambda m, *_: vars(m).update(got=m.got + (1,)))
            self.hooked = True
            return super().forward(x)
    m = Net(2, 2)
    s = Snapshot([m])
    for _ in range(2):
        m(m(m(torch.ones(1, 2))))
        assert m.got == (1, 1)
        s.restore()
        assert not m.hooked and not m._forward_hooks and m.got == () and not hasattr(m, 'handle')


def test_buffers_of_a_scripted_module():
    try: scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
    except Exception: pytest.skip('torch.jit is gone')
    s = Snapshot(scripted.modules())
    scripted(torch.randn(8, 3) + 5)
    s.restore()
    assert not scripted[0].running_mean.any() and scripted[0].num_batches_tracked == 0


def test_arrays(tmp_path):
    fixed, mapped = np.arange(3), np.memmap(tmp_path/'m', 'f4', 'w+', shape=(4,))
    fixed.flags.writeable = False
    p = nn.Parameter(torch.zeros(4))
    m = module(fixed=fixed, point=np.array(1.5), nan=np.array([np.nan, 1]), objects=np.array([[1], 'x'], object),
               transposed=np.arange(6).reshape(2, 3).T, rec=np.zeros(2, [('a', 'i1'), ('b', 'f8')]))
    was = {k: repr(v) for k, v in vars(m).items()}
    vars(m).update(mapped=mapped, view=np.asarray(mapped)[1:], weight=p.detach().numpy()[1:])
    s = Snapshot([m], but={memory(p)})
    m.point[...], m.nan[0], m.objects[1], m.transposed[1], m.rec['b'], mapped[:] = 2, 0, 'y', 9, 4, 3
    p.data += 1
    s.restore()
    assert {k: repr(vars(m)[k]) for k in was} == was and (mapped == 3).all() and p.sum() == 4


GENERATORS = {'torch': lambda: torch.Generator().manual_seed(3), 'python': lambda: random.Random(3),
              'numpy, old': lambda: np.random.RandomState(3), 'numpy': lambda: np.random.default_rng(3),
              'numpy, twister': lambda: np.random.Generator(np.random.MT19937(3))}


@pytest.mark.parametrize('kind', GENERATORS)
def test_generators(kind):
    g = GENERATORS[kind]()
    def draw(): return torch.rand(1, generator=g).item() if kind == 'torch' else g.uniform(0, 1)
    s = Snapshot([module(g=[g], system=random.SystemRandom())], tensors=False)
    first = draw()
    s.restore()
    assert draw() == first


def made_in_inference_mode(f=torch.ones):
    with torch.inference_mode(): return f(3)


class Wrapped(torch.Tensor): __torch_function__ = classmethod(no)


def change_wrapped(t):
    with torch._C.DisableTorchFunctionSubclass(): t.mul_(2)


def give_other_memory(t): t.data = torch.zeros(5, dtype=torch.float64)


def jagged(layout): return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


def dense(t):
    with torch._C.DisableTorchFunctionSubclass():
        t = t.detach()
        if t.is_quantized: t = t.dequantize()
        if t.is_nested: return repr([c.tolist() for c in t.unbind()])
        return repr((t.dtype, t.shape, t.to_dense().tolist()))


TENSORS = {
    'nan': (lambda: torch.full((3,), float('nan')), lambda t: t.fill_(0)),
    'minus zero': (lambda: torch.zeros(3), lambda t: t.neg_()),
    'bool': (lambda: torch.ones(3) > 0, lambda t: t.logical_not_()),
    'complex': (lambda: torch.ones(3, dtype=torch.complex128), lambda t: t.mul_(2j)),
    'conjugated': (lambda: torch.ones(3, dtype=torch.complex64).conj(), lambda t: t.mul_(2j)),
    'bf16': (lambda: torch.ones(3).bfloat16(), lambda t: t.mul_(2)),
    'empty': (lambda: torch.ones(0, 3), lambda t: t.resize_(1, 3)),
    'gaps': (lambda: torch.ones(4, 4)[::2, ::2], lambda t: t.mul_(2)),
    'expanded': (lambda: torch.ones(2, 1).expand(2, 3), lambda t: t[:, :1].mul_(2)),
    'other memory': (lambda: torch.ones(3), give_other_memory),
    'quantized': (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
                  lambda t: t.copy_(torch.zeros(3))),
    'coo': (lambda: torch.eye(3).to_sparse(), lambda t: t.add_(torch.ones(3, 3).to_sparse())),
    'csr': (lambda: torch.eye(4).to_sparse_csr(), lambda t: t.values().mul_(2)),
    'nested': (lambda: jagged(torch.strided), lambda t: t.mul_(2)),
    'jagged': (lambda: jagged(torch.jagged), lambda t: t.values().mul_(2)),
    'inference': (made_in_inference_mode, lambda t: t.data.mul_(2)),
    'inference, expanded': (lambda: made_in_inference_mode(lambda n: torch.ones(1).expand(n)),
                            lambda t: t[:1].data.mul_(2)),
    'of a graph': (lambda: torch.ones(3, requires_grad=True)*2, lambda t: t.data.mul_(2)),
    'subclass': (lambda: torch.ones(3).as_subclass(Wrapped), change_wrapped)}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('as_weight', [False, True], ids=['attribute', 'weight'])
@pytest.mark.parametrize('kind', TENSORS)
def test_tensors(kind, as_weight):
    make, change = TENSORS[kind]
    t = make()
    was, s, w = dense(t), Snapshot([module(t=t)]), Weights()
    w.keep([t])
    for _ in range(2):
        change(t)
        assert dense(t) != was
        w.put_back() if as_weight else s.restore()
        assert dense(t) == was


def test_what_has_not_changed_is_not_written_and_a_write_is_unseen(kinds):
    t, hidden = torch.full((3,), float('nan')), torch.ones(3, requires_grad=True)
    loss = (hidden*(state := torch.ones(3))).sum()
    m = module(t=t, state=state, array=np.zeros(3), log=StubbornList([1]), d=StubbornDict(a=1), s=StubbornSet([1]))
    s = Snapshot([m])
    for base in kinds.keys() - {torch.Tensor}: kinds[base] = kinds[base][0],no
    Snapshot([m]).restore()
    assert t._version == state._version == 0
    state.data += 1
    s.restore()
    loss.backward()


def test_numbers_that_are_left_alone():
    p, x = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    m = module(meta=torch.ones(3, device='meta'), view=p.data[1:], params=[p], log=[])
    m.lazy, m.buffer = nn.UninitializedParameter(), nn.UninitializedBuffer()
    o = SimpleNamespace(x=x, log=[])
    snapshots = [Snapshot([m], but={memory(p)}), Snapshot([o], tensors=False)]
    m.log.append(1), o.log.append(1)
    m.buffer.materialize((2,))
    p.data += 1
    x += 1
    for s in snapshots: s.restore()
    assert m.log == o.log == [] and p.sum() == 2 and x.sum() == 2
    Weights().keep(m.parameters())


def test_weights_are_kept_once_put_back_and_forgotten():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    w = Weights()
    w.keep([a])
    a.data += 1
    w.keep([a, b])
    b.data += 1
    assert [id(p) in w.of for p in (a, b, c)] == [True, True, False]
    w.put_back([b, c])
    assert a.sum() == 2 and b.sum() == 0
    versions = a._version, b._version
    w.put_back()
    assert a.sum() == 0 and (a._version, b._version) == versions and a.is_leaf
    a.data += 1
    w.forget([a, c])
    w.put_back()
    assert a.sum() == 2 and id(a) not in w.of


def test_weights_that_share_memory_are_put_back_to_the_first():
    root, w = torch.zeros(4), Weights()
    a, b = nn.Parameter(root[:3]), nn.Parameter(root[1:])
    w.keep([a])
    a.data += 1
    w.keep([b])
    b.data += 1
    w.put_back()
    assert not root.any()


def test_gradients_are_aside_and_come_back():
    a, b, lazy = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.UninitializedParameter()
    of_inference = made_in_inference_mode()
    a.grad = grad = torch.ones(2)
    with pytest.raises(KeyboardInterrupt), gradients_aside([a, b, a*2, lazy, a, of_inference]):
        (a*b).sum().backward()
        assert a.grad is not grad and b.grad is not None
        raise KeyboardInterrupt
    assert a.grad is grad and b.grad is None and grad.tolist() == [1, 1]


def ten_of_a_kind():
    m = module(log=[], d={'a': 1}, s={1}, array=np.zeros(2), rng=random.Random(0), tensor=torch.zeros(2), n=0)
    m.register_buffer('ema', torch.zeros(2))
    return m


def change_all(m):
    m.log.append(1), m.d.update(a=2), m.s.add(2), m.rng.random(), m.tensor.add_(1), m.ema.add_(1)
    m.array += 1
    m.n = m.extra = 1


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('which', [['array'], ['ema', 'tensor'], ['rng', 'array']])
def test_what_cannot_be_put_back_stops_no_others(which, error, kinds):
    m = ten_of_a_kind()
    def fail(*args): raise error(1)
    for base in {type(getattr(m, k)) for k in which}: kinds[base] = kinds[base][0],fail
    was, s = fingerprint(m)[''], Snapshot([m])
    change_all(m)
    with pytest.raises(error): s.restore()
    now = fingerprint(m)['']
    assert {k for k in was if now[k] != was[k]} >= {*which} - {'ema'} and m.log == [] and m.n == 0
    assert not hasattr(m, 'extra') and m.d == {'a': 1} and m.s == {1}


def test_ctrl_c_waits_for_the_end_and_finds_its_handler_there():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    done, m = [], ten_of_a_kind()
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1, 2] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    def elsewhere():
        s = Snapshot([m])
        change_all(m)
        with uninterrupted(): done.append(signal.getsignal(signal.SIGINT))
        s.restore()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done[2] is signal.default_int_handler and m.log == [] and torch.is_grad_enabled()
    for handler in (signal.SIG_IGN, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)
        with uninterrupted(): pass
        assert signal.getsignal(signal.SIGINT) is handler
