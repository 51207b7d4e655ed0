"""A diagnosis of recorded layers, in sentences.

`diagnose` looks at the training records of each layer for four troubles: it explodes, is mostly dead, vanishes or
saturates. Each trouble of each layer is a `Finding`, and a `Diagnosis` is the list of them.
What counts as trouble depends on the layer: see `RecordedLayer`."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from ..text import counted, some_names
from .layers import RecordedLayer
from .records import RecordStore

__all__ = ['Finding', 'Diagnosis', 'diagnose']


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
        more = f' and {counted(len(self.spans) - 3, "more stretch", "more stretches")}' if len(self.spans) > 3 else ''
        one = len(spans) == 1 and self.spans[0][0] == self.spans[0][1]
        when = f"{'step' if one else 'steps'} {', '.join(spans)}{more}"
        shown = f'{self.records} of {counted(self.of, "record")}'
        return f'{self.label or self.layer} {self.problem} in {shown} ({when}): {self.words} {self.worst:.3g}'


class Diagnosis(list[Finding]):
    "A `Finding` for each trouble of each layer, in order of execution, which prints as sentences."
    def __init__(self,
        found: Iterable[Finding],  # One for each trouble of each layer
        records: int,  # How many records were looked at
        first: int,  # Their first training step
        last: int,  # and their last
        unseen: Sequence[str] = ()  # Names of layers that no record shows
    ):
        super().__init__(found)
        self.over = f'{counted(records, "record")} (steps {first} to {last})'
        self.unseen = list(unseen)

    def __repr__(self) -> str:
        lines = [f'No layer vanishes, explodes, saturates or is mostly dead in {self.over}.']
        if self:
            n = len({f.layer for f in self})
            lines = [f'{counted(n, "layer has", "layers have")} a problem in {self.over}:', *(f'- {f}' for f in self)]
        if self.unseen:
            lines.append(f'No record shows {counted(len(self.unseen), "layer")}: {some_names(self.unseen)}.')
        return '\n'.join(lines)


class _Check(NamedTuple):
    "One trouble, looked for in all records of a layer."
    problem: str
    shows: np.ndarray  # (records,): the record shows it
    badness: np.ndarray  # (records,): how bad it is; the size is the statistic of `words`
    words: str


def diagnose(store: RecordStore, vanish: float, explode: float, dead: float, saturate: float) -> Diagnosis:
    "Find the layers in trouble and its training steps. The limits are those of `ActivationStatsRecorder.diagnose`."
    records = store.records('train')
    steps = np.array([r.step for r in records])
    stats = [store.values(records, column) for column in ('mean', 'std', 'dead')]
    called = ~np.isnan(stats[2])
    found = []
    for i in sorted(np.flatnonzero(called.any(0)), key=lambda i: store.ran.get(store.layers[i].name, -1)):
        layer,at = store.layers[i],called[:, i]
        for c in _checks(layer, *(v[at, i] for v in stats), vanish, explode, dead, saturate):
            if not c.shows.any(): continue
            worst = abs(float(c.badness[c.shows].max()))
            found.append(Finding(layer.name, c.problem, _spans(steps[at], c.shows), int(c.shows.sum()), int(at.sum()),
                                 worst, c.words, layer.label))
    unseen = [layer.name for layer, seen in zip(store.layers, called.any(0)) if not seen]
    return Diagnosis(found, len(records), int(steps[0]), int(steps[-1]), unseen)


def _checks(layer: RecordedLayer, mean: np.ndarray, std: np.ndarray, share: np.ndarray, vanish: float, explode: float,
            dead: float, saturate: float) -> Iterator[_Check]:
    "Look for each trouble that a layer can have, in the records that called it."
    size = np.fmax(np.abs(mean), std)
    broken = ~np.isfinite(mean) | np.isinf(std)
    yield _Check('explodes', broken | (size > explode), np.where(broken, np.inf, size), 'mean or std up to')
    zero = size == 0
    silenced = zero | (layer.can_die & (share >= dead))
    vanishing = (std < vanish) & ~silenced
    if layer.starts_at_zero and not zero[-1]: silenced,vanishing = silenced & ~zero,vanishing & False
    yield _Check('is mostly dead', silenced, share, 'dead share up to')
    yield _Check('vanishes', vanishing, -std, 'std down to')
    if layer.bound is None: return
    if layer.bound.at is not None:  # an activation that follows is flat where its inputs are
        rms = np.hypot(mean, std)
        yield _Check('saturates', rms >= layer.bound.at, rms, 'root mean square before the activation up to')
    else:  # a bounded output is at its ends
        lo,hi = layer.bound[:2]
        spread = ((mean - (lo + hi)/2)**2 + std**2)/((hi - lo)/2)**2
        yield _Check('saturates', spread >= saturate, spread, 'mean square distance from the middle up to a share of')


def _spans(steps: np.ndarray, where: np.ndarray) -> list[tuple[int, int]]:
    "Give the first and last step of each run of True."
    edges = np.flatnonzero(np.diff(np.r_[False, where, False].astype(int)))
    return [(int(steps[a]), int(steps[b-1])) for a, b in zip(edges[::2], edges[1::2])]
