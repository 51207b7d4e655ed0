"""The report as HTML for dark and light notebooks: the table, bars of the stds, statuses in colour and words.

Backgrounds are translucent, and text has the colour of the page. A page that drops the style still shows each word and
number. A long table is folded, and the whole of it is behind a click."""
from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

from ..statuses import MARKS, Words
from .rows import Row
from .sentences import headline, left_out
from .tables import Column, Table

if TYPE_CHECKING: from .report import LSUVReport

__all__ = ['report_html']

_STYLE = '''<style>
.lsuv { overflow-x: auto; } .lsuv p { margin: .4em 0; }
.lsuv td, .lsuv th { padding: .15em .6em; text-align: right; vertical-align: top; white-space: nowrap; }
.lsuv .word { text-align: left; }
.lsuv .bar { position: relative; width: 5em; height: .4em; margin: .1em 0 .15em auto; }
.lsuv .bar::after { content: ""; position: absolute; left: 50%; top: -.1em; height: .6em; border-left: 2px solid; }
.lsuv .bar i { display: block; height: 100%; background: rgb(56,132,214); }
.lsuv .before i { background: rgba(128,128,128,.8); } .lsuv .beyond i { border-right: .4em double rgb(214,90,40); }
.lsuv .status { padding: .05em .5em; border-radius: .7em; }
.lsuv .bar, .lsuv .left { background: rgba(128,128,128,.25); }
.lsuv .done { background: rgba(46,160,67,.25); } .lsuv .doubt { background: rgba(219,140,0,.28); }
.lsuv .bad { background: rgba(218,54,51,.32); }
</style>'''


def report_html(report: LSUVReport) -> str:
    "The headline, the table, what its statuses mean, and the remarks."
    table,whole = (Table(report.rows, bool(report.order), folds) for folds in (True, False))
    notes = [f'{_status(words)} {_prose(words.note)}' for words in table.notes]
    notes += [*(f'! {_prose(r)}' for r in report.remarks), *filter(None, [_prose(left_out(report))])]
    more = f'<details><summary>All {len(report)} layers</summary>{_table(whole)}</details>'
    return (f'{_STYLE}<div class="lsuv"><p>{_prose(headline(report))}</p>{_table(table)}'
            f'{"".join(f"<p>{note}</p>" for note in notes)}{more*(len(table.lines) < len(report))}</div>')


def _table(table: Table) -> str:
    def line(cells, tag, rows=()):
        inner = (_cell(text, c, tag, [(table.value(c, r), r) for r in rows]) for text, c in zip(cells, table.columns))
        return f"<tr>{''.join(inner)}</tr>"

    body = ''.join(line(cells, 'td', rows) for rows, cells in table.lines)
    return f"<table><thead>{line([c.name for c in table.columns], 'th')}</thead><tbody>{body}</tbody></table>"


def _cell(text: str, column: Column, tag: str, shown: list[tuple[Any, Row]]) -> str:
    "A cell; of one row, with a bar if it is a std, and in colour if it is a status."
    inner,(value, row) = escape(text),shown[0] if len(shown) == 1 else (None, None)
    if isinstance(value, Words): inner = _status(value)
    elif value is not None and column.bar: inner += _bar(value, row.std_range, column.field)
    return f'<{tag} class="word">{inner}</{tag}>' if column.left else f'<{tag}>{inner}</{tag}>'


def _prose(text: str) -> str:
    "A sentence, with what stands in backticks as code."
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', escape(text))


def _status(words: Words) -> str:
    return f'<span class="status {words.tone}">{MARKS[words.tone]} {escape(words.word)}</span>'


def _bar(std: float, target: tuple[float, float] | None, field: str) -> str:
    "A bar that reaches its middle, which has a tick, at the target. One that ends in a double line goes on."
    if not std >= 0 or target is None: return ''
    share = 100*std/sum(target)
    kind = ('before' if field == 'std_before' else 'after') + ' beyond'*(share > 100)
    return f'<div class="bar {kind}"><i style="width:{min(share, 100):.0f}%"></i></div>'
