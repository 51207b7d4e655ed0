"What parameters held before they were written; how tensors are copied, compared and put back; Ctrl-C, and gradients."
from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..parallel import local

__all__ = ['Weights', 'gradients_aside', 'uninterrupted', 'memory', 'copied', 'write_back', 'do_all']

_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # By the bytes that an element takes


class Weights:
    "What parameters held before they were written for the first time."
    def __init__(self): self.of: dict[int, tuple[Tensor, Tensor]] = {}  # Each parameter and its copy, by its id

    def keep(self, params: Iterable[Tensor]) -> None:
        "Copy those not kept yet."
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for p in params:
                if id(p) not in self.of and not is_lazy(p) and not p.is_meta: self.of[id(p)] = p,copied(local(p))

    def put_back(self, params: Iterable[Tensor] | None = None) -> None:
        "Write back those that differ: all that were kept, or these. Raise the first error, if any, after the last."
        which = self.of.keys() if params is None else {id(p) for p in params}
        # Two may share memory. The first has the older copy, so it is written last.
        do_all(lambda p, was: write_back(local(p), was), [kept for i, kept in reversed(self.of.items()) if i in which])

    def forget(self, params: Iterable[Tensor]) -> None:
        "Take what `params` hold now as final."
        for p in params: self.of.pop(id(p), None)


def do_all(do: Callable[..., Any], cases: Iterable[tuple]) -> None:
    "Call `do` with each of `cases`, unseen by autograd and Ctrl-C. Raise the first error, if any, after the last."
    first = None
    with uninterrupted(), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        for case in cases:
            try: do(*case)
            except BaseException as e: first = e if first is None else first
        if first is not None: raise first


@contextmanager
def uninterrupted() -> Iterator[None]:
    "Keep Ctrl-C waiting until the end. Do nothing outside the main thread, which alone gets it."
    handler,waiting = signal.getsignal(signal.SIGINT),[]
    waits = threading.current_thread() is threading.main_thread() and callable(handler)
    if waits: signal.signal(signal.SIGINT, lambda *args: waiting.append(args))
    try: yield
    finally:
        if waits: signal.signal(signal.SIGINT, handler)
        if waiting: handler(*waiting[0])


@contextmanager
def gradients_aside(params: Iterable[nn.Parameter]) -> Iterator[None]:
    "Take the gradients away inside, where a model may call `backward` by itself, and put the same tensors back."
    grads = [(p, 'grad', p.grad) for p in params if p.is_leaf]
    try:
        for p, *_ in grads: p.grad = None
        yield
    finally: do_all(setattr, grads)


def memory(t: Tensor) -> int:
    "Give the address of the memory that `t` is a view of: 0 if it is empty, the id of `t` if it has none of its own."
    try: return t.untyped_storage().data_ptr() if t.layout == torch.strided else id(t)
    except RuntimeError: return id(t)


def copied(t: Tensor) -> Tensor:
    "Copy `t`; an expanded one, once."
    return t.detach().clone() if (once := _once(t)) is None else once.clone().expand(t.shape)


def write_back(t: Tensor, was: Tensor) -> bool:
    "Write a copy back, unseen by autograd, unless `t` holds the same bits. Tell whether it was written."
    now,then = _once(t),_once(was)
    forms = {(v.layout, v.dtype, v.device, o is not None and (v.shape, o.shape)) for v, o in ((t, now), (was, then))}
    if len(forms) > 1 or t.layout == torch.sparse_coo: t.data = copied(was)
    elif now is None: t.data.copy_(was)
    elif torch.equal(_bits(now), _bits(then)): return False
    else: now.data.copy_(then)
    return True


def _bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view(_INTS[t.element_size()])


def _once(t: Tensor) -> Tensor | None:
    "View plain memory with each element once: an expanded dimension is of size 1. Of other memory give `None`."
    if t.layout != torch.strided or t.is_nested or t.is_quantized or t.is_conj() or t.is_neg(): return None
    if type(t) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(t): return None
    return t.detach()[tuple(slice(1 if n == 0 else None) for n in t.stride())] if 0 in t.stride() else t.detach()
