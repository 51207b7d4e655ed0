"What a pass must leave as it was: modes, buffers, hidden state; and, when it fails, the weights."
from __future__ import annotations

import random
from contextlib import contextmanager
from collections import deque
from copy import copy, deepcopy
from typing import Any, Iterable, Iterator

import numpy as np

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from .units import Unit

__all__ = ['Copies', 'Snapshot', 'memory', 'preserved', 'train_without_dropout']

_HOOKS = {k for k in vars(nn.Module()) if 'hook' in k}  # attached and removed by whoever registers them
_MOST_ITEMS = 1000  # A longer list holds data, not state
_PLAIN = {type(None), bool, int, float, str}  # Most attributes of modules: not worth a look
_SMALL = 2**16  # Parameters of no more elements are copied without asking what they are for


class _Contents:
    "What one value held, and how to make it hold that again: tensors, collections and generators; all else is taken as immutable."
    def __init__(self,
        value: Any,
        but: set[int],  # Addresses of memory that is to keep what is written to it: an attribute may be a view of a parameter
        tensors: bool,  # Whether to copy tensors, or take them as immutable too
        depth: int = 3  # How far down nested collections are followed
    ):
        self.value,self.copy,self.inner = value,None,[]
        if isinstance(value, Tensor):
            if tensors and not is_lazy(value) and memory(value) not in but: self.copy = value.detach().clone()
        elif isinstance(value, (list, dict, set, deque)) or tensors and isinstance(value, np.ndarray): self.copy = copy(value)
        elif isinstance(value, _GENERATOR_TYPES): self.copy = deepcopy(_generator(value)[0](value))
        if depth and isinstance(value, (list, tuple, dict)) and len(value) <= _MOST_ITEMS:
            self.inner = _contents(value.values() if isinstance(value, dict) else value, but, tensors, depth - 1)

    def restore(self) -> None:
        v = self.value
        if self.copy is not None:
            if isinstance(v, Tensor): _write(v.detach(), self.copy)
            elif isinstance(v, _GENERATOR_TYPES): _generator(v)[1](v, self.copy)
            elif isinstance(v, (list, np.ndarray)): v[:] = self.copy
            elif isinstance(v, deque): v.clear(); v.extend(self.copy)
            else: v.clear(); v.update(self.copy)
        for c in self.inner: c.restore()


def _contents(values: Iterable[Any], but: set[int], tensors: bool, depth: int = 3) -> list[_Contents]:
    "`_Contents` of those of `values` that hold anything which can be put back."
    held = (_Contents(v, but, tensors, depth) for v in values if not _is_plain(v) and not isinstance(v, nn.Module))
    return [c for c in held if c.copy is not None or c.inner]


def _is_plain(v: Any) -> bool: return type(v) in _PLAIN or type(v) is tuple and all(type(o) in _PLAIN for o in v)


def memory(t: Tensor) -> int:
    "Address of the memory that a tensor is a view of (0 if it is empty), or of the tensor itself if it is sparse."
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else id(t)


def _write(t: Tensor, was: Tensor) -> None:
    "Make `t` hold what it held. An expanded tensor cannot be written as a whole, but was not written by others either."
    if t.layout != torch.strided or not torch.equal(t, was): t.data.copy_(was)


# How the state of each kind of generator is had, and set.
_GENERATORS = {torch.Generator: (torch.Generator.get_state, torch.Generator.set_state), random.Random: (random.Random.getstate, random.Random.setstate),
               np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
               np.random.Generator: (lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, 'state', state))}
_GENERATOR_TYPES = tuple(_GENERATORS)


def _generator(v: Any) -> tuple: return next(f for c, f in _GENERATORS.items() if isinstance(v, c))


class Snapshot:
    "The attributes of some objects, with what their collections and generators held, and (of modules, say) their tensors."
    def __init__(self,
        objects: Iterable[Any],
        but: set[int] = frozenset(),  # Addresses of memory that is to keep what is written to it
        tensors: bool = True  # Whether to copy tensors, or only to remember which they were
    ):
        self.of = [(o, attrs := {k: v for k, v in vars(o).items() if k not in _HOOKS}, _contents(attrs.values(), but, tensors)) for o in objects]

    @torch.no_grad()
    def restore(self) -> None:
        for o, attrs, contents in self.of:
            now = vars(o)
            for k in [k for k in now if k not in attrs and k not in _HOOKS]: del now[k]
            now.update(attrs)
            for c in contents: c.restore()


