"""The options that `lsuv_init` and `LSUVCallback` share. `Options` holds them, and checks them once."""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Callable

from torch import nn

from ..measure import Target, parse_order
from ..units import Unit
from .blame import warn_caller

__all__ = ['Options', 'check_whole']


@dataclass(frozen=True)
class Options:
    "The options of `lsuv_init`, which explains them. Raises `TypeError` or `ValueError` for the first bad one."
    order: str
    modules: Any
    exclude: Any
    preinit: str | Callable[[nn.Module], object] | None
    target_mean: float
    target_std: float | Callable[[str, nn.Module], float]
    tol: float
    batch_tol: float
    max_iter: int
    per_channel: bool
    baseline: bool

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        "The options among `given`: the local variables of a function that takes each of them, say."
        return cls(**{f.name: given[f.name] for f in fields(cls)})

    def __post_init__(self):
        loops = parse_order(self.order)
        _check_preinit(self.preinit)
        _check_number('target_mean', self.target_mean, 'a finite number')
        if self.target_mean and not any('mean' in words for words in loops):
            warn_caller(f"target_mean: got {self.target_mean!r}, but order={self.order!r} has no mean loop, so "
                        "target_mean has no effect; add 'mean' to the order")
        takes = 'a positive number, or a function (name, module) -> positive number'
        if not callable(self.target_std): _check_number('target_std', self.target_std, takes, above=0)
        _check_number('tol', self.tol, 'a positive number', above=0)
        _check_number('batch_tol', self.batch_tol, 'a positive number', above=0)
        check_whole('max_iter', self.max_iter)

    def target(self, u: Unit) -> Target:
        "The target of the unit `u`."
        std = self.target_std
        if callable(std):
            std = std(u.name, u.module)
            _check_number(f'target_std({u.name!r}, ...)', std, 'a positive number', above=0)
        loops,mean = parse_order(self.order),float(self.target_mean)
        return Target(loops, mean, float(std), self.tol, self.batch_tol, self.per_channel)


def _check_preinit(preinit: Any) -> None:
    if getattr(preinit, '__module__', '') == 'torch.nn.init':
        name = preinit.__name__
        raise TypeError(f"preinit: got nn.init.{name}, a function of a tensor; it takes a function of a layer, such as "
                        f"lambda layer: nn.init.{name}(layer.weight)")
    if preinit in ('orthogonal', 'mirrored', None) or callable(preinit): return
    raise (ValueError if isinstance(preinit, str) else TypeError)(
        f"preinit: got {preinit!r}; it takes None (keep the weights), 'mirrored', 'orthogonal', or a function of a "
        "layer")


def _check_number(name: str, v: Any, takes: str, above: float | None = None) -> None:
    "Raise unless `v` is a finite number, greater than `above`."
    if isinstance(v, bool) or not isinstance(v, Real):
        raise TypeError(f"{name}: got {v!r} of type {type(v).__name__}; it takes {takes}")
    if not math.isfinite(v) or (above is not None and v <= above):
        raise ValueError(f"{name}: got {v!r}; it takes {takes}")


def check_whole(name: str, v: Any) -> None:
    "Raise unless `v` is a positive whole number."
    if isinstance(v, Integral) and not isinstance(v, bool) and v > 0: return
    raise (ValueError if isinstance(v, Real) else TypeError)(f"{name}: got {v!r}; it takes a positive whole number")
