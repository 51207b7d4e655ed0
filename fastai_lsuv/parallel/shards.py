"""What a rank holds of a model that `torch.distributed` has spread over several: shards of its weights, parts of its
outputs.

Between forwards, `fully_shard` and `parallelize_module` keep a parameter as a `DTensor`, of which this rank holds a
slice. During a forward, `fully_shard` puts a gathered copy in its place. Weights are written between forwards, by
numbers that all ranks know, so each rank changes its own slice, and nothing is sent."""
from __future__ import annotations

import math
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

from .ranks import arrays_of_all_ranks, meet, several_ranks

__all__ = ['is_sharded', 'local', 'slices_of', 'numbers_for', 'whole', 'Portion', 'portion', 'reduced', 'class_of',
           'is_engine_hook', 'reshard', 'forwards', 'from_rank_0', 'drawn_alike', 'shares_batches', 'digest', 'refuse']


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


# ---- Outputs

@dataclass
class Portion:
    "What this rank holds of an output."
    local: Tensor  # In place
    first: int = 0  # Number of its first channel
    share: float = 1.  # Share of the output's elements
    terms: int = 1  # It is one of so many that add up to the output


def portion(
    x: Tensor,
    channel_dim: int,  # Dimension of `x` that holds the channels
    weight: Tensor | None = None,  # That made it; tells which channels a plain tensor holds
    out_dim: int = 0  # Dimension of the weight that holds the output channels
) -> Portion:
    "What this rank holds of the output `x`."
    if not is_sharded(x):
        if not is_sharded(weight): return Portion(x)
        first = _first_channel(x, channel_dim, weight, out_dim)
        return Portion(x, *first)
    terms = math.prod(n for n, p in zip(x.device_mesh.shape, x.placements) if p.is_partial())
    if terms > 1: return Portion(local(x), 0, 1., terms)
    mine = local(x)
    return Portion(mine, slices_of(x)[channel_dim].start if x.dim() else 0, mine.numel()/max(x.numel(), 1))


def _first_channel(x: Tensor, channel_dim: int, weight: Tensor, out_dim: int) -> tuple[int, float]:
    "Number of the first channel of a plain output of a sharded weight, and its share of the channels."
    if weight.dim() <= out_dim or not x.dim(): return 0, 1.
    s,here,all_ = slices_of(weight)[out_dim],x.shape[channel_dim],weight.shape[out_dim]
    return (s.start, here/all_) if here != all_ and here == s.stop - s.start else (0, 1.)


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


def _managed(model: nn.Module) -> list[nn.Module]:
    "The modules that `fully_shard` was called on."
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()): return []
    fsdp = _loaded('torch.distributed.fsdp', 'FSDPModule')
    return [m for m in model.modules() if isinstance(m, fsdp)] if fsdp else []


def reshard(model: nn.Module) -> None:
    "Free the gathered weights of a model under `fully_shard`, so that its parameters are those that stay."
    for m in _managed(model): m.reshard()


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


# ---- Agreeing on numbers

@torch.no_grad()
def from_rank_0(
    tensors: Iterable[Tensor],
    keep: Callable[[list[Tensor]], object] = lambda tensors: None  # Told of each tensor before it changes
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
        keep([t])
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
