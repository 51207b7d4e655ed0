"Mini-batches as a Learner would feed them to its model, drawn without a trace."
from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager, nullcontext
from copy import copy
from functools import partial
from itertools import count, islice
from threading import Thread
from types import FunctionType, MethodType, ModuleType
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelTrainException, DataLoader, GatherPredsCallback, L, Learner, noop)
from fastai.callback.hook import HookCallback
from fastai.callback.schedule import ParamScheduler
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ..keep import Generators, Snapshot, Weights, memory, write_back
from ..parallel import is_engine_hook, shares_batches
from ..run import join

__all__ = ['no_trace', 'model_inputs', 'training_loss']

# Their `before_batch` does something other than changing the input: schedules the optimizer, attaches hooks, gathers.
_NOT_FED_BY = (ParamScheduler, HookCallback, GatherPredsCallback)
# Modules of fastai's whose callbacks leave the weights alone before a batch.
_LEAVE_WEIGHTS = {f'fastai.callback.{m}' for m in ('core', 'data', 'fp16', 'mixup', 'rnn', 'channelslast', 'training')}
_STOPS = (CancelTrainException, CancelEpochException, CancelFitException)

# What `_reachable` does not look into: it holds data or code, lives elsewhere, or is put back by others.
_OPAQUE = (str, bytes, int, float, type, ModuleType, FunctionType, Thread, Tensor, np.ndarray, nn.Module, Learner,
           Callback)
_OTHERS = ('pandas', 'numpy', 'PIL', 'pathlib', 'multiprocessing', 'logging')
_MOST_ITEMS,_MOST_OBJECTS = 1000,2000
_MOST_NUMBERS = 2**16  # A larger tensor or array holds data, and is not copied


@contextmanager
def no_trace(learn: Learner) -> Iterator[None]:
    """Leave no trace of what is done inside, however it ends.

    This puts back the generators of random, numpy and torch, autocast, and the hooks on the model. It puts back the
    attributes of the Learner, of its callbacks and optimizer, of the training DataLoader and what it is made of
    (samplers, transforms, dataset), and of the owners of hooks on the model. `lsuv_init` puts back the model's own."""
    feeders = [cb for cb in learn.cbs if _feeds(cb)]
    held = (v for cb in feeders for v in vars(cb).values())
    reached = [*_reachable([learn.dls.train]), *_reachable(held)]
    objects = [learn, *learn.cbs, learn.opt, *reached, *_hooked_by(learn.model)]
    objects = {id(o): o for o in objects if hasattr(o, '__dict__')}
    objects |= {id(v): v for o in objects.values() for v in vars(o).values() if type(v) is L}
    attributes = Snapshot(objects.values(), tensors=False)
    # a callback may count, or average, in a tensor of its own
    weights = {memory(p) for p in learn.model.parameters() if not is_lazy(p)} - {0}
    tensors,numbers = Snapshot(feeders, but=weights),_Numbers(objects.values(), weights)
    attributes_of_modules = (item for m in learn.model.modules() for item in vars(m).items())
    hooks = [(d, copy(d)) for k, d in attributes_of_modules if 'hook' in k and isinstance(d, dict)]
    autocast,generators = _Autocast(),Generators()
    with ExitStack() as stack:  # the last comes first, and each is done whatever becomes of the others
        stack.callback(generators.restore)
        stack.callback(_restore_hooks, hooks)
        stack.callback(autocast.restore)
        stack.callback(attributes.restore)
        stack.callback(tensors.restore)
        stack.callback(numbers.restore)
        yield


def _restore_hooks(hooks: list[tuple[dict, dict]]) -> None:
    "Take away the hooks that were attached since, by a callback's `before_train`, say."
    for d, was in hooks:
        if d == was: continue
        d.clear()
        d.update(was)


def _reachable(roots: Iterable[Any]) -> list[Any]:
    "Objects with attributes that `roots` lead to, through attributes, short collections, partials and bound methods."
    seen,found,todo = set(),[],list(roots)
    while todo and len(found) < _MOST_OBJECTS:
        o = todo.pop()
        if o is None or isinstance(o, _OPAQUE) or id(o) in seen or type(o).__module__.split('.')[0] in _OTHERS: continue
        seen.add(id(o))
        if isinstance(o, (list, tuple, set, dict)) and len(o) <= _MOST_ITEMS:
            todo += o.values() if isinstance(o, dict) else o
        if isinstance(o, MethodType): todo.append(o.__self__)
        elif isinstance(o, partial): todo += [o.func, o.args, o.keywords]
        elif hasattr(o, '__dict__') and (vars(o) or not isinstance(o, (list, tuple, set, dict))):
            found.append(o)
            todo += vars(o).values()
    return found


