"""`lsuv_init`: layer-sequential unit-variance initialization of any model. `layer_stats`: how a model is now.

Both draw from a `Feed`, run `Passes`, and give a report. What happens to a model, step by step, is in `Run`."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

from torch import nn

from .run.blame import warn_caller
from .observe.discovery import Discovery
from .run.feed import Feed
from .keep.generators import Generators
from .run.gradients import gradients_of
from .run.loss import LOSS_TAKES
from .run.options import Options
from .run.passes import Passes
from .parallel.ranks import in_step
from .report.report import LSUVReport
from .report.results import in_order, rows_of
from .run.run import Run
from .units.selection import loose_parameters, measurable, outside_of, wanted
from .parallel.sharded import is_sharded, refuse, reshard
from .keep.state import preserved
from .measure.targets import Target
from .units.units import Unit

__all__ = ['lsuv_init', 'layer_stats', 'initialize', 'plain']


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
    non-finite, or more than five times both the loss before and the loss of predicting zeros, the weights are put
    back, and the warning says so.

    Raises `TypeError` or `ValueError`, naming the argument, before anything is changed. If anything is raised later,
    weights and all else are put back. An error of the model is raised as it is, with a note that names the layer.
    With several ranks, call it on every one of them."""
    _check_loss(loss)
    return initialize(model, batches, Options.of(locals()), n_inp=n_inp, get_input=get_input, loss=loss, force=force,
                      tell=_warn)


def _warn(report: LSUVReport) -> None:
    if report.warning: warn_caller(report.warning)


def initialize(
    model: nn.Module,
    batches: Any,
    options: Options,
    *,
    n_inp: int | None = None,
    get_input: Callable[[Any], Any] | None = None,
    loss: Callable[[Callable], Any] | None = None,
    force: bool = False,  # All of these as in `lsuv_init`
    keep: Callable[[Unit], bool] | None = None,  # Whether a unit is left alone, as a frozen one is
    watch: Callable[[int, int], object] | None = None,  # Called during a pass as `watch(n_run, n_units)`
    tell: Callable[[LSUVReport], object] = lambda report: None  # Called with the report; if it raises, all is put back
) -> LSUVReport:
    "`lsuv_init` without its warning."
    def initialized() -> LSUVReport:
        inner = plain(model)
        reshard(inner)
        with Feed(inner, batches, n_inp, get_input) as feed:
            return Run(inner, feed, options, loss, keep, watch)(force, tell)

    return in_step(initialized)


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
    _check_loss(loss)

    def prepare(u): u.left_alone,u.target = '',Target((), 0., 1., 1e-3, 0.1, False)

    def measured() -> LSUVReport:
        inner = plain(model)
        reshard(inner)
        if loss is not None and any(map(is_sharded, inner.parameters())):
            raise ValueError("loss: got one for a sharded model, whose engine keeps the gradients; leave it out, or "
                             "measure the model before it is sharded")
        with Feed(inner, batch, n_inp, get_input) as feed:
            loose = loose_parameters(inner)
            units = measurable(inner, modules, loose)
            for u in units: prepare(u)
            discovery = Discovery(outside_of(units, loose), wanted(inner, modules, units), prepare)
            return _stats(inner, units, discovery, feed, loss, modules is not None)

    return in_step(measured)


def _check_loss(loss: Any) -> None:
    if loss is not None and not callable(loss): raise TypeError(f"loss: got {loss!r}; {LOSS_TAKES}")


def _stats(model: nn.Module, units: list[Unit], discovery: Discovery, feed: Feed, loss: Callable | None,
           selected: bool) -> LSUVReport:
    "The report of one forward, and of the gradients of `loss` if there is one."
    gradients: dict[Unit, dict[str, float | None]] = {}
    with preserved(model) as kept, Generators().again():
        passes,n_passes = Passes(model, units, discovery),1
        if passes(feed.batch, correct=False):  # layers were not called, and are looked for in operations
            kept.rewind()
            passes(feed.batch, correct=False, fresh=False)
            n_passes += 1
        if loss is not None:
            kept.rewind()
            gradients = gradients_of(passes, loss)
    rows,coverage = rows_of(passes, selected)
    rows = [replace(r, **gradients.get(u, {})) for r, u in zip(rows, in_order(passes))]
    return LSUVReport(rows, n_passes=n_passes + (loss is not None), outside=coverage.outside, coverage=coverage.share)


def plain(model: nn.Module) -> nn.Module:
    "The module that `model` wraps, if it is compiled or parallel. Raises if it cannot be initialized."
    if not isinstance(model, nn.Module):
        stage = type(model).__module__.startswith('torch.distributed.pipelining')
        raise TypeError(f"model: got {type(model).__name__}; it takes a torch.nn.Module"
                        + ("; initialize the whole model before it is cut into stages" if stage else ""))
    wrapped = getattr(model, '_orig_mod', None)  # torch.compile
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): wrapped = model.module
    if isinstance(wrapped, nn.Module): return plain(wrapped)
    named = list(model.named_modules())
    refuse(named)
    held = ((f'{n}.{k}' if n else k, p) for n, m in named for k, p in m._parameters.items() if p is not None)
    on_meta = next((n for n, p in held if p.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"model: {on_meta!r} is on the meta device and holds no numbers; give the model memory first: "
                         "`model.to_empty(device=...)`")
    return model
