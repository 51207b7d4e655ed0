"""What must stay as it was while the weights and biases of units change.

`Kept` takes a snapshot of the model before the first pass. `rewind` puts it back after each, all but the weights and
biases of the units. `put_back` puts back these, too."""
from __future__ import annotations

from typing import Any, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..keep import Snapshot, Weights, memory
from ..parallel import local
from ..units import Property, Ref, Unit, is_layer, is_plain

__all__ = ['Kept']

# Parameters of no more elements are compared after each pass, unless a layer trains them: a model may take their first
# values from data, or keep a memory in them.
_SMALL = 2**16


class Kept:
    "A model as it was, and the weights before the first plan was applied."
    def __init__(self,
        model: nn.Module,
        computed: Iterable[nn.Module] = ()  # A `weight` that a hook computes on these stays that of the last forward
    ):
        params = [p for p in model.parameters() if not is_lazy(p)]
        self.computed = list(computed)
        self.state = Snapshot(model.modules(), but={memory(local(p)) for p in params} - {0})
        self.weights = Weights()
        self.others = Weights()  # Parameters that the model may write to by itself
        self.others.keep(p for m in model.modules() for p in m._parameters.values() if _may_be_written(m, p))
        self.values: dict[Any, tuple[Property, Any]] = {}  # Behind properties

    def before_writing(self, units: Iterable[Unit]) -> None:
        "Copy what will be written to these units, unless it was copied before."
        refs = [r for u in units for r in u.refs]
        for r in refs:
            if isinstance(r, Property): self.values.setdefault(r.key, (r, r.read()))
        params = [r.param for r in refs if isinstance(r, Ref)]
        self.before_starting(params)

    def before_starting(self, params: list[Tensor]) -> None:
        "Copy parameters that get a start, unless they were copied before."
        # The model may have written to one already, or hold its memory in another parameter, too.
        at = {memory(local(p)) for p in params} - {0}
        same = [p for p, _ in self.others.of.values() if memory(local(p)) in at]
        for p in same: self.weights.of.setdefault(id(p), self.others.of[id(p)])
        self.others.forget([*same, *params])
        self.weights.keep(params)

    def put_back_params(self, params: list[Tensor]) -> None:
        "Put these parameters back."
        self.weights.put_back(params)

    def rewind(self) -> None:
        "Put back all but the weights and biases of units, so that the next pass begins as the first did."
        weights = [(m, vars(m)['weight']) for m in self.computed if 'weight' in vars(m)]
        now = [(r, r.read()) for r, _ in self.values.values()]  # attributes may overwrite them
        self.others.put_back()
        self.state.restore()
        for r, v in now: r.write(v)
        for m, w in weights: vars(m)['weight'] = w

    def finish(self) -> None:
        "Tell autograd, and all who look at a tensor's version, that the weights have been written."
        for p, was in self.weights.of.values():
            if not p.is_inference(): torch.autograd.graph.increment_version(p)

    def put_back(self) -> None:
        "Put back everything, weights first."
        self.weights.put_back()
        self.others.put_back()
        self.state.restore()
        for r, v in self.values.values(): r.write(v)
        torch.clear_autocast_cache()


def _may_be_written(m: nn.Module, p: Tensor | None) -> bool:
    """Whether `m` may write to its own parameter as it runs: an embedding to keep its norm, a small one to take its
    start from data."""
    if p is None or is_lazy(p) or p.is_meta: return False
    trains = p.requires_grad and is_layer(m) and is_plain(m)
    return p.numel() <= _SMALL and not trains or getattr(m, 'max_norm', None) is not None
