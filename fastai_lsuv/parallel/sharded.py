"""What a rank holds of a model that `torch.distributed` has spread over several: shards of its weights, parts of its
outputs.

Between forwards, `fully_shard` and `parallelize_module` keep a parameter as a `DTensor`, of which this rank holds a
slice. During a forward, `fully_shard` puts a gathered copy in its place, and takes it away at the end. So what changes
a weight during a forward changes both: the shard, which stays, and the copy, which the forward goes on with.

A weight is changed by numbers that all ranks know, so each changes its own slice, and nothing is sent."""
from __future__ import annotations

import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Iterable, Iterator
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .ranks import any_rank, arrays_of_all_ranks, meet, several_ranks

__all__ = ['is_sharded', 'local', 'slices_of', 'numbers_for', 'whole', 'any_nonzero', 'Portion', 'portion', 'reduced',
           'class_of', 'is_engine_hook', 'engine_hooks', 'reshard', 'gathered_for', 'forwards', 'Shards', 'from_rank_0',
           'drawn_alike', 'shares_batches', 'digest', 'refuse']


def _loaded(module: str, name: str) -> Any:
    "A class of torch's that a model can hold only if its module has been imported; else `()`, of which nothing is one."
    return getattr(sys.modules.get(module), name, ())


# ---- Tensors

def is_sharded(t: Any) -> bool:
    "Whether `t` is a `DTensor`: a tensor of which this rank may hold a slice."
    return isinstance(t, _loaded('torch.distributed.tensor', 'DTensor'))


def local(t: Tensor) -> Tensor:
    "What this rank holds of `t`, in place."
    if not is_sharded(t): return t
    with torch.no_grad(): return t.to_local().detach()


def slices_of(t: Tensor) -> tuple[slice, ...]:
    "The slices of `t`, one a dimension, that this rank holds."
    if not is_sharded(t): return tuple(slice(0, n) for n in t.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    shape,start = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    if tuple(shape) != tuple(local(t).shape):
        raise NotImplementedError(f"a weight of shape {tuple(t.shape)} is placed as {t.placements}, of which LSUV "
                                  "cannot tell the slice that a rank holds; initialize the model before it is sharded")
    return tuple(slice(i, i + n) for i, n in zip(start, shape))


def numbers_for(
    t: Tensor,
    v: Tensor  # Numbers for all of `t`, in a shape that broadcasts with that of `t`
) -> Tensor:
    "The numbers for what this rank holds of `t`."
    if not is_sharded(t): return v
    return v[tuple(slice(None) if n == 1 else s for s, n in zip(slices_of(t), v.shape))]


def whole(t: Tensor) -> Tensor:
    "All of a small tensor. Every rank asks for it at once."
    if not is_sharded(t): return t
    with torch.no_grad(): return t.full_tensor()


def any_nonzero(t: Tensor) -> bool:
    "Whether a number in `t` is not 0. Every rank asks at once where `t` is sharded."
    return any_rank(bool(local(t).any())) if is_sharded(t) else bool(t.any())


# ---- Outputs

@dataclass
class Portion:
    "What this rank holds of an output."
    local: Tensor  # In place
    first: int = 0  # Number of its first channel
    terms: int = 1  # It is one of so many that add up to the output


def portion(
    x: Tensor,
    channel_dim: int,  # Dimension of `x` that holds the channels
    weight: Tensor | None = None,  # That made it; tells which channels a plain tensor holds
    out_dim: int = 0  # Dimension of the weight that holds the output channels
) -> Portion:
    "What this rank holds of the output `x`."
    if not is_sharded(x): return Portion(x, _first_channel(x, channel_dim, weight, out_dim))
    terms = 1
    for n, p in zip(x.device_mesh.shape, x.placements):
        if p.is_partial(): terms *= n
    if terms > 1: return Portion(local(x), 0, terms)
    return Portion(local(x), slices_of(x)[channel_dim].start if x.dim() else 0)


def _first_channel(x: Tensor, channel_dim: int, weight: Tensor | None, out_dim: int) -> int:
    if weight is None or not is_sharded(weight) or weight.dim() <= out_dim or not x.dim(): return 0
    s = slices_of(weight)[out_dim]
    here = x.shape[channel_dim]
    return s.start if here != weight.shape[out_dim] and here == s.stop - s.start else 0


def reduced(x: Tensor) -> Tensor:
    "A `DTensor` whose terms are added up; anything else as it is."
    if not is_sharded(x) or not any(p.is_partial() for p in x.placements): return x
    from torch.distributed.tensor import Replicate
    with torch.no_grad():
        return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


# ---- Modules

def class_of(module: nn.Module) -> type:
    "The class of a module, as it was before `fully_shard` gave it another."
    fsdp = _loaded('torch.distributed.fsdp', 'FSDPModule')
    return next(c for c in type(module).__mro__ if not (fsdp and issubclass(c, fsdp)))


def is_engine_hook(hook: Callable) -> bool:
    "Whether a hook is one of torch's own, which moves numbers between ranks and does not change them."
    return str(getattr(hook, '__module__', '')).startswith('torch.distributed.')


def engine_hooks(module: nn.Module) -> bool:
    "Whether `module` has such forward hooks, and no others."
    hooks = module._forward_hooks.values()
    return bool(hooks) and all(map(is_engine_hook, hooks))


def _managed(model: nn.Module) -> list[nn.Module]:
    "The modules that `fully_shard` was called on."
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()): return []
    fsdp = _loaded('torch.distributed.fsdp', 'FSDPModule')
    return [m for m in model.modules() if isinstance(m, fsdp)] if fsdp else []


