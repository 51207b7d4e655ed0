"Restoring as a thing of its own: whatever an attribute holds, what changed is put back, and nothing else is written."
import gc
import random
import signal
import tracemalloc
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_lsuv.keep import restore
from fastai_lsuv.keep.restore import RestoreError, put_back, survey
from fastai_lsuv.keep.state import Copies, Snapshot


def no(*args, **kwargs): raise TypeError('it refuses writes')


class StubbornDict(dict): __setitem__ = __delitem__ = update = clear = pop = setdefault = no


class StubbornOrdered(OrderedDict): __setitem__ = __delitem__ = update = clear = pop = setdefault = no


class StubbornList(list): __setitem__ = __delitem__ = clear = append = extend = no


class StubbornSet(set): clear = update = add = no


class StubbornDeque(deque): clear = extend = append = no


class Unlike:
    "It cannot be compared, asked for its truth, or printed."
    __eq__ = __bool__ = __repr__ = no
    __hash__ = object.__hash__


class Sealed:
    "Its attributes are not to be set."
    def __init__(self, n): vars(self).update(n=n, log=[n])
    __setattr__ = __delattr__ = no


@dataclass
class Tracker:
    n: int
    counts: list


@dataclass(slots=True)
class Slotted:
    n: int
    counts: list


def module(**attributes):
    m = nn.Module()
    vars(m).update(attributes)
    return m


def written(m):
    "What `restore` would write into `m`, by name: a snapshot is taken, and looked at by `change`."
    s = Snapshot([m], names=[''])
    return s, lambda: [restore._name(where) for i in s.items for where, _ in restore._repairs(i)]


# --- collections that refuse writes, changed by the back door

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
    'deque': (lambda: StubbornDeque([1, 2], maxlen=2), lambda v: deque.append(v, 3), list),
    'counter': (lambda: Counter('aab'), lambda c: c.update('b'), lambda c: sorted(c.items())),
    'defaultdict': (lambda: defaultdict(list, a=[1]), lambda d: (d['a'].append(2), d['b']),
                    lambda d: sorted(d.items()))}


@pytest.mark.parametrize('kind', BACK_DOORS)
def test_a_collection_that_refuses_writes_is_put_back(kind):
    make, change, items = BACK_DOORS[kind]
    held = make()
    s, changed = written(module(held=held))
    was = items(make())
    assert changed() == []
    change(held)
    assert items(held) != was and 'held' in changed()
    s.restore()
    assert items(held) == was and changed() == []


def test_keys_and_values_that_cannot_be_compared():
    k, v = Unlike(), Unlike()
    m = module(d={k: v}, o=OrderedDict({k: v}), s={k}, l=[v], q=deque([v]), t=(v,), own=v)
    s, changed = written(m)
    assert changed() == []
    m.d[k], m.o['x'], m.l[0], m.own = Unlike(), 1, Unlike(), Unlike()
    m.s.add(1), m.q.append(v)
    assert sorted(changed()) == ['d', 'l', 'o', 'own', 'q', 's']
    s.restore()
    assert changed() == [] and m.own is v and m.l[0] is v and m.d[k] is v and [*m.o] == [*m.s] and len(m.q) == 1


@pytest.mark.parametrize('make', [StubbornDict, StubbornOrdered, StubbornList, StubbornSet, StubbornDeque],
                         ids=lambda t: t.__name__)
def test_what_has_not_changed_is_not_written(make, monkeypatch):
    m = module(held=make(), array=np.zeros(3), tensor=torch.zeros(3), rng=random.Random(0))
    s, changed = written(m)
    for item in {type(i) for i in s.items}: monkeypatch.setattr(item, 'write', no)
    m.tensor.data.add_(0)
    assert changed() == [] and m.tensor._version == 0
    s.restore()


# --- arrays

def test_arrays():
    fixed, mapped_proxy = np.arange(3), MappingProxyType({'inside': np.zeros(2)})
    fixed.flags.writeable = False
    m = module(fixed=fixed, point=np.array(1.5), nan=np.array([np.nan, 1]), objects=np.array([[1], 'x'], object),
               proxy=mapped_proxy,
               masked=np.ma.array([1, 2, 3], mask=[0, 1, 0]), transposed=np.arange(6).reshape(2, 3).T,
               rec=np.zeros(2, [('a', 'i1'), ('b', 'f8')]))
    was = {k: repr(v) for k, v in vars(m).items()}
    s, changed = written(m)
    assert changed() == []
    m.point[...], m.nan[0], m.objects[1], m.masked[0], m.transposed[1], m.rec['b'] = 2, 0, 'y', np.ma.masked, 9, 4
    m.objects[0].append(5), mapped_proxy['inside'].__iadd__(1)
    assert {'point', 'nan', 'objects', 'objects[0]', 'transposed', 'rec', 'proxy[0]'} <= set(changed())
    s.restore()
    assert {k: repr(v) for k, v in vars(m).items()} == was and changed() == []


