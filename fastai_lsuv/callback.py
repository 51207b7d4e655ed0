"`LSUVCallback`: LSUV in a Learner, before the first fit and only where weights mean nothing yet."
from __future__ import annotations

import sys
import time
from contextlib import closing
from copy import deepcopy
from itertools import chain
from typing import Any, Callable, Iterable
from weakref import WeakSet, ref

from fastai.basics import Callback, L, Learner, SkipToEpoch, delegates, noop, patch, rank_distrib
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastprogress.fastprogress import progress_bar
from torch import nn
from torch.nn.parameter import is_lazy

from .batches import model_inputs, no_trace
from .lsuv import check_options, initialize, plain
from .moments import any_rank, in_step
from .report import LSUVReport
from .units import Unit

__all__ = ['LSUVCallback']

_EARLIER = "it was initialized before an earlier fit"
_LONG = 3.  # Seconds after which a pass shows a progress bar
_INITIALIZED: WeakSet[nn.Module] = WeakSet()  # Models that were initialized: the next fit may bring another callback


class LSUVCallback(Callback):
    """Normalize the model's layers by LSUV before its first fit, on fresh mini-batches of the training DataLoader.

    It is `learn.lsuv`, and what it did `learn.lsuv.report`. It runs once, and leaves weights alone that mean something: those
    frozen now or when the callback was attached, the body of a Learner made with `pretrained=True`, what was loaded since the
    callback was attached, and all of a model that has been trained. It says so in one line; `force=True`, `reset()` and
    `learn.lsuv_init()` do it anyway (frozen weights must be unfrozen). Attach it when the Learner is made: weights that were
    loaded before are told from others by what their norm layers have learned; those of a model without any look like new.

    Nothing else of the run is disturbed: random numbers, batches, optimizer, buffers and the state of other callbacks are as they
    would have been; if anything fails, weights too. Raises `TypeError` or `ValueError`, naming the argument, when it is made.

    Its `order`, 10.5, puts it after what prepares the model (`TrainEvalCallback`, `ChannelsLast`, your own callbacks of the default
    order 0) and `MixedPrecision`, in whose autocast it measures; before what copies or wraps the model (an EMA, `DistributedTrainer`:
    11), what saves it (`LRFinder`: 60), and `Recorder` (50) and `ProgressCallback` (60), which begin the log. A callback of any order
    may change the input in its `before_batch`: if that needs what a `before_fit` yet to come makes, this runs here too, and the
    callback's attributes are put back."""
    order = MixedPrecision.order + 0.5

    def __init__(self,
        order: str = 'std mean',  # Loops to run at each unit: "mean" and "std" separated by spaces, or joined by "+" into one loop
        modules: Any = None,  # What to measure: types, a predicate of a module, names or globs, modules, or a list of these; default: every conv, linear and attention layer
        preinit: str | Callable[[nn.Module], object] | None = 'orthogonal',  # Start from orthonormal weights, from the weights as they are (`None`), or from what a function of each layer makes
        target_mean: float = 0.,  # Mean that the mean loop aims at
        target_std: float | Callable[[str, nn.Module], float] = 1.,  # Std that the std loop aims at, or a function of a unit's name and module that gives it
        tol: float = 1e-3,  # How close mean and std must come to their targets within the mini-batch in use
        batch_tol: float = 0.1,  # How close std must be on a fresh mini-batch, as a share of the target (the paper's Tol_var)
        max_iter: int = 10,  # Most passes, each on a fresh mini-batch, that may correct weights (the paper's T_max)
        per_channel: bool = False,  # Normalize each channel by itself, not the whole output
        baseline: bool = False,  # Measure the model as it was, too, at the price of one more pass
        min_samples: int = 16,  # Gather smaller mini-batches until they hold as many (from 16 up, the paper's estimates agree)
        every_fit: bool = False,  # Run before every fit, not only the first; weights that were loaded or trained are then normalized as well
        force: bool = False  # Run before the first fit even if weights were loaded, trained or pretrained
    ):
        check_options(order, preinit, target_mean, target_std, tol, batch_tol, max_iter)
        if isinstance(min_samples, bool) or not isinstance(min_samples, int) or min_samples < 1:
            raise ValueError(f"min_samples: got {min_samples!r}; it takes a positive whole number")
        # `order` is when a callback runs, in fastai
        self.options = dict(order=order, modules=modules, preinit=preinit, target_mean=target_mean, target_std=target_std, tol=tol, batch_tol=batch_tol,
                            max_iter=max_iter, per_channel=per_channel, baseline=baseline)
        self.min_samples,self.every_fit,self.force = min_samples,every_fit,force
        self.report: LSUVReport | None = None
        self.anyway,self.from_file,self.known,self.unsaid = False,False,{},''

    def __repr__(self): return f"LSUVCallback(order={self.options['order']!r})"

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == 'learn' and value is not None: self._note()

    def reset(self) -> None:
        "Forget what was done: the next fit initializes the model, whatever its weights mean."
        self.anyway = True

    def before_fit(self):
        "Initialize the model, unless its weights mean something."
        if not _begins_a_fit(): return
        why = '' if self.every_fit else self._why_not()
        if any_rank(bool(why)):
            if why == _EARLIER and self.unsaid:
                why += f" that logged nothing ({self.unsaid})"
                if self.learn.logger is not noop: self.unsaid = ''
            self._say(f"LSUV left the model as it is: {why or 'so does another rank'}. `learn.lsuv_init()` initializes it anyway.")
            return
        cbs = list(self.learn.cbs.sorted('order'))
        report = self.run_now(anyway=self.every_fit or self.force or self.anyway, begun=cbs[:cbs.index(self)])
        if report is None: self._say(f"LSUV left the model as it is: {_NO_BATCH}.")

    def _why_not(self) -> str:
        "Why no weight of the model is to be touched, or \"\"."
        learn = self.learn
        if self.anyway: return ''
        if plain(learn.model) in _INITIALIZED: return _EARLIER
        if self.force: return ''
        if self.from_file: return "it comes from a file"
        start = next((cb for cb in learn.cbs if isinstance(cb, SkipToEpoch)), None)
        if start is not None: return f"training goes on from epoch {start._skip_to}"
        if _was_trained(learn): return "it has been trained"
        params = _parameters(learn.model)
        if params and len(self._written()) == len(params): return "its weights were loaded"
        # Where some are frozen, or were, or the Learner knows of a pretrained body, the rest may well be a new head.
        if vars(learn).get('pretrained') or any(not p.requires_grad or self._knows(p) and self.known[id(p)][2] for p in params): return ''
        learned = _learned_norm(learn.model)
        return f"it comes trained, as its norm layer {learned!r} shows" if learned else ''

    def _note(self,
        written: set[int] | None = None  # After a run: these had been written before, and stay so
    ):
        "Note the state of weights not seen before, to tell later whether they were written (loaded, say); after a run, that of all it may have written."
        for p in _parameters(self.learn.model):
            if not self._knows(p): self.known[id(p)] = ref(p),p._version,not p.requires_grad
            elif written is not None and id(p) not in written: self.known[id(p)] = ref(p),p._version,self.known[id(p)][2]

    def _knows(self, p: nn.Parameter) -> bool: return id(p) in self.known and self.known[id(p)][0]() is p

    def _written(self) -> set[int]:
        "Ids of the parameters that were written since the callback was attached."
        return {id(p) for p in _parameters(self.learn.model) if self._knows(p) and p._version > self.known[id(p)][1]}

    def _meaningful(self) -> Callable[[Unit], bool]:
        "Which units hold weights that were loaded, were frozen, or belong to the body of a pretrained Learner."
        learn,params = self.learn,_parameters(self.learn.model)
        keep = self._written() | {id(p) for p in params if self._knows(p) and self.known[id(p)][2]}
        if vars(learn).get('pretrained'):
            groups = learn.splitter(learn.model)
            head = {id(p) for p in groups[-1]} if isinstance(groups[0], (list, tuple, L)) and len(groups) > 1 else set()
            keep |= {id(p) for p in params} - head
        return lambda u: any(id(k.value) in keep for k in u.scales)

    def run_now(self,
        anyway: bool = True,  # Whether weights that were loaded or pretrained are initialized too
        begun: Iterable[Callback] = (),  # Callbacks whose `before_fit` has run
        **options: Any  # In place of the callback's own, by name
    ) -> LSUVReport | None:  # `None` if there is no mini-batch
        "Initialize the model at once, in a fit or outside, and log what came of it."
        learn,written,watch,remarks = self.learn,self._written(),_Progress(self.learn),[]
        keep = None if anyway else self._meaningful()
        try:
            with no_trace(learn), closing(model_inputs(learn, options.pop('min_samples', self.min_samples), remarks.append, begun)) as batches:
                first = in_step(lambda: next(batches, None))
                if any_rank(first is None): return None
                report = initialize(learn.model, chain([first], batches), **{**self.options, **options}, keep=keep, watch=watch)
        finally:
            watch.close()
            self._note(written)
            for line in remarks: self._say(line)
        self.report,self.anyway = report,False
        _INITIALIZED.add(plain(learn.model))
        self._say(line := report.summary + (f'. {report.left_alone}' if report.left_alone else ''))
        self.unsaid = line if learn.logger is noop else ''  # by `lr_find`, say
        return report

    def _say(self, line: str):
        "Log a line, once for all ranks."
        if not rank_distrib(): self.learn.logger(line)

    def __getstate__(self): return {k: v for k, v in super().__getstate__().items() if k != 'known'}

    def __setstate__(self, state):
        self.known = {}
        super().__setstate__(state)
        self.from_file = True

    def __deepcopy__(self, memo):
        "A copy in memory comes from no file, and knows of its Learner's copy what this one knows of this."
        new = memo[id(self)] = type(self).__new__(type(self))
        vars(new).update(deepcopy({k: v for k, v in vars(self).items() if k != 'known'}, memo), known={})
        if self.learn is None: return new
        model,copied,written = self.learn.model,deepcopy(self.learn.model, memo),self._written()
        if plain(model) in _INITIALIZED: _INITIALIZED.add(plain(copied))
        for p, q in zip(_parameters(model), _parameters(copied)):
            if self._knows(p): new.known[id(q)] = ref(q),-1 if id(p) in written else q._version,self.known[id(p)][2]
        return new


