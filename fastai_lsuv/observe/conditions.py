"""The conditions under which a model is measured: it trains, batch statistics and all, but nothing is dropped at
random.

`measuring` puts a model there and back. Dropout modules are switched off by their attributes. A `TorchFunctionMode`
sees every function that the model calls: it switches off functional dropout, and shows norm layers to a `NormWatch`,
which notices a mini-batch whose samples are alike."""
from __future__ import annotations

import inspect
import re
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..measure.doubts import ALIKE_SHARE, ALIKE_SPREAD
from ..measure.moments import flat
from ..parallel.sharded import is_sharded
from ..units.weights import is_layer

__all__ = ['measuring', 'Functions', 'NormWatch', 'in_transform']

# Classes of stochastic modules that are not a `_DropoutNd`: DropPath, StochasticDepth, WeightDropout, DropBlock2d, ...
_STOCHASTIC = re.compile(r'Drop(?![a-z])|Drop(out|path|block)|Stochastic')
# Differences of so many roundings are rounding noise.
_ROUNDINGS = 4


# ---- Norm layers

class NormWatch:
    """Watches the norm layers, and notices one whose samples are alike.

    Such a layer subtracts what the samples share. What is left is rounding noise, or smaller than the layer's eps, and
    the scale of everything behind the layer rests on it. The variance v of the input makes v/(v + eps) of the variance
    of the output. `spread` is the smallest such share so far. It stays 1 while samples differ. `normed` is True once a
    norm layer has run."""
    def __init__(self): self.reset()

    def reset(self) -> None: self.spread,self.normed = 1.,False

    def see(self,
        mean: Tensor,  # Mean of each group that the layer normalizes
        var: Tensor,  # Population variance of each group
        eps: float,  # The layer's eps
        dtype: torch.dtype  # Type of the layer's input
    ) -> None:
        self.normed = True
        noise = (_ROUNDINGS*torch.finfo(dtype).eps)**2  # Variance that rounding makes, as a share of the squared mean
        least = eps*ALIKE_SPREAD/(1 - ALIKE_SPREAD)  # With more variance than this, eps leaves enough of a group
        if var.numel() and (var - noise*mean**2).amin() > least: return
        mean,var = torch.stack([mean.flatten(), var.flatten()]).cpu().double().numpy()
        square = mean**2
        live = (square > 0) | (var > 0)  # a group of zeros was fed zeros
        if not live.any(): return
        mean,var,square = mean[live],var[live],square[live]
        real = np.where(var > noise*square, var, 0.)
        spread = float(np.mean(real/np.maximum(var + eps, np.finfo(float).tiny)))
        alike = real.sum() < ALIKE_SHARE*(real + square).sum()
        if alike and spread < ALIKE_SPREAD: self.spread = min(self.spread, spread)


def _batch_norm(watch: NormWatch, input, running_mean, running_var, weight=None, bias=None, training=False,
                momentum=0.1, eps=1e-5) -> Tensor:
    "`F.batch_norm` with buffers of momentum 1, which receive the batch statistics."
    if not training or not isinstance(input, Tensor) or input.dim() < 2:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    like = running_mean if running_mean is not None else input if weight is None else weight
    channels = input.shape[1] if running_mean is None else len(running_mean)
    mean,var = like.new_zeros(channels),like.new_ones(channels)
    out = F.batch_norm(input, mean, var, weight, bias, True, 1., eps)
    n = input.numel()//input.shape[1]
    with torch.no_grad():
        if running_mean is not None: running_mean.lerp_(mean, momentum)
        if running_var is not None: running_var.lerp_(var, momentum)
        watch.see(mean, var*((n - 1)/n), eps, input.dtype)
    return out


def _other_norm(function: Callable, at: int, groups: Callable[..., Tensor]) -> Callable:
    """A norm over groups within a sample, with its weight as argument number `at`.

    Its output tells whether its eps matters. Only then are the groups looked at."""
    def watched(watch: NormWatch, *args, **kwargs) -> Tensor:
        out = function(*args, **kwargs)
        watch.normed = True
        if not isinstance(out, Tensor) or out.is_nested or out.numel() == 0: return out
        weight = kwargs.get('weight', args[at] if len(args) > at else None)
        with torch.no_grad():
            if _is_below(out, ALIKE_SPREAD*(1. if weight is None else _mean_square(weight))):
                given = _bound(function, args, kwargs)
                var,mean = torch.var_mean(groups(given).float(), dim=-1, correction=0)
                watch.see(mean, var, given['eps'] or 0., given['input'].dtype)
        return out
    return watched


def _is_below(t: Tensor, bound: float) -> bool:
    "Whether the mean square of `t` is below `bound`. The first quarter of the numbers tells of most that it is not."
    f = flat(t.detach())
    n,few = f.numel(),f.numel()//4
    # A slice of what is sharded would be gathered.
    if few and not is_sharded(f) and _mean_square(f[:few])*few/n >= bound: return False
    return _mean_square(f) < bound


def _mean_square(t: Tensor) -> float:
    f = flat(t.detach())
    return torch.linalg.vector_norm(f, dtype=torch.promote_types(f.dtype, torch.float32)).item()**2/f.numel()


def _layer_groups(given: dict) -> Tensor: return given['input'].flatten(-len(given['normalized_shape']))


