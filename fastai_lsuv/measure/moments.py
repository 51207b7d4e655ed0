"""Mean and variance of an activation, and what they rest on.

`whole_moments` and `channel_moments` read an activation about once, and add up in double precision on the host.
`Moments` holds the result, by channel or of the whole. Its `Evidence` tells how many samples it rests on, and whether
one of them carries it. `pool` joins the moments of several calls, mini-batches or ranks.

Numbers on the host are numpy's: an operation on a few numbers costs a fifth of torch's, and a pass makes thousands."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ['Evidence', 'Moments', 'whole_moments', 'channel_moments', 'pool', 'first_tensor', 'flat', 'unbias']

# `E[x**2] - mean**2` loses digits where mean**2 exceeds this many variances. The moments are then taken again, centred.
_CENTRE_ABOVE = 100.
# Squares about zero are as good as those about the mean unless mean**2 exceeds this share of the variance.
_MATTERS = 0.04
# A plane of fewer elements takes longer to begin with than to sum.
_SMALL = 128
# Elements whose squares are summed in float32. Such sums are added up in double.
_ROW = 2**10
# A larger batch puts several samples in one row.
_MANY_SAMPLES = 2**12


class Evidence(NamedTuple):
    "What moments rest on."
    samples: int = 1  # Samples in the mini-batch: the size of dimension 0
    top: float = 0.  # Share of the variance that rests on one sample, the largest
    spread: float = 1.  # Share of a norm layer's output variance that eps leaves; the smallest upstream (`NormWatch`)
    normed: bool = False  # Whether a norm layer has run before it
    alike: bool = False  # Whether the samples of the mini-batch are alike
    batch: float = 0.  # The mini-batch, as a number that tells it from those of other ranks


@dataclass(frozen=True)
class Moments:
    "Mean and population variance of an activation, by channel or of the whole, in float64 on the host."
    count: int  # Elements per channel, or in the whole
    mean: np.ndarray  # (C,): mean of each channel; or a number: of the whole
    var: np.ndarray  # (C,): variance within each channel; or a number: its mean over channels, or that of the whole
    evidence: Evidence = Evidence()

    @property
    def features(self) -> float:
        "Elements a sample."
        return self.count*self.mean.size/self.evidence.samples

    def stats(self, per_channel: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std, unbiased as `Tensor.std` is.

        Those of each channel (C,), or of the whole: two numbers, by the law of total variance."""
        return self._of_channels if per_channel else self._of_whole

    @cached_property
    def _of_channels(self) -> tuple[np.ndarray, np.ndarray]:
        return self.mean, np.sqrt(self.var*unbias(self.count))

    @cached_property
    def _of_whole(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.mean.ndim: return self._of_channels
        c = len(self.mean)
        with np.errstate(all='ignore'):
            mean = self.mean.sum()/c
            d = self.mean - mean
            return mean, np.sqrt((self.var.sum()/self.var.size + d @ d/c)*unbias(self.count*c))

    def finite(self) -> bool:
        "False if the activation holds a NaN or an infinity, or its squares overflow."
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.var).all())

    def affine(self, scale: np.ndarray | float = 1., shift: np.ndarray | float = 0.) -> Moments:
        "Moments of `scale*x + shift`, each a number or one number per channel."
        return Moments(self.count, self.mean*scale + shift, self.var*scale**2, self.evidence)


def unbias(n: int) -> float:
    "The factor from the population variance of `n` elements to the unbiased one; NaN for a single element."
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
    if x.is_complex():
        raise TypeError(f"LSUV normalizes real activations; got a {x.dtype} activation of shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"batches: an activation of shape {tuple(x.shape)} is empty; pass mini-batches with samples "
                         "in them")
    x = x.detach()
    return x if type(x) is Tensor else x.as_subclass(Tensor)


