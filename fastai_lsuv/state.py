"What a pass must leave as it was: modes, buffers, hidden state; and, when it fails, the weights."
from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from .units import Unit

__all__ = ['preserved', 'train_without_dropout']

_HOOKS = {k for k in vars(nn.Module()) if 'hook' in k}  # attached and removed by whoever registers them


class _Contents:
    "What one value held, and how to make it hold that again: tensors and collections are copied, all else is taken as immutable."
    def __init__(self,
        value: Any,
        weights: set[int]  # Addresses of the parameters' memory: an attribute that is a view of a parameter is no state of its own
    ):
        self.value,self.copy = value,None
        if isinstance(value, Tensor):
            if not is_lazy(value) and value.untyped_storage().data_ptr() not in weights: self.copy = value.detach().clone()
        elif isinstance(value, (list, dict, set)): self.copy = copy(value)

    def restore(self) -> Any:
        v = self.value
        if self.copy is None: return v
        if isinstance(v, Tensor): v.detach().copy_(self.copy)
        elif isinstance(v, list): v[:] = self.copy
        else: v.clear(); v.update(self.copy)
        return v


class _Snapshot:
    "Attributes of the modules of a model, with the contents of their buffers and collections."
    def __init__(self, model: nn.Module):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters() if not is_lazy(p)} - {0}
        self.of = [(m, {k: _Contents(v, weights) for k, v in vars(m).items() if k not in _HOOKS},
                    {k: _Contents(b, weights) for k, b in m._buffers.items()}) for m in model.modules()]

    @torch.no_grad()
    def restore(self) -> None:
        for m, attrs, buffers in self.of:
            for k in [k for k in vars(m) if k not in attrs and k not in _HOOKS]: del vars(m)[k]
            for k, c in attrs.items(): vars(m)[k] = c.restore()
            for c in buffers.values(): c.restore()


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
    snapshot,weights = _Snapshot(model),_Weights(units)
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
