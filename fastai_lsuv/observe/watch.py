"""Shows the units to an `Observer` as the model runs.

One `TorchFunctionMode` sees every function that the model calls. `Discovery` says which units a linear operation uses.
Blocks have hooks. The observer is shown each output the moment it exists, and may mend it."""
from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..parallel import forwards
from .attention import arguments_of, beside, input_projections, with_projected
from .blocks import BlockObserver, hooked
from .conditions import in_transform
from .discovery import Discovery, Use
from .operations import COPIES, OPERATIONS

__all__ = ['Observer', 'Watch', 'shown']


class Observer(BlockObserver, Protocol):
    "What is shown the units."
    in_graph: bool  # Whether gradients must reach what it is shown. They always reach what the model goes on with
    def observe(self, use: Use, out: Any) -> Any:
        "See the output of an operation. Returns the output to go on with."


class Watch:
    "What is called in place of the linear operations, to show an observer the units that they use."
    def __init__(self, discovery: Discovery, observer: Observer):
        self.discovery,self.observer = discovery,observer

    @property
    def wrappers(self) -> dict[Callable, Callable]:
        "By function, as `conditions.Functions` takes them."
        return {**dict.fromkeys(OPERATIONS, self._operation), **dict.fromkeys(COPIES, self._copy),
                F.multi_head_attention_forward: self._attention}

    def _copy(self, func: Callable, run: Callable, /, *args, **kwargs) -> Any:
        out = run(*args, **kwargs)
        if not self.observer.busy and not in_transform(): self.discovery.sources.note(out, args, COPIES[func])
        return out

    def _operation(self, func: Callable, run: Callable, /, *args, **kwargs) -> Any:
        if self.observer.busy: return run(*args, **kwargs)
        if in_transform():
            self.discovery.transformed.update(id(a) for a in args if isinstance(a, nn.Parameter))
            return run(*args, **kwargs)
        uses = self.discovery.uses(func, args, kwargs)
        out = run(*args, **kwargs)
        for use in uses: out = self.observer.observe(use, out)
        return out

    def _attention(self, func: Callable, run: Callable, /, *args, **kwargs) -> Any:
        """Project the inputs here, to show them. Attention projects them again, with the weights that the observer
        plans, unless gradients must come through here."""
        if self.observer.busy or in_transform(): return run(*args, **kwargs)
        arguments,in_graph,projected,used = arguments_of(args, kwargs),self.observer.in_graph,[],[]
        project = F.linear if in_graph else beside
        for p in input_projections(arguments):
            uses = self.discovery.uses_as_linear(p.weight, p.bias, p.letter)
            if not (uses or in_graph): continue
            out = project(p.input, p.weight, p.bias)
            for use in uses: out = self.observer.observe(use, out)
            projected.append(out)
            used += [(use.unit, p) for use in uses]
        arguments = with_projected(arguments, projected) if in_graph else _as_planned(arguments, used)
        out = run(**arguments)
        # The output is that of the last projection.
        for use in self.discovery.uses_as_linear(arguments['out_proj_weight'], arguments['out_proj_bias']):
            out = self.observer.observe(use, out)
        return out


def _as_planned(arguments: dict[str, Any], used: list[tuple]) -> dict[str, Any]:
    "The arguments of attention, with weights and biases as the units' plans will make them."
    planned = [(u, p) for u, p in used if u.plan is not None]
    new = {name: arguments[name].detach().clone() for name in {'in_proj_bias', *(p.argument for _, p in planned)}
           if planned and arguments[name] is not None}
    for u, p in planned:
        w,gain,shift = new[p.argument],*(torch.from_numpy(np.atleast_1d(v)) for v in (u.plan.gain, u.plan.shift))
        w = w[p.rows] if p.letter else w
        w.mul_(gain.to(w)[:, None])
        if u.bias is not None: new['in_proj_bias'][p.rows].add_(shift.to(w))
    return arguments | new


@contextmanager
def shown(
    model: nn.Module,
    discovery: Discovery,
    observer: Observer
) -> Iterator[dict[Callable, Callable]]:  # The wrappers of a `Watch`
    "Forwards of `model` are run inside, and its units are shown to an observer."
    discovery.begin_pass()
    blocks = discovery.selection.blocks
    try:
        with forwards(model), hooked(blocks, observer, discovery.is_replaced), _eager():
            yield Watch(discovery, observer).wrappers
    finally: discovery.sources.forget_copies()


class _Eager:
    "Runs compiled code as the plain Python it was made of, as long as any thread is inside."
    lock,depth,stance = threading.Lock(),0,None


@contextmanager
def _eager() -> Iterator[None]:
    if 'torch._dynamo' not in sys.modules or not hasattr(torch.compiler, 'set_stance'):  # nothing has been compiled
        yield
        return
    with _Eager.lock:
        if _Eager.depth == 0:
            _Eager.stance = torch.compiler.set_stance('force_eager')
            _Eager.stance.__enter__()
        _Eager.depth += 1
    try: yield
    finally:
        with _Eager.lock:
            _Eager.depth -= 1
            if _Eager.depth == 0: _Eager.stance.__exit__(None, None, None)
