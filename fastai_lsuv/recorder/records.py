"""The records of an activation recorder, and the store that keeps them.

A `Record` holds the numbers of all layers in one step. A `RecordStore` keeps records by phase, 'train' and 'valid'.
It keeps a bounded number of them: where there are too many, it drops every second one and asks for half as many.
Records arrive on the device. `RecordStore.fetch` brings them to the host, all in one transfer.
`frame` makes a table of records, which readers and writers share."""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .layers import RecordedLayer
from .options import RecorderOptions

__all__ = ['Record', 'RecordStore', 'COLUMNS', 'GRAD_COLUMNS']

COLUMNS = ['mean', 'std', 'near_zero', 'dead']
GRAD_COLUMNS = ['grad_mean', 'grad_std', 'grad_zero']
PHASES = 'train', 'valid'


@dataclass
class Record:
    "One recorded step: `COLUMNS`, `GRAD_COLUMNS` if asked for, and bins. Shares are counts until it is fetched."
    ns: np.ndarray  # (layers, 1), or (layers, 2) with gradients: how many elements were measured
    values: Tensor | np.ndarray  # (layers, columns): on the device until it is fetched
    epoch: int = 0
    step: int = 0
    phase: str = 'train'
    fetched: bool = False
    written: bool = False

    @staticmethod
    def merge(records: list[Record]) -> Record:
        "Statistics of the elements of several records together, none of them fetched."
        if len(records) == 1: return records[0]
        values = torch.stack([r.values for r in records])
        ns = np.stack([r.ns for r in records])
        counts = torch.from_numpy(ns).to(values.device, values.dtype, non_blocking=True).unbind(-1)
        kinds = [COLUMNS, GRAD_COLUMNS][:len(counts)]
        parts = []
        for n, kind in zip(counts, kinds):
            parts.append(_merge(values[..., :len(kind)], n))
            values = values[..., len(kind):]
        parts.append(torch.where(counts[0][..., None] > 0, values, 0.).sum(0))  # histograms
        return Record(ns.sum(0), torch.cat(parts, 1))

    def arrange(self, at: list[int]):
        "Have the rows that `at` numbers. Row -1 is that of a layer that was not called."
        row = np.zeros_like(self.ns[:1])
        self.ns = np.concatenate([self.ns, row])[at]
        if isinstance(self.values, Tensor):
            self.values = torch.cat([self.values, torch.full_like(self.values[:1], float('nan'))])[at]
        else:
            self.values = np.concatenate([self.values, np.full_like(self.values[:1], np.nan)])[at]

    def fetch(self, values: np.ndarray):
        "Take `values` from the host, and turn counts into shares."
        self.values = values
        self.fetched = True
        shares = [[2, 3], [len(COLUMNS) + 2]]
        for n, columns in zip(self.ns.T, shares):
            self.values[:, columns] /= np.where(n > 0, n, np.nan)[:, None]


def _merge(
    values: Tensor,  # (records, layers, columns): mean, std and counts
    n: Tensor  # (records, layers): elements
) -> Tensor:  # (layers, columns)
    "Mean and std of the elements of several records together, and the sums of counts."
    mean, std, *counts = torch.where(n[..., None] > 0, values, 0.).unbind(-1)
    total = n.sum(0)
    together = (mean*n).sum(0)/total
    within = torch.where(n > 1, std.square()*(n-1), 0.).sum(0)
    var = (within + ((mean-together).square()*n).sum(0))/(total-1).clamp(min=1)
    return torch.stack([together, var.sqrt(), *(c.sum(0) for c in counts)], 1)


