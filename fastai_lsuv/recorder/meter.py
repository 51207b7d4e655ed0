"""Measure one activation or gradient: mean, std, two counts and a histogram.

An `ActivationMeter` is called with a tensor and returns a `Measure`. `pool` joins the measures of several calls.
On the CPU, an activation is read in chunks that fit the cache, and the numbers come back as Python numbers.
On other devices, the numbers stay on the device as tensors, so that nothing waits for them.
`BinCounter` counts histogram bins on the CPU about four times as fast as `torch.histc`, with the same counts."""
from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..measure.moments import flat

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
    near_zero: int | float | Tensor  # Elements at or below `near_zero`; of a gradient, elements that are exactly 0
    dead: int | float | Tensor = 0  # Elements at or below `near_zero` or `DEAD_BELOW` std, whichever is less
    hist: Tensor | None = None  # Elements in each bin

    def scaled(self,
        n: int  # Elements of the whole activation
    ) -> Measure:  # The same mean and std, and the counts that the whole would have
        "An estimate for a whole activation from the measure of a part of it."
        by = n/self.n
        hist = None if self.hist is None else self.hist*by
        return Measure(n, self.mean, self.std, self.near_zero*by, self.dead*by, hist)


def pool(
    calls: Sequence[Measure]  # Measures of the calls of one layer, at least one
) -> Measure:
    "The measure of the elements of several calls together."
    if len(calls) == 1: return calls[0]
    n = sum(c.n for c in calls)
    mean = sum(c.mean*(c.n/n) for c in calls)
    within = sum(c.std**2*(c.n-1) for c in calls if c.n > 1)
    var = (within + sum((c.mean-mean)**2*c.n for c in calls))/max(n-1, 1)
    hist = None if calls[0].hist is None else torch.stack([c.hist for c in calls]).sum(0)
    return Measure(n, mean, var**0.5, sum(c.near_zero for c in calls), sum(c.dead for c in calls), hist)


