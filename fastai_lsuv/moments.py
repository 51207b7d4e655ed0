"Channel moments of an activation, read about once from memory, combined in double precision."
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Sequence, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ['Moments', 'channel_moments', 'pool', 'all_ranks', 'any_rank', 'in_step', 'from_rank_0', 'several_ranks', 'first_tensor']

T = TypeVar('T')

# Where mean**2 exceeds this many variances, `E[x**2] - mean**2` loses digits and the moments are taken again, centred.
_CENTRE_ABOVE = 100.


@dataclass(frozen=True)
class Moments:
    "Mean and population variance of an activation by channel, as float64 tensors on the CPU."
    count: int    # Elements per channel
    mean: Tensor  # (C,): mean of each channel
    var: Tensor   # (C,): variance within each channel; or (1,): its mean over channels, all that the whole needs

    def stats(self, per_channel: bool = False) -> tuple[Tensor, Tensor]:
        "Mean and std, unbiased as `Tensor.std` is: of each channel (C,), or of the whole (1,) by the law of total variance."
        if per_channel: return self.mean, (self.var*_unbias(self.count)).sqrt()
        m,v,c = self.mean.numpy(),self.var.numpy(),len(self.mean)  # numpy: its operations on a few numbers cost a fifth of torch's
        mean = m.sum()/c
        d = m - mean
        return torch.tensor([[mean], [np.sqrt((v.sum()/len(v) + d @ d/c)*_unbias(self.count*c))]], dtype=torch.float64).unbind()

    def finite(self) -> bool:
        "False if the activation held a NaN or an infinity, or its squares overflowed."
        return bool(self.mean.isfinite().all() and self.var.isfinite().all())

    def affine(self, scale: Tensor | float = 1., shift: Tensor | float = 0.) -> Moments:
        "Moments of `scale*x + shift`, each a number or one number per channel."
        return Moments(self.count, self.mean*scale + shift, self.var*scale**2)


def _unbias(n: int) -> float: return n/(n - 1) if n > 1 else float('nan')


def first_tensor(out) -> Tensor | None:
    "The first floating-point tensor in a module's output (a tensor, or tuples, lists and dicts of them), or `None`."
    if isinstance(out, Tensor): return out if out.is_floating_point() or out.is_complex() else None
    if isinstance(out, dict): out = out.values()
    elif not isinstance(out, (tuple, list)): return None
    return next((t for o in out if (t := first_tensor(o)) is not None), None)


def _sums(x: Tensor, dim: int, by_channel: bool) -> tuple[Tensor, Tensor]:
    "Sum of each channel (C,), and sum of squares of each channel (C,) or of everything (1,)."
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = torch.float32 if x.device.type == 'mps' else torch.float64  # mps has no double
    others, inner = [d for d in range(x.dim()) if d != dim], list(range(dim+1, x.dim()))
    if inner and x.stride(dim) != 1:
        # Each channel is a contiguous plane: reduce planes at the speed of memory, then the few plane sums in double.
        lead = list(range(dim))
        s = x.sum(inner, dtype=acc).to(wide)
        q = torch.linalg.vector_norm(x, dim=inner, dtype=acc).to(wide).square()
        if lead: s,q = s.sum(lead),q.sum(lead)
        return s, q if by_channel else q.sum().reshape(1)
    # Channels lie side by side (linear layers, channels-last): norms along rows are fast, down columns ten times slower.
    s = (x.sum(others, dtype=acc) if others else x.to(acc)).to(wide)
    if by_channel: q = (x.to(acc).square().sum(others) if others else x.to(acc).square()).to(wide)
    else: q = torch.linalg.vector_norm(x, dim=dim, dtype=acc).to(wide).square().sum().reshape(1)
    return s, q


