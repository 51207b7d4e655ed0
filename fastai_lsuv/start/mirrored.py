"""The mirrored start: rows of a weight come in pairs `w, -w`, so that a network of rectifiers starts linear.

One of the two ReLUs behind a pair is open. The next layer takes the difference of the pair, and nothing is lost
(Balduzzi et al. 2017, arXiv 1702.08591). `SymmetryTest` finds where this holds in any model, by data: it puts noise,
whose neighbouring channels are opposite, in the place of each unit's output, and looks at what arrives at the next.

- Run 1 notes which units feed which, and their inputs.
- In run 2 all noise is negated. An input is paired if its neighbouring channels have swapped places.
- In run 3 all noise is three times as large. The difference of a pair must be, too. That of SELU is not."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..measure import first_tensor
from ..observe import NORMS, Use
from ..units import Plan, Ref, Unit
from .orthogonal import orthonormal

__all__ = ['Pairing', 'SymmetryTest', 'fill']

_FACTORS = 1., -1., 3.  # Of the noise in each run
_UNEVEN = 0.1  # Noise varies so much over an image. It varies little, so that pooling hardly bends differences
_LARGEST = 1.9  # Number in the noise, so that ReLU6 cuts off nothing
_TOL = 1e-4  # How far a swapped input is off at most, as a share of its largest number
_BENT = 0.13  # How far a difference is off at most, as a share: Mish 0.1; not ELU, 0.17, nor SELU, 0.24


@dataclass
class Pairing:
    "Which dimensions of a unit's weight are to come in pairs."
    rows: bool  # Whether neighbouring rows are opposite
    stride: int  # Columns of so many neighbouring inputs are opposite to those of as many next ones; 0 if none are


@dataclass
class _Seen:
    "What the runs show of a unit."
    unit: Unit
    noise: Tensor  # In the place of its output
    before: list[Unit]  # Those that ran before it
    free: bool  # Whether the unit's weight may come in pairs
    producers: set[Unit] = field(default_factory=set)  # Units whose outputs arrive at it
    inputs: list[Tensor | None] = field(default_factory=list)  # One a run, if it is called once
    kind: str = ''  # Of its input: a key of `_WHY`, or "rectified"
    stride: int = 0  # Channels between the two of a pair in its input


# Why nothing is mirrored, by kind of the inputs. The first that occurs tells.
_WHY = {
    'bent': "no activation between layers leaves the difference of a pair linear, as ReLU or GELU do",
    'odd': "there is no rectifier, such as ReLU or GELU, between layers",
    'unpaired': "no layer's input keeps the channels of the layer before it in pairs",
}


class SymmetryTest:
    "Puts noise in the place of outputs, and finds the units whose weights may come in pairs. It is an `Observer`."
    changes,in_graph = True,True

    def __init__(self):
        self.run,self.busy = 0,False
        self.seen: dict[Unit, _Seen] = {}
        self.leaves: dict[int, Unit] = {}  # By id of the noise
        self.generator = torch.Generator().manual_seed(0)  # the same on every rank, and nobody else's

    def __call__(self,
        show: Callable[..., Any]  # Runs the model, its units shown to an observer
    ) -> tuple[dict[Unit, Pairing], str]:  # The units that are mirrored; if there are none, why
        "Run the model three times, and say which units are mirrored."
        for self.run in range(len(_FACTORS)):
            with torch.set_grad_enabled(self.run == 0): show(self, self.wrappers)
        for s in self.seen.values(): _judge(s)
        pairings,kinds = self._pairings(),{s.kind for s in self.seen.values()}
        why = next((why for kind, why in _WHY.items() if kind in kinds), _WHY['unpaired'])
        return pairings, '' if pairings else why

    @property
    def wrappers(self) -> dict[Callable, Callable]:
        "Have norm layers pass on a scale that they would take away."
        factor = abs(_FACTORS[self.run])
        if factor == 1: return {}
        norms = [*NORMS, *([F.rms_norm] if hasattr(F, 'rms_norm') else [])]
        return dict.fromkeys(norms, lambda func, run, /, *args, **kwargs: run(*args, **kwargs)*factor)

    # ---- As an observer

    def observe(self, use: Use, out: Any) -> Any:
        u,b = use.unit,use.bias
        fixed = b is not None and u.bias is None and bool(b.any())  # a bias that cannot be set to zero
        return self._replace(u, out, use.input if use.rows is None else None, not fixed)

    def observe_block(self, u: Unit, out: Any, again: Callable, args: tuple) -> Any:
        w = u.weights[0] if u.weights else None
        own = isinstance(w, Ref) and w.view.source.module is u.module and w.view.source.attribute == 'weight'
        own = own and u.layer is u.module and (self.run > 0 or self._is_odd(u, out, again))
        return self._replace(u, out, args[0] if own and args else None, own)

    def _is_odd(self, u: Unit, out: Any, again: Callable) -> bool:
        "Whether a layer that computes its weight, as in weight standardization, negates its output with the weight."
        self.busy = True
        try: other = first_tensor(again(u.weight, Plan(-1.)))
        finally: self.busy = False
        x = first_tensor(out)
        if x is None or other is None or x.dim() < 2: return False
        twice_bias = (x + other).detach().movedim(u.channel_dim, 0).flatten(1)
        return bool((twice_bias - twice_bias[:, :1]).abs().max() <= _tol(x)*x.abs().max())

    def _replace(self,
        u: Unit,
        out: Any,
        given: Any,  # The input, if it is known
        free: bool  # Whether nothing but what is told by the unit keeps its weight from pairs
    ) -> Any:
        with torch._C.DisableTorchFunction():
            x = first_tensor(out)
            if x is None or x.is_nested or not x.is_floating_point() or x.dim() < 2: return out
            s = self.seen.get(u)
            if s is None and self.run == 0:
                s = self.seen[u] = _Seen(u, _noise(u, x, self.generator), list(self.seen), free and _is_free(u))
                self.leaves[id(s.noise)] = u
            if s is None: return out
            if self.run == 0: s.producers |= self._producers(s, x)
            same = s.noise.shape == x.shape
            s.inputs.append(given.detach().clone() if same and isinstance(given, Tensor) else None)
            if not same: return out
            new = s.noise*_FACTORS[self.run]
        return tree_map(lambda o: new if o is x else o, out)

    def _producers(self, s: _Seen, x: Tensor) -> set[Unit]:
        "The units whose noise an output `x` was computed from."
        found,done,todo = set(),set(),[x.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in done: continue
            done.add(node)
            u = self.leaves.get(id(getattr(node, 'variable', None)))
            if u is not None: found.add(u)
            if node.name().startswith('CheckpointFunction'): return set(s.before)  # it hides the units inside
            todo += [n for n, _ in node.next_functions]
        return found

    # ---- What holds

    def _pairings(self) -> dict[Unit, Pairing]:
        "Rows come in pairs where each unit that they feed takes pairs; columns where each that feeds them gives pairs."
        seen = self.seen
        consumers = {u: [c for c, s in seen.items() if u in s.producers] for u in seen}
        rows = {u for u, s in seen.items() if s.free and len(s.inputs) == len(_FACTORS) and u.weight.shape[1] % 2 == 0}
        columns,before = {u for u, s in seen.items() if s.free and s.kind in ('odd', 'rectified')},None
        while before != (len(rows), len(columns)):
            before = len(rows),len(columns)
            columns = {u for u in columns if seen[u].producers <= rows}
            rows = {u for u in rows if columns.issuperset(consumers[u])
                    and any(seen[c].kind == 'rectified' for c in consumers[u])}
        return {u: Pairing(u in rows, s.stride if u in columns else 0) for u, s in seen.items()
                if u in rows | columns and not u.zero_weight}


def _noise(u: Unit, x: Tensor, generator: torch.Generator) -> Tensor:
    "Noise of the shape of `x`, in which neighbouring channels are opposite."
    shape = [*x.movedim(u.channel_dim, 1).shape]
    pairs = (shape[1] + 1)//2
    noise = torch.randn(shape[0], pairs, *shape[2:], generator=generator)
    if u.channel_dim < -1:
        noise *= _UNEVEN
        noise += torch.randn(shape[0], pairs, *[1]*(len(shape) - 2), generator=generator)
    noise = noise.clamp(-_LARGEST, _LARGEST)
    noise = torch.stack([noise, -noise], 2).flatten(1, 2)[:, :shape[1]]
    return noise.movedim(1, u.channel_dim).to(x).requires_grad_()


def _judge(s: _Seen) -> None:
    "Note what kind of input a unit has."
    known = len(s.inputs) == len(_FACTORS) and all(x is not None and x.shape == s.inputs[0].shape for x in s.inputs)
    if known and not s.producers:
        if torch.equal(s.inputs[0], s.inputs[1]): return  # the model's own input
        s.producers = set(s.before)  # the graph was cut
    if not s.producers: return
    s.kind = 'unpaired'
    if not known or not isinstance(s.unit.weight, Ref): return
    n,each = _inputs(s.unit.weight)
    x,dim = s.inputs[0],s.inputs[0].dim() + s.unit.channel_dim
    if dim < 0 or x.shape[dim] != n*each: return
    strides = (k for k in range(1, each//2 + 1) if each % (2*k) == 0)
    s.stride = next((k for k in strides if _near(_swapped(x, dim, k), s.inputs[1])), 0)
    if not s.stride: return
    x,large = (t.float() - _swapped(t, dim, s.stride).float() for t in s.inputs[::2])
    off = min(((large - f*x).norm()/(f*x).norm()).item() for f in (_FACTORS[2], 1.))  # 1: a norm layer of its own
    s.kind = 'bent' if not off < _BENT else 'odd' if _near(-s.inputs[0], s.inputs[1]) else 'rectified'


def _is_free(u: Unit) -> bool:
    "Whether a unit's weight may come in pairs. One of zeros does."
    if u.left_alone or u.apart or not u.weights or not isinstance(u.weight, Ref): return False
    if u.layout.batch and u.layout.split == 1: return False  # a matrix for each index
    return not u.zero_weight or u.bias is None or not u.bias.tensor.any()


def _inputs(w: Ref) -> tuple[int, int]:
    "How many groups a weight has, and how many channels of the input each takes."
    return w.shape[0], w.tensor.shape[w.layout.fan_in[0]]


def _swapped(x: Tensor, dim: int, stride: int) -> Tensor:
    "`x` with neighbouring blocks of so many channels in each other's place."
    return x.unflatten(dim, (-1, 2, stride)).flip(dim + 1).flatten(dim, dim + 2)


def _tol(x: Tensor) -> float: return max(_TOL, 8*torch.finfo(x.dtype).eps)


def _near(x: Tensor, y: Tensor) -> bool: return bool((x - y).abs().max() < _tol(x)*x.abs().max())


@torch.no_grad()
def fill(
    u: Unit,
    pairing: Pairing
) -> None:
    "Give a unit orthonormal rows and columns in pairs, and a zero bias."
    w = u.weight
    n,each = _inputs(w)
    with torch.inference_mode() if w.param.is_inference() else torch.no_grad():
        part = w.matrices
        if not w.layout.batch: part = part.unflatten(0, (n, -1))
        _,rows,_,*kernel = part.shape
        rows,cols = rows//(1 + pairing.rows),each//(1 + bool(pairing.stride))
        size = part[0, 0, 0].numel()
        q = orthonormal(n*rows, cols*size, groups=n, dtype=part.dtype, device=part.device).view(n, rows, cols, *kernel)
        if pairing.stride:
            q = q.unflatten(2, (-1, pairing.stride))
            q = torch.stack([q, -q], 3).flatten(2, 4)
        if pairing.rows: q = torch.stack([q, -q], 2).flatten(1, 2)
        part.copy_(q)
        if u.bias is not None: u.bias.tensor.zero_()
