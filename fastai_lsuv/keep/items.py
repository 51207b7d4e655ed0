"""What one thing holds, and how it is made to hold that again.

An `Item` remembers one thing: the attributes of an object, a collection, an array, a tensor or a random generator.
Collections are compared by the identity of their entries, arrays and tensors by their bits, so no `__eq__` of unknown
objects is called.

Things are read and written with the methods of the built-in base class. A subclass that refuses writes, or counts
them, is put back all the same. `repairs` gives what has changed: where it is, and the function that writes it. What
has not changed is not written."""
from __future__ import annotations

import operator
import pickle
import random
from collections import OrderedDict, deque
from functools import partial
from types import MappingProxyType, MemberDescriptorType
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ['ArrayItem', 'Attributes', 'FrozenSetItem', 'HOOKS', 'ITEMS', 'Item', 'ProxyItem', 'Slots', 'TensorItem',
           'TupleItem', 'memory', 'n_bytes', 'same_tensor']

HOOKS = {k for k in vars(nn.Module()) if 'hook' in k}  # They belong to whoever registers the hooks

_MOST_ENTRIES = 1000  # A longer collection is copied and compared as a whole; its entries are not looked into
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes an element takes
_MISSING = object()


class Item:
    "One thing, and what it held. A subclass says how that is read, compared and written."
    __slots__ = 'of', 'was', 'where'

    def __init__(self,
        of: Any,  # The thing
        where: Any,  # Its place: a name, or a tuple (place of its holder, key, whether the key is an attribute)
        was: Any = None  # What it holds, if the caller has a copy already
    ):
        self.of = of
        self.where = where
        self.was = self.read() if was is None else was

    def read(self) -> Any: raise NotImplementedError
    def same(self) -> bool: raise NotImplementedError
    def write(self) -> None: raise NotImplementedError

    def entries(self) -> Iterable[tuple[Any, Any]]:
        "The keys and values inside, which may hold something too."
        return ()

    def repairs(self) -> Iterator[tuple[Any, Callable[[], None]]]:
        "What is to be written where `same` does not hold: places, and the functions that write there."
        yield self.where, self.write


class Attributes(Item):
    "The `__dict__` of an object. Each attribute is put back by itself; the hooks of a module are left to their owners."
    __slots__ = ()

    def read(self) -> dict: return dict.copy(_dict_of(self.of))
    def same(self) -> bool: return _same_entries(_dict_of(self.of), self.was)
    def entries(self) -> Iterable[tuple[str, Any]]: return self.was.items()

    def repairs(self) -> Iterator[tuple[Any, Callable[[], None]]]:
        now = self.read()
        skip = HOOKS if issubclass(type(self.of), nn.Module) else ()
        for k in [*self.was, *(k for k in now if k not in self.was)]:
            v = self.was.get(k, _MISSING)
            if now.get(k, _MISSING) is v or k in skip: continue
            yield (self.where, k, True), partial(self.put, k, v)

    def put(self, k: str, v: Any) -> None:
        "Write or delete one attribute."
        if v is _MISSING: dict.pop(_dict_of(self.of), k, None)
        else: dict.__setitem__(_dict_of(self.of), k, v)


def _dict_of(o: Any) -> dict: return object.__getattribute__(o, '__dict__')


class Slots(Item):
    "The attributes of an object that lie in slots."
    __slots__ = ()

    def read(self) -> dict: return {d: _slot(d, self.of) for d in _slots(type(self.of))}
    def same(self) -> bool: return _same_entries(self.read(), self.was)

    def entries(self) -> Iterable[tuple[str, Any]]:
        return [(d.__name__, v) for d, v in self.was.items() if v is not _MISSING]

    def repairs(self) -> Iterator[tuple[Any, Callable[[], None]]]:
        for d, v in self.was.items():
            if _slot(d, self.of) is not v: yield (self.where, d.__name__, True), partial(self.put, d, v)

    def put(self, d: MemberDescriptorType, v: Any) -> None:
        if v is _MISSING: d.__delete__(self.of)
        else: d.__set__(self.of, v)


def _slots(t: type) -> list[MemberDescriptorType]:
    return [d for c in t.__mro__ if '__slots__' in vars(c) for d in vars(c).values() if type(d) is MemberDescriptorType]


