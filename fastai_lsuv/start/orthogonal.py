"""Random orthonormal matrices, for less than the price of as many normal numbers.

`orthonormal` draws one, or a block of it: some rows, some columns. A small matrix is the Q of a QR decomposition of
normal numbers. Its distribution is Haar's, and its numbers are those of `torch.nn.init.orthogonal_`.

A large matrix consists of rows of the identity, in random order, that go through three rounds. A round is an
orthonormal Fourier transform, then a random sign for each column. It takes `n log n` steps a row, QR takes `n**2`.
Moments, spectra and correlations agree with Haar's.

A larger one that is at least twice as wide as high is laid with tiles side by side, if its width can be divided. All
are made of one such matrix. Each tile has its rows in an order of its own. Then each column of the whole gets a random
sign, and the columns get a random order, some at a time. As the rows of each tile are orthonormal, so are those of the
whole. A matrix that is at least twice as high as wide is laid in the same way, with tiles one below the other. Laying
takes about a third of the time that the rounds take. Two things differ a little from Haar's. The squares of two rows
correlate by -1/k, where k is the length of a tile, and not by -1/n. A block of few columns is closer to orthonormal.

A model holds many matrices of the same size, and more with tiles of the same size. A `Deck` keeps a tile while more of
its size are to come. Haar's distribution stays what it is under such orders and signs. Sums and products of matrices
from one tile have the spectra of independent ones.

Sources: Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform" (2006); Yu et al., "Orthogonal random features"
(2016), for the three rounds; Anderson and Farrell, "Asymptotically liberating sequences of random unitary matrices"
(2014), for orders and signs; Mezzadri, "How to generate random matrices from the classical compact groups" (2007).
"""
from __future__ import annotations

import math
from collections import Counter
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ['Deck', 'orthonormal']

# Two rounds leave a structure: an entry depends on nothing but the sum and the difference of its row and its column.
# The squares of two rows are then alike up to a shift: at 100x4096 they correlate by 0.13, where Haar's do by 0.06.
# Entries are less normal, too. The third round removes both at every size. It adds a third to the time.
_ROUNDS = 3
# Multiplications, about, up to which QR is faster. On one core, at 64x128, QR takes 0.3 ms and the rounds take 0.5.
# At 128x128 QR takes 0.8 ms and the rounds take 0.6.
_SMALL = 2**20
# Numbers that go through the rounds together. With fewer, cores wait for each other. More do not fit in the cache.
_CHUNK = 2**19
# Numbers in a matrix that a deck keeps, at most.
_MOST_KEPT = 2**24
# Numbers from which on a matrix is laid with tiles, and those that a tile holds at most.
_LARGE,_LARGEST_TILE = 2**19,2**25
# The most tiles side by side, and one below the other. Each of the latter holds the same rows, with their columns in
# another order. More of them would show.
_MOST_WIDE,_MOST_TALL = 16,4
# A tile has at least as many rows and columns. Fewer have too few orders: tiles would be alike.
_LEAST = 64
# At most so many columns stay together, in a run. Two lines of the cache hold as many. One by one, they take nine times
# as long. A row has at least so many runs. With fewer, the same run would often be in the same place in two tiles.
_RUN,_LEAST_RUNS = 32,16


