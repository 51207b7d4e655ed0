"""Which parameters the rows of a report speak for. Each weight of two or more dimensions is in one or in `outside`."""
from __future__ import annotations

from typing import Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from ..observe.discovery import Discovery, OperationUnit
from .selection import RECURRENT
from .units import Unit
from .weights import made_of

__all__ = ['Coverage']


def _parameters(u: Unit) -> list[nn.Parameter]:
    "The parameters that a unit's output is made with."
    if isinstance(u, OperationUnit): return u.parameters
    held = made_of(u.layer) if u.layer is not None else []
    return [*held, *(r.value for r in u.refs if isinstance(r.value, nn.Parameter))]


class Coverage:
    "The parameters that each unit speaks for, and those of two or more dimensions that no unit speaks for."
    def __init__(self,
        model: nn.Module,
        units: Iterable[Unit],
        discovery: Discovery,
        selected: bool  # Whether `modules` selects some units, and not all
    ):
        named = [(f'{n}.{k}' if n else k, m, p) for n, m in model.named_modules() for k, p in m._parameters.items()
                 if p is not None and not is_lazy(p)]
        self.names = {id(p): n for n, _, p in reversed(named)}  # a tied parameter goes by its first name
        self.of_unit = {u: _parameters(u) for u in units}
        matrices = [(n, p) for n, _, p in named if p.dim() > 1 and self.names[id(p)] == n]
        spoken_for: dict[int, int] = {}  # Elements of each parameter
        for u, params in self.of_unit.items():
            for p in params:
                part = u.weight.view.count if isinstance(u, OperationUnit) and p is u.weight.value else p.numel()
                spoken_for[id(p)] = min(p.numel(), spoken_for.get(id(p), 0) + part)
        total,held = sum(p.numel() for _, p in matrices),sum(spoken_for.get(id(p), 0) for _, p in matrices)
        self.share = held/total if total else 1.
        holders = {id(p): m for _, m, p in named}
        self.outside = {n: _why(p, holders[id(p)], discovery, selected) for n, p in matrices if id(p) not in spoken_for}

    def weights_of(self, u: Unit) -> tuple[str, ...]:
        "The names of the parameters that a unit speaks for, its weight first."
        return tuple(dict.fromkeys(self.names[id(p)] for p in self.of_unit[u] if id(p) in self.names))


def _why(p: nn.Parameter, holder: nn.Module, discovery: Discovery, selected: bool) -> str:
    "A key of `rows.OUTSIDE`."
    if isinstance(holder, (nn.Embedding, nn.EmbeddingBag)): return 'embedding'
    if isinstance(holder, RECURRENT): return 'recurrent'
    source = discovery.sources.by_id.get(id(p))
    if id(p) in discovery.declined or source is None and selected: return 'not selected'
    if source is not None and id(p) not in discovery.taken: return 'not called'
    if p.numel() == max(p.shape): return 'vector'
    return 'embedding' if source is not None and 'embed' in source.attribute else 'not linear'
