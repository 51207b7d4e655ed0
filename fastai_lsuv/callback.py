"`LSUVCallback`: LSUV in a Learner, before the first fit and only where weights mean nothing yet."
from __future__ import annotations

import time
from copy import deepcopy
from itertools import chain
from typing import Any, Callable

from fastai.basics import Callback, L, Learner, SkipToEpoch, delegates, noop, patch
from fastai.callback.fp16 import MixedPrecision
from fastprogress.fastprogress import progress_bar
from torch import nn
from torch.nn.parameter import is_lazy

from .batches import as_it_trains, model_inputs, no_trace
from .lsuv import check_options, initialize
from .report import LSUVReport
from .units import Unit

__all__ = ['LSUVCallback']

_LONG = 3.  # Seconds after which a pass shows a progress bar


class LSUVCallback(Callback):
    """Normalize the model's layers by LSUV before its first fit, on fresh mini-batches of the training DataLoader.

    It is `learn.lsuv`, and what it did `learn.lsuv.report`. It runs once, and leaves weights alone that mean something: frozen
    ones, the body of a Learner made with `pretrained=True`, what was loaded since the callback was attached, and all of a model
    that has been trained. It says so in one line; `force=True`, `reset()` and `learn.lsuv_init()` do it anyway (frozen
    weights must be unfrozen). Nothing else of the run is disturbed: random numbers, batches, optimizer, buffers and the state of
    other callbacks are as they would have been; if anything fails, weights too."""
    # After what prepares the model (`TrainEvalCallback`, `ChannelsLast`) and `MixedPrecision`; before what copies or wraps it
    # (`EMACallback`, `DistributedTrainer`), what saves it (`LRFinder`), and `Recorder` and `ProgressCallback`, which begin the log.
    order = MixedPrecision.order + 0.5

    def __init__(self,
        order: str = 'std mean',  # Loops to run at each unit: "mean" and "std" separated by spaces, or joined by "+" into one loop
        modules: Any = None,  # What to measure: types, a predicate of a module, names or globs, modules, or a list of these; every conv, linear and attention layer
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
        self.done,self.anyway,self.from_file,self.versions = False,False,False,{}

    def __repr__(self): return f"LSUVCallback(order={self.options['order']!r})"

    def reset(self):
        "Forget what was done: the next fit initializes the model, whatever its weights mean."
        self.done,self.anyway = False,True

    def after_create(self):
        "Note the state of the weights, to tell later whether they were written: loaded, say."
        self.versions = {n: (id(p), p._version) for n, p in _parameters(self.learn.model)}

    def before_fit(self):
        "Initialize the model, unless its weights mean something."
        why = '' if self.every_fit else self._why_not()
        if why: self.learn.logger(f"LSUV left the model as it is: {why}. `learn.lsuv_init()` initializes it anyway.")
        else: self.run_now(anyway=self.every_fit or self.force or self.anyway)

    def _why_not(self) -> str:
        "Why no weight of the model is to be touched, or \"\"."
        learn = self.learn
        if self.done: return "it was initialized before an earlier fit"
        if self.force or self.anyway: return ''
        if self.from_file: return "it comes from a file"
        start = next((cb for cb in learn.cbs if isinstance(cb, SkipToEpoch)), None)
        if start is not None: return f"training goes on from epoch {start._skip_to}"
        if _was_trained(learn): return "it has been trained"
        params = [p for _, p in _parameters(learn.model)]
        return "its weights were loaded" if params and len(self._written()) == len(params) else ''

    def _written(self) -> set[int]:
        "Ids of the parameters that were written since the callback was attached."
        return {id(p) for n, p in _parameters(self.learn.model) if self.versions.get(n, ())[:1] == (id(p),) and p._version > self.versions[n][1]}

    def _meaningful(self) -> Callable[[Unit], bool]:
        "Which units hold weights that were loaded, or belong to the body of a pretrained Learner."
        learn,keep = self.learn,self._written()
        if vars(learn).get('pretrained'):
            groups = learn.splitter(learn.model)
            head = {id(p) for p in groups[-1]} if isinstance(groups[0], (list, tuple, L)) and len(groups) > 1 else set()
            keep |= {id(p) for _, p in _parameters(learn.model)} - head
        return lambda u: any(id(k.value) in keep for k in u.scales)

    def run_now(self,
        anyway: bool = True,  # Whether weights that were loaded or pretrained are initialized too
        **options  # In place of the callback's own
    ):
        "Initialize the model at once, in a fit or outside, and log what came of it."
        learn = self.learn
        with no_trace(learn), as_it_trains(learn):
            batches = model_inputs(learn, options.pop('min_samples', self.min_samples), learn.logger)
            first = next(batches, None)
            if first is not None:
                report = initialize(learn.model, chain([first], batches), **{**self.options, **options}, keep=None if anyway else self._meaningful(),
                                    watch=_Progress(learn))
        if first is None: learn.logger("LSUV left the model as it is: the training DataLoader yields no mini-batch."); return
        self.report,self.done,self.anyway = report,True,False
        learn.logger(report.summary + (f'. {report.left_alone}' if report.left_alone else ''))

    def __setstate__(self, state):
        super().__setstate__(state)
        self.from_file,self.versions = True,{}

    def __deepcopy__(self, memo):  # a copy in memory comes from no file
        new = memo[id(self)] = type(self).__new__(type(self))
        vars(new).update(deepcopy(vars(self), memo))
        return new


@patch
@delegates(LSUVCallback)
def lsuv_init(self: Learner, **kwargs) -> LSUVReport:
    """Run LSUV at once, outside a fit, whatever the weights mean, with the options of the attached `LSUVCallback` less those given.

    Later fits keep the result. If none is attached, one is, so that `learn.lsuv.report` holds the report."""
    cb = vars(self).get('lsuv')
    if cb is None:
        cb = LSUVCallback(**kwargs)
        self.add_cb(cb)
        cb.after_create()
    options = LSUVCallback(**{**cb.options, 'min_samples': cb.min_samples, **kwargs})
    cb.run_now(min_samples=options.min_samples, **options.options)
    return cb.report


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    "Names, as the wrapped model has them, and parameters that exist (those of lazy modules do not yet)."
    return [(n.replace('_orig_mod.', ''), p) for n, p in model.named_parameters() if not is_lazy(p)]


def _was_trained(learn: Learner) -> bool:
    "Whether the optimizer has taken a step, or, where it keeps no state to tell from, the Recorder has losses."
    opt = learn.opt
    states = [s for o in (opt, vars(opt).get('opt')) if o is not None for s in o.state.values()]  # an OptimWrapper's are in `opt.opt`
    if any(set(s) - {'do_wd', 'force_train'} for s in states): return True
    remembers = any(opt.hypers[0].get(h) for h in ('mom', 'sqr_mom'))
    return not remembers and len(getattr(vars(learn).get('recorder'), 'losses', ())) > 0


class _Progress:
    "A progress bar over the units of a pass, shown only when passes take long."
    def __init__(self, learn: Learner):
        self.show,self.start,self.bar = learn.create_mbar and learn.logger is not noop,time.monotonic(),None

    def __call__(self, called: int, total: int):
        if not self.show or time.monotonic() - self.start < _LONG: return
        if self.bar is None or called < self.bar.last_v: self.bar = progress_bar(range(total), leave=False)
        self.bar.update(called)
