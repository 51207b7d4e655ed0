"""Moments of all ranks of `torch.distributed`, bit for bit the same on each.

Counts, sums and squares add up. Ranks that hold the same mini-batch hold copies of an output, or shares of one: they
are divided by the number of whole outputs that these ranks hold together."""
from __future__ import annotations

import numpy as np

from ..parallel import arrays_of_all_ranks, numbers_of_ranks, several_ranks
from .moments import Evidence, Moments

__all__ = ['pool_ranks']


def pool_ranks(
    m: Moments | None,  # `None` where this rank holds no element of the activation
    of: str = '',  # What the moments are of, such as the name of a layer
    first: int = 0,  # Number of the first channel that this rank holds
    share: float = 1.  # Share of the output's elements that this rank holds
) -> Moments | None:
    "Moments of what all ranks hold; `None` if no rank holds an element."
    if not several_ranks(): return m
    e = m.evidence if m is not None else Evidence()
    sizes = (m.count, m.mean.ndim, m.mean.size, m.var.ndim, float(m.mean.mean())) if m is not None else (0, 0, 0, 0, 0.)
    told = numbers_of_ranks(f"layer {of!r}", *sizes, first, share, e.samples, e.spread, e.normed, e.alike, e.batch)
    count,ndim,size,var_ndim,about,firsts,shares,samples,spread,normed,alike,batch = told.T
    held = count > 0
    if not held.any(): return None
    centre = about[held].mean()
    mine = np.zeros((4, int((firsts + size)[held].max())))
    if m is not None: _put(mine, m, first, centre)
    parts = np.stack(arrays_of_all_ranks(mine))
    same = (batch[:, None] == batch) & (batch != 0) | np.eye(len(batch), dtype=bool)  # Ranks with the same mini-batch
    weights = np.where(held, 1/np.maximum((same*np.where(held, shares, 0.)).sum(1), 1e-9), 0.)
    n,s,q,_ = (parts*weights[:, None, None]).sum(0)
    with np.errstate(all='ignore'):
        mean = s/n
        var = np.maximum(q/n - mean*mean, 0.)
    per_batch = (same*weights*parts[:, 3].sum(1)).sum(1)  # Squares of the largest sample of each mini-batch
    total = float((n*(var + (mean - mean.mean())**2)).sum())
    n_samples = sum(samples[i] for i in np.flatnonzero(held) if not (same[i, :i] & held[:i]).any())
    evidence = Evidence(int(n_samples), min(float(per_batch.max())/total, 1.) if total > 0 else 0., float(spread.min()),
                        bool(normed.any()), bool(alike[held].all()), e.batch)
    mean = mean + centre
    if not ndim.any(): mean,var = mean[0],var[0]
    elif not var_ndim.any(): var = np.float64(var.mean())
    return Moments(max(int(round(n.max())), 1), mean, var, evidence)


def _put(to: np.ndarray, m: Moments, first: int, centre: float) -> None:
    "Counts, sums and squares about `centre`, and the squares of the largest sample, of this rank's channels."
    mean,at = np.atleast_1d(m.mean),slice(first, first + m.mean.size)
    if not m.mean.ndim: at = slice(0, 1)
    d = mean - centre
    to[0, at],to[1, at],to[2, at] = m.count,m.count*d,m.count*(m.var + d*d)
    to[3, at] = m.evidence.top*m.count*(m.var + (mean - mean.mean())**2)