def test_an_array_that_became_read_only_is_named():
    m = module(array=np.zeros(3), log=[])
    s = Snapshot([m], names=['head'])
    m.array += 1
    m.array.flags.writeable = False
    m.log.append(1)
    message = r"could not put back 'head.array': .*read-only \(ValueError\)"
    with pytest.raises(RestoreError, match=message) as e: s.restore()
    assert m.log == [] and [w for w, _ in e.value.failed] == ['head.array']


def test_memory_mapped_arrays(tmp_path, monkeypatch):
    "A small one is put back; one above the limit is left alone, not copied."
    small, large = (np.memmap(tmp_path/n, 'f4', 'w+', shape=(k,)) for n, k in (('small', 10), ('large', 300_000)))
    monkeypatch.setattr(restore, '_MOST_BYTES', 2**20)
    m = module(small=small, large=large, view=np.asarray(large)[:], ram=np.zeros(300_000, 'f4'))
    tracemalloc.start()
    s = Snapshot([m])
    copied = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for v in (small, large, m.ram): v[:] = 3
    s.restore()
    assert not small.any() and not m.ram.any() and (large == 3).all() and 1.2e6 < copied < 1.6e6


def test_arrays_and_tensors_that_show_a_parameter_keep_what_is_written_to_it():
    p, root = nn.Parameter(torch.zeros(4)), np.zeros(4, 'f4')
    q = nn.Parameter(torch.from_numpy(root))
    m = module(array=p.detach().numpy()[1:], root=root, view=p.data[2:], own=np.zeros(4))
    s = Snapshot([m], but={restore.memory(p), restore.memory(q)})
    p.data += 1
    q.data += 1
    m.own += 1
    s.restore()
    assert p.sum() == 4 and q.sum() == 4 and m.own.sum() == 0


# --- tensors of every kind

def made_in_inference_mode(f=torch.ones):
    with torch.inference_mode(): return f(3)


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args, **kwargs): raise TypeError('it refuses every function')


def give_other_memory(t): t.data = torch.zeros(5, dtype=torch.float64)


def jagged(layout): return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


def dense(t):
    with torch._C.DisableTorchFunctionSubclass():
        t = t.detach()
        if t.is_quantized: t = t.dequantize()
        if t.is_nested: return [c.tolist() for c in t.unbind()]
        return (t.dtype, t.shape, t.to_dense().resolve_conj().double().tolist() if not t.is_complex() else t.tolist())


TENSORS = {
    'nan': (lambda: torch.full((3,), float('nan')), lambda t: t.fill_(0)),
    'minus zero': (lambda: torch.zeros(3), lambda t: t.neg_()),
    'bool': (lambda: torch.ones(3) > 0, lambda t: t.logical_not_()),
    'uint16': (lambda: torch.ones(3, dtype=torch.uint16), lambda t: t.fill_(2)),
    'complex': (lambda: torch.ones(3, dtype=torch.complex64).conj(), lambda t: t.mul_(2j)),
    'bf16': (lambda: torch.ones(3).bfloat16(), lambda t: t.mul_(2)),
    'negated': (lambda: (torch.ones(3, dtype=torch.complex64)*1j).conj().imag, lambda t: t.mul_(3)),
    'empty': (lambda: torch.ones(0, 3), lambda t: t.resize_(1, 3)),
    'expanded': (lambda: torch.ones(2, 1).expand(2, 3), lambda t: t[:, :1].mul_(2)),
    'scalar expanded': (lambda: torch.ones(()).expand(3), lambda t: t[:1].mul_(2)),
    'overlapping': (lambda: torch.ones(6).as_strided((3, 3), (1, 1)), lambda t: t[0].mul_(2)),
    'other memory': (lambda: torch.ones(3), give_other_memory),
    'expanded, other memory': (lambda: torch.ones(1).expand(3), give_other_memory),
    'quantized': (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
                  lambda t: t.copy_(torch.zeros(3))),
    'coo': (lambda: torch.eye(3).to_sparse(), lambda t: t.mul_(2)),
    'coo, more': (lambda: torch.eye(3).to_sparse(), lambda t: t.add_(torch.ones(3, 3).to_sparse())),
    'csr': (lambda: torch.eye(4).to_sparse_csr(), lambda t: t.values().mul_(2)),
    'bsc': (lambda: torch.eye(4).to_sparse_bsc((2, 2)), lambda t: t.values().mul_(2)),
    'nested': (lambda: jagged(torch.strided), lambda t: t.mul_(2)),
    'jagged': (lambda: jagged(torch.jagged), lambda t: t.values().mul_(2)),
    'inference': (made_in_inference_mode, lambda t: t.data.mul_(2)),
    'data': (lambda: torch.ones(3), lambda t: t.data.mul_(2)),
    'of a graph': (lambda: torch.ones(3, requires_grad=True)*2, lambda t: t.data.mul_(2)),
    'inference, expanded': (lambda: made_in_inference_mode(lambda n: torch.ones(1).expand(n)),
                            lambda t: t[:1].data.mul_(2))}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', TENSORS)