class _Numbers:
    "The numbers in small tensors and arrays that objects hold as attributes, or in lists, tuples and dicts there."
    def __init__(self,
        objects: Iterable[Any],
        but: set[int]  # Addresses of memory that keeps what is written to it
    ):
        held = tree_leaves([{k: v for k, v in vars(o).items() if _short(v)} for o in objects])
        found = {id(v): v for v in held if isinstance(v, (Tensor, np.ndarray)) and _is_small(v)}
        self.of = [(v, copy(v) if isinstance(v, np.ndarray) else v.detach().clone()) for v in found.values()
                   if not isinstance(v, Tensor) or memory(v) not in but]

    def restore(self) -> None:
        for v, was in self.of:
            if isinstance(v, np.ndarray):
                if v.tobytes() != was.tobytes(): v[...] = was
            else: write_back(v, was)


def _short(v: Any) -> bool:
    return isinstance(v, (Tensor, np.ndarray)) or isinstance(v, (list, tuple, dict)) and len(v) <= _MOST_ITEMS


def _is_small(v: Tensor | np.ndarray) -> bool:
    if isinstance(v, np.ndarray): return v.size <= _MOST_NUMBERS and v.dtype.hasobject is False and v.flags.writeable
    return v.layout == torch.strided and not (v.is_meta or v.is_nested or is_lazy(v)) and v.numel() <= _MOST_NUMBERS


def _hooked_by(model: nn.Module) -> list[Any]:
    "The objects whose methods are hooks of the model. A fastai `Hook` is one, and keeps what it saw last."
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    owners = [getattr(h, '__self__', None) for h in hooks if not is_engine_hook(h)]
    return [o for o in owners if o is not None and not isinstance(o, _OPAQUE)]


