"""Measure one activation or gradient: mean, std, two shares and a histogram.

On the CPU, an activation is read in chunks that fit the cache, and the numbers come back as Python numbers. On other
devices, the numbers stay there as tensors, so that nothing waits for them."""
from __future__ import annotations

from math import isfinite
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from ..measure import flat

__all__ = ['ActivationMeter', 'BinCounter', 'Measure', 'pool', 'DEAD_BELOW', 'LARGE']

DEAD_BELOW = 0.1  # An element counts as dead at or below this many std, where that is less than `near_zero`
LARGE = 2**18  # `sample` leaves activations of up to this many elements alone
_CHUNK = 2**18  # Elements that each thread measures at a time: they and their scratch memory fit the cache of a core
_MOST_THREADS = 4  # The size of a chunk grows with the number of threads up to here
_BINS_IN_A_BYTE = 126  # The numbers of up to so many bins, and of the two outside the range, fit a signed byte
_CENTRE_ABOVE = 16.  # Where mean**2 exceeds this many variances, `E[x**2] - mean**2` loses digits
_NAN = float('nan')


class Measure(NamedTuple):
    "What is known of one activation: Python numbers on the CPU, tensors without dimensions on other devices."
    n: int  # Number of elements
    mean: float | Tensor
    std: float | Tensor
    near_zero: float | Tensor  # Share at or below `near_zero`; of a gradient, share of exact zeros
    dead: float | Tensor = 0.  # Share at or below `near_zero` or `DEAD_BELOW` std, whichever is less
    hist: Tensor | None = None  # Elements in each bin


def pool(calls: Sequence[Measure]) -> Measure:
    "Join the measures of several calls of a layer into that of all their elements."
    if len(calls) == 1: return calls[0]
    n = sum(c.n for c in calls)
    mean,near_zero,dead = (sum(getattr(c, k)*(c.n/n) for c in calls) for k in ('mean', 'near_zero', 'dead'))
    within = sum(c.std**2*(c.n-1) for c in calls if c.n > 1)
    var = (within + sum((c.mean-mean)**2*c.n for c in calls))/max(n-1, 1)
    hist = None if calls[0].hist is None else torch.stack([c.hist for c in calls]).sum(0)
    return Measure(n, mean, var**0.5, near_zero, dead, hist)


def _at_least(n: int, memory: Tensor | None, dtype: torch.dtype) -> Tensor:
    "Give `memory`, or new memory where it holds fewer than `n` numbers."
    if memory is not None and memory.numel() >= n: return memory
    with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
        return torch.empty(n, dtype=dtype, device='cpu')