class Copies:
    """Copies of parameters.

    Those on the CPU lie in one array of numpy's, which comes in huge pages where the system has them. As tensors of their own
    they take the place of memory that the model is used to run in, and page faults cost its passes more than the copy."""
    def __init__(self, params: Iterable[nn.Parameter]):
        params = [p for p in params if not is_lazy(p)]
        values = [p.detach() for p in params]
        sizes = [-(-v.nbytes//64)*64 if _is_plain_cpu(v) else 0 for v in values]  # whole cache lines
        rooms = torch.from_numpy(np.empty(sum(sizes), np.uint8)).split(sizes)
        self.of = [(p, r[:v.nbytes].view(v.dtype).as_strided(v.shape, v.stride()).copy_(v) if len(r) else v.clone())
                   for p, v, r in zip(params, values, rooms)]

    @torch.no_grad()
    def put_back(self) -> None:
        for p, was in self.of: _write(p, was)


def _is_plain_cpu(t: Tensor) -> bool:
    "Whether `t` is a tensor of floats on the CPU whose elements lie side by side in memory, in whatever order."
    return (type(t) is Tensor and t.device.type == 'cpu' and t.layout == torch.strided and t.is_floating_point()
            and sum((n - 1)*s for n, s in zip(t.shape, t.stride())) == t.numel() - 1 and all(s for n, s in zip(t.shape, t.stride()) if n > 1))


@contextmanager
def preserved(
    model: nn.Module,
    units: list[Unit]  # Whose weights and biases may change
) -> Iterator[None]:
    """Leave everything but the units' weights and biases as it was: module modes, buffers, hidden state and other attributes,
    and the gradients, to which a model may add by a `backward` of its own.

    If anything is raised inside, Ctrl-C included, the weights and biases are put back too."""
    snapshot = Snapshot(model.modules(), but={memory(p) for p in model.parameters() if not is_lazy(p)} - {0})
    owned = {p for u in units for m in {u.module, u.layer} for p in m.parameters(recurse=m is u.layer)}
    weights,others = Copies(owned),Copies(p for m in model.modules() for p in m._parameters.values() if p is not None and p not in owned and _may_be_written(m, p))
    def values(): return [(k, k.copy()) for u in units for k in u.knobs if k.has_setter]  # what stands behind properties
    was = values()
    grads = [(p, p.grad) for p in model.parameters() if p.is_leaf]
    def put_back(values):
        for p, g in grads: p.grad = g
        snapshot.restore()
        others.put_back()
        for k, v in values: k.assign(v)  # it may live in an attribute that was just restored
    try:
        for p, _ in grads: p.grad = None
        yield
    except BaseException:
        put_back(was)
        weights.put_back()
        raise
    # A weight that a hook computes before each forward (`weight_norm` of old, pruning) is that of the last.
    computed = [(u.layer, vars(u.layer)['weight']) for u in units if not u.left_alone and 'weight' in vars(u.layer)]
    put_back(values())
    for layer, w in computed: vars(layer)['weight'] = w


def _may_be_written(m: nn.Module, p: nn.Parameter) -> bool:
    "Whether `m` may write to its own parameter as it runs: an embedding to keep its norm, a small one to take its start from data."
    return getattr(m, 'max_norm', None) is not None or not is_lazy(p) and p.numel() <= _SMALL


def train_without_dropout(model: nn.Module) -> None:
    "Put `model` in the mode it trains in, batch statistics and all, less the randomness of dropout. `preserved` undoes it."
    model.train()
    for m in model.modules():
        if isinstance(m, _DropoutNd): m.p = 0.  # some read `p` rather than call the module
        elif isinstance(m, (nn.MultiheadAttention, nn.RNNBase)): m.dropout = 0.
        elif any(s in type(m).__name__ for s in ('Drop', 'Stochastic')): m.training = False  # DropPath, StochasticDepth, WeightDropout, ...
