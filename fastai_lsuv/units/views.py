"""Where the numbers of a tensor come from: `Sources` finds the parameter that a tensor is a view or a copy of.

A `View` is a parameter or a part of one: an expert's slice, a transposed weight. It is known by its parameter, offset,
sizes and strides."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..parallel import is_sharded

__all__ = ['Layout', 'Source', 'View', 'Copy', 'Sources']


@dataclass(frozen=True)
class Layout:
    "What each dimension of a weight is for, and where the output holds the channels."
    out: tuple[int, ...]  # Dimensions that the output has and the input does not
    batch: tuple[int, ...]  # Dimensions that both have, with a matrix for each index
    fan_in: tuple[int, ...]  # Dimensions that the products are summed over
    channels: tuple[int, ...]  # Those of `out` or `batch` that hold the channels
    channel_dim: int  # Dimension of the output that holds the channels, counted from the end
    groups: int = 1  # A conv's groups: `out` holds this many, one after the other, each with inputs of its own
    split: int = 1  # A transposed conv's groups: dimension 0 is split into this many

    def of(self, w: Tensor) -> Tensor:
        "A weight with the dimensions that this layout describes."
        return w.unflatten(0, (self.split, -1)) if self.split > 1 else w


@dataclass(frozen=True)
class Source:
    "A parameter of the model, and the module that holds it."
    name: str  # The parameter's name, as in `named_parameters()`
    module: nn.Module
    attribute: str
    param: nn.Parameter
    layer: tuple[str, nn.Module] | None = None  # Name and module of the layer whose weight it is, if it is one

    @property
    def now(self) -> Tensor:
        "The parameter, or the gathered copy that is in its place during a forward."
        return self.module._parameters[self.attribute] if is_sharded(self.param) else self.param


@dataclass
class Copy:
    "A tensor that was computed from a view of a parameter, converted or multiplied by a number."
    ref: TensorWeakRef
    factor: float  # The number
    of: View  # The elements that it is a copy of, in its own shape


@dataclass(frozen=True)
class View:
    "Elements of a parameter, in the order that an operation sees them."
    source: Source
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    factor: float = field(default=1., compare=False)  # What the operation was given is so many times these elements

    @classmethod
    def whole_of(cls, source: Source) -> View:
        "All of a parameter. One that is sparse has no strides; it counts as one whose elements lie side by side."
        p = source.param
        if p.layout == torch.strided: return cls(source, p.storage_offset(), tuple(p.shape), p.stride())
        strides = tuple(math.prod(p.shape[d + 1:]) for d in range(p.dim()))
        return cls(source, 0, tuple(p.shape), strides)

    @property
    def count(self) -> int: return math.prod(self.size)

    @property
    def whole(self) -> bool: return self.count == self.source.param.numel()

    @property
    def end(self) -> int:
        "The element after its last."
        return self.offset + sum((n - 1)*s for n, s in zip(self.size, self.stride)) + 1

    def of(self, t: Tensor) -> Tensor:
        "The same elements of `t`, which is laid out as the parameter is."
        if t.layout != torch.strided or t.shape == self.size and t.stride() == self.stride: return t
        return t.as_strided(self.size, self.stride, t.storage_offset() + self.offset - self._first)

    @property
    def _first(self) -> int:
        p = self.source.param
        return p.storage_offset() if p.layout == torch.strided else 0

    def once(self) -> View:
        "The view without the dimensions along which it repeats."
        if 0 not in self.stride: return self
        size = tuple(1 if s == 0 else n for n, s in zip(self.size, self.stride))
        return View(self.source, self.offset, size, self.stride, self.factor)

    def flat(self) -> View:
        "The view, of a bias, without the dimensions of one element."
        kept = [d for d, n in enumerate(self.size) if n > 1] or [len(self.size) - 1]
        size,stride = (tuple(of[d] for d in kept) for of in (self.size, self.stride))
        return View(self.source, self.offset, size, stride, self.factor)

    def key(self, dims: Iterable[int] = ()) -> Any:
        "Identifies the elements, and which of the dimensions are those in `dims`."
        steps = frozenset((n, s) for n, s in zip(self.size, self.stride) if n > 1)
        named = frozenset(self.stride[d] for d in dims if self.size[d] > 1)
        return id(self.source.param), self.offset, steps, named

    def overlaps(self, other: View) -> bool:
        "Whether some element is in both."
        if self.source.param is not other.source.param: return False
        if self.end <= other.offset or other.end <= self.offset: return False
        if self.whole or other.whole: return True
        first = min(self.offset, other.offset)
        marks = torch.zeros(max(self.end, other.end) - first, dtype=torch.bool)
        marks.as_strided(self.size, self.stride, self.offset - first).fill_(True)
        return bool(marks.as_strided(other.size, other.stride, other.offset - first).any())

    @property
    def name(self) -> str:
        "The parameter's name, with an index if the view is a part of it: `experts.up[3]`, `qkv[:, 0:64]`."
        return self.source.name if self.whole else f'{self.source.name}[{self._index()}]'

    def _index(self) -> str:
        p = self.source.param
        first = self.offset - self._first
        start = _place(first, p.shape, p.stride())
        parts = [':' if n == 1 else str(i) for i, n in zip(start, p.shape)]
        for n, s in zip(self.size, self.stride):
            if n == 1: continue
            d = next((d for d in range(p.dim()) if p.stride(d) == s and p.shape[d] > 1), None)
            if d is None or start[d] + n > p.shape[d]: return f'{first}:{self.end - self._first}'
            parts[d] = ':' if n == p.shape[d] else f'{start[d]}:{start[d] + n}'
        while parts[-1] == ':': parts.pop()
        return ', '.join(parts)

    def index(self) -> int | None:
        "Its index if it is a slice along dimension 0, else `None`."
        p = self.source.param
        if p.layout != torch.strided: return None
        first = self.offset - self._first
        is_slice = p.dim() > 2 and p.is_contiguous() and self.count == p.stride(0) == self.end - self.offset
        return first//p.stride(0) if is_slice and first % p.stride(0) == 0 else None


def _place(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    "The index of the element at `offset` in memory."
    place = [0]*len(size)
    for d in sorted(range(len(size)), key=lambda d: -stride[d]):
        if size[d] > 1 and stride[d]: place[d],offset = divmod(offset, stride[d])
    return place


def _part(t: Tensor, base: Tensor, copy: Copy) -> View | None:
    """The elements that `t`, a view of the copy `base`, holds; `None` if the steps between them are not even.

    Of `w.half()[2, :, ::2]`, these are the elements of `w[2, :, ::2]`."""
    size,stride,of = base.shape,base.stride(),copy.of
    first = t.storage_offset() - base.storage_offset()
    start,steps = _place(first, size, stride),[]
    for n, s in zip(t.shape, t.stride()):  # from one element of `t` to the next, the indices in `base` change by `step`
        step = _place(s, size, stride) if n > 1 else [0]*len(size)
        last = _place(first + s*(n - 1), size, stride)
        if last != [i + (n - 1)*d for i, d in zip(start, step)]: return None
        steps.append(sum(d*in_source for d, in_source in zip(step, of.stride)))
    offset = of.offset + sum(i*in_source for i, in_source in zip(start, of.stride))
    return View(of.source, offset, tuple(t.shape), tuple(steps), copy.factor)


class Sources:
    "Parameters that a tensor may come from."
    def __init__(self, sources: Iterable[Source]):
        self.by_id: dict[int, Source] = {}
        self.by_storage: dict[int, list[Source]] = {}
        self.sharded: list[Source] = []
        self.copies: dict[int, Copy] = {}
        for s in sources: self._add(s)

    def _add(self, s: Source) -> None:
        if id(s.param) in self.by_id: return
        self.by_id[id(s.param)] = s
        if is_sharded(s.param): self.sharded.append(s)
        else: self._stored(s, s.param)

    def _stored(self, s: Source, t: Tensor) -> None:
        if type(t) is not nn.Parameter or t.layout != torch.strided: return
        stored = self.by_storage.setdefault(t.untyped_storage()._cdata, [])
        if s not in stored: stored.append(s)

    def locate(self) -> None:
        "Note anew where the parameters are in memory. The recorder asks for it, as training may have moved them."
        self.by_storage = {}
        for s in self.by_id.values():
            if not is_sharded(s.param): self._stored(s, s.param)

    def _look_again(self) -> None:
        "Take in the gathered copies of sharded parameters."
        for s in self.sharded:
            if (now := s.now) is s.param or self.by_id.get(id(now)) is s: continue
            self.by_id[id(now)] = s
            self._stored(s, now)

    def forget_copies(self) -> None: self.copies = {}

    def find(self, t: Any) -> View | None:
        "The elements of a parameter that `t` holds, as they are or as a copy; `None` if it holds others."
        if self.sharded: self._look_again()
        if isinstance(t, nn.Parameter):
            s = self.by_id.get(id(t))
            return View.whole_of(s) if s is not None else None
        if type(t) is not Tensor: return None
        try: stored = self.by_storage.get(t.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError): return None  # a sparse or nested tensor has no storage
        if stored is not None and not t.is_complex(): return self._view(t, stored)
        if not self.copies: return None
        base = t._base if t._is_view() else t
        c = self.copies.get(id(base))
        return _part(t, base, c) if c is not None and c.ref() is base else None

    def _view(self, t: Tensor, stored: list[Source]) -> View | None:
        at = t.storage_offset()
        for s in stored:
            now = s.now
            first = at - now.storage_offset()
            # The memory of a parameter that was given other memory may belong to another tensor by now.
            mine = now.untyped_storage()._cdata == t.untyped_storage()._cdata
            if mine and 0 <= first < max(now.numel(), 1):
                return View(s, first + s.param.storage_offset(), tuple(t.shape), t.stride())
        return None

    def note(self,
        out: Any,  # What a function of `COPIES` has returned
        args: tuple,  # What it was given
        factor: Callable[[tuple, Any], float | None]  # The number it multiplies by
    ) -> None:
        "Note `out` as a copy, if it is one of a view."
        if type(out) is not Tensor or not out.is_floating_point() or self.find(out) is not None: return
        for t in args[:2]:
            of = self.find(t)
            if of is None or t.shape != out.shape or (by := factor(args, t)) is None: continue
            of = View(of.source, of.offset, of.size, of.stride, by*of.factor)
            self.copies[id(out)] = Copy(TensorWeakRef(out), of.factor, of)
            return