def channel_moments(
    x: Tensor,  # Activation, of any floating dtype, device and memory format
    dim: int = 1,  # Dimension of `x` that holds the channels
    by_channel: bool = True,  # Variance of each channel, or only their mean (cheaper for channels-last data)
) -> Moments:
    """Channel moments of `x`, with one transfer to the host.

    Statistics are accumulated in float32 or better whatever the dtype. Raises `TypeError` if `x` is complex."""
    if x.is_complex(): raise TypeError(f"LSUV normalizes real activations; got a {x.dtype} activation of shape {tuple(x.shape)}")
    x = x.detach().as_subclass(Tensor)
    if x.dim() == 0: x = x[None]
    dim = dim % x.dim()
    n, c = x.numel()//max(x.shape[dim], 1), x.shape[dim]
    if n == 0 or c == 0: raise ValueError(f"batches: an activation of shape {tuple(x.shape)} is empty; pass mini-batches with samples in them")

    def take(x):
        s,q = _sums(x, dim, by_channel)
        sums = torch.cat([s,q]).to('cpu', torch.float64).numpy()  # numpy: its operations on a few numbers cost a fifth of torch's
        mean,square = sums[:c]/n, sums[c:]/(n if by_channel else n*c)
        squared = mean*mean if by_channel else mean @ mean/c
        return mean, square - squared, squared

    with np.errstate(all='ignore'):
        mean,var,squared = take(x)
        if (squared > _CENTRE_ABOVE*var).any():
            acc = torch.promote_types(x.dtype, torch.float32)
            shape = [1]*x.dim(); shape[dim] = c
            centre = torch.from_numpy(mean).to(acc)
            rest,var,_ = take(x.to(acc) - centre.to(x.device).reshape(shape))
            mean = centre.double().numpy() + rest
        return Moments(n, torch.from_numpy(mean), torch.from_numpy(np.maximum(var, 0.)))


def pool(
    moments: Sequence[Moments]  # Moments of the same channels over different elements
) -> Moments:
    "Moments of everything together: counts add up, and means that differ add variance."
    if len(moments) == 1: return moments[0]
    n = sum(m.count for m in moments)
    mean = sum(m.mean*(m.count/n) for m in moments)
    def between(m):  # variance that the distance of this part's means from the common ones adds
        d = (m.mean - mean).square()
        return d if len(m.var) == len(d) else d.mean()
    return Moments(n, mean, sum((m.var + between(m))*(m.count/n) for m in moments))


def all_ranks(m: Moments) -> Moments:
    "Moments pooled over the ranks of `torch.distributed`, bit for bit the same on each; `m` itself where there is one process."
    if not several_ranks(): return m
    mine = torch.cat([torch.tensor([float(m.count)], dtype=torch.float64), m.mean, m.var]).to(_device())
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    c = len(m.mean)
    return pool([Moments(int(p[0]), p[1:c+1], p[c+1:]) for p in (p.cpu() for p in parts)])


def any_rank(yes: bool) -> bool:
    "Whether it is so on any rank of `torch.distributed`."
    if not several_ranks(): return yes
    dist.all_reduce(n := torch.tensor(float(yes), device=_device()), op=dist.ReduceOp.MAX)
    return bool(n)


def in_step(f: Callable[[], T]) -> T:
    "What `f()` gives. If it raises on one rank of `torch.distributed` it does so on all, that none waits for it for ever."
    error = None
    try: out = f()
    except BaseException as e: error = e
    failed = any_rank(error is not None)
    if error is not None: raise error
    if failed: raise RuntimeError("LSUV stopped: another rank failed, see what it says")
    return out


@torch.no_grad()
def from_rank_0(tensors: Iterable[Tensor]) -> None:
    "Give tensors the contents that they have on rank 0 of `torch.distributed`."
    if not several_ranks(): return
    for t in tensors:
        dist.broadcast(sent := t.detach().contiguous(), 0)  # of memory in another order, channels-last say, a copy
        if sent.data_ptr() != t.data_ptr(): t.copy_(sent)


def several_ranks() -> bool:
    "Whether there is more than one process to agree with."
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> str:
    "Where the tensors have to be that ranks exchange."
    return 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