def _group_groups(given: dict) -> Tensor: return given['input'].reshape(len(given['input']), given['num_groups'], -1)


def _instance_groups(given: dict) -> Tensor: return given['input'].flatten(2)


# ---- Dropout

@lru_cache
def _signature(function: Callable) -> inspect.Signature: return inspect.signature(function)


def _bound(function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    "The arguments of a call by name, defaults included."
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _not_training(function: Callable) -> Callable:
    "`function`, a Python function of `torch.nn.functional`, called with `training=False`."
    return _without(function, 'training', list(_signature(function).parameters).index('training'), False)


def _without(function: Callable, name: str, position: int, value: Any) -> Callable:
    "`function`, called with `value` as its argument `name` (at `position`)."
    def without(watch: NormWatch, *args, **kwargs):
        if len(args) > position: return function(*args[:position], value, *args[position + 1:], **kwargs)
        return function(*args, **{**kwargs, name: value})
    return without


_DROPOUT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
            F.multi_head_attention_forward)
_TORCH_DROPOUT = (torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout,
                  torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_, torch.native_dropout)
# What is called in place of a function, with a `NormWatch` and the function's arguments.
_REPLACEMENTS: dict[Callable, Callable] = {
    **{f: _not_training(f) for f in _DROPOUT},
    **{f: _without(f, 'train', 2, False) for f in _TORCH_DROPOUT},
    F.scaled_dot_product_attention: _without(F.scaled_dot_product_attention, 'dropout_p', 4, 0.),
    F.batch_norm: _batch_norm,
    F.layer_norm: _other_norm(F.layer_norm, 2, _layer_groups),
    F.group_norm: _other_norm(F.group_norm, 2, _group_groups),
    F.instance_norm: _other_norm(F.instance_norm, 3, _instance_groups),
}


_NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm}


def in_transform() -> bool:
    "Whether a transform of `torch.func` runs. Inside it, no number can be looked at."
    return torch._C._functorch.peek_interpreter_stack() is not None


class Functions(TorchFunctionMode):
    """Has other code called in place of torch's functions. The mode is off while that code runs.

    A replacement is called with the arguments of its function. A wrapper is called with the function, what is to run
    (the function or its replacement), and the arguments."""
    def __init__(self,
        wrappers: dict[Callable, Callable],  # By function
        taken: set[int] | None = None,  # Gets the ids of the parameters that functions take; `None`: they are not noted
        replacements: dict[Callable, Callable] = {}  # By function
    ):
        super().__init__()
        self.taken = taken
        self.called = {**replacements, **{f: partial(w, f, replacements.get(f, f)) for f, w in wrappers.items()}}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.taken is not None: self._note(func, args, kwargs)
        called = self.called.get(func)
        if called is None or func in _NORMS and in_transform(): called = func
        return called(*args, **kwargs) if kwargs else called(*args)

    def _note(self, func: Callable, args: tuple, kwargs: dict | None) -> None:
        "Note the parameters that a function takes, one by one or in a list. One that reads an attribute takes none."
        for a in (*args, *kwargs.values()) if kwargs else args:
            if type(a) is nn.Parameter:
                if id(a) not in self.taken and not _reads(func): self.taken.add(id(a))
            elif type(a) in (list, tuple): self.taken.update(id(p) for p in a if type(p) is nn.Parameter)


def _reads(func: Callable) -> bool:
    "Whether a function reads an attribute of a tensor, such as its shape, that is not a tensor."
    of = getattr(func, '__self__', None)
    return getattr(func, '__name__', '') == '__get__' and getattr(of, '__name__', '') not in ('T', 'mT', 'H', 'data')


@contextmanager
def measuring(
    model: nn.Module,
    watch: NormWatch,  # Sees the norm layers that run
    wrappers: dict[Callable, Callable] = {},
    taken: set[int] | None = None  # These as `Functions` takes them
) -> Iterator[None]:
    "Run the model in train mode, without dropout. `preserved` puts the modes back; the switches are put back here."
    modules = list(model.modules())
    was = [(m, k, v) for m in modules for k, v in _switches(m)]
    try:
        if not all(map(_trains, modules)): model.train()
        for m, k, _ in was: setattr(m, k, False if k == 'training' else 0.)
        with Functions(wrappers, taken, {f: partial(r, watch) for f, r in _REPLACEMENTS.items()}): yield
    finally:
        for m, k, v in was: setattr(m, k, v)


_PUTS_IN_MODE = 'train', '__setattr__', 'children', 'named_children'  # What `train()` calls


def _trains(m: nn.Module) -> bool:
    "Whether `m` is in train mode, and putting it there does nothing else."
    held,plain = vars(m),all(getattr(type(m), f) is getattr(nn.Module, f) for f in _PUTS_IN_MODE)
    return plain and held.get('training') is True and 'train' not in held


def _switches(m: nn.Module) -> list[tuple[str, Any]]:
    "The attributes of `m` that switch its randomness off, and their values."
    if isinstance(m, _DropoutNd): return [('p', m.p)]  # a parent may read `p` and not call the module
    if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)): return [('dropout', m.dropout)]
    if not _STOCHASTIC.search(type(m).__name__): return []
    # A container's mode decides what it calls in training, such as an auxiliary head.
    holds_layers = any(is_layer(c) for c in m.modules() if c is not m)
    return [('training', m.training)] if not holds_layers else []
