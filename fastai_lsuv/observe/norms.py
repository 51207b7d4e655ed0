"""What norm layers show: `NormWatch` notices one whose samples are alike, and whether rectifiers run.

`NORMS` and `RECTIFIERS` have, for each such function of torch, what is called in its place: with a `NormWatch`, and its
arguments."""
from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..measure import ALIKE_SHARE, ALIKE_SPREAD, flat
from ..parallel import is_sharded

__all__ = ['NormWatch', 'NORMS', 'RECTIFIERS', 'signature']

# Differences of so many roundings are rounding noise.
_ROUNDINGS = 4


@lru_cache
def signature(function: Callable) -> inspect.Signature: return inspect.signature(function)


def _bound(function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    "The arguments of a call by name, defaults included."
    bound = signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


class NormWatch:
    """Watches the norm layers, and notices one whose samples are alike.

    Such a layer subtracts what the samples share. What is left is rounding noise, or smaller than the layer's eps, and
    the scale of everything behind the layer rests on it. The variance v of the input makes v/(v + eps) of the variance
    of the output. `spread` is the smallest such share so far. It stays 1 while samples differ. `normed` is True once a
    norm layer has run, `rectified` once a ReLU or the like has, and `altered` if dropout was switched off."""
    def __init__(self): self.reset()

    def reset(self) -> None:
        self.spread = 1.
        self.normed = self.rectified = self.altered = False

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
    "Whether the mean square of `t` is below `bound`. A quarter of the values is usually enough to rule it out."
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


NORMS: dict[Callable, Callable] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _other_norm(F.layer_norm, 2, _layer_groups),
    F.group_norm: _other_norm(F.group_norm, 2, _group_groups),
    F.instance_norm: _other_norm(F.instance_norm, 3, _instance_groups),
}


def _noted(function: Callable) -> Callable:
    def noted(watch: NormWatch, *args, **kwargs) -> Any:
        watch.rectified = True
        return function(*args, **kwargs)
    return noted


RECTIFIERS: dict[Callable, Callable] = {f: _noted(f) for f in (
    F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)}
