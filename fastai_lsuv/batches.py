"Mini-batches as a Learner would feed them to its model, drawn without a trace."
from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext
from copy import copy
from itertools import islice
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, DataLoader,
                           GatherPredsCallback, L, Learner)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import HookCallback
from fastai.callback.schedule import ParamScheduler
from torch import Tensor

from .state import Snapshot

__all__ = ['no_trace', 'model_inputs', 'as_it_trains']

# Their `before_batch` does something other than changing the input: schedules the optimizer, enters autocast, attaches hooks, gathers.
_NOT_FED_BY = (ParamScheduler, MixedPrecision, HookCallback, GatherPredsCallback)
_STOPS = (CancelTrainException, CancelEpochException, CancelFitException)


@contextmanager
def no_trace(learn: Learner) -> Iterator[None]:
    """Leave no trace of what is done inside, however it ends: the generators of random, numpy, torch and the DataLoader, and the
    attributes of the Learner, its callbacks, optimizer and DataLoader are put back. (The model's are `lsuv_init`'s to keep.)"""
    dl = learn.dls.train
    inner = [getattr(dl, n, None) for n in ('dl', 'fake_l', 'sampler', 'batch_sampler')]  # `dl`: of a DistributedDL
    inner += [getattr(getattr(dl, 'batch_sampler', None), 'sampler', None), getattr(inner[0], 'fake_l', None)]
    tfms = [t for n in ('after_item', 'before_batch', 'after_batch') for t in getattr(getattr(dl, n, None), 'fs', [])]
    objects = [learn, *learn.cbs, learn.opt, dl, *inner, *tfms]
    objects = [o for o in objects if hasattr(o, '__dict__')]
    # collections that are objects: fastcore's lists, the shuffled view of its texts that a language model's DataLoader keeps
    objects += [v for o in objects for v in vars(o).values() if type(v) is L or type(v).__name__ == 'ReindexCollection']
    attributes = Snapshot({id(o): o for o in objects}.values(), tensors=False)
    python,numpy,torch_cpu = random.getstate(),np.random.get_state(),torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try: yield
    finally:
        attributes.restore()
        random.setstate(python); np.random.set_state(numpy); torch.set_rng_state(torch_cpu)
        if cuda is not None: torch.cuda.set_rng_state_all(cuda)
        if mps is not None: torch.mps.set_rng_state(mps)


def model_inputs(
    learn: Learner,
    min_samples: int,  # Smaller mini-batches are gathered until they hold as many, where their shapes allow
    log: Callable[[str], object]  # Told once where they do not
) -> Iterator[tuple]:  # Tuples of the model's inputs
    """Fresh mini-batches from the training DataLoader, through its transforms and the callbacks that change the input.

    Call it inside `no_trace`. Under `torch.distributed` each rank takes its own: rank r the batches r, r + world size, ...,
    where the DataLoader does not divide them already."""
    gathered: list[tuple] = []
    told = False
    for xb in _through_callbacks(learn, _stream(learn)):
        gathered.append(xb)
        if sum(map(_size, gathered)) < min_samples: continue
        joined = _joined(gathered)
        if joined is None and not told:
            told = True
            log(f"LSUV: mini-batches of {_size(xb)} are of different shapes and cannot be gathered to min_samples={min_samples}; each is used as it is")
        yield joined or max(gathered, key=_size)
        gathered = []
    if gathered: yield _joined(gathered) or max(gathered, key=_size)


def _stream(learn: Learner) -> Iterator[Any]:
    "What the training DataLoader yields, loaded in this process: starting workers for a batch or two costs more."
    dl = learn.dls.train
    if not isinstance(dl, DataLoader) and isinstance(dl, torch.utils.data.DataLoader):
        dl = copy(dl)
        vars(dl).update(num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False, _iterator=None)
        alone = nullcontext()
    else: alone = dl.fake_l.no_multiproc() if hasattr(dl, 'fake_l') else nullcontext()
    ranks = dist.is_available() and dist.is_initialized() and not hasattr(dl, 'world_size')  # as fastai's DistributedDL has
    with alone: yield from islice(dl, dist.get_rank(), None, dist.get_world_size()) if ranks else dl


def _through_callbacks(learn: Learner, stream: Iterator[Any]) -> Iterator[tuple]:
    "The inputs as they are when the model is called, after every `before_batch` that may change them."
    cbs = [cb for cb in learn.cbs.sorted('order') if _feeds(cb)]
    learn.training,learn.epoch,learn.dl = True,0,learn.dls.train
    learn.n_iter = len(learn.dl) if hasattr(learn.dl, '__len__') else None
    learn.train_iter,learn.pct_train = 0,0.
    try:
        for event in ('before_epoch', 'before_train'):
            for cb in cbs: cb(event)
        for learn.iter, b in enumerate(stream):
            learn._split(learn._set_device(b))
            try:
                for cb in cbs: cb('before_batch')
            except CancelBatchException: continue
            yield tuple(learn.xb)
    except _STOPS: return


def _feeds(cb: Callback) -> bool:
    "Whether a callback may change what the model is fed."
    return hasattr(cb, 'before_batch') and not isinstance(cb, _NOT_FED_BY) and not getattr(cb, 'feeds_nothing', False)


def _size(xb: tuple) -> int:
    "Samples in a mini-batch."
    return next((len(t) for t in xb if isinstance(t, Tensor) and t.dim()), 1)


def _joined(batches: list[tuple]) -> tuple | None:
    "Mini-batches as one, or `None` if their shapes do not allow it."
    if len(batches) == 1: return batches[0]
    columns = list(zip(*batches))
    if not all(isinstance(t, Tensor) and t.dim() and t.shape[1:] == col[0].shape[1:] for col in columns for t in col): return None
    return tuple(torch.cat(col) for col in columns)


def as_it_trains(learn: Learner) -> Any:
    "The context in which the Learner calls its model: autocast, if it trains in mixed precision."
    cb = next((cb for cb in learn.cbs if isinstance(cb, MixedPrecision)), None)
    if cb is None: return nullcontext()
    # fastai's callback autocasts on CUDA alone.
    return torch.autocast('cuda', dtype=torch.bfloat16 if cb.amp_mode.value == 'bf16' else torch.float16, enabled=torch.cuda.is_available())
