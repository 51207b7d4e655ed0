"""The rows of a report, made from the units once all passes are done."""
from __future__ import annotations

import math

from torch import nn

from ..measure import Moments, between_samples, first_tensor
from ..observe import unused_slices
from ..parallel import local
from ..report import Row
from ..statuses import DOUBTS, Status
from ..units import Coverage, Unit, layer_unit
from .passes import Passes

__all__ = ['MeanStd', 'advice', 'mean_std', 'rows_of']

MeanStd = tuple[float, float]
_UNKNOWN = float('nan'), float('nan')
# Below this share of variance between samples, plain networks with ReLU gain from mirrored weights, or lose nothing. In
# the study `benefit` (64 samples, three seeds) it is 0.02 to 0.04 in FitNet-4, 0.05 to 0.09 in a CNN of 8 layers, 0.04
# to 0.19 in one of 20, 0.06 to 0.17 in SqueezeNet; and 0.07 to 0.38 in residual networks and those with GELU or a norm.
_ALIKE = 0.1
_FEW = 4  # Fewer samples do not tell


def rows_of(
    passes: Passes,
    before: dict[Unit, MeanStd] | None = None,  # What was measured before anything was done
    undone: bool = False,  # Whether the weights were put back
    mirrors: bool = False  # Whether rows tell of the mirrored start
) -> tuple[list[Row], Coverage]:
    "One row per unit, in execution order, then those that did not run; and what is in no row."
    units = [*passes.units, *unused_slices(passes.discovery)]
    uncalled = _uncalled(passes, units)
    coverage = Coverage(passes.selection.named, [*units, *uncalled], passes.discovery.reshaped, _Why(passes))
    rows = [_row(u, coverage.weights_of(u), (before or {}).get(u), undone, mirrors) for u in [*units, *uncalled]]
    return rows, coverage


def advice(
    passes: Passes,
    rows: list[Row]  # Of the report
) -> str:
    "What may serve the model better: \"\" if there is nothing to say, or something is wrong that comes first."
    if any(r.status in (Status.NO_SIGNAL, Status.NON_FINITE, *DOUBTS) for r in rows): return ''
    c,out = passes.corrector,first_tensor(passes.output)
    normed = c.norms.normed or any('norm' in type(m).__name__.lower() for m in passes.model.modules())
    if normed or not c.norms.rectified or c.alike or not any(u.may_change for u in passes.units): return ''
    if out is None or out.dim() < 2 or not _FEW <= len(out) == c.samples: return ''
    share = between_samples(local(out.detach()))
    if not share < _ALIKE: return ''
    part = f'{share:.0%}'.replace('%', ' %') if share > .01 else 'less than 1 %'
    return (f"Samples become alike: {part} of the variance of the model's output is between samples. "
            "`preinit='mirrored'` may keep them apart.")


def _uncalled(passes: Passes, units: list[Unit]) -> list[Unit]:
    "Units for the layers that no operation used."
    used,transformed = {id(p) for u in units for p in u.parameters},passes.discovery.transformed
    found = []
    for name, m in passes.selection.layers:
        weight = getattr(m, 'out_proj', m).weight
        if id(weight) in used or id(weight) in transformed: continue
        u = layer_unit(name, m)
        passes.prepare(u)
        found.append(u)
    return found


class _Why:
    "Why a parameter is in no row: a key of `OUTSIDE`."
    def __init__(self, passes: Passes):
        self.discovery,self.by_user = passes.discovery,passes.selection.by_user

    def __call__(self, p: nn.Parameter) -> str:
        d = self.discovery
        source = d.sources.by_id.get(id(p))
        if id(p) in d.transformed: return 'in transform'
        if id(p) in d.declined or self.by_user and (source is None or source.layer is not None): return 'not selected'
        if source is not None and id(p) not in d.taken: return 'not called'
        if source is not None and p.numel() > max(p.shape) and 'embed' in source.attribute: return 'embedding'
        return ''


def _row(u: Unit, weights: tuple[str, ...], was: MeanStd | None, undone: bool, mirrors: bool) -> Row:
    now,shape,mean_range = _UNKNOWN,(),None
    if u.seen.latest is not None:
        m = u.judged()
        now,shape,mean_range = mean_std(m, u.target.per_channel),u.seen.latest.shape,u.target.mean_range(m)
    status,passes,gain = u.verdict(),u.passes,u.gain
    if undone and u.written: status,passes,gain,now = Status.UNDONE,0,1.,was or _UNKNOWN
    start = 'kept' if undone or not u.start else u.start
    return Row(u.name, u.kind, shape, *now, *(was or (None, None)), passes, status, gain,
               mean_range, u.target.std_range(), weights, start=start if mirrors else None)


def mean_std(m: Moments, per_channel: bool) -> MeanStd:
    "Mean and std as two numbers; of channels, the mean of their means and the root mean square of their stds."
    mean,std = m.stats(per_channel)
    return (float(mean.mean()), math.sqrt((std**2).mean())) if per_channel else (float(mean), float(std))
