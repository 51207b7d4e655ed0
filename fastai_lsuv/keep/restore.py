"""What some objects hold is found, and put back so that it cannot half-fail.

`survey` goes through the attributes of objects, and what these hold, nearest first, and gives an `Item` for each thing
that can change. `put_back` takes items and writes those that have changed, one by one. An item that fails stops no
other; all that failed are named in one `RestoreError` at the end. Ctrl-C waits until then."""
from __future__ import annotations

import gc
import mmap
import signal
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .items import (HOOKS, ITEMS, ArrayItem, Attributes, FrozenSetItem, Item, ProxyItem, Slots, TensorItem, TupleItem,
                    memory, n_bytes)

__all__ = ['RestoreError', 'put_back', 'survey']

# Types of what cannot change.
_PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
_STEPS = 5  # How far down is looked from an attribute: a collection takes one step, a plain object two
_MOST_THINGS = 100_000  # So many are looked at, the nearest first; what lies beyond is left alone
_MOST_BYTES = 2**26  # Memory-mapped arrays, and arrays and tensors inside plain objects, are left alone above this size
_SHALLOW = ('_parameters', '_modules')  # `Copies` copies parameters; each module is surveyed by itself
_APART = HOOKS.union(_SHALLOW)
_OPENED,_NUMBERS,_FIXED = {Attributes, Slots},{TensorItem, ArrayItem},{TupleItem, FrozenSetItem, ProxyItem}

# Objects of these packages run threads, or stand for something outside. They are not opened.
_OPAQUE = {'asyncio', 'concurrent', 'contextlib', 'contextvars', 'ctypes', 'enum', 'functools', 'io',
           'logging', 'multiprocessing', 'numpy', 'pandas', 'pathlib', 'queue', 'socket', 'ssl', 'subprocess',
           'threading', 'unittest', 'weakref'}


class RestoreError(RuntimeError):
    "Names what had changed and could not be put back; `failed` holds where each was, and what was raised."
    def __init__(self, failed: list[tuple[str, BaseException]]):
        what = '; '.join(f'{where!r}: {_text(str, e)} ({type(e).__name__})' for where, e in failed)
        super().__init__(f'LSUV could not put back {what}. All else is as it was.')
        self.failed = failed


def put_back(
    items: Iterable[Item],  # What to put back, in this order
    beside: BaseException | None = None  # An exception on its way, which gets a note of what fails
) -> None:
    """Make all `items` hold what they held. Those that cannot are named in one `RestoreError`, once all others do.

    What interrupts a write, Ctrl-C say, is raised after the last item; the write is done once more."""
    failed,interrupt = [],None
    with _uninterrupted(), torch._C.DisableTorchFunctionSubclass():
        for item in items:
            for where, write in _repairs(item):
                try: write()
                except Exception as e: failed.append((_name(where), e))
                except BaseException as e:
                    interrupt = e
                    try: write()
                    except BaseException as again: failed.append((_name(where), again))
        first = beside if beside is not None else interrupt
        if failed and first is not None: _note(first, RestoreError(failed))
        elif failed: raise RestoreError(failed) from failed[0][1]
        if interrupt is not None: raise interrupt


def _repairs(item: Item) -> Iterable[tuple[Any, Callable[[], None]]]:
    """The writes that `item` needs. What cannot be compared counts as changed. If the writes cannot be found, one that
    raises the error stands for them."""
    try:
        if item.same(): return ()
    except Exception: pass
    try: return list(item.repairs())
    except Exception as e: return [(item.where, partial(_raise, e))]


def _raise(e: BaseException) -> None: raise e


def _note(e: BaseException, error: RestoreError) -> None:
    """Tell of `error` beside `e`, unless `e` says the same: in a note, where Python has notes, or as what was raised
    before it."""
    if str(e) == str(error): return
    if hasattr(e, 'add_note'): e.add_note(str(error))
    else: error.__context__,e.__context__ = e.__context__,error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    "Keep Ctrl-C waiting until the end."
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *args: waiting.append(args))
    try: yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting: handler(*waiting[0])


def _name(where: Any) -> str:
    "A place as it is written: 'down_blocks.0.config', 'log[3]'; a buffer goes by its own name."
    if isinstance(where, str): return where
    holder,key,is_attribute = where
    if isinstance(holder, tuple) and holder[1] == '_buffers': holder,is_attribute = holder[0],True
    holder = _name(holder)
    if not is_attribute: return f'{holder}[{_text(repr, key)}]'
    return f'{holder}.{key}' if holder else str(key)


def _text(f: Callable[[Any], str], v: Any) -> str:
    "`str` or `repr` of anything, whose own may fail."
    try: return f(v)
    except Exception: return f'<{type(v).__name__}>'


