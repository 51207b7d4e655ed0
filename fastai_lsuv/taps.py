"What the recorder hangs on a model: hooks that measure each layer's output as it comes, without waiting for the device."
from __future__ import annotations

import sys
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .moments import first_tensor, flat

__all__ = ['Gauge', 'Taps', 'Record']

_NAN = float('nan')
_CHUNK = 2**18  # Elements that each thread (of up to four) measures at a time: with the scratch they need, they stay in a core's cache
_BINS_OF_PAIRS = 126  # With the two outside of the range, their numbers fit a signed byte
_CENTRE_ABOVE = 16.  # Where mean**2 exceeds this many variances, `E[x**2] - mean**2` loses digits


# ---- Measuring one activation ----

class Measure(NamedTuple):
    "What is known of one activation: Python numbers on the CPU, 0-dim tensors (which nobody waits for) on other devices."
    n: int
    mean: float | Tensor
    std: float | Tensor
    zeros: int | Tensor  # Elements at or below the threshold; of a gradient, elements that are exactly 0
    hist: Tensor | None  # Elements in each bin


def _pool(calls: list[Measure]) -> Measure:
    "Statistics of the elements of several calls together."
    if len(calls) == 1: return calls[0]
    n = sum(c.n for c in calls)
    mean = sum(c.mean*(c.n/n) for c in calls)
    within = sum(c.std**2*(c.n-1) for c in calls if c.n > 1)
    var = (within + sum((c.mean-mean)**2*c.n for c in calls))/max(n-1, 1)
    hist = None if calls[0].hist is None else torch.stack([c.hist for c in calls]).sum(0)
    return Measure(n, mean, var**0.5, sum(c.zeros for c in calls), hist)


class Gauge:
    "Measures tensors, with one read of each where it can, and without waiting for the device."
    def __init__(self,
        near_zero: float,  # Count elements at or below this
        bins: tuple[int, float, float] | None  # Number of bins, low and high end; `None`: no histogram
    ):
        self.near_zero,self.bins,self.scratch,self.bytes,self.scale = near_zero,bins,None,None,None
        if bins is None: return
        n,(lo,hi) = bins[0],(float(np.float32(b)) for b in bins[1:])
        # Bins that float32 hardly tells apart are left to `histc`, and so are those at the ends of its range.
        if not max(1e-30, 64*np.spacing(np.float32(max(-lo, hi)))) < (hi - lo)/n < 1e30: return
        scale = np.float32(n/(hi - lo))
        while np.float32(hi - lo)*scale < n: scale = np.nextafter(scale, np.float32(np.inf))  # or rounding brings the upper end into the last bin
        self.scale = float(scale)

    def __call__(self, x: Tensor, grad: bool = False) -> Measure:
        x = x.detach()
        if type(x) is not Tensor: x = x.as_subclass(Tensor)
        if x.dtype not in (torch.float32, torch.float64): x = x.float()
        if x.device.type == 'cpu' and x.dtype == torch.float32: return self._cpu(x, grad)
        if x.numel() == 1: mean,std = x.reshape(()),torch.full((), _NAN, device=x.device)
        else: std,mean = torch.std_mean(x)  # Welford's method: exact wherever the mean is, in one read on a GPU
        zeros = ((x == 0) if grad else (x <= self.near_zero)).sum(dtype=torch.float32)
        return Measure(x.numel(), mean, std, zeros, None if grad or self.bins is None else torch.histc(x, *self.bins))

    def _cpu(self, x: Tensor, grad: bool) -> Measure:
        """On the CPU a number may be looked at as soon as it is there, but `std_mean` takes ten reads' time.

        So take sums, chunk by chunk while it is in the cores' caches, and `std` (two reads) where they cannot be trusted."""
        x = flat(x)
        n,s,q,zeros,counts = x.numel(),0.,0.,0,0
        size = min(n, _CHUNK*min(torch.get_num_threads(), 4))
        if self.scratch is None or len(self.scratch) < size:
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
                self.scratch,self.bytes = (torch.empty(size + 1, dtype=d, device='cpu') for d in (torch.float32, torch.int8))
        for c in x.split(size) if n > size else (x,):
            to = self.scratch[:len(c)]
            s += float(c.sum().numpy())
            q += float(torch.dot(c, c).numpy())
            # Comparisons are fast where they write floats.
            zeros += int((torch.eq(c, 0., out=to) if grad else torch.le(c, self.near_zero, out=to)).sum().numpy())
            if self.scale is not None and not grad and isfinite(s): counts += self._count(c, to)
        mean = s/n
        var = (q - s*mean)/(n-1) if n > 1 else _NAN
        if _CENTRE_ABOVE*var > mean**2 and 1e-30 < q < 1e38: std = var**0.5
        else: std = float(x.std().numpy()) if n > 1 else _NAN  # also where squares under- or overflow
        hist = None
        if self.bins is not None and not grad: hist = self._hist(x, counts) if self.scale is not None and isfinite(s) else torch.histc(x, *self.bins)
        return Measure(n, mean, std, zeros, hist)

    def _count(self, x: Tensor, to: Tensor) -> Tensor:
        """Count the finite numbers `x` by bin, from 1 on; 0 is below the range, and what is above it or at its end comes last.

        Of up to 126 bins, whose numbers fit a byte, pairs of elements are counted, each as the one integer that two bytes make:
        half as many."""
        bins,lo,hi = self.bins
        torch.clamp(x, lo - 0.5*(hi-lo)/bins, hi, out=to)
        if lo: to.sub_(lo)
        to.mul_(self.scale).floor_()
        if bins > _BINS_OF_PAIRS: return torch.bincount(to.to(torch.int32).add_(1), minlength=bins+2)
        b = self.bytes[:len(x) + len(x) % 2]
        b[len(x):] = -1  # makes the last pair, if there is an odd number
        b[:len(x)].copy_(to)
        return torch.bincount(b.add_(1).view(torch.int16), minlength=(bins+2)*256)

    def _hist(self, x: Tensor, counts: Tensor) -> Tensor:
        "`histc` of finite numbers `x`, a sixth of the time: from what `_count` counted."
        bins,_,hi = self.bins
        if bins <= _BINS_OF_PAIRS: counts = counts.view(-1, 256).sum(1) + counts.view(-1, 256).sum(0)[:bins+2]
        # As in `histc`, the last bin holds its upper end. Looked for only where something is at it or above.
        if above := counts.numpy()[-1]: counts[-2] += above - np.count_nonzero(x.numpy() > np.float32(hi))
        return counts[1:-1]


