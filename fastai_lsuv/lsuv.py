"""`lsuv_init`: layer-sequential unit-variance initialization of any model. `layer_stats`: how a model is now.

`initialize` puts the parts together: a `Feed` gives mini-batches, `find_units` the units, `preserved` keeps all else as
it was, `Passes` run the model and correct the units, `LossCheck` proves the result, and a report tells what came of
it."""
from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .coverage import Coverage, weights_of
from .discovery import Discovery
from .evidence import unusual
from .feed import Feed
from .generators import Generators
from .gradients import gradients_of
from .items import TensorItem
from .loss import LOSS_TAKES, LossCheck
from .moments import Moments
from .options import Options
from .passes import Passes
from .preinit import deck_for, preinitialize
from .ranks import in_step, meet
from .report import LSUVReport, Row
from .restore import put_back
from .selection import find_units, loose_parameters, measurable, wanted
from .sharded import from_rank_0, is_sharded, local, refuse, reshard
from .state import preserved
from .status import DOUBTS, Status
from .units import Target, Unit
from .views import Held
from .weights import made_of

__all__ = ['lsuv_init', 'layer_stats', 'initialize', 'plain']

# Fresh mini-batches that are tried after one that cannot be trusted.
_MOST_TRIES = 2


def lsuv_init(
    model: nn.Module,  # Any model; a compiled or `DistributedDataParallel` one is reached through the module it wraps
    batches: Any,  # A mini-batch (a tensor, or a tuple or dict of the model's inputs), or an iterable of mini-batches
    *,
    order: str = 'std mean',  # Loops at each unit: the words "mean" and "std", or both joined by "+" into one loop
    modules: Any = None,  # Types, a predicate, names or globs, modules, or a list; default: conv, linear, attention
    # The start: orthonormal weights and zero biases; `None` to keep those there are; or a function of a layer
    preinit: str | Callable[[nn.Module], object] | None = 'orthogonal',
    target_mean: float = 0.,  # Mean that the mean loop aims at
    target_std: float | Callable[[str, nn.Module], float] = 1.,  # The std aimed at, or a function (name, module) -> std
    tol: float = 1e-3,  # How close mean and std come to their targets in the mini-batch in use
    batch_tol: float = 0.1,  # How close std is on a fresh mini-batch, as a share of its target (the paper's Tol_var)
    max_iter: int = 10,  # Most passes, each on a fresh mini-batch, that may correct weights (the paper's T_max)
    per_channel: bool = False,  # Normalize each channel by itself, not the whole output
    baseline: bool = False,  # Measure the model as it was, too, at the price of one more pass
    n_inp: int | None = None,  # Items of a mini-batch that are inputs; of a DataLoader's all but the last, else all
    get_input: Callable[[Any], Any] | None = None,  # Picks the inputs out of what `batches` holds, in place of `n_inp`
    # Training loss of a model, on a mini-batch of your choice: `lambda model: F.cross_entropy(model(x), y)`
    loss: Callable[[Callable], Any] | None = None,
    force: bool = False  # Keep the weights even if `loss` comes out far worse than before
) -> LSUVReport:  # A row a unit, in order of execution
    """Initialize `model` so that each layer's output has mean 0 and std 1, layer by layer.

    By default this replaces the weights: each layer starts from an orthonormal weight and a zero bias, which LSUV then
    scales and shifts. With `preinit=None` it scales and shifts the weights that the model has.

    This is Algorithm 1 of Mishkin & Matas, *All you need is a good init* (ICLR 2016), with the loop orders of fastai's
    forum. A hook on each layer normalizes its output the moment it exists, when all layers before it are right. So one
    forward pass does the whole network. Pass k uses mini-batch k. The run ends when a fresh mini-batch finds every unit
    within `batch_tol`, or after `max_iter` passes that correct weights and one more that measures. A single mini-batch
    is used again: one pass corrects, one verifies.

    A weight that no layer applies, such as an expert's slice of a parameter, is a layer too, where a linear operation
    takes it. `report.outside` names the weights in no layer.

    The model is measured as it trains: norm layers use the statistics of the batch, and dropout is off. Nothing but
    weights and biases is changed; modes, buffers and hidden state are put back. Frozen weights are left alone, and
    zero-initialized ones stay zero. A layer is not corrected from samples that are alike if it needs a large factor,
    nor from one sample that sets the std, nor where a norm layer lets next to nothing through. Its status is then
    "alike", "outlier" or "faint". One warning names the layers that were not normalized, and those whose weights were
    scaled by a lot. The report gives the reason for each. Under `torch.distributed` the statistics are pooled over all
    ranks.

    With `loss`, the training loss is taken before and after, with dropout on. If it was finite and comes out
    non-finite, or five times that of before and of predicting zeros, the weights are put back, and the warning says so.

    Raises `TypeError` or `ValueError`, naming the argument, before anything is changed. If anything is raised later,
    weights and all else are put back. An error of the model is raised as it is, with a note that names the layer.
    With several ranks, call it on every one of them."""
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: got {loss!r}; {LOSS_TAKES}")
    report = initialize(model, batches, Options.of(locals()), n_inp=n_inp, get_input=get_input, loss=loss, force=force)
    if report.warning: warnings.warn(report.warning, stacklevel=2)
    return report


