"""Which parameters the rows of a report speak for: no weight of two or more dimensions is in neither a row nor
`outside`.

`weights_of` names the parameters of a unit. `Coverage` tells what is outside of all units, why, and how much it is."""
from __future__ import annotations

from typing import Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from .discovery import Discovery, OperationUnit
from .selection import RECURRENT
from .units import Unit
from .weights import made_of

__all__ = ['Coverage', 'weights_of']


def _parameters(u: Unit) -> list[nn.Parameter]:
    "The parameters that a unit's output is made with."
    if isinstance(u, OperationUnit): return u.parameters
    held = made_of(u.layer) if u.layer is not None else []
    return [*held, *(r.value for r in u.refs if isinstance(r.value, nn.Parameter))]


def weights_of(
    u: Unit,
    names: dict[int, str]  # Of all parameters, by id
) -> tuple[str, ...]:
    "The names of the parameters that a unit speaks for, its weight first."
    return tuple(dict.fromkeys(names[id(p)] for p in _parameters(u) if id(p) in names))


class Coverage:
    "The parameters of two or more dimensions that no unit speaks for, and how much the others are."
    def __init__(self,
        model: nn.Module,
        units: Iterable[Unit],
        discovery: Discovery,
        selected: bool  # Whether `modules` selects some units, and not all
    ):
        named = [(n, p) for n, p in model.named_parameters() if not is_lazy(p)]
        self.names = {id(p): n for n, p in named}
        matrices = [(n, p) for n, p in named if p.dim() > 1]
        spoken_for: dict[int, int] = {}  # Elements of each parameter
        for u in units:
            for p in _parameters(u):
                part = u.weight.view.count if isinstance(u, OperationUnit) and p is u.weight.value else p.numel()
                spoken_for[id(p)] = min(p.numel(), spoken_for.get(id(p), 0) + part)
        total,held = sum(p.numel() for _, p in matrices),sum(spoken_for.get(id(p), 0) for _, p in matrices)
        self.share = held/total if total else 1.
        holders = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
        self.outside = {n: _why(p, holders[id(p)], discovery, selected) for n, p in matrices if id(p) not in spoken_for}


def _why(p: nn.Parameter, holder: nn.Module, discovery: Discovery, selected: bool) -> str:
    "A key of `rows.OUTSIDE`."
    if isinstance(holder, (nn.Embedding, nn.EmbeddingBag)): return 'embedding'
    if isinstance(holder, RECURRENT): return 'recurrent'
    source = discovery.sources.by_id.get(id(p))
    if id(p) in discovery.declined or source is None and selected: return 'not selected'
    if source is not None and id(p) not in discovery.taken: return 'not called'
    if p.numel() == max(p.shape): return 'vector'
    return 'embedding' if source is not None and 'embed' in source.attribute else 'not linear'