@patch
@delegates(LSUVCallback)
def lsuv_init(self: Learner, **kwargs) -> LSUVReport:  # A row a unit, in order of execution; also `learn.lsuv.report`
    """Run LSUV at once, in a fit or outside, whatever the weights mean, with the options of the attached `LSUVCallback` less those given.

    Later fits keep the result. If none is attached, one is, so that `learn.lsuv.report` holds the report. Raises `ValueError`
    if there is no mini-batch to run on."""
    cb = next((cb for cb in self.cbs if isinstance(cb, LSUVCallback)), None)
    options = LSUVCallback(**{**(dict(cb.options, min_samples=cb.min_samples) if cb else {}), **kwargs})
    if cb is None: self.add_cb(cb := LSUVCallback(**kwargs))
    report = cb.run_now(min_samples=options.min_samples, **options.options)
    if report is None: raise ValueError(f"lsuv_init: {_NO_BATCH}")
    return report


_NO_BATCH = "the training DataLoader yields no mini-batch, or callbacks cancel them all"


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    "Those that exist: of lazy modules they do not yet."
    return [p for p in model.parameters() if not is_lazy(p)]


def _was_trained(learn: Learner) -> bool:
    """Whether an optimizer has taken a step: it keeps some state; or fastai's, which zeroes gradients, left zeros; or, where
    neither is to be had (plain SGD, of torch), the Recorder has losses. What `lr_find` did, it undid."""
    opt,params,recorder = learn.opt,_parameters(learn.model),vars(learn).get('recorder')
    states = [o.state[p] for o in (opt, vars(opt).get('opt')) if o is not None for p in params if p in o.state]  # an OptimWrapper's are in `opt.opt`
    if any(set(s) - {'do_wd', 'force_train'} for s in states): return True
    if _found_lr(recorder): return False
    grads = [p.grad for p in params if p.grad is not None]
    if grads and not any(g.any() for g in grads): return True
    remembers = any(opt.hypers[0].get(h) for h in ('mom', 'sqr_mom'))
    return not remembers and len(getattr(recorder, 'losses', ())) > 0


