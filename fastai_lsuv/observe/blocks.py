"""Blocks: modules that are measured as a whole, by hooks.

A block is a container that the user selected, such as the lesson-11 layer with its activation, or a layer with a
forward of its own or a computed weight. How its output follows its weight is not known, so it may be run again, with
other numbers in place of its weight and bias. Nothing is written to a parameter."""
from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterable, Iterator, Protocol

from torch import Tensor
from torch.utils._pytree import tree_map

from ..units import Plan, Refs, Unit, is_layer

__all__ = ['BlockObserver', 'hooked', 'cloned']

Again = Callable[[Refs, Plan], Any]  # What a block puts out with this weight, and its bias, changed by a plan


class BlockObserver(Protocol):
    "What is shown the blocks."
    changes: bool  # Whether it may run blocks again
    busy: bool  # Whether it is shown nothing at the moment: it runs a block again, say
    def observe_block(self, u: Unit, out: Any, again: Again, args: tuple) -> Any:
        "See the output of a block, which was called with `args`. Returns the output to go on with."


def cloned(inputs: Any) -> Any:
    "Nested `inputs` with each tensor copied."
    return tree_map(lambda o: o.clone() if isinstance(o, Tensor) else o, inputs)


@contextmanager
def hooked(
    blocks: Iterable[Unit],
    observer: BlockObserver,
    skips: Callable[[Unit], bool] = lambda u: False  # Whether a block is another unit after all
) -> Iterator[None]:
    "Forwards are run inside, with hooks on each block."
    handles = [h for u in blocks for h in _hooks(u, observer, skips)]
    try: yield
    finally:
        for h in handles: h.remove()


def _hooks(u: Unit, observer: BlockObserver, skips: Callable[[Unit], bool]) -> Iterator:
    m,inputs = u.module,[]
    # A container, or another's hook, may overwrite the input before the block runs again.
    copies = not is_layer(m) or bool(m._forward_pre_hooks)

    def keep_input(module, args, kwargs):
        if observer.busy: return
        inputs.append(cloned((args, kwargs)) if copies and observer.changes else (args, kwargs))
        u.called = True

    def observe(module, args, out):
        if observer.busy: return None
        kept = inputs.pop()
        if skips(u): return None

        def again(weight: Refs, plan: Plan) -> Any:
            args,kwargs = cloned(kept) if copies else kept
            shifted = u.bias.swapped(1., plan.shift) if u.can_shift else nullcontext()
            with weight.swapped(plan.gain), shifted: return m(*args, **kwargs)

        return observer.observe_block(u, out, again, kept[0])

    yield m.register_forward_pre_hook(keep_input, prepend=True, with_kwargs=True)
    yield m.register_forward_hook(observe)
