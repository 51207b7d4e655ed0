"""The plots of an `ActivationStatsRecorder`.

`StatsPlots` is the part of the recorder that draws. It reads a `RecordStore`, and its methods return the axes.
Layers are coloured by depth, from dark to light, so that the order shows in grey too. Few layers get a legend.
With many, a colour bar names some of them, and `outstanding` picks those that are drawn thick.
`matplotlib` is imported when something is drawn, so that the package loads without it."""
from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ..report import name_rows
from ..text import shortened
from .records import GRAD_COLUMNS, RecordStore

__all__ = ['StatsPlots']

_WIDTH = 9.  # Inches: a notebook shows so many at 100 dots each
_FEW = 12  # Up to so many layers get a legend
_STYLES = '-', '--', '-.', ':'
_NAMED_IN_BAR,_NAMED_ROWS = 8,32  # Layers that a colour bar names, and rows that `dead_chart` does
_LOG_ABOVE = 100.  # Positive values that differ by this factor get a logarithmic axis
_FAR = 4.  # A layer stands out where it is so many typical distances from the median
_DEAD = 0.9  # Rows of `dead_chart` above this share are always named
_TARGETS = {'mean': 0., 'std': 1.}
_TITLES = {'near_zero': 'share near zero (≤ {:g})', 'dead': 'dead share (≤ {:g} or std/10)',
           'grad_mean': 'gradient mean', 'grad_std': 'gradient std', 'grad_zero': 'share of zero gradients'}


