"""How the records of an `ActivationStatsRecorder` are read: as tables, lists, histograms and a diagnosis.

`StatsTables` is the part of the recorder that answers in numbers and words. It reads a `RecordStore`.
Its methods `layer_stats` and `hist` have the names, the shapes and the numbers of fastai's `ActivationStats`."""
from __future__ import annotations

from typing import Iterable

import pandas as pd
import torch
from fastcore.foundation import L
from torch import Tensor

from .diagnosis import Diagnosis, diagnose
from .records import RecordStore

__all__ = ['StatsTables', 'Pairs']


class Pairs(list[tuple[float, float]]):
    "(mean, std) of each layer, which prints as a table."
    def __init__(self,
        names: list[str],  # Of the layers, as in `named_modules()`
        pairs: Iterable[tuple[float, float]],  # (mean, std) of each
        epoch: int,  # When they were recorded: epoch, from 0
        step: int  # and training step, from 0
    ):
        super().__init__(pairs)
        self.names,self.epoch,self.step = names,epoch,step

    def __repr__(self) -> str:
        w = max(map(len, [*self.names, 'layer']))
        title = f'step {self.step} (epoch {self.epoch})'
        lines = [f'{name:<{w}} {mean:>10.4f} {std:>10.4f}' for name, (mean, std) in zip(self.names, self)]
        return '\n'.join([f'{title:>{w+22}}', f"{'layer':<{w}} {'mean':>10} {'std':>10}", *lines])


class StatsTables:
    "What an `ActivationStatsRecorder` tells in numbers and words."
    _store: RecordStore

    @property
    def names(self) -> list[str]:
        "Names of the recorded layers, as in `named_modules()`; of a weight that no layer applies, that of the weight."
        return [layer.name for layer in self._store.layers]

    def df(self) -> pd.DataFrame:  # A row for each record and layer, in order of time
        """Give what was recorded, a row for each step and layer.

        The columns are epoch, step, phase, layer, mean, std, near_zero and dead, and with `grads=True` also grad_mean,
        grad_std and grad_zero."""
        return self._store.frame(self._store.records())

    @property
    def pairs(self) -> Pairs:
        "(mean, std) of every layer in the latest training step recorded; prints as a table."
        last = self._store.records('train')[-1]
        return Pairs(self.names, [(float(v[0]), float(v[1])) for v in last.values], last.epoch, last.step)

    def layer_stats(self,
        i: int | str,  # Layer, by its place in `names` or by name
        phase: str = 'train'  # 'train' or 'valid'
    ) -> L:  # Means, stds and shares near zero, each a list with a number for each record
        "Give the statistics of one layer over time, as fastai's `ActivationStats.layer_stats`."
        records,i = self._store.records(phase),self._store.index(i)
        return L(L(float(r.values[i, j]) for r in records) for j in range(3))

    def hist(self,
        i: int | str,  # Layer, by its place in `names` or by name
        phase: str = 'train'  # 'train' or 'valid'
    ) -> Tensor:  # (bins, records): log(1 + elements in the bin)
        "Give the histograms of one layer over time, as fastai's `ActivationStats.hist`."
        self._store.need_histograms()
        return torch.from_numpy(self._store.histograms(self._store.index(i), phase)).log1p()

    def diagnose(self,
        vanish: float = 0.01,  # A layer vanishes where its std is below this, and it is not dead
        explode: float = 100.,  # It explodes where |mean| or std is above this, or is not finite
        dead: float = 0.9,  # It is mostly dead where this share of its elements is dead, or more
        saturate: float = 0.9,  # It saturates where its mean square distance from the middle is this share of the most
    ) -> Diagnosis:  # A `Finding` for each trouble of each layer
        """Name the layers in trouble in the order of execution, and in which training steps; and layers not seen.

        An element is dead at or below `near_zero` or a tenth of the layer's own std, whichever is less: what a ReLU
        mostly silences is dead at any scale. Layers that no ReLU follows, as far as the model shows, are dead only if
        they put out nothing but zeros: the last layer, recurrent and attention layers, and those that another module
        follows in an `nn.Sequential`. A norm layer whose weight starts at 0 is given the fit to change that. Some
        healthy networks with ReLU are this sparse: raise `dead` for them.

        Layers that end in a bounded activation module can saturate, and those that feed a sigmoid or tanh module next
        to them in an `nn.Sequential`: where the root mean square of their output passes 5.4 or 2.7, half of a normal's
        elements meet less than a tenth of the slope."""
        return diagnose(self._store, vanish, explode, dead, saturate)