class RecordStore:
    "Records by phase, bounded in number."
    def __init__(self,
        options: RecorderOptions  # What is recorded, and how much of it is kept
    ):
        self.options = options
        self.columns = COLUMNS + GRAD_COLUMNS*bool(options.grads)
        self.clear()

    def clear(self):
        "Forget everything."
        self.layers = []
        self.begun_with = []  # Names of the layers that a fit began with, before operations are seen
        self.rows = {p: [] for p in PHASES}
        self.strides = {p: 1 for p in PHASES}
        self.seen = {p: 0 for p in PHASES}
        self.before = 0, 0  # Epochs and steps of earlier fits
        self.reached = 0, 0  # Epochs and steps so far

    def begin(self,
        layers: list[RecordedLayer]  # Of the fit that starts
    ) -> bool:  # Whether it goes on after the records of earlier fits
        "Start a fit. Forget earlier ones unless they are to be kept, and the layers are the same."
        append = self.options.append
        names = [layer.name for layer in layers]
        goes_on = append and names == self.begun_with
        if append and self.begun_with and not goes_on:
            warnings.warn("ActivationStatsRecorder(append=True): the layers changed since the last fit, "
                          "so recording starts anew")
        if not goes_on:
            self.clear()
            self.layers, self.begun_with = layers, names
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
        "Whether the next record is to be kept; each call counts one."
        due = self.seen[phase] % self.strides[phase] == 0
        self.seen[phase] += 1
        return due

    def add(self, record: Record, phase: str, epoch: int, step: int):
        "Append a record; where there are too many, keep every second one and ask for half as many from now on."
        record.phase, record.epoch, record.step = phase, epoch + self.before[0], step + self.before[1]
        rows = self.rows[phase]
        rows.append(record)
        if len(rows) > self.options.max_steps:
            self.rows[phase] = rows[::2]
            self.strides[phase] *= 2

    def fetch(self):
        "Bring records to the host, in one transfer."
        rows = [r for rows in self.rows.values() for r in rows if not r.fetched]
        if not rows: return
        for record, values in zip(rows, torch.stack([r.values for r in rows]).cpu().numpy()):
            record.fetch(values.copy())

    def unwritten(self) -> list[Record]:
        "Records that are in no file yet."
        return [r for rows in self.rows.values() for r in rows if not r.written]

    def records(self, phase: str | None = None) -> list[Record]:
        "Records on the host, in order of time. Raises `ValueError` if there are none."
        if phase is not None and phase not in PHASES:
            raise ValueError(f"phase: got {phase!r}; it takes 'train' or 'valid'")
        self.fetch()
        rows = [r for p, rows in self.rows.items() for r in rows if phase in (None, p)]
        if not rows:
            if phase == 'valid' and not self.options.valid:
                raise ValueError("no validation is recorded: pass `valid=True` to ActivationStatsRecorder, then fit")
            raise ValueError("nothing is recorded yet: call `learn.fit` with this callback attached")
        # The order is stable: training comes before validation of the same step.
        return sorted(rows, key=lambda r: (r.epoch, r.step))

    def values(self, records: list[Record], column: str) -> np.ndarray:  # (records, layers)
        "One statistic of all layers over time."
        j = self.columns.index(column)
        return np.stack([r.values[:, j] for r in records])

    def histograms(self, i: int, phase: str) -> np.ndarray:  # (bins, records)
        "How many elements of layer `i` are in each bin. Raises `ValueError` if no histograms are recorded."
        self.need_histograms()
        return np.stack([r.values[i, len(self.columns):] for r in self.records(phase)]).T

    def need_histograms(self):
        "Raise `ValueError` if no histograms are recorded."
        if self.options.bins is not None: return
        raise ValueError("hist: no histograms are recorded; pass `hist=True` to ActivationStatsRecorder, then fit")

    def index(self, i: int | str) -> int:
        "The place of a layer, given its place or its name. Raises `ValueError` for others, and before a fit."
        self.records()
        names = [layer.name for layer in self.layers]
        if isinstance(i, str) and i in names: return names.index(i)
        if isinstance(i, (int, np.integer)) and -len(names) <= i < len(names): return int(i) % len(names)
        some = ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')
        raise ValueError(f"i: got {i!r}; it takes a number below {len(names)}, or the name of a recorded layer: {some}")

    def frame(self, records: list[Record]) -> pd.DataFrame:
        "A row for each record and layer."
        n = len(self.layers)
        columns: dict[str, Any] = {}
        for key in 'epoch', 'step', 'phase':
            columns[key] = np.repeat(np.array([getattr(r, key) for r in records]), n)
        columns['layer'] = np.tile(np.array([layer.name for layer in self.layers], dtype=object), len(records))
        for column in self.columns:
            columns[column] = self.values(records, column).ravel()
        return pd.DataFrame(columns)
