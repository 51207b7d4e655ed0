"""What the processes of `torch.distributed` tell each other, so that all of them compute the same weights.

Ranks talk in rounds. In a round (`numbers_of_ranks`) each rank sends one message, always of the same size, which begins
with what the rank is doing. So a rank that has raised an error can answer whatever the others ask, and ranks that do
different things find out. In both cases all ranks raise, and none waits for ever. A rank that is killed or hangs sends
nothing. The others raise when torch does: as it sees the connection close, or at the timeout of the process group.

`any_rank` and `mean_of_ranks` agree on an answer or a number. `of_all_ranks` gives each rank what all of them have.
`in_step` makes an error on one rank an error on all. `meet` is a round without a question, before the model itself
communicates. With one process, none of them sends anything."""
from __future__ import annotations

import pickle
from typing import Callable, TypeVar

import numpy as np
import torch
import torch.distributed as dist

__all__ = ['several_ranks', 'numbers_of_ranks', 'any_rank', 'mean_of_ranks', 'of_all_ranks', 'in_step', 'meet',
           'arrays_of_all_ranks']

T = TypeVar('T')

# A message holds this many bytes of words, and then this many numbers.
_WORDS,_NUMBERS = 120,12
_FAILED = 'failed'


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


def numbers_of_ranks(what: str, *numbers: float) -> np.ndarray:  # (ranks, numbers)
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
    if several_ranks(): numbers_of_ranks(what)


def any_rank(yes: bool) -> bool:
    "Whether the answer is yes on any rank."
    return bool(numbers_of_ranks('a question', yes).any()) if several_ranks() else yes


def mean_of_ranks(number: float) -> float:
    "The mean of each rank's number."
    return float(numbers_of_ranks('a mean', number).mean()) if several_ranks() else number


def of_all_ranks(mine: T) -> list[T]:
    "What each rank has. It is pickled on the way."
    if not several_ranks(): return [mine]
    packed = np.frombuffer(pickle.dumps(mine), np.uint8)
    sizes = numbers_of_ranks('a list', len(packed))[:, 0].astype(int)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[:len(packed)] = packed
    return [pickle.loads(p[:n].tobytes()) for p, n in zip(arrays_of_all_ranks(padded), sizes)]


def in_step(f: Callable[[], T]) -> T:
    "What `f()` returns. If it raises on one rank, it raises on all, so that no rank waits for ever."
    if not several_ranks(): return f()
    try: out = f()
    except BaseException as e:
        if not getattr(e, '_all_ranks_know', False):
            numbers_of_ranks(_FAILED)
            try: _told(e)
            except AttributeError: pass  # an exception without a `__dict__`
        raise
    numbers_of_ranks('the next step')
    return out