def _slot(d: MemberDescriptorType, o: Any) -> Any:
    try: return d.__get__(o)
    except AttributeError: return _MISSING


class DictItem(Item):
    "A `dict`; its order counts."
    __slots__ = ()

    def read(self) -> dict: return dict.copy(self.of)
    def same(self) -> bool: return _same_entries(self.of, self.was)
    def entries(self) -> Iterable[tuple[Any, Any]]: return self.was.items() if len(self.was) <= _MOST_ENTRIES else ()

    def write(self) -> None:
        dict.clear(self.of)
        dict.update(self.of, self.was)


def _same_entries(now: dict, was: dict) -> bool:
    "Whether the keys and values are the same objects, in the same order."
    if dict.__len__(now) != len(was): return False
    return not was or (all(map(operator.is_, dict.__iter__(now), was))
                       and all(map(operator.is_, dict.values(now), was.values())))


class OrderedDictItem(DictItem):
    "An `OrderedDict`, which keeps its order beside the `dict` that it is."
    __slots__ = ()

    def read(self) -> dict: return dict(OrderedDict.items(self.of))

    def same(self) -> bool:
        now = self.read()
        return len(now) == dict.__len__(self.of) and _same_entries(now, self.was)

    def write(self) -> None:
        OrderedDict.clear(self.of)
        for k, v in self.was.items(): OrderedDict.__setitem__(self.of, k, v)


class ListItem(Item):
    "A `list`."
    __slots__ = ()
    base: type = list  # Whose methods read it

    def read(self) -> list: return list(self.base.__iter__(self.of))
    def entries(self) -> Iterable[tuple[int, Any]]: return enumerate(self.was) if len(self.was) <= _MOST_ENTRIES else ()
    def write(self) -> None: list.__setitem__(self.of, slice(None), self.was)

    def same(self) -> bool:
        if self.base.__len__(self.of) != len(self.was): return False
        return all(map(operator.is_, self.base.__iter__(self.of), self.was))


class DequeItem(ListItem):
    "A `deque`."
    __slots__ = ()
    base = deque

    def write(self) -> None:
        deque.clear(self.of)
        deque.extend(self.of, self.was)


class SetItem(ListItem):
    "A `set`; its order does not count."
    __slots__ = ()
    base = set

    def same(self) -> bool:
        if set.__len__(self.of) != len(self.was): return False
        return not self.was or set(map(id, set.__iter__(self.of))) == set(map(id, self.was))

    def write(self) -> None:
        set.clear(self.of)
        set.update(self.of, self.was)


class TupleItem(ListItem):
    "A `tuple`. It cannot change, but what it holds can."
    __slots__ = ()
    base = tuple

    def same(self) -> bool: return True


class FrozenSetItem(TupleItem):
    "A `frozenset`, likewise."
    __slots__ = ()
    base = frozenset


class ProxyItem(TupleItem):
    "A `mappingproxy`, likewise: whoever owns the mapping may write it."
    __slots__ = ()

    def read(self) -> list: return list(self.of.values())


class ArrayItem(Item):
    "A numpy array, compared by its bytes; one of objects is so compared by their identity."
    __slots__ = ()

    @property
    def array(self) -> np.ndarray: return np.ndarray.view(self.of, np.ndarray)
    def read(self) -> np.ndarray: return self.array.copy(order='K')
    def write(self) -> None: self.array[...] = self.was

    def entries(self) -> Iterable[tuple[int, Any]]:
        return enumerate(self.was.ravel()) if self.was.dtype == object and self.was.size <= _MOST_ENTRIES else ()

    def same(self) -> bool:
        now,was = self.array,self.was
        return now.dtype == was.dtype and now.shape == was.shape and now.tobytes() == was.tobytes()


class GeneratorItem(Item):
    "A random generator; its state is kept as bytes."
    __slots__ = ()
    functions = {  # which get and set the state
        torch.Generator: (lambda g: g.get_state().numpy(), lambda g, state: g.set_state(torch.from_numpy(state))),
        random.Random: (random.Random.getstate, random.Random.setstate),
        np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
        np.random.Generator: (lambda g: g.bit_generator.state,
                              lambda g, state: setattr(g.bit_generator, 'state', state))}

    def _functions(self) -> tuple: return next(f for c, f in self.functions.items() if isinstance(self.of, c))
    def read(self) -> bytes: return pickle.dumps(self._functions()[0](self.of))
    def same(self) -> bool: return self.read() == self.was
    def write(self) -> None: self._functions()[1](self.of, pickle.loads(self.was))


