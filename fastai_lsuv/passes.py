"""A pass: one forward through the model in which each unit is measured, corrected, and its corrected output handed on.

Hooks fire in the order of execution, so a unit is corrected when everything upstream of it is right. `Passes` attaches
the hooks, runs the model, and asks each unit's solver for the correction. What is known of a unit lies in the unit."""
from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from .apart import correct as correct_apart
from .apart import gather
from .blame import explained
from .conditions import Functions, NormWatch, measuring
from .discovery import Discovery, OperationUnit
from .evidence import n_samples, samples_alike
from .moments import first_tensor
from .ranks import several_ranks
from .sharded import digest, engine_hooks, forwards, local
from .solvers import BetweenPasses, biases, choose_solver, cloned, measure
from .units import Observation, Unit

__all__ = ['Passes', 'arguments', 'call']


class Passes:
    "Passes through one model. Call it with a mini-batch, and look at the units."
    def __init__(self,
        model: nn.Module,
        units: list[Unit],
        watch: Callable[[int, int], object] | None = None,  # Told during a pass how many units of how many have run
        start: Callable[[Unit], object] | None = None,  # Gives a unit its first weights, when it is first called
        discovery: Discovery | None = None  # Finds further units in the operations of a pass
    ):
        self.model,self.units,self.watch,self.start = model,units,watch,start
        self.discovery = discovery
        if discovery is not None: discovery.passes = self
        self.solvers = {u: choose_solver(u) for u in units}
        self.between: dict[Unit, BetweenPasses] = {}  # Of the units that are called several times
        self.owners: dict[Any, Unit] = {}  # Of each weight and bias, the unit that ran first
        self.order: dict[Unit, None] = {}  # The units that have run, in order of execution
        self.norms,self.alike,self.n_samples,self.batch = NormWatch(),False,sys.maxsize,0.
        self.begun = self.adopted = False  # Whether the model has run, and whether what it did not call was looked for
        self.busy = False  # Whether some unit is being corrected: what the model calls now runs the unit again
        self.hear: Callable[[Unit, Tensor], object] | None = None  # Shown the outputs, in place of measuring them
        self.rewind: Callable[[], object] = lambda: None  # Puts back the state that a pass leaves behind

    @torch.no_grad()
    def __call__(self,
        batch: Any,  # A tensor, or a tuple or dict of the model's inputs
        correct: bool = True,  # Run the loops, or only measure
        fresh: bool = True  # Whether this is another mini-batch than that of the pass before
    ) -> bool:  # Whether any unit was changed
        for u in self.units: u.begin(fresh)
        self.correct,self.ran = correct,0
        if self.begun: self.rewind()  # state that a pass leaves behind is not that which training begins with
        self.begun = True
        self.norms.reset()
        if fresh: self.alike,self.n_samples,self.batch = samples_alike(batch),n_samples(batch),digest(batch)
        with self.hooked(), measuring(self.model, self.norms, *self._seen_by), _eager():
            call(self.model, cloned(batch))
        apart = gather(self)
        self._forget_stale()
        if correct: self._correct_between(apart)
        for u in self.units: u.end()
        return self._adopt() or any(u.changed for u in self.units)

    def _forget_stale(self) -> None:
        "What earlier passes saw of a unit counts no more once a unit that runs before it has changed."
        changed = any(u.changed for u in self.units)
        for u in self.units: u.stale = u.seen is None and (u.stale or changed)
        changed = False
        for u in self.order:
            if changed: u.history = []
            changed |= u.changed

    def _correct_between(self, apart: list[OperationUnit]) -> None:
        "Correct the units that are called several times or set apart. Nothing that was seen counts any more."
        repeated = [u for u in self.units if u.seen and u.last and u.seen.repeated and u.claim(self.owners)]
        for u in repeated: self.between.setdefault(u, BetweenPasses(u))
        changed = [self.between[u].after_pass() for u in repeated] + [correct_apart(self, apart)]
        if not any(changed): return
        for u in self.units: u.history,u.comparable = [],False

    def look(self, run: Callable[[], Any]) -> None:
        "Measure the units while `run()` runs the model as it is."
        for u in self.units: u.begin()
        self.correct,self.ran,self.begun = False,0,True
        with self.hooked(), Functions(*self._seen_by), _eager(): run()

    def listen(self, run: Callable[[], Any], hear: Callable[[Unit, Tensor], object]) -> None:
        "Show `hear` the outputs of the units while `run()` runs the model, measuring, as it is."
        self.correct,self.hear = False,hear
        try:
            with self.hooked(), measuring(self.model, NormWatch(), *self._seen_by), _eager(), explained(self.model):
                run()
        finally:
            self.hear = None

    @property
    def _seen_by(self) -> tuple[dict[Callable, Callable], set[int] | None]:
        "What sees the operations of a pass, by function, and what notes the parameters that they take."
        d = self.discovery
        return (d.handlers, d.taken) if d is not None and d.handlers else ({}, None)

    def add(self, u: Unit, adopted: Unit | None) -> None:
        "Take in a unit that was found in a pass, in place of a layer whose weight it is."
        if adopted in self.units: self.units.remove(adopted)
        self.units.append(u)
        self.solvers[u] = choose_solver(u)

    def _adopt(self) -> bool:
        "After the first pass: whether layers that it did not call are to be looked for in operations."
        if self.adopted or self.discovery is None: return False
        self.adopted = True
        units = [u for u in self.units if u.layer is not None]
        called = {id(p) for u in units if u.latest is not None for p in u.parameters}
        missed = (u for u in units if u.latest is None)
        return self.discovery.adopt(u for u in missed if called.isdisjoint(map(id, u.parameters)))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        "Hooks on each unit. Those that keep the input or the output come ahead of others' hooks, which may change it."
        with ExitStack() as stack:
            stack.enter_context(forwards(self.model))

            def attach(register, f, **kw): stack.callback(register(partial(f, u, s), **kw).remove)
            stack.callback(self._clear)
            for u, s in self.solvers.items():
                if not u.is_module: continue
                if s.needs_input:
                    attach(u.module.register_forward_pre_hook, self._keep_input, prepend=True, with_kwargs=True)
                if s.needs_output: attach(u.module.register_forward_hook, self._keep_output, prepend=True)
                # Torch's own hooks gather the weights, and take them away.
                engine = engine_hooks(u.module)
                if self.start is not None: attach(u.module.register_forward_pre_hook, self._begin, prepend=not engine)
                attach(u.module.register_forward_hook, self._observe, prepend=engine and not s.needs_input)
            yield

    def _clear(self) -> None:
        "Let go of what a pass has kept."
        for s in self.solvers.values(): s.clear()
        if self.discovery is not None: self.discovery.end()

    def _begin(self, u: Unit, solver, module, args) -> None: self.begin(u)

    def begin(self, u: Unit) -> bool:  # Whether it was given a start
        """Start a unit when it is first called.

        A parent may use a weight without calling the unit. Such a unit keeps its weight."""
        if self.start is None or self.solvers[u].running or not self.correct or u.started or u.apart: return False
        return self._start(u)

    def begin_apart(self, u: Unit) -> bool:  # Whether it was given a start
        "Start a unit that is set apart, after a pass."
        return self.start is not None and not u.started and self._start(u)

    def _start(self, u: Unit) -> bool:
        u.started = True
        if not u.claim(self.owners): return False
        self.start(u)
        u.changed = True
        torch.clear_autocast_cache()
        return True

    def _keep_input(self, u: Unit, solver, module, args, kwargs) -> None:
        if self.correct and not solver.running: solver.keep_input(args, kwargs)

    def _keep_output(self, u: Unit, solver, module, args, out) -> None:
        if not solver.running: solver.keep_output(out)

    def _observe(self, u: Unit, solver, module, args, out) -> Any: return self.observe(u, out)

    def observe(self, u: Unit, out: Any) -> Any:  # What to go on with; `None`: `out`
        "Measure a unit's output, correct the unit if it is off, and return the corrected output."
        solver = self.solvers[u]
        if solver.running: return None
        if self.hear is not None:
            if (x := first_tensor(out)) is not None: self.hear(u, x)
            return None
        with torch._C.DisableTorchFunction():  # what happens in here is not the model's
            due = self._measure(u, first_tensor(out))
        if not due: return None
        was,self.busy = self.busy,True
        try: return solver.observe(out)
        finally: self.busy = was

    def _measure(self, u: Unit, x: Tensor | None) -> bool:  # Whether the unit is to be corrected
        "Measure a unit's output."
        if x is None or x.numel() == 0 and not several_ranks(): return False
        may_change = self.correct and u.claim(self.owners)
        if u.seen is None and u.biases_differ is None and may_change and u.affine: u.biases_differ = biases(u).ndim > 0
        seen = u.seen or Observation(u.target.per_channel or bool(may_change and u.biases_differ))
        told = self.norms.spread,self.norms.normed,self.alike,self.batch
        m = measure(u, x, seen.by_channel, *told)
        if m is None: return False
        if u.seen is None:
            u.seen = seen
            if not u.apart: self.order.setdefault(u)
            self.ran += 1
        u.seen.shape = tuple(x.shape)
        if self.watch is not None: self.watch(self.ran, len(self.units))
        u.seen.moments.append(m)
        if u.apart or not (may_change and u.due()): return False
        u.reason = u.doubts(m, local(x))
        return not u.reason


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
