"""Whether statistics mean anything: what they rest on decides whether a unit is corrected from them.

A mini-batch may lie. Where its samples are alike, a norm layer leaves rounding noise, and scaling that noise to std 1
ruins the network. Where one sample is far from the others, it alone sets the std. `doubt` tells both from the data."""
from __future__ import annotations

from enum import Enum

from .moments import Evidence, Moments

__all__ = ['Doubt', 'doubt', 'varies', 'mean_tolerance', 'ALIKE_SPREAD', 'ALIKE_SHARE']

# What is left of a float32 activation that does not vary, relative to its magnitude.
_NOISE = 1e-6
# One sample carries the std if it makes the std this many times what it is without that sample. Fewer than 16 samples
# differ more by chance, and more is asked of them. Fewer than 4 do not tell.
_CARRIED,_ENOUGH_SAMPLES,_FEW_SAMPLES = 3.,16,4
# A norm layer sees samples that are alike if its eps leaves less than this share of its output's variance,
ALIKE_SPREAD = 0.1
# and the samples differ by this share of their mean square.
ALIKE_SHARE = 0.01
# Behind such a norm layer, noise is what has to be scaled up by more than this.
_MOST_GAIN = 2.
# Standard errors that a mean may be off its target, at the most that samples can differ.
_ERRORS = 3.


class Doubt(str, Enum):
    "Why a statistic is no ground to correct from."
    ALIKE = 'alike'  # A norm layer before the unit sees samples that are alike
    OUTLIER = 'outlier'  # One sample carries the std


def doubt(
    evidence: Evidence,
    needed: float  # Factor that brings the std to its target
) -> str:  # A value of `Doubt`, or ""
    "Whether moments are no ground to correct a unit from, and why."
    n = evidence.samples
    if n >= _FEW_SAMPLES:
        carried = _CARRIED*max(1., _ENOUGH_SAMPLES/n)
        if (1 - evidence.top)*carried**2 < 1 - 1/n: return Doubt.OUTLIER.value
    return Doubt.ALIKE.value if evidence.norm < ALIKE_SPREAD and needed > _MOST_GAIN else ''


def varies(m: Moments, beside: Moments | None = None) -> bool:
    "Whether an activation varies by more than the rounding error of float32, in itself or `beside` what it is part of."
    _,std = m.stats()
    size = max(abs(o.mean).max() + o.var.max()**0.5 for o in ((m,) if beside is None else (m, beside)))
    return bool(std > _NOISE*size)


def mean_tolerance(evidence: Evidence, batch_tol: float) -> float:
    "How far a mean may be off on a fresh mini-batch, as a share of the std: `batch_tol` or its sampling error."
    return max(batch_tol, _ERRORS/evidence.samples**0.5)
