"""`LSUVCallback`: LSUV in a Learner, before the first fit and only where weights are new.

`before_fit` asks `trained` whether the weights are new. If they are, it calls `run_now`, which draws mini-batches with
`batches.model_inputs` inside `no_trace`, passes them to `lsuv.initialize`, and logs the result in one line."""
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
from ..arguments import answers_unknown
from ..lsuv import NothingToDo, initialize
from ..parallel import any_rank, in_step
from ..report import LSUVReport, NoReport
from ..run import LooksTrained, Options, UnlessTrained, check_whole
from .hints import Hints
from .trained import EARLIER, CallbackOnNewWeights, begins_a_fit

__all__ = ['LSUVCallback']

_NOT_YET = "LSUV has not run: it runs when the first fit begins. `learn.lsuv_init()` runs it now."
_NO_BATCH = "the training DataLoader yields no mini-batch, or callbacks cancel them all"
_LONG = 3.  # Seconds after which a pass shows a progress bar


class LSUVCallback(CallbackOnNewWeights):
    """Normalize the model's layers by LSUV before its first fit, on fresh mini-batches of the training DataLoader.

    It is `learn.lsuv`. `learn.lsuv.report` says what it did, or why it did nothing. The report stays there after
    `learn.fit(1, cbs=LSUVCallback())`, too, when fastai has removed the callback.

    It runs once, and leaves weights alone that are not new: those frozen now or when the callback was attached, the
    body of a Learner made with `pretrained=True`, weights loaded since the callback was attached, and a model that has
    been trained. One line says so. `force=True`, `reset()` and `learn.lsuv_init()` initialize them anyway (unfreeze
    frozen weights first). If you load weights before you attach the callback, it recognizes a trained model by its norm
    layers, or by a loss far below that of a constant answer. It cannot recognize a trained body with a new head this
    way: attach the callback when you make the Learner, and load or freeze the body after that.

    Nothing else changes: random numbers, batches, optimizer, buffers and other callbacks are as they would have been
    without it. If anything fails, the weights are put back. Raises `TypeError` or `ValueError`, naming the argument,
    when it is made. An exported Learner needs this package to load, unless `learn.remove_cb(LSUVCallback)` was called
    before `learn.export`.

    Its `order`, 10.5, puts it after callbacks that prepare the model (`TrainEvalCallback`, `ChannelsLast`, your own of
    the default order 0) and after `MixedPrecision`, in whose autocast it measures. It runs before callbacks that copy
    or wrap the model (an EMA, `DistributedTrainer`: 11) or save it (`LRFinder`: 60), and before `Recorder` (50) and
    `ProgressCallback` (60), which begin the log. A callback of any order may change the input in its `before_batch`. If
    that needs what its own `before_fit` makes, that `before_fit` runs first, and its attributes are put back."""
    order = MixedPrecision.order + 0.5

    @answers_unknown
    def __init__(self,
        order: str = 'std mean',  # Loops at each unit: the words "mean" and "std", or both joined by "+" into one loop
        modules: Any = None,  # What to normalize: types, names, globs, modules, a predicate, or a list; default: all
        exclude: Any = None,  # What to leave out, with everything inside it, named as in `modules`
        # Weights to start from: `None` keeps the model's own; "mirrored", "orthogonal", or a function of a layer
        preinit: str | Callable[[nn.Module], object] | None = None,
        target_mean: float = 0.,  # Mean to reach
        target_std: float | Callable[[str, nn.Module], float] = 1.,  # Std to reach, or a function (name, module) -> std
        tol: float = 1e-3,  # Tolerance of mean and std on the mini-batch in use
        batch_tol: float = 0.1,  # Tolerance of the std on a fresh mini-batch, relative (the paper's Tol_var)
        max_iter: int = 10,  # Maximum number of correcting passes (the paper's T_max)
        per_channel: bool = False,  # Normalize each channel on its own, not the whole output
        baseline: bool = True,  # Measure the model before LSUV, too, in the pass that takes its loss
        min_samples: int = 16,  # Join smaller mini-batches until they hold this many samples (the paper: at least 16)
        every_fit: bool = False,  # Run before every fit, not only before the first; this changes trained weights
        force: bool = False  # Run even on loaded or trained weights, and keep the result even if the loss is far worse
    ):
        # `self.order` is when a callback runs, in fastai
        self.options = dict(vars(Options.of(locals())))
        check_whole('min_samples', min_samples)
        self.min_samples,self.every_fit,self.force = min_samples,every_fit,force
        self.report: LSUVReport | NoReport = NoReport(_NOT_YET)
        self.unsaid = ''
        super().__init__()

    # fastai deletes from the Learner what has the name of a callback that it removes
    @property
    def name(self):
        "The attribute of the Learner that holds this callback."
        return 'lsuv' if self.learn is not None else 'lsuv_removed'
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
        try: report = self.run_now(anyway=self.every_fit or self.force or self.anyway, begun=cbs[:cbs.index(self)])
        except LooksTrained as e: return self._left(f"{e}. `learn.lsuv_init()` initializes it anyway")
        except NothingToDo as e: return self._left(str(e).removeprefix('model: '))
        if report is None: self._left(_NO_BATCH)

    def run_now(self,
        anyway: bool = True,  # Whether to initialize loaded or pretrained weights, too
        begun: Iterable[Callback] = (),  # Callbacks whose `before_fit` has run
        force: bool | None = None,  # Keep the weights whatever the loss; default: the callback's own
        min_samples: int | None = None,  # In place of the callback's own
        **options: Any  # In place of the callback's own, by name
    ) -> LSUVReport | None:  # `None` if there is no mini-batch
        "Initialize the model at once, in a fit or outside, and log the result."
        learn,watch,remarks,model = self.learn,_Progress(self.learn),[],self.learn.model
        written,hints = self.known.written(model),Hints(learn, held := set() if anyway else self._held())
        samples = self.min_samples if min_samples is None else min_samples
        arguments = dict(force=self.force if force is None else force, watch=watch,
                         keep=lambda u: any(id(p) in held for p in u.parameters))
        try:
            options = Options(**{**self.options, **options})
            report = self._initialize(options, samples, remarks.append, begun, arguments, not anyway)
        finally:
            watch.close()
            self.known.note(model, written)
            for line in remarks: self._say(line)
        if report is None: return None
        self.report = report
        self._done()
        self._say(line := ' '.join(filter(None, [report.summary, report.warning, *hints.of(report, anyway)])))
        self.unsaid = line if learn.logger is noop else ''  # by `lr_find`, say
        return report

    def _initialize(self, options, samples, remark, begun, arguments, only_new) -> LSUVReport | None:
        "Draw mini-batches and run LSUV. The loss is taken on the second one, because LSUV corrects from the first."
        learn,losses = self.learn,[]

        def keep_loss(make):
            if len(losses) < 2: losses.append(make())

        with no_trace(learn), closing(model_inputs(learn, samples, remark, begun, keep_loss)) as batches:
            first = in_step(lambda: [b for b in (next(batches, None), next(batches, None)) if b is not None])
            if any_rank(not first): return None
            loss = losses[-1] and UnlessTrained(losses[-1], only_new)
            return initialize(learn.model, chain(first, batches), options, loss=loss, **arguments)

    def _say_now(self):
        "Log what was done in a fit without a log, such as that of `lr_find`."
        self._say(f"{self.unsaid} This was done before an earlier fit without a log, such as `lr_find`.")
        if self.learn.logger is not noop: self.unsaid = ''

    def _left(self, why: str):
        "Log that LSUV left the model as it is. If there is no report yet, `report` says so, too."
        line = f"LSUV left the model as it is: {why}."
        if not self.report: self.report = NoReport(line)
        self._say(line)

    def _say(self, line: str):
        "Log a line, once for all ranks."
        if not rank_distrib(): self.learn.logger(line)


@patch
@delegates(LSUVCallback)
def lsuv_init(self: Learner, **kwargs) -> LSUVReport:  # One row per unit, in execution order; also `learn.lsuv.report`
    """Run LSUV at once, in a fit or outside, on trained weights too.

    It uses the options of the attached `LSUVCallback`; arguments given here override them. If no callback is attached,
    it attaches one, so that `learn.lsuv.report` holds the report. Later fits keep the result. Raises `ValueError` if
    there is no mini-batch to run on."""
    cb = next((cb for cb in self.cbs if isinstance(cb, LSUVCallback)), None)
    own = dict(cb.options, min_samples=cb.min_samples, every_fit=cb.every_fit, force=cb.force) if cb else {}
    given = LSUVCallback(**{**own, **kwargs})
    if cb is None: self.add_cb(cb := given)
    cb.every_fit = given.every_fit
    report = cb.run_now(force=given.force, min_samples=given.min_samples, **given.options)
    if report is None: raise ValueError(f"lsuv_init: {_NO_BATCH}")
    return report


class _Progress:
    "Show a progress bar over the units of a pass, if the passes take long."
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
