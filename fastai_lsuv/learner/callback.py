"""`LSUVCallback`: LSUV in a Learner, before the first fit and only where weights are new.

`before_fit` asks `trained` whether the weights are new, and if so calls `run_now`, which draws mini-batches with
`batches.model_inputs` inside `no_trace`, hands them to `lsuv.initialize`, and logs what came of it in one line."""
from __future__ import annotations

import time
from contextlib import closing
from itertools import chain
from typing import Any, Callable, Iterable

from fastai.basics import Callback, Learner, delegates, noop, patch, rank_distrib
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastprogress.fastprogress import progress_bar
from torch import nn

from .batches import model_inputs, no_trace
from ..lsuv import initialize
from ..run.options import Options, check_whole
from ..parallel.ranks import any_rank, in_step
from ..report.report import LSUVReport, NoReport
from .trained import EARLIER, CallbackOnNewWeights, begins_a_fit, parameters

__all__ = ['LSUVCallback']

_NOT_YET = "LSUV has not run: it runs when the first fit begins. `learn.lsuv_init()` runs it now."
_NO_BATCH = "the training DataLoader yields no mini-batch, or callbacks cancel them all"
_LONG = 3.  # Seconds after which a pass shows a progress bar


class LSUVCallback(CallbackOnNewWeights):
    """Normalize the model's layers by LSUV before its first fit, on fresh mini-batches of the training DataLoader.

    It is `learn.lsuv`. `learn.lsuv.report` tells what it did, or that it has not run.

    It runs once. It leaves weights alone that are not new: those frozen now or when the callback was attached, the body
    of a Learner made with `pretrained=True`, what was loaded since the callback was attached, and all of a model that
    has been trained. It says so in one line. `force=True`, `reset()` and `learn.lsuv_init()` initialize them anyway
    (frozen weights must be unfrozen). Attach it when the Learner is made: it tells weights that were loaded before from
    new ones only by what their norm layers have learned.

    Nothing else of the run is disturbed: random numbers, batches, optimizer, buffers and the state of other callbacks
    are as they would have been; if anything fails, weights too. Raises `TypeError` or `ValueError`, naming the
    argument, when it is made.

    Its `order`, 10.5, puts it after what prepares the model (`TrainEvalCallback`, `ChannelsLast`, your own callbacks of
    the default order 0) and `MixedPrecision`, in whose autocast it measures; before what copies or wraps the model (an
    EMA, `DistributedTrainer`: 11), what saves it (`LRFinder`: 60), and `Recorder` (50) and `ProgressCallback` (60),
    which begin the log. A callback of any order may change the input in its `before_batch`: if that needs what its own
    `before_fit` makes, that `before_fit` runs first, and the callback's attributes are put back."""
    order = MixedPrecision.order + 0.5

    def __init__(self,
        order: str = 'std mean',  # Loops at each unit: the words "mean" and "std", or both joined by "+" into one loop
        modules: Any = None,  # Types, a predicate, names or globs, modules, or a list; default: conv, linear, attention
        # The start: orthonormal weights and zero biases; `None` to keep those there are; or a function of a layer
        preinit: str | Callable[[nn.Module], object] | None = 'orthogonal',
        target_mean: float = 0.,  # Mean that the mean loop aims at
        target_std: float | Callable[[str, nn.Module], float] = 1.,  # Std aimed at, or a function (name, module) -> std
        tol: float = 1e-3,  # How close mean and std must come to their targets within the mini-batch in use
        batch_tol: float = 0.1,  # How close std is on a fresh mini-batch, as a share (the paper's Tol_var)
        max_iter: int = 10,  # Most passes, each on a fresh mini-batch, that may correct weights (the paper's T_max)
        per_channel: bool = False,  # Normalize each channel by itself, not the whole output
        baseline: bool = True,  # Measure the model as it was, too, in the pass that takes its loss
        min_samples: int = 16,  # Gather smaller mini-batches until they hold as many (the paper: from 16 up, all agree)
        every_fit: bool = False,  # Run before every fit, and not only before the first; trained weights are replaced
        force: bool = False  # Run even if weights were loaded or trained, and keep the result even if the loss is worse
    ):
        # `self.order` is when a callback runs, in fastai
        self.options = dict(vars(Options.of(locals())))
        check_whole('min_samples', min_samples)
        self.min_samples,self.every_fit,self.force = min_samples,every_fit,force
        self.report: LSUVReport | NoReport = NoReport(_NOT_YET)
        self.unsaid = ''
        super().__init__()

    def __repr__(self): return f"LSUVCallback(order={self.options['order']!r})"

    def before_fit(self):
        "Initialize the model, unless its weights were loaded or trained."
        if not begins_a_fit(): return
        why = '' if self.every_fit else self._why_not(self.force)
        if any_rank(bool(why)):
            if why == EARLIER and self.unsaid: return self._say_now()
            why = why or "another rank leaves it as it is"
            return self._left(f"{why}. `learn.lsuv_init()` initializes it anyway")
        cbs = list(self.learn.cbs.sorted('order'))
        report = self.run_now(anyway=self.every_fit or self.force or self.anyway, begun=cbs[:cbs.index(self)])
        if report is None: self._left(_NO_BATCH)

    def run_now(self,
        anyway: bool = True,  # Whether weights that were loaded or pretrained are initialized too
        begun: Iterable[Callback] = (),  # Callbacks whose `before_fit` has run
        force: bool | None = None,  # Keep the weights however the loss comes out; default: the callback's own
        min_samples: int | None = None,  # In place of the callback's own
        **options: Any  # In place of the callback's own, by name
    ) -> LSUVReport | None:  # `None` if there is no mini-batch
        "Initialize the model at once, in a fit or outside, and log what came of it."
        learn,watch,remarks = self.learn,_Progress(self.learn),[]
        written = self.known.written(parameters(learn.model))
        samples = self.min_samples if min_samples is None else min_samples
        arguments = dict(force=self.force if force is None else force, watch=watch,
                         keep=None if anyway else self._holds_meaning())
        try:
            report = self._initialize(Options(**{**self.options, **options}), samples, remarks.append, begun, arguments)
        finally:
            watch.close()
            self.known.note(parameters(learn.model), written)
            for line in remarks: self._say(line)
        if report is None: return None
        self.report = report
        self._done()
        self._say(line := f'{report.summary} {report.warning}'.rstrip())
        self.unsaid = line if learn.logger is noop else ''  # by `lr_find`, say
        return report

    def _initialize(self, options, samples, remark, begun, arguments) -> LSUVReport | None:
        "Draw mini-batches and run LSUV. The loss is that of the second one, from which LSUV does not correct first."
        learn,losses = self.learn,[]

        def keep_loss(make):
            if len(losses) < 2: losses.append(make())

        with no_trace(learn), closing(model_inputs(learn, samples, remark, begun, keep_loss)) as batches:
            first = in_step(lambda: [b for b in (next(batches, None), next(batches, None)) if b is not None])
            if any_rank(not first): return None
            return initialize(learn.model, chain(first, batches), options, loss=losses[-1], **arguments)

    def _say_now(self):
        "Log what was done in a fit without a log, such as that of `lr_find`."
        self._say(f"{self.unsaid} This was done before an earlier fit without a log, such as `lr_find`.")
        if self.learn.logger is not noop: self.unsaid = ''

    def _left(self, why: str):
        "Log that the model is as it was. The report says so, too, if there is none."
        line = f"LSUV left the model as it is: {why}."
        if not self.report: self.report = NoReport(line)
        self._say(line)

    def _say(self, line: str):
        "Log a line, once for all ranks."
        if not rank_distrib(): self.learn.logger(line)


