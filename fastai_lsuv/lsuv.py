"`lsuv_init`: layer-sequential unit-variance initialization of any model, in one forward pass. `layer_stats`: how it is now."
from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from .loops import parse_order
from .moments import Moments, from_rank_0, in_step, several_ranks
from .passes import Goal, Passes, arguments, call, varies
from .preinit import preinitialize
from .report import LSUVReport, Row
from .state import Copies, Snapshot, memory, preserved, train_without_dropout
from .units import Unit, find_units, measurable

__all__ = ['lsuv_init', 'layer_stats']


def lsuv_init(
    model: nn.Module,  # Any model; a compiled or `DistributedDataParallel` one is reached through the module it wraps
    batches: Any,  # One mini-batch (a tensor, or a tuple or dict of the model's inputs), or an iterable of mini-batches, a DataLoader included
    *,
    order: str = 'std mean',  # Loops to run at each unit: "mean" and "std" separated by spaces, or joined by "+" into one loop
    modules: Any = None,  # What to measure: types, a predicate of a module, names or globs, modules, or a list of these; default: every conv, linear and attention layer
    preinit: str | Callable[[nn.Module], object] | None = 'orthogonal',  # Start from orthonormal weights and zero biases, from the weights as they are (`None`), or from what a function of each layer makes
    target_mean: float = 0.,  # Mean that the mean loop aims at
    target_std: float | Callable[[str, nn.Module], float] = 1.,  # Std that the std loop aims at, or a function of a unit's name and module that gives it
    tol: float = 1e-3,  # How close mean and std must come to their targets within the mini-batch in use; a share of a target std below 1
    batch_tol: float = 0.1,  # How close std must be on a fresh mini-batch, as a share of the target, for a unit to be done (the paper's Tol_var)
    max_iter: int = 10,  # Most passes, each on a fresh mini-batch, that may correct weights (the paper's T_max)
    per_channel: bool = False,  # Normalize each channel by itself, not the whole output
    baseline: bool = False,  # Measure the model as it was, too, at the price of one more pass
    n_inp: int | None = None,  # How many of what an iterable yields are the model's inputs; from a DataLoader all but the last, else all
    get_input: Callable[[Any], Any] | None = None  # Picks the model's inputs out of what `batches` holds, in place of `n_inp`
) -> LSUVReport:  # A row a unit, in order of execution
    """Scale and shift the weights of `model` so that each layer's output has mean 0 and std 1, layer by layer.

    Mishkin & Matas, *All you need is a good init* (ICLR 2016), Algorithm 1, with the loop orders that fastai's forum found.
    A hook on each layer normalizes its output the moment it exists, while everything upstream already is, so one forward
    pass does the whole network. Pass k uses mini-batch k; it ends when a fresh mini-batch finds every unit within
    `batch_tol`, or `max_iter` passes have corrected weights and one more has measured what came of it. A single mini-batch
    is used again: one correcting pass, one verifying pass.

    The model is measured as it trains, batch statistics and all, without dropout. Nothing but weights and biases is changed:
    modes, buffers and hidden state are as before; frozen weights are left alone, zero-initialized ones stay zero. Layers
    that were not normalized are named in one warning, and in the report with the reason. Under `torch.distributed` the
    statistics are pooled over all ranks.

    Raises `TypeError` or `ValueError`, naming the argument, before anything is changed. If anything at all is raised
    later, weights and all else are put back."""
    options = {k: v for k, v in locals().items() if k not in ('model', 'batches')}
    report = initialize(model, batches, **options)
    if report.left_alone: warnings.warn(report.left_alone, stacklevel=2)
    return report


