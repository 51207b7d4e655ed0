"""Where the numbers of a tensor come from: `Sources` finds the parameter that a tensor is a view or a copy of.

A `View` is a parameter or a part of one: an expert's slice, a transposed weight. It is known by its parameter, offset,
sizes and strides. `ViewRef` reads, scales and shifts it, as `WeightRef` does a whole one."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from .operations import Layout
from ..parallel.sharded import is_sharded, local, numbers_for
from ..units.weights import WeightRef

__all__ = ['Source', 'View', 'ViewRef', 'Copy', 'Sources']


@dataclass(frozen=True)
class Source:
    "A parameter that a tensor may come from, and the module that holds it."
    name: str  # The parameter's name, as in `named_parameters()`
    module: nn.Module
    attribute: str
    param: nn.Parameter
    unit: Any = None  # The unit whose layer holds it, if the model does not call the layer

    @property
    def now(self) -> nn.Parameter:
        "The parameter, or the gathered copy that is in its place."
        return self.module._parameters[self.attribute] if is_sharded(self.param) else self.param


@dataclass
class Copy:
    "A tensor that was computed from a view of a parameter, converted or multiplied by a number."
    ref: TensorWeakRef
    original: Tensor  # The view, or another copy
    factor: Any  # The number, or a tensor of one
    of: View  # The elements that it is a copy of, in its own shape

    @torch.no_grad()
    def refresh(self) -> None:
        "Compute it again, once the parameter has changed."
        if self.of.copy is not None: self.of.copy.refresh()
        if (copy := self.ref()) is not None: copy.data.copy_(self.original.detach()*self.factor)


@dataclass(frozen=True)
class View:
    "Elements of a parameter, in the order that an operation sees them."
    source: Source
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    copy: Copy | None = field(default=None, compare=False)  # The copy that the operation was given, if it was one

    @property
    def tensor(self) -> Tensor: return self.source.now.data.as_strided(self.size, self.stride, self.offset)

    @property
    def recipe(self) -> tuple: return self.source.name, self.offset, self.size, self.stride

    @property
    def count(self) -> int: return math.prod(self.size)

    @property
    def whole(self) -> bool: return self.count == self.source.param.numel()

    @property
    def end(self) -> int:
        "The element after its last."
        return self.offset + sum((n - 1)*s for n, s in zip(self.size, self.stride)) + 1

    def once(self) -> View:
        "The view without the dimensions along which it repeats."
        size = tuple(1 if s == 0 else n for n, s in zip(self.size, self.stride))
        return View(self.source, self.offset, size, self.stride, self.copy)

    def flat(self) -> View:
        "The view, of a bias, without the dimensions of one element."
        kept = [d for d, n in enumerate(self.size) if n > 1] or [len(self.size) - 1]
        size,stride = (tuple(of[d] for d in kept) for of in (self.size, self.stride))
        return View(self.source, self.offset, size, stride, self.copy)

    def key(self, dims: Iterable[int] = ()) -> Any:
        "Identifies the elements, and which of the dimensions are those in `dims`."
        steps = [(n, s) for n, s in zip(self.size, self.stride) if n > 1]
        named = [s for d in dims if self.size[d] > 1 for s in [self.stride[d]]]
        return id(self.source.param), self.offset, frozenset(steps), frozenset(named)

    def overlaps(self, other: View) -> bool:
        "Whether some element is in both."
        if self.end <= other.offset or other.end <= self.offset: return False
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
        first = self.offset - p.storage_offset()
        start = _place(first, p.shape, p.stride())
        parts = [':' if n == 1 else str(i) for i, n in zip(start, p.shape)]
        for n, s in zip(self.size, self.stride):
            if n == 1: continue
            d = next((d for d in range(p.dim()) if p.stride(d) == s and p.shape[d] > 1), None)
            if d is None or start[d] + n > p.shape[d]: return f'{first}:{self.end - self.offset + first} of all'
            parts[d] = ':' if n == p.shape[d] else f'{start[d]}:{start[d] + n}'
        while parts[-1] == ':': parts.pop()
        return ', '.join(parts)

    def index(self) -> int | None:
        "Its index if it is a slice along dimension 0, else `None`."
        p = self.source.param
        first = self.offset - p.storage_offset()
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
    return View(of.source, offset, tuple(t.shape), tuple(steps), copy)


class ViewRef(WeightRef):
    "A view of a parameter, as a weight or a bias that a unit is made of."
    def __init__(self,
        view: View,
        layout: Layout | None = None  # What its dimensions are for; `None` for a bias, of one dimension
    ):
        self.view,self.layout = view,layout or Layout((0,), (), (), (0,), -1)
        super().__init__(view.source.module, view.source.attribute)
        self.has_setter = False

    @property
    def value(self) -> nn.Parameter: return self.view.source.param

    @property
    def tensor(self) -> Tensor: return self.layout.of(self.view.tensor)

    @property
    def key(self) -> Any: return self.view.key()

    def own_grad(self, grad: Tensor) -> Tensor:
        v,p = self.view,self.value
        if grad.stride() != p.stride(): grad = grad.new_empty_strided(p.shape, p.stride()).copy_(grad)
        return grad.as_strided(v.size, v.stride, grad.storage_offset() + v.offset - p.storage_offset())

    @property
    def matrices(self) -> Tensor:
        "The weight with its dimensions in this order: batch, output, input."
        l = self.layout
        return self.tensor.permute(*l.batch, *l.out, *l.fan_in)

    @property
    def shape(self) -> tuple[int, int, int]:
        "How many matrices, and the rows and columns of each."
        w,l = self.tensor,self.layout
        batch,out,cols = (math.prod(w.shape[d] for d in dims) for dims in (l.batch, l.out, l.fan_in))
        return batch*l.groups, out//l.groups, cols

    def rms_singular(self) -> float:
        n,rows,cols = self.shape
        return torch.linalg.vector_norm(self.tensor.float()).item()/(n*min(rows, cols))**0.5

    @property
    def _tensors(self) -> list[Tensor]:
        gathered = self.view.source.now is not self.shard
        return [*([self.tensor] if gathered else []), *([self.shard] if self.shard is not None else [])]

    @torch.no_grad()
    def mul(self, by: np.ndarray) -> None: self._write(Tensor.mul_, torch.ones, by)

    @torch.no_grad()
    def add(self, by: np.ndarray) -> None: self._write(Tensor.add_, torch.zeros, by)

    def _write(self, change: Callable, empty: Callable, by: np.ndarray) -> None:
        for t in self._tensors:
            change(local(t), self._for_shard(change, empty, by) if t is self.shard else self._by_channel(by, t))

    def _for_shard(self, change: Callable, empty: Callable, by: np.ndarray) -> Tensor:
        "The numbers for what this rank holds of the parameter: 1 or 0 outside the view."
        p = self.shard
        all_ = empty(p.shape, dtype=p.dtype, device=p.device)
        view = self.layout.of(all_.as_strided(self.view.size, self.view.stride, self.view.offset))
        change(view, self._by_channel(by, view))
        return numbers_for(p, all_)

    def _by_channel(self, by: np.ndarray, w: Tensor | None = None) -> Tensor | float:
        if by.size == 1: return by.item()
        w,dims = self.tensor if w is None else w,self.layout.channels
        if by.size != math.prod(w.shape[d] for d in dims):
            raise ValueError(f"per_channel: {self.view.name} does not hold a value for each of {by.size} channels; "
                             "pass per_channel=False, or leave it out with `modules`")
        return torch.from_numpy(by).reshape([n if d in dims else 1 for d, n in enumerate(w.shape)]).to(w)


class Sources:
    "Parameters that a tensor may come from."
    def __init__(self, sources: Iterable[Source]):
        self.by_id: dict[int, Source] = {}
        self.by_storage: dict[int, list[Source]] = {}
        self.sharded: list[Source] = []
        self.copies: dict[int, Copy] = {}
        self.matrices = False  # Whether some have two or more dimensions
        self.add(sources)

    def add(self, sources: Iterable[Source]) -> None:
        for s in sources:
            shard = is_sharded(s.param)
            if id(s.param) in self.by_id or not (shard or type(s.param) is nn.Parameter): continue
            self.by_id[id(s.param)] = s
            self.matrices |= s.param.dim() > 1
            if shard: self.sharded.append(s)
            else: self._stored(s)

    def _stored(self, s: Source) -> None:
        stored = self.by_storage.setdefault(s.now.untyped_storage()._cdata, [])
        if s not in stored: stored.append(s)

    def locate(self) -> None:
        "Note anew where the parameters are in memory. The recorder asks for it, as training may have moved them."
        self.by_storage = {}
        for h in self.by_id.values():
            if not is_sharded(h.param): self._stored(h)

    def _look_again(self) -> None:
        "Take in the gathered copies of sharded parameters."
        for s in self.sharded:
            if type(now := s.now) is not nn.Parameter or id(now) in self.by_id: continue
            self.by_id[id(now)] = s
            self._stored(s)

    def forget_copies(self) -> None: self.copies = {}

    def find(self, t: Any) -> View | None:
        "The elements of a parameter that `t` holds, as they are or as a copy; `None` if it holds others."
        if self.sharded: self._look_again()
        if type(t) is nn.Parameter:
            s = self.by_id.get(id(t))
            return View(s, t.storage_offset(), tuple(t.shape), t.stride()) if s is not None else None
        if type(t) is not Tensor: return None
        try: stored = self.by_storage.get(t.untyped_storage()._cdata)
        except RuntimeError: return None  # a sparse tensor has no storage
        if stored is not None:
            at = t.storage_offset()
            s = next((s for s in stored if 0 <= at - s.now.storage_offset() < s.now.numel()), None)
            return View(s, at, tuple(t.shape), t.stride()) if s is not None else None
        if not self.copies: return None
        base = t._base if t._is_view() else t
        c = self.copies.get(id(base))
        return _part(t, base, c) if c is not None and c.ref() is base else None

    def note(self,
        out: Any,  # What a function of `operations.COPIES` has returned
        args: tuple,  # What it was given
        factor: Callable[[tuple, Any], Any]  # The number it multiplies by, or `None`
    ) -> None:
        "Note `out` as a copy, if it is one of a view."
        if type(out) is not Tensor or not out.is_floating_point() or self.find(out) is not None: return
        for t in args[:2]:
            of,by = self.find(t),factor(args, t)
            if of is None or by is None or t.shape != out.shape: continue
            self.copies[id(out)] = Copy(TensorWeakRef(out), t.detach(), by, of)
            return
