"""What a pass must leave as it was: modes, buffers, hidden state; and, when it fails, the weights.

`Snapshot` remembers the attributes of objects and all that they hold, `Copies` the numbers in parameters. Both are
lists of items, which `put_back` writes back one by one. `preserved` takes both before a pass over a model, and puts
back after it what the pass was not to change."""
from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .items import Item, TensorItem, memory, same_tensor
from .restore import RestoreError, put_back, survey

__all__ = ['Copies', 'RestoreError', 'Snapshot', 'Value', 'memory', 'Preserved', 'preserved']

_SMALL = 2**16  # Parameters of no more elements are copied without asking what they are for


class Snapshot:
    """The attributes of some objects, with what their collections and generators hold, and (of modules, say) their
    tensors.

    The parameters of a module are left to `Copies`, its hooks to whoever registers them. Modules also have the plain
    objects that they hold opened. See `survey` for how far it goes."""
    def __init__(self,
        objects: Iterable[Any],
        but: set[int] = frozenset(),  # Addresses of memory that keeps what is written to it, such as that of parameters
        tensors: bool = True,  # Whether to copy tensors and arrays, or only to remember which they were
        names: Iterable[str] | None = None  # What error messages call the objects; their types, if not given
    ):
        objects = list(objects)
        names = [type(o).__name__ for o in objects] if names is None else names
        self.items = survey(zip(names, objects), but, tensors)

    def restore(self) -> None:
        "Put back all that has changed. Raises `RestoreError`, after that, naming what could not be."
        put_back(self.items)


