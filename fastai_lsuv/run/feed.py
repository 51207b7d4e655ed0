"""Mini-batches for the model: `Feed` takes whatever `batches` is, and gives the model's inputs, on its device.

Each pass gets a fresh mini-batch, as long as there are any. An iterable begins anew when it ends. An iterator that has
ended, and a single mini-batch, are used again as they are. `join_more` joins further mini-batches to the present one,
where its samples are alike. Lazy modules get their weights from the first."""
from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .blame import warn_caller
from .passes import arguments, call
from ..keep import Snapshot, memory
from ..measure import n_samples
from ..parallel import any_rank, in_step, several_ranks

__all__ = ['Feed', 'few_of', 'join']

_FEW = 4  # Fewer samples are mentioned
_INPUTS = "a tensor, or a tuple or dict of the model's inputs"


class Feed:
    "The model's inputs, a mini-batch at a time: `batch` is the present one."
    def __init__(self,
        model: nn.Module,
        batches: Any,  # As in `lsuv_init`
        n_inp: int | None,  # As in `lsuv_init`
        get_input: Callable[[Any], Any] | None  # As in `lsuv_init`
    ):
        if n_inp is not None and (isinstance(n_inp, bool) or not isinstance(n_inp, Integral) or n_inp < 1):
            raise ValueError(f"n_inp: got {n_inp!r}; it takes a positive whole number, or None")
        if get_input is not None and not callable(get_input):
            raise TypeError(f"get_input: got {get_input!r}; it takes a function of what `batches` holds")
        if isinstance(batches, list) and batches and all(isinstance(b, Tensor) for b in batches):
            if n_inp is not None: batches = tuple(batches)  # what a PyTorch DataLoader yields
            elif get_input is None: _check_list(batches)
        self.model,self.batches,self.n_inp,self.get_input = model,batches,n_inp,get_input
        self.one = isinstance(batches, (Tensor, tuple, Mapping)) or _is_graph(batches)
        if not self.one and not isinstance(batches, Iterable):
            hint = ", such as its `train`" if hasattr(type(batches), 'train_ds') else ''  # fastai's DataLoaders
            raise TypeError(f"batches: got {type(batches).__name__}; it takes a mini-batch ({_INPUTS}) "
                            f"or an iterable of mini-batches{hint}")
        self.drawn: Any = None  # What `batches` gave last
        self.joined = 1  # Mini-batches that the present one is made of
        self.count,self.stream = 0,iter((batches,) if self.one else batches)

    def __enter__(self) -> Feed:
        in_step(self._begin)
        if any(is_lazy(p) for m in self.model.modules() for p in m._parameters.values()):
            _materialize(self.model, self.batch)
        return self

    def __exit__(self, *args) -> None: self.end()

    def end(self) -> None:
        "End a DataLoader's workers, which may take a while."
        self.stream = None

    def _begin(self) -> None:
        try: first = next(self.stream)
        except StopIteration:
            what = type(self.batches).__name__
            raise ValueError(f"batches: got {what} that yields nothing; it takes at least one mini-batch") from None
        self._take(first)

    def next(self) -> bool:
        "Move on to a fresh mini-batch, or stay with the last one. Returns whether there is a fresh one."
        def advance():
            b = self._fresh()
            if b is not None: self._take(b)
            return b is not None

        self.joined = 1
        return any_rank(in_step(advance))

    def join_more(self) -> bool:
        "Join fresh mini-batches to the present one, as many as it holds. Returns whether there are any."
        parts,held,any_fresh = [self.batch],self.joined,False
        for _ in range(held):
            any_fresh = self.next() or any_fresh
            if self.batch is not parts[-1]: parts.append(self.batch)
        joined = join(parts)
        if any_fresh and not any_rank(joined is None): self.batch,self.joined = joined,2*held
        return any_fresh

    def _fresh(self) -> Any:
        """The next mini-batch, or `None` if there is none but the last.

        An iterable begins anew when it ends, if it can be iterated again."""
        b = next(self.stream, None)
        if b is None and not self.one and (again := iter(self.batches)) is not self.batches:
            self.stream = again
            b = next(self.stream, None)
            if b is self.drawn: return None  # it holds no other
        return b

    def _take(self, b: Any) -> None:
        "Make the model's inputs of what was drawn."
        self.drawn = b
        self.count += 1
        if self.get_input is not None: b = self.get_input(b)
        elif not self.one or self.n_inp is not None: b = self._inputs(b)
        if isinstance(b, list): b = tuple(b)
        elif isinstance(b, Mapping): b = dict(b)
        elif _is_graph(b): b = (b,)
        if not isinstance(b, (Tensor, tuple, Mapping)):
            todo = "`torch.from_numpy` makes a tensor of it" if isinstance(b, np.ndarray) else "see `get_input`"
            raise TypeError(f"batches: mini-batch {self.count} is a {type(b).__name__}; it takes {_INPUTS} ({todo})")
        sized = [t for t in tree_leaves(b) if isinstance(t, Tensor) and t.dim()]
        if sized and not any(t.numel() for t in sized):
            raise ValueError(f"batches: mini-batch {self.count} holds no samples; it takes at least one")
        device = next((p.device for p in self.model.parameters()), None)

        def ready(o):
            if not isinstance(o, Tensor): return o.to(device) if device is not None and _is_graph(o) else o
            compressed = o.layout not in (torch.strided, torch.sparse_coo)  # they lack `any`
            if o.is_floating_point() and (o.values() if compressed else o).isnan().any():
                where = f"in a {str(o.dtype)[6:]} tensor of shape {tuple(o.shape)}"
                raise ValueError(f"batches: mini-batch {self.count} holds NaNs ({where}); it takes numbers")
            return o.to(device) if device is not None else o

        if self.count == 1: _check_size(self.model, sized)

        self.batch = tree_map(ready, b)
        _check_call(self.model, b, self.count, self.n_inp)

    def _inputs(self, b: Any) -> Any:
        "The model's inputs among what an iterable yields."
        if not isinstance(b, (tuple, list)): return b
        n = self.n_inp
        if n is None and (hasattr(self.batches, 'dataset') or hasattr(self.batches, 'n_inp')):  # a DataLoader
            n = getattr(self.batches, 'n_inp', None) or max(len(b) - 1, 1)  # fastai's rule: the last is the target
        return tuple(b[:n])


