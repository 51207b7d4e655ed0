"What a report says in sentences. `report` puts them together for a warning, a log line or a page."
from __future__ import annotations

import math
from collections import Counter
from typing import Sequence

from .rows import DONE, OUTSIDE, STATUSES, Row
from .text import counted, number, some_names

__all__ = ['seen', 'done', 'covered', 'left_out', 'left_alone', 'remarks']

_NEARLY_ALL = 0.99  # A coverage below this is told


def _others(rows: Sequence[Row]) -> str:
    "How many layers are not done, by status."
    counts = Counter(r.status for r in rows)
    return ''.join(f', {counts[s]} {s}' for s in STATUSES if counts[s] and s not in DONE)


def _n_done(rows: Sequence[Row]) -> int: return sum(r.status in DONE for r in rows)


def seen(rows: Sequence[Row]) -> str:
    "What `layer_stats` found, in one line."
    return f"{counted(len(rows), 'layer')}: {_n_done(rows)} with a std within 0.1 of 1{_others(rows)}."


def done(
    rows: Sequence[Row],
    order: str,
    n_passes: int,
    loss: tuple[float, float] | None,
    loss_note: str  # All of these as in `LSUVReport`
) -> str:
    "What LSUV did, in one line."
    without = sum(r.status == 'no bias' for r in rows)
    of_them = f' ({without} of them without a bias)' if without else ''
    told = f" Training loss {number(loss[0])} before, {number(loss[1])} after" if loss else ''
    if told and loss_note: told += f" ({loss_note})"
    layers = counted(len(rows), 'layer')
    return (f"LSUV: {_n_done(rows)} of {layers} at {_target(rows, order)}{of_them}{_others(rows)}. "
            f"Order {order!r}, {counted(n_passes, 'forward pass', 'forward passes')}.{told}{'.' if told else ''}")


def covered(
    coverage: float,
    outside: dict[str, str]  # Both as in `LSUVReport`
) -> str:
    "How much of the weights is in rows, where that is not nearly all."
    if coverage >= _NEARLY_ALL: return ''
    kinds = ', '.join(dict.fromkeys(outside.values()))
    rest = f' (the rest: {kinds})' if kinds else ''
    return f" These layers, normalized or not, hold {math.floor(coverage*1000)/10:g} % of the weights{rest}."


def left_out(
    outside: dict[str, str]  # As in `LSUVReport`
) -> str:
    "Which weights are in no row, and why; \"\" if there are none."
    by_word = {why: [n for n in outside if outside[n] == why] for why in dict.fromkeys(outside.values())}
    said = '; '.join(f'{some_names(names)} ({why}: {OUTSIDE[why]})' for why, names in by_word.items())
    return f'Weights in no row, left as they are: {said}.' if said else ''


def _target(rows: Sequence[Row], order: str) -> str:
    "What was aimed at, such as \"std 1\"."
    stat = 'std' if 'std' in order else 'mean'
    ranges = [r.std_range if stat == 'std' else r.mean_range for r in rows]
    targets = {round(sum(r)/2, 9) + 0. for r in ranges if r is not None}
    return f'{stat} {targets.pop():g}' if len(targets) == 1 else f'the target {stat}'


def left_alone(rows: Sequence[Row]) -> str:
    "Which layers are not at their target, and why; \"\" if all are."
    by_status = {s: [r.name or '(model)' for r in rows if r.status == s] for s in STATUSES if s not in DONE}
    parts = [f"{s} ({STATUSES[s]}): {some_names(names)}" for s, names in by_status.items() if names]
    n = sum(map(len, by_status.values()))
    return f"LSUV did not normalize {n} of {counted(len(rows), 'layer')}. {'. '.join(parts)}." if parts else ''


def remarks(
    undone: str,  # As in `LSUVReport`
    large_gains: Sequence[Row],
    unusual: str,  # As in `LSUVReport`
    not_taken: str  # Why the loss was not taken; "" if it was, or was not asked for
) -> list[str]:
    "What else a user should look at, and what to do about it."
    found = []
    if undone:
        found.append(f"LSUV put the weights back: {undone}. Use `modules` to leave out layers whose outputs should not "
                     "have std 1, give them another `target_std`, or keep the result with `force=True`.")
    if large_gains:
        gains = some_names([f'{r.name or "(model)"} by {r.gain:.2g}' for r in large_gains])
        found.append(f"LSUV scaled some weights by a lot: {gains}. Check that the mini-batch is normalized as it is in "
                     "training.")
    if unusual:
        found.append(f"The mini-batch is unusual: {unusual}. LSUV needs one like those that the model trains on.")
    if not_taken:
        found.append(f"The training loss was not taken: {not_taken}. So LSUV did not compare it before and after.")
    return found
