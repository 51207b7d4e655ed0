"""The drawing that the plots of a recorder share: axes, colours, lines, labels.

The functions know nothing of the recorder. They draw arrays with a row for each record and a column for each layer.
`matplotlib` is imported when something is drawn, so that the package loads without it."""
from __future__ import annotations

from typing import Any

import numpy as np

from ..report.text import shortened

__all__ = ['FEW', 'new_axes', 'grid_of', 'depth_colors', 'draw_lines', 'draw_target', 'draw_histograms', 'outstanding',
           'color_bar_of_grid', 'color_bar_of_layers', 'title_of', 'wants_log']

FEW = 12  # Up to so many layers get a legend
_STYLES = '-', '--', '-.', ':'
_MARKERS = 'o', 's', '^'  # One for each layer that stands out
_NAMED_IN_BAR = 8  # Layers that a colour bar names
_LOG_ABOVE = 100.  # Positive values that differ by this factor get a logarithmic axis
_FAR = 4.  # A layer stands out where it is so many typical distances from the median
_TARGETS = {'mean': 0., 'std': 1.}


def title_of(stat: str, near_zero: float) -> str:
    "What a column holds, in words."
    return {'near_zero': f'share near zero (≤ {near_zero:g})', 'dead': f'dead share (≤ {near_zero:g} or std/10)',
            'grad_mean': 'gradient mean', 'grad_std': 'gradient std',
            'grad_zero': 'share of zero gradients'}.get(stat, stat)


def new_axes(
    ax: Any,  # Axes that the user gave, or `None`
    rows: int,
    cols: int,
    figsize: tuple[float, float]
) -> np.ndarray:
    "The given axes as an array of at least rows*cols, or those of a new figure."
    if ax is None:
        import matplotlib.pyplot as plt
        return plt.subplots(rows, cols, figsize=figsize, squeeze=False, layout='constrained')[1]
    axs = np.array(ax, dtype=object).reshape(-1)
    if len(axs) >= rows*cols: return axs
    raise ValueError(f"ax: got {len(axs)} axes; this plot draws on {rows*cols}")


def grid_of(n: int, ax: Any, figsize: tuple[float, float] | None) -> np.ndarray:
    "`n` axes: those of the user, or of a new figure, whose panels get smaller the more there are."
    cols, width, height = next(size[1:] for size in ((FEW, 4, 3.2, 1.8), (100, 8, 2., 1.2), (np.inf, 14, 1.4, 0.9))
                               if n <= size[0])
    cols = min(n, cols)
    rows = -(-n//cols)
    axs = new_axes(ax, rows, cols, figsize or (width*cols + 1, height*rows)).ravel()
    for a in axs[n:] if ax is None else ():
        a.axis('off')
    return axs[:n]


def depth_colors(n: int) -> np.ndarray:
    "A colour for each layer, dark for the first. Lightness grows with depth, so that they differ in grey too."
    import matplotlib.pyplot as plt
    return plt.get_cmap('viridis')(np.linspace(0, 0.9, n))


def wants_log(values: np.ndarray) -> bool:
    "Whether positive values differ so much that a linear axis hides the small ones."
    positive = values[np.isfinite(values) & (values > 0)]
    return len(positive) > 0 and positive.max() > _LOG_ABOVE*positive.min()


def outstanding(
    values: np.ndarray,  # (records, layers)
    log: bool  # Compare factors instead of differences
) -> list[int]:  # At most three, the farthest first
    "The layers that are far from the others, over most of the records."
    with np.errstate(all='ignore'):
        v = np.log(values) if log else values
        v = np.where(np.isfinite(v), v, np.nan)
        called = ~np.isnan(v).all(1)
        if not called.any(): return []
        v = v[called]
        away = np.abs(v - np.nanmedian(v, 1, keepdims=True))
        typical = 1.5*np.nanmedian(away, 1, keepdims=True)
        score = np.array([np.median(s[~np.isnan(s)]) if (~np.isnan(s)).any() else 0. for s in (away/typical).T])
    score = np.nan_to_num(score, posinf=1e9)
    return [int(i) for i in np.argsort(-score, kind='stable')[:len(_MARKERS)] if score[i] > _FAR]


def draw_lines(
    ax: Any,
    steps: list[int],
    values: np.ndarray,  # (records, layers)
    labels: list[str],  # Of the layers
    colors: Any,  # Of the layers
    thick: list[int]  # Layers that are drawn thick, marked and named
):
    "A line for each layer. Few layers differ in dashes too; of many, the thick ones get a legend below."
    from matplotlib.patheffects import Normal, Stroke
    few = len(labels) <= FEW
    for i, label in enumerate(labels):
        style = _STYLES[i % len(_STYLES)] if few else '-'
        marker = 'o' if len(steps) == 1 else None
        ax.plot(steps, values[:, i], style, color=colors[i], lw=1.4 if few else 0.8, label=label, marker=marker)
    for marker, i in zip(_MARKERS, thick):
        line = ax.lines[i]
        line.set(lw=2., marker=marker, markersize=5, markevery=max(1, len(steps)//8), markeredgecolor='black', zorder=3)
        line.set_path_effects([Stroke(linewidth=3.5, foreground='black'), Normal()])
    if thick:
        ax.legend(handles=[ax.lines[i] for i in thick], title='stand out', loc='upper center', frameon=False,
                  bbox_to_anchor=(0.5, -0.16), fontsize='small', title_fontsize='small')
    ax.spines[['top', 'right']].set_visible(False)


def draw_target(ax: Any, stat: str):
    "A dashed line at mean 0 or std 1, in front of the thin lines."
    if stat not in _TARGETS: return
    ax.axhline(_TARGETS[stat], color='black', ls=(0, (6, 4)), lw=0.9, zorder=2.5, label='_target')


def draw_histograms(
    ax: Any,
    counts: Any,  # (bins, records)
    records: list,  # Their steps are the horizontal axis
    bins: tuple[int, float, float],  # Number of bins, low and high end
    label: str,
    small: bool = False  # The panel has room for little
) -> Any:  # The image
    "Histograms over time, a column each."
    _, lo, hi = bins
    steps = records[0].step - 0.5, records[-1].step + 0.5
    image = ax.imshow(counts, origin='lower', aspect='auto', cmap='viridis', vmin=0, extent=(*steps, lo, hi))
    if small:
        ax.set(xticks=[], yticks=[])
        label = shortened(label, 26)
    elif lo < 0 < hi:
        ax.set_yticks([lo, 0, hi])
    ax.set_title(label, fontsize='x-small' if small else 'medium', pad=2 if small else None)
    return image


def color_bar_of_grid(axs: np.ndarray, image: Any):
    "A short colour bar for panels that have their own scales."
    height = axs[0].figure.get_size_inches()[1]
    bar = axs[0].figure.colorbar(image, ax=list(axs), pad=0.02, shrink=min(1., 4/height), ticks=image.get_clim())
    bar.set_ticklabels(['none', 'most'])
    bar.set_label('elements, log')


def color_bar_of_layers(axs: np.ndarray, labels: list[str], colors: np.ndarray):
    "A colour bar that names some layers, the first on top, as in a table."
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    n = len(labels)
    ticks = np.unique(np.linspace(0, n-1, _NAMED_IN_BAR).round().astype(int))
    mappable = plt.cm.ScalarMappable(plt.Normalize(-0.5, n-0.5), ListedColormap(colors))
    bar = axs.flat[-1].figure.colorbar(mappable, ax=axs.ravel().tolist(), pad=0.02)
    bar.ax.set_yticks(ticks, [labels[t] for t in ticks], fontsize='small')
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