def initialize(
    model: nn.Module, batches: Any, *, order, modules, preinit, target_mean, target_std, tol, batch_tol, max_iter, per_channel, baseline,
    n_inp=None, get_input=None,  # All as in `lsuv_init`
    keep: Callable[[Unit], bool] | None = None,  # Which units hold weights that mean something, to be left alone as frozen ones are
    watch: Callable[[int, int], object] | None = None  # Told during a pass how many units of how many have been called
) -> LSUVReport:
    "`lsuv_init` without its defaults, and without its warning."
    check_options(order, preinit, target_mean, target_std, tol, batch_tol, max_iter)
    model = plain(model)
    with _Feed(model, batches, n_inp, get_input) as feed:
        units = find_units(model, modules)
        targets = {u: target_std(u.name, u.module) if callable(target_std) else target_std for u in units}
        for u, v in targets.items(): _check_number(f'target_std({u.name!r}, ...)', v, 'a positive number', above=0)
        for u in units:
            if keep is not None and not u.left_alone and keep(u): u.left_alone = 'frozen'
        goal = Goal(parse_order(order), target_mean, targets, tol, batch_tol, per_channel)
        before: dict[Unit, tuple[float, float]] = {}
        owned = [p for u in units for m in {u.module, u.layer} for p in m.parameters(recurse=m is u.layer)]
        held = [k for u in units for k in u.knobs if k.has_setter]  # what stands behind properties
        computed = [u.layer for u in units if not u.left_alone]
        with _as_on_rank_0(model), preserved(model, owned, held, computed):
            train_without_dropout(model)
            if baseline:
                as_it_was = Passes(model, units, goal, watch)
                as_it_was(feed.batch, correct=False)
                before = {u: _pair(s.pooled, per_channel) for u, s in as_it_was.found.items()}
            passes = Passes(model, units, goal, watch, partial(preinitialize, preinit=preinit) if preinit is not None else None)
            for n in range(1, max_iter + 2):
                if n > 1: feed.next()
                if not passes(feed.batch, correct=n <= max_iter): break
        for u in passes.written: u.count_write()
        return LSUVReport(_rows(passes, before), order=order, n_passes=n + baseline)


@contextmanager
def _as_on_rank_0(model: nn.Module) -> Iterator[None]:
    "Begin on every rank of `torch.distributed` with the weights of rank 0, as `DistributedDataParallel` does; if anything is raised, put them back."
    if not several_ranks(): yield; return
    was = Copies(model.parameters())
    try:
        from_rank_0(p for p in model.parameters() if not is_lazy(p))
        yield
    except BaseException:
        was.put_back()
        raise


def layer_stats(
    model: nn.Module,  # Any model
    batch: Any,  # One mini-batch, as in `lsuv_init`; of an iterable, the first is used
    *,
    modules: Any = None,  # What to measure, as in `lsuv_init`; modules without a weight, an activation say, too
    n_inp: int | None = None,  # As in `lsuv_init`
    get_input: Callable[[Any], Any] | None = None  # As in `lsuv_init`
) -> LSUVReport:  # A row a layer, in order of execution; `status` says whether std is within 0.1 of 1
    """The (mean, std) table of `model` as it is, in the mode it trains in: one forward pass, nothing changed.

    Batch norm uses the statistics of the batch, dropout is off. Mean and std are those of a layer's whole output, pooled over
    all its calls, the std unbiased as `Tensor.std` is. Raises `TypeError` or `ValueError`, naming the argument."""
    model = plain(model)
    with _Feed(model, batch, n_inp, get_input) as feed:
        units = measurable(model, modules)
        for u in units: u.left_alone = ''
        passes = Passes(model, units, Goal((), 0., {u: 1. for u in units}, 1e-3, 0.1, False))
        with preserved(model, (), ()):
            train_without_dropout(model)
            passes(feed.batch, correct=False)
        return LSUVReport(_rows(passes, {}), n_passes=1)


def _check_number(name: str, v: Any, takes: str, above: float | None = None) -> None:
    "Raise unless `v` is a finite number, greater than `above`."
    if isinstance(v, bool) or not isinstance(v, (int, float)): raise TypeError(f"{name}: got {v!r} of type {type(v).__name__}; it takes {takes}")
    if not math.isfinite(v) or (above is not None and v <= above): raise ValueError(f"{name}: got {v!r}; it takes {takes}")


