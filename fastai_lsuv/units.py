"""What is normalized: a `Unit` is a module whose output is measured, with the weight and the bias that it owns.

A `Unit` knows its name, its target, what passes have seen of it (`Observation`), what was done to it and why not.
`Unit.verdict` is the one place where a `Status` is decided. `selection` makes the units of a model, `passes` shows them
their output, `solvers` corrects them."""
from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from .evidence import doubt, mean_tolerance, varies
from .loops import Loops
from .moments import Moments, pool
from .sharded import Shards, class_of
from .status import DOUBTS, Status
from .weights import Parts, WeightRef, parts_of

__all__ = ['Target', 'Observation', 'Unit']

# Passes that are pooled where fresh mini-batches disagree.
_RECENT = 4
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
    def ends_with_mean(self) -> bool:
        "Whether the order leaves the mean at its target: a std loop after the last mean loop moves it again."
        return bool(self.loops) and 'mean' in self.loops[-1]

    @property
    def shifts(self) -> bool: return any('mean' in words for words in self.loops)

    def std_met(self, m: Moments) -> bool:
        "Whether the std is within `batch_tol` of its target; with `per_channel`, of most channels, and none far off."
        _,std = m.stats(self.per_channel)
        if not self.per_channel: return bool(std > 0 and abs(std/self.std - 1) <= self.batch_tol)
        off = abs(std[std > 0]/self.std - 1)
        return off.size > 0 and bool(off.mean() <= self.batch_tol and off.max() <= _ONE_CHANNEL*self.batch_tol)

    def std_range(self) -> tuple[float, float] | None:
        "Where a std counts as at the target; `None` if no loop aims at it."
        return ((1 - self.batch_tol)*self.std, (1 + self.batch_tol)*self.std) if self.scales else None

    def mean_range(self, m: Moments) -> tuple[float, float] | None:
        "Where a mean, of so many samples, counts as at the target; `None` if no loop has the last word on it."
        reach = mean_tolerance(m.evidence, self.batch_tol)*self.std
        return (self.mean - reach, self.mean + reach) if self.ends_with_mean else None

    def mean_met(self, m: Moments) -> bool:
        "Whether the mean is as close to its target as so many samples can tell."
        mean,_ = m.stats(self.per_channel)
        return bool(abs(mean - self.mean).mean() <= mean_tolerance(m.evidence, self.batch_tol)*self.std)


@dataclass
class Observation:
    "What one pass sees of a unit."
    by_channel: bool  # Whether the moments tell channels apart: biases differ, or each channel is normalized
    shape: tuple[int, ...] = ()  # Of the output, in the last call
    moments: list[Moments] = field(default_factory=list)  # Of each call's output, under the weights as they now are

    @property
    def pooled(self) -> Moments: return pool(self.moments)

    @property
    def repeated(self) -> bool: return len(self.moments) > 1


