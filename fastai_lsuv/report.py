"What was done to every layer: `LSUVReport`, its tables and its plot."
from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from typing import Any, Iterator, overload

import pandas as pd

__all__ = ['LSUVReport', 'Row', 'STATUSES']

STATUSES = {
    'ok': "the last pass measured std at its target",
    'no bias': "std at its target; no bias that could move the mean there",
    'off': "still out of tolerance after the last pass",
    'frozen': "its weight does not require grad, or holds what was loaded or trained before",
    'tied': "its weight is another module's too",
    'constant': "its output does not vary: it is fed zeros, or zero-initialized",
    'unresponsive': "scaling its weight does not scale its output; the weight was put back",
    'not called': "the model did not call it; its weight is as it was",
    'non-finite': "its output holds NaNs or infinities",
}
_DONE = ('ok', 'no bias')
_MOST_ROWS = 40  # A longer table is folded
_ENDS, _RARE = 8, 10  # Rows shown at either end of it, and how many amid them because their status is rare


@dataclass(frozen=True)
class Row:
    "One unit, as the last pass found it."
    name: str  # As in `named_modules()`
    kind: str  # Class of the module
    shape: tuple[int, ...]  # Of its output; () if it was not called
    mean: float  # Of its output; with `per_channel`, the mean of the channels' means
    std: float  # Of its output; with `per_channel`, the root mean square of the channels' stds
    mean_before: float | None  # Before anything was done, if `baseline` was asked for
    std_before: float | None  # The same of its std
    passes: int  # Passes that changed its weight or bias
    status: str  # A key of `STATUSES`


