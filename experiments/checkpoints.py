"""A run that can be stopped: after each epoch a `Checkpoint` writes down all that the next epoch depends on.

A run that goes on from there gives the same numbers as one that was never stopped."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.basics import Callback, DataLoaders

from fastai_lsuv.keep.generators import Generators

from .data import InputError

__all__ = ['Checkpoint', 'epochs_so_far']


class Checkpoint(Callback):
    "Saves the model, the optimizer, the random numbers and the rows of a run after each epoch."
    order = 70  # After all that counts epochs

    def __init__(self,
        folder: Path,
        arm: dict[str, Any],  # What tells the run apart
        settings: dict[str, Any]  # What must be the same when the run goes on
    ):
        name = '_'.join(re.sub(r'[^\w.-]+', '-', str(v)) for v in arm.values())
        self.path,self.settings = folder/f'{name}.pt',settings
        self.saved: dict[str, Any] | None = self._read() if self.path.is_file() else None
        self.done = self.saved['epochs'] if self.saved else 0  # Epochs that were trained before
        self.rows: list[dict[str, Any]] = self.saved['rows'] if self.saved else []  # Of these epochs, and then of all

    def _read(self) -> dict[str, Any]:
        saved = torch.load(self.path, map_location='cpu', weights_only=False)  # random states are no tensors
        was = saved['settings']
        for k, v in self.settings.items():
            if was.get(k) != v:
                raise InputError(f"{self.path}: was made with {k} {was.get(k)}; this run has {v}. Run with the options "
                                 "of before, or name another folder with --checkpoints")
        return saved

    def resume(self) -> None:
        "Put the learner's model and optimizer where they were, if there is anything to go on from."
        if not self.saved: return
        self.learn.model.load_state_dict(self.saved['model'])
        self.learn.create_opt()
        self.learn.opt.load_state_dict(self.saved['opt'])

    def before_epoch(self):
        if not self.saved: return
        self.saved['generators'].restore()
        smooth = self.recorder.smooth_loss
        smooth.count,smooth.val = self.saved['smooth']
        for dl, state in zip(_loaders(self.dls), self.saved['loaders']): dl.rng.setstate(state)
        self.saved = None

    def after_epoch(self):
        "Write the file. One that was written before stays whole if this is cut off."
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix('.part')
        smooth = self.recorder.smooth_loss
        torch.save(dict(settings=self.settings, epochs=self.done + self.epoch + 1, rows=self.rows,
                        model=self.model.state_dict(), opt=self.opt.state_dict(), generators=Generators(),
                        smooth=(smooth.count, smooth.val),
                        loaders=[dl.rng.getstate() for dl in _loaders(self.dls)]), beside)
        beside.replace(self.path)


def _loaders(dls: DataLoaders) -> list: return [dls.train, dls.valid]


def epochs_so_far(
    folder: str | Path  # Of the checkpoints of one study, which may still be running
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    "What the runs of a study have come to."
    paths = sorted(Path(folder).glob('*.pt'))
    if not paths: raise InputError(f"{folder}: there is no checkpoint; name the folder given to --checkpoints")
    saved = [torch.load(path, map_location='cpu', weights_only=False) for path in paths]
    return pd.DataFrame([row for s in saved for row in s['rows']])