# ---- The hooks ----

class _Hook:
    "Forward hook of layer `i`. A copied or pickled model carries hooks that do nothing."
    def __init__(self, taps: Taps | None = None, i: int = 0):
        self.take = taps and taps.take
        # Compiled models: leave the graph for the hook, so that it sees numbers. `torch.compile` has imported dynamo.
        if taps and 'torch._dynamo' in sys.modules: self.take = torch.compiler.disable(self.take)
        self.i = i
    def __call__(self, module, args, out):
        if self.take is not None: self.take(self.i, out)
    def __reduce__(self): return _Hook, ()


class Taps:
    "Hooks on layers, which measure what passes between `start` and `stop`, and the gradients of that."
    def __init__(self, modules: list[nn.Module], gauge: Gauge, grads: bool):
        self.modules,self.gauge,self.grads,self.handles,self.loss_scale,self.checked = modules,gauge,grads,[],None,False
        self.start(False)

    def attach(self): self.handles = [m.register_forward_hook(_Hook(self, i)) for i,m in enumerate(self.modules)]
    def detach(self):
        for h in self.handles: h.remove()
        self.handles,self.recording = [],False

    def start(self, recording: bool = True):
        self.recording = self.due = recording
        self.calls,self.grad_calls = [[[] for _ in self.modules] for _ in range(2)]

    def stop(self): self.recording = False

    def take(self, i: int, out: Any):
        if not self.recording: return
        x = first_tensor(out)
        if x is None or x.is_complex() or x.numel() == 0 or x.layout != torch.strided or x.is_nested: return
        self.calls[i].append(self.gauge(x))
        if self.grads and x.requires_grad:
            to = self.grad_calls[i]
            # A tensor of a subclass is a view of the layer's own, and would lose its hook to an in-place activation.
            if type(x) is not Tensor and x._is_view() and x._base.numel() == x.numel(): x = x._base
            x.register_hook(lambda g: to.append(self.gauge(g, grad=True)))

    def row(self) -> Record | None:
        "What was measured since `start`, still on the device; `None` if no layer was called."
        if not any(self.calls): return None
        kinds = [self.calls, self.grad_calls] if self.grads else [self.calls]
        pooled = [[_pool(c) if c else None for c in kind] for kind in kinds]
        ns = np.array([[m.n if m else 0 for m in kind] for kind in pooled]).T
        device = next((m.mean.device for m in pooled[0] if m and isinstance(m.mean, Tensor)), None)
        columns = [_column([m and m[j] for m in kind], device) for kind in pooled for j in (1, 2, 3)]
        if self.grads and self.loss_scale is not None:
            for c in columns[3:5]: c.div_(self.loss_scale.to(c.device))
        columns = [torch.stack(columns, 1)]
        if self.gauge.bins: columns.append(_column([m and m.hist for m in pooled[0]], device, self.gauge.bins[0]))
        return Record(ns, torch.cat(columns, 1))


def _column(values: list, device: torch.device | None, width: int = 0) -> Tensor:
    "One number (or `width` of them) per layer as a float32 tensor; NaN for layers that were not called."
    if device is None and not width: return torch.tensor([_NAN if v is None else v for v in values], dtype=torch.float32)
    none = torch.full((width,) if width else (), _NAN, device=device)
    return torch.stack([none if v is None else v.to(none) if isinstance(v, Tensor) else torch.full_like(none, v) for v in values])


@dataclass
class Record:
    "One recorded step: columns mean, std, elements near zero; the same of gradients; histogram bins."
    ns: np.ndarray  # (layers, 1), or (layers, 2) with gradients: how many elements were measured
    values: Tensor | np.ndarray  # (layers, columns): on the device until fetched
    epoch: int = 0
    step: int = 0
    phase: str = 'train'
    fetched: bool = False
    written: bool = False

    @staticmethod
    def merge(rows: list[Record]) -> Record:
        "Statistics of the elements of several rows together."
        if len(rows) == 1: return rows[0]
        v,ns = torch.stack([r.values for r in rows]),np.stack([r.ns for r in rows])
        counts,columns = torch.from_numpy(ns).to(v.device, v.dtype, non_blocking=True).unbind(-1),[]
        def called(j, k, n): return torch.where(n[..., None] > 0, v[..., j:k], 0.)
        for k,n in enumerate(counts):
            (mean,std,zeros),total = called(3*k, 3*k+3, n).unbind(-1),n.sum(0)
            m = (mean*n).sum(0)/total
            within = torch.where(n > 1, std.square()*(n-1), 0.).sum(0)
            columns += [m, ((within + ((mean-m).square()*n).sum(0))/(total-1).clamp(min=1)).sqrt(), zeros.sum(0)]
        return Record(ns.sum(0), torch.cat([torch.stack(columns, 1), called(len(columns), None, counts[0]).sum(0)], 1))
