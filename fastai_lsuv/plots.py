"""The report as a picture: std and mean of each layer, before and after."""
from __future__ import annotations

from typing import Any, Sequence

import matplotlib.pyplot as plt

from .rows import DONE, Row
from .tables import has_baseline

__all__ = ['plot_rows']

_MARKED = 60  # More layers than this get a line without markers
_NAMED = 30  # More layers than this get numbers and no names
# The std axis spans at least this much around its middle, so that rounding does not look like trouble.
_LEAST_SPAN = 0.5


def plot_rows(
    rows: Sequence[Row],  # In order of execution
    corrected: bool,  # Whether LSUV has run, or only looked
    axs: Any,  # Two matplotlib axes, for std and mean; `None`: new ones
    figsize: tuple[float, float]  # Of the new figure, in inches
) -> Any:  # The two axes
    "Plot std and mean of each unit that ran."
    rows = [r for r in rows if r.status != 'not called']
    if axs is None: _,axs = plt.subplots(2, 1, figsize=figsize, sharex=True, layout='constrained')
    for ax, what in zip(axs, ('std', 'mean')): _plot(ax, what, rows, corrected)
    stds = [s for r in rows for s in (r.std, r.std_before) if s is not None and 0 < s < float('inf')]
    if stds and max(stds)/min(stds) > 20: axs[0].set_yscale('log')
    for ax in axs: _widen(ax)
    if len(rows) > _NAMED: axs[-1].set_xlabel('layer, in order of execution')
    else: axs[-1].set_xticks(range(len(rows)), [r.name for r in rows], rotation=60, ha='right', fontsize=7)
    axs[0].legend(fontsize=8)
    return axs


def _plot(ax: Any, what: str, rows: Sequence[Row], corrected: bool) -> None:
    "Plot one statistic: before, after, and a cross where a unit was not normalized."
    x,marker = range(len(rows)),'o' if len(rows) <= _MARKED else ''
    if has_baseline(rows):
        before = [getattr(r, what + '_before') for r in rows]
        ax.plot(x, before, color='tab:gray', marker=marker, ms=3, lw=1, label='before')
    after = [getattr(r, what) for r in rows]
    ax.plot(x, after, color='tab:blue', marker=marker, ms=3, lw=1.2, label='after' if corrected else what)
    bad = [i for i, r in enumerate(rows) if r.status not in DONE]
    if bad and corrected:
        ax.plot(bad, [after[i] for i in bad], ls='', marker='x', color='tab:red', label='not normalized')
    ax.set_ylabel(what)
    ax.grid(alpha=.3)


def _widen(ax: Any) -> None:
    "Make the axis span at least `_LEAST_SPAN`."
    low,high = ax.get_ylim()
    if ax.get_yscale() == 'linear' and high - low < _LEAST_SPAN:
        middle = (low + high)/2
        ax.set_ylim(middle - _LEAST_SPAN/2, middle + _LEAST_SPAN/2)
