"""What happens to a unit as the model runs it: `Corrector` starts it, measures its output, and has it corrected.

It is the `hooks.Observer` of a pass. Units are shown to it in the order of execution, so everything upstream is right
when a unit is measured. How a unit is corrected is its solver's business."""
from __future__ import annotations

import sys
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..observe.conditions import NormWatch
from ..observe.discovery import OperationUnit
from ..measure.doubts import n_samples, samples_alike
from ..measure.moments import Evidence, first_tensor
from ..measure.observations import Observation
from ..parallel.ranks import several_ranks
from ..parallel.sharded import digest, local
from ..measure.solvers import Solver, biases, choose_solver, measure
from .units import Unit

__all__ = ['Corrector']


class Corrector:
    "Starts, measures and corrects the units of a model."
    in_graph = False

    def __init__(self,
        units: list[Unit],  # Those that operations show are added to it
        preinit: Callable[[Unit], object] | None,  # Gives a unit its starting weights
        watch: Callable[[int, int], object] | None,  # Told how many units of how many have run
        own: Callable[[list[nn.Parameter]], object]  # Told which further parameters may change, before they do
    ):
        self.units,self.preinit,self.watch,self.own = units,preinit,watch,own
        self.solvers: dict[Unit, Solver] = {u: choose_solver(u) for u in units}
        self.owners: dict[Any, Unit] = {}  # Of each weight and bias, the unit that ran first
        self.order: dict[Unit, None] = {}  # The units that have run, in order of execution
        self.changes = self.busy = False
        # Of this pass
        self.ran = 0  # Units that have run
        self.norms = NormWatch()
        # Of this mini-batch
        self.samples,self.alike,self.batch = sys.maxsize,False,0.

    def begin_pass(self,
        changes: bool,  # Whether units are started and corrected, or only measured
        batch: Any = None,  # The mini-batch, if it is known
        fresh: bool = True  # Whether it is another than that of the pass before
    ) -> None:
        for u in self.units: u.begin_pass(fresh)
        self.changes,self.ran = changes,0
        self.norms.reset()
        if fresh and batch is not None:
            self.samples,self.alike,self.batch = n_samples(batch),samples_alike(batch),digest(batch)

    def add(self, u: OperationUnit) -> None:
        "Take in a unit of an operation when it is first seen, in place of the layer whose weight it is."
        if u in self.solvers: return
        if u.replaces in self.units: self.units.remove(u.replaces)
        self.units.append(u)
        self.solvers[u] = choose_solver(u)
        if not u.left_alone: self.own(u.parameters)

    def may_change(self, u: Unit) -> bool:
        "Whether a unit may be changed. The first unit that runs with a weight or a bias owns it."
        if not u.claimed: u.claim(self.owners)
        return u.may_change

    def clear(self) -> None:
        "Let go of what the solvers have kept in a pass."
        for s in self.solvers.values(): s.clear()

    # ---- As an observer

    def start(self, u: Unit) -> bool:
        """Start a unit when it is first called.

        A parent may use a weight without calling the unit. Such a unit keeps its weight."""
        if not u.is_module: self.add(u)
        return self.changes and not u.apart and not self.solvers[u].running and self.start_now(u)

    def start_now(self, u: Unit) -> bool:
        "Start a unit that is not started yet. Returns whether its weights have changed."
        if self.preinit is None or u.started: return False
        u.started = True
        if not self.may_change(u): return False
        self.preinit(u)
        u.note_change()
        return True

    def observe(self, u: Unit, out: Any, again: Callable[[], Any] | None = None, rows: slice | None = None) -> Any:
        "Measure a unit's output, correct the unit if it is off, and return the corrected output."
        solver = self.solvers[u]
        if solver.running: return None
        if rows is not None: out = out[rows]  # a view: what corrects it corrects the whole
        with torch._C.DisableTorchFunction():  # what happens in here is not the model's
            x = first_tensor(out)
            due = self._record(u, x) and self._is_due(u, x)
        if not due: return None
        if again is not None: solver.keep_call(again)
        was,self.busy = self.busy,True
        try: return solver.observe(out)
        finally: self.busy = was

    def _record(self, u: Unit, x: Tensor | None) -> bool:  # Whether there is anything to see
        "Measure a unit's output, and note what is seen."
        if x is None or x.numel() == 0 and not several_ranks(): return False
        now = u.seen.now or Observation(self._by_channel(u))
        # An operation may see the tokens of a sample as rows. They count as one sample.
        samples = sys.maxsize if u.is_module else self.samples
        norms = self.norms
        now.around = Evidence(samples, 0., norms.spread, norms.normed, self.alike, self.batch)
        m = measure(u, x, now.by_channel, now.around)
        if m is None: return False
        if u.seen.now is None:
            u.seen.now = now
            if not u.apart: self.order.setdefault(u)
            self.ran += 1
        now.shape = tuple(x.shape)
        now.moments.append(m)
        if self.watch is not None: self.watch(self.ran, len(self.units))
        return True

    def _is_due(self, u: Unit, x: Tensor) -> bool:
        "Whether to correct a unit now. If its moments are in doubt, `Unit.reason` says why."
        if u.apart or not (self.changes and self.may_change(u) and u.due()): return False
        u.reason = u.doubts(u.seen.now.moments[-1], local(x))
        return not u.reason

    def _by_channel(self, u: Unit) -> bool:
        "Whether the moments of a unit are to tell channels apart."
        may_change = self.changes and self.may_change(u)
        if may_change and u.affine and u.biases_differ is None: u.biases_differ = biases(u).ndim > 0
        return u.target.per_channel or bool(may_change and u.biases_differ)
