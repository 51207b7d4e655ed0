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

from ..observe import COPIES, Discovery, Functions, Use, Watch
from ..text import some_names
from ..units import Source, Unit, is_named, loose_of, names_in, names_module, select_modules, sources_of

__all__ = ['RecordedOperations', 'ForwardWatch']


class RecordedOperations:
    """The linear operations on parameters that no layer applies, and an `Observer` of them.

    It measures what they put out, and changes nothing."""
    changes = in_graph = False
    blocks = ()

    def __init__(self,
        model: nn.Module,
        modules: Any,  # As `ActivationStatsRecorder` takes
        layers: dict[str, nn.Module],  # That are recorded by their own hooks, by name
        take: Callable[[str, Tensor, slice | None], object]  # Gets an operation's name, output, and rows of it
    ):
        self.model,self.modules,self.layers,self.take = model,modules,layers,take
        self.named,self.all_sources = list(model.named_modules()),sources_of(model)
        self.sources = loose_of(self.all_sources)
        self.holders = _holders(model, modules, self.sources)
        self.discovery = Discovery(self, lambda u: None)
        self.names: dict[Unit, str] = {}  # Of those that are recorded
        self.seen: dict[str, None] = {}  # Names of all operations on such parameters, recorded or not
        self.recording = self.settled = False
        self.looked_for_uncalled = False  # Whether the weights of layers that were not called are looked for
        self.n_uses = 0
        self.useful: set[Callable] = set()  # Functions that showed an operation, or copied a weight
        self.mode = self._mode()

    @property
    def idles(self) -> bool:
        "Whether there is nothing to look at."
        return self.mode is None

    def _mode(self) -> Functions | None:
        "What sees the functions. `torch.compile`d code leaves its graph for it, so that it sees numbers."
        wrappers = Watch(self.discovery, self).wrappers if any(s.param.dim() > 1 for s in self.sources) else {}
        seen = {f: self._noting(h) for f, h in wrappers.items() if not self.settled or f in self.useful}
        if 'torch._dynamo' in sys.modules: seen = {f: torch.compiler.disable(h) for f, h in seen.items()}
        return Functions(seen) if seen else None

    def _noting(self, handler: Callable) -> Callable:
        """A handler that notes whether its function is of use.

        Only the function itself is in the graph: activation checkpointing counts the tensors that are saved."""
        def handle(func, run, /, *args, **kwargs):
            copies = self.discovery.sources.copies
            before = self.n_uses, len(copies)
            in_graph = torch.is_grad_enabled()

            def run_as_called(*args, **kwargs):
                with torch.set_grad_enabled(in_graph): return run(*args, **kwargs)

            with torch.no_grad(): out = handler(func, run_as_called, *args, **kwargs)
            if before != (self.n_uses, len(copies)): self.useful.add(func)
            return out
        return handle

    def selects(self, name: str, of: Source) -> bool:
        """Whether an operation is recorded: by its name, that of its parameter, or the module that holds this.

        Those inside an attention have to be computed again, and so are recorded only by name."""
        self.seen[name] = None
        if self.modules is not None and is_named(self.modules, name, of): return True
        if isinstance(of.module, nn.MultiheadAttention): return False
        return self.modules is None or id(of.module) in self.holders

    def begin_step(self, recording: bool) -> None:
        self.recording = recording
        if recording and not self.idles:
            self.discovery.begin_pass()
            self.discovery.sources.locate()

    def settle(self, called: set[str]) -> bool:  # Whether this was the last step that looks for operations
        "End the first step. If layers were not called, their parents may apply their weights: look once more."
        if not self.looked_for_uncalled and self._looks_for_uncalled(called): return False
        self.discovery.close()
        for u in self.discovery.units.values(): self._name(u)
        self.settled = True
        if self.useful <= COPIES.keys(): self.useful = set()  # no operation took what was copied
        self.mode = self._mode()
        return True

    def _looks_for_uncalled(self, called: set[str]) -> bool:
        self.looked_for_uncalled,uncalled = True,{id(m) for n, m in self.layers.items() if n not in called}
        more = [s for s in self.all_sources if id(s.module) in uncalled and s not in self.sources]
        if not more: return False
        self.sources = [*self.sources, *more]
        self.discovery = Discovery(self, lambda u: None)
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
        recorded = [(n, u.weight.view.source) for u, n in self.names.items()]
        for e in names_in(self.modules):
            if names_module(e, self.model) or any(is_named(e, *r) for r in recorded): continue
            there = some_names(map(repr, self.seen), 8) or 'none'
            return (f"modules: no linear operation of the first step took {e!r}; the operations on weights that no "
                    f"layer applies were: {there}")
        if self.names or self.layers: return ''
        return (f"model: {type(self.model).__name__} has no conv, linear, attention or recurrent layer, and applies "
                "no weight; name what to record with `modules`")

    # ---- As an observer

    @property
    def busy(self) -> bool: return not self.recording

    def _name(self, u: Unit) -> str: return self.names.setdefault(u, u.name.replace('_orig_mod.', ''))

    def observe(self, use: Use, out: Any) -> Any:
        self.n_uses += 1
        self.take(self._name(use.unit), out, use.rows)
        return out


def _holders(model: nn.Module, modules: Any, sources: list[Source]) -> set[int]:
    "Ids of the modules that `modules` selects; none if it selects all."
    return {id(m) for _, m in select_modules(model, modules, sources)} if modules is not None else set()


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
            self.operations.discovery.sources.forget_copies()

    def __reduce__(self): return _itself, (self.forward,)


def _itself(forward: Callable) -> Callable: return forward
