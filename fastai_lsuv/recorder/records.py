"""The records of an activation recorder, and the store that keeps them.

A `Record` holds the numbers of all layers in one step. A `RecordStore` keeps records by phase, 'train' and 'valid'.
It keeps a bounded number of them: where there are too many, it drops every second one and asks for half as many.
Records arrive on the device. `RecordStore.fetch` brings them to the host, all in one transfer."""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Iterable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .layers import RecordedLayer

__all__ = ['Record', 'RecordStore', 'COLUMNS', 'GRAD_COLUMNS', 'PHASES']

COLUMNS = ['mean', 'std', 'near_zero', 'dead']
GRAD_COLUMNS = ['grad_mean', 'grad_std', 'grad_zero']
PHASES = 'train', 'valid'


@dataclass
class Record:
    "One recorded step."
    values: Tensor | np.ndarray  # (layers, columns and bins), NaN where not called; on the device until it is fetched
    epoch: int
    step: int
    phase: str
    written: bool = False

    def arrange(self, at: list[int]):
        "Take the rows that `at` numbers. Row -1 is that of a layer that was not called."
        xp = torch if isinstance(self.values, Tensor) else np
        self.values = xp.concatenate([self.values, xp.full_like(self.values[:1], float('nan'))])[at]


class RecordStore:
    "Records by phase, bounded in number."
    def __init__(self, options: SimpleNamespace):
        self.options = options
        self.columns = COLUMNS + GRAD_COLUMNS*bool(options.grads)
        self.clear()

    def clear(self):
        "Forget everything."
        self.layers: list[RecordedLayer] = []
        self.begun_with: list[str] = []  # Names of the layers that a fit began with, before operations are seen
        self.ran: dict[str, int] = {}  # Place of each layer in the order of execution
        self.rows: dict[str, list[Record]] = {p: [] for p in PHASES}
        self.strides,self.seen = dict.fromkeys(PHASES, 1),dict.fromkeys(PHASES, 0)
        self.before = self.reached = 0, 0  # Epochs and steps of earlier fits, and so far

    def begin(self, layers: list[RecordedLayer]) -> bool:
        "Start a fit. Forget earlier ones unless they are to be kept, and the layers are the same: then return True."
        append,names = self.options.append,[layer.name for layer in layers]
        goes_on = append and names == self.begun_with
        if append and self.begun_with and not goes_on:
            warnings.warn("ActivationStatsRecorder(append=True): the layers changed since the last fit, "
                          "so recording starts anew")
        if not goes_on:
            self.clear()
            self.layers,self.begun_with = layers,names
        self.before = self.reached
        return goes_on

    def arrange(self, layers: list[RecordedLayer]):
        "Take other layers. Records that are there get a row for each that is new."
        places = {layer.name: i for i, layer in enumerate(self.layers)}
        at = [places.get(layer.name, -1) for layer in layers]
        self.layers = layers
        if at == list(range(len(places))): return
        for record in sum(self.rows.values(), []): record.arrange(at)

    def reach(self, epoch: int, step: int):
        "Note how far the fit has come."
        self.reached = epoch + self.before[0] + 1, step + self.before[1] + 1

    def is_due(self, phase: str) -> bool:
        "Tell whether the next record is to be kept; each call counts one."
        self.seen[phase] += 1
        return (self.seen[phase] - 1) % self.strides[phase] == 0

    def add(self, values: Tensor, phase: str, epoch: int, step: int, called: Iterable[str] = ()):
        "Append a record; where there are too many, keep every second one and ask for half as many from now on."
        for name in called: self.ran.setdefault(name, len(self.ran))
        rows = self.rows[phase]
        rows.append(Record(values, epoch + self.before[0], step + self.before[1], phase))
        if len(rows) > self.options.max_steps:
            self.rows[phase] = rows[::2]
            self.strides[phase] *= 2

    def fetch(self):
        "Bring records to the host, in one transfer."
        rows = [r for rows in self.rows.values() for r in rows if isinstance(r.values, Tensor)]
        if not rows: return
        for record, values in zip(rows, torch.stack([r.values for r in rows]).cpu().numpy()):
            record.values = values.copy()

    def records(self, phase: str | None = None) -> list[Record]:
        "List the records on the host, in order of time. Raises `ValueError` if there are none."
        if phase is not None and phase not in PHASES:
            raise ValueError(f"phase: got {phase!r}; it takes 'train' or 'valid'")
        self.fetch()
        rows = [r for p, rows in self.rows.items() for r in rows if phase in (None, p)]
        if not rows and phase == 'valid' and not self.options.valid:
            raise ValueError("no validation is recorded: pass `valid=True` to ActivationStatsRecorder, then fit")
        if not rows: raise ValueError("nothing is recorded yet: call `learn.fit` with this callback attached")
        return sorted(rows, key=lambda r: (r.epoch, r.step))  # training stays before validation of the same step

    def values(self, records: list[Record], column: str) -> np.ndarray:  # (records, layers)
        "Give one statistic of all layers over time."
        return np.stack([r.values[:, self.columns.index(column)] for r in records])

    def histograms(self, i: int, phase: str) -> np.ndarray:  # (bins, records)
        "Give the elements of layer `i` in each bin over time."
        return np.stack([r.values[i, len(self.columns):] for r in self.records(phase)]).T

    def need_histograms(self):
        "Raise `ValueError` if no histograms are recorded."
        if self.options.bins is None:
            raise ValueError("hist: no histograms are recorded; pass `hist=True` to ActivationStatsRecorder, then fit")

    def index(self, i: int | str) -> int:
        "Give the place of a layer, by its place or its name. Raises `ValueError` for others, and before a fit."
        self.records()
        names = [layer.name for layer in self.layers]
        if isinstance(i, str) and i in names: return names.index(i)
        if isinstance(i, (int, np.integer)) and -len(names) <= i < len(names): return int(i) % len(names)
        some = ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')
        raise ValueError(f"i: got {i!r}; it takes a number below {len(names)}, or the name of a recorded layer: {some}")

    def frame(self, records: list[Record]) -> pd.DataFrame:
        "Make a table, with a row for each record and layer."
        columns: dict[str, Any] = {}
        for key in 'epoch', 'step', 'phase':
            columns[key] = np.repeat(np.array([getattr(r, key) for r in records]), len(self.layers))
        columns['layer'] = np.tile(np.array([layer.name for layer in self.layers], dtype=object), len(records))
        return pd.DataFrame(columns | {column: self.values(records, column).ravel() for column in self.columns})
