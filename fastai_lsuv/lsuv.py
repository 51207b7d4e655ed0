"""`lsuv_init`: layer-sequential unit-variance initialization of any model. `layer_stats`: the model as it is.

Both take mini-batches from a `Feed`, run `Passes`, and return a report. `Run` has the steps of an initialization."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

from torch import nn

from .arguments import answers_unknown
from .keep import Generators, gradients_aside, uninterrupted
from .measure import Target
from .parallel import in_step, is_sharded, refuse, reshard
from .report import LSUVReport
from .run import (LOSS_TAKES, Feed, Kept, Options, Passes, Run, gradients_of, own_loss, rows_of,
                  warn_caller)
from .units import NothingToDo, Selection, Unit

__all__ = ['lsuv_init', 'layer_stats', 'initialize', 'plain', 'NothingToDo']


@answers_unknown
def lsuv_init(
    model: nn.Module,  # Any model; a compiled or `DistributedDataParallel` one is reached through the module it wraps
    batches: Any,  # A mini-batch (a tensor, or a tuple or dict of the model's inputs), or an iterable of mini-batches
    *,
    order: str = 'std mean',  # Loops at each unit: the words "mean" and "std", or both joined by "+" into one loop
    modules: Any = None,  # What to normalize: types, names, globs, modules, a predicate, or a list; default: all layers
    exclude: Any = None,  # What to leave out, with everything inside it, named as in `modules`
    # Weights to start from: `None` keeps the model's own; "mirrored", "orthogonal", or a function of a layer
    preinit: str | Callable[[nn.Module], object] | None = None,
    target_mean: float = 0.,  # Mean to reach
    target_std: float | Callable[[str, nn.Module], float] = 1.,  # Std to reach, or a function (name, module) -> std
    tol: float = 1e-3,  # Tolerance of mean and std on the mini-batch in use
    batch_tol: float = 0.1,  # Tolerance of the std on a fresh mini-batch, relative to its target (the paper's Tol_var)
    max_iter: int = 10,  # Maximum number of correcting passes (the paper's T_max)
    per_channel: bool = False,  # Normalize each channel on its own, not the whole output
    baseline: bool = False,  # Measure the model before LSUV, too; costs one more pass
    n_inp: int | None = None,  # Items of a mini-batch that are inputs; default: all, of a DataLoader all but the last
    get_input: Callable[[Any], Any] | None = None,  # Picks the inputs out of a mini-batch, in place of `n_inp`
    # Training loss of the model, to compare before and after: `lambda model: F.cross_entropy(model(x), y)`
    loss: Callable[[Callable], Any] | None = None,
    force: bool = False  # Keep the weights even if the loss comes out far worse
) -> LSUVReport:  # One row per unit, in execution order
    """Initialize `model` so that each layer's output has mean 0 and std 1, layer by layer.

    The weights that the model has are scaled and shifted. `preinit` replaces them first: "mirrored" draws weights in
    pairs, for networks with ReLU-like activations (Balduzzi et al., 2017); "orthogonal" is step one of the paper.

    `preinit="mirrored"` is for networks with ReLU, GELU or the like between layers. It pays where they are deep and
    without norm layers. Rows of a weight come in pairs `w, -w`, so the network starts linear, and samples stay apart.
    Three forwards of four samples find the layers for which that holds, by data. The others keep their weights.

    This is Algorithm 1 of Mishkin & Matas, *All you need is a good init* (ICLR 2016), with the loop orders of fastai's
    forum. A forward pass measures each output as soon as it exists, corrects it, and hands it on, so one pass plans the
    whole network. The weights are written after the pass, and the next pass verifies them on the next mini-batch. The
    run ends when a fresh mini-batch finds every unit within `batch_tol`, or after `max_iter` correcting passes. A
    single mini-batch is used again.

    A unit is a conv, linear or attention layer, or a weight that a linear operation takes without one, such as an
    expert's slice of a parameter. `report.outside` names all other weights.

    The model is measured in training mode with dropout off, so norm layers use the statistics of the batch. Only
    weights and biases change; modes, buffers and hidden state are put back. Frozen weights are left alone, and
    zero-initialized weights stay zero. A layer is left alone if the mini-batch cannot be trusted: the samples are alike
    ("alike"), one sample sets the std ("outlier"), or a norm layer receives almost nothing ("faint"). One warning names
    the layers that were not normalized, and the weights that were scaled by a lot. Under `torch.distributed` the
    statistics are pooled over all ranks.

    With `loss`, the training loss is measured before and after, with dropout on. If a finite loss comes out non-finite,
    or more than four times both the loss before and the loss of predicting zeros, the weights are put back, and the
    warning says so. A warning also says if the model looks trained. If the model's inputs hold `labels`, and the model
    returns its loss (`.loss`, an item `loss` or a dict of losses), that is the default.

    Raises `TypeError` or `ValueError`, naming the argument, before anything is changed. After any later error, weights
    and all else are put back. An error of the model is raised as it is, with a note that names the layer. With several
    ranks, call it on every rank."""
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
    keep: Callable[[Unit], bool] | None = None,  # Whether to leave a unit alone, like a frozen one
    watch: Callable[[int, int], object] | None = None,  # Called during a pass as `watch(n_run, n_units)`
    tell: Callable[[LSUVReport], object] = lambda report: None  # Called with the report; if it raises, all is put back
) -> LSUVReport:
    "Do what `lsuv_init` does, without its warning."
    def initialized() -> LSUVReport:
        inner = plain(model)
        reshard(inner)
        with Feed(inner, batches, n_inp, get_input) as feed:
            return Run(inner, feed, options, loss or own_loss(feed.batch), keep, watch)(force, tell)

    return in_step(initialized)


@answers_unknown
def layer_stats(
    model: nn.Module,  # Any model
    batch: Any,  # One mini-batch, as in `lsuv_init`, or an iterable of which the first is used
    *,
    modules: Any = None,  # What to measure, as in `lsuv_init`; also modules without a weight, such as activations
    n_inp: int | None = None,  # As in `lsuv_init`
    get_input: Callable[[Any], Any] | None = None,  # As in `lsuv_init`
    # Training loss of the model, to measure gradients: `lambda model: F.cross_entropy(model(x), y)`
    loss: Callable[[nn.Module], Any] | None = None
) -> LSUVReport:  # One row per layer, in execution order; `status` says whether the std is within 0.1 of 1
    """Measure mean and std of each layer's output in one forward pass, and change nothing.

    The model is measured in training mode with dropout off, so batch norm uses the statistics of the batch. Mean
    and std are those of a layer's whole output, over all its calls. The std is unbiased, like `Tensor.std`.

    With `loss`, each row also has the gradient, which costs one more forward and a backward: `grad_std`, the std of the
    gradient at the layer's output, and `weight_grad`, the norm of the weight's gradient over the norm of the weight.
    The second is the share of the weight that a step of SGD with learning rate 1 changes. If it falls or grows by
    orders of magnitude from layer to layer, the layers learn at different speeds. No `.grad` is touched.

    Raises `TypeError` or `ValueError`, naming the argument."""
    _check_loss(loss)

    def measured() -> LSUVReport:
        inner = plain(model)
        reshard(inner)
        if loss is not None and any(map(is_sharded, inner.parameters())):
            raise ValueError("loss: got one for a sharded model, whose engine keeps the gradients; leave it out, or "
                             "measure the model before it is sharded")
        with Feed(inner, batch, n_inp, get_input) as feed:
            return _stats(inner, Selection(inner, modules, scales=False), feed, loss)

    return in_step(measured)


def _check_loss(loss: Any) -> None:
    if loss is not None and not callable(loss): raise TypeError(f"loss: got {loss!r}; {LOSS_TAKES}")


def _stats(model: nn.Module, selection: Selection, feed: Feed, loss: Callable | None) -> LSUVReport:
    "Report one forward, and the gradients of `loss` if there is one."
    def prepare(u): u.left_alone,u.target = '',Target((), 0., 1., 1e-3, 0.1, False)

    gradients: dict[Unit, dict[str, float | None]] = {}
    kept = Kept(model)
    passes = Passes(model, selection, prepare, kept)
    try:
        with gradients_aside(model.parameters()), Generators().again():
            passes(feed.batch, correct=False)
            if loss is not None:
                kept.rewind()
                gradients = gradients_of(passes, loss)
    finally:
        with uninterrupted(): kept.put_back()
    rows,coverage = rows_of(passes)
    rows = [replace(r, **gradients.get(u, {})) for r, u in zip(rows, passes.units)] + rows[len(passes.units):]
    return LSUVReport(rows, n_passes=1 + (loss is not None), outside=coverage.outside, coverage=coverage.share)


def plain(model: nn.Module) -> nn.Module:
    "Unwrap a compiled or parallel `model`. Raise if it cannot be initialized."
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
