"""The plots of an `ActivationStatsRecorder`.

`StatsPlots` is the part of the recorder that draws. It reads a `RecordStore`, and its methods return the axes.
`plot_stats` and `dead_chart` show all layers over time, `plot_layer_stats` one layer, `color_dim` histograms.
Layers are coloured by depth, from dark to light, so that the order shows in grey too. Few layers get a legend.
With many, a colour bar names some of them, and `drawing.outstanding` picks those that are drawn thick."""
from __future__ import annotations

from typing import Any

import numpy as np

from ..report.plots import name_rows
from .drawing import (FEW, color_bar_of_grid, color_bar_of_layers, depth_colors, draw_histograms, draw_lines,
                               draw_target, grid_of, new_axes, outstanding, title_of, wants_log)
from .records import GRAD_COLUMNS, RecordStore

__all__ = ['StatsPlots']

_NAMED_ROWS = 32  # Rows of `dead_chart` that are named
_DEAD = 0.9  # Rows of `dead_chart` above this share are always named


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
        records = self._store.records(phase)
        steps = [r.step for r in records]
        labels = [layer.label for layer in self._store.layers]
        axs = new_axes(ax, 1, len(stats), figsize or (6.5*len(stats), 4))
        colors = depth_colors(len(labels))
        for a, stat in zip(axs.flat, stats):
            values = self._store.values(records, stat)
            log = 'std' in stat and wants_log(values)
            thick = outstanding(values, log) if len(labels) > FEW else []
            draw_lines(a, steps, values, labels, colors, thick)
            draw_target(a, stat)
            title = title_of(stat, self._store.options.near_zero)
            a.set(title=title, xlabel='step', ylabel=title, yscale='log' if log else 'linear')
        if len(labels) <= FEW:
            axs.flat[-1].legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize='small')
        else:
            color_bar_of_layers(axs, labels, colors)
        return axs.ravel()

    def plot_layer_stats(self,
        i: int | str,  # Layer, by its place in `names` or by name
        ax: Any = None,  # Three axes; default: a new figure
        figsize: tuple[float, float] = (12, 3)  # Of the new figure, in inches
    ) -> np.ndarray:  # The axes
        "Plot mean, std and share near zero of one layer over time."
        i = self._store.index(i)
        records = self._store.records('train')
        axs = new_axes(ax, 1, 3, figsize).ravel()
        label = self._store.layers[i].label
        for a, stat in zip(axs, ('mean', 'std', 'near_zero')):
            values = self._store.values(records, stat)[:, i:i+1]
            draw_lines(a, [r.step for r in records], values, [label], ['C0'], [])
            draw_target(a, stat)
            title = title_of(stat, self._store.options.near_zero)
            a.set(title=title, xlabel='step', ylabel=title)
        if ax is None:
            axs[0].figure.suptitle(label)
        else:
            axs[0].set_title(f'{label}: mean')
        return axs

    def color_dim(self,
        i: int | str | None = None,  # Layer, by its place in `names` or by name; default: a grid of all layers
        figsize: tuple[float, float] | None = None,  # Of the new figure, in inches; default: by the number of layers
        ax: Any = None  # Axes to draw on: one, or for the grid one per layer; default: a new figure
    ) -> Any:  # The axes, or an array of them
        "The 'colorful dimension' plot: histograms (log counts, low values at the bottom) over time."
        self._store.need_histograms()
        records = self._store.records('train')
        if i is not None:
            i = self._store.index(i)
            a = new_axes(ax, 1, 1, figsize or (10, 3)).ravel()[0]
            image = draw_histograms(a, self.hist(i), records, self._store.options.bins, self._store.layers[i].label)
            a.set(xlabel='step', ylabel='activation')
            a.figure.colorbar(image, ax=a, pad=0.02, label='log(1 + elements)')
            return a
        n = len(self._store.layers)
        axs = grid_of(n, ax, figsize)
        for j, a in enumerate(axs):
            layer = self._store.layers[j]
            image = draw_histograms(a, self.hist(j), records, self._store.options.bins, layer.label, small=n > FEW)
        color_bar_of_grid(axs, image)
        if ax is None:
            _, lo, hi = self._store.options.bins
            a.figure.supxlabel(f'step {records[0].step} to {records[-1].step}', fontsize='small')
            a.figure.supylabel(f'activation, {lo:g} to {hi:g}', fontsize='small')
        return axs

    def dead_chart(self,
        phase: str = 'train',  # 'train' or 'valid'
        ax: Any = None,  # Axes to draw on; default: a new figure
        figsize: tuple[float, float] | None = None  # Of the new figure, in inches; default: by the number of layers
    ) -> Any:  # The axes
        """Plot the dead share of every layer (a row each) over time: what `diagnose` judges.

        An element is dead at or below `near_zero` or a tenth of the layer's std, whichever is less. Half of the
        numbers around zero are. With many layers, some are named: those that are
        mostly dead at the end, in bold, then every so many-th."""
        records = self._store.records(phase)
        labels = [layer.label for layer in self._store.layers]
        n = len(labels)
        a = new_axes(ax, 1, 1, figsize or (9, min(max(2., 0.3*n + 1), 10))).ravel()[0]
        steps = [r.step for r in records]
        values = self._store.values(records, 'dead').T
        image = a.imshow(values, aspect='auto', cmap='magma', vmin=0, vmax=1, interpolation='nearest',
                         extent=(steps[0]-0.5, steps[-1]+0.5, n-0.5, -0.5))
        dead = [layer.can_die for layer in self._store.layers] & (np.nan_to_num(values[:, -1]) >= _DEAD)
        name_rows(a, labels, np.flatnonzero(dead), _NAMED_ROWS)
        title = title_of('dead', self._store.options.near_zero)
        a.set(xlabel='step', title=title)
        a.figure.colorbar(image, ax=a, pad=0.02, label='dead share')
        return a

    def _known_stats(self, stats: str | tuple[str, ...]) -> tuple[str, ...]:
        "`stats` as a tuple. Raises `ValueError` for a column that is not recorded."
        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        unknown = [s for s in stats if s not in self._store.columns]
        if not unknown and stats: return stats
        asks_grads = not {*unknown}.isdisjoint(GRAD_COLUMNS)
        hint = '; pass `grads=True` to ActivationStatsRecorder to record gradients' if asks_grads else ''
        given = unknown[0] if unknown else stats
        raise ValueError(f"stats: got {given!r}; it takes {', '.join(self._store.columns)}{hint}")
