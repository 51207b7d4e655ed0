"""What the processes of `torch.distributed` tell each other, so that all of them compute the same weights.

Ranks talk in rounds. In a round (`_round`) each rank sends one message, always of the same size, which begins with what
the rank is doing. So a rank that has raised an error can answer whatever the others ask, and ranks that do different
things find out. In both cases all ranks raise, and none waits for ever. A rank that is killed or hangs sends nothing.
The others raise when torch does: as it sees the connection close, or at the timeout of the process group.

`pool_ranks` pools the moments of an activation. `any_rank` and `mean_of_ranks` agree on an answer or a number.
`of_all_ranks` gives each rank what all of them have. `in_step` makes an error on one rank an error on all. `meet` is a
round without a question, before the model itself communicates. With one process, none of them sends anything."""
from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import groupby
from typing import Callable, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..measure.moments import Evidence, Moments, pool

__all__ = ['several_ranks', 'pool_ranks', 'any_rank', 'mean_of_ranks', 'of_all_ranks', 'in_step', 'meet',
           'arrays_of_all_ranks']

T = TypeVar('T')

# A message holds this many bytes of words, and then this many numbers.
_WORDS,_NUMBERS = 120,12
_FAILED = 'failed'
# Moments of one activation, computed on several ranks, differ by no more than rounding.
_SAME = 1e-6


def several_ranks() -> bool:
    "Whether there is more than one process to agree with."
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def arrays_of_all_ranks(mine: np.ndarray) -> list[np.ndarray]:
    "The array of each rank, all of one shape and type."
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    sent = torch.from_numpy(np.ascontiguousarray(mine).view(np.uint8).reshape(-1)).to(device)
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return [p.cpu().numpy().view(mine.dtype).reshape(mine.shape) for p in parts]


def _round(what: str, *numbers: float) -> np.ndarray:  # (ranks, numbers)
    "Tell all ranks what this one does, with a few numbers. Raises on all of them if they do not do the same."
    message = np.zeros(_WORDS + 8*_NUMBERS, np.uint8)
    words = what.encode()[-_WORDS:]
    message[:len(words)] = np.frombuffer(words, np.uint8)
    message[_WORDS:_WORDS + 8*len(numbers)] = np.array(numbers, np.float64).view(np.uint8)
    said = arrays_of_all_ranks(message)
    words = [s[:_WORDS].tobytes().rstrip(b'\0').decode(errors='replace') for s in said]
    if what != _FAILED: _check_all_do(words)
    return np.stack([s[_WORDS:].view(np.float64)[:len(numbers)] for s in said])


def _check_all_do(words: list[str]) -> None:
    "Raise if a rank has failed, or if ranks do different things."
    failed = [r for r, w in enumerate(words) if w == _FAILED]
    if failed: raise _told(RuntimeError(f"LSUV stopped because another rank failed; see the error of rank {failed[0]}"))
    other = next((r for r, w in enumerate(words) if w != words[0]), None)
    if other is None: return
    raise _told(RuntimeError(
        f"ranks do different things: {words[0]} on rank 0, {words[other]} on rank {other}. LSUV needs every rank to "
        "run the same layers of the same model in the same order: switch off what skips layers at random, or "
        "initialize the model on one process, before it is cut into pipeline stages or spread"))


def _told(error: T) -> T:
    "Note that all ranks know of an error."
    error._all_ranks_know = True
    return error


def meet(what: str) -> None:
    "Wait for all ranks. Raises if one has failed, or does something else."
    if several_ranks(): _round(what)


def any_rank(yes: bool) -> bool:
    "Whether the answer is yes on any rank."
    return bool(_round('a question', yes).any()) if several_ranks() else yes


def mean_of_ranks(number: float) -> float:
    "The mean of each rank's number."
    return float(_round('a mean', number).mean()) if several_ranks() else number


def of_all_ranks(mine: T) -> list[T]:
    "What each rank has. It is pickled on the way."
    if not several_ranks(): return [mine]
    packed = np.frombuffer(pickle.dumps(mine), np.uint8)
    sizes = _round('a list', len(packed))[:, 0].astype(int)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[:len(packed)] = packed
    return [pickle.loads(p[:n].tobytes()) for p, n in zip(arrays_of_all_ranks(padded), sizes)]


