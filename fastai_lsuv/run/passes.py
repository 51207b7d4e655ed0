"""A pass: one forward through the model. It measures each unit, mends its output, and yields plans.

`Passes` runs the model with its units shown to a `Corrector`. No weight is written during the forward. After it, the
plans are applied in one place, and the next pass runs on the new weights."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable

import numpy as np
import torch
from torch import nn

from ..measure import Observation, pool, varies
from ..observe import Discovery, Functions, NormWatch, Observer, cloned, measuring, shown
from ..parallel import of_all_ranks, several_ranks
from ..units import Plan, Selection, Unit, is_layer
from .blame import explained
from .corrector import Corrector
from .kept import Kept

__all__ = ['Passes', 'arguments', 'call']


class Passes:
    "Passes through one model. Call it with a mini-batch, and look at the units."
    def __init__(self,
        model: nn.Module,
        selection: Selection,
        prepare: Callable[[Unit], object],  # Gives a unit its target, and says whether it is left alone
        kept: Kept,  # Puts back the state that a pass leaves behind
        *,
        watch: Callable[[int, int], object] | None = None  # Told during a pass how many units of how many have run
    ):
        self.model,self.selection,self.kept,self.prepare = model,selection,kept,prepare
        self.discovery = Discovery(selection, prepare)
        for u in selection.blocks: prepare(u)
        n = len(selection.layers) + len(selection.blocks)
        told = (lambda ran: watch(ran, max(n, ran, len(self.discovery.units)))) if watch is not None else None
        self.corrector = Corrector(told)
        self.order: list[Unit] = []  # The units that have run, in order of execution
        self.between: dict[Unit, BetweenPasses] = {}  # Of the units that are called several times or set apart
        self.begun = False
        self.made: list[str] = []  # Layers that the model makes in its forward
        self.output: Any = None  # Of the model in the last pass
        self._known = {id(m) for _, m in selection.named}

    @property
    def units(self) -> list[Unit]:
        "Every unit there is so far: those that ran in order of execution, then the others."
        blocks = (u for u in self.selection.blocks if not self.discovery.is_replaced(u))
        return list(dict.fromkeys([*self.order, *self.discovery.units.values(), *blocks]))

    @torch.no_grad()
    def __call__(self,
        batch: Any,  # A tensor, or a tuple or dict of the model's inputs
        correct: bool = True,  # Plan corrections, or only measure
        fresh: bool = True  # Whether this is another mini-batch than that of the pass before
    ) -> list[Unit]:  # The units that have plans, to be applied
        self._begin(correct, batch, fresh)
        c,taken = self.corrector,self.discovery.taken
        with shown(self.model, self.discovery, c) as wrappers, measuring(self.model, c.norms, wrappers, taken):
            self.output = call(self.model, cloned(batch))
        self.made = [n for n, m in self.model.named_modules() if is_layer(m) and id(m) not in self._known]
        self._end()
        if correct: self._plan_after()
        return [u for u in self.units if u.plan is not None]

    def look(self, run: Callable[[], Any]) -> None:
        "Measure the units while `run()` runs the model as it is, dropout and all."
        self._begin(False)
        with shown(self.model, self.discovery, self.corrector) as wrappers, Functions(wrappers, self.discovery.taken):
            run()
        self._end()

    def show(self,
        observer: Observer,
        run: Callable[[], Any],
        more: dict[Callable, Callable] = {}  # Further wrappers, as `Functions` takes them
    ) -> None:
        "Show the units to an observer of another kind while `run()` runs the model."
        with (shown(self.model, self.discovery, observer) as wrappers,
              measuring(self.model, NormWatch(), wrappers | more, self.discovery.taken), explained(self.model)):
            run()

    @torch.no_grad()
    def apply(self, units: list[Unit]) -> None:
        "Write the plans of these units to their weights. This is the one place that does."
        if not units: return
        self.kept.before_writing(units)
        for u in units: u.apply()
        self._forget_downstream(units)

    # ---- Around a forward

    def _begin(self, correct: bool, batch: Any = None, fresh: bool = True) -> None:
        if self.begun: self.kept.rewind()
        self.begun,self.output = True,None
        torch.clear_autocast_cache()  # it may hold weights as they were, in half precision
        for u in self.units: u.begin_pass(fresh)
        self.corrector.begin_pass(correct, batch, fresh)

    def _end(self) -> None:
        for u in self._pooled_apart(): self.corrector.ran.append(u)
        _merge(self.order, self.corrector.ran)
        for u in self.units:
            if u.seen.now is not None: u.stale = False

    def _forget_downstream(self, changed: list[Unit]) -> None:
        "What was seen of a unit counts no more once another that runs before it has changed."
        those,upstream = set(changed),False
        several = any(u in self.between for u in changed)
        for u in self.units:
            if upstream or several: u.seen.earlier = []
            if several: u.seen.comparable = False
            if u.seen.now is None and u not in those: u.stale = True
            upstream |= u in those

    # ---- Units that are planned after a forward

    def _plan_after(self) -> None:
        "Plan for the units that are called several times or set apart."
        for u in self.units:
            now,last = u.seen.now,u.seen.last
            if now is None or not (u.apart or last is not None and now.calls > 1): continue
            if u.may_change and not self.corrector.waits(u): self.between.setdefault(u, BetweenPasses(u)).plan()

    def _pooled_apart(self) -> list[Unit]:  # Those that some rank has run, in one order on all ranks
        """Pool what the ranks have seen of units set apart: experts, which some ranks may run and others not.

        Those that only other ranks ran are made here."""
        if not several_ranks(): return []
        units = [u for u in self.discovery.units.values() if u.apart and u.seen.now is not None]
        self.corrector.ran = [u for u in self.corrector.ran if not u.apart]
        of_ranks = of_all_ranks([(u.recipe, u.seen.now.shape, u.seen.now.moments) for u in units])
        seen: dict[tuple, list] = {}
        for recipe, shape, moments in sorted((s for of_rank in of_ranks for s in of_rank), key=lambda s: s[0][:3]):
            seen.setdefault(recipe, [shape, []])[1].extend(moments)
        found = []
        for recipe, (shape, moments) in seen.items():
            if (u := self.discovery.made(recipe)) is None: continue
            u.seen.now = Observation(u.target.per_channel, shape, [pool(moments)])
            found.append(u)
        return found


class BetweenPasses:
    """Plans for a unit that is called several times, after a pass that ran it as it was.

    Where its output comes back as its input, the std grows as some power of the weight's scale: 1 where the calls have
    nothing to do with each other, the number of calls in a chain of as many layers. The last two passes tell that power
    (the secant method). It starts at the root of the number of calls."""
    def __init__(self, unit: Unit):
        self.unit = unit
        self.height: np.ndarray | None = None  # Logarithm of std over target, in the pass before
        self.step: np.ndarray | None = None  # Logarithm of the factor that followed

    @np.errstate(all='ignore')
    def plan(self) -> None:
        "Plan a correction if the unit is off its target."
        u,t,m = self.unit,self.unit.target,self.unit.seen.now.pooled
        if not varies(m) or u.met(m): return
        u.reason = u.doubts(m)
        if u.reason: return
        mean,std = m.stats(t.per_channel)
        calls = len(u.seen.now.moments)
        power,height = np.full_like(std, calls**0.5),np.log(std/t.std)
        if self.height is not None:
            slope = (height - self.height)/self.step
            power = np.where(np.isfinite(slope) & (slope > 0), slope.clip(0.5, 4*calls), power)
        step = np.where(np.isfinite(height), -height/power, 0.) if t.scales else np.zeros_like(std)
        self.height,self.step = height,step
        u.plan = Plan(np.exp(step), t.mean - mean if u.can_shift and t.shifts else 0.)


def _merge(order: list[Unit], ran: list[Unit]) -> None:
    "Put units that have not run before in their places in the order of execution."
    if not order: order += ran
    for i, u in enumerate(ran):
        if u in order: continue
        before = next((order.index(o) for o in reversed(ran[:i]) if o in order), -1)
        order.insert(before + 1, u)


def arguments(batch: Any) -> tuple[tuple, Mapping]:
    "Positional and keyword arguments that a model gets of a mini-batch: a tensor, or a tuple or dict of its inputs."
    if isinstance(batch, Mapping): return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def call(model: nn.Module, batch: Any) -> Any:
    "What `model` makes of a mini-batch."
    args,kwargs = arguments(batch)
    with explained(model, batch): return model(*args, **kwargs)