def test_tensors(kind):
    make, change = TENSORS[kind]
    t = make()
    was, (s, changed) = repr(dense(t)), written(module(t=t, log=[]))
    assert changed() == []
    change(t)
    assert changed() == ['t']
    s.restore()
    assert repr(dense(t)) == was and changed() == []


def test_a_tensor_subclass_that_refuses_every_function():
    t = torch.ones(3).as_subclass(Wrapped)
    s, changed = written(module(t=t))
    with torch._C.DisableTorchFunctionSubclass(): t.mul_(2)
    s.restore()
    assert dense(t)[2] == [1, 1, 1]


def test_tensors_that_hold_no_numbers_are_left_alone():
    m = module(meta=torch.ones(3, device='meta'), log=[])
    m.lazy, m.buffer = nn.UninitializedParameter(), nn.UninitializedBuffer()
    s, changed = written(m)
    m.log.append(1)
    m.buffer.materialize((2,))
    s.restore()
    assert m.log == [] and changed() == []
    Copies(m.parameters()).put_back()


def test_an_expanded_tensor_is_copied_once():
    s = Snapshot([module(t=torch.ones(1, 1, 8).expand(10_000, 10_000, 8))])
    assert [i.was.shape for i in s.items if hasattr(i, 'shape')] == [(1, 1, 8)]


def test_buffers_of_a_scripted_module():
    "They lie outside Python."
    m = nn.Sequential(nn.BatchNorm1d(3))
    try: scripted = torch.jit.script(m)
    except Exception: pytest.skip('torch.jit is gone')
    s = Snapshot(scripted.modules(), names=[n for n, _ in scripted.named_modules()])
    scripted(torch.randn(8, 3) + 5)
    assert scripted[0].running_mean.min() > 0
    s.restore()
    assert not scripted[0].running_mean.any() and scripted[0].num_batches_tracked == 0


# --- objects

def test_plain_objects_that_a_module_holds_are_opened():
    inner = Tracker(1, [torch.zeros(2)])
    m = module(tracker=Tracker(0, []), nested=SimpleNamespace(inner=inner), slotted=Slotted(0, []), sealed=Sealed(3),
               deep={'by': [Tracker(5, [])]})
    s, changed = written(m)
    m.tracker.n += 1
    m.tracker.counts.append(1)
    m.tracker.extra = 1
    inner.n += 1
    inner.counts[0].add_(1)
    m.slotted.n = 4
    m.slotted.counts.append(1)
    m.deep['by'][0].n = 6
    vars(m.sealed)['n'] = 4
    m.sealed.log.append(1)
    names = changed()
    assert {'tracker.n', 'tracker.extra', 'tracker.counts', 'nested.inner.n', 'slotted.n', 'slotted.counts',
            'sealed.n', 'sealed.log', "deep['by'][0].n"} <= set(names)
    s.restore()
    assert m.tracker == Tracker(0, []) and 'extra' not in vars(m.tracker) and m.slotted == Slotted(0, [])
    assert (m.sealed.n, m.sealed.log) == (3, [3])
    assert inner.n == 1 and not inner.counts[0].any() and m.deep['by'][0].n == 5 and changed() == []


