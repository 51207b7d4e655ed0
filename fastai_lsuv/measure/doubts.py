"""Whether statistics mean anything: what they rest on decides whether a unit is corrected from them.

A mini-batch may mislead. Where its samples are alike, a norm layer leaves rounding noise, and scaling that noise to
std 1 ruins the network. Where one sample is far from the others, it alone sets the std. Where a norm layer's eps
swallows its input, what follows sees next to nothing, until training makes it large. `doubt` tells these from the
data."""
from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .moments import Evidence, Moments, whole_moments
from ..parallel import any_rank, several_ranks
from ..statuses import Status

__all__ = ['doubt', 'varies', 'mean_tolerance', 'n_samples', 'samples_alike', 'between_samples', 'unusual',
           'ALIKE_SPREAD', 'ALIKE_SHARE']

# What is left of a float32 activation that does not vary, relative to its magnitude.
_NOISE = 1e-6
# One sample carries the std if it makes the std this many times what it is without that sample. Fewer than 16 samples
# differ more by chance, and more is asked of them. Fewer than 4 do not tell.
_CARRIED,_ENOUGH_SAMPLES,_FEW_SAMPLES = 3.,16,4
# A norm layer sees samples that are alike if both hold. Its eps leaves less than this share of its output's variance.
ALIKE_SPREAD = 0.1
# The samples differ by less than this share of their mean square.
ALIKE_SHARE = 0.01
# The samples of a mini-batch are alike if they differ by this share of its variance.
_ALIKE_INPUTS = 0.02
# They are unusual below this share. A remark harms less than a layer that is kept back.
_UNUSUAL_INPUTS = 0.05
# Behind such a norm layer, or where so few features of alike samples are measured, a larger factor scales up noise.
_MOST_GAIN,_FEW_FEATURES = 2.,64
# The largest factor that alike samples are trusted with,
_MOST_GAIN_ALIKE = 8.
# and that a unit needs behind a norm layer, from an orthonormal weight. Of 1,370 units of the networks in the tests,
# all but one need at most 21. A mean over 32x32 positions may need 32.
_MOST_GAIN_NORMED = 100.
# The std of an input that training normalizes, or leaves between 0 and 1, lies between these.
_LEAST_STD,_MOST_STD = 0.03,30.
# A mean may be this many standard errors off. The error assumes that the elements of a sample are all the same.
_ERRORS = 3.


def doubt(
    m: Moments,  # Of the unit's output
    needed: float,  # Factor that brings the std to its target
    rms_singular: Callable[[], float] = lambda: 1.,  # `Ref.rms_singular`; 1 of an orthonormal weight
    x: Tensor | None = None  # The output itself, if it is at hand
) -> str:  # One of `DOUBTS`, or ""
    "Why a unit must not be corrected from these moments."
    e = m.evidence
    if e.samples >= _FEW_SAMPLES:
        carried = _CARRIED*max(1., _ENOUGH_SAMPLES/e.samples)
        if (1 - e.top)*carried**2 < 1 - 1/e.samples: return Status.OUTLIER
    if needed <= _MOST_GAIN: return ''
    few,same = m.features < _FEW_FEATURES,False
    if not e.alike and x is not None: same = not any_rank(x.numel() > 0 and not _all_the_same(x))
    if not (e.spread < ALIKE_SPREAD or e.alike or same or e.normed and needed > _MOST_GAIN_NORMED): return ''
    needed *= rms_singular()  # as from an orthonormal weight
    if needed <= _MOST_GAIN: return ''
    if e.spread < ALIKE_SPREAD or same or e.alike and (few or needed > _MOST_GAIN_ALIKE): return Status.ALIKE
    return Status.FAINT if e.normed and needed > _MOST_GAIN_NORMED else ''


def varies(m: Moments, beside: Moments | None = None) -> bool:
    "Whether an activation varies by more than float32's rounding of it, or of `beside`, the output it is part of."
    _,std = m.stats()
    size = max(abs(o.mean).max() + o.var.max()**0.5 for o in ((m,) if beside is None else (m, beside)))
    return bool(std > _NOISE*size)


def mean_tolerance(evidence: Evidence, batch_tol: float) -> float:
    "How far a mean may be off on a fresh mini-batch, as a share of the std: `batch_tol` or its sampling error."
    return max(batch_tol, _ERRORS/evidence.samples**0.5)


def n_samples(
    batch: Any  # A tensor, or nested ones; the first tells
) -> int:
    "How many samples a mini-batch holds."
    return next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 1)


def samples_alike(
    batch: Any,  # A tensor, or nested ones; the first tells how many samples there are
    share: float = _ALIKE_INPUTS  # Of the variance, that alike samples differ by at most
) -> bool:
    "Whether the samples, of two at least, are alike in every tensor that has as many."
    leaves = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() and _is_plain(t)]
    n = len(leaves[0]) if leaves else 0
    return n > 1 and all(_alike(t, share) for t in leaves if len(t) == n)


def unusual(
    batch: Any  # A tensor, or nested ones; the first one of floats with two or more dimensions tells the scale
) -> str:  # Such as "its samples are alike", or ""
    "What sets a mini-batch apart from those that networks train on, in words."
    leaves = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() and _is_plain(t)]
    # Of several ranks, each holds a part of the mini-batch.
    says = ['it holds 1 sample'] if leaves and len(leaves[0]) == 1 and not several_ranks() else []
    if samples_alike(batch, _UNUSUAL_INPUTS): says.append("its samples are alike")
    x = next((t for t in leaves if t.is_floating_point() and t.dim() > 1 and t.numel() > 1), None)
    if x is not None:
        m = whole_moments(x)
        std = float(m.stats()[1])
        if doubt(m, 1.) == Status.OUTLIER: says.append("one sample alone sets its std")
        if not _LEAST_STD <= std <= _MOST_STD: says.append(f"its std is {std:.2g}")
    return ' and '.join(says)


def _all_the_same(t: Tensor) -> bool:
    "Whether all samples are equal. The first two tell most that are not."
    if t.dim() == 0 or len(t) < 2 or not torch.equal(t[0], t[1]): return False
    return bool((t == t[:1]).all())


def _is_plain(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_nested and not t.is_complex() and t.numel() > 0


def _alike(t: Tensor, share: float) -> bool:
    t = t.detach().as_subclass(Tensor)
    if not t.is_floating_point(): return _all_the_same(t)
    between = between_samples(t)
    return between <= share or between != between


def between_samples(
    t: Tensor  # (N, ...)
) -> float:  # NaN if it does not vary
    "The share of the variance that lies between samples. The rest is what all samples have in common."
    t = t.reshape(len(t), -1).float()
    t = t - t.mean()
    total = (torch.linalg.vector_norm(t)**2/t.numel()).item()
    return 1 - t.mean(0).square().mean().item()/total if total else float('nan')