@patch
@delegates(LSUVCallback)
def lsuv_init(self: Learner, **kwargs) -> LSUVReport:  # A row a unit, in order of execution; also `learn.lsuv.report`
    """Run LSUV at once, in a fit or outside, on trained weights too, with the options of the attached `LSUVCallback`
    less those given.

    Later fits keep the result. If none is attached, one is, so that `learn.lsuv.report` holds the report. Raises
    `ValueError` if there is no mini-batch to run on."""
    cb = next((cb for cb in self.cbs if isinstance(cb, LSUVCallback)), None)
    own = dict(cb.options, min_samples=cb.min_samples, every_fit=cb.every_fit, force=cb.force) if cb else {}
    given = LSUVCallback(**{**own, **kwargs})
    if cb is None: self.add_cb(cb := given)
    cb.every_fit = given.every_fit
    report = cb.run_now(force=given.force, min_samples=given.min_samples, **given.options)
    if report is None: raise ValueError(f"lsuv_init: {_NO_BATCH}")
    return report


class _Progress:
    "A progress bar over the units of a pass. It is shown only if the passes take long."
    def __init__(self, learn: Learner):
        wanted = any(isinstance(cb, ProgressCallback) for cb in learn.cbs) and learn.create_mbar
        self.show = wanted and learn.logger is not noop and not rank_distrib()
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