def test_what_runs_threads_or_is_no_module_s_is_not_opened():
    import logging, queue, threading
    m = module(lock=threading.Lock(), queue=queue.Queue(), log=logging.getLogger('x'), f=test_tensors, cls=Tracker,
               other=[nn.Linear(2, 2)])
    s, changed = written(m)
    m.queue.put(1)
    Tracker.note = 1
    m.other[0].weight.data.zero_()
    s.restore()
    del Tracker.note
    assert m.queue.qsize() == 1 and not m.other[0].weight.any()
    holder = SimpleNamespace(tracker=Tracker(0, []))
    s = Snapshot([holder])
    holder.tracker.n += 1
    s.restore()
    assert holder.tracker.n == 1


def test_an_object_that_is_its_own_dict():
    class AttrDict(dict):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            object.__setattr__(self, '__dict__', self)
        __setattr__ = __setitem__ = no
    m = module(d=AttrDict(a=1))
    s, changed = written(m)
    dict.update(m.d, a=2, b=3)
    s.restore()
    assert dict(m.d) == {'a': 1} and changed() == []


def test_attributes_of_an_object_that_refuses_them():
    class Stiff(nn.Module):
        __setattr__ = __delattr__ = no
        def __getattribute__(self, name): raise RuntimeError(name)
    m = Stiff.__new__(Stiff)
    object.__setattr__(m, 'n', 1)
    s = Snapshot([m])
    d = object.__getattribute__(m, '__dict__')
    d.update(n=2, extra=3)
    s.restore()
    assert d == {'n': 1}


def test_cyclic_structures_end():
    a, b = [], {}
    a.append(b)
    b['a'] = a
    b['self'] = b
    o = SimpleNamespace(a=a)
    o.o = o
    s, changed = written(m := module(a=a, o=o))
    m.me = m
    a.append(1), b.update(x=1), vars(o).update(y=1)
    s.restore()
    assert len(a) == 1 and a[0] is b and list(b) == ['a', 'self'] and list(vars(o)) == ['a', 'o']
    assert 'me' not in vars(m) and changed() == []


def test_a_million_entries():
    "They are copied and compared as one, and not looked into."
    long, inner = [0]*1_000_000, [1]
    long[7] = inner
    s, changed = written(module(long=long))
    assert len(s.items) < 10
    long[5], long[-1] = 1, None
    inner.append(2)
    assert changed() == ['long']
    s.restore()
    assert long[5] == 0 and long[-1] == 0 and long[7] is inner and inner == [1, 2]


def test_a_wide_tree_is_bounded(monkeypatch):
    monkeypatch.setattr(restore, '_MOST_THINGS', 500)
    tree = [[[[] for _ in range(50)] for _ in range(50)] for _ in range(5)]
    assert len(Snapshot([module(tree=tree)]).items) <= 510


# --- no step stops another

def ten_of_a_kind():
    m = module(log=[], d={'a': 1}, s={1}, q=deque([1]), array=np.zeros(2), rng=random.Random(0),
               tensor=torch.zeros(2), n=0, tracker=Tracker(0, []))
    m.register_buffer('ema', torch.zeros(2))
    m.weight = nn.Parameter(torch.zeros(2))
    return m


def change_all(m):
    m.log.append(1)
    m.d.update(a=2)
    m.s.add(2)
    m.q.append(2)
    m.array += 1
    m.rng.random()
    m.tensor += 1
    m.n = 1
    m.tracker.n = 1
    m.tracker.counts.append(1)
    m.ema += 1
    m.weight.data += 1
    m.extra = 1


def state(m):
    return {'log': m.log[:], 'd': dict(m.d), 's': set(m.s), 'q': list(m.q), 'array': m.array.tolist(),
            'rng': m.rng.getstate(), 'tensor': m.tensor.tolist(), 'n': m.n,
            'tracker.n': m.tracker.n, 'tracker.counts': m.tracker.counts[:], 'ema': m.ema.tolist(),
            'weight': m.weight.tolist(), 'extra': hasattr(m, 'extra')}


def faulty(monkeypatch, fails):
    "Make the k-th write raise what `fails(k)` gives, if it gives anything."
    found, count = restore._repairs, [0]
    def with_faults(write):
        def f():
            k = count[0]
            count[0] += 1
            if (e := fails(k)) is not None: raise e
            write()
        return f
    monkeypatch.setattr(restore, '_repairs', lambda item: [(where, with_faults(write)) for where, write in found(item)])
    return count


