"Moments of an activation, by channel or of the whole, read about once from memory, combined in double precision."
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Iterable, Sequence, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ['Moments', 'whole_moments', 'channel_moments', 'pool', 'all_ranks', 'any_rank', 'in_step', 'from_rank_0', 'several_ranks', 'first_tensor', 'flat', 'unbias']

T = TypeVar('T')

# Where mean**2 exceeds this many variances, `E[x**2] - mean**2` loses digits and the moments are taken again, centred.
_CENTRE_ABOVE = 100.
# A plane of fewer elements takes longer to begin with than to sum.
_SMALL = 128
# Elements whose squares are summed in float32; such sums are added up in double.
_ROW = 2**10


@dataclass(frozen=True)
class Moments:
    """Mean and population variance of an activation, by channel or of the whole, in float64 on the host.

    In numpy, whose operations on a few numbers cost a fifth of torch's, and on one number a tenth of that: a pass through a
    deep network makes thousands."""
    count: int        # Elements per channel, or in the whole
    mean: np.ndarray  # (C,): mean of each channel; or a number: of the whole
    var: np.ndarray   # (C,): variance within each channel; or a number: its mean over channels, or the variance of the whole

    def stats(self, per_channel: bool = False) -> tuple[np.ndarray, np.ndarray]:
        "Mean and std, unbiased as `Tensor.std` is: of each channel (C,), or of the whole, two numbers, by the law of total variance."
        return self._of_channels if per_channel else self._of_whole

    @cached_property
    def _of_channels(self) -> tuple[np.ndarray, np.ndarray]: return self.mean, np.sqrt(self.var*unbias(self.count))

    @cached_property
    def _of_whole(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.mean.ndim: return self.mean, np.sqrt(self.var*unbias(self.count))
        c = len(self.mean)
        with np.errstate(all='ignore'):
            mean = self.mean.sum()/c
            d = self.mean - mean
            return mean, np.sqrt((self.var.sum()/self.var.size + d @ d/c)*unbias(self.count*c))

    def finite(self) -> bool:
        "False if the activation held a NaN or an infinity, or its squares overflowed."
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.var).all())

    def affine(self, scale: np.ndarray | float = 1., shift: np.ndarray | float = 0.) -> Moments:
        "Moments of `scale*x + shift`, each a number or one number per channel."
        return Moments(self.count, self.mean*scale + shift, self.var*scale**2)


def unbias(n: int) -> float:
    "What turns the population variance of `n` elements into the unbiased one; NaN for a single element."
    return n/(n - 1) if n > 1 else float('nan')


def first_tensor(out) -> Tensor | None:
    "The first floating-point tensor in a module's output (a tensor, or tuples, lists and dicts of them), or `None`."
    if isinstance(out, Tensor): return out if out.is_floating_point() or out.is_complex() else None
    if isinstance(out, dict): out = out.values()
    elif not isinstance(out, (tuple, list)): return None
    return next((t for o in out if (t := first_tensor(o)) is not None), None)


def flat(x: Tensor) -> Tensor:
    "The elements of `x` in the order they lie in memory: a view unless `x` has gaps or repeats."
    if x.is_contiguous(): return x.view(-1)
    return x.permute(sorted(range(x.dim()), key=lambda d: -x.stride(d))).reshape(-1)


def _measurable(x: Tensor) -> Tensor:
    "`x` without its subclass and its graph. Raises `TypeError` if it is complex, `ValueError` if it is empty."
    if x.is_complex(): raise TypeError(f"LSUV normalizes real activations; got a {x.dtype} activation of shape {tuple(x.shape)}")
    if x.numel() == 0: raise ValueError(f"batches: an activation of shape {tuple(x.shape)} is empty; pass mini-batches with samples in them")
    return x.detach().as_subclass(Tensor)


def _norms(f: Tensor, acc: torch.dtype) -> Tensor:
    "Roots of the sums of squares of pieces of `f` (n,)."
    whole = f.numel()//_ROW*_ROW
    q = torch.linalg.vector_norm(f[:whole].view(-1, _ROW), dim=1, dtype=acc)
    return torch.cat([q, torch.linalg.vector_norm(f[whole:], dtype=acc)[None]]) if whole < f.numel() else q


