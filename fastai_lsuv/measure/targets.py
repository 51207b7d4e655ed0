"""What the loops are to reach at a unit. A `Target` tells whether moments meet it, and which factor they need."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .doubts import mean_tolerance
from .loops import Loops
from .moments import Moments

__all__ = ['Target']

# With `per_channel`, one channel may be this many `batch_tol`s off while their mean is within one.
_ONE_CHANNEL = 5


@dataclass(frozen=True)
class Target:
    "What the loops are to reach at a unit."
    loops: Loops
    mean: float
    std: float
    tol: float  # Within the mini-batch in use
    batch_tol: float  # On a fresh mini-batch, as a share of `std`
    per_channel: bool

    @property
    def scales(self) -> bool:
        "Whether any loop aims at the std. `layer_stats` has no loops, and judges by the std."
        return not self.loops or any('std' in words for words in self.loops)

    @property
    def shifts(self) -> bool: return any('mean' in words for words in self.loops)

    @property
    def ends_with_mean(self) -> bool:
        "Whether the order leaves the mean at its target: a std loop after the last mean loop moves it again."
        return bool(self.loops) and 'mean' in self.loops[-1]

    def std_met(self, m: Moments) -> bool:
        "Whether the std is within `batch_tol` of its target; with `per_channel`, of most channels, and none far off."
        _,std = m.stats(self.per_channel)
        if not self.per_channel: return bool(std > 0 and abs(std/self.std - 1) <= self.batch_tol)
        off = abs(std/self.std - 1)
        return bool((std > 0).all() and off.mean() <= self.batch_tol and off.max() <= _ONE_CHANNEL*self.batch_tol)

    def met(self,
        m: Moments,
        can_shift: bool  # Whether there is a bias that moves the mean
    ) -> bool:
        if self.scales and not self.std_met(m): return False
        return not (self.ends_with_mean and can_shift) or self.mean_met(m)

    def misses_mean(self, m: Moments) -> bool:
        "Whether a loop aims at the mean, and that of the whole or of a channel is off by more than `batch_tol`."
        mean,_ = m.stats(self.per_channel)
        return self.shifts and bool((abs(mean - self.mean) > self.batch_tol*self.std).any())

    def gain(self, m: Moments) -> float:
        "The factor that brings the std to its target; the median over the channels that vary."
        if not self.scales: return 1.
        _,std = m.stats(self.per_channel)
        if not std.ndim: return float(self.std/std) if std > 0 else 1.
        varying = std[std > 0]
        return float(np.median(self.std/varying)) if varying.size else 1.

    def std_range(self) -> tuple[float, float] | None:
        "Where a std counts as at the target; `None` if no loop aims at it."
        return ((1 - self.batch_tol)*self.std, (1 + self.batch_tol)*self.std) if self.scales else None

    def mean_range(self, m: Moments) -> tuple[float, float] | None:
        "Where a mean, of so many samples, counts as at the target; `None` if no loop has the last word on it."
        reach = self._mean_reach(m)
        return (self.mean - reach, self.mean + reach) if self.ends_with_mean else None

    def mean_met(self, m: Moments) -> bool:
        "Whether the mean is as close to its target as so many samples can tell."
        mean,_ = m.stats(self.per_channel)
        off = abs(mean - self.mean)
        return bool((off.mean() if self.per_channel else off) <= self._mean_reach(m))

    def _mean_reach(self, m: Moments) -> float: return mean_tolerance(m.evidence, self.batch_tol)*self.std