class LSUVReport:
    """What `lsuv_init` did, or `layer_stats` found: a `Row` a unit, in order of execution.

    Iterate it, index it by position or by name, print it or show it in a notebook; `.pairs`, `.df()` and `.plot()` give it as
    (mean, std) tuples, a DataFrame and a picture. Mean and std are those of the unit's whole output over the mini-batch of the
    last pass, pooled over all its calls (and over the ranks of `torch.distributed`), the std unbiased as `Tensor.std` is.

    What became of a unit is its `status`, one of `STATUSES`: "ok", "no bias" (std right, and no bias to move the mean with), "off",
    "frozen", "tied", "constant", "unresponsive", "not called" or "non-finite". A unit is never "ok" unless its std was measured
    within `batch_tol` of its target."""
    def __init__(self,
        rows: list[Row],  # In order of execution
        order: str = '',  # The loops that were run; "" if none
        n_passes: int = 1  # Full forward passes it took
    ):
        self.rows,self.order,self.n_passes = tuple(rows),order,n_passes

    def __len__(self) -> int: return len(self.rows)
    def __iter__(self) -> Iterator[Row]: return iter(self.rows)
    @overload
    def __getitem__(self, i: int | str) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Row, ...]: ...
    def __getitem__(self,
        i: int | slice | str  # Position in order of execution (or a slice), or a unit's name as in `named_modules()`
    ) -> Row | tuple[Row, ...]:  # Its row; of a slice, a tuple of rows
        "The row of a position or of a unit's name. Raises `KeyError`, with the names there are, or `IndexError`."
        if not isinstance(i, str): return self.rows[i]
        row = next((r for r in self.rows if r.name == i), None)
        if row is None: raise KeyError(f"{i!r} is no unit of this report; its units are {', '.join(r.name for r in self.rows[:8])}{', ...' if len(self) > 8 else ''}")
        return row

    @property
    def ok(self) -> bool:
        "Whether the last pass measured every unit's std at its target."
        return all(r.status in _DONE for r in self.rows)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        "The (mean, std) of each unit that ran, as the forum thread prints them."
        return [(r.mean, r.std) for r in self.rows if r.status != 'not called']

    @property
    def left_alone(self) -> str:
        "One sentence that names the units whose std is not at its target, by status; \"\" if there are none."
        by_status = {s: [r.name for r in self.rows if r.status == s] for s in STATUSES if s not in _DONE}
        parts = [f"{s} ({STATUSES[s]}): {_names(names)}" for s, names in by_status.items() if names]
        n = sum(map(len, by_status.values()))
        return f"LSUV did not normalize {n} of {_count(len(self), 'layer')}. " + '; '.join(parts) if parts else ''

    @property
    def summary(self) -> str:
        "What came of it, in one line."
        counts = Counter(r.status for r in self.rows)
        done = sum(counts[s] for s in _DONE)
        rest = ', '.join(f'{counts[s]} {s}' for s in STATUSES if counts[s] and s != 'ok')
        if not self.order: return f"{_count(len(self), 'layer')}, std within 0.1 of 1 in {done}" + (f" ({rest})" if rest else '')
        return (f"LSUV {self.order!r}: {done} of {_count(len(self), 'layer')} at the target std" + (f" ({rest})" if rest else '')
                + f", {_count(self.n_passes, 'forward pass', 'forward passes')}")

    def df(self) -> pd.DataFrame:  # A row a unit, in order of execution
        "A DataFrame with a row a unit and the fields of `Row` as columns; those of the baseline only where it was measured."
        df = pd.DataFrame([asdict(r) for r in self.rows], columns=list(Row.__dataclass_fields__))
        return df if self._baseline else df.drop(columns=['mean_before', 'std_before'])

    @property
    def _baseline(self) -> bool: return any(r.std_before is not None for r in self.rows)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        "Header and cells, with runs of layers that came out alike folded into one line where the table is long."
        head = ['layer', 'kind', 'output', 'mean', 'std', *(['mean before', 'std before'] if self._baseline else []), 'passes', 'status']
        def cells(r):
            now = ['', ''] if r.status == 'not called' else [_number(r.mean), _number(r.std, small=True)]
            before = [_number(r.mean_before), _number(r.std_before, small=True)] if self._baseline else []
            return [r.name or '(model)', r.kind, 'x'.join(map(str, r.shape)), *now, *before, str(r.passes), r.status]
        shown = self._shown()
        lines: list[list[str]] = []
        for folded, run in groupby(range(len(self)), key=lambda i: i not in shown):
            run = [self.rows[i] for i in run]
            if not folded: lines += map(cells, run); continue
            counts = Counter(r.status for r in run)
            statuses = next(iter(counts)) if len(counts) == 1 else ', '.join(f'{n} {s}' for s, n in counts.items())
            lines.append([f'... {len(run)} more', '', '', _span([r.mean for r in run]), _span([r.std for r in run]), *(['', ''] if self._baseline else []), '', statuses])
        return head, lines

    def _shown(self) -> set[int]:
        "The rows that have a line of their own: all of a short table; else its ends, what is rare, and the first of each status."
        n = len(self)
        if n <= _MOST_ROWS: return set(range(n))
        shown,room = {*range(_ENDS), *range(n - _ENDS, n)},_RARE
        by_status = [[i for i, r in enumerate(self.rows) if r.status == s] for s in STATUSES]
        for which in sorted(by_status, key=len):
            new = which if len(which) <= room else which[:1]
            shown.update(new)
            room = max(room - len(new), 0)
        return shown

    def __str__(self) -> str:
        head,lines = self._table()
        left = {'layer', 'kind', 'output', 'status'}
        widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
        def line(row): return '  '.join(c.ljust(w) if h in left else c.rjust(w) for c, w, h in zip(row, widths, head)).rstrip()
        return '\n'.join([self.summary, '', line(head), line(['-'*w for w in widths]), *map(line, lines)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head,lines = self._table()
        def row(cells, tag): return '<tr>' + ''.join(f'<{tag} style="text-align:{"left" if h in ("layer", "kind", "output", "status") else "right"}">{escape(c)}</{tag}>'
                                                     for c, h in zip(cells, head)) + '</tr>'
        return f'<p>{escape(self.summary)}</p><table><thead>{row(head, "th")}</thead><tbody>{"".join(row(l, "td") for l in lines)}</tbody></table>'

    def plot(self,
        axs: Any = None,  # Two matplotlib axes, for std and mean; new ones by default
        figsize: tuple[float, float] = (9, 4.5)  # Of the new figure, in inches
    ) -> Any:  # The two axes
        "Std and mean of each unit that ran, in order of execution, after and (with `baseline`) before."
        import matplotlib.pyplot as plt
        rows = [r for r in self.rows if r.status != 'not called']
        if axs is None: _,axs = plt.subplots(2, 1, figsize=figsize, sharex=True, layout='constrained')
        x = range(len(rows))
        marker = 'o' if len(rows) <= 60 else ''
        for ax, what in zip(axs, ('std', 'mean')):
            if self._baseline: ax.plot(x, [getattr(r, what + '_before') for r in rows], color='tab:gray', marker=marker, ms=3, lw=1, label='before')
            ax.plot(x, [getattr(r, what) for r in rows], color='tab:blue', marker=marker, ms=3, lw=1.2, label='after' if self.order else what)
            for s, color in (('not normalized', 'tab:red'),):
                bad = [i for i, r in enumerate(rows) if r.status not in _DONE]
                if bad and self.order: ax.plot(bad, [getattr(rows[i], what) for i in bad], ls='', marker='x', color=color, label=s)
            ax.set_ylabel(what)
            ax.grid(alpha=.3)
        stds = [s for r in rows for s in (r.std, r.std_before) if s is not None and 0 < s < float('inf')]
        if stds and max(stds)/min(stds) > 20: axs[0].set_yscale('log')
        if len(rows) <= 30: axs[-1].set_xticks(list(x), [r.name for r in rows], rotation=60, ha='right', fontsize=7)
        else: axs[-1].set_xlabel('layer, in order of execution')
        axs[0].legend(fontsize=8)
        return axs


def _count(n: int, one: str, many: str = '') -> str: return f'{n} {one if n == 1 else many or one + "s"}'


def _number(v: float | None, small: bool = False) -> str:
    "Four decimals, or three digits where those would not do (for numbers near zero only if `small` ones matter)."
    if v is None: return ''
    if abs(v) >= 1e4 or small and 0 < abs(v) < 1e-3: return f'{v:.2g}' if abs(v) < 1 else f'{v:.3g}'
    return f'{round(v, 4) + 0.:.4f}'


def _span(vs: list[float]) -> str:
    vs = [v for v in vs if v == v]
    return f'{_number(min(vs))} to {_number(max(vs))}' if vs else ''


def _names(names: list[str], most: int = 5) -> str: return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
