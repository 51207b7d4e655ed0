"""A diagnosis of recorded layers, in sentences.

`diagnose` looks at the training records of each layer for four troubles: it explodes, vanishes, is mostly dead or
saturates. Each trouble of each layer is a `Finding`, and a `Diagnosis` is the list of them.
What counts as trouble depends on the layer: see `RecordedLayer`."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .layers import Bound, RecordedLayer
from .records import RecordStore

__all__ = ['Finding', 'Diagnosis', 'Limits', 'diagnose']


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
    label: str = ''  # Name, kind and channels of the layer

    def __str__(self) -> str:
        spans = [f'{a}' if a == b else f'{a} to {b}' for a, b in self.spans[:3]]
        more = f' and {_number(len(self.spans) - 3, "more stretch", "more stretches")}' if len(self.spans) > 3 else ''
        one = len(spans) == 1 and self.spans[0][0] == self.spans[0][1]
        when = f"{'step' if one else 'steps'} {', '.join(spans)}{more}"
        shown = f'{self.records} of {_number(self.of, "record")}'
        return f'{self.label or self.layer} {self.problem} in {shown} ({when}): {self.words} {self.worst:.3g}'


class Diagnosis(list[Finding]):
    "A `Finding` for each trouble of each layer, which prints as sentences."
    def __init__(self,
        found: Iterable[Finding],  # One for each trouble of each layer
        records: int,  # How many records were looked at
        first: int,  # Their first training step
        last: int  # and their last
    ):
        super().__init__(found)
        self.over = f'{_number(records, "record")} (steps {first} to {last})'

    def __repr__(self) -> str:
        if not self: return f'No layer vanishes, explodes, saturates or is mostly dead in {self.over}.'
        n = len({f.layer for f in self})
        title = f'{_number(n, "layer has", "layers have")} a problem in {self.over}:'
        return '\n'.join([title, *(f'- {f}' for f in self)])


def _number(n: int, one: str, many: str = '') -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


class Limits(NamedTuple):
    "Where trouble begins, as the parameters of `ActivationStatsRecorder.diagnose` say."
    vanish: float
    explode: float
    dead: float
    saturate: float


class _Check(NamedTuple):
    "One trouble, looked for in all records of a layer."
    problem: str
    shows: np.ndarray  # (records,): the record shows it
    badness: np.ndarray  # (records,): how bad it is; the size is the statistic of `words`
    words: str


def diagnose(
    store: RecordStore,  # What was recorded
    limits: Limits  # Where trouble begins
) -> Diagnosis:  # A `Finding` for each trouble of each layer
    "Find the layers that vanish, explode, saturate or are mostly dead, and the training steps of each trouble."
    records = store.records('train')
    steps = np.array([r.step for r in records])
    called = np.stack([r.ns[:, 0] > 0 for r in records])
    mean, std, dead = (store.values(records, column) for column in ('mean', 'std', 'dead'))
    found = []
    for i, layer in enumerate(store.layers):
        at = called[:, i]
        for check in _checks(layer, mean[at, i], std[at, i], dead[at, i], limits):
            if not check.shows.any(): continue
            worst = abs(float(check.badness[check.shows].max()))
            found.append(Finding(layer.name, check.problem, _spans(steps[at], check.shows), int(check.shows.sum()),
                                 int(at.sum()), worst, check.words, layer.label))
    return Diagnosis(found, len(records), int(steps[0]), int(steps[-1]))


def _checks(
    layer: RecordedLayer,
    mean: np.ndarray,  # (records,) of those that called the layer, as `std` and `dead`
    std: np.ndarray,
    dead: np.ndarray,
    limits: Limits
) -> Iterator[_Check]:
    "The troubles that a layer can have."
    size = np.fmax(np.abs(mean), std)
    broken = ~np.isfinite(mean) | np.isinf(std)
    yield _Check('explodes', broken | (size > limits.explode), np.where(broken, np.inf, size), 'mean or std up to')
    vanishing = std < limits.vanish
    yield _Check('vanishes', vanishing, -std, 'std down to')
    if layer.can_die:  # a vanished layer says so above
        yield _Check('is mostly dead', (dead >= limits.dead) & ~vanishing, dead, 'dead share up to')
    if layer.bound is not None:
        yield _saturation(layer.bound, mean, std, limits.saturate)


def _saturation(bound: Bound, mean: np.ndarray, std: np.ndarray, limit: float) -> _Check:
    "Whether a bounded output is at its ends, or an activation that follows is flat where its inputs are."
    if bound.at is not None:
        size = np.hypot(mean, std)
        return _Check('saturates', size >= bound.at, size, 'root mean square before the activation up to')
    middle, half = (bound.lo + bound.hi)/2, (bound.hi - bound.lo)/2
    spread = ((mean - middle)**2 + std**2)/half**2
    return _Check('saturates', spread >= limit, spread, 'mean square distance from the middle up to a share of')


def _spans(steps: np.ndarray, where: np.ndarray) -> list[tuple[int, int]]:
    "First and last step of each run of True."
    edges = np.flatnonzero(np.diff(np.r_[False, where, False].astype(int)))
    return [(int(steps[a]), int(steps[b-1])) for a, b in zip(edges[::2], edges[1::2])]
