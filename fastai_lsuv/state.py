"What a pass must leave as it was: modes, buffers, hidden state; and, when it fails, the weights."
from __future__ import annotations

import random
from contextlib import contextmanager
from copy import copy
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from .units import Unit

__all__ = ['Snapshot', 'preserved', 'train_without_dropout']

_HOOKS = {k for k in vars(nn.Module()) if 'hook' in k}  # attached and removed by whoever registers them
_MOST_ITEMS = 1000  # A longer list holds data, not state


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
            if tensors and not is_lazy(value) and value.untyped_storage().data_ptr() not in but: self.copy = value.detach().clone()
        elif isinstance(value, (torch.Generator, random.Random)): self.copy = _state_of(value)
        elif isinstance(value, (list, dict, set)): self.copy = copy(value)
        if depth and isinstance(value, (list, tuple, dict)) and len(value) <= _MOST_ITEMS:
            inner = (_Contents(v, but, tensors, depth - 1) for v in (value.values() if isinstance(value, dict) else value))
            self.inner = [c for c in inner if c.copy is not None or c.inner]

    def restore(self) -> Any:
        v = self.value
        if self.copy is not None:
            if isinstance(v, Tensor): v.detach().copy_(self.copy)
            elif isinstance(v, torch.Generator): v.set_state(self.copy)
            elif isinstance(v, random.Random): v.setstate(self.copy)
            elif isinstance(v, list): v[:] = self.copy
            else: v.clear(); v.update(self.copy)
        for c in self.inner: c.restore()
        return v


def _state_of(generator: torch.Generator | random.Random) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.getstate()


class Snapshot:
    "The attributes of some objects, with what their collections and generators held, and (of modules, say) their tensors."
    def __init__(self,
        objects: Iterable[Any],
        but: set[int] = frozenset(),  # Addresses of memory that is to keep what is written to it
        tensors: bool = True  # Whether to copy tensors, or only to remember which they were
    ):
        self.of = [(o, {k: _Contents(v, but, tensors) for k, v in vars(o).items() if k not in _HOOKS}) for o in objects]

    @torch.no_grad()
    def restore(self) -> None:
        for o, attrs in self.of:
            now = vars(o)
            for k in [k for k in now if k not in attrs and k not in _HOOKS]: del now[k]
            for k, c in attrs.items(): now[k] = c.restore()


class _Weights:
    "Copies of what units own: every parameter of their layers, and what stands behind their properties."
    def __init__(self, units: list[Unit]):
        self.of = {u: ([(p, p.detach().clone()) for m in {u.module, u.layer} for p in m.parameters(recurse=m is u.layer) if not is_lazy(p)],
                       [(k, k.copy()) for k in u.knobs if k.has_setter]) for u in units}

    @torch.no_grad()
    def put_back(self, units: Iterable[Unit] | None = None) -> None:
        for u in (self.of if units is None else units):
            params,knobs = self.of[u]
            for p, was in params: p.copy_(was)
            for k, was in knobs: k.assign(was)


@contextmanager
def preserved(
    model: nn.Module,
    units: list[Unit]  # Whose weights and biases may change
) -> Iterator[Callable]:  # A function that puts back the weights and biases of the units it is given
    """Leave everything but the units' weights and biases as it was: module modes, buffers, hidden state and other attributes.

    If anything is raised inside, Ctrl-C included, the weights and biases are put back too."""
    params = {p.untyped_storage().data_ptr() for p in model.parameters() if not is_lazy(p)} - {0}
    snapshot,weights = Snapshot(model.modules(), but=params),_Weights(units)
    try: yield weights.put_back
    except BaseException:
        snapshot.restore()
        weights.put_back()
        raise
    final = [(k, k.copy()) for u in units for k in u.knobs if k.has_setter]
    snapshot.restore()
    for k, value in final: k.assign(value)  # its value may live in an attribute that was just restored


def train_without_dropout(model: nn.Module) -> None:
    "Put `model` in the mode it trains in, batch statistics and all, less the randomness of dropout. `preserved` undoes it."
    model.train()
    for m in model.modules():
        if isinstance(m, _DropoutNd): m.p = 0.  # some read `p` rather than call the module
        elif isinstance(m, (nn.MultiheadAttention, nn.RNNBase)): m.dropout = 0.
        elif any(s in type(m).__name__ for s in ('Drop', 'Stochastic')): m.training = False  # DropPath, StochasticDepth, WeightDropout, ...
