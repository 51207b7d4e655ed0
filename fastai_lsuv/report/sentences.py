"What an `LSUVReport` says in sentences, for a warning, a log line or a page."
from __future__ import annotations

from collections import Counter
from math import isfinite
from typing import TYPE_CHECKING, Sequence

from ..statuses import DONE, OUTSIDE, STATUSES, Status
from .rows import Row
from ..text import counted, some_names

if TYPE_CHECKING: from .report import LSUVReport

__all__ = ['headline', 'covered', 'left_out', 'left_alone', 'mean_tolerance', 'remarks']

_TOLD = 0.01  # A share of the weights in no row that is greater than this is told


def headline(report: LSUVReport) -> str:
    "What LSUV did, or `layer_stats` found, in one line, with advice if there is any."
    layers,counts = counted(len(report), 'layer'),Counter(r.status for r in report)
    n = sum(counts[s] for s in DONE)
    if not report.order:
        stds = [r.std for r in report if isfinite(r.std)]
        reach = f", and goes from {min(stds):.2g} to {max(stds):.2g}" if len(stds) > 1 else ''
        return f"The std is within 0.1 of 1 in {n} of {layers}{reach}."
    note = f' ({report.loss_note})' if report.loss_note else ''
    loss = f" Loss {' -> '.join(map(_loss, report.loss))}{note}." if report.loss else ''
    mirrored = sum(r.start == 'mirrored' for r in report)
    start = f' {mirrored} of {layers} start mirrored.' if mirrored else ''
    advice = f' {report.advice}' if report.advice else ''
    passes = counted(report.n_passes, 'pass', 'passes')
    return f'LSUV: {n} of {layers} at {_target(report)} ({passes}).{loss}{start}{advice}'


def _loss(v: float) -> str: return f'{v:.2f}' if 0.1 <= abs(v) < 1e4 else f'{v:.2g}'


def _target(report: LSUVReport) -> str:
    "What was aimed at, such as \"std 1\"."
    stat = 'std' if 'std' in report.order else 'mean'
    ranges = [r.std_range if stat == 'std' else r.mean_range for r in report]
    targets = {round(sum(r)/2, 9) + 0. for r in ranges if r is not None}
    return f'{stat} {targets.pop():g}' if len(targets) == 1 else f'the target {stat}'


def covered(report: LSUVReport) -> str:
    "How much of the weights is in no row, unless it is little or the user has left it out."
    told = 1 - report.coverage > _TOLD and {*report.outside.values()} - {'not selected'}
    share = float(f'{100 - 100*report.coverage:.2g}')
    return f" {share:g} % of the weights are outside these layers (see `report.outside`)." if told else ''


def left_out(report: LSUVReport) -> str:
    "Which weights are in no row, and why; \"\" if there are none."
    names = {why: [n for n, w in report.outside.items() if w == why] for why in report.outside.values()}
    said = '; '.join(f'{some_names(names[why])} ({why}: {OUTSIDE[why]})' for why in names)
    part = float(f'{100 - 100*report.coverage:.2g}')
    return f"{part:g} % of the weights are outside these layers, and LSUV does not change them: {said}." if said else ''


def left_alone(report: LSUVReport) -> str:
    "Which layers are not at their target, and why, a line a status; \"\" if all are."
    names = {s: [r.name or '(model)' for r in report if r.status == s] for s in STATUSES if s not in DONE}
    lines = [f"- {s}: {some_names(names[s])}. {STATUSES[s][0].upper()}{STATUSES[s][1:]}." for s in names if names[s]]
    n = sum(map(len, names.values()))
    return '\n'.join([f"LSUV did not normalize {n} of {counted(len(report), 'layer')}:", *lines]) if lines else ''


def mean_tolerance(rows: Sequence[Row]) -> str:
    "What a mean may be off by and count as at its target; \"\" if each is within `batch_tol`, the std's tolerance."
    ok = [(r.mean, r.mean_range, r.std_range) for r in rows if r.status == Status.OK and r.mean_range and r.std_range]
    reach = [(high - low)/2 for mean, (low, high), std in ok if abs(mean - (low + high)/2) > (std[1] - std[0])/2]
    if not reach: return ''
    return (f"here a mean may be up to {max(reach):.2g} off its target. On a fresh mini-batch, its tolerance is "
            "`batch_tol` or 3/sqrt(samples) stds, whichever is larger.")


def remarks(report: LSUVReport) -> list[str]:
    "What else a user should look at, and what to do about it."
    gains = some_names([f'{r.name or "(model)"} by {r.gain:.3g}' for r in report.large_gains])
    not_taken = '' if report.loss else report.loss_note
    found = [
        (report.undone, f"LSUV put the weights back: {report.undone}. Leave layers out with `exclude` if their outputs "
         "should not have std 1, give them another `target_std`, or keep the result with `force=True`."),
        (gains, f"LSUV scaled some weights by a lot: {gains}. Check that the mini-batch is normalized as in training."),
        (report.unusual, f"The mini-batch is unusual: {report.unusual}. LSUV needs one like those in training."),
        (report.not_mirrored, f"No layer starts mirrored: {report.not_mirrored}. All keep their weights."),
        (not_taken, f"LSUV could not take the training loss ({not_taken}), so it did not compare before and after."),
    ]
    return [said for why, said in found if why]
