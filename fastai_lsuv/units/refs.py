"""What a unit is made of: a `Ref` reads, scales and shifts a weight or a bias, a `Property` what stands behind one.

A forward pass writes nothing. It runs with `Ref.scaled` tensors in place of weights where it must, and `Ref.mul` and
`Ref.add` write between passes. Of a sharded parameter, each rank writes its own slice."""
from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, Iterator, Union

import numpy as np
import torch
from torch import Tensor, nn

from ..parallel import any_rank, is_sharded, local, numbers_for, whole
from .views import Layout, View

__all__ = ['Ref', 'Property', 'Refs']

Factor = Union[np.ndarray, float]  # One number, or one a channel


def _one(v: Factor) -> float: return np.asarray(v).item()


class Ref:
    "A parameter, or a view of one."
    def __init__(self,
        view: View,
        layout: Layout | None = None  # What its dimensions are for; `None` for a bias
    ):
        self.view,self.layout = view,layout or Layout((0,), (), (), (0,), -1)

    @property
    def param(self) -> nn.Parameter: return self.view.source.param

    @property
    def tensor(self) -> Tensor:
        "The elements as they are now; of a sharded parameter, the gathered ones during a forward."
        return self.layout.of(self.view.of(self.view.source.now.data))

    @property
    def frozen(self) -> bool: return not self.param.requires_grad

    @property
    def key(self) -> Any: return self.view.key()

    def own_grad(self, grad: Tensor) -> Tensor:
        "The part of the parameter's gradient that is this view's."
        p = self.param
        if grad.stride() != p.stride(): grad = grad.new_empty_strided(p.shape, p.stride()).copy_(grad)
        return self.view.of(grad)

    @property
    def matrices(self) -> Tensor:
        "The weight with its dimensions in this order: batch, output, input."
        l = self.layout
        return self.tensor.permute(*l.batch, *l.out, *l.fan_in)

    @property
    def shape(self) -> tuple[int, int, int]:
        "How many matrices, and the rows and columns of each."
        l = self.layout
        size = (l.split, self.view.size[0]//l.split, *self.view.size[1:]) if l.split > 1 else self.view.size
        batch,out,cols = (math.prod(size[d] for d in dims) for dims in (l.batch, l.out, l.fan_in))
        return batch*l.groups, out//l.groups, cols

    def rms_singular(self) -> float:
        "Root mean square of the weight's singular values. All are 1 in an orthonormal weight. 1 if it is no matrix."
        n,rows,cols = self.shape
        if len(self.view.size) < 2 or not n*rows*cols: return 1.
        return whole(torch.linalg.vector_norm(self.tensor.float())).item()/(n*min(rows, cols))**0.5

    def is_zero(self) -> bool:
        "Whether all numbers are 0. Check one first; it usually decides. Every rank asks at once where it is sharded."
        now = self.view.source.now.detach()
        if is_sharded(now): return not any_rank(bool(local(now).any()))
        t = self.view.of(now)
        if t.layout != torch.strided: return False
        return t.numel() > 0 and not t[(0,)*t.dim()] and not t.any()

    def scaled(self, by: Factor, shift: Factor = 0.) -> Tensor:
        "The parameter's numbers with this view of them multiplied by `by`, then shifted: a new tensor."
        t = self.view.source.now.detach().clone()
        self.change(t, by, shift)
        return t

    @torch.no_grad()
    def mul(self, by: Factor) -> None: self._write(by, 0.)

    @torch.no_grad()
    def add(self, by: Factor) -> None: self._write(1., by)

    def _write(self, by: Factor, shift: Factor) -> None:
        p = self.param
        with torch.inference_mode() if p.is_inference() else torch.no_grad():
            if not is_sharded(p): self.change(p.data, by, shift)
            elif np.size(by) == np.size(shift) == 1 and self.view.whole:
                local(p).data.mul_(_one(by)).add_(_one(shift))
            else: self._write_slice(p, by, shift)

    def _write_slice(self, p: nn.Parameter, by: Factor, shift: Factor) -> None:
        "Write the numbers that this rank holds: 1 and 0 stand outside of the view."
        like = dict(dtype=p.dtype, device=p.device)
        factors,shifts = torch.ones(p.shape, **like),torch.zeros(p.shape, **like)
        self.change(factors, by, 0.)
        self.change(shifts, 1., shift)
        local(p).data.mul_(numbers_for(p, factors)).add_(numbers_for(p, shifts))

    def change(self, t: Tensor, by: Factor, shift: Factor) -> None:
        "Change, in `t`, the elements of this view."
        t = self.layout.of(self.view.of(t))
        if np.size(by) > 1 or _one(by) != 1.: t.mul_(self._by_channel(by, t))
        if np.size(shift) > 1 or _one(shift) != 0.: t.add_(self._by_channel(np.divide(shift, self.view.factor), t))

    def _by_channel(self, by: Factor, t: Tensor) -> Tensor | float:
        "One number, or one a channel, in a shape that broadcasts with `t`."
        if np.size(by) == 1: return _one(by)
        dims = self.layout.channels
        if t.dim() <= max(dims) or by.size != math.prod(t.shape[d] for d in dims):
            raise ValueError(f"per_channel: {self.view.name} does not hold a value for each of {by.size} channels; "
                             "pass per_channel=False, or leave it out with `exclude`")
        return torch.from_numpy(by).reshape([n if d in dims else 1 for d, n in enumerate(t.shape)]).to(t)

    @contextmanager
    def swapped(self, by: Factor, shift: Factor = 0.) -> Iterator[None]:
        "The module that holds the parameter runs inside with `scaled` numbers in its place."
        m,name,was = self.view.source.module,self.view.source.attribute,[]

        def swap(*args) -> None:
            was.append(m._parameters[name])
            m._parameters[name] = nn.Parameter(self.scaled(by, shift), requires_grad=was[0].requires_grad)

        def put_back(*args) -> None:
            while was: m._parameters[name] = was.pop()

        # A sharded parameter is gathered as the module begins to run. Only then can it be swapped.
        handles = [m.register_forward_pre_hook(swap), m.register_forward_hook(put_back, prepend=True)] \
            if is_sharded(self.param) else []
        try:
            if not handles: swap()
            yield
        finally:
            put_back()
            for h in handles: h.remove()


class Property:
    "A value behind a property of a module, as the lesson-11 `ConvLayer` has its bias: a number, or a tensor."
    frozen = False

    def __init__(self,
        owner: nn.Module,
        name: str  # Of the property: "weight" or "bias"
    ):
        self.owner,self.name = owner,name

    @property
    def value(self) -> Any: return getattr(self.owner, self.name)

    @property
    def tensor(self) -> Tensor | None: return v.detach() if isinstance(v := self.value, Tensor) else None

    @property
    def key(self) -> Any: return id(self.owner), self.name

    def rms_singular(self) -> float: return 1.

    def read(self) -> Any:
        "A copy of the value."
        return self.tensor.clone() if self.tensor is not None else self.value

    @torch.no_grad()
    def write(self, value: Any) -> None: setattr(self.owner, self.name, value)

    def mul(self, by: Factor) -> None: self.write(self._changed(by, 0.))
    def add(self, by: Factor) -> None: self.write(self._changed(1., by))

    def _changed(self, by: Factor, shift: Factor) -> Any:
        v = self.read()
        if not isinstance(v, Tensor): return v*self._number(by) + self._number(shift)
        return v*self._like(by, v) + self._like(shift, v)

    def _number(self, by: Factor) -> float:
        if np.size(by) == 1: return _one(by)
        raise ValueError(f"per_channel: {type(self.owner).__name__}.{self.name} is one number; pass per_channel=False, "
                         "or leave the module out with `exclude`")

    def _like(self, by: Factor, v: Tensor) -> Tensor | float:
        if np.size(by) == 1 or v.dim() == 0: return self._number(by)
        return torch.from_numpy(by).reshape(-1, *[1]*(v.dim() - 1)).to(v)

    @contextmanager
    def swapped(self, by: Factor, shift: Factor = 0.) -> Iterator[None]:
        "The module runs inside with the value multiplied and shifted."
        was = self.read()
        self.write(self._changed(by, shift))
        try: yield
        finally: self.write(was)


Refs = Union[Ref, Property]