class Copies:
    """Copies of parameters.

    Those on the CPU lie in one array of numpy's, which comes in huge pages where the system has them. Separate tensors
    would take memory that the model's passes reuse. Their page faults would cost more than the copy."""
    def __init__(self,
        params: Iterable[nn.Parameter],
        names: dict[int, str] | None = None  # What error messages call them, by `id`
    ):
        params = [p for p in {id(p): p for p in params}.values() if not is_lazy(p) and not p.is_meta]
        values = [p.detach() for p in params]
        sizes = [-(-v.nbytes//64)*64 if _is_plain_cpu(v) else 0 for v in values]  # whole cache lines
        rooms = torch.from_numpy(np.empty(sum(sizes), np.uint8)).split(sizes)
        self.items = [TensorItem(p, (names or {}).get(id(p), 'a parameter'), _copied(v, r) if len(r) else None)
                      for p, v, r in zip(params, values, rooms)]

    def put_back(self) -> None:
        "Put back all that has changed. Raises `RestoreError`, after that, naming what could not be."
        put_back(self.items)


def _copied(v: Tensor, room: Tensor) -> Tensor:
    return room.view(v.dtype).as_strided(v.shape, v.stride()).copy_(v)


def _is_plain_cpu(t: Tensor) -> bool:
    "Whether `t` is a tensor of floats on the CPU whose elements lie side by side in memory, in whatever order."
    if type(t) is not Tensor or t.device.type != 'cpu' or t.layout != torch.strided or t.is_nested: return False
    if not t.is_floating_point(): return False
    if t.is_contiguous(): return True
    strides = [(n, s) for n, s in zip(t.shape, t.stride()) if n != 1]
    return all(s for _, s in strides) and sum((n - 1)*s for n, s in strides) == t.numel() - 1


class Value(Protocol):
    "A value that is no tensor of its own: it stands behind a property, say."
    def copy(self) -> Any: ...
    def assign(self, value: Any) -> None: ...


class _ValueItem(Item):
    __slots__ = ()

    def read(self) -> Any: return self.of.copy()
    def write(self) -> None: self.of.assign(self.was)

    def same(self) -> bool:
        now = self.read()
        if isinstance(now, Tensor) and isinstance(self.was, Tensor): return same_tensor(now, self.was)
        return now is self.was or type(now) is type(self.was) in (bool, int, float, str) and now == self.was


class _Grad(Item):
    "The gradient of a parameter, which is the same tensor, or none."
    __slots__ = ()

    def read(self) -> Tensor | None: return self.of.grad
    def same(self) -> bool: return self.of.grad is self.was
    def write(self) -> None: self.of.grad = self.was


class _Large(Item):
    """A parameter too large to be copied on suspicion. Its version tells of most writes, though not of those through
    `.data`."""
    __slots__ = ()

    def read(self) -> int: return self.of._version
    def same(self) -> bool: return self.of._version == self.was

    def write(self) -> None:
        raise RuntimeError(f'the forward pass writes to it, and its {self.of.numel():,} elements were not copied')


class _Parameters:
    "What becomes of each parameter: owned ones may change; others are copied, or watched where they are large."
    def __init__(self, named: list[tuple[str, nn.Module]], owned: Iterable[nn.Parameter]):
        by_id,suspects,self.names = {},set(),{}
        for name, m in named:
            for k, p in m._parameters.items():
                if p is None or is_lazy(p): continue
                by_id[id(p)] = p
                self.names.setdefault(id(p), f'{name}.{k}' if name else k)
                if _may_be_written(m, p): suspects.add(id(p))
        owned = {id(p): p for p in owned}
        self.memory = {memory(p) for p in (by_id | owned).values() if not is_lazy(p)} - {0}
        self.owned = Copies(owned.values(), self.names).items
        others,large = suspects - owned.keys(),by_id.keys() - suspects - owned.keys()
        self.others = Copies((p for i, p in by_id.items() if i in others), self.names).items
        self.large = [_Large(p, self.names[i]) for i, p in by_id.items() if i in large and not p.is_inference()]
        self.grads = [_Grad(p, f'{self.names[i]}.grad') for i, p in by_id.items() if p.is_leaf]

    def own(self, params: list[nn.Parameter]) -> None:
        "Own further parameters. None has changed since it was first seen."
        owned = {id(i.of) for i in self.owned}
        new = {id(p): p for p in params if id(p) not in owned}
        self.owned += Copies(new.values(), self.names).items
        self.others = [i for i in self.others if id(i.of) not in new]
        self.large = [i for i in self.large if id(i.of) not in new]


def _may_be_written(m: nn.Module, p: nn.Parameter) -> bool:
    """Whether `m` may write to its own parameter as it runs: an embedding to keep its norm, a small one to take its
    start from data."""
    return p.numel() <= _SMALL or getattr(m, 'max_norm', None) is not None


class Preserved:
    "What must stay as it was while the weights and biases of some units change."
    def __init__(self,
        model: nn.Module,
        owned: Iterable[nn.Parameter],  # Weights and biases, which may change
        held: Iterable[Value],  # Values that may change, too
        computed: Iterable[nn.Module]  # A `weight` that a hook computes on these stays that of the last forward
    ):
        named = list(model.named_modules())
        self.held,self.computed = list(held),list(computed)
        self.params = _Parameters(named, owned)
        self.rest = Snapshot([m for _, m in named], self.params.memory, names=[n for n, _ in named]).items
        self.values = _values(self.held)

    def clear_grads(self) -> None:
        "Take the gradients away, to which a model may add by a `backward` of its own."
        for g in self.params.grads: g.of.grad = None

    def own(self, params: list[nn.Parameter]) -> None:
        "Let these parameters change, too, from now on."
        self.params.own(params)

    def rewind(self, and_then: Iterable[Item] = ()) -> None:
        "Put back all but what may change, so that the next pass begins as the first did."
        weights = [(m, vars(m)['weight']) for m in self.computed if 'weight' in vars(m)]
        # Attributes may overwrite the values. So the values are read now, and written after the attributes.
        put_back([*self.params.others, *self.rest, *_values(self.held), *and_then])
        for m, w in weights: vars(m)['weight'] = w

    def finish(self, changed: Callable[[nn.Parameter], bool]) -> None:
        "Put back all but the weights and biases that have `changed`, and warn of what cannot be put back."
        unchanged = [i for i in self.params.owned if not changed(i.of)]
        self.rewind([*unchanged, *self.params.grads])
        if written := [g.where for g in self.params.large if not g.same()]:
            warnings.warn(f"The model wrote to parameters that LSUV cannot put back: {', '.join(written)}")

    def roll_back(self, error: BaseException) -> None:
        "Put back everything, weights first. What cannot be put back is noted on `error`."
        p = self.params
        put_back([*p.owned, *p.others, *self.rest, *self.values, *p.grads, *p.large], beside=error)


@contextmanager
def preserved(
    model: nn.Module,
    owned: Iterable[nn.Parameter] = (),
    held: Iterable[Value] = (),
    computed: Iterable[nn.Module] = (),  # These as in `Preserved`
    changed: Callable[[nn.Parameter], bool] = lambda p: True  # Which of `owned` are to stay changed
) -> Iterator[Preserved]:
    """Leave everything but `owned` and `held` as it was: module modes, buffers, hidden state and other attributes, and
    the gradients, to which a model may add by a `backward` of its own.

    If anything is raised inside, Ctrl-C included, these are put back too, weights first. What cannot be put back is
    named in a `RestoreError`, or in a note to what was raised. A large parameter that is not owned is not copied; if
    it is written, a warning names it. Writes through `.data` to such a parameter go unnoticed."""
    kept = Preserved(model, owned, held, computed)
    try:
        kept.clear_grads()
        yield kept
        kept.finish(changed)
    except BaseException as e:
        kept.roll_back(e)
        raise


def _values(held: list[Value]) -> list[Item]:
    return [_ValueItem(v, str(getattr(v, 'name', type(v).__name__))) for v in held]