class _Undone(Exception):
    "Raised inside `preserved` to put the weights back."


def initialize(
    model: nn.Module,
    batches: Any,
    options: Options,
    *,
    n_inp: int | None = None,
    get_input: Callable[[Any], Any] | None = None,
    loss: Callable[[Callable], Any] | None = None,
    force: bool = False,  # All of these as in `lsuv_init`
    keep: Callable[[Unit], bool] | None = None,  # Which units are left alone as frozen ones are
    watch: Callable[[int, int], object] | None = None  # Told during a pass how many units of how many have run
) -> LSUVReport:
    "`lsuv_init` without its warning."
    model = plain(model)
    reshard(model)
    feed = Feed(model, batches, n_inp, get_input)

    def initialized() -> LSUVReport:
        with feed:
            units,discovery = _units(model, options, keep)
            meet(f"LSUV of {len(units)} layers" + (f", first {units[0].name!r}" if units else ''))
            start = partial(preinitialize, preinit=options.preinit, deck=deck_for(units))
            if options.preinit is None: start = None
            return _run_all(Passes(model, units, watch, start, discovery), feed, LossCheck(model, loss), options, force)

    return in_step(initialized)


def _run_all(passes: Passes, feed: Feed, check: LossCheck, options: Options, force: bool) -> LSUVReport:
    "Look, correct, and take the loss. Put all back if that fails, or if the model came out far worse."
    model,units,before,undone = passes.model,passes.units,{},''

    def run(kept) -> int:
        nonlocal before
        passes.rewind,passes.discovery.own = kept.rewind,kept.own
        if options.baseline or check.loss is not None: before = _look(passes, feed, check)
        n = _run(passes, feed, options.max_iter)
        if not units:
            raise ValueError(f"model: {type(model).__name__} has no conv, linear or attention layer, and applies no "
                             "weight in a linear operation; name what to normalize with `modules`")
        if check.loss is not None: kept.rewind()
        check.take_after()
        return n

    try:
        with _as_on_rank_0(model), _preserved(model, units) as kept:
            n = in_step(lambda: run(kept))
            undone = check.failure
            if undone and not force: raise _Undone
    except _Undone as e:
        # What could not be put back is a note, or the context on a Python without notes.
        failed = getattr(e, '__notes__', []) or [str(c) for c in [e.__context__] if c is not None]
        if failed:
            raise RuntimeError(f"LSUV put the weights back, because {undone}. {' '.join(failed)}") from None
    else:
        for u in units: u.finish()
        undone = ''
    rows,held = _rows(passes, options.modules is not None, before, bool(undone))
    n_passes = n + bool(before) + (check.pair is not None)
    return LSUVReport(rows, options.order, n_passes, check.pair, undone, check.told(force), unusual(feed.batch),
                      held.outside, held.share)