def in_step(f: Callable[[], T]) -> T:
    "What `f()` returns. If it raises on one rank, it raises on all, so that no rank waits for ever."
    if not several_ranks(): return f()
    try: out = f()
    except BaseException as e:
        if not getattr(e, '_all_ranks_know', False):
            _round(_FAILED)
            try: _told(e)
            except AttributeError: pass  # an exception without a `__dict__`
        raise
    _round('the next step')
    return out


# ---- Moments

def pool_ranks(
    m: Moments | None,  # `None` where this rank holds no element of the activation
    of: str = '',  # What the moments are of, such as the name of a layer
    first: int = 0  # Number of the first channel that this rank holds
) -> Moments | None:
    """Moments pooled over all ranks, bit for bit the same on each.

    Ranks with the same mini-batch hold the same numbers, which count once, or other channels, or other elements."""
    if not several_ranks(): return m
    e = m.evidence if m is not None else Evidence()
    sizes = (m.mean.ndim, m.mean.size, m.var.ndim) if m is not None else (0, 0, 0)
    told = _round(f"layer {of!r}", m.count if m is not None else 0, *sizes, first, e.samples, e.top, e.spread, e.normed,
                  e.alike, e.batch)
    most = int(told[:, 2].max())
    mine = np.zeros((2, most))
    if m is not None: mine[0, :m.mean.size],mine[1, :m.var.size] = m.mean,m.var
    parts = [_Sent.of(t, v) for t, v in zip(told, arrays_of_all_ranks(mine)) if t[0]]
    if not parts: return None
    parts.sort(key=lambda p: p.moments.evidence.batch)
    pooled = pool([_of_one_batch(list(g)) for _, g in groupby(parts, key=lambda p: p.moments.evidence.batch)])
    return replace(pooled, evidence=pooled.evidence._replace(batch=e.batch))


class _Sent:
    "The moments that a rank has sent, and the number of their first channel."
    def __init__(self, first: int, moments: Moments): self.first,self.moments = first,moments

    @classmethod
    def of(cls, told: np.ndarray, values: np.ndarray) -> _Sent:
        count,ndim,size,var_ndim,first,samples,top,spread,normed,alike,batch = told.tolist()
        evidence = Evidence(int(samples), top, spread, bool(normed), bool(alike), batch)
        mean,var = values[0, :int(size)],values[1, :int(size) if var_ndim else 1]
        return cls(int(first), Moments(int(count), mean if ndim else mean[0], var if var_ndim else var[0], evidence))

    def same(self, other: _Sent) -> bool:
        a,b = self.moments,other.moments
        if (self.first, a.count, a.mean.shape) != (other.first, b.count, b.mean.shape): return False
        near = (np.allclose(x, y, _SAME, 0, equal_nan=True) for x, y in ((a.mean, b.mean), (a.var, b.var)))
        return all(near)


def _of_one_batch(parts: list[_Sent]) -> Moments:
    "Moments over ranks that hold the same samples: copies of one output, other channels of it, or other elements."
    different = _without_copies(parts)
    if len(different) == 1: return different[0].moments
    of_channels = [pool([p.moments for p in g]) for _, g in groupby(different, key=lambda p: p.first)]
    m = _side_by_side(of_channels) if len(of_channels) > 1 else of_channels[0]
    kept = [p.moments for p in different]
    # The sample with the largest share may be another on each rank. The sum is then more than any sample has.
    squares = [k.count*float(np.sum(k.var + np.square(k.mean - m.mean.mean()))) for k in kept]
    top = sum(k.evidence.top*q for k, q in zip(kept, squares))/max(sum(squares), np.finfo(float).tiny)
    e = [k.evidence for k in kept]
    evidence = Evidence(max(x.samples for x in e), min(top, 1.), min(x.spread for x in e), any(x.normed for x in e),
                        all(x.alike for x in e), e[0].batch)
    return Moments(m.count, m.mean, m.var, evidence)


def _without_copies(parts: list[_Sent]) -> list[_Sent]:
    "Those that differ, by their first channel."
    different: list[_Sent] = []
    for p in parts:
        if not any(p.same(q) for q in different): different.append(p)
    return sorted(different, key=lambda p: p.first)


def _side_by_side(parts: list[Moments]) -> Moments:
    "Moments of channels that follow each other."
    if not parts[0].mean.ndim: return pool(parts)
    sizes = [p.mean.size for p in parts]
    mean = np.concatenate([p.mean for p in parts])
    var = np.concatenate([p.var for p in parts]) if parts[0].var.ndim else np.average([p.var for p in parts],
                                                                                      weights=sizes)
    return Moments(parts[0].count, mean, var, parts[0].evidence)
