"What `ActivationStatsRecorder` shows of its records: a table, a diagnosis in sentences, and plots."
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable

import numpy as np
from torch import nn

__all__ = ['StatsPlots', 'Pairs', 'Finding', 'Diagnosis', 'limits_of']

_MANY = 12  # With more layers than this, a colour bar names them instead of a legend


class Pairs(list[tuple[float, float]]):
    "(mean, std) of each layer, which prints as a table."
    def __init__(self,
        names: list[str],  # Of the layers, as in `named_modules()`
        pairs: Iterable[tuple[float, float]],  # (mean, std) of each
        epoch: int,  # When they were recorded: epoch, from 0
        step: int  # and training step, from 0
    ):
        super().__init__(pairs)
        self.names,self.epoch,self.step = names,epoch,step

    def __repr__(self) -> str:
        w = max(map(len, [*self.names, 'layer']))
        lines = [f'{n:<{w}} {m:>10.4f} {s:>10.4f}' for n,(m,s) in zip(self.names, self)]
        return '\n'.join([f"{f'step {self.step} (epoch {self.epoch})':>{w+22}}", f"{'layer':<{w}} {'mean':>10} {'std':>10}", *lines])


# ---- Diagnosis ----

@dataclass(frozen=True)
class Finding:
    "One trouble of one layer."
    layer: str  # Its name, as in `named_modules()`
    problem: str  # 'explodes', 'vanishes', 'is mostly dead' or 'saturates'
    spans: list[tuple[int, int]]  # First and last step of each stretch of records that show it
    records: int  # How many records show it
    of: int  # Of how many
    worst: float  # The statistic at its worst
    words: str  # What it is the statistic of

    def __str__(self) -> str:
        spans = [f'{a}' if a == b else f'{a} to {b}' for a,b in self.spans[:3]]
        more = f' and {len(self.spans)-3} more stretches' if len(self.spans) > 3 else ''
        when = f"{'step' if len(spans) == 1 and ' ' not in spans[0] else 'steps'} {', '.join(spans)}{more}"
        return f'{self.layer} {self.problem} over {when} ({self.records} of {self.of} records; {self.words} {self.worst:.3g})'


class Diagnosis(list[Finding]):
    "A `Finding` for each trouble of each layer, which prints as sentences."
    def __init__(self,
        found: Iterable[Finding],  # One for each trouble of each layer
        records: int,  # How many records were looked at
        first: int,  # Their first training step
        last: int  # and their last
    ):
        super().__init__(found)
        self.over = f'{records} record{"s"*(records != 1)} (steps {first} to {last})'

    def __repr__(self) -> str:
        if not self: return f'No layer vanishes, explodes, saturates or is mostly dead in {self.over}.'
        return '\n'.join([f'{len({f.layer for f in self})} layer{"s"*(len({f.layer for f in self}) != 1)} in trouble in {self.over}:', *(f'- {f}' for f in self)])


def _spans(steps: np.ndarray, where: np.ndarray) -> list[tuple[int, int]]:
    "First and last step of each run of True."
    edges = np.flatnonzero(np.diff(np.r_[False, where, False].astype(int)))
    return [(int(steps[a]), int(steps[b-1])) for a,b in zip(edges[::2], edges[1::2])]


def limits_of(model: nn.Module, modules: list[nn.Module]) -> list[tuple[float, float, float | None] | None]:
    """For each module, how it can saturate: (low, high, None) if its output is bounded, (0, 0, at) if it feeds a bounded
    activation that gets flat where the root mean square of its input passes `at`, or `None`."""
    bounds = {nn.Sigmoid:(0., 1.), nn.Hardsigmoid:(0., 1.), nn.Tanh:(-1., 1.), nn.Softsign:(-1., 1.)}
    flat = {nn.Sigmoid:5.4, nn.Tanh:2.7}
    after = {id(a):b for s in model.modules() if isinstance(s, nn.Sequential) for a,b in zip(list(s), list(s)[1:])}
    def limit(m):
        last = list(m.modules())[-1]  # of a container, the one it ends in
        if type(last) is nn.Hardtanh: return last.min_val, last.max_val, None
        if type(last) in bounds: return *bounds[type(last)], None
        at = flat.get(type(after.get(id(m))))
        return at and (0., 0., at)
    return [limit(m) for m in modules]


# ---- Plots ----

