"""One run of LSUV, from finding the units to the report.

`Run` looks at the model, repeats passes until the units are at their targets, and takes the loss. Weights are written
between passes. If anything is raised, Ctrl-C included, or if the model came out far worse, all is put back."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from ..keep import Generators, Weights, gradients_aside, uninterrupted
from ..measure import unusual
from ..observe import Observer, cloned
from ..parallel import from_rank_0, in_step, meet
from ..report import LSUVReport
from ..start import Start
from ..statuses import DOUBTS, Status
from ..text import some_names
from ..units import NothingToDo, Selection, Unit
from .blame import warn_caller
from .feed import Feed, few_of
from .kept import Kept
from .loss import LossCheck
from .options import Options
from .passes import Passes, call
from .results import MeanStd, advice, mean_std, rows_of

__all__ = ['Run']

# Mini-batches that are tried because of doubts.
_MOST_TRIES = 2
# Passes that only measure, for layers that the last pass skipped.
_MOST_LOOKS = 3
# Samples on which the units are shown to another than the corrector.
_FEW = 4


class Run:
    "One run of LSUV on one model. Call it once."
    def __init__(self,
        model: nn.Module,
        feed: Feed,  # It is used inside its `with`
        options: Options,
        loss: Callable[[Callable], Any] | None = None,  # As in `lsuv_init`
        keep: Callable[[Unit], bool] | None = None,  # As in `initialize`
        watch: Callable[[int, int], object] | None = None  # As in `initialize`
    ):
        def prepare(u):
            u.target = options.target(u)
            if not u.left_alone and keep is not None and keep(u): u.left_alone = 'frozen'

        self.model,self.feed,self.options,self.prepare,self.watch = model,feed,options,prepare,watch
        self.keeps = lambda u: bool(u.left_alone) or keep is not None and keep(u)
        self.check = LossCheck(model, loss)
        self.selection = Selection(model, options.modules, options.exclude)
        self.before: dict[Unit, MeanStd] = {}
        self.n_passes = self.tries = 0  # Forwards; and mini-batches that were tried because of doubts

    def __call__(self,
        force: bool,  # Keep the weights even if the loss comes out far worse
        tell: Callable[[LSUVReport], object]  # Called with the report, while all can still be put back
    ) -> LSUVReport:
        s = self.selection
        meet(f"LSUV of {len(s.layers) + len(s.blocks)} layers" + ''.join(f", first {n!r}" for n, _ in s.layers[:1]))
        with _as_on_rank_0(self.model):
            self.kept,generators = Kept(self.model, [u.layer for u in s.blocks if u.layer is not None]),Generators()
            try:
                with gradients_aside(self.model.parameters()):
                    in_step(self._normalize)
                    self.feed.end()
                    undone = '' if force else self.check.failure
                    if undone: self.kept.put_back()
                    return in_step(lambda: self._finish(force, undone, tell))
            except BaseException:
                with uninterrupted():
                    self.kept.put_back()
                    generators.restore()
                raise

    def _normalize(self) -> None:
        "Look, start, correct, and take the loss."
        self.passes = Passes(self.model, self.selection, self.prepare, self.kept, watch=self.watch)
        if self.options.baseline or self.check.loss is not None: self._look()
        keep,show = self.kept.before_starting,self._show
        self.start = Start(self.options.preinit, self.passes.discovery, self.keeps, keep, show)
        self.passes.corrector.waits = self.start.waits
        self._repeat_passes()
        if not self.passes.units and not self.selection.layers: raise NothingToDo(self.model)
        self.kept.put_back_params(unused := self.start.unused())
        self.kept.rewind()
        self.n_passes += self.check.take_after(anew=bool(unused))
        self.kept.rewind()
        _warn_of_new_layers(self.passes.made)

    def _look(self) -> None:
        "Measure each unit before anything is changed, in the forward that takes the loss if there is one."
        passes,check = self.passes,self.check
        if check.loss is not None: passes.look(check.take_before)
        if check.pair is None or not passes.order: passes(self.feed.batch, correct=False)
        self.before = {u: mean_std(u.seen.latest.pooled, u.target.per_channel) for u in passes.order}
        self.n_passes += bool(self.before)
        for u in passes.units: u.seen.forget()

    def _show(self, few: bool, observer: Observer, wrappers: dict[Callable, Callable]) -> None:
        "Show the units to an observer as the model runs on a few samples, or on all."
        batch = few_of(self.feed.batch, _FEW) if few else self.feed.batch
        self.n_passes += 1
        try: self.passes.show(observer, lambda: call(self.model, cloned(batch)), wrappers)
        finally: self.kept.rewind()

    def _repeat_passes(self) -> None:
        "Correct until a pass changes nothing, or `max_iter` times. In the second case one more pass measures."
        fresh = True
        if self.start(): self.check.current = False
        for _ in range(self.options.max_iter):
            changed = self._pass(fresh)
            fresh = self._answer_doubts()
            if not (changed or fresh): return self._see_the_rest()
            if not fresh: fresh = self.feed.next()
        self._pass(fresh, correct=False)
        self._see_the_rest()

    def _answer_doubts(self) -> bool:
        "Move on to a mini-batch that may dispel the doubts, if there are any. Returns whether there is one."
        doubts = {u.reason for u in self.passes.units} & DOUBTS
        if not doubts or self.tries == _MOST_TRIES: return False
        self.tries += 1
        if Status.ALIKE in doubts: return self.feed.join_more()
        return self.feed.next()

    def _see_the_rest(self) -> None:
        "Measure again while layers that the model skips at random have not been seen since others changed."
        for _ in range(_MOST_LOOKS):
            if not any(u.stale and u.seen.latest is not None for u in self.passes.units): return
            self._pass(fresh=False, correct=False)

    def _pass(self, fresh: bool, correct: bool = True) -> bool:  # Whether any weight was written
        "Run one pass, and apply what it plans. If that is nothing, the pass may tell the loss, too."
        self.n_passes += 1
        passes,check,batch = self.passes,self.check,self.feed.batch
        planned = passes(batch, correct, fresh)
        passes.apply(planned)
        started = correct and self.start(passes.units)
        if planned or started: check.current = False
        elif not check.current: check.take_from(passes.output, batch, passes.corrector.norms.altered)
        return bool(planned) or started

    def _finish(self, force: bool, undone: str, tell: Callable[[LSUVReport], object]) -> LSUVReport:
        options,check = self.options,self.check
        if not undone: self.kept.finish()
        rows,coverage = rows_of(self.passes, self.before, bool(undone), options.preinit == 'mirrored')
        report = LSUVReport(rows, options.order, self.n_passes, check.pair, undone, check.told(force),
                            unusual(self.feed.batch), coverage.outside, coverage.share, self.start.note,
                            '' if undone or options.preinit is not None else advice(self.passes, rows))
        tell(report)
        return report


def _warn_of_new_layers(made: list[str]) -> None:
    if made:
        warn_caller(f"The model makes layers as it runs, which LSUV did not initialize: {some_names(made)}. Run the "
                    "model once before LSUV, as in `model(batch)`.")


@contextmanager
def _as_on_rank_0(model: nn.Module) -> Iterator[None]:
    "Begin on every rank with the weights of rank 0, or with slices of the same; put them back if anything is raised."
    before,params = Weights(),[p for p in model.parameters() if not is_lazy(p)]
    try:
        in_step(lambda: from_rank_0(params, before.keep))
        yield
    except BaseException:
        before.put_back()
        raise
