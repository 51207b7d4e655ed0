"""The report as HTML for dark and light notebooks: the table, bars of the stds, statuses in colour and words.

Backgrounds are translucent, and text has the colour of the page. A page that drops the style still shows each word and
number. A long table is folded, and the whole of it is behind a click."""
from __future__ import annotations

import re
from html import escape

from .rows import DONE, Row
from .tables import WORDS, Table

__all__ = ['report_html']

# A mark and a class of colour for each status, other than "!".
_MARKS = {**dict.fromkeys(DONE, ('✓', 'done')), **dict.fromkeys(('frozen', 'tied', 'not called'), ('–', 'left')),
          **dict.fromkeys(('non-finite', 'undone'), ('✗', 'bad'))}

_STYLE = '''<style>
.lsuv { overflow-x: auto; }
.lsuv td, .lsuv th { padding: .15em .6em; text-align: right; vertical-align: top; white-space: nowrap; }
.lsuv .word { text-align: left; }
.lsuv .bar { position: relative; width: 5em; height: .4em; margin: .1em 0 .15em auto; }
.lsuv .bar { background: rgba(128,128,128,.25); }
.lsuv .bar::after { content: ""; position: absolute; left: 50%; top: -.1em; height: .6em; border-left: 2px solid; }
.lsuv .bar i { display: block; height: 100%; background: rgb(56,132,214); }
.lsuv .before i { background: rgba(128,128,128,.8); }
.lsuv .beyond i { border-right: .4em double rgb(214,90,40); }
.lsuv .status { padding: .05em .5em; border-radius: .7em; background: rgba(219,140,0,.28); }
.lsuv .done { background: rgba(46,160,67,.25); }
.lsuv .left { background: rgba(128,128,128,.25); }
.lsuv .bad { background: rgba(218,54,51,.32); }
.lsuv p { margin: .4em 0; }
</style>'''


def report_html(
    summary: str,
    remarks: list[str],  # What else a user should look at
    others: list[str],  # What else there is to say
    table: Table,
    whole: Table | None = None  # The same without folds, if it was folded
) -> str:
    "The summary, the table and what its statuses mean."
    notes = ''.join([*(f'<p>{_status(s)} {_words(note)}</p>' for s, note in table.notes),
                     *(f'<p>! {_words(r)}</p>' for r in remarks), *(f'<p>{_words(o)}</p>' for o in others)])
    n = len(table.rows)
    more = f'<details><summary>All {n} layers</summary>{_table(whole)}</details>' if whole is not None else ''
    return f'{_STYLE}<div class="lsuv"><p>{escape(summary)}</p>{_table(table)}{notes}{more}</div>'


def _table(table: Table) -> str:
    def row(cells, tag, rows=()):
        inner = (_cell(c, h, tag, rows[0] if len(rows) == 1 else None) for c, h in zip(cells, table.head))
        return f"<tr>{''.join(inner)}</tr>"

    body = ''.join(row(cells, 'td', rows) for rows, cells in table.lines)
    return f'<table><thead>{row(table.head, "th")}</thead><tbody>{body}</tbody></table>'


def _cell(text: str, column: str, tag: str, row: Row | None) -> str:
    "A cell; of a row, with a bar if it is a std, and in colour if it is a status."
    start = f'<{tag} class="word">' if column in WORDS else f'<{tag}>'
    if row is not None and column == 'status': inner = _status(text)
    elif row is not None and column == 'std before': inner = escape(text) + _bar(row.std_before, row, 'before')
    elif row is not None and column == 'std': inner = escape(text) + _bar(row.std, row, 'after')
    else: inner = escape(text)
    return f'{start}{inner}</{tag}>'


def _words(text: str) -> str:
    "A sentence, with what stands in backticks as code."
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', escape(text))


def _status(status: str) -> str:
    mark,color = _MARKS.get(status, ('!', ''))
    return f'<span class="{" ".join(filter(None, ["status", color]))}">{mark} {escape(status)}</span>'


def _bar(std: float | None, row: Row, when: str) -> str:
    "A bar that reaches its middle, which has a tick, at the target. One that ends in a double line goes on."
    if std is None or not std >= 0 or row.std_range is None or row.status == 'not called': return ''
    share = 100*std/sum(row.std_range)
    beyond = ' beyond' if share > 100 else ''
    return f'<div class="bar {when}{beyond}"><i style="width:{min(share, 100):.0f}%"></i></div>'
