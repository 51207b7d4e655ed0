"""The report as a table of text.

`Table` chooses the columns, and folds long runs of rows that came out alike. `markup` writes the same table as HTML."""
from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Sequence

from .rows import STATUSES, Row, advice
from .text import number, span

__all__ = ['Table', 'has_baseline', 'has_gradients']

_MOST_ROWS = 40  # A longer table is folded
_ENDS, _RARE = 8, 10  # Rows shown at either end of it, and how many amid them because their status is rare
WORDS = ('layer', 'kind', 'output', 'status')  # Columns of words, aligned to the left


def has_baseline(rows: Sequence[Row]) -> bool:
    "Whether the rows tell how the units were before."
    return any(r.std_before is not None for r in rows)


def has_gradients(rows: Sequence[Row]) -> bool:
    "Whether the rows tell of the gradients of a loss."
    return any(r.grad_std is not None for r in rows)


def _small(v: float | None) -> str: return '' if v is None else f'{v:.2e}'


class Table:
    "A table of rows: `head`, the names of the columns, and `lines`, the rows of each line and its cells."
    def __init__(self,
        rows: Sequence[Row],
        corrected: bool,  # Whether LSUV has run, or only looked
        folds: bool = True  # Whether a long table is folded
    ):
        self.rows,self.corrected,self.baseline = rows,corrected,has_baseline(rows)
        self.gradients = has_gradients(rows)
        before = [' before']*self.baseline
        columns = [f'{stat}{when}' for stat in ('mean', 'std') for when in (*before, '')]
        if self.gradients: columns += ['grad std', 'grad/weight']
        self.head = ['layer', 'kind', 'output', *columns, *(['gain', 'passes'] if corrected else []), 'status']
        shown = self._shown() if folds else range(len(rows))
        self.lines: list[tuple[list[Row], list[str]]] = []
        for folded, run in groupby(range(len(rows)), key=lambda i: i not in shown):
            run = [rows[i] for i in run]
            self.lines += [(run, self._fold(run))] if folded else [([r], self._cells(r)) for r in run]

    @property
    def folded(self) -> bool: return len(self.lines) < len(self.rows)

    def _cells(self, r: Row) -> list[str]:
        ran = r.status != 'not called'
        mean,std = (number(r.mean), number(r.std, small=True)) if ran else ('', '')
        before = [[number(r.mean_before)], [number(r.std_before, small=True)]] if self.baseline else [[], []]
        done = [f'{r.gain:.3g}', str(r.passes)] if self.corrected else []
        grads = [_small(r.grad_std), _small(r.weight_grad)] if self.gradients else []
        shape = 'x'.join(map(str, r.shape))
        return [r.name or '(model)', r.kind, shape, *before[0], mean, *before[1], std, *grads, *done, r.status]

    def _fold(self, rows: list[Row]) -> list[str]:
        "One line for a run of rows."
        counts = Counter(r.status for r in rows)
        statuses = next(iter(counts)) if len(counts) == 1 else ', '.join(f'{n} {s}' for s, n in counts.items())
        gap,rest = ['']*self.baseline,['', '']*(self.gradients + self.corrected)
        return [f'... {len(rows)} more', '', '', *gap, span([r.mean for r in rows]), *gap, span([r.std for r in rows]),
                *rest, statuses]

    def _shown(self) -> set[int]:
        "The rows with a line of their own: of a long table its ends, rare ones, and the first of each status."
        n = len(self.rows)
        if n <= _MOST_ROWS: return set(range(n))
        shown,room = {*range(_ENDS), *range(n - _ENDS, n)},_RARE
        by_status = [[i for i, r in enumerate(self.rows) if r.status == s] for s in STATUSES]
        for which in sorted(by_status, key=len):
            new = which if len(which) <= room else which[:1]
            shown.update(new)
            room = max(room - len(new), 0)
        return shown

    @property
    def notes(self) -> list[tuple[str, str]]:
        "Each status of the table that is not \"ok\", with what it means and what to do."
        found = {r.status for r in self.rows}
        return [(s, advice(s, self.corrected)) for s in STATUSES if s in found and s != 'ok']

    def text(self) -> str:
        "The table in columns of text."
        lines = [self.head, *(cells for _, cells in self.lines)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]

        def write(line):
            cells = (c.ljust(w) if h in WORDS else c.rjust(w) for c, w, h in zip(line, widths, self.head))
            return '  '.join(cells).rstrip()

        return '\n'.join(map(write, [self.head, ['-'*w for w in widths], *lines[1:]]))