class Unit:
    """A module whose output is measured, with the weight and the bias that it owns.

    `weights.parts_of` says which these are."""
    is_module = True  # Whether a call of the module puts out what is measured
    apart = False  # Whether some ranks of `torch.distributed` may run it and others not

    def __init__(self,
        name: str,  # As in `named_modules()`
        module: nn.Module,
        parts: Parts | None = None  # What its output is made with; by default what `parts_of` finds
    ):
        self.name,self.module,self.kind = name,module,class_of(module).__name__
        parts = parts or parts_of(module)
        self.layer,self.channel_dim,self.affine = parts.layer,parts.channel_dim,parts.affine
        self.weights,self.bias = parts.weights,parts.bias
        self.shards = Shards.inside(parts.layer if parts.layer is not None else module)
        self.anothers_bias: WeightRef | None = None  # A bias that a unit before this one owns
        self.left_alone = 'frozen' if parts.frozen else ''
        self.target: Target | None = None
        # What passes see
        self.most_samples = sys.maxsize  # In the mini-batch: an operation may see their tokens side by side, as rows
        self.seen: Observation | None = None  # In this pass
        self.last: Observation | None = None  # In the last pass before this one that ran it
        self.history: list[Moments] = []  # Of recent passes, under the weights as they now are
        self.comparable = True  # Whether what this pass sees can be pooled with what the next sees
        # What is done, and why not
        self.passes = 0  # That changed the weight or the bias
        self.gain = 1.  # Factor of the weight since its start
        self.started = self.changed = self.written = False
        self.stale = False  # Other units have changed since it last ran
        self.reason = ''  # "unresponsive", "tied", "non-finite", or one of `DOUBTS`
        self.immovable = False  # The bias does not move the mean
        self.biases_differ: bool | None = None  # Whether the biases of its channels do; `None` until it is looked at

    def __repr__(self): return f'Unit({self.name!r}, {self.kind})'

    @property
    def refs(self) -> list[WeightRef]: return [*self.weights, *([self.bias] if self.bias else [])]

    @property
    def added(self) -> Tensor | None:
        "The bias that is in the output, whoever owns it."
        return getattr(self.layer, 'bias', None)

    @property
    def parameters(self) -> list[nn.Parameter]:
        "The parameters that may change with it."
        return [p for m in {self.module, self.layer} for p in m.parameters(recurse=m is self.layer)]

    @property
    def _layers_own(self) -> Iterable[nn.Parameter | None]: return self.layer._parameters.values()

    @property
    def can_shift(self) -> bool: return self.bias is not None and not self.immovable

    # ---- A pass

    def begin(self, fresh: bool = True) -> None:
        "Begin a pass, on another mini-batch than the last or (not `fresh`) on the same."
        if self.seen is not None:
            self.last = self.seen
            m = self.seen.pooled
            if self.comparable and not self.doubts(m): self.history.append(m)
            if not fresh: self.history = []  # the same samples tell nothing more
        self.seen,self.changed,self.comparable = None,False,True
        if self.reason in DOUBTS: self.reason = ''  # a fresh mini-batch may be better

    def forget(self) -> None:
        "Forget what passes have seen."
        self.seen = self.last = None
        self.history = []

    @property
    def latest(self) -> Observation | None: return self.seen or self.last

    def claim(self, owners: dict[Any, Unit]) -> bool:
        "Whether the unit may be changed: the first unit that runs with a weight or a bias owns it."
        if self.left_alone or self.reason in ('unresponsive', 'tied'): return False
        if not self.weights: self.reason = 'unresponsive'
        elif owners.setdefault(self.weights[0].key, self) is not self: self.reason = 'tied'
        if self.bias is not None and owners.setdefault(self.bias.key, self) is not self:
            self.anothers_bias,self.bias = self.bias,None
        return self.reason not in ('unresponsive', 'tied')

    def due(self) -> bool:
        "Whether to correct the unit now: in the first pass that runs it, and later if it is off its target."
        if self.last is None: return True
        return not (self.last.repeated or self.seen.repeated or self.met(self.judged()))

    def met(self, m: Moments) -> bool:
        "Whether these moments meet the target."
        if self.target.scales and not self.target.std_met(m): return False
        return not (self.target.ends_with_mean and self.can_shift) or self.target.mean_met(m)

    def recent(self) -> Moments:
        "What to correct from: the last pass, and from the third correction on, recent passes with it."
        m = self.latest.pooled
        before = [h for h in self.history[1 - _RECENT:] if h.mean.shape == m.mean.shape]
        return pool([*before, m]) if len(before) > 1 else m

    def judged(self) -> Moments:
        "What tells whether the target is met: the last pass, or recent passes where mini-batches keep disagreeing."
        m = self.latest.pooled
        return m if len(self.history) < _RECENT - 1 or self.met(m) else self.recent()

    def doubts(self,
        m: Moments,
        x: Tensor | None = None  # The output that they are of, if it is at hand
    ) -> str:
        "Why the unit is not to be corrected from these moments, or \"\"."
        _,std = m.stats(self.target.per_channel)
        size = self.weights[0].size if self.weights else lambda: 1.
        return doubt(m, self._needed(std) if self.target.scales else 1., size, x)

    def _needed(self, std: np.ndarray) -> float:
        "The factor that brings the std to its target; the median over the channels that vary."
        if not std.ndim: return float(self.target.std/std) if std > 0 else 1.
        varying = std[std > 0]
        return float(np.median(self.target.std/varying)) if varying.size else 1.

    def scaled(self, by: np.ndarray | float) -> None:
        "Note that the weight was multiplied by `by`."
        self.gain *= float(np.exp(np.mean(np.log(by))) if np.ndim(by) else by)

    def end(self) -> None:
        "End a pass."
        self.passes += self.changed
        self.written |= self.changed

    def finish(self) -> None:
        "Tell autograd, and all who look at a tensor's version, that the weights and biases have been written."
        if not self.written: return
        for t in {*self._layers_own, *(r.value for r in self.refs if not r.has_setter)}:
            if isinstance(t, Tensor) and not t.is_inference():
                torch.autograd.graph.increment_version(t)

    def verdict(self) -> Status:
        "What became of the unit, as the last pass found it."
        if self.latest is None: return Status.NOT_CALLED
        m = self.judged()
        if not m.finite(): return Status.NON_FINITE
        if not varies(m): return Status.CONSTANT
        why = self.left_alone or (self.reason if self.reason == 'tied' else '') or doubt(m, 1.)
        if why: return Status(why)
        if self.stale: return Status.OFF
        if not self.met(m): return Status(self.reason) if self.reason in ('unresponsive', *DOUBTS) else Status.OFF
        mean,_ = m.stats(self.target.per_channel)
        off = (abs(mean - self.target.mean) > self.target.batch_tol*self.target.std).any()
        return Status.NO_BIAS if self.target.shifts and off and not self.can_shift else Status.OK
