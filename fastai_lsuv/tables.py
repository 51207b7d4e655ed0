"""The report as a table.

`Table` chooses the columns, and folds long runs of rows that came out alike. `text` and `html` write it."""
from __future__ import annotations

from collections import Counter
from html import escape
from itertools import groupby
from typing import Sequence

from .rows import STATUSES, Row, number, span

__all__ = ['Table', 'has_baseline']

_MOST_ROWS = 40  # A longer table is folded
_ENDS, _RARE = 8, 10  # Rows shown at either end of it, and how many amid them because their status is rare
_WORDS = ('layer', 'kind', 'output', 'status')  # Columns of words, aligned to the left


def has_baseline(rows: Sequence[Row]) -> bool:
    "Whether the rows tell how the units were before."
    return any(r.std_before is not None for r in rows)


class Table:
    "A table of rows: `head`, the names of the columns, and `lines`, the cells of each line."
    def __init__(self,
        rows: Sequence[Row],
        gains: bool  # Whether to have a column of gains
    ):
        self.rows,self.gains,self.baseline = rows,gains,has_baseline(rows)
        before,gain = ['mean before', 'std before'] if self.baseline else [],['gain'] if gains else []
        self.head = ['layer', 'kind', 'output', 'mean', 'std', *before, *gain, 'passes', 'status']
        shown,self.lines = self._shown(),[]
        for folded, run in groupby(range(len(rows)), key=lambda i: i not in shown):
            run = [rows[i] for i in run]
            self.lines += [self._fold(run)] if folded else map(self._cells, run)

    def _cells(self, r: Row) -> list[str]:
        now = ['', ''] if r.status == 'not called' else [number(r.mean), number(r.std, small=True)]
        before = [number(r.mean_before), number(r.std_before, small=True)] if self.baseline else []
        gain = [f'{r.gain:.3g}'] if self.gains else []
        return [r.name or '(model)', r.kind, 'x'.join(map(str, r.shape)), *now, *before, *gain, str(r.passes), r.status]

    def _fold(self, rows: list[Row]) -> list[str]:
        "One line for a run of rows."
        counts = Counter(r.status for r in rows)
        statuses = next(iter(counts)) if len(counts) == 1 else ', '.join(f'{n} {s}' for s, n in counts.items())
        spans = [span([r.mean for r in rows]), span([r.std for r in rows])]
        others = ['']*(2*self.baseline + self.gains + 1)
        return [f'... {len(rows)} more', '', '', *spans, *others, statuses]

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

    def text(self) -> str:
        "The table in columns of text."
        widths = [max(len(line[i]) for line in [self.head, *self.lines]) for i in range(len(self.head))]

        def write(line):
            cells = (c.ljust(w) if h in _WORDS else c.rjust(w) for c, w, h in zip(line, widths, self.head))
            return '  '.join(cells).rstrip()

        return '\n'.join(map(write, [self.head, ['-'*w for w in widths], *self.lines]))

    def html(self) -> str:
        def cell(text, column, tag):
            align = 'left' if column in _WORDS else 'right'
            return f'<{tag} style="text-align:{align}">{escape(text)}</{tag}>'

        def row(cells, tag): return '<tr>' + ''.join(cell(c, h, tag) for c, h in zip(cells, self.head)) + '</tr>'

        body = ''.join(row(line, 'td') for line in self.lines)
        return f'<table><thead>{row(self.head, "th")}</thead><tbody>{body}</tbody></table>'