class _Autocast:
    "Automatic mixed precision as it is now; a callback may enter it before a batch, and leave it after."
    _devices = ('cpu', 'cuda')
    def __init__(self):
        self.of = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in self._devices]
        self.cache,self.depth = torch.is_autocast_cache_enabled(),self._depth()

    @staticmethod
    def _depth() -> int:
        torch.autocast_increment_nesting()
        return torch.autocast_decrement_nesting()

    def restore(self) -> None:
        for d, on, dtype in self.of:
            torch.set_autocast_enabled(d, on)
            torch.set_autocast_dtype(d, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        while self._depth() > self.depth: torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()  # weights in half precision, as they were


def model_inputs(
    learn: Learner,
    min_samples: int,  # Smaller mini-batches are joined until they hold as many, where their shapes allow
    log: Callable[[str], object],  # Told once where their shapes do not
    begun: Iterable[Callback] = (),  # Callbacks whose `before_fit` has run
    on_batch: Callable[[Callable], object] = noop  # Called for each, with a function that makes its training loss
) -> Iterator[tuple]:  # Tuples of the model's inputs
    """Fresh mini-batches from the training DataLoader, epoch after epoch, through its transforms and the callbacks that
    change the input.

    Use it inside `no_trace`, and close it there. Under `torch.distributed` each rank takes its own: rank r the batches
    r, r + world size, ..., where the DataLoader does not divide them already."""
    parts: list[tuple] = []
    joins,given = True,False
    with closing(_through_callbacks(learn, begun)) as batches:
        for xb in batches:
            parts.append(xb)
            if joins and sum(map(_size, parts)) < min_samples: continue
            joined = join(parts) if joins else xb
            if joined is None:
                joins = False
                log(f"LSUV uses mini-batches of {_size(xb)} samples: their shapes differ, so it cannot join them to "
                    f"min_samples={min_samples}.")
            on_batch(partial(training_loss, learn))
            yield joined or max(parts, key=_size)
            parts,given = [],True
    if parts and not given:  # a stream that ended, and does not begin again
        on_batch(partial(training_loss, learn))
        yield join(parts) or max(parts, key=_size)


def training_loss(learn: Learner) -> Callable[[Callable], Any] | None:  # `None` if the mini-batch has no targets
    "The training loss on the mini-batch that `learn` holds now, as a function of the model."
    if not len(learn.yb): return None
    state = Snapshot([learn, *learn.cbs], tensors=False)
    cbs = [cb for cb in learn.cbs.sorted('order') if hasattr(cb, 'after_pred') and not _looks_on(cb)]

    def loss(model):
        state.restore()
        learn.pred = model(*learn.xb)
        for cb in cbs: cb('after_pred')
        return learn.loss_func(learn.pred, *learn.yb)

    return loss


def _stream(learn: Learner) -> Iterator[Any]:
    "What the training DataLoader yields, epoch after epoch, loaded in this process: starting workers costs more."
    dl,alone = learn.dls.train,nullcontext()
    rank,ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    # A `DistributedDL` gives this rank its own.
    if hasattr(dl, 'world_size') or shares_batches(learn.model): rank,ranks = 0,1
    if not isinstance(dl, DataLoader) and isinstance(dl, torch.utils.data.DataLoader):
        dl = copy(dl)
        vars(dl).update(num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False, _iterator=None)
    elif hasattr(dl, 'fake_l'):
        alone = dl.fake_l.no_multiproc()
        if ranks > 1 and getattr(dl, 'indexed', False) and not dl.prebatched and len(dl):
            # as fastai divides the batches among workers: no item of another rank's is loaded
            dl.num_workers,dl.offs = min(ranks, len(dl)),rank % len(dl)
            rank,ranks = 0,1
    with alone: yield from islice(_epochs(dl), rank, None, ranks)


def _epochs(dl: Iterable[Any]) -> Iterator[Any]:
    "What `dl` yields, again and again, until it yields nothing."
    while True:
        empty = True
        for b in dl:
            empty = False
            yield b
        if empty: return


class _Feeders:
    "The callbacks that may change what the model is fed, and nothing of the model's weights."
    def __init__(self, learn: Learner, begun: Iterable[Callback]):
        self.learn,self.begun = learn,{id(cb) for cb in begun}
        self.cbs = [cb for cb in learn.cbs.sorted('order') if _feeds(cb)]
        # GANTrainer clips weights in its `before_batch`. What comes with fastai otherwise leaves them alone.
        self.may_write = any(type(cb).__module__ not in _LEAVE_WEIGHTS for cb in self.cbs)

    def __call__(self, event: str) -> None:
        "Send an event to all of them."
        weights = Weights() if self.may_write else None
        if weights is not None: weights.keep(self.learn.model.parameters())
        try:
            for cb in self.cbs: self._call(cb, event)
        finally:
            if weights is not None: weights.put_back()

    def _call(self, cb: Callback, event: str) -> None:
        b = {k: vars(self.learn)[k] for k in ('xb', 'yb') if k in vars(self.learn)}
        try: cb(event)
        except (CancelBatchException, *_STOPS): raise
        except Exception:
            # It may lack what its `before_fit` makes: outside a fit, or where that is yet to run.
            if id(cb) in self.begun or not hasattr(cb, 'before_fit'): raise
            self.begun.add(id(cb))
            vars(self.learn).update(b)
            cb('before_fit')
            cb(event)


def _through_callbacks(learn: Learner, begun: Iterable[Callback]) -> Iterator[tuple]:
    "The inputs as the model gets them: after every `before_batch` that may change them, in the autocast it may enter."
    feeders,skipped = _Feeders(learn, begun),0
    learn.training,learn.epoch,learn.dl = True,0,learn.dls.train
    learn.n_iter = len(learn.dl) if hasattr(learn.dl, '__len__') else None
    learn.train_iter,learn.pct_train = 0,0.
    try:
        feeders('before_epoch')
        feeders('before_train')
        with closing(_stream(learn)) as stream:
            for i, b in zip(count(), stream):
                learn.iter = i % learn.n_iter if learn.n_iter else i
                learn._split(learn._set_device(b))
                autocast = _Autocast()
                try:
                    try: feeders('before_batch')
                    except CancelBatchException: skipped += 1
                    else:
                        xb = tuple(learn.xb)
                        skipped = 0 if _size(xb) else skipped + 1
                        if not skipped: yield xb
                finally: autocast.restore()
                if skipped > max(learn.n_iter or 0, _MOST_ITEMS): return
    except _STOPS: return


def _feeds(cb: Callback) -> bool:
    "Whether a callback may change what the model is fed."
    return hasattr(cb, 'before_batch') and not isinstance(cb, _NOT_FED_BY) and not _looks_on(cb)


def _looks_on(cb: Callback) -> bool:
    "Whether a callback says of itself that it changes nothing of what the model is fed."
    return getattr(cb, 'feeds_nothing', False)


def _size(xb: Any) -> float:
    "Samples in a mini-batch; infinite if it cannot be told, as of a graph."
    return next((len(t) for t in tree_leaves(xb) if isinstance(t, Tensor) and t.dim()), float('inf'))