def _sample(x: Tensor) -> int:
    "Elements of a sample that lie side by side in memory; all there are, if samples do not."
    apart = x.dim() and (x.is_contiguous() or x.stride(0) == max(x.stride()))
    return x.numel()//x.shape[0] if apart else x.numel()


@lru_cache
def _row(
    n: int,  # Elements
    size: int  # Elements of a sample
) -> int:
    "Length of the rows of memory whose squares are summed. A row lies within one sample where the shape allows it."
    if size <= _ROW:
        several = max(1, 2*_SMALL//size) if n//size > _MANY_SAMPLES else 1
        return size*several if n > size or n <= _ROW else _ROW
    parts = range(-(-size//_ROW), 16*-(-size//_ROW))
    return next((size//p for p in parts if size % p == 0), _ROW)


def _norms(f: Tensor, row: int, acc: torch.dtype) -> Tensor:
    "Roots of the sums of squares of rows of `f` (n,)."
    rest = f.numel() % row
    if rest: return torch.cat([_norms(f[:-rest], row, acc), _norms(f[-rest:], rest, acc)])
    return torch.linalg.vector_norm(f.view(-1, row), dim=1, dtype=acc)


def _on_host(parts: list[Tensor]) -> list[np.ndarray]:
    "Tensors as flat arrays in float64, with one transfer."
    if parts[0].is_cpu: return [p.numpy().astype(np.float64).ravel() for p in parts]
    numbers = torch.cat([p.flatten() for p in parts]).cpu().numpy().astype(np.float64)
    return np.split(numbers, np.cumsum([p.numel() for p in parts])[:-1])


def _evidence(
    x: Tensor,
    squares: np.ndarray,  # Sums of squares of its rows, in the order of memory
    row: int,  # Elements in a row
    mean: float,  # Of all elements
    var: float  # Of all elements
) -> Evidence:
    "What the moments of `x` rest on."
    n,size = x.shape[0] if x.dim() else 1, _sample(x)
    if n == 1 or size == x.numel(): return Evidence(n)
    if mean*mean > _MATTERS*var:  # the squares are to be those about the mean
        acc = torch.promote_types(x.dtype, torch.float32)
        squares = np.square(_norms(flat(x).to(acc) - mean, row, acc).double().cpu().numpy())
    if size % row == 0: squares = squares.reshape(n, -1).sum(1)
    elif row < size:  # a row may hold the end of one sample and the start of the next
        squares = np.bincount(np.arange(len(squares))*row//size, weights=squares, minlength=n)
    total = float(squares.sum())
    return Evidence(n, float(squares.max())/total if total > 0 else 0.)


def whole_moments(
    x: Tensor  # Activation, of any floating dtype, device and memory format
) -> Moments:
    """Moments of all elements of `x` together, with one transfer to the host.

    They are as accurate as those of `channel_moments`, and cheaper. Raises `TypeError` if `x` is complex, `ValueError`
    if it is empty."""
    x = _measurable(x)
    f,n,row = flat(x),x.numel(),_row(x.numel(), _sample(x))
    acc = torch.float64 if f.dtype == torch.float64 else torch.float32

    def take(f):
        total,norms = f.sum(dtype=acc),_norms(f, row, acc)
        if not f.is_cpu: total,norms = torch.cat([total[None], norms]).cpu().tensor_split([1])  # one transfer
        norms = norms.numpy().astype(np.float64)
        mean,squares = total.item()/n,norms*norms
        return mean, float(squares.sum())/n - mean*mean, squares

    with np.errstate(all='ignore'):
        mean,var,squares = take(f)
        if not isfinite(var) and acc == torch.float32:  # squares of finite numbers may overflow
            f,acc = f.double(),torch.float64
            mean,var,squares = take(f)
        centre = torch.tensor(mean, dtype=acc).item() if mean*mean > _CENTRE_ABOVE*var else 0.
        if centre: mean,var,squares = take(f.to(acc) - centre)
        evidence = _evidence(x, squares, row, mean, var)
    return Moments(n, np.float64(centre + mean), np.float64(max(var, 0.)), evidence)


def _channel_sums(x: Tensor, dim: int, acc: torch.dtype) -> Tensor:
    "Sums that add up to those of each channel (..., C), in the order that memory makes cheapest."
    c,stride = x.shape[dim],x.stride(dim)
    if dim == x.dim() - 1 or stride == 1:  # channels lie side by side
        others = [d for d in range(x.dim()) if d != dim]
        return x.sum(others, dtype=acc) if others else x.to(acc)
    if x.is_contiguous() and dim and stride < _SMALL:  # samples first: many small planes take ten times as long
        return x.view(-1, c*stride).sum(0, dtype=acc).view(c, -1).sum(1, dtype=acc)
    return x.sum(list(range(dim + 1, x.dim())), dtype=acc)


def _channel_norms(x: Tensor, dim: int, acc: torch.dtype) -> Tensor:
    "Roots of sums of squares that add up to those of each channel (..., C)."
    if dim < x.dim() - 1 and x.stride(dim) != 1:
        return torch.linalg.vector_norm(x, dim=list(range(dim + 1, x.dim())), dtype=acc)
    others = [d for d in range(x.dim()) if d != dim]
    squares = x.to(acc).square()  # norms down columns take ten times as long
    return (squares.sum(others) if others else squares).sqrt()


def channel_moments(
    x: Tensor,  # Activation, of any floating dtype, device and memory format
    dim: int = 1,  # Dimension of `x` that holds the channels
    by_channel: bool = True,  # Variance of each channel, or only their mean (cheaper for channels-last data)
) -> Moments:
    """Channel moments of `x`, with one transfer to the host.

    Statistics are accumulated in float32 or better whatever the dtype. Raises `TypeError` if `x` is complex,
    `ValueError` if it is empty."""
    x = _measurable(x)
    if x.dim() == 0: x = x[None]
    dim,row = dim % x.dim(),_row(x.numel(), _sample(x))
    c = x.shape[dim]
    n = x.numel()//c
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    def take(x):
        parts = [_channel_sums(x, dim, acc), _norms(flat(x), row, acc)]
        if by_channel: parts.append(_channel_norms(x, dim, acc))
        s,q,*of_channel = _on_host(parts)
        mean,squares = s.reshape(-1, c).sum(0)/n,q*q
        square = np.square(of_channel[0]).reshape(-1, c).sum(0)/n if by_channel else squares.sum()/(n*c)
        squared = mean*mean if by_channel else mean @ mean/c
        return mean, square - squared, squared, squares

    with np.errstate(all='ignore'):
        mean,var,squared,squares = take(x)
        if not np.isfinite(var).all() and acc == torch.float32:  # squares of finite numbers may overflow
            x,acc = x.double(),torch.float64
            mean,var,squared,squares = take(x)
        if (squared > _CENTRE_ABOVE*var).any():
            shape = [1]*x.dim()
            shape[dim] = c
            centre = torch.from_numpy(mean).to(acc)
            rest,var,*_ = take(x.to(acc) - centre.to(x.device).reshape(shape))
            mean = centre.double().numpy() + rest
        return Moments(n, mean, np.maximum(var, 0.), _evidence(x, squares, row, mean.mean(), var.mean() + mean.var()))


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

    var = sum((m.var + between(m))*(m.count/n) for m in moments)
    squares = [m.count*float(np.mean(m.var + between(m))) for m in moments]
    total = sum(squares)
    top = max(m.evidence.top*q for m, q in zip(moments, squares))/total if total > 0 else 0.
    parts = [m.evidence for m in moments]
    evidence = Evidence(sum(e.samples for e in parts), top, min(e.spread for e in parts), any(e.normed for e in parts),
                        all(e.alike for e in parts))
    return Moments(n, mean, var, evidence)
