"""What passes have seen of one unit: an `Observation` a pass, and `Observations`, those that still count.

`Unit` compares them with its target."""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .moments import Evidence, Moments, pool

__all__ = ['Observation', 'Observations', 'RECENT']

RECENT = 4  # Passes that are pooled where fresh mini-batches disagree


@dataclass
class Observation:
    "What one pass sees of a unit."
    by_channel: bool  # Whether the moments tell channels apart: biases differ, or each channel is normalized
    shape: tuple[int, ...] = ()  # Shape of the output, in the last call
    moments: list[Moments] = field(default_factory=list)  # Of each call's output, under the weights as they now are
    around: Evidence = Evidence()  # What this rank knows beside the output, in the last call

    @property
    def pooled(self) -> Moments: return pool(self.moments)

    @property
    def calls(self) -> int: return len(self.moments)


class Observations:
    "What passes have seen of a unit."
    def __init__(self): self.forget()

    def forget(self) -> None:
        self.now: Observation | None = None  # In this pass
        self.last: Observation | None = None  # In the last pass before this one that ran the unit
        self.earlier: list[Moments] = []  # What recent passes saw, under the weights as they now are
        self.comparable = True  # Whether what this pass sees can be pooled with what the next sees

    @property
    def latest(self) -> Observation | None: return self.now or self.last

    def begin_pass(self,
        fresh: bool,  # Whether the pass is on another mini-batch than the last one
        trusted: bool  # Whether what the last pass saw may be pooled with what comes
    ) -> None:
        if self.now is not None:
            if not fresh: self.earlier = []  # the same samples tell nothing more
            elif self.comparable and trusted: self.earlier.append(self.now.pooled)
            self.last = self.now
        self.now,self.comparable = None,True

    def recent(self) -> Moments:
        "What to correct from: the last pass, and from the third correction on, recent passes with it."
        m = self.latest.pooled
        before = [e for e in self.earlier[1 - RECENT:] if e.mean.shape == m.mean.shape]
        return pool([*before, m]) if len(before) > 1 else m

    def transform(self, scale: np.ndarray, shift: np.ndarray) -> None:
        "The unit now puts out `scale*x + shift` where it put out `x`."
        shape = self.now.moments[-1].mean.shape
        self.now.moments = [m.affine(scale, shift) for m in self.now.moments]
        self.earlier = [m.affine(scale, shift) for m in self.earlier if m.mean.shape == shape]