def check_options(order, preinit, target_mean, target_std, tol, batch_tol, max_iter) -> None:
    "Raise `TypeError` or `ValueError` for the first argument that is not what `lsuv_init` takes."
    parse_order(order)
    if getattr(preinit, '__module__', '') == 'torch.nn.init':
        raise TypeError(f"preinit: got nn.init.{preinit.__name__}, which takes a tensor; a function of a layer is called for: lambda layer: nn.init.{preinit.__name__}(layer.weight)")
    if preinit not in ('orthogonal', None) and not callable(preinit):
        raise (ValueError if isinstance(preinit, str) else TypeError)(
            f"preinit: got {preinit!r}; it takes 'orthogonal', None (keep the weights) or a function of a layer")
    _check_number('target_mean', target_mean, 'a finite number')
    if not callable(target_std): _check_number('target_std', target_std, 'a positive number, or a function (name, module) -> positive number', above=0)
    _check_number('tol', tol, 'a positive number', above=0)
    _check_number('batch_tol', batch_tol, 'a positive number', above=0)
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise (ValueError if isinstance(max_iter, (int, float)) else TypeError)(f"max_iter: got {max_iter!r}; it takes a positive whole number")


def plain(model: nn.Module) -> nn.Module:
    "The module that `model` wraps, if it is compiled or parallel; raises if it is none that can be initialized."
    if not isinstance(model, nn.Module): raise TypeError(f"model: got {type(model).__name__}; it takes a torch.nn.Module")
    wrapped = getattr(model, '_orig_mod', None)  # torch.compile
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): wrapped = model.module
    if isinstance(wrapped, nn.Module): return plain(wrapped)
    on_meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"model: {on_meta!r} is on the meta device and holds no numbers; give the model memory first, with `model.to_empty(device=...)`")
    return model


class _Feed:
    "Mini-batches for the model, on its device: fresh ones for as long as there are, then the last again."
    def __init__(self, model: nn.Module, batches: Any, n_inp: int | None, get_input: Callable[[Any], Any] | None):
        if n_inp is not None and (isinstance(n_inp, bool) or not isinstance(n_inp, int) or n_inp < 1):
            raise ValueError(f"n_inp: got {n_inp!r}; it takes a positive whole number, or None")
        if get_input is not None and not callable(get_input): raise TypeError(f"get_input: got {get_input!r}; it takes a function of what `batches` holds")
        self.model,self.batches,self.n_inp,self.get_input = model,batches,n_inp,get_input
        self.one = isinstance(batches, (Tensor, tuple, Mapping))
        if not self.one and not isinstance(batches, Iterable):
            hint = ", such as its `train`" if hasattr(type(batches), 'train_ds') else ''  # fastai's DataLoaders
            raise TypeError(f"batches: got {type(batches).__name__}; it takes a mini-batch (a tensor, or a tuple or dict of the model's inputs) or an iterable of mini-batches{hint}")
        self.count,self.stream = 0,iter((batches,) if self.one else batches)

    def __enter__(self) -> _Feed:
        try: in_step(lambda: self._take(next(self.stream)))
        except StopIteration: raise ValueError(f"batches: got {type(self.batches).__name__} that yields nothing; it takes at least one mini-batch") from None
        if any(is_lazy(p) for p in self.model.parameters()): self._materialize()
        return self

    def __exit__(self, *args) -> None: self.stream = None  # ends a DataLoader's workers

    def next(self) -> None:
        "Move on to a fresh mini-batch; an iterable that can be iterated again is, any other gives its last once more."
        in_step(self._next)

    def _next(self) -> None:
        b = next(self.stream, None)
        if b is None and not self.one and iter(self.batches) is not self.batches:
            self.stream = iter(self.batches)
            b = next(self.stream, None)
        if b is not None: self._take(b)

    def _take(self, b: Any) -> None:
        self.count += 1
        if self.get_input is not None: b = self.get_input(b)
        elif not self.one or self.n_inp is not None: b = self._inputs(b)
        if isinstance(b, list): b = tuple(b)
        elif isinstance(b, Mapping): b = dict(b)
        if not isinstance(b, (Tensor, tuple, Mapping)):
            raise TypeError(f"batches: mini-batch {self.count} is a {type(b).__name__}; it takes a tensor, or a tuple or dict of the model's inputs (see `get_input`)")
        device = next((p.device for p in self.model.parameters()), None)
        def ready(o):
            if not isinstance(o, Tensor): return o
            if o.is_floating_point() and o.isnan().any():
                raise ValueError(f"batches: mini-batch {self.count} holds NaNs (in a {str(o.dtype)[6:]} tensor of shape {tuple(o.shape)}); it takes numbers")
            return o.to(device) if device is not None else o
        self.batch = tree_map(ready, b)
        self._check_call(b)

    def _check_call(self, b: Any) -> None:
        "Raise `TypeError` if the model does not take as many inputs as a mini-batch holds."
        args,kwargs = arguments(b)
        if type(self.model).__call__ is not nn.Module.__call__ or self.model._forward_pre_hooks: return  # which may make other inputs of them
        try: takes = inspect.signature(self.model.forward, follow_wrapped=False)
        except (TypeError, ValueError): return  # compiled code may not tell
        try: takes.bind(*args, **kwargs)
        except TypeError as e:
            held = f"the inputs {', '.join(map(repr, b))}" if kwargs else f"{len(args)} input{'s'*(len(args) != 1)}"
            raise TypeError(f"batches: mini-batch {self.count} holds {held}, but {type(self.model).__name__}.forward takes {takes} ({e}); "
                            "pass `n_inp`, how many come first that are inputs and no targets, or `get_input`") from None

    def _inputs(self, b: Any) -> Any:
        "The model's inputs among what an iterable yields."
        if not isinstance(b, (tuple, list)): return b
        n = self.n_inp
        if n is None and (hasattr(self.batches, 'dataset') or hasattr(self.batches, 'n_inp')):  # a DataLoader of PyTorch's or fastai's
            n = getattr(self.batches, 'n_inp', None) or max(len(b) - 1, 1)  # fastai's rule: the last is the target
        return tuple(b[:n])

    @torch.no_grad()
    def _materialize(self) -> None:
        "Run lazy modules once, in eval mode, so that their weights exist; what the others hold stays as it was."
        modes = [(m, m.training) for m in self.model.modules()]
        params = {memory(p) for p in self.model.parameters() if not is_lazy(p)} - {0}
        others = Snapshot([m for m in self.model.modules() if not isinstance(m, LazyModuleMixin)], but=params)
        try: call(self.model.eval(), self.batch)
        finally:
            others.restore()
            for m, mode in modes: m.training = mode