class StatsPlots:
    "What an `ActivationStatsRecorder` shows in pictures."
    _store: RecordStore

    def plot_stats(self,
        stats: str | tuple[str, ...] = ('mean', 'std'),  # Columns of `df()`, a panel each
        phase: str = 'train',  # 'train' or 'valid'
        ax: Any = None,  # One axes for each of `stats`; default: a new figure
        figsize: tuple[float, float] | None = None  # Of the new figure, in inches; default: by the number of panels
    ) -> np.ndarray:  # The axes
        """Plot statistics of all layers over time, coloured by depth, with dashed lines at mean 0 and std 1.

        With more than twelve layers, those that stand out from the others are drawn thick and named below each panel.
        Raises `ValueError` for a column that was not recorded."""
        stats = self._known_stats(stats)
        records,labels = self._store.records(phase),self._labels
        few,rows = len(labels) <= _FEW,-(-len(stats)//3)
        axs = _axes(len(stats), 3, ax, figsize or (_WIDTH, 2.5*rows + (0.2*(len(labels)//2 + 1) if few else 0.5)))
        colors = depth_colors(len(labels))
        for a, stat in zip(axs, stats):
            values = self._store.values(records, stat)
            positive = values[np.isfinite(values) & (values > 0)]
            log = 'std' in stat and len(positive) > 0 and positive.max() > _LOG_ABOVE*positive.min()
            thick = [] if few else outstanding(values, log)
            _draw_lines(a, records, stat, self._title(stat), values, labels, colors, thick)
            if log: a.set_yscale('log')
        if not few: _bar_of_layers(axs, labels, colors)
        elif ax is None: axs[0].figure.legend(*axs[0].get_legend_handles_labels(), loc='outside lower center',
                                              ncols=2, frameon=False, fontsize='small')
        else: axs[-1].legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize='small')
        return axs

    def plot_layer_stats(self,
        i: int | str,  # Layer, by its place in `names` or by name
        ax: Any = None,  # Three axes; default: a new figure
        figsize: tuple[float, float] = (_WIDTH, 2.6)  # Of the new figure, in inches
    ) -> np.ndarray:  # The axes
        "Plot mean, std and share near zero of one layer over time."
        i,records = self._store.index(i),self._store.records('train')
        axs,label = _axes(3, 3, ax, figsize),self._labels[i]
        for a, stat in zip(axs, ('mean', 'std', 'near_zero')):
            values = self._store.values(records, stat)[:, i:i+1]
            _draw_lines(a, records, stat, self._title(stat), values, [label], ['C0'], [])
        if ax is None: axs[0].figure.suptitle(label)
        else: axs[0].set_title(f'{label}: mean')
        return axs

    def color_dim(self,
        i: int | str | None = None,  # Layer, by its place in `names` or by name; default: a grid of all layers
        figsize: tuple[float, float] | None = None,  # Of the new figure, in inches; default: by the number of layers
        ax: Any = None  # Axes to draw on: one, or for the grid one per layer; default: a new figure
    ) -> Any:  # The axes, or an array of them
        "Plot the 'colorful dimension': histograms (log counts, low values at the bottom) over time."
        self._store.need_histograms()
        records,(_,lo,hi) = self._store.records('train'),self._store.options.bins
        if i is not None:
            i,a = self._store.index(i),_axes(1, 1, ax, figsize or (_WIDTH, 3))[0]
            image = _draw_histograms(a, self.hist(i).numpy(), self._store.options.bins, records)
            a.set(xlabel='step', ylabel='activation')
            a.set_title(self._labels[i])
            a.figure.colorbar(image, ax=a, pad=0.02, label='log(1 + elements)')
            return a
        n = len(self._labels)
        cols,height = (3, 1.8) if n <= _FEW else (6, 1.1)
        axs = _axes(n, cols, ax, figsize or (_WIDTH, height*-(-n//cols) + 0.3))
        for j, a in enumerate(axs):
            _draw_histograms(a, self.hist(j).numpy(), self._store.options.bins, records, small=n > _FEW)
            room = int(a.figure.get_size_inches()[0]/cols*(10 if n <= _FEW else 13))
            a.set_title(shortened(self._labels[j], room), fontsize='small' if n <= _FEW else 'x-small', pad=3)
        _bar_of_counts(axs)
        if ax is None:
            axs[0].figure.supxlabel(f'step {records[0].step} to {records[-1].step}', fontsize='small')
            axs[0].figure.supylabel(f'activation, {lo:g} to {hi:g}', fontsize='small')
        return axs

    def dead_chart(self,
        phase: str = 'train',  # 'train' or 'valid'
        ax: Any = None,  # Axes to draw on; default: a new figure
        figsize: tuple[float, float] | None = None  # Of the new figure, in inches; default: by the number of layers
    ) -> Any:  # The axes
        """Plot the dead share of every layer (a row each) over time: what `diagnose` judges.

        An element is dead at or below `near_zero` or a tenth of the layer's std, whichever is less. Half of the
        numbers around zero are. With many layers, some are named: those that are mostly dead at the end, in bold, then
        every so many-th."""
        records,labels = self._store.records(phase),self._labels
        n,values = len(labels),self._store.values(records, 'dead').T
        a = _axes(1, 1, ax, figsize or (_WIDTH, min(max(2., 0.3*n + 1), 10)))[0]
        image = a.imshow(values, aspect='auto', cmap='magma', vmin=0, vmax=1, interpolation='nearest',
                         extent=(records[0].step-0.5, records[-1].step+0.5, n-0.5, -0.5))
        dead = [layer.can_die for layer in self._store.layers] & (np.nan_to_num(values[:, -1]) >= _DEAD)
        name_rows(a, labels, np.flatnonzero(dead), _NAMED_ROWS)
        a.set(xlabel='step', title=self._title('dead'))
        a.figure.colorbar(image, ax=a, pad=0.02, label='dead share')
        return a

    @property
    def _labels(self) -> list[str]: return [layer.label for layer in self._store.layers]

    def _title(self, stat: str) -> str: return _TITLES.get(stat, stat).format(self._store.options.near_zero)

    def _known_stats(self, stats: str | tuple[str, ...]) -> tuple[str, ...]:
        "Give `stats` as a tuple. Raises `ValueError` for a column that is not recorded."
        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        unknown = [s for s in stats if s not in self._store.columns]
        if not unknown and stats: return stats
        hint = ('' if {*unknown}.isdisjoint(GRAD_COLUMNS) else
                '; pass `grads=True` to ActivationStatsRecorder to record gradients')
        given = unknown[0] if unknown else stats
        raise ValueError(f"stats: got {given!r}; it takes {', '.join(self._store.columns)}{hint}")


def _draw_lines(ax: Any, records: list, stat: str, title: str, values: np.ndarray, labels: list[str], colors: Any,
                thick: list[int]):
    "Draw a line for each layer. Few layers differ in dashes too; of many, the `thick` ones get a legend below."
    steps,few = [r.step for r in records],len(labels) <= _FEW
    for i, label in enumerate(labels):
        ax.plot(steps, values[:, i], _STYLES[i % len(_STYLES)] if few else '-', color=colors[i], label=label,
                lw=1.4 if few else 0.8, marker='o' if len(steps) == 1 else None)
    for i in thick: ax.lines[i].set(lw=3., zorder=3)
    if thick: ax.legend([ax.lines[i] for i in thick], [shortened(labels[i], 30) for i in thick], title='stand out',
                        loc='upper center', bbox_to_anchor=(0.5, -0.2), fontsize='x-small', title_fontsize='x-small',
                        frameon=False)
    if stat in _TARGETS:
        ax.axhline(_TARGETS[stat], color='black', ls=(0, (6, 4)), lw=0.9, zorder=2.5, label='_target')
    ax.set_title(title, fontsize='medium')
    ax.set_xlabel('step', fontsize='small')
    ax.tick_params(labelsize='small')
    ax.spines[['top', 'right']].set_visible(False)


def _draw_histograms(ax: Any, counts: Any, bins: tuple[int, float, float], records: list, small: bool = False) -> Any:
    "Draw the histograms of a layer over time, a column each. A panel without counts says why. Returns the image."
    _,lo,hi = bins
    image = ax.imshow(counts, origin='lower', aspect='auto', cmap='viridis', vmin=0,
                      extent=(records[0].step - 0.5, records[-1].step + 0.5, lo, hi))
    words = 'not seen' if np.isnan(counts).all() else '' if np.nansum(counts) else f'nothing in {lo:g} to {hi:g}'
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha='center', va='center', fontsize='small',
            color='black' if words == 'not seen' else 'white')
    if small: ax.set(xticks=[], yticks=[])
    elif lo < 0 < hi: ax.set_yticks([lo, 0, hi])
    return image


def _axes(n: int, cols: int, ax: Any, figsize: tuple[float, float]) -> np.ndarray:
    "Give `n` axes: those of the user, or of a new figure, in rows of at most `cols`."
    if ax is not None:
        axs = np.array(ax, dtype=object).reshape(-1)
        if len(axs) >= n: return axs[:n]
        raise ValueError(f"ax: got {len(axs)} axes; this plot draws on {n}")
    import matplotlib.pyplot as plt
    cols = min(n, cols)
    axs = plt.subplots(-(-n//cols), cols, figsize=figsize, squeeze=False, layout='constrained')[1].ravel()
    for a in axs[n:]: a.axis('off')
    return axs[:n]


def depth_colors(n: int) -> np.ndarray:
    "Give a colour for each layer, dark for the first. Lightness grows with depth, so that they differ in grey too."
    import matplotlib.pyplot as plt
    return plt.get_cmap('viridis')(np.linspace(0, 0.9, n))


def outstanding(values: np.ndarray, log: bool) -> list[int]:
    "Find at most three layers that are far from the others over most records (records, layers), the farthest first."
    with np.errstate(all='ignore'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of medians of nothing but NaN
        v = np.log(values) if log else values
        v = np.where(np.isfinite(v), v, np.nan)
        away = np.abs(v - np.nanmedian(v, 1, keepdims=True))
        score = np.nan_to_num(np.nanmedian(away/np.nanmedian(away, 1, keepdims=True), 0)/1.5, posinf=1e9)
    return [int(i) for i in np.argsort(-score, kind='stable')[:3] if score[i] > _FAR]


def _bar_of_counts(axs: np.ndarray):
    "Put a short colour bar beside panels that have their own scales."
    import matplotlib.pyplot as plt
    figure = axs[0].figure
    bar = figure.colorbar(plt.cm.ScalarMappable(cmap='viridis'), ax=list(axs), pad=0.02, ticks=[0, 1],
                          shrink=min(1., 4/figure.get_size_inches()[1]))
    bar.set_ticklabels(['none', 'most'])
    bar.set_label('elements, log')


def _bar_of_layers(axs: np.ndarray, labels: list[str], colors: np.ndarray):
    "Put a colour bar beside the panels that names some layers, the first on top, as in a table."
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    n = len(labels)
    ticks = np.unique(np.linspace(0, n-1, _NAMED_IN_BAR).round().astype(int))
    mappable = plt.cm.ScalarMappable(plt.Normalize(-0.5, n-0.5), ListedColormap(colors))
    bar = axs[-1].figure.colorbar(mappable, ax=list(axs), pad=0.02, aspect=25*len(axs)**0.5)
    bar.ax.set_yticks(ticks, [shortened(labels[t], 26) for t in ticks], fontsize='x-small')
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