class StatsPlots:
    "Diagnosis and plots of an `ActivationStatsRecorder`."

    def diagnose(self,
        vanish: float = 0.01,  # A layer vanishes where its std is below this
        explode: float = 100.,  # It explodes where |mean| or std is above this, or is not finite
        dead: float = 0.9,  # It is mostly dead where this share of its elements is near zero, or more
        saturate: float = 0.9,  # A bounded output saturates where its mean square distance from the middle is this share of the largest possible
    ) -> Diagnosis:  # A `Finding` for each trouble of each layer
        """Name the layers that vanish, explode, saturate or are mostly dead, and over which of the recorded training steps.

        Saturation is looked for in layers that end in a sigmoid, tanh or another bounded activation module, and in those
        that feed a sigmoid or tanh module next to them in an `nn.Sequential`. The latter saturate where the root mean
        square of their output passes 5.4 or 2.7: half of a normal's elements then meet less than a tenth of the slope."""
        rows = self._records('train')
        steps,called = np.array([r.step for r in rows]),np.stack([r.ns[:, 0] > 0 for r in rows])
        mean,std,zero = np.stack([r.values[:, :3] for r in rows]).transpose(2, 0, 1)
        found = []
        for i,name in enumerate(self._names):
            m,s,z,c = mean[:, i],std[:, i],zero[:, i],called[:, i]
            size = np.fmax(np.abs(m), s)
            bad = ~np.isfinite(m) | np.isinf(s)
            vanishing = s < vanish
            tests = [('explodes', bad | (size > explode), np.where(bad, np.inf, size), 'mean or std up to'),
                     ('vanishes', vanishing, -s, 'std down to'),
                     ('is mostly dead', (z >= dead) & ~vanishing, z, 'share near zero up to')]  # a vanished layer is all near zero
            if self._limits[i]:
                lo,hi,at = self._limits[i]
                if at: tests.append(('saturates', np.hypot(m, s) >= at, np.hypot(m, s), 'root mean square before the activation up to'))
                else:
                    spread = ((m - (lo+hi)/2)**2 + s**2)/((hi-lo)/2)**2
                    tests.append(('saturates', spread >= saturate, spread, 'mean square distance from the middle up to a share of'))
            for problem,where,by,words in tests:
                if (where := where & c).any():
                    found.append(Finding(name, problem, _spans(steps[c], where[c]), int(where.sum()), int(c.sum()), abs(float(by[where].max())), words))
        return Diagnosis(found, len(rows), int(steps[0]), int(steps[-1]))

    def plot_stats(self,
        stats: str | tuple[str, ...] = ('mean', 'std'),  # Columns of `df()`, a panel each
        phase: str = 'train',  # 'train' or 'valid'
        ax: Any = None,  # One axes for each of `stats`; default: a new figure
        figsize: tuple[float, float] | None = None  # Of the new figure, in inches; default: by the number of panels
    ) -> np.ndarray:  # The axes
        "Plot statistics of all layers over time, coloured by depth. Raises `ValueError` for a column that was not recorded."
        import matplotlib.pyplot as plt
        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        if (unknown := [s for s in stats if s not in self._columns]): raise ValueError(f"stats: got {unknown[0]!r}; it takes {', '.join(self._columns)}")
        rows,n = self._records(phase),len(self._names)
        axs = _axes(ax, 1, len(stats), figsize or (6.5*len(stats), 4))
        colors = plt.get_cmap('viridis')(np.linspace(0, 0.95, n))
        for a,stat in zip(axs.flat, stats):
            values = np.stack([r.values[:, self._columns.index(stat)] for r in rows])
            for i in range(n): a.plot([r.step for r in rows], values[:, i], color=colors[i], lw=1.2 if n <= _MANY else 0.8, label=self._names[i], marker='o' if len(rows) == 1 else None)
            a.set(title=_title(stat, self._near_zero), xlabel='step')
            positive = values[np.isfinite(values) & (values > 0)]
            if 'std' in stat and len(positive) and positive.max() > 100*positive.min(): a.set_yscale('log')
            a.spines[['top', 'right']].set_visible(False)
        last = axs.flat[-1]
        if n <= _MANY: last.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize='small')
        else:
            from matplotlib.colors import ListedColormap
            ticks = np.unique(np.linspace(0, n-1, 8).round().astype(int))
            bar = last.figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(-0.5, n-0.5), ListedColormap(colors)), ax=axs.ravel().tolist(), pad=0.02)
            bar.ax.set_yticks(ticks, [self._names[t] for t in ticks], fontsize='small')
            bar.ax.minorticks_off()
            bar.ax.invert_yaxis()  # the first layer on top, as in a table
        return axs.ravel()

    def plot_layer_stats(self,
        i: int | str,  # Layer, by its place in `names` or by name
        ax: Any = None,  # Three axes; default: a new figure
        figsize: tuple[float, float] = (12, 3)  # Of the new figure, in inches
    ) -> np.ndarray:  # The axes
        "Plot mean, std and share near zero of one layer over time."
        i,rows = self._index(i),self._records('train')
        axs = _axes(ax, 1, 3, figsize).ravel()
        for a,v,stat in zip(axs, self.layer_stats(i), ('mean', 'std', 'near_zero')):
            a.plot([r.step for r in rows], v, marker='o' if len(rows) == 1 else None)
            a.set(title=_title(stat, self._near_zero), xlabel='step')
        if ax is None: axs[0].figure.suptitle(self._names[i])
        return axs

    def color_dim(self,
        i: int | str | None = None,  # Layer, by its place in `names` or by name; default: a grid of all layers
        figsize: tuple[float, float] | None = None,  # Of the new figure, in inches; default: by the number of layers
        ax: Any = None  # Axes to draw on: one, or for the grid one per layer; default: a new figure
    ) -> Any:  # The axes, or an array of them
        "The 'colourful dimension' plot: histograms (log counts, low values at the bottom) over time."
        n = len(self._names)
        if i is not None:
            i = self._index(i)
            ax = _axes(ax, 1, 1, figsize or (10, 3)).ravel()[0]
            return self._color_dim(ax, i)
        self.hist(0)  # says so if there are no histograms
        cols = min(n, 4 if n <= _MANY else 8)
        nrows = -(-n//cols)
        axs = _axes(ax, nrows, cols, figsize or (3.2*cols if n <= _MANY else 2*cols, (1.8 if n <= _MANY else 1.2)*nrows)).ravel()
        for j,a in enumerate(axs):
            if j < n: self._color_dim(a, j, 'medium' if n <= _MANY else 'x-small')
            else: a.axis('off')
        return axs[:n]

    def _color_dim(self, ax: Any, i: int, fontsize: str = 'medium') -> Any:
        ax.imshow(self.hist(i), origin='lower', aspect='auto', cmap='viridis')
        ax.axis('off')
        name = self._names[i]
        ax.set_title(name if len(name) <= 24 else '…' + name[-23:], fontsize=fontsize, pad=2)
        return ax

    def dead_chart(self,
        phase: str = 'train',  # 'train' or 'valid'
        ax: Any = None,  # Axes to draw on; default: a new figure
        figsize: tuple[float, float] | None = None  # Of the new figure, in inches; default: by the number of layers
    ) -> Any:  # The axes
        "Plot the share near zero of every layer (a row each) over time."
        rows,n = self._records(phase),len(self._names)
        ax = _axes(ax, 1, 1, figsize or (9, min(max(2., 0.3*n + 1), 10))).ravel()[0]
        steps = [r.step for r in rows]
        image = ax.imshow(np.stack([r.values[:, 2] for r in rows]).T, aspect='auto', cmap='magma', vmin=0, vmax=1, interpolation='nearest',
                          extent=(steps[0]-0.5, steps[-1]+0.5, n-0.5, -0.5))
        ticks = range(0, n, -(-n//32))
        ax.set_yticks(ticks, [self._names[t] for t in ticks], fontsize='small' if n <= _MANY else 'x-small')
        ax.set(xlabel='step', title=_title('near_zero', self._near_zero))
        ax.figure.colorbar(image, ax=ax, pad=0.02)
        return ax


def _title(stat: str, near_zero: float) -> str:
    return {'near_zero': f'share near zero (≤ {near_zero:g})', 'grad_mean': 'gradient mean', 'grad_std': 'gradient std', 'grad_zero': 'share of zero gradients'}.get(stat, stat)


def _axes(ax: Any, rows: int, cols: int, figsize: tuple[float, float]) -> np.ndarray:
    "The given axes as an array of at least rows*cols, or those of a new figure."
    if ax is None:
        import matplotlib.pyplot as plt
        return plt.subplots(rows, cols, figsize=figsize, squeeze=False, layout='constrained')[1]
    axs = np.array(ax, dtype=object).reshape(-1)
    return axs if len(axs) >= rows*cols else _too_few(len(axs), rows*cols)


def _too_few(got: int, need: int): raise ValueError(f"ax: got {got} axes; this plot draws on {need}")