def _is_graph(b: Any) -> bool:
    "Whether `b` is one input that is no tensor: a graph, or a `Batch` of them, which can be iterated."
    if isinstance(b, (Tensor, list, tuple, Mapping, nn.Module, type, Dataset)): return False
    feeds = hasattr(b, 'dataset') or hasattr(type(b), 'train_ds')  # fastai's DataLoader and DataLoaders have a `to`
    return not feeds and callable(getattr(b, 'to', None))


def _check_size(
    model: nn.Module,
    sized: list[Tensor]  # The tensors of the first mini-batch
) -> None:
    "Warn where there are too few samples for statistics, as there are if a sample is given without its dimension."
    x = max((t for t in sized if t.is_floating_point()), key=Tensor.dim, default=None)
    if x is None or several_ranks(): return
    alone = x.dim() == 1 and any(len(x) == getattr(m, 'in_features', 0) for m in model.modules())
    if len(x) >= _FEW and not alone: return
    warn_caller(f"batches: a tensor of shape {tuple(x.shape)} is taken for {1 if alone else len(x)} sample(s), too few "
                "to tell a std by; 16 or more will do (`x[None]` makes a mini-batch of a single sample)")


def _check_list(tensors: list[Tensor]) -> None:
    "A list of tensors means several mini-batches. Raise, or warn, where it looks like one mini-batch with its target."
    say = ("for one mini-batch with its target, pass `n_inp`, the number of inputs; for one mini-batch of several "
           "inputs, pass a tuple")
    if len({(t.dtype, t.dim()) for t in tensors}) > 1:
        held = ', '.join(f"{str(t.dtype)[6:]} {tuple(t.shape)}" for t in tensors[:4])
        raise ValueError(f"batches: got a list of tensors of several kinds ({held}); it takes a list of mini-batches, "
                         f"all alike; {say}")
    if len(tensors) == 2:
        warn_caller(f"batches: a list of 2 tensors is 2 mini-batches; {say}")


def _check_call(
    model: nn.Module,
    batch: Any,  # The inputs
    number: int,  # The number of the mini-batch
    n_inp: int | None  # As in `lsuv_init`
) -> None:
    "Raise `TypeError` if the model does not take as many inputs as a mini-batch holds."
    args,kwargs = arguments(batch)
    # A `__call__` of its own or a hook may make other inputs of them.
    if type(model).__call__ is not nn.Module.__call__ or model._forward_pre_hooks: return
    try: takes = inspect.signature(model.forward, follow_wrapped=False)
    except (TypeError, ValueError): return  # compiled code may not tell
    try: takes.bind(*args, **kwargs)
    except TypeError as e:
        held = f"the inputs {', '.join(map(repr, batch))}" if kwargs else f"{len(args)} input{'s'*(len(args) != 1)}"
        if kwargs: todo = "name them as `forward` does, or pass `get_input`"
        elif n_inp is not None: todo = f"`n_inp` is {n_inp}; pass another, or `get_input`"
        else: todo = "pass `n_inp`, the number of inputs before the targets, or `get_input`"
        raise TypeError(f"batches: mini-batch {number} holds {held}, but {type(model).__name__}.forward takes {takes} "
                        f"({e}); {todo}") from None


@torch.no_grad()
def _materialize(model: nn.Module, batch: Any) -> None:
    "Run lazy modules once, in eval mode, so that their weights exist. All else stays as it was."
    modes = [(m, m.training) for m in model.modules()]
    params = {memory(p) for p in model.parameters() if not is_lazy(p)} - {0}
    others = Snapshot([m for m in model.modules() if not isinstance(m, LazyModuleMixin)], but=params)
    try: call(model.eval(), batch)
    finally:
        others.restore()
        for m, mode in modes: m.training = mode


def few_of(
    batch: Any,  # A tensor, or nested ones; the first tells how many samples there are
    n: int
) -> Any:
    "The first `n` samples of a mini-batch."
    held = n_samples(batch)
    return tree_map(lambda t: t[:n] if isinstance(t, Tensor) and t.dim() and len(t) == held else t, batch)


def join(batches: list[Any]) -> Any:
    "Mini-batches as one, sample after sample, or `None` if their shapes do not allow it."
    if len(batches) == 1: return batches[0]
    leaves,specs = zip(*map(tree_flatten, batches))
    columns = list(zip(*leaves))

    def joins(column):
        first = column[0]
        return all(isinstance(t, Tensor) and t.dim() and (t.dtype, t.shape[1:]) == (first.dtype, first.shape[1:])
                   for t in column)

    if any(s != specs[0] for s in specs) or not all(map(joins, columns)): return None
    if any(len({len(t) for t in of_one}) > 1 for of_one in leaves): return None  # not all of them hold samples
    return tree_unflatten([torch.cat(column) for column in columns], specs[0])
