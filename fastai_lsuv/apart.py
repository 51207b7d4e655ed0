"""Units that not every rank runs: experts, to which the samples of one rank may go and those of another may not.

Ranks pool moments where a unit runs, so all must run the same units in the same order. A slice of a parameter is
therefore set apart where there are several ranks: `gather` pools its moments after the pass, for all slices at once.
`Passes` starts and corrects it then."""
from __future__ import annotations

from .discovery import Discovery, OperationUnit
from .moments import pool
from .observations import Observation
from .ranks import of_all_ranks, several_ranks

__all__ = ['gather']


def gather(discovery: Discovery) -> list[OperationUnit]:  # Those that some rank has run, in the same order on all
    "Pool what the ranks have seen of such units in this pass. A unit that this rank does not know of yet is made."
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
