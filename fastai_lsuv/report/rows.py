"A `Row` of the report. `fastai_lsuv.statuses` says what its status means."
from __future__ import annotations

from dataclasses import dataclass

from ..statuses import ADVICE, DONE, OUTSIDE, STATUSES

__all__ = ['Row', 'STATUSES', 'ADVICE', 'DONE', 'OUTSIDE']


@dataclass(frozen=True)
class Row:
    "One unit, as the last pass found it."
    name: str  # As in `named_modules()`; of a weight that no layer applies, as in `named_parameters()`: `experts.up[3]`
    kind: str  # Class of the module
    shape: tuple[int, ...]  # Of its output; () if it was not called
    mean: float  # Of its output; with `per_channel`, the mean of the channels' means
    std: float  # Of its output; with `per_channel`, the root mean square of the channels' stds
    mean_before: float | None  # Before anything was done, if `baseline` or the loss was asked for
    std_before: float | None  # The same of its std
    passes: int  # Passes that changed its weight or bias, by giving it its start or by correcting it
    status: str  # A key of `STATUSES`
    gain: float = 1.  # Factor that its weight was scaled by, from the start that it was given
    mean_range: tuple[float, float] | None = None  # Where its mean counts as at the target; `None` if it had no target
    std_range: tuple[float, float] | None = None  # The same of its std
    weights: tuple[str, ...] = ()  # The parameters it speaks for, as in `named_parameters()`, its weight first
    # With a loss in `layer_stats`; `None` if that was not asked for, or if no gradient arrives
    grad_std: float | None = None  # Std of the loss's gradient at its output
    weight_grad: float | None = None  # Norm of the gradient at its weight, over the norm of the weight
    start: str | None = None  # With `preinit="mirrored"`: "mirrored", or "kept" where that does not hold
