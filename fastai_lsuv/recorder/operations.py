"""The operations that a recorder measures: those on weights that no layer applies, as of GPT-2's `Conv1D` or experts.

`RecordedOperations` finds them as LSUV does, in the functions that the model calls, and gives them the names that LSUV
gives them. The first training step shows which there are. From then on only functions that showed some are looked at:
a model without such weights costs nothing more. `ForwardWatch` lets it see the functions, and nothing beyond the
model's own forward."""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..conditions import Functions
from ..discovery import Discovery, OperationUnit, Use
from ..operations import COPIES
from ..selection import is_named, loose_parameters, names_in, names_module, select_modules, some
from ..units import Unit
from ..views import Held

__all__ = ['RecordedOperations', 'ForwardWatch']


class RecordedOperations(Discovery):
    "The linear operations on parameters that no layer applies. It measures what they put out, and changes nothing."
    def __init__(self,
        model: nn.Module,
        modules: Any,  # As `ActivationStatsRecorder` takes
        layers: dict[str, nn.Module],  # That are recorded by their own hooks, by name
        take: Callable[[str, Tensor, slice | None], object]  # Gets an operation's name, output, and rows of it
    ):
        self.model,self.modules,self.layers,self.take = model,modules,layers,take
        loose = loose_parameters(model)
        self.holders = {id(m) for _, m in select_modules(model, modules, loose)} if modules is not None else set()
        super().__init__(loose, self._selects, lambda u: None)
        self.names: dict[OperationUnit, str] = {}  # Of those that are recorded
        self.seen: dict[str, None] = {}  # Names of all operations on such parameters, recorded or not
        self.recording = self.settled = False
        self.adopting = False  # Whether the weights of layers that were not called are looked for
        self.n_uses = 0
        self.useful: set[Callable] = set()  # Functions that showed an operation, or copied a weight
        self.mode = self._mode()

    @property
    def idles(self) -> bool:
        "Whether there is nothing to look at."
        return self.mode is None

    def _mode(self) -> Functions | None:
        "What sees the functions. `torch.compile`d code leaves its graph for it, so that it sees numbers."
        known = {f: h for f, h in self.handlers.items() if not self.settled or f in self.useful}
        seen = {f: self._noting(f, h) for f, h in known.items()}
        if 'torch._dynamo' in sys.modules: seen = {f: torch.compiler.disable(h) for f, h in seen.items()}
        return Functions(seen) if seen else None

    def _noting(self, func: Callable, handler: Callable) -> Callable:
        "A handler that notes whether its function is of use."
        def handle(run, args, kwargs):
            before = self.n_uses, len(self.sources.copies)
            out = handler(run, args, kwargs)
            if before != (self.n_uses, len(self.sources.copies)): self.useful.add(func)
            return out
        return handle

    def _selects(self, name: str, of: Held) -> bool:
        """Whether an operation is recorded: by its name, that of its parameter, or the module that holds this.

        Those inside an attention have to be computed again, and so are recorded only by name."""
        self.seen[name] = None
        if self.modules is not None and is_named(self.modules, name, of): return True
        if isinstance(of.module, nn.MultiheadAttention): return False
        return self.modules is None or id(of.module) in self.holders

    def start(self, recording: bool) -> None:
        "Begin a step."
        self.recording = recording
        if recording and not self.idles: self.sources.locate()

    def settle(self, called: set[str]) -> bool:  # Whether this was the last step that looks for operations
        "End the first step. If layers were not called, their parents may apply their weights: look once more."
        if not self.adopting and self._adopts(called): return False
        for u in self.missed():
            self.units[self._key(u.weight.view, u.weight.layout)] = u
            self.found(u, None)
        self.settled = True
        if not any(f not in COPIES for f in self.useful): self.useful = set()
        self.mode = self._mode()
        return True

    def _adopts(self, called: set[str]) -> bool:
        missed = [Unit(n, m) for n, m in self.layers.items() if n not in called]
        for u in missed: u.left_alone = ''
        self.adopting = True
        if not self.adopt(missed): return False
        self.mode = self._mode()
        return True

    @property
    def replaced(self) -> set[str]:
        "Layers that only hold a weight, and whose output is that of an operation that is recorded."
        holders = {id(u.module) for u in self.names}
        plain = {n for n, m in self.layers.items() if id(m) in holders and next(m.children(), None) is None}
        return plain - set(self.names.values())

    @property
    def problem(self) -> str:
        "What is wrong with `modules`, as the first step has shown; \"\" if nothing is."
        recorded = [(n, u.weight.view.held) for u, n in self.names.items()]
        for e in names_in(self.modules):
            if names_module(e, self.model) or any(is_named(e, *r) for r in recorded): continue
            there = some(self.seen) or 'none'
            return (f"modules: no linear operation of the first step took {e!r}; the operations on weights that no "
                    f"layer applies were: {there}")
        if self.names or self.layers: return ''
        return (f"model: {type(self.model).__name__} has no conv, linear, attention or recurrent layer, and applies "
                "no weight; name what to record with `modules`")

    # ---- What `Discovery` asks and tells

    in_graph = False

    def idle(self) -> bool: return not self.recording or torch._C._functorch.peek_interpreter_stack() is not None

    def before(self, use: Use) -> None: pass

    def after(self, use: Use, out: Any, again: Callable[[], Any]) -> Any:
        self.n_uses += 1
        if use.unit in self.names: self.take(self.names[use.unit], out, use.rows)
        return out

    def _new(self, *args) -> OperationUnit | None:
        "What the first step has not shown is not recorded: there is no end to the slices that a model may take."
        return None if self.settled else super()._new(*args)

    def found(self, u: OperationUnit, adopted: Unit | None) -> None: self.names[u] = u.name.replace('_orig_mod.', '')


class ForwardWatch:
    """Runs the forward of a model under the mode of `RecordedOperations`, from `attach` to `detach` or an exception.

    It stands in the place of the forward, where the mode is left whatever is raised. A copied or pickled model has the
    forward itself."""
    def __init__(self, operations: RecordedOperations):
        self.operations = operations
        self.model = None
        self.inside = False

    def attach(self, model: nn.Module) -> None:
        self.detach()
        if self.operations.idles or isinstance(model, torch.jit.ScriptModule): return
        in_place = getattr(model, '_compiled_call_impl', None) is not None  # `model.compile()`
        self.name = '_compiled_call_impl' if in_place else 'forward'
        self.own = vars(model).get(self.name)
        self.forward = getattr(model, self.name)
        vars(model)[self.name] = self
        self.model = model

    def detach(self) -> None:
        model,self.model = self.model,None
        if model is None: return
        if self.own is not None: vars(model)[self.name] = self.own
        else: vars(model).pop(self.name, None)

    def __call__(self, *args, **kwargs):
        if self.inside or not self.operations.recording: return self.forward(*args, **kwargs)
        self.inside = True
        try:
            with self.operations.mode: return self.forward(*args, **kwargs)
        except BaseException:
            self.operations.recording = False
            self.detach()
            raise
        finally:
            self.inside = False
            self.operations.end()

    def __reduce__(self): return _itself, (self.forward,)


def _itself(forward: Callable) -> Callable: return forward