def _tile(rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns of the tiles that a matrix of this size is laid with.

    There are as many as divide its longer side, are not shorter than the other side, and are allowed. It may be one."""
    few,many = sorted((rows, cols))
    most = min(many//few, _MOST_WIDE if rows <= cols else _MOST_TALL) if rows*cols >= _LARGE and few >= _LEAST else 1
    n = next(n for n in range(most, 0, -1) if many % n == 0)
    size = (rows, cols//n) if rows <= cols else (rows//n, cols)
    return size if math.prod(size) <= _LARGEST_TILE else (rows, cols)


def _run(width: int) -> int:
    "Columns that stay together in a matrix of this width: a power of two."
    run = math.gcd(width, _RUN)
    while run > 1 and width < _LEAST_RUNS*run: run //= 2
    return run


class Deck:
    "Tiles that were drawn, of each size that is to come again."
    def __init__(self, sizes: Iterable[tuple[int, int]]):
        self.to_come = Counter(_tile(*size) for size in sizes)
        self.kept: dict[tuple, Tensor] = {}

    def tile(self, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, bool]:
        "A tile of this size, if one is kept or is to be kept from now on, and whether it is new."
        self.to_come[size] -= 1
        again,key = self.to_come[size] > 0,(*size, dtype, device)
        new = again and key not in self.kept and math.prod(size) <= _MOST_KEPT
        if new: self.kept[key] = orthonormal(*size, dtype=dtype, device=device)
        tile = self.kept.get(key) if again else self.kept.pop(key, None)
        return tile, new


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
    out: Tensor | None = None,  # (stop - start, right - left): gets the result; in place of `dtype` and `device`
    deck: Deck | None = None  # Keeps tiles of a size that is to come again
) -> Tensor:  # (stop - start, right - left)
    """Rows `start:stop` and columns `left:right` of a random matrix whose rows are orthonormal, or whose columns are if
    they are fewer.

    The numbers come from torch's default generator of the device. The same seed gives the same matrix, whatever the
    block, and any block leaves the generator in the same state. A block of a large matrix is computed without the rest.
    Where the matrix is laid with tiles, one whole tile is drawn."""
    stop,right = rows if stop is None else stop, cols if right is None else right
    if not 0 <= start <= stop <= rows: raise ValueError(f'rows {start}:{stop} are not a slice of {rows} rows')
    if rows % groups: raise ValueError(f'{rows} rows do not make {groups} groups')
    if not 0 <= left <= right <= cols: raise ValueError(f'columns {left}:{right} are not a slice of {cols} columns')
    q = torch.empty(stop - start, right - left, dtype=dtype, device=device) if out is None else out
    full,each = torch.promote_types(q.dtype, torch.float32),rows//groups
    few,many = sorted((each, cols))
    if groups == 1:
        size = _tile(rows, cols)
        tile,new = deck.tile(size, full, q.device) if deck is not None else (None, False)
        if new and size == (rows, cols): return q.copy_(tile[start:stop, left:right])
        if tile is None and size != (rows, cols): tile = orthonormal(*size, dtype=full, device=q.device)
        if tile is not None: return _lay(q, tile, rows, cols, start, left)
    if few*few*many <= _SMALL or not _has_fft(full, q.device):
        return q.copy_(_by_qr(groups, each, cols, full, q.device)[start:stop, left:right])
    for first in range(0, rows, each):
        fourier = _Fourier(many, full, q.device)
        lo,hi = (min(max(row, first), first + each) for row in (start, stop))
        if lo < hi: fourier.fill(q[lo - start:hi - start], lo - first, left, each <= cols)
    return q


def _lay(
    q: Tensor,  # Gets the rows from `start` and the columns from `left` on
    tile: Tensor,
    rows: int,
    cols: int,  # These two: the size of the whole matrix
    start: int,
    left: int
) -> Tensor:
    "Lay a matrix with copies of a tile: one, or several side by side or one below the other."
    if tile.shape == (rows, cols): return _shuffle(q, tile, start, left)
    way,run = _side_by_side if rows <= cols else _one_below_the_other,_run(tile.shape[1])
    runs_and_signs,right = way(tile, rows, cols, tile.shape[1]//run),left + q.shape[1]
    for i in range(0, len(q), step := max(1, _CHUNK//max(1, cols))):
        at,signs = runs_and_signs(slice(start + i, start + min(i + step, len(q))))
        part = tile.view(-1, run).index_select(0, at.reshape(-1)).view(len(at), cols)
        torch.mul(part[:, left:right], signs[..., left:right], out=q[i:i + step])
    return q


def _shuffle(q: Tensor, tile: Tensor, start: int, left: int) -> Tensor:
    "Fill `q` with a block of a tile whose rows and columns are in a random order, each with a random sign."
    down,across = (_order(tile, n) for n in tile.shape)
    of_rows,of_cols = _signs(tile, 1, sum(tile.shape)).split(tile.shape)
    rows,cols = slice(start, start + len(q)),slice(left, left + q.shape[1])
    part = tile.index_select(0, down[rows]).gather(1, across[cols].expand(q.shape))
    return torch.mul(part.mul_(of_rows[rows, None]), of_cols[cols], out=q)


# The ways to lay a matrix with several tiles. A row of a tile has `each` runs. A way gives the indices of the runs in
# some rows, and the signs of their columns.

def _side_by_side(tile: Tensor, rows: int, cols: int, each: int) -> Callable[[slice], tuple[Tensor, Tensor]]:
    "Tiles whose rows are in orders of their own, and whose runs are in one order."
    n = cols//tile.shape[1]
    down,order = torch.stack([_order(tile, rows) for _ in range(n)])*each,_order(tile, n*each)
    of,across,signs = order//each,order % each,_signs(tile, n, cols)
    return lambda some: (down[:, some].index_select(0, of).T + across, signs)


def _one_below_the_other(tile: Tensor, rows: int, cols: int, each: int) -> Callable[[slice], tuple[Tensor, Tensor]]:
    "Tiles whose runs are in orders of their own, and whose rows are in one order."
    n = rows//len(tile)
    across,order = torch.stack([_order(tile, each) for _ in range(n)]),_order(tile, rows)
    of,down,signs = order//len(tile),order % len(tile)*each,_signs(tile, n, n, cols)
    return lambda some: (down[some, None] + across.index_select(0, of[some]), signs.index_select(0, of[some]))


def _order(tile: Tensor, n: int) -> Tensor: return torch.randperm(n, device=tile.device)


def _signs(tile: Tensor, n: int, *size: int) -> Tensor:
    "Random signs times `n**-0.5`, which make `n` tiles an orthonormal matrix."
    return torch.randint(2, size, dtype=tile.dtype, device=tile.device).sub_(0.5).mul_(2/math.sqrt(n))


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


class _Fourier:
    """A random orthonormal matrix of size n, whose rows are computed when they are asked for.

    It holds a few times n numbers: the order of the rows, their signs and, for each round, the signs of the columns."""

    def __init__(
        self,
        n: int,  # Rows, and columns
        dtype: torch.dtype,  # Of the numbers: float32 or float64
        device: torch.device  # Where to draw and to compute
    ):
        self.n = n
        self.order = torch.randperm(n, device=device)
        signs = torch.randint(2, (1 + _ROUNDS, n), dtype=dtype, device=device).mul_(2).sub_(1)
        # A constant wave has twice the squared norm of the others. So has one whose numbers alternate, if n is even.
        norms = torch.full((n,), math.sqrt(2/n), dtype=dtype, device=device)
        norms[:2 - n%2] = math.sqrt(1/n)
        self.signs,self.rounds = signs[0],signs[1:]*norms
        angles = torch.arange(n, dtype=torch.float64, device='cpu')*(-2*math.pi/n)  # Some devices have no float64
        self.roots = torch.polar(torch.ones_like(angles), angles).to(dtype.to_complex()).to(device)

    def fill(
        self,
        q: Tensor,  # Gets the rows from `start` and the columns from `left` on
        start: int,  # Number of the first row
        left: int,  # Number of the first column
        wide: bool  # Whether the matrix consists of rows of this one, or of their transpose
    ) -> None:
        "Write rows of a wide matrix, or of the transpose of one if it is tall."
        if not wide: q,start,left = q.T,left,start
        for i, part in self._rows(start, start + len(q)):
            q[i - start:i - start + len(part)] = part[:, left:left + q.shape[1]]

    def _rows(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        "Rows `start:stop`, a chunk at a time, each with the number of its first row."
        step = max(1, _CHUNK//self.n)
        for i in range(start, stop, step):
            x = self._first(slice(i, min(i + step, stop))).mul_(self.rounds[0])
            for signs in self.rounds[1:]: x = self._real(torch.fft.rfft(x)).mul_(signs)
            yield i, x

    def _first(self, which: slice) -> Tensor:
        """The transform of rows of the identity, which are waves: powers of one root of unity each.

        A power is a product of two, of which there are only `2*sqrt(n)`."""
        at = self.order[which, None]
        low = math.isqrt(self.n//2) + 1
        high = self.n//2//low + 1
        lows = self.roots[at*torch.arange(low, device=at.device) % self.n]
        highs = self.roots[at*torch.arange(0, low*high, low, device=at.device) % self.n]*self.signs[which, None]
        return self._real((highs[:, :, None]*lows[:, None]).flatten(1))

    def _real(self, spectrum: Tensor) -> Tensor:
        "Real and imaginary parts in turn, of the spectrum of n real numbers; those that are always 0 are left out."
        parts = torch.view_as_real(spectrum).flatten(1)
        if self.n % 2:
            parts[:, 1] = parts[:, 0]
            return parts[:, 1:1 + self.n]
        parts[:, 1] = parts[:, self.n]
        return parts[:, :self.n]
