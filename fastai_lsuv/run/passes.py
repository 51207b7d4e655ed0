"""A pass: one forward through the model in which each unit is measured, corrected, and its corrected output handed on.

`Passes` runs the model with its units shown to a `Corrector`, which corrects them as they run. After the forward it
corrects those that could not be corrected then: units that are called several times, or that not every rank runs."""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any, Callable, Iterator

import torch
from torch import nn

from ..parallel.apart import pool_apart
from .blame import explained
from ..observe.conditions import Functions, NormWatch, measuring
from ..units.correction import Corrector
from ..observe.discovery import Discovery, OperationUnit
from ..observe.hooks import Observer, OperationHooks, hooked
from ..parallel.sharded import gathered_for
from ..measure.solvers import BetweenPasses, cloned
from ..keep.state import Preserved
from ..units.units import Unit

__all__ = ['Passes', 'arguments', 'call']


class Passes:
    "Passes through one model. Call it with a mini-batch, and look at the units."
    def __init__(self,
        model: nn.Module,
        units: list[Unit],  # Those that operations show are added to it
        discovery: Discovery | None = None,  # Finds the units in operations; none are looked for without it
        *,
        kept: Preserved | None = None,  # Puts back the state that a pass leaves behind
        preinit: Callable[[Unit], object] | None = None,  # Gives a unit its starting weights, when it is first called
        watch: Callable[[int, int], object] | None = None  # Told during a pass how many units of how many have run
    ):
        self.model,self.units,self.kept = model,units,kept
        self.discovery = discovery or Discovery((), lambda *args: False, lambda u: None)
        self.corrector = Corrector(units, preinit, watch, kept.own if kept is not None else lambda params: None)
        self.between: dict[Unit, BetweenPasses] = {}  # Of the units that are corrected after a pass
        self.begun = self.looked_for_uncalled = False

    @property
    def order(self) -> dict[Unit, None]:
        "The units that have run, in order of execution."
        return self.corrector.order

    @torch.no_grad()
    def __call__(self,
        batch: Any,  # A tensor, or a tuple or dict of the model's inputs
        correct: bool = True,  # Run the loops, or only measure
        fresh: bool = True  # Whether this is another mini-batch than that of the pass before
    ) -> bool:  # Whether any unit was changed, or further ones are looked for from now on
        if self.begun and self.kept is not None: self.kept.rewind()  # training begins without what a pass leaves
        self.begun,c = True,self.corrector
        c.begin_pass(correct, batch, fresh)
        with self._shown_to(c) as functions, measuring(self.model, c.norms, *functions): call(self.model, cloned(batch))
        apart = pool_apart(self.discovery)
        for u in apart:
            c.add(u)
            self.order.setdefault(u)
        self._mark_stale()
        self._forget_downstream()
        if correct: self._correct_after(apart)
        for u in self.units: u.end_pass()
        return self._look_for_uncalled() or any(u.changed for u in self.units)

    def look(self, run: Callable[[], Any]) -> None:
        "Measure the units while `run()` runs the model as it is, dropout and all."
        self.begun = True
        self.corrector.begin_pass(False)
        with self._shown_to(self.corrector) as functions, Functions(*functions): run()

    def show(self, observer: Observer, run: Callable[[], Any]) -> None:
        "Show the units to an observer of another kind while `run()` runs the model."
        with (self._shown_to(observer) as functions, measuring(self.model, NormWatch(), *functions),
              explained(self.model)):
            run()

    @contextmanager
    def _shown_to(self, observer: Observer) -> Iterator[tuple]:
        "The model is run inside, its units shown to an observer. Gives what `Functions` takes to show operations."
        try:
            with hooked(self.model, self.corrector.solvers, observer), _eager():
                yield OperationHooks(self.discovery, observer).functions
        finally:
            self.corrector.clear()
            self.discovery.sources.forget_copies()

    # ---- After a forward

    def _mark_stale(self) -> None:
        "What was seen of a unit that this pass did not run is stale once any unit has changed."
        any_changed = any(u.changed for u in self.units)
        for u in self.units: u.stale = u.seen.now is None and (u.stale or any_changed)

    def _forget_downstream(self) -> None:
        "What earlier passes saw of a unit counts no more once a unit that runs before it has changed."
        upstream = False
        for u in self.order:
            if upstream: u.seen.earlier = []
            upstream |= u.changed

    def _correct_after(self, apart: list[OperationUnit]) -> None:
        "Correct the units that are called several times or set apart. Nothing that was seen counts any more."
        seen_twice = [u for u in self.units if u.seen.now and u.seen.last and u.seen.now.repeated]
        repeated = [u for u in seen_twice if self.corrector.may_change(u)]
        changed = [self._correct(u) for u in repeated] + [self._correct_apart(apart)]
        if not any(changed): return
        for u in self.units: u.seen.earlier,u.seen.comparable = [],False

    def _correct(self, u: Unit) -> bool: return self.between.setdefault(u, BetweenPasses(u)).after_pass()

    def _correct_apart(self, units: list[OperationUnit]) -> bool:  # Whether any was changed
        "Start the units that have no start yet, and correct the others."
        for module, those in groupby(units, key=lambda u: u.module):
            with gathered_for(self.model, module):
                for u in those:
                    if self.corrector.may_change(u) and not self.corrector.start_now(u): self._correct(u)
        return any(u.changed for u in units)

    def _look_for_uncalled(self) -> bool:
        "After the first pass: whether there are layers that it did not call, to be looked for in operations."
        if self.looked_for_uncalled: return False
        self.looked_for_uncalled = True
        units = [u for u in self.units if u.layer is not None]
        called = {id(p) for u in units if u.seen.latest is not None for p in u.parameters}
        uncalled = (u for u in units if u.seen.latest is None)
        return self.discovery.look_for(u for u in uncalled if called.isdisjoint(map(id, u.parameters)))


def arguments(batch: Any) -> tuple[tuple, Mapping]:
    "Positional and keyword arguments that a model gets of a mini-batch: a tensor, or a tuple or dict of its inputs."
    if isinstance(batch, Mapping): return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def call(model: nn.Module, batch: Any) -> Any:
    "What `model` makes of a mini-batch."
    args,kwargs = arguments(batch)
    with explained(model, batch): return model(*args, **kwargs)


def _eager():
    "Run compiled modules as the plain ones they wrap, so that hooks see every layer."
    return torch.compiler.set_stance('force_eager') if hasattr(torch.compiler, 'set_stance') else nullcontext()
