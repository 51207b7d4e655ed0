"""Units that not every rank runs: experts, to which the samples of one rank may go and those of another may not.

Ranks pool moments where a unit runs, so all must run the same units in the same order. A slice of a parameter is
therefore set apart where there are several ranks: `gather` pools its moments after the pass, for all slices at once,
and `correct` starts and corrects it then."""
from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from .discovery import OperationUnit
from .moments import pool
from .ranks import of_all_ranks, several_ranks
from .sharded import gathered_for
from .solvers import BetweenPasses
from .units import Observation

if TYPE_CHECKING: from .passes import Passes

__all__ = ['gather', 'correct']


def gather(passes: Passes) -> list[OperationUnit]:  # Those that some rank has run, in the same order on all
    "Pool what the ranks have seen of such units in this pass. A unit that this rank does not know of yet is made."
    if passes.discovery is None or not several_ranks(): return []
    units = [u for u in passes.discovery.units.values() if u.apart and u.seen is not None]
    of_ranks = of_all_ranks([(u.recipe, u.seen.shape, u.seen.moments) for u in units])
    seen: dict[tuple, list] = {}
    for recipe, shape, moments in sorted((s for of_rank in of_ranks for s in of_rank), key=lambda s: s[0][:3]):
        seen.setdefault(recipe, [shape, []])[1].extend(moments)
    found = []
    for recipe, (shape, moments) in seen.items():
        u = passes.discovery.made(recipe)
        if u is None: continue
        u.seen = Observation(u.target.per_channel, shape, [pool(moments)])
        passes.order.setdefault(u)
        found.append(u)
    return found


def correct(passes: Passes, units: list[OperationUnit]) -> bool:  # Whether any was changed
    "Start the units that have no start yet, and correct the others."
    for module, those in groupby(units, key=lambda u: u.module):
        with gathered_for(passes.model, module):
            for u in those:
                if not u.claim(passes.owners) or passes.begin_apart(u): continue
                passes.between.setdefault(u, BetweenPasses(u)).after_pass()
    return any(u.changed for u in units)
