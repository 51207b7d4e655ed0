"""Random orthonormal matrices, for about the price of as many normal numbers.

`orthonormal` draws one, or a block of it: some rows, some columns. A small matrix is the Q of a QR decomposition of
normal numbers. Its distribution is Haar's, and its numbers are those of `torch.nn.init.orthogonal_`.

A large matrix goes through three rounds, from the identity on. A round is a Fourier transform of each row, with random
signs or phases after it. It takes `n log n` steps a row, QR takes `n**2`. The first two rounds cost next to nothing:
transform, random phases and transform make a matrix whose rows are all the same, each shifted by one more place. So the
numbers of one row are enough. Moments, spectra and correlations agree with Haar's.

Sources: Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform" (2006); Yu et al., "Orthogonal random features"
(2016), for the three rounds; Anderson and Farrell, "Asymptotically liberating sequences of random unitary matrices"
(2014), for the signs; Mezzadri, "How to generate random matrices from the classical compact groups" (2007).
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ['orthonormal']

# Multiplications, about, up to which QR draws a matrix, so that small layers get torch's numbers. At 100x100 one core
# takes 0.2 ms for QR and 0.1 for the rounds. From there on QR falls behind fast.
_SMALL = 2**20
# Numbers that go through the last round together. With fewer, cores wait for each other. More do not fit in the cache.
_CHUNK = 2**18


def orthonormal(
    rows: int,  # Of all groups together
    cols: int,  # Numbers in a row
    *,
    groups: int = 1,  # Matrices of `rows//groups` rows each, one below the other
    start: int = 0,  # First row to return
    stop: int | None = None,  # Row to stop before; `None`: the end
    left: int = 0,  # First column to return
    right: int | None = None,  # Column to stop before; `None`: the end
    dtype: torch.dtype = torch.float32,  # Of the result; the computation is in float32 at least
    device: torch.device | str | None = None,  # Where to draw and to compute; `None`: torch's default device
    out: Tensor | None = None  # (stop - start, right - left): gets the result; in place of `dtype` and `device`
) -> Tensor:  # (stop - start, right - left)
    """Rows `start:stop` and columns `left:right` of a random matrix whose rows are orthonormal, or whose columns are if
    they are fewer.

    The numbers come from torch's default generator of the device. The same seed gives the same matrix, whatever the
    block, and any block leaves the generator in the same state. A block of a large matrix is computed without the
    rest."""
    stop,right = rows if stop is None else stop, cols if right is None else right
    if not 0 <= start <= stop <= rows: raise ValueError(f'rows {start}:{stop} are not a slice of {rows} rows')
    if rows % groups: raise ValueError(f'{rows} rows do not make {groups} groups')
    if not 0 <= left <= right <= cols: raise ValueError(f'columns {left}:{right} are not a slice of {cols} columns')
    q = torch.empty(stop - start, right - left, dtype=dtype, device=device) if out is None else out
    full,each = torch.promote_types(q.dtype, torch.float32),rows//groups
    few,many = sorted((each, cols))
    if few*few*many <= _SMALL or not _has_fft(full, q.device):
        return q.copy_(_by_qr(groups, each, cols, full, q.device)[start:stop, left:right])
    for first in range(0, rows, each):
        lo,hi = (min(max(row, first), first + each) for row in (start, stop))
        part,at = q[lo - start:hi - start],(lo - first, left)
        if each <= cols: _by_rounds(part, *at, many, full)
        else: _by_rounds(part.T, *at[::-1], many, full)
    return q


def _has_fft(dtype: torch.dtype, device: torch.device) -> bool:
    "Whether torch has a Fourier transform for this type on this device."
    try: torch.fft.rfft(torch.zeros(2, dtype=dtype, device=device))
    except RuntimeError: return False
    return True


def _by_qr(groups: int, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    "The Q of a QR decomposition of normal numbers, with a positive diagonal of R, for each group."
    drawn = torch.empty(groups, rows, cols, dtype=dtype, device=device).normal_()
    q,r = torch.linalg.qr(drawn if rows >= cols else drawn.mT)
    q = q*r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    return (q if rows >= cols else q.mT).reshape(groups*rows, cols)


def _by_rounds(
    q: Tensor,  # Gets the block: a matrix of few rows, or the transpose of one of few columns
    start: int,  # Number of its first row
    left: int,  # Number of its first column
    n: int,  # Numbers in a whole row
    dtype: torch.dtype  # Of the computation: float32 or float64
) -> None:
    "Fill `q` with a block of a random orthonormal matrix of size `n`, of which only these rows are computed."
    kind = dict(dtype=dtype, device=q.device)
    row = torch.fft.irfft(torch.fft.rfft(torch.randn(n, **kind)).sgn(), n)  # all its waves have the same size
    shifted = row.repeat(2).unfold(0, n, 1)
    before,after = torch.randint(2, (2, n), **kind).mul_(2).sub_(1)
    # A wave is a cosine and a sine, but the constant one is not, nor is the one that alternates, if n is even.
    before[:2 - n % 2] *= math.sqrt(2)
    before *= math.sqrt(1/(2*n))
    step,stop = max(1, _CHUNK//n),start + len(q) if q.numel() else start
    for i in range(start, stop, step):
        rows = shifted[i:min(i + step, stop)]
        # Real and imaginary parts in turn. Those of the two single waves that are imaginary stay 0.
        parts = torch.zeros(len(rows), 2*(n//2 + 1), **kind)
        torch.mul(rows, before, out=parts[:, :n])
        parts[:, n] = parts[:, 1]
        parts[:, 1] = 0
        x = torch.fft.irfft(torch.view_as_complex(parts.unflatten(1, (-1, 2))), n, norm='forward')
        if q.stride(0) < q.stride(1): x = x.T.contiguous().T  # as q's memory lies, which is faster
        x,to = x[:, left:left + q.shape[1]],q[i - start:i - start + len(rows)]
        torch.mul(x, after[left:left + q.shape[1]], out=to)