class ActivationMeter:
    "Measures tensors, with one read of each where it can, and without waiting for the device."
    def __init__(self,
        near_zero: float,  # Count elements at or below this
        bins: tuple[int, float, float] | None = None,  # Number of bins, low and high end; `None`: no histogram
        sample: int | None = None  # Measure every so many-th sample of large activations; `None`: all
    ):
        self.near_zero,self.bins,self.sample = near_zero,bins,sample
        self.counter = None if bins is None else BinCounter(*bins)
        self.scratch = None

    def __call__(self, x: Tensor, grad: bool = False) -> Measure:
        "Measure `x` in float32 at least. Of a gradient, count exact zeros and make no histogram."
        x = x.detach()
        if type(x) is not Tensor: x = x.as_subclass(Tensor)
        n = x.numel()
        if self.sample is not None and n > LARGE: x = x[::self.sample]
        if x.dtype not in (torch.float32, torch.float64): x = x.float()
        m = (self._on_cpu if x.is_cpu and x.dtype == torch.float32 else self._on_device)(x, grad)
        return m if m.n == n else m._replace(n=n, hist=None if m.hist is None else m.hist*(n/m.n))

    def _on_device(self, x: Tensor, grad: bool) -> Measure:
        "Measure on any device. `std_mean` uses Welford's method: exact wherever the mean is, in one read on a GPU."
        if x.numel() == 1: std,mean = torch.full((), _NAN, device=x.device),x.reshape(())
        else: std,mean = torch.std_mean(x)
        if grad: return Measure(x.numel(), mean, std, (x == 0).mean(dtype=torch.float32))
        # A NaN std fails the comparison, so that the threshold stays.
        threshold = torch.where(std*DEAD_BELOW < self.near_zero, std*DEAD_BELOW, self.near_zero)
        near_zero,dead = ((x <= t).mean(dtype=torch.float32) for t in (self.near_zero, threshold))
        return Measure(x.numel(), mean, std, near_zero, dead, None if self.bins is None else torch.histc(x, *self.bins))

    def _on_cpu(self, x: Tensor, grad: bool) -> Measure:
        "Measure on the CPU by sums, chunk by chunk: `std_mean` takes ten reads' time."
        x = flat(x)
        n,total,squares,hits,counts = x.numel(),0.,0.,0,0
        counter = None if grad else self.counter
        for chunk, to in self._chunks(x):
            total += float(chunk.sum().numpy())
            squares += float(torch.dot(chunk, chunk).numpy())
            # Comparisons are fast where they write floats.
            is_hit = torch.eq(chunk, 0., out=to) if grad else torch.le(chunk, self.near_zero, out=to)
            hits += int(is_hit.sum().numpy())
            if counter is not None and counter.exact and isfinite(total): counts += counter.count(chunk, to)
        mean,std = _mean_and_std(x, total, squares)
        dead,threshold = 0 if grad else hits,DEAD_BELOW*std
        if not grad and threshold < self.near_zero:  # the layer's own scale sets the threshold
            dead = sum(int(torch.le(chunk, threshold, out=to).sum().numpy()) for chunk, to in self._chunks(x))
        hist = None if counter is None else counter.histogram(x, counts if isfinite(total) else None)
        return Measure(n, mean, std, hits/n, dead/n, hist)

    def _chunks(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        "Cut `x` (n,) into pieces that fit the cache, each with scratch memory of its size."
        n = x.numel()  # `len` of a tensor takes four times as long
        size = min(n, _CHUNK*min(torch.get_num_threads(), _MOST_THREADS))
        self.scratch = _at_least(size, self.scratch, torch.float32)
        return [(chunk, self.scratch[:chunk.numel()]) for chunk in (x.split(size) if n > size else (x,))]


def _mean_and_std(x: Tensor, total: float, squares: float) -> tuple[float, float]:
    "Take mean and std from the sums of elements and squares. Where these lose digits, read the elements twice for std."
    n = x.numel()
    mean = total/n
    if n == 1: return mean, _NAN
    var = (squares - total*mean)/(n-1)
    if _CENTRE_ABOVE*var > mean**2 and 1e-30 < squares < 1e38: return mean, var**0.5
    return mean, float(x.std().numpy())  # also where squares under- or overflow


class BinCounter:
    "Counts bins from `lo` to `hi` as `torch.histc` does, in a fourth of its time, for finite float32 numbers."
    def __init__(self, bins: int, lo: float, hi: float):
        self.bins,self.ends,self.bytes = bins,(lo, hi),None
        low,self.hi = float(np.float32(lo)),float(np.float32(hi))
        width = self.hi - low
        # Bins that float32 hardly tells apart are left to `histc`, and so are those at the ends of its range.
        self.exact = max(1e-30, 64*np.spacing(np.float32(max(-low, self.hi)))) < width/bins < 1e30
        if not self.exact: return
        scale = np.float32(bins/width)
        # Rounding must not bring the upper end into the last bin.
        while np.float32(width)*scale < bins: scale = np.nextafter(scale, np.float32(np.inf))
        self.scale = float(scale)

    def count(self, x: Tensor, to: Tensor) -> Tensor:
        """Count the bins of `x` (n,), with scratch memory `to`, for `histogram` to read. Counts of pieces add up.

        Bin 0 is below the range, and what is above it or at its end comes last. The numbers of up to 126 bins fit a
        byte. Pairs of elements are then counted, each as the one integer that two bytes make: half as many."""
        lo,hi = self.ends
        torch.clamp(x, lo - 0.5*(hi-lo)/self.bins, hi, out=to)
        if lo: to.sub_(lo)
        to.mul_(self.scale).floor_()
        if self.bins > _BINS_IN_A_BYTE: return torch.bincount(to.to(torch.int32).add_(1), minlength=self.bins+2)
        n = x.numel()
        self.bytes = _at_least(n + n % 2, self.bytes, torch.int8)
        pairs = self.bytes[:n + n % 2]
        pairs[n:] = -1  # makes the last pair, if there is an odd number
        pairs[:n].copy_(to)
        return torch.bincount(pairs.add_(1).view(torch.int16), minlength=(self.bins+2)*256)

    def histogram(self, x: Tensor, counts: Tensor | None) -> Tensor:
        "Count the elements in each bin, from what `count` counted, or `None` where an element is not finite."
        if counts is None or not self.exact: return torch.histc(x, self.bins, *self.ends)
        if self.bins <= _BINS_IN_A_BYTE:
            counts = counts.view(-1, 256).sum(1) + counts.view(-1, 256).sum(0)[:self.bins+2]
        # As in `histc`, the last bin holds its upper end. It is looked for only where something is there or above.
        if above := counts.numpy()[-1]: counts[-2] += above - np.count_nonzero(x.numpy() > np.float32(self.hi))
        return counts[1:-1]