def whole_moments(
    x: Tensor  # Activation, of any floating dtype, device and memory format
) -> Moments:
    """Moments of all elements of `x` together, with one transfer to the host: as accurate as `channel_moments`, and cheaper.

    Raises `TypeError` if `x` is complex, `ValueError` if it is empty."""
    f,n = flat(_measurable(x)),x.numel()
    acc = torch.float64 if f.dtype == torch.float64 else torch.float32

    def take(f):
        sums = torch.cat([f.sum(dtype=acc)[None], _norms(f, acc)]).cpu().numpy().astype(np.float64)
        mean,q = sums[0]/n, sums[1:]
        return mean, q @ q/n - mean*mean

    with np.errstate(all='ignore'):
        mean,var = take(f)
        if mean*mean > _CENTRE_ABOVE*var:
            centre = torch.tensor(mean, dtype=acc).item()
            rest,var = take(f.to(acc) - centre)
            mean = centre + rest
        return Moments(n, mean, np.maximum(var, 0.))


def _sums(x: Tensor, dim: int, by_channel: bool) -> tuple[Tensor, Tensor]:
    "Float32 (or float64) sums that add up to those of each channel (..., C), and roots of such sums of squares: (..., C), or of pieces of everything (n,)."
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    c,others,inner = x.shape[dim],[d for d in range(x.dim()) if d != dim],list(range(dim+1, x.dim()))
    planes = bool(inner) and x.stride(dim) != 1  # Each channel is a contiguous plane, or else channels lie side by side
    if planes and x.is_contiguous() and dim and x.stride(dim) < _SMALL:  # over the samples first, in long rows: many small planes take ten times as long
        s = x.view(-1, c*x.stride(dim)).sum(0, dtype=acc).view(c, -1).sum(1, dtype=acc)
    elif planes: s = x.sum(inner, dtype=acc)
    else: s = x.sum(others, dtype=acc) if others else x.to(acc)
    if not by_channel: return s, _norms(flat(x), acc)
    if planes: return s, torch.linalg.vector_norm(x, dim=inner, dtype=acc)
    return s, (x.to(acc).square().sum(others) if others else x.to(acc).square()).sqrt()  # norms down columns take ten times as long


def channel_moments(
    x: Tensor,  # Activation, of any floating dtype, device and memory format
    dim: int = 1,  # Dimension of `x` that holds the channels
    by_channel: bool = True,  # Variance of each channel, or only their mean (cheaper for channels-last data)
) -> Moments:
    """Channel moments of `x`, with one transfer to the host.

    Statistics are accumulated in float32 or better whatever the dtype. Raises `TypeError` if `x` is complex, `ValueError` if
    it is empty."""
    x = _measurable(x)
    if x.dim() == 0: x = x[None]
    dim = dim % x.dim()
    c = x.shape[dim]
    n = x.numel()//c

    def take(x):
        s,q = _sums(x, dim, by_channel)
        # The few that are left are added up in double, on the host.
        sums = torch.cat([s.flatten(), q.flatten()]).cpu().numpy().astype(np.float64)
        s,q = sums[:s.numel()].reshape(-1, c).sum(0), sums[s.numel():]
        mean,square = s/n, (q*q).reshape(-1, c).sum(0)/n if by_channel else q @ q/(n*c)
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
        return Moments(n, mean, np.maximum(var, 0.))


def pool(
    moments: Sequence[Moments]  # Moments of the same channels over different elements
) -> Moments:
    "Moments of everything together: counts add up, and means that differ add variance."
    if len(moments) == 1: return moments[0]
    n = sum(m.count for m in moments)
    mean = sum(m.mean*(m.count/n) for m in moments)
    def between(m):  # variance that the distance of this part's means from the common ones adds
        d = (m.mean - mean)**2
        return d if m.var.ndim == d.ndim else d.mean()
    return Moments(n, mean, sum((m.var + between(m))*(m.count/n) for m in moments))


def all_ranks(m: Moments) -> Moments:
    "Moments pooled over the ranks of `torch.distributed`, bit for bit the same on each; `m` itself where there is one process."
    if not several_ranks(): return m
    mine = torch.from_numpy(np.hstack([m.count, m.mean, m.var])).to(_device())
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    parts = [np.split(p.cpu().numpy(), [1, 1 + m.mean.size]) for p in parts]
    return pool([Moments(int(n[0]), mean.reshape(m.mean.shape), var.reshape(m.var.shape)) for n, mean, var in parts])


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
        dist.broadcast(sent := t.data.contiguous(), 0)  # of memory in another order, channels-last say, a copy
        if sent.data_ptr() != t.data_ptr(): t.data.copy_(sent)


def several_ranks() -> bool:
    "Whether there is more than one process to agree with."
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> str:
    "Where the tensors have to be that ranks exchange."
    return 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