def _rows(passes: Passes, before: dict[Unit, tuple[float, float]]) -> list[Row]:
    "A row a unit: those that ran in order of execution, then the others."
    nan = float('nan')
    rows = []
    for u in [*passes.found, *(u for u in passes.units if u not in passes.found)]:
        seen = passes.found.get(u)
        mean,std = _pair(seen.pooled, passes.goal.per_channel) if seen else (nan, nan)
        rows.append(Row(u.name, u.kind, seen.shape if seen else (), mean, std, *before.get(u, (None, None)), passes.corrected[u], _status(passes, u)))
    return rows


def _pair(m: Moments, per_channel: bool) -> tuple[float, float]:
    "Mean and std as two numbers: of the whole, or the mean of the channels' means and the root mean square of their stds."
    mean,std = m.stats(per_channel)
    return float(mean.mean()), math.sqrt((std**2).mean())


def _status(passes: Passes, u: Unit) -> str:
    "What became of `u`, as the last pass found it."
    seen,goal,reason = passes.found.get(u),passes.goal,passes.reason.get(u)
    if seen is None: return 'not called'
    m = seen.pooled
    if not m.finite(): return 'non-finite'
    if not varies(m): return 'constant'
    if u.left_alone: return u.left_alone
    if not goal.met(u, m): return reason if reason in ('unresponsive', 'tied') else 'off'
    wants_mean = any('mean' in words for words in goal.loops)
    cannot = u.bias is None or u in passes.immovable
    mean,_ = m.stats(goal.per_channel)
    if wants_mean and cannot and (abs(mean - goal.mean) > goal.batch_tol*goal.std[u]).any(): return 'no bias'
    return 'ok'