ALL = 13


@settings(max_examples=40)
@given(st.sets(st.integers(0, ALL - 1), min_size=1))
def test_faults_at_any_steps_stop_no_others(which):
    m = ten_of_a_kind()
    was = state(m)
    items = [*Copies(m.parameters(), {id(m.weight): 'weight'}).items, *Snapshot([m], names=['']).items]
    change_all(m)
    now = state(m)
    assert all(was[k] != now[k] for k in was) and len(was) == ALL
    with pytest.MonkeyPatch.context() as patch:
        count = faulty(patch, lambda k: OSError(f'step {k}') if k in which else None)
        with pytest.raises(RestoreError) as e: put_back(items)
    assert count[0] == ALL
    names = {w for w, _ in e.value.failed}
    assert len(e.value.failed) == len(which) == len(names) and all(repr(n) in str(e.value) for n in names)
    assert sorted(str(f) for _, f in e.value.failed) == sorted(f'step {k}' for k in which)
    assert e.value.__cause__ is e.value.failed[0][1]
    assert {k: v for k, v in state(m).items()} == {k: now[k] if k in names else was[k] for k in was}
    put_back(items)
    assert state(m) == was


@pytest.mark.parametrize('step', range(ALL))
@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_an_interrupt_at_any_step_waits_until_all_is_done(step, error, monkeypatch):
    m = ten_of_a_kind()
    was = state(m)
    items = [*Copies(m.parameters()).items, *Snapshot([m]).items]
    change_all(m)
    faulty(monkeypatch, lambda k: error() if k == step else None)
    with pytest.raises(error): put_back(items)
    assert state(m) == was


@pytest.mark.parametrize('step', range(ALL))
def test_ctrl_c_at_any_step_waits_until_all_is_done(step, monkeypatch):
    "The signal itself; whoever handled it before does so again."
    m = ten_of_a_kind()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    was, handler = state(m), signal.getsignal(signal.SIGINT)
    items = Snapshot([m]).items + Copies(m.parameters()).items
    change_all(m)
    faulty(monkeypatch, lambda k: signal.raise_signal(signal.SIGINT) if k == step else None)
    with pytest.raises(KeyboardInterrupt): put_back(items)
    assert state(m) == was and signal.getsignal(signal.SIGINT) is handler


def test_an_exception_on_its_way_stays_the_one_raised(monkeypatch):
    m = ten_of_a_kind()
    items = Snapshot([m], names=['down_blocks.0']).items
    change_all(m)
    faulty(monkeypatch, lambda k: OSError('no') if k == 0 else None)
    first = ValueError('of the forward')
    put_back(items, beside=first)
    said = ''.join(getattr(first, '__notes__', [])) + str(first.__context__)
    assert "could not put back 'down_blocks.0.n': no (OSError)" in said


def test_without_notes_the_error_is_the_context(monkeypatch):
    class E(Exception):
        def __getattribute__(self, name):
            if name == 'add_note': raise AttributeError
            return super().__getattribute__(name)
    e, before = E('first'), KeyError('before')
    e.__context__ = before
    restore._note(e, error := RestoreError([('x', OSError())]))
    assert e.__context__ is error and error.__context__ is before


# --- whatever an attribute holds

PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
HOSTILE = st.one_of(PLAIN, st.builds(Unlike), st.builds(Sealed, st.integers(0, 9)),
                    st.builds(lambda: torch.zeros(2)), st.builds(lambda: np.zeros(2)), st.builds(lambda: np.array(0.)),
                    st.builds(lambda: torch.eye(2).to_sparse()), st.builds(lambda: random.Random(0)),
                    st.builds(lambda: MappingProxyType({'a': [1]})), st.builds(lambda: np.broadcast_to(1., (2, 2))))
KEYS = st.one_of(st.integers(0, 5), st.text(max_size=2))
VALUES = st.recursive(HOSTILE, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(StubbornList),
    st.lists(inner, max_size=3).map(tuple), st.lists(inner, max_size=3).map(StubbornDeque),
    st.dictionaries(KEYS, inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3).map(StubbornDict),
    st.dictionaries(KEYS, inner, max_size=3).map(stubborn_ordered),
    st.builds(Tracker, st.integers(), inner), st.builds(Slotted, st.integers(), inner)), max_leaves=8)


