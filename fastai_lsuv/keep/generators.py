"""The state of every random number generator that a training run uses: python's, numpy's and torch's."""
from __future__ import annotations

import random
from contextlib import contextmanager
from typing import Any, Iterator

import numpy as np
import torch

__all__ = ['Generators']


class Generators:
    "The generators as they are now."
    def __init__(self):
        self.python,self.numpy,self.cpu = random.getstate(),np.random.get_state(),torch.get_rng_state()
        has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cuda = torch.cuda.get_rng_state_all() if has_cuda else None
        self.mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None: torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None: torch.mps.set_rng_state(self.mps)

    @property
    def unused(self) -> bool:
        "Whether no number has been drawn since, from any of them."
        def state(g): return [g.python, *g.numpy, g.cpu, *(g.cuda or []), *([g.mps] if g.mps is not None else [])]

        mine,now = state(self),state(Generators())
        return len(mine) == len(now) and all(map(_same, mine, now))

    @contextmanager
    def again(self) -> Iterator[None]:
        "Run what is inside from this state, and leave the generators as they were before it."
        now = Generators()
        self.restore()
        try: yield
        finally: now.restore()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