def _units(model: nn.Module, options: Options, keep: Callable[[Unit], bool] | None) -> tuple[list[Unit], Discovery]:
    "The units of `model`, with their targets, and what finds others as it runs."
    def prepare(u):
        u.target = options.target(u)
        if keep is not None and not u.left_alone and keep(u): u.left_alone = 'frozen'

    loose = loose_parameters(model)
    units = find_units(model, options.modules, loose)
    for u in units: prepare(u)
    return units, Discovery(_but(loose, units), wanted(model, options.modules, units), prepare)


def _look(passes: Passes, feed: Feed, check: LossCheck) -> dict[Unit, tuple[float, float]]:
    "Mean and std of each unit before anything is changed, from the forward that takes the loss if there is one."
    if check.loss is not None: passes.look(check.take_before)
    if check.pair is None or not passes.order: passes(feed.batch, correct=False)
    before = {u: _pair(u.latest.pooled, u.target.per_channel) for u in passes.order if u.latest is not None}
    for u in passes.units: u.forget()
    return before


def _run(passes: Passes, feed: Feed, max_iter: int) -> int:
    "Correct until a fresh mini-batch finds every unit at its target. Returns the number of passes."
    tries,fresh = 0,True
    for n in range(1, max_iter + 1):
        changed = passes(feed.batch, fresh=fresh)
        doubts = {u.reason for u in passes.units} & DOUBTS
        again = tries < _MOST_TRIES and bool(doubts)
        tries += again
        got_more = again and (feed.gather() if Status.ALIKE in doubts else feed.next())
        if not (changed or got_more): return n
        fresh = got_more or feed.next()
    passes(feed.batch, correct=False, fresh=fresh)
    return max_iter + 1


def _preserved(model: nn.Module, units: list[Unit]):
    "Keep everything but the units' weights and biases as it was."
    def changed(p):
        if not written: written.update(id(p) for u in units if u.written for p in u.parameters)
        return id(p) in written

    written: set[int] = set()
    held = [r for u in units for r in u.refs if r.has_setter]
    computed = [u.layer for u in units if not u.left_alone]
    owned = [p for u in units if not u.left_alone for p in u.parameters]
    return preserved(model, owned, held, computed, changed)


def _but(loose: list[Held], units: list[Unit]) -> list[Held]:
    "The loose parameters that no unit is made of."
    taken = {id(p) for u in units if u.layer is not None for p in made_of(u.layer)}
    return [h for h in loose if id(h.param) not in taken]


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


def layer_stats(
    model: nn.Module,  # Any model
    batch: Any,  # One mini-batch, as in `lsuv_init`; of an iterable, the first is used
    *,
    modules: Any = None,  # What to measure, as in `lsuv_init`; modules without a weight, an activation say, too
    n_inp: int | None = None,  # As in `lsuv_init`
    get_input: Callable[[Any], Any] | None = None,  # As in `lsuv_init`
    # Training loss of the model, for its gradients by layer: `lambda model: F.cross_entropy(model(x), y)`
    loss: Callable[[nn.Module], Any] | None = None
) -> LSUVReport:  # A row a layer, in order of execution; `status` says whether std is within 0.1 of 1
    """The (mean, std) table of `model` as it is, in the mode it trains in: one forward pass, nothing changed.

    Batch norm uses the statistics of the batch, dropout is off. Mean and std are those of a layer's whole output,
    pooled over all its calls, the std unbiased as `Tensor.std` is.

    With `loss`, each row also tells of the gradient, at the price of one more forward and a backward: `grad_std`, the
    std of the gradient at the layer's output, and `weight_grad`, the norm of the weight's gradient over the norm of
    the weight. The second is the share of the weight that a step of SGD with learning rate 1 changes. Where it falls
    or grows by orders of magnitude from layer to layer, layers learn at different paces. No `.grad` is touched.

    Raises `TypeError` or `ValueError`, naming the argument."""
    if loss is not None and not callable(loss): raise TypeError(f"loss: got {loss!r}; {LOSS_TAKES}")
    model = plain(model)
    reshard(model)

    if loss is not None and any(map(is_sharded, model.parameters())):
        raise ValueError("loss: got one for a sharded model, whose engine keeps the gradients; leave it out, or "
                         "measure the model before it is sharded")

    def measured() -> LSUVReport:
        with Feed(model, batch, n_inp, get_input) as feed:
            def prepare(u): u.left_alone,u.target = '',Target((), 0., 1., 1e-3, 0.1, False)

            loose = loose_parameters(model)
            units = measurable(model, modules, loose)
            for u in units: prepare(u)
            discovery = Discovery(_but(loose, units), wanted(model, modules, units), prepare)
            return _stats(Passes(model, units, discovery=discovery), feed, loss, modules is not None)

    return in_step(measured)


