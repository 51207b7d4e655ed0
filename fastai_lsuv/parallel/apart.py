"""Units that not every rank runs: experts, to which samples of one rank may go while none of another rank do.

Ranks pool the moments of other units while these run. For that, all ranks must run the same units in the same order.
Experts are slices of a parameter. With several ranks, each such slice is set apart: `pool_apart` pools its moments
after the pass, for all slices at once, and `Passes` starts and corrects it then."""
from __future__ import annotations

from ..observe.discovery import Discovery, OperationUnit
from ..measure.moments import pool
from ..measure.observations import Observation
from .ranks import of_all_ranks, several_ranks

__all__ = ['pool_apart']


def pool_apart(discovery: Discovery) -> list[OperationUnit]:  # Those that some rank has run, in one order on all ranks
    "Pool what the ranks have seen, in this pass, of units set apart. Those that only other ranks ran are made here."
    if not several_ranks(): return []
    units = [u for u in discovery.units.values() if u.apart and u.seen.now is not None]
    of_ranks = of_all_ranks([(u.recipe, u.seen.now.shape, u.seen.now.moments) for u in units])
    seen: dict[tuple, list] = {}
    for recipe, shape, moments in sorted((s for of_rank in of_ranks for s in of_rank), key=lambda s: s[0][:3]):
        seen.setdefault(recipe, [shape, []])[1].extend(moments)
    found = []
    for recipe, (shape, moments) in seen.items():
        u = discovery.made(recipe)
        if u is None: continue
        u.seen.now = Observation(u.target.per_channel, shape, [pool(moments)])
        found.append(u)
    return found
