"""The rows of a report, made from the units once all passes are done."""
from __future__ import annotations

import math

from ..units.coverage import Coverage
from ..observe.discovery import unused_slices
from ..measure.moments import Moments
from ..run.passes import Passes
from .rows import Row
from ..units.status import Status
from ..units.units import Unit

__all__ = ['MeanStd', 'mean_std', 'rows_of', 'in_order']

MeanStd = tuple[float, float]


def in_order(passes: Passes) -> list[Unit]:
    "The units that ran in order of execution, then the others, unused slices of parameters among them."
    units = (*passes.units, *unused_slices(passes.discovery))
    return [*passes.order, *(u for u in units if u not in passes.order)]


def rows_of(
    passes: Passes,
    selected: bool,  # Whether `modules` selects some units, and not all
    before: dict[Unit, MeanStd] | None = None,  # What was measured before anything was done
    undone: bool = False  # Whether the weights were put back
) -> tuple[list[Row], Coverage]:
    "A row a unit, in order of execution, and what is in no row."
    units = in_order(passes)
    coverage = Coverage(passes.model, units, passes.discovery, selected)
    return [_row(u, coverage.weights_of(u), before or {}, undone) for u in units], coverage


def _row(u: Unit, weights: tuple[str, ...], before: dict[Unit, MeanStd], undone: bool) -> Row:
    unknown = float('nan'), float('nan')
    was,now,shape,mean_range = before.get(u),unknown,(),None
    if u.seen.latest is not None:
        m = u.judged()
        now,shape,mean_range = mean_std(m, u.target.per_channel),u.seen.latest.shape,u.target.mean_range(m)
    status,passes,gain = u.verdict(),u.passes,u.gain
    if undone and u.written: status,passes,gain,now = Status.UNDONE,0,1.,was or unknown
    return Row(u.name, u.kind, shape, *now, *(was or (None, None)), passes, status.value, gain, mean_range,
               u.target.std_range(), weights)


def mean_std(m: Moments, per_channel: bool) -> MeanStd:
    "Mean and std as two numbers; of channels, the mean of their means and the root mean square of their stds."
    mean,std = m.stats(per_channel)
    return (float(mean.mean()), math.sqrt((std**2).mean())) if per_channel else (float(mean), float(std))
