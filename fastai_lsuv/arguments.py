"""Unknown arguments: `answers_unknown` names the one that is meant.

It decorates what users call. Names that other packages use are in `_ELSEWHERE`."""
from __future__ import annotations

from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, Callable, TypeVar

__all__ = ['answers_unknown']

F = TypeVar('F', bound=Callable[..., Any])

# What other LSUV packages and fastai's `ActivationStats` call our arguments, and what people may try
_ELSEWHERE = {
    'needed_std': 'target_std', 'std': 'target_std', 'needed_mean': 'target_mean', 'mean': 'target_mean',
    'std_tol': 'tol', 'mean_tol': 'tol', 'max_attempts': 'max_iter', 'n_iter': 'max_iter', 'attempts': 'max_iter',
    'do_orthonorm': 'preinit', 'orthonorm': 'preinit', 'init': 'preinit', 'layers': 'modules', 'with_hist': 'hist',
    'data': 'batches', 'dl': 'batches', 'x': 'batches', 'loss_func': 'loss', 'include_paramless': 'modules',
}
_NEEDLESS = ('cuda', 'device', 'cpu')


def answers_unknown(f: F) -> F:
    "Make `f` answer an argument that it does not take with a `TypeError` that names the nearest one."
    takes = [p for p in signature(f).parameters if p != 'self']

    @wraps(f)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in takes:
                raise TypeError(f"{name}: {f.__qualname__.removesuffix('.__init__')} has no such argument; "
                                f"{_meant(name, takes)}")
        return f(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _meant(name: str, takes: list[str]) -> str:
    near = [n for n in [_ELSEWHERE.get(name), *get_close_matches(name, takes, 1)] if n in takes]
    if near: return f"did you mean {near[0]!r}?"
    if name in _NEEDLESS: return "leave it out: the model runs on the device that holds it"
    return f"it takes {', '.join(takes)}"
