"""Which parameters the rows of a report cover. Each weight of two or more dimensions is in a row or in `outside`.

So is one of a single dimension that operations used, reshaped or in part."""
from __future__ import annotations

from typing import Callable, Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from .kinds import EMBEDDINGS, RECURRENT, is_layer, is_plain, made_of
from .refs import Ref
from .selection import Named
from .unit import Unit
from .views import View

__all__ = ['Coverage']


class Coverage:
    "The parameters that each unit covers, and those that no unit covers."
    def __init__(self,
        named: Named,  # The modules of the model
        units: Iterable[Unit],
        reshaped: set[int],  # Ids of the parameters of one dimension that operations used as a matrix
        why: Callable[[nn.Parameter], str]  # Why a parameter is in no row, a key of `OUTSIDE`, or "" if unknown
    ):
        held = [(f'{n}.{k}' if n else k, m, p) for n, m in named for k, p in m._parameters.items()
                if p is not None and not is_lazy(p)]
        self.names = {id(p): n for n, _, p in reversed(held)}  # a tied parameter goes by its first name
        self.of_unit = {u: _made_of(u) for u in units}
        covered: dict[int, int] = {}  # Elements of each parameter
        for u, params in self.of_unit.items():
            for p, part in params: covered[id(p)] = covered.get(id(p), 0) + part
        weights = [(n, m, p) for n, m, p in held if (p.dim() > 1 or id(p) in reshaped) and self.names[id(p)] == n]
        total = sum(p.numel() for _, _, p in weights)
        in_rows = sum(min(covered.get(id(p), 0), p.numel()) for _, _, p in weights)
        self.share = in_rows/total if total else 1.
        self.outside = {n: _why(p, m, why) for n, m, p in weights if id(p) not in covered}
        self.outside |= {f'{n} (in part)': 'not called' for n, _, p in weights if 0 < covered.get(id(p), 0) < p.numel()}

    def weights_of(self, u: Unit) -> tuple[str, ...]:
        "The names of the parameters that a unit covers, its weight first."
        return tuple(dict.fromkeys(self.names[id(p)] for p, _ in self.of_unit[u] if id(p) in self.names))


def _made_of(u: Unit) -> list[tuple[nn.Parameter, int]]:
    "The parameters that a unit's output is made with, and how many elements of each."
    own = [(r.param, _count(r.view)) for r in u.refs if isinstance(r, Ref)]
    layer = u.layer if u.is_block else u.module if is_layer(u.module) else None
    if layer is None: return own
    known = {id(p) for p, _ in own}
    return own + [(p, p.numel()) for p in made_of(layer) if id(p) not in known and (u.is_block or not is_plain(layer))]


def _count(view: View) -> int: return view.source.param.numel() if view.whole else view.count


def _why(p: nn.Parameter, holder: nn.Module, why: Callable[[nn.Parameter], str]) -> str:
    if isinstance(holder, EMBEDDINGS): return 'embedding'
    if isinstance(holder, RECURRENT): return 'recurrent'
    return why(p) or ('vector' if p.numel() == max(p.shape, default=1) else 'not linear')