def _found_lr(recorder: Callback | None) -> bool:
    "Whether the last fit was that of `lr_find`: its learning rates grow by the same factor each step."
    lrs = getattr(recorder, 'lrs', ())
    factors = [b/a for a, b in zip(lrs, lrs[1:]) if a > 0]
    return len(factors) > 1 and min(factors) > 1 and max(factors) < 1.001*min(factors)


def _learned_norm(model: nn.Module) -> str:
    "Name of a norm layer whose weight and bias have been learned, or \"\": nobody starts both with other than one value for all."
    def varies(p): return p is not None and not is_lazy(p) and bool((p != p[:1]).any())
    return next((n for n, m in model.named_modules() if 'Norm' in type(m).__name__ and getattr(w := m._parameters.get('weight'), 'ndim', 0) == 1
                 and varies(w) and (m._parameters.get('bias') is None or varies(m.bias))), '')


def _begins_a_fit() -> bool:
    "Whether a fit has sent the event that is being handled. `validate`, `get_preds`, `summary` and `tta` send `before_fit` too, in one list with `before_epoch`."
    frame = sys._getframe()
    while frame is not None and frame.f_code is not Learner.__call__.__code__: frame = frame.f_back
    return frame is None or isinstance(frame.f_locals['event_name'], str)


class _Progress:
    "A progress bar over the units of a pass, shown only when passes take long."
    def __init__(self, learn: Learner):
        self.show = any(isinstance(cb, ProgressCallback) for cb in learn.cbs) and learn.create_mbar and learn.logger is not noop and not rank_distrib()
        self.start,self.bar,self.called = time.monotonic(),None,0

    def __call__(self, called: int, total: int):
        if not self.show or time.monotonic() - self.start < _LONG: return
        if self.bar is None or called < self.called:  # a new pass
            self.close()
            self.bar = progress_bar(range(total), leave=False)
            self.bar.update(0)
        self.called = called
        if self.bar.last_v is not None: self.bar.update(called)  # it forgets this when it is full

    def close(self):
        if self.bar is not None and self.bar.last_v is not None: self.bar.on_iter_end()
        self.bar = None