def _stats(passes: Passes, feed: Feed, loss: Callable | None, chosen: bool) -> LSUVReport:
    "The report of one forward, and of the gradients of `loss` if there is one."
    gradients: dict[Unit, dict[str, float | None]] = {}
    with preserved(passes.model) as kept, Generators().again():
        n_passes = 1
        if passes(feed.batch, correct=False):  # layers were not called, and are looked for in operations
            kept.rewind()
            passes(feed.batch, correct=False, fresh=False)
            n_passes += 1
        if loss is not None:
            kept.rewind()
            gradients = gradients_of(passes, loss)
    rows,held = _rows(passes, chosen)
    rows = [replace(r, **gradients.get(u, {})) for r, u in zip(rows, _in_order(passes))]
    return LSUVReport(rows, n_passes=n_passes + (loss is not None), outside=held.outside, coverage=held.share)


def plain(model: nn.Module) -> nn.Module:
    "The module that `model` wraps, if it is compiled or parallel. Raises if it cannot be initialized."
    if not isinstance(model, nn.Module):
        stage = type(model).__module__.startswith('torch.distributed.pipelining')
        raise TypeError(f"model: got {type(model).__name__}; it takes a torch.nn.Module"
                        + ("; initialize the whole model before it is cut into stages" if stage else ""))
    wrapped = getattr(model, '_orig_mod', None)  # torch.compile
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): wrapped = model.module
    if isinstance(wrapped, nn.Module): return plain(wrapped)
    refuse(model)
    on_meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"model: {on_meta!r} is on the meta device and holds no numbers; give the model memory first: "
                         "`model.to_empty(device=...)`")
    return model


# ---- The rows of the report

def _in_order(passes: Passes) -> list[Unit]:
    "Those that ran in order of execution, then the others."
    return [*passes.order, *(u for u in passes.units if u not in passes.order)]


def _rows(
    passes: Passes,
    selected: bool,  # Whether `modules` selects some units, and not all
    before: dict[Unit, tuple[float, float]] | None = None,  # Mean and std before anything was done
    undone: bool = False  # Whether the weights were put back
) -> tuple[list[Row], Coverage]:
    "A row a unit, in order of execution, and what is in no row."
    passes.units += passes.discovery.missed()
    held = Coverage(passes.model, passes.units, passes.discovery, selected)
    return [_row(u, weights_of(u, held.names), before or {}, undone) for u in _in_order(passes)], held


def _row(u: Unit, weights: tuple[str, ...], before: dict[Unit, tuple[float, float]], undone: bool) -> Row:
    status,was = u.verdict(),before.get(u, (None, None))
    mean = std = float('nan')
    mean_range = None
    if u.latest is not None:
        m = u.judged()
        (mean, std),mean_range = _pair(m, u.target.per_channel),u.target.mean_range(m)
    shape,passes,gain = u.latest.shape if u.latest is not None else (), u.passes, u.gain
    if undone and u.written:
        status,passes,gain = Status.UNDONE,0,1.
        mean,std = was if was[0] is not None else (float('nan'), float('nan'))
    return Row(u.name, u.kind, shape, mean, std, *was, passes, status.value, gain, mean_range, u.target.std_range(),
               weights)


def _pair(m: Moments, per_channel: bool) -> tuple[float, float]:
    "Mean and std as two numbers; of channels, the mean of their means and the root mean square of their stds."
    mean,std = m.stats(per_channel)
    return float(mean.mean()), math.sqrt((std**2).mean())
