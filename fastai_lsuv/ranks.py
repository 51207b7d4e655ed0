"""What the processes of `torch.distributed` tell each other, so that all of them compute the same weights.

`pool_ranks` pools the moments of an activation. `any_rank` and `mean_of_ranks` agree on an answer or a number.
`in_step` makes an error on one rank an error on all. `from_rank_0` copies tensors. With one process, each does
nothing."""
from __future__ import annotations

from typing import Callable, Iterable, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .moments import Evidence, Moments, pool

__all__ = ['several_ranks', 'pool_ranks', 'any_rank', 'mean_of_ranks', 'of_all_ranks', 'in_step', 'from_rank_0']

T = TypeVar('T')


def several_ranks() -> bool:
    "Whether there is more than one process to agree with."
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> str:
    "The device of the tensors that ranks exchange."
    return 'cuda' if dist.get_backend() == 'nccl' else 'cpu'


def pool_ranks(m: Moments) -> Moments:
    "Moments pooled over all ranks, bit for bit the same on each."
    if not several_ranks(): return m
    e = m.evidence
    mine = np.hstack([m.count, e.samples, e.top, e.spread, e.normed, e.alike, m.mean, m.var])
    mine = torch.from_numpy(mine).to(_device())
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return pool([_unpack(p.cpu().numpy(), m) for p in parts])


def _unpack(numbers: np.ndarray, like: Moments) -> Moments:
    "The moments that a rank has sent."
    (count, samples, top, spread, normed, alike), mean, var = np.split(numbers, [6, 6 + like.mean.size])
    evidence = Evidence(int(samples), float(top), float(spread), bool(normed), bool(alike))
    return Moments(int(count), mean.reshape(like.mean.shape), var.reshape(like.var.shape), evidence)


def any_rank(yes: bool) -> bool:
    "Whether the answer is yes on any rank."
    if not several_ranks(): return yes
    answer = torch.tensor(float(yes), device=_device())
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def mean_of_ranks(number: float) -> float:
    "The mean of each rank's number."
    if not several_ranks(): return number
    total = torch.tensor(number, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.item()/dist.get_world_size()


def of_all_ranks(mine: T) -> list[T]:
    "What each rank has. It is pickled on the way."
    if not several_ranks(): return [mine]
    parts: list[T] = [mine]*dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def in_step(f: Callable[[], T]) -> T:
    "What `f()` returns. If it raises on one rank, it raises on all, so that no rank waits for ever."
    error = None
    try: out = f()
    except BaseException as e: error = e
    failed = any_rank(error is not None)
    if error is not None: raise error
    if failed: raise RuntimeError("LSUV stopped because another rank failed; see the error of that rank")
    return out


@torch.no_grad()
def from_rank_0(tensors: Iterable[Tensor]) -> None:
    "Give tensors the contents that they have on rank 0."
    if not several_ranks(): return
    for t in tensors:
        sent = t.data.contiguous()  # a copy, where memory has another order (channels-last, say)
        dist.broadcast(sent, 0)
        if sent.data_ptr() != t.data_ptr(): t.data.copy_(sent)