def survey(
    named: Iterable[tuple[str, Any]],  # Objects, and their names for error messages
    but: set[int] = frozenset(),  # Addresses of memory that is to keep what is written to it
    tensors: bool = True  # Whether to copy tensors and arrays, or only to remember which they were
) -> list[Item]:
    """Items for the attributes of objects, and for what is in them: collections, generators, tensors and arrays.

    Plain objects that a module holds are opened too: a tracker with a counter, and what it holds. What cannot be read
    is left alone."""
    s = _Survey(but, tensors)
    with torch._C.DisableTorchFunctionSubclass(), _no_collection():
        for name, o in named: s.begin(name, o)
        for _ in range(_MOST_THINGS):
            if not s.todo: break
            s.look(*s.todo.popleft())
    return s.items


@contextmanager
def _no_collection() -> Iterator[None]:
    "Keep the garbage collector, which thousands of new items would start again and again, from running."
    enabled = gc.isenabled()
    gc.disable()
    try: yield
    finally:
        if enabled: gc.enable()


class _Survey:
    "The items found so far, and the things yet to be looked at."
    def __init__(self, but: set[int], tensors: bool):
        self.but,self.tensors = but,tensors
        self.items: list[Item] = []
        self.kinds = _Kinds.fromkeys(_PLAIN, ())
        self.begun: set[int] = set()  # addresses of the objects whose attributes are remembered
        self.seen: dict[int, Any] = {}  # all else by its address; held, so that no address is used again
        self.todo: deque[tuple] = deque()  # (thing, place, steps left, whether objects are opened, whether in one)

    def begin(self, name: str, o: Any) -> None:
        "Remember the attributes of `o`, and look at what they hold."
        self.begun.add(id(o))
        item = Attributes(o, name)
        self.items.append(item)
        if not issubclass(type(o), nn.Module):  # unlike `isinstance`, it runs no code of the object's
            self.queue(name, item.was.items(), True, _STEPS, False, False)
            return
        inner = [e for e in item.was.items() if e[0] not in _APART]
        if issubclass(type(o), torch.jit.ScriptModule): inner += o._buffers.items()  # they lie outside Python
        self.queue(name, inner, True, _STEPS, True, False)
        for k in _SHALLOW: self.look(item.was.get(k), (name, k, True), 0, False, False)

    def look(self, v: Any, where: Any, steps: int, opens: bool, inside: bool) -> None:
        "Remember what `v` holds now, and look at what is in it."
        if id(v) in self.seen: return
        self.seen[id(v)] = v
        for kind in self.kinds[type(v)]:
            opened = kind in _OPENED
            if opened and (not opens or steps < 2 or id(v) in self.begun): continue
            try:
                if kind in _NUMBERS and self._left_alone(kind, v, inside): continue
                item = kind(v, where)
            except (MemoryError, torch.OutOfMemoryError): raise
            except Exception: continue
            if kind not in _FIXED: self.items.append(item)
            if steps and (inner := item.entries()):
                self.queue(where, inner, opened, steps - 1 - opened, opens, inside or opened)

    def queue(self, where: Any, inner: Iterable[tuple], is_attribute: bool, steps: int, opens: bool, inside: bool):
        "Note what is yet to be looked at: all but what cannot change."
        if len(self.todo) > _MOST_THINGS: return
        kinds,todo = self.kinds,self.todo
        for k, v in inner:
            if kinds[t := type(v)] and not (t is tuple and _PLAIN.issuperset(map(type, v))):
                todo.append((v, (where, k, is_attribute), steps, opens, inside))

    def _left_alone(self, kind: type[Item], v: Any, inside: bool) -> bool:
        "Whether a tensor or an array is not to be copied."
        if kind is TensorItem:
            if not self.tensors or is_lazy(v) or v.is_meta or memory(v) in self.but: return True
            return inside and n_bytes(v) > _MOST_BYTES
        if kind is ArrayItem:
            if not self.tensors or not v.flags.writeable: return True
            root = _root(v)
            if isinstance(root, Tensor): address,mapped = memory(root),False
            else: address,mapped = root.__array_interface__['data'][0],isinstance(root.base, mmap.mmap)
            return address in self.but or (inside or mapped) and v.nbytes > _MOST_BYTES
        return False


def _root(a: np.ndarray) -> Any:
    "The array whose memory `a` is a view of, or the tensor."
    while isinstance(a, np.ndarray) and isinstance(a.base, (np.ndarray, Tensor)): a = a.base
    return a


class _Kinds(dict):
    "How things of each type are remembered."
    def __missing__(self, t: type) -> tuple[type[Item], ...]:
        self[t] = _kinds(t)
        return self[t]


def _kinds(t: type) -> tuple[type[Item], ...]:
    "How things of type `t` are remembered; not at all if they are code, modules, or nothing that changes."
    if issubclass(t, (nn.Module, type)): return ()
    kinds = [k for base, k in ITEMS.items() if issubclass(t, base)][:1]
    if issubclass(t, Tensor) or not issubclass(t, np.ndarray) and _is_opaque(t): return tuple(kinds)
    if t.__dictoffset__: kinds.append(Attributes)
    if any(vars(c).get('__slots__') for c in t.__mro__): kinds.append(Slots)
    return tuple(kinds)


def _is_opaque(t: type) -> bool:
    packages = [str(c.__module__).split('.')[0] for c in t.__mro__]
    return packages[0] in ('builtins', 'torch') or not _OPAQUE.isdisjoint(packages)
