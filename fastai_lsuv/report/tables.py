"""The report as a table: `COLUMNS`, the one table of columns, and `Table`, which folds long runs of rows.

A new column is a field of `Row` and an entry of `COLUMNS`. `markup` writes the same table as HTML."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Callable, Sequence

from ..statuses import STATUSES, Status, Words, words_for
from .rows import Row
from .sentences import mean_tolerance
from ..text import number, span

__all__ = ['COLUMNS', 'Column', 'Table']

_MOST_ROWS = 40  # A longer table is folded
_ENDS, _RARE = 8, 10  # Rows shown at either end of it, and how many amid them because their status is rare


@dataclass(frozen=True)
class Column:
    "A column of the report. It is shown if any row has its field."
    name: str
    field: str  # Of `Row`; of "status", what is written are its `Words`
    write: Callable[[Any], str] = str  # Writes the cell of a row
    fold: Callable[[list[Any]], str] = lambda values: ''  # Writes the cell of a run of rows
    left: bool = False  # Whether it is aligned to the left
    bar: bool = False  # Whether a bar shows it beside the target, in HTML
    of_run: bool = False  # Whether it is shown only where LSUV has run, and not in a look

    def given(self, rows: Sequence[Row]) -> bool: return any(getattr(r, self.field) is not None for r in rows)


def _count(words: list[Words]) -> str: return _counted([w.word for w in words])


def _counted(words: list[str]) -> str:
    counts = Counter(words)
    return ', '.join(f'{n} {s}' for s, n in counts.items()) if len(counts) > 1 else words[0]


COLUMNS = (
    Column('layer', 'name', lambda name: name or '(model)', lambda names: f'... {len(names)} more', left=True),
    Column('kind', 'kind', left=True),
    Column('output', 'shape', lambda shape: 'x'.join(map(str, shape)), left=True),
    Column('mean before', 'mean_before', number),
    Column('mean', 'mean', number, span),
    Column('std before', 'std_before', partial(number, small=True), bar=True),
    Column('std', 'std', partial(number, small=True), span, bar=True),
    Column('grad std', 'grad_std', '{:.2e}'.format),
    Column('grad/weight', 'weight_grad', '{:.2e}'.format),
    Column('start', 'start', fold=_counted, left=True),
    Column('gain', 'gain', '{:.3g}'.format, of_run=True),
    Column('passes', 'passes', of_run=True),
    Column('status', 'status', lambda words: words.word, _count, left=True),
)


class Table:
    "A table of rows: its `columns`, and `lines`, the rows of each line and its cells."
    def __init__(self,
        rows: Sequence[Row],
        corrected: bool,  # Whether LSUV has run, or only looked
        folds: bool = True  # Whether a long table is folded
    ):
        self.rows,self.corrected = rows,corrected
        self.columns = [c for c in COLUMNS if c.given(rows) and (corrected or not c.of_run)]
        shown = self._shown() if folds else range(len(rows))
        self.lines: list[tuple[list[Row], list[str]]] = []
        for folded, run in groupby(range(len(rows)), key=lambda i: i not in shown):
            some = [rows[i] for i in run]
            for part in [some] if folded else [[r] for r in some]:
                self.lines.append((part, [self._cell(c, part) for c in self.columns]))

    def value(self, c: Column, r: Row) -> Any:
        "What a cell shows: a field of the row, or the words for its status."
        return words_for(r.status, self.corrected, r.std) if c.field == 'status' else getattr(r, c.field)

    def _cell(self, c: Column, rows: list[Row]) -> str:
        values = [self.value(c, r) for r in rows]
        if len(rows) > 1: return c.fold(values)
        unknown = values[0] is None or values[0] != values[0] and rows[0].status == Status.NOT_CALLED
        return '' if unknown else c.write(values[0])

    def _shown(self) -> set[int]:
        "The rows with a line of their own: of a long table its ends, rare ones, and the first of each status."
        n = len(self.rows)
        if n <= _MOST_ROWS: return set(range(n))
        shown,room = {*range(_ENDS), *range(n - _ENDS, n)},_RARE
        for which in sorted(([i for i, r in enumerate(self.rows) if r.status == s] for s in STATUSES), key=len):
            new = which if len(which) <= room else which[:1]
            shown.update(new)
            room = max(room - len(new), 0)
        return shown

    @property
    def notes(self) -> list[Words]:
        "What the statuses of the table mean, and what to do. A remark of the report tells why weights were put back."
        found = [Words('ok', 'done', mean_tolerance(self.rows))] if self.corrected else []
        for s in STATUSES:
            found += [words_for(s, self.corrected, r.std) for r in self.rows if r.status == s != Status.UNDONE]
        return [words for words in dict.fromkeys(found) if words.note]

    def text(self) -> str:
        "The table in columns of text."
        lines = [[c.name for c in self.columns], *(cells for _, cells in self.lines)]
        widths = [max(map(len, cells)) for cells in zip(*lines)]
        lines.insert(1, ['-'*w for w in widths])
        pad = [str.ljust if c.left else str.rjust for c in self.columns]
        return '\n'.join('  '.join(p(t, w) for p, t, w in zip(pad, line, widths)).rstrip() for line in lines)
