"""What shows each unit to an `Observer` as the model runs: hooks on modules, and wrappers of linear operations.

`hooked` puts hooks on the units that are modules. `OperationHooks` wraps the functions that `conditions.Functions`
sees, and asks `Discovery` which units they use. The observer is asked to start a unit before it runs, and is shown
its output after."""
from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Mapping, Protocol

import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from .attention import arguments_of, beside, input_projections, with_projected
from .conditions import in_transform
from .discovery import Discovery, Use
from .operations import COPIES, OPERATIONS
from ..parallel.sharded import engine_hooks, forwards
from ..measure.solvers import Solver
from ..units.units import Unit

__all__ = ['Observer', 'hooked', 'OperationHooks']


class Observer(Protocol):
    "What is shown the units."
    changes: bool  # Whether it may change units. If so, it is asked to start them, and solvers see inputs and outputs
    busy: bool  # Whether it is shown nothing at the moment: it runs a unit again, say
    in_graph: bool  # Whether gradients must reach what it is shown. They always reach what the model goes on with
    def start(self, u: Unit) -> bool:
        "Give the unit its starting weights, if it has none yet. Returns whether its weights have changed."
    def observe(self, u: Unit, out: Any, again: Callable[[], Any] | None = None, rows: slice | None = None) -> Any:
        """See the output of a unit. Returns the output to go on with, or `None` if that is `out`.

        A unit that is not a module comes with `again`, which runs it again. It may own only some `rows` of the
        output."""


# ---- Modules

@contextmanager
def hooked(model: nn.Module, solvers: Mapping[Unit, Solver], observer: Observer) -> Iterator[None]:
    "Forwards of `model` are run inside, with hooks on each unit that is a module."
    handles: list[RemovableHandle] = []
    with forwards(model):
        try:
            for u, solver in solvers.items():
                if u.is_module: handles.extend(_hooks(u, solver, observer))
            yield
        finally:
            for h in handles: h.remove()


def _hooks(u: Unit, solver: Solver, observer: Observer) -> Iterable[RemovableHandle]:
    """Hooks on one unit. They run in this order:

        start, keep_input, hooks of others, (forward), keep_output, hooks of others, observe

    The hooks of others may change the input, and do so once more when the unit runs again. So it is kept before. They
    may change the output, too. What is kept before tells whether they did. Hooks of torch's own gather the weight
    before the forward and let it go after it. `start` and `observe` need it gathered:

        keep_input, torch gathers, start, (forward), observe, torch lets go

    A solver that runs the unit again observes last, as torch gathers the weight for each run."""
    m = u.module
    torch_gathers = engine_hooks(m)
    start_first,observe_first = not torch_gathers,torch_gathers and not solver.needs_input

    def keep_input(module, args, kwargs): solver.keep_input(args, kwargs)
    def keep_output(module, args, out): solver.keep_output(out)
    def start(module, args): observer.start(u)
    def observe(module, args, out): return observer.observe(u, out)

    if observer.changes:
        if solver.needs_input: yield m.register_forward_pre_hook(keep_input, prepend=True, with_kwargs=True)
        if solver.needs_output: yield m.register_forward_hook(keep_output, prepend=True)
        yield m.register_forward_pre_hook(start, prepend=start_first)
    yield m.register_forward_hook(observe, prepend=observe_first)


# ---- Operations

class OperationHooks:
    "Shows an observer the units that operations use."
    def __init__(self, discovery: Discovery, observer: Observer):
        self.discovery,self.observer = discovery,observer

    @property
    def functions(self) -> tuple[dict[Callable, Callable], set[int] | None]:
        "The first two arguments of `conditions.Functions`: wrappers, and a set for the parameters that functions take."
        if not self.discovery.sources.matrices: return {}, None
        wrappers = {**dict.fromkeys(OPERATIONS, self._operation), **dict.fromkeys(COPIES, self._copy),
                    F.multi_head_attention_forward: self._attention}
        return wrappers, self.discovery.taken

    def _copy(self, func: Callable, run: Callable, /, *args, **kwargs) -> Any:
        out = run(*args, **kwargs)
        if not self._off(): self.discovery.sources.note(out, args, COPIES[func])
        return out

    def _operation(self, func: Callable, run: Callable, /, *args, **kwargs) -> Any:
        if not self.discovery.concerns(args, kwargs) or self._off(): return run(*args, **kwargs)
        return self._show(self.discovery.uses(func, args, kwargs), partial(run, *args, **kwargs))

    def _attention(self, func: Callable, run: Callable, /, *args, **kwargs) -> Any:
        "Project the inputs here, to show them. Attention projects them again, unless gradients must come through here."
        if self._off(): return run(*args, **kwargs)
        arguments,in_graph,projected = arguments_of(args, kwargs),self.observer.in_graph,[]
        project = F.linear if in_graph else beside
        for p in input_projections(arguments):
            uses = self.discovery.uses_as_linear(p.weight, p.bias, p.letter)
            if uses or in_graph: projected.append(self._show(uses, partial(project, p.input, p.weight, p.bias)))
        if in_graph: arguments = with_projected(arguments, projected)
        # The output is that of the last projection, of which a layer may be the unit.
        last = self.discovery.uses_as_linear(arguments['out_proj_weight'], arguments['out_proj_bias'])
        return self._show(last, partial(run, **arguments))

    def _show(self, uses: list[Use], run: Callable[[], Any]) -> Any:
        "Run an operation, and show the observer each unit that it uses."
        for use in uses:
            if self.observer.start(use.unit): use.refresh()
        out = run()
        for use in uses: out = self._observed(use, out, run)
        return out

    def _observed(self, use: Use, out: Any, run: Callable[[], Any]) -> Any:
        def again():
            use.refresh()
            return run()

        new = self.observer.observe(use.unit, out, again, use.rows)
        if use.unit.changed: use.refresh()
        return out if new is None else new

    def _off(self) -> bool:
        "Whether nothing is shown at the moment."
        return self.observer.busy or in_transform()
