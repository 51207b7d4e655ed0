"""One run of LSUV, from finding the units to the report.

`Run` looks at the model, repeats passes until the units are at their targets, and takes the loss. If anything is
raised, Ctrl-C included, or if the model came out far worse, all is put back."""
from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..observe.discovery import Discovery
from ..measure.doubts import unusual
from .feed import Feed
from ..keep.items import TensorItem
from .loss import LossCheck
from .options import Options
from .passes import Passes
from ..start.preinit import deck_for, preinitialize
from ..parallel.ranks import in_step, meet
from ..report.report import LSUVReport
from ..keep.restore import put_back
from ..report.results import MeanStd, mean_std, rows_of
from ..units.selection import find_units, loose_parameters, outside_of, wanted
from ..parallel.sharded import from_rank_0, local
from ..keep.state import Preserved, preserved
from ..units.status import DOUBTS, Status
from ..units.units import Unit

__all__ = ['Run']

# Mini-batches that are tried because of doubts.
_MOST_TRIES = 2


class _FarWorse(Exception):
    "Raised inside of `preserved` to put the weights back."


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
            if keep is not None and not u.left_alone and keep(u): u.left_alone = 'frozen'

        self.model,self.feed,self.options,self.watch = model,feed,options,watch
        self.check = LossCheck(model, loss)
        named = list(model.named_modules())
        loose = loose_parameters(model, named)
        self.units = find_units(model, options.modules, loose, named)
        for u in self.units: prepare(u)
        self.discovery = Discovery(outside_of(self.units, loose), wanted(model, options.modules, self.units), prepare)
        self.before: dict[Unit, MeanStd] = {}
        self.n_passes = 0
        self.tries = 0  # Mini-batches that were tried because of doubts

    def __call__(self,
        force: bool,  # Keep the weights even if the loss comes out far worse
        tell: Callable[[LSUVReport], object]  # Called with the report, while all can still be put back
    ) -> LSUVReport:
        meet(f"LSUV of {len(self.units)} layers" + (f", first {self.units[0].name!r}" if self.units else ''))
        try:
            with _as_on_rank_0(self.model):
                with self._preserved() as kept:
                    in_step(lambda: self._normalize(kept))
                    if self.check.failure and not force: raise _FarWorse
                try: return in_step(lambda: self._finish(force, tell))
                except BaseException as e:
                    kept.roll_back(e)
                    raise
        except _FarWorse as e:
            _check_put_back(e, self.check.failure)
        report = self._report(force, undone=self.check.failure)
        tell(report)
        return report

    def _preserved(self):
        "Keep everything but the units' weights and biases as it was."
        mine = [u for u in self.units if not u.left_alone]
        owned,computed = [p for u in mine for p in u.parameters],[u.layer for u in mine]
        values = [r for u in self.units for r in u.refs if r.has_setter]
        written: set[int] = set()

        def changed(p):
            if not written: written.update(id(p) for u in self.units if u.written for p in u.parameters)
            return id(p) in written

        return preserved(self.model, owned, values, computed, changed)

    def _normalize(self, kept: Preserved) -> None:
        "Look, correct, and take the loss."
        options,preinit = self.options,None
        if options.preinit is not None:
            preinit = partial(preinitialize, preinit=options.preinit, deck=deck_for(self.units))
        self.passes = Passes(self.model, self.units, self.discovery, kept=kept, preinit=preinit, watch=self.watch)
        has_loss = self.check.loss is not None
        if options.baseline or has_loss: self._look()
        self._repeat_passes()
        if not self.units:
            raise ValueError(f"model: {type(self.model).__name__} has no conv, linear or attention layer, and applies "
                             "no weight in a linear operation; name what to normalize with `modules`")
        if has_loss: kept.rewind()
        self.check.take_after()
        self.n_passes += self.check.pair is not None

    def _look(self) -> None:
        "Measure each unit before anything is changed, in the forward that takes the loss if there is one."
        passes,check = self.passes,self.check
        if check.loss is not None: passes.look(check.take_before)
        if check.pair is None or not passes.order: passes(self.feed.batch, correct=False)
        seen = [(u, u.seen.latest) for u in passes.order]
        self.before = {u: mean_std(o.pooled, u.target.per_channel) for u, o in seen if o is not None}
        self.n_passes += bool(self.before)
        for u in self.units: u.seen.forget()

    def _repeat_passes(self) -> None:
        "Correct until a pass changes nothing, or `max_iter` times. In the second case one more pass measures."
        fresh = True
        for _ in range(self.options.max_iter):
            changed = self._pass(fresh)
            fresh = self._answer_doubts()
            if not (changed or fresh): return
            if not fresh: fresh = self.feed.next()
        self._measure_once_more(fresh)

    def _answer_doubts(self) -> bool:
        "Move on to a mini-batch that may dispel the doubts, if there are any. Returns whether there is one."
        doubts = {u.reason for u in self.units} & DOUBTS
        if not doubts or self.tries == _MOST_TRIES: return False
        self.tries += 1
        if Status.ALIKE in doubts: return self.feed.join_more()
        return self.feed.next()

    def _measure_once_more(self, fresh: bool) -> None:
        "Measure what the last corrections have made of the units."
        self._pass(fresh, correct=False)

    def _pass(self, fresh: bool, correct: bool = True) -> bool:
        self.n_passes += 1
        return self.passes(self.feed.batch, correct, fresh)

    def _finish(self, force: bool, tell: Callable[[LSUVReport], object]) -> LSUVReport:
        for u in self.units: u.finish()
        report = self._report(force)
        tell(report)
        return report

    def _report(self, force: bool, undone: str = '') -> LSUVReport:
        options,check = self.options,self.check
        rows,coverage = rows_of(self.passes, options.modules is not None, self.before, bool(undone))
        return LSUVReport(rows, options.order, self.n_passes, check.pair, undone, check.told(force),
                          unusual(self.feed.batch), coverage.outside, coverage.share)


def _check_put_back(e: BaseException, why: str) -> None:
    "Raise `RuntimeError` if something could not be put back: `put_back` has noted it on `e`."
    failed = getattr(e, '__notes__', []) or [str(c) for c in [e.__context__] if c is not None]  # no notes before 3.11
    if failed: raise RuntimeError(f"LSUV put the weights back, because {why}. {' '.join(failed)}") from None


@contextmanager
def _as_on_rank_0(model: nn.Module) -> Iterator[None]:
    "Begin on every rank with the weights of rank 0, or with slices of the same; put them back if anything is raised."
    changed: list[tuple[Tensor, Tensor]] = []
    try:
        in_step(lambda: from_rank_0((p for p in model.parameters() if not is_lazy(p)), changed))
        yield
    except BaseException as e:
        put_back([TensorItem(local(t), 'a parameter', was) for t, was in changed], beside=e)
        raise
