"""What was done to every layer: `LSUVReport`, a `Row` a unit, with its tables and its plot.

`STATUSES` says in a sentence what each status means. pandas and matplotlib are imported when they are used."""
from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, Iterator, overload

if TYPE_CHECKING: import pandas as pd

__all__ = ['LSUVReport', 'Row', 'STATUSES']

STATUSES = {
    'ok': "the last pass measured it at its target",
    'no bias': "std at its target; no bias that could move the mean there",
    'off': "still out of tolerance after the last pass",
    'frozen': "its weight does not require grad, or holds what was loaded or trained before",
    'tied': "its weight is another module's too",
    'constant': "its output does not vary: it is fed zeros, or zero-initialized",
    'unresponsive': "scaling its weight does not scale its output; the weight was put back",
    'alike': "a norm layer before it sees samples that are alike, and leaves noise; it keeps its starting weight",
    'outlier': "one sample of the mini-batch sets its std; it keeps its starting weight",
    'not called': "the model did not call it; its weight is as it was",
    'non-finite': "its output holds NaNs or infinities",
    'undone': "the weights were put back",
}
_DONE = ('ok', 'no bias')
_MOST_ROWS = 40  # A longer table is folded
_ENDS, _RARE = 8, 10  # Rows shown at either end of it, and how many amid them because their status is rare
_WORDS = ('layer', 'kind', 'output', 'status')  # Columns of words, aligned to the left
_LARGE_GAIN = 30.  # A weight that was scaled by more, or by less than its inverse, is named


@dataclass(frozen=True)
class Row:
    "One unit, as the last pass found it."
    name: str  # As in `named_modules()`
    kind: str  # Class of the module
    shape: tuple[int, ...]  # Of its output; () if it was not called
    mean: float  # Of its output; with `per_channel`, the mean of the channels' means
    std: float  # Of its output; with `per_channel`, the root mean square of the channels' stds
    mean_before: float | None  # Before anything was done, if `baseline` or the loss was asked for
    std_before: float | None  # The same of its std
    passes: int  # Passes that changed its weight or bias, by giving it its start or by correcting it
    status: str  # A key of `STATUSES`
    gain: float = 1.  # Factor that its weight was scaled by, from the start that it was given