class TensorItem(Item):
    """A tensor, compared by its bits.

    It is written unseen by autograd. An expanded tensor is copied once, not once for each place where its memory
    shows. A tensor that was given other memory, of another shape or type, is given memory as it had."""
    __slots__ = 'shape',

    def __init__(self, of: Tensor, where: Any, was: Tensor | None = None):
        self.shape = of.shape if _is_plain(of) else None
        super().__init__(of, where, was)

    def read(self) -> Tensor: return Tensor.clone(self.of.detach() if self.shape is None else _once(self.of))

    def same(self) -> bool:
        if self.shape is not None: return self.of.shape == self.shape and same_tensor(_once(self.of), self.was)
        now,was = _parts(self.of),_parts(self.was)
        return len(now) == len(was) and all(map(same_tensor, now, was))

    def write(self) -> None:
        now,was = _parts(self.of),_parts(self.was)
        if (self.shape is None or self.of.shape == self.shape) and len(now) == len(was) and all(map(_alike, now, was)):
            for to, of in zip(now, was): to.data.copy_(of)
        else:
            self.of.data = self.was.clone() if self.shape is None else self.was.clone().expand(self.shape)
            if not self.same(): raise RuntimeError(f"a tensor of layout {self.of.layout} takes no other memory")


def _is_plain(t: Tensor) -> bool:
    "Whether `t` is one piece of memory seen through strides."
    if t.layout != torch.strided or t.is_nested: return False
    return type(t) in (Tensor, nn.Parameter) or not is_traceable_wrapper_subclass(t)


def _once(t: Tensor) -> Tensor:
    "A view of plain memory in which each element shows once: an expanded dimension is of size 1."
    t,strides = Tensor.detach(t),t.stride()
    return t[tuple(slice(1 if s == 0 else None) for s in strides)] if 0 in strides else t


def _parts(t: Tensor) -> list[Tensor]:
    "The tensors in plain memory that hold what `t` holds, each of their elements once."
    if _is_plain(t): return [_once(t)]
    if is_traceable_wrapper_subclass(t):
        inner = (getattr(t, name) for name in t.__tensor_flatten__()[0])
        return [p for i in inner if isinstance(i, Tensor) for p in _parts(i)]  # a `DTensor` names its mesh, too
    t = t.detach()
    if t.is_nested: return [t.values(), t._nested_tensor_size()]
    if t.layout == torch.sparse_coo: return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr): return [t.crow_indices(), t.col_indices(), t.values()]
    return [t.ccol_indices(), t.row_indices(), t.values()]


def n_bytes(t: Tensor) -> int:
    "Memory that a copy of `t` takes."
    return sum(p.numel()*p.element_size() for p in _parts(t))


def _alike(a: Tensor, b: Tensor) -> bool: return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def same_tensor(a: Tensor, b: Tensor) -> bool:
    "Whether two tensors in plain memory hold the same bits: a NaN is equal to itself, and 0. is not -0."
    if not _alike(a, b): return False
    if a.is_quantized: return torch.equal(a, b)
    if a.is_complex(): a,b = (torch.view_as_real(t.resolve_conj()) for t in (a, b))
    if a.is_neg(): a = a.resolve_neg()
    if a.dtype != (bits := _INTS[a.element_size()]): a,b = a.view(bits),b.view(bits)
    return torch.equal(a, b)


def memory(t: Tensor) -> int:
    """Address of the memory that a tensor is a view of (0 if it is empty), or of the tensor itself if it has none of
    its own."""
    if t.layout != torch.strided: return id(t)
    try: return t.untyped_storage().data_ptr()
    except RuntimeError: return id(t)


# How each kind of thing is remembered; the first base class counts.
ITEMS = {Tensor: TensorItem, np.ndarray: ArrayItem, OrderedDict: OrderedDictItem, dict: DictItem, list: ListItem,
         set: SetItem, deque: DequeItem, tuple: TupleItem, frozenset: FrozenSetItem, MappingProxyType: ProxyItem,
         **dict.fromkeys(GeneratorItem.functions, GeneratorItem)}
