"""`ActivationStatsRecorder`: fastai's `ActivationStats`, exact, nearly free and bounded in memory.

The class here is the callback. It tells a `FitRecording` what the Learner does, and writes finished epochs. The
`FitRecording` measures the layers and fills a `RecordStore`. The base classes `StatsTables` and `StatsPlots` read that
store, and show it as numbers, words and pictures."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.torch_core import get_model, rank_distrib

from ..arguments import answers_unknown
from .files import StatsFile, write_new_records
from .options import checked
from .plots import StatsPlots
from .recording import FitRecording
from .records import RecordStore
from .tables import StatsTables

__all__ = ['ActivationStatsRecorder']


class ActivationStatsRecorder(StatsTables, StatsPlots, Callback):
    """Record mean, std and share near zero of every layer's output while a `Learner` trains.

    A superset of fastai's `ActivationStats`, with the same numbers, that can stay on for a whole run: it changes no
    loss by a bit, waits for the device once an epoch, and keeps at most `max_steps` records. It measures an output
    before an in-place activation overwrites it, all calls of a layer in a step together, of a tuple or dict the first
    floating-point tensor. It records the batches of a fit, and not what other callbacks, `lr_find` or `get_preds` run.

    Weights that no layer applies have the names of LSUV's report: `experts.up[3]`, GPT-2's `c_attn.weight`. The first
    step shows them. An attention's query, key and value are recorded if `modules` names them (`'*in_proj_weight*'`).
    `hist=True` covers -10 to 10, as most layers come before their activation. fastai's range is `hist=(40, 0, 10)`.

    `sample=k` measures every k-th sample (along dimension 0) of activations above 2**18 elements, and of their
    gradients. In a batch of N samples, the standard error of a mean is about s*sqrt((k-1)/N), and that of a std about
    q*sqrt((k-1)/N)/(2*std): s and q are the stds of the samples' own means, and of their mean squares about the mean.

    It starts anew with every fit unless `append`. Its hooks stay on the model, idle, only after an exception, until
    the next fit. `torch.compile`d models leave their graph at each recorded layer: compile without `fullgraph=True`.
    Under `torch.distributed` each rank records its own batches, and the first writes. An exported Learner
    needs this package to load, unless `learn.remove_cb(ActivationStatsRecorder)` was called before `learn.export`.

    It is `learn.activation_stats_recorder`. It raises `ValueError` or `TypeError` for an argument that it does not take
    (after the first step for a name that no operation has), and its methods raise `ValueError` before a fit."""
    order,remove_on_fetch,feeds_nothing = -20,True,True  # the last: LSUV need not run it to see what the model is fed
    _stateattrs = '_store', '_recording', '_starting'

    @answers_unknown
    def __init__(self,
        modules: Any = None,  # Types, a predicate, names, globs, modules; default: those of LSUV, norms and recurrent
        every: int = 1,  # Record every so many training steps
        hist: bool | int | tuple[int, float, float] | None = None,  # True: (80, -10, 10); bins; or (bins, low, high)
        grads: bool = False,  # Also mean, std and share of exact zeros of the gradients of the layers' outputs
        valid: bool = False,  # Also record validation: one record per epoch, of all its batches together
        near_zero: float = 0.05,  # Count as near zero what is at or below this, negative numbers included, as fastai
        max_steps: int = 5000,  # Beyond this many records, drop every second one and record half as often
        fname: str | Path | None = None,  # Write finished epochs to this file in `learn.path`: `.parquet`, or else CSV
        append: bool = False,  # Go on after the records (and the file) of earlier fits instead of starting anew
        sample: int | None = None  # Measure every so many-th sample of large activations; default: all samples
    ):
        super().__init__()
        self._options = checked(modules=modules, every=every, hist=hist, grads=grads, valid=valid, near_zero=near_zero,
                                max_steps=max_steps, append=append, sample=sample)
        self._file = None if fname is None else StatsFile(fname)
        self._init_state()

    def _init_state(self):
        "Forget everything that was recorded; also run when unpickled."
        super()._init_state()
        self._store = RecordStore(self._options)
        self._recording = None  # Of the fit under way, from the start of its training on
        self._starting = False  # A fit has started, its training has not

    def before_fit(self):
        "Drop hooks that an exception left, and start anew when training starts."
        self.after_train()
        self._recording,self._starting = None,True

    def before_train(self):
        "Put the hooks in place."
        if hasattr(self.learn, 'lr_finder') or hasattr(self.learn, 'gather_preds'): return
        if self._starting: self._begin()
        self._recording.enter('train')

    def before_validate(self):
        "Put the hooks in place if validation is recorded."
        # Validation outside a fit has started nothing to add to, and that of `get_preds` inside one is no validation.
        if self._options.valid and self._recording and not hasattr(self.learn, 'gather_preds'):
            self._recording.enter('valid')

    def before_batch(self):
        "Start measuring if this step is due."
        if self._recording: self._recording.before_batch(self.model, self.epoch, self.train_iter)

    def after_pred(self):
        "Stop measuring: what runs the model from here to the next batch is not its forward pass."
        if self._recording: self._recording.after_pred(self.model)

    def after_backward(self):
        "Note by how much mixed precision scaled the loss, and with it the gradients of this step."
        scaler = getattr(self.learn, 'scaler', None)
        if not self._recording or not self._options.grads or scaler is None or not scaler.is_enabled(): return
        self._recording.hooks.loss_scale = scaler.scale(torch.ones_like(self.loss_grad.detach()))

    def after_batch(self):
        "Keep what was measured, on the device."
        if self._recording: self._recording.after_batch(self.model, self.epoch, self.train_iter)

    def after_train(self):
        "Remove the hooks."
        if self._recording: self._recording.leave()

    def after_validate(self):
        "Make one record of the validation, and remove the hooks."
        if self._recording: self._recording.after_validate(self.epoch, self.train_iter)

    def after_epoch(self):
        "Bring the epoch's records to the host, at once, and write them where asked."
        self._store.fetch()
        if not self._recording: return
        self._recording.leave()
        if rank_distrib() == 0: write_new_records(self._store, self._file, self.path, self.learn.cbs)

    def after_fit(self):
        "Do as after an epoch, if `CancelFitException` ended one early."
        self.after_epoch()
        self._recording = None

    def _begin(self):
        "Find the layers, and forget earlier fits unless `append`."
        model = get_model(self.model)
        self._recording = FitRecording(self._store, getattr(model, '_orig_mod', model), self._options)
        self._starting = False
        goes_on = self._store.begin(self._recording.layers)
        if self._file is not None and not goes_on and rank_distrib() == 0:
            self._file.prepare(self.path, self._options.append)
