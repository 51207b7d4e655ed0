"What objects hold: attributes, collections, numbers and random generators. It is remembered, and put back."
from __future__ import annotations

import mmap
import pickle
import random
from collections import OrderedDict
from functools import lru_cache
from operator import is_
from typing import Any, Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..parallel import local
from .weights import copied, do_all, memory, write_back

__all__ = ['Snapshot']

_DEPTH,_MOST = 3,1000  # Collections inside collections are looked into so far down, and up to so many entries


class Snapshot:
    "What `objects` hold. Entries are compared by identity, numbers by their bits; what is the same is not written."
    def __init__(self,
        objects: Iterable[Any],
        but: set[int] = frozenset(),  # Addresses of `memory` that keeps what is written to it, as that of parameters
        tensors: bool = True  # Whether to copy the numbers of tensors and arrays
    ):
        self.but,self.tensors = but,tensors
        self.held: dict[int, tuple] = {}  # Of each thing, by its id: it, what it held, how to read and write it
        self.depths,self.empty = {},[]  # How far down was looked, by the id; empty collections, as most of a module's
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for o in objects:
                self._look(object.__getattribute__(o, '__dict__'), _DEPTH + 1)
                if issubclass(type(o), torch.jit.ScriptModule): self._look((*o._buffers.values(),), 1)  # Outside Python

    def restore(self) -> None:
        "Put back all that has changed. Raise the first error, if any, after the last."
        filled = [(v, [], lambda v: v, lambda v, was: v.clear()) for v in self.empty if v]
        do_all(_restore, [*filled, *self.held.values()])

    def _look(self, v: Any, depth: int) -> None:
        base,read,write = _kind(type(v))
        if self.depths.get(id(v), -1) >= depth or base in _NUMBERS and self._left_alone(v): return
        try: was = read(v)
        except NotImplementedError: return  # A generator without a state
        self.held[id(v)],self.depths[id(v)] = (v, was, read, write),depth
        if base not in _COLLECTIONS or len(was) > _MOST: return
        for e in was.values() if type(was) is dict else was:
            if type(e) in _COLLECTIONS and not e: self.empty.append(e)
            elif (kind := _kind(type(e))) and (depth > 1 or kind[0] not in _COLLECTIONS): self._look(e, depth - 1)

    def _left_alone(self, v: Tensor | np.ndarray) -> bool:
        if not self.tensors or isinstance(v, nn.Parameter): return True
        if isinstance(v, Tensor): return is_lazy(v) or v.is_meta or memory(v) in self.but
        root = v
        while isinstance(root, np.ndarray) and root.base is not None: root = root.base
        return not v.flags.writeable or isinstance(root, (mmap.mmap, Tensor))  # A tensor is kept by whoever holds it


def _restore(v: Any, was: Any, read: Callable, write: Callable) -> None:
    if isinstance(was, Tensor): return write(v, was)
    now,then = read(v),was
    if isinstance(was, dict): now,then = [*now, *now.values()],[*was, *was.values()]
    if isinstance(then, list): same = len(now) == len(then) and all(map(is_, now, then))
    else: same = now.tobytes() == was.tobytes() if isinstance(was, np.ndarray) else now == was
    if not same: write(v, was)


def _write_dict(d: dict, was: dict) -> None:
    base = OrderedDict if issubclass(type(d), OrderedDict) else dict
    for k in [k for k in base.keys(d) if k not in was]: base.__delitem__(d, k)
    if not all(map(is_, base.keys(d), was)): base.clear(d)  # The order counts
    for k, v in was.items(): base.__setitem__(d, k, v)


_NUMBERS = {  # Of a base class: functions that read and write
    Tensor: (lambda t: copied(local(t)), lambda t, was: write_back(local(t), was)),
    np.ndarray: (lambda a: np.array(a, order='K'), lambda a, was: a.view(np.ndarray).__setitem__(..., was))}
_COLLECTIONS = {  # They are looked into; a subclass that refuses writes is written all the same
    OrderedDict: (lambda d: dict(OrderedDict.items(d)), _write_dict), dict: (dict.copy, _write_dict),
    list: (lambda v: [*list.__iter__(v)], lambda v, was: list.__setitem__(v, slice(None), was)),
    set: (lambda v: [*set.__iter__(v)], lambda v, was: set.clear(v) or set.update(v, was)),
    tuple: (lambda v: [*tuple.__iter__(v)], None)}
_KINDS = _NUMBERS | _COLLECTIONS | {
    torch.Generator: (lambda g: g.get_state().numpy(), lambda g, was: g.set_state(torch.from_numpy(was))),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (lambda g: pickle.dumps(g.get_state()), lambda g, was: g.set_state(pickle.loads(was))),
    np.random.Generator: (lambda g: pickle.dumps(g.bit_generator.state),
                          lambda g, was: setattr(g.bit_generator, 'state', pickle.loads(was)))}


@lru_cache(10_000)
def _kind(t: type) -> tuple | None:  # The base class of `t` among these, and its functions
    return next(((c, *f) for c, f in _KINDS.items() if issubclass(t, c)), None)