class ActivationMeter:
    "Measures tensors, with one read of each where it can, and without waiting for the device."
    def __init__(self,
        near_zero: float,  # Count elements at or below this
        bins: tuple[int, float, float] | None = None,  # Number of bins, low and high end; `None`: no histogram
        sample: int | None = None  # Measure every so many-th sample of large activations; `None`: all
    ):
        self.near_zero = near_zero
        self.bins = bins
        self.sample = sample
        self.counter = None if bins is None else BinCounter(*bins)
        self.scratch = None

    def __call__(self,
        x: Tensor,  # An activation or a gradient, with at least one element
        grad: bool = False  # `x` is a gradient: count exact zeros, make no histogram
    ) -> Measure:
        "Measure `x`, in float32 at least."
        x = x.detach()
        if type(x) is not Tensor:
            x = x.as_subclass(Tensor)
        n = x.numel()
        if self.sample is not None and n > LARGE:
            x = x[::self.sample]
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        on_cpu = x.is_cpu and x.dtype == torch.float32
        measured = (self._measure_on_cpu if on_cpu else self._measure)(x, grad)
        return measured if measured.n == n else measured.scaled(n)

    def _measure(self, x: Tensor, grad: bool) -> Measure:
        "Measure on any device. `std_mean` uses Welford's method: exact wherever the mean is, in one read on a GPU."
        if x.numel() == 1:
            mean, std = x.reshape(()), torch.full((), _NAN, device=x.device)
        else:
            std, mean = torch.std_mean(x)
        if grad: return Measure(x.numel(), mean, std, (x == 0).sum(dtype=torch.float32))
        near_zero = (x <= self.near_zero).sum(dtype=torch.float32)
        # A NaN std fails the comparison, so that the threshold stays.
        threshold = torch.where(std*DEAD_BELOW < self.near_zero, std*DEAD_BELOW, self.near_zero)
        dead = (x <= threshold).sum(dtype=torch.float32)
        return Measure(x.numel(), mean, std, near_zero, dead, None if self.bins is None else torch.histc(x, *self.bins))

    def _measure_on_cpu(self, x: Tensor, grad: bool) -> Measure:
        """Measure on the CPU, where a number may be looked at as soon as it is there. `std_mean` takes ten reads' time.

        So take sums, chunk by chunk, and `std` (two reads) where the sums cannot be trusted."""
        x = flat(x)
        total, squares, near_zero, counts = 0., 0., 0, 0
        counter = None if grad else self.counter
        for chunk, to in self._chunks(x):
            total += float(chunk.sum().numpy())
            squares += float(torch.dot(chunk, chunk).numpy())
            # Comparisons are fast where they write floats.
            hits = torch.eq(chunk, 0., out=to) if grad else torch.le(chunk, self.near_zero, out=to)
            near_zero += int(hits.sum().numpy())
            if counter is not None and counter.exact and isfinite(total):
                counts += counter.count(chunk, to)
        mean, std = _mean_and_std(x, total, squares)
        dead = 0 if grad else self._dead_on_cpu(x, std, near_zero)
        hist = None if counter is None else counter.histogram(x, counts if isfinite(total) else None)
        return Measure(x.numel(), mean, std, near_zero, dead, hist)

    def _dead_on_cpu(self, x: Tensor, std: float, near_zero: int) -> int:
        "Count dead elements. Another read is needed only where the layer's own scale sets the threshold."
        if not DEAD_BELOW*std < self.near_zero: return near_zero
        return sum(int(torch.le(chunk, DEAD_BELOW*std, out=to).sum().numpy()) for chunk, to in self._chunks(x))

    def _chunks(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        "`x` (n,) in pieces that fit the cache, each with scratch memory of its size."
        n = x.numel()  # `len` of a tensor takes four times as long
        size = min(n, _CHUNK*min(torch.get_num_threads(), _MOST_THREADS))
        if self.scratch is None or self.scratch.numel() < size:
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
                self.scratch = torch.empty(size, dtype=torch.float32, device='cpu')
        return [(chunk, self.scratch[:chunk.numel()]) for chunk in (x.split(size) if n > size else (x,))]


def _mean_and_std(x: Tensor, total: float, squares: float) -> tuple[float, float]:
    "Mean and std from the sums of the elements and their squares; std from the elements where these lose digits."
    n = x.numel()
    mean = total/n
    if n == 1: return mean, _NAN
    var = (squares - total*mean)/(n-1)
    if _CENTRE_ABOVE*var > mean**2 and 1e-30 < squares < 1e38: return mean, var**0.5
    return mean, float(x.std().numpy())  # also where squares under- or overflow


class BinCounter:
    "Counts the bins of a histogram as `torch.histc` does, for finite float32 numbers on the CPU."
    def __init__(self,
        bins: int,  # Number of bins
        lo: float,  # Low end of the first bin
        hi: float  # High end of the last bin, which belongs to it
    ):
        self.bins = bins
        self.ends = lo, hi
        self.lo, self.hi = float(np.float32(lo)), float(np.float32(hi))
        self.bytes = None
        # Bins that float32 hardly tells apart are left to `histc`, and so are those at the ends of its range.
        finest = max(1e-30, 64*np.spacing(np.float32(max(-self.lo, self.hi))))
        self.exact = finest < (self.hi - self.lo)/bins < 1e30
        if not self.exact: return
        scale = np.float32(bins/(self.hi - self.lo))
        # Rounding must not bring the upper end into the last bin.
        while np.float32(self.hi - self.lo)*scale < bins:
            scale = np.nextafter(scale, np.float32(np.inf))
        self.scale = float(scale)

    def count(self,
        x: Tensor,  # (n,) of finite numbers
        to: Tensor  # (n,) of scratch memory
    ) -> Tensor:  # Counts, for `histogram` to read; those of several pieces add up
        """Count by bin, from 1 on. Bin 0 is below the range, and what is above it or at its end comes last.

        The numbers of up to 126 bins fit a byte. Pairs of elements are then counted, each as the one integer that two
        bytes make: half as many."""
        lo, hi = self.ends
        torch.clamp(x, lo - 0.5*(hi-lo)/self.bins, hi, out=to)
        if lo:
            to.sub_(lo)
        to.mul_(self.scale).floor_()
        if self.bins > _BINS_IN_A_BYTE: return torch.bincount(to.to(torch.int32).add_(1), minlength=self.bins+2)
        n = x.numel()
        pairs = self._bytes(n + n % 2)
        pairs[n:] = -1  # makes the last pair, if there is an odd number
        pairs[:n].copy_(to)
        return torch.bincount(pairs.add_(1).view(torch.int16), minlength=(self.bins+2)*256)

    def histogram(self,
        x: Tensor,  # All the elements
        counts: Tensor | None  # What `count` counted, piece by piece; `None` where an element is not finite
    ) -> Tensor:  # (bins,)
        "Elements in each bin."
        if counts is None or not self.exact: return torch.histc(x, self.bins, *self.ends)
        if self.bins <= _BINS_IN_A_BYTE:
            counts = counts.view(-1, 256).sum(1) + counts.view(-1, 256).sum(0)[:self.bins+2]
        # As in `histc`, the last bin holds its upper end. It is looked for only where something is there or above.
        if above := counts.numpy()[-1]:
            counts[-2] += above - np.count_nonzero(x.numpy() > np.float32(self.hi))
        return counts[1:-1]

    def _bytes(self, n: int) -> Tensor:
        "`n` bytes of scratch memory."
        if self.bytes is None or self.bytes.numel() < n:
            with torch.inference_mode(False):
                self.bytes = torch.empty(n, dtype=torch.int8, device='cpu')
        return self.bytes[:n]
