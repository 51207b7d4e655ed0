"""The conditions under which a model is measured: it trains, batch statistics and all, but nothing is dropped at
random.

`measuring` puts a model there and back. Dropout modules are switched off by their attributes. A `TorchFunctionMode`
sees every function that the model calls: it switches off functional dropout, and shows norm layers to a `NormWatch`,
which notices a mini-batch whose samples are alike."""
from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..units import is_layer
from .norms import NORMS, RECTIFIERS, NormWatch, signature

__all__ = ['measuring', 'Functions', 'in_transform']

# Classes of stochastic modules that are not a `_DropoutNd`: DropPath, StochasticDepth, WeightDropout, DropBlock2d, ...
_STOCHASTIC = re.compile(r'Drop(?![a-z])|Drop(out|path|block)|Stochastic')


# ---- Dropout

def _not_training(function: Callable) -> Callable:
    "`function`, a Python function of `torch.nn.functional`, called with `training=False`."
    names = list(signature(function).parameters)
    p = 'p' if 'p' in names else 'dropout_p'
    return _without(function, 'training', names.index('training'), False, p, names.index(p))


def _without(function: Callable, name: str, position: int, value: Any, p: str, at: int) -> Callable:
    "`function`, called with `value` as its argument `name` (at `position`). It drops a share of `p` (at `at`)."
    default = 0.5 if p == 'p' else 0.

    def without(watch: NormWatch, *args, **kwargs):
        watch.altered = watch.altered or bool(args[at] if len(args) > at else kwargs.get(p, default))
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
    **{f: _without(f, 'train', 2, False, 'p', 1) for f in _TORCH_DROPOUT},
    F.scaled_dot_product_attention: _without(F.scaled_dot_product_attention, 'dropout_p', 4, 0., 'dropout_p', 4),
    **NORMS,
    **RECTIFIERS,
}


# So many lone random numbers are replaced in one pass. A model may wait in a loop for a small or a large one.
_MOST_LONE = 1000


class _LikelyBranch:
    """`torch.rand`, but a lone number is 0.5: a model that skips layers at random runs all that it is likely to run.

    The numbers are drawn all the same, so the generator goes on as it would have."""
    def __init__(self): self.lone = 0

    def __call__(self, watch: NormWatch, *args, **kwargs):
        out = torch.rand(*args, **kwargs)
        if out.numel() != 1 or self.lone == _MOST_LONE: return out
        self.lone += 1
        watch.altered = True
        return out.fill_(0.5)


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
        if called is None or func in NORMS and in_transform(): called = func
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
    "Run the model in train mode, without dropout. The switches are put back here, the modes by a `Snapshot`."
    modules = list(model.modules())
    was = [(m, k, v) for m in modules for k, v in _switches(m)]
    watch.altered = watch.altered or any(v for *_, v in was)
    try:
        if not all(map(_trains, modules)): model.train()
        for m, k, _ in was: setattr(m, k, False if k == 'training' else 0.)
        replacements = {f: partial(r, watch) for f, r in (*_REPLACEMENTS.items(), (torch.rand, _LikelyBranch()))}
        with Functions(wrappers, taken, replacements): yield
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
