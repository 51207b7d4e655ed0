"The report as a picture: std and mean of each layer, before and after. `name_rows` is for the recorder's charts, too."
from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from .rows import DONE, Row
from ..text import shortened

__all__ = ['plot_rows', 'name_rows']

_MARKED = 60  # More layers than this get a line without markers
_NAMED = 50  # Rows that are named, of more
_LONGEST_NAME = 32  # Characters
_FAR = 20.  # Stds that differ from the target by more than this factor get a logarithmic axis
_BEFORE,_AFTER,_WRONG = '0.45', 'tab:blue', '#c2410c'


def plot_rows(
    rows: Sequence[Row],  # In order of execution
    corrected: bool,  # Whether LSUV has run, or only looked
    axs: Any = None,  # Two matplotlib axes, for std and mean; `None`: new ones
    figsize: tuple[float, float] | None = None  # Of the new figure, in inches; `None`: by the number of layers
) -> Any:  # The two axes
    "Plot std and mean of each unit that ran."
    rows = [r for r in rows if r.status != 'not called']
    own = axs is None
    if own:
        import matplotlib.pyplot as plt
        size = figsize or (9, min(max(2.6, 0.21*len(rows) + 1.3), 10))
        axs = plt.subplots(1, 2, figsize=size, sharey=True, layout='constrained')[1]
    wrong = [i for i, r in enumerate(rows) if r.status not in DONE] if corrected else []
    for ax, stat in zip(axs, ('std', 'mean')): _draw(ax, rows, stat, wrong, 'after' if corrected else 'as it is')
    names = [shortened(f'{r.name} {r.kind}'.strip(), _LONGEST_NAME) for r in rows]
    for ax in axs[:1] if axs[0].get_shared_y_axes().joined(*axs) else axs: name_rows(ax, names, wrong, _NAMED)
    for i in spaced(wrong, len(rows)):  # the status of what was not normalized, at the right end of its row
        place = 1.02, i, rows[i].status
        axs[1].text(*place, transform=axs[1].get_yaxis_transform(), va='center', fontsize=8, color=_WRONG)
    handles = dict(zip(*reversed([sum(both, []) for both in zip(*(a.get_legend_handles_labels() for a in axs))])))
    place = dict(loc='outside upper center', ncols=len(handles)) if own else dict(fontsize=8)
    (axs[0].figure if own else axs[0]).legend(handles.values(), handles.keys(), frameon=not own, **place)
    return axs


def _draw(ax: Any, rows: Sequence[Row], stat: str, wrong: list[int], now_is: str) -> None:
    "Draw one statistic: the range that it is to be in, how it was before, how it is after."
    y = np.arange(len(rows))
    ranges = np.array([getattr(r, f'{stat}_range') or (np.nan, np.nan) for r in rows]).reshape(-1, 2)
    if not np.isnan(ranges).all(): _draw_target(ax, y, ranges)
    now,was = (np.array([getattr(r, s) for r in rows], dtype=float) for s in (stat, f'{stat}_before'))
    _set_scale(ax, np.concatenate([now, was]), ranges[~np.isnan(ranges)], stat == 'std')
    style = dict(marker='' if len(rows) > _MARKED else 'o', ms=5, lw=1)
    if not np.isnan(was).all():
        ax.plot(was.clip(*ax.get_xlim()), y, color=_BEFORE, ls=(0, (2, 2)), mfc='white', label='before', **style)
    now = now.clip(*ax.get_xlim())
    ax.plot(now, y, color=_AFTER, label=now_is, **style)
    if wrong:
        cross = dict(ls='', marker='X', ms=6, mfc=_WRONG, mec='black', mew=.5, zorder=3, clip_on=False)
        ax.plot(np.nan_to_num(now[wrong], nan=ax.get_xlim()[1]), y[wrong], label='not normalized', **cross)
    ax.set(xlabel=stat, ylim=(max(len(rows), 1) - 0.5, -0.5))
    ax.grid(axis='x', alpha=.3)
    ax.spines[['top', 'right']].set_visible(False)


def _draw_target(ax: Any, y: np.ndarray, ranges: np.ndarray) -> None:
    "A dashed line at the target of each row, in a band of what counts as at it."
    edges = np.append(y - 0.5, y[-1:] + 0.5)  # each row is as high as its band
    low,high = (np.append(r, r[-1:]) for r in ranges.T)
    ax.fill_betweenx(edges, low, high, step='post', color='tab:green', alpha=.2, lw=0, label='within tolerance')
    ax.step((low + high)/2, edges, where='pre', color='black', ls=(0, (6, 4)), lw=.9, label='target')


def _set_scale(ax: Any, values: np.ndarray, allowed: np.ndarray, is_std: bool) -> None:
    "An axis that holds all values and the target with room around it, so that rounding does not look like trouble."
    v = values[np.isfinite(values)]
    target = allowed.mean() if allowed.size else float(is_std)
    if is_std:
        v = np.append(v[v > 0], [target/2, target*1.5, *allowed])
        low,high = v.min(), v.max()
        if high/low <= _FAR: ax.set_xlim(0, 1.1*high)
        else:
            ax.set(xscale='log', xlim=(low/1.5, 1.5*high))
            ax.xaxis.set_major_formatter('{x:g}')
        return
    reach = 1.1*np.abs([1., *(v - target), *(allowed - target)]).max()
    if reach > _FAR:
        reach *= 1.5
        ax.set_xscale('symlog', linthresh=1.)
        ax.xaxis.set_major_formatter('{x:g}')
    else: ax.locator_params(axis='x', nbins=5)
    ax.set_xlim(target - reach, target + reach)


def spaced(rows: Sequence[int], n: int, most: int = _NAMED) -> list[int]:
    "Those of `rows`, out of `n`, that there is room to write at, if there is room for `most` lines."
    found: list[int] = []
    for i in rows:
        if not found or i - found[-1] >= max(-(-n//most), 1): found.append(int(i))
    return found


def name_rows(
    ax: Any,
    labels: Sequence[str],  # Of all rows
    first: Sequence[int],  # Rows that are named in any case, in bold, as far as there is room
    most: int  # Names there is room for
) -> None:
    "Name the rows of a chart, or some where they are many."
    n = len(labels)
    gap,bold = max(-(-n//most), 1),spaced(first, n, most)
    ticks = sorted([*bold, *(t for t in range(0, n, gap) if all(abs(t - b) >= gap for b in bold))])
    ax.set_yticks(ticks, [labels[t] for t in ticks], fontsize=8 if n <= 12 else 7)
    for tick, text in zip(ticks, ax.get_yticklabels()):
        if tick in bold: text.set_fontweight('bold')
