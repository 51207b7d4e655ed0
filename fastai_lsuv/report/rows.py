"""A `Row` of the report, and what its status means: `STATUSES`."""
from __future__ import annotations

from dataclasses import dataclass

__all__ = ['Row', 'STATUSES', 'ADVICE', 'DONE', 'OUTSIDE', 'advice']

STATUSES = {
    'ok': "the last pass found it at its target",
    'no bias': "its std is at the target; it has no bias that could move the mean",
    'off': "its mean or std is still off the target after the last pass",
    'frozen': "its weight does not require grad, or was loaded or trained before",
    'tied': "another module uses the same weight",
    'constant': "its output does not vary: its input or its weight is zero",
    'unresponsive': "its output does not follow the scale of its weight; LSUV put the weight back",
    'alike': "the samples hardly differ, or differ by less than a norm layer's eps; LSUV did not correct the layer",
    'outlier': "one sample alone sets its std; LSUV did not correct the layer",
    'faint': "a norm layer's eps leaves next to nothing of its input; LSUV did not correct the layer",
    'not called': "the model did not call it; LSUV did not change its weight",
    'non-finite': "its output holds NaNs or infinities",
    'undone': "the training loss came out far worse; LSUV put the old weight back",
}
# What they mean in the report of `layer_stats`, where it is something else
_OF_STATS = {
    'off': "its std is not within 0.1 of 1",
    'outlier': "one sample alone sets its std",
    'not called': "the model did not call it",
}
# What to do about them
ADVICE = {
    'no bias': "This is normal where a norm layer follows.",
    'off': "Pass larger mini-batches, or raise `max_iter`.",
    'frozen': "Unfreeze it to initialize it. In a Learner, `learn.lsuv_init()` initializes weights that were loaded.",
    'tied': "This is normal for a decoder that shares the weight of an embedding.",
    'constant': "This is normal if the zeros are intended, as in the last layer of a residual branch.",
    'unresponsive': "Leave it out with `modules`.",
    'alike': "Pass a mini-batch whose samples differ.",
    'outlier': "Look at that sample, or pass a larger mini-batch.",
    'faint': "Look at the layers before it, or leave it out with `modules`.",
    'not called': "This is normal if the model does not use it in training.",
    'non-finite': "Look at the first layer with this status, and at what it is given.",
    'undone': "Leave layers out with `modules`, or give them another `target_std`.",
}
DONE = ('ok', 'no bias')
# Why a weight is in no row
OUTSIDE = {
    'embedding': "it is looked up or added, and no input is multiplied by it",
    'recurrent': "a recurrent layer applies it out of sight",
    'not selected': "`modules` does not select it",
    'not called': "the model did not use it",
    'vector': "it has one number a channel",
    'not linear': "no linear operation takes it directly: it is changed first, multiplied by a weight or gathered, say",
}


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


def advice(
    status: str,
    corrected: bool  # Whether LSUV has run, or only looked
) -> str:
    "What a status means and, where LSUV has run, what to do about it."
    if not corrected: return f'{_OF_STATS.get(status, STATUSES[status])}.'
    return f'{STATUSES[status]}. {ADVICE[status]}'