class LSUVReport:
    """What `lsuv_init` did, or `layer_stats` found: a `Row` a unit, in order of execution.

    Iterate it, index it by position or by name, print it or show it in a notebook; `.pairs`, `.df()` and `.plot()` give
    it as (mean, std) tuples, a DataFrame and a picture. Mean and std are those of the unit's whole output over the
    mini-batch of the last pass, pooled over all its calls (and over the ranks of `torch.distributed`), the std unbiased
    as `Tensor.std` is. Where fresh mini-batches keep disagreeing, those of the last passes are pooled.

    What became of a unit is its `status`: "ok", "no bias" (std right, and no bias to move the mean with), "off",
    "frozen", "tied", "constant", "unresponsive", "alike", "outlier", "not called", "non-finite" or "undone"; `STATUSES`
    explains them. A unit is "ok" only if its std was measured within `batch_tol` of its target and, where the order
    ends with a mean loop, its mean as close to its target as so many samples can tell."""
    def __init__(self,
        rows: list[Row],  # In order of execution
        order: str = '',  # The loops that were run; "" if none
        n_passes: int = 1,  # Full forward passes it took
        loss: tuple[float, float] | None = None,  # Training loss before and after, if it was taken
        undone: str = '',  # Why the weights were put back; "" if they were not
        loss_error: str = ''  # Why the loss was not taken although it was asked for
    ):
        self.rows,self.order,self.n_passes = tuple(rows),order,n_passes
        self.loss,self.undone,self.loss_error = loss,undone,loss_error

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
        if row is not None: return row
        names = ', '.join(r.name for r in self.rows[:8]) + (', ...' if len(self) > 8 else '')
        raise KeyError(f"{i!r} is no unit of this report; its units are {names}")

    @property
    def ok(self) -> bool:
        "Whether the last pass measured every unit at its target."
        return all(r.status in _DONE for r in self.rows)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        "The (mean, std) of each unit that ran, as the forum thread prints them."
        return [(r.mean, r.std) for r in self.rows if r.status != 'not called']

    @property
    def left_alone(self) -> str:
        "One sentence that names the units that are not at their target, by status; \"\" if there are none."
        if self.undone: return ''
        by_status = {s: [r.name for r in self.rows if r.status == s] for s in STATUSES if s not in _DONE}
        parts = [f"{s} ({STATUSES[s]}): {_names(names)}" for s, names in by_status.items() if names]
        n = sum(map(len, by_status.values()))
        return f"LSUV did not normalize {n} of {_count(len(self), 'layer')}. " + '; '.join(parts) if parts else ''

    @property
    def large_gains(self) -> tuple[Row, ...]:
        "The units whose weight was scaled by more than 30, or by less than 1/30."
        return tuple(r for r in self.rows if not 1/_LARGE_GAIN <= r.gain <= _LARGE_GAIN)

    @property
    def warning(self) -> str:
        "All that a user should look at, in a few sentences; \"\" if there is nothing."
        undone = large = ''
        if self.undone:
            undone = (f"LSUV put the weights back: {self.undone}. Use `modules` to leave out layers whose outputs "
                      "should not have std 1, give them another `target_std`, or keep the result with `force=True`")
        gains = [f'{r.name or "(model)"} by {r.gain:.2g}' for r in self.large_gains]
        if gains:
            large = (f"LSUV scaled some weights by a lot: {_names(gains)}. Check that the mini-batch is scaled as your "
                     "data is")
        return '. '.join(s for s in (undone, self.left_alone, large) if s)

    @property
    def summary(self) -> str:
        "What came of it, in one line."
        counts = Counter(r.status for r in self.rows)
        done = sum(counts[s] for s in _DONE)
        rest = ', '.join(f'{counts[s]} {s}' for s in STATUSES if counts[s] and s != 'ok')
        rest = f' ({rest})' if rest else ''
        if not self.order: return f"{_count(len(self), 'layer')}, std within 0.1 of 1 in {done}{rest}"
        target = 'std' if 'std' in self.order else 'mean'
        loss = f", training loss {_number(self.loss[0])} before and {_number(self.loss[1])} after" if self.loss else ''
        if self.loss_error: loss = f", training loss not taken ({self.loss_error})"
        return (f"LSUV {self.order!r}: {done} of {_count(len(self), 'layer')} at the target {target}{rest}, "
                f"{_count(self.n_passes, 'forward pass', 'forward passes')}{loss}")

    def df(self) -> pd.DataFrame:  # A row a unit, in order of execution
        "A DataFrame: a row a unit, the fields of `Row` as columns, those of the baseline only if it was measured."
        import pandas as pd
        df = pd.DataFrame([asdict(r) for r in self.rows], columns=list(Row.__dataclass_fields__))
        return df if self._baseline else df.drop(columns=['mean_before', 'std_before'])

    @property
    def _baseline(self) -> bool: return any(r.std_before is not None for r in self.rows)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        "Header and cells, with runs of layers that came out alike folded into one line where the table is long."
        before,gain = ['mean before', 'std before'] if self._baseline else [],['gain'] if self.order else []
        head = ['layer', 'kind', 'output', 'mean', 'std', *before, *gain, 'passes', 'status']
        shown = self._shown()
        lines: list[list[str]] = []
        for folded, run in groupby(range(len(self)), key=lambda i: i not in shown):
            rows = [self.rows[i] for i in run]
            lines += [self._fold(rows)] if folded else map(self._cells, rows)
        return head, lines

    def _cells(self, r: Row) -> list[str]:
        now = ['', ''] if r.status == 'not called' else [_number(r.mean), _number(r.std, small=True)]
        before = [_number(r.mean_before), _number(r.std_before, small=True)] if self._baseline else []
        gain = [f'{r.gain:.3g}'] if self.order else []
        return [r.name or '(model)', r.kind, 'x'.join(map(str, r.shape)), *now, *before, *gain, str(r.passes), r.status]

    def _fold(self, rows: list[Row]) -> list[str]:
        "One line for a run of rows."
        counts = Counter(r.status for r in rows)
        statuses = next(iter(counts)) if len(counts) == 1 else ', '.join(f'{n} {s}' for s, n in counts.items())
        spans = [_span([r.mean for r in rows]), _span([r.std for r in rows])]
        others = ['']*(2*self._baseline + bool(self.order) + 1)
        return [f'... {len(rows)} more', '', '', *spans, *others, statuses]

    def _shown(self) -> set[int]:
        "The rows with a line of their own: of a long table its ends, rare ones, and the first of each status."
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
        widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]

        def line(row):
            cells = (c.ljust(w) if h in _WORDS else c.rjust(w) for c, w, h in zip(row, widths, head))
            return '  '.join(cells).rstrip()

        return '\n'.join([self.summary, '', line(head), line(['-'*w for w in widths]), *map(line, lines)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head,lines = self._table()

        def cell(text, column, tag):
            align = 'left' if column in _WORDS else 'right'
            return f'<{tag} style="text-align:{align}">{escape(text)}</{tag}>'

        def row(cells, tag): return '<tr>' + ''.join(cell(c, h, tag) for c, h in zip(cells, head)) + '</tr>'

        body = ''.join(row(line, 'td') for line in lines)
        return f'<p>{escape(self.summary)}</p><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table>'

    def plot(self,
        axs: Any = None,  # Two matplotlib axes, for std and mean; new ones by default
        figsize: tuple[float, float] = (9, 4.5)  # Of the new figure, in inches
    ) -> Any:  # The two axes
        "Std and mean of each unit that ran, in order of execution, after and (with `baseline`) before."
        import matplotlib.pyplot as plt
        rows = [r for r in self.rows if r.status != 'not called']
        if axs is None: _,axs = plt.subplots(2, 1, figsize=figsize, sharex=True, layout='constrained')
        for ax, what in zip(axs, ('std', 'mean')): self._plot_one(ax, what, rows)
        stds = [s for r in rows for s in (r.std, r.std_before) if s is not None and 0 < s < float('inf')]
        if stds and max(stds)/min(stds) > 20: axs[0].set_yscale('log')
        if len(rows) <= 30:
            axs[-1].set_xticks(range(len(rows)), [r.name for r in rows], rotation=60, ha='right', fontsize=7)
        else: axs[-1].set_xlabel('layer, in order of execution')
        axs[0].legend(fontsize=8)
        return axs

    def _plot_one(self, ax: Any, what: str, rows: list[Row]) -> None:
        "Plot one statistic: before, after, and a cross where a unit was not normalized."
        x,marker = range(len(rows)),'o' if len(rows) <= 60 else ''
        if self._baseline:
            before = [getattr(r, what + '_before') for r in rows]
            ax.plot(x, before, color='tab:gray', marker=marker, ms=3, lw=1, label='before')
        after = [getattr(r, what) for r in rows]
        ax.plot(x, after, color='tab:blue', marker=marker, ms=3, lw=1.2, label='after' if self.order else what)
        bad = [i for i, r in enumerate(rows) if r.status not in _DONE]
        if bad and self.order:
            ax.plot(bad, [after[i] for i in bad], ls='', marker='x', color='tab:red', label='not normalized')
        ax.set_ylabel(what)
        ax.grid(alpha=.3)


def _count(n: int, one: str, many: str = '') -> str: return f'{n} {one if n == 1 else many or one + "s"}'


def _number(v: float | None, small: bool = False) -> str:
    "Four decimals, or three digits where those would not do (for numbers near zero only if `small` ones matter)."
    if v is None: return ''
    if abs(v) >= 1e4 or small and 0 < abs(v) < 1e-3: return f'{v:.2g}' if abs(v) < 1 else f'{v:.3g}'
    return f'{round(v, 4) + 0.:.4f}'


def _span(vs: list[float]) -> str:
    vs = [v for v in vs if v == v]
    return f'{_number(min(vs))} to {_number(max(vs))}' if vs else ''


def _names(names: list[str], most: int = 5) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