def walk(v, steps=5, seen=None):
    "All that `v` holds, as far down as is promised, with what each thing holds in a form that compares."
    seen = {} if seen is None else seen
    if id(v) in seen: return seen
    if isinstance(v, (dict, OrderedDict)): inner, form = list(v.values()), [(id(k), id(o)) for k, o in v.items()]
    elif isinstance(v, (list, tuple, deque)): inner, form = list(v), [id(o) for o in v]
    elif isinstance(v, torch.Tensor): inner, form = [], v.to_dense().tolist()
    elif isinstance(v, np.ndarray): inner, form = [], v.tolist()
    elif isinstance(v, random.Random): inner, form = [], v.getstate()
    elif isinstance(v, (Tracker, Sealed, Slotted)) and steps >= 2:
        inner = [v.n, v.counts] if not isinstance(v, Sealed) else [v.n, v.log]
        form = [id(o) for o in inner]
        steps -= 1
    else: return seen
    seen[id(v)] = v, form
    if steps > 0:
        for o in inner: walk(o, steps - 1, seen)
    return seen


def disturb(v):
    if isinstance(v, dict) and not isinstance(v, OrderedDict):
        dict.clear(v)
        dict.__setitem__(v, 'new', 1)
    elif isinstance(v, OrderedDict): OrderedDict.__setitem__(v, 'new', 1)
    elif isinstance(v, list): list.append(v, 0)
    elif isinstance(v, deque): deque.append(v, 0)
    elif isinstance(v, torch.Tensor): v.mul_(2) if v.is_sparse else v.add_(1)
    elif isinstance(v, np.ndarray) and v.flags.writeable: v += 1
    elif isinstance(v, random.Random): v.random()
    elif isinstance(v, Sealed): vars(v).update(n=-1, log=None)
    elif isinstance(v, Tracker): v.n, v.counts, v.more = -1, None, 1
    elif isinstance(v, Slotted): v.n, v.counts = -1, None


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from('abcd'), VALUES, min_size=1), st.booleans())
def test_whatever_a_module_holds(attributes, cyclic):
    if cyclic: attributes['cycle'] = [attributes]
    m = module(**attributes)
    s, changed = written(m)
    held = {}
    for v in attributes.values(): walk(v, 5, held)
    forms = {i: form for i, (_, form) in held.items()}
    s.restore()
    assert changed() == []
    for v, _ in held.values(): disturb(v)
    vars(m).pop('a', None)
    m.new = 1
    s.restore()
    assert list(sorted(k for k in vars(m) if k in (*attributes, 'new'))) == sorted(attributes)
    assert all(vars(m)[k] is v for k, v in attributes.items())
    now = {}
    for v in attributes.values(): walk(v, 5, now)
    for i, (v, _) in held.items(): assert now[i][1] == forms[i], type(v)
    assert changed() == []


@settings(max_examples=60)
@given(st.dictionaries(st.just('v'), VALUES))
def test_names_of_places_never_fail(attributes):
    s = survey([('m', module(**attributes))])
    assert all(isinstance(restore._name(i.where), str) for i in s)


def test_names():
    m = module(log=[{'x': [1]}], tracker=Tracker(0, []))
    m.register_buffer('mean', torch.zeros(1))
    names = {restore._name(i.where) for i in Snapshot([m], names=['block.0']).items}
    assert {'block.0.log', 'block.0.log[0]', "block.0.log[0]['x']", 'block.0.tracker.counts', 'block.0.mean'} <= names


GENERATORS = {'torch': lambda: torch.Generator().manual_seed(3), 'python': lambda: random.Random(3),
              'system': random.SystemRandom,
              'numpy, old': lambda: np.random.RandomState(3), 'numpy': lambda: np.random.default_rng(3),
              'numpy, twister': lambda: np.random.Generator(np.random.MT19937(3))}


def draw(g):
    if isinstance(g, torch.Generator): return torch.rand(1, generator=g).item()
    return float(g.random() if hasattr(g, 'random') else g.rand())


@pytest.mark.parametrize('kind', GENERATORS)
def test_generators(kind):
    m = module(g=GENERATORS[kind]())
    s, changed = written(m)
    assert changed() == []
    first = draw(m.g)
    s.restore()
    assert (draw(m.g) == first) == (kind != 'system') and changed() == ([] if kind == 'system' else ['g'])


@pytest.mark.parametrize('enabled', [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        survey([('model', nn.Sequential(nn.Linear(2, 2)))])
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