def reshard(model: nn.Module) -> None:
    "Free the gathered weights of a model under `fully_shard`, so that its parameters are those that stay."
    for m in _managed(model): m.reshard()


@contextmanager
def gathered_for(model: nn.Module, module: nn.Module) -> Iterator[None]:
    "The weights of `module` are gathered inside, as they are while it runs."
    holder = next((m for m in reversed(_managed(model)) if module in set(m.modules())), None)
    if holder is not None: holder.unshard()
    try: yield
    finally:
        if holder is not None: holder.reshard()


def _end_forward(model: nn.Module) -> None:
    "End a forward that has failed, in the middle of which `fully_shard` would keep its gathered weights."
    for m in _managed(model):
        if hasattr(m, 'reset_iter_state'):
            with suppress(RuntimeError): m.reset_iter_state()  # the root's does it for all
            continue
        state = m._get_fsdp_state()  # torch before 2.14
        for s in filter(None, (state, state._fsdp_param_group)): s._training_state = type(s._training_state).IDLE
        state._state_ctx.iter_forward_root = None


def _communicates(module: nn.Module) -> bool:
    "Whether a call of `module` may send numbers to other ranks."
    if isinstance(module, _loaded('torch.distributed.fsdp', 'FSDPModule')): return True
    if any(is_sharded(p) for p in module._parameters.values()): return True
    return any(map(is_engine_hook, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


@contextmanager
def forwards(model: nn.Module) -> Iterator[None]:
    """Forwards of `model` are run inside.

    Ranks meet before a module that communicates, and so none waits in it for a rank that has failed. Afterwards the
    parameters are those that stay."""
    handles = []
    if several_ranks():
        for name, m in model.named_modules():
            if not _communicates(m): continue
            def hook(module, args, what=f"module {name!r}"): meet(what)
            handles.append(m.register_forward_pre_hook(hook, prepend=True))
    try: yield
    except BaseException:
        _end_forward(model)
        raise
    finally:
        for h in handles: h.remove()
        reshard(model)


# ---- Shards that stay

class Shards:
    "Sharded parameters, as they are between forwards."
    def __init__(self, named: Iterable[tuple[nn.Module, str, nn.Parameter]]):  # Module, attribute and parameter
        self.of = [(m, n, p) for m, n, p in named if is_sharded(p)]
        self.numbers: dict[int, Tensor] = {}  # What was written to a gathered copy, with all digits, by its id

    @classmethod
    def inside(cls, module: nn.Module) -> Shards:
        "Those of a module and of all inside it."
        return cls((m, n, p) for m in module.modules() for n, p in m._parameters.items())

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        "The shards that have a gathered copy in their place now, and the copies."
        return ((p, m._parameters[n]) for m, n, p in self.of if m._parameters[n] is not p)

    def others(self, module: nn.Module) -> Iterator[Tensor]:
        "The parameters of the module that are not sharded between forwards."
        mine = {id(m._parameters[n]) for m, n, _ in self.of}
        return (p for p in module.parameters() if id(p) not in mine)

    def finer(self, copy: Tensor) -> torch.dtype | None:
        "The type of the shard of a gathered copy, if it holds more digits."
        dtype = next((p.dtype for p, c in self._copies() if c is copy), copy.dtype)
        return dtype if dtype != copy.dtype else None

    def write(self, copy: Tensor, numbers: Tensor) -> None:
        "Inside of `written`: write to a gathered copy, and have its shard get all digits."
        local(copy).data.copy_(local(numbers))
        self.numbers[id(copy)] = numbers

    @contextmanager
    def written(self) -> Iterator[None]:
        "Weights are written inside. Afterwards the shards hold what the gathered copies do, which keep their memory."
        memory,self.numbers = [(p, c, local(c).data) for p, c in self._copies()],{}
        yield
        for shard, copy, room in memory:
            if local(copy).data_ptr() != room.data_ptr():
                room.copy_(local(copy))
                local(copy).data = room
            there = slices_of(copy)
            at = tuple(slice(s.start - t.start, s.stop - t.start) for s, t in zip(slices_of(shard), there))
            local(shard).data.copy_(local(self.numbers.get(id(copy), copy))[at])
        self.numbers = {}


@torch.no_grad()
def from_rank_0(
    tensors: Iterable[Tensor],
    changed: list[tuple[Tensor, Tensor]] | None = None  # Gets (tensor, what it held) before the tensor changes
) -> None:
    """Give each tensor the contents that it has on rank 0.

    A slice gets those of the first rank that holds the same slice."""
    if not several_ranks(): return
    meet('a broadcast')
    for t in tensors:
        mine = local(t).data
        sent = mine.clone(memory_format=torch.contiguous_format)
        for source, group in _replicas(t): torch.distributed.broadcast(sent, source, group=group)
        if torch.equal(sent, mine): continue
        if changed is not None: changed.append((t, mine.clone()))
        mine.copy_(sent)


def _replicas(t: Tensor) -> list[tuple[int, Any]]:
    "The groups of ranks that hold the same slice of `t` as this one, each with its first rank."
    if not is_sharded(t): return [(0, None)]
    groups = [t.device_mesh.get_group(i) for i, p in enumerate(t.placements) if p.is_replicate()]
    return [(torch.distributed.get_global_rank(g, 0), g) for g in groups]


@contextmanager
def drawn_alike(device: torch.device, apart: int = 0) -> Iterator[None]:
    """Random numbers of torch's default generator are drawn inside, the same on every rank: those of rank 0.

    Ranks that are to draw different ones give different numbers `apart`. Afterwards, a rank whose generator differed
    from rank 0's gets its old state back."""
    if not several_ranks():
        yield
        return
    cuda = device.type == 'cuda'
    get = partial(torch.cuda.get_rng_state, device) if cuda else torch.get_rng_state
    put = partial(torch.cuda.set_rng_state, device=device) if cuda else torch.set_rng_state
    mine = get()
    meet('a draw of random numbers')
    first = torch.from_numpy(arrays_of_all_ranks(mine.numpy())[0].copy())
    put(first)
    if apart: torch.manual_seed(crc32(first.numpy().tobytes()) + apart)
    try: yield
    finally:
        if not torch.equal(mine, first): put(mine)


# ---- Mini-batches

def shares_batches(model: nn.Module) -> bool:
    "Whether ranks may be parts of one forward, as under tensor parallelism, and so are to draw the same mini-batches."
    alone = not _managed(model)
    return any(is_sharded(p) and (alone or p.device_mesh.ndim > 1) for p in model.parameters())


def digest(batch: Any) -> float:
    "A number that tells mini-batches apart; 0 with one process. Ranks that hold the same one hold the same samples."
    if not several_ranks(): return 0.
    leaves = [local(t).detach() for t in tree_leaves(batch) if isinstance(t, Tensor)]
    leaves = [t for t in leaves if t.layout == torch.strided and not t.is_nested and t.numel()]
    said = [np.array(t.shape).tobytes() + _few(t).tobytes() for t in leaves]
    return float(crc32(b''.join(said)))


def _few(t: Tensor) -> np.ndarray:
    "A few numbers that depend on all in `t`."
    t = torch.view_as_real(t) if t.is_complex() else t
    rows = t.reshape(len(t), -1) if t.dim() else t.reshape(1, 1)
    sums = rows.sum(1, dtype=torch.float64 if t.device.type != 'mps' else torch.float32)
    return sums.cpu().numpy()


# ---- What is refused

def refuse(
    named: Iterable[tuple[str, nn.Module]]  # The modules of a model, as in `named_modules()`
) -> None:
    "Raise `ValueError` for a model in the hands of an engine that keeps weights where LSUV cannot change them."
    fsdp1 = _loaded('torch.distributed.fsdp', 'FullyShardedDataParallel')
    for name, m in named:
        name = repr(name) if name else 'it'
        if fsdp1 and isinstance(m, fsdp1):
            raise ValueError(f"model: {name} is wrapped by FullyShardedDataParallel, which flattens its "
                             "weights; use torch.distributed.fsdp.fully_shard, or initialize the model before it is "
                             "wrapped")
        if type(m).__module__.split('.')[0] == 'deepspeed' or any(hasattr(p, 'ds_id') for p in m._parameters.values()):
            raise ValueError(f"model: {name} is in the hands of DeepSpeed, which keeps its own copies of the "
                             "weights; initialize the model before `deepspeed.initialize`")
