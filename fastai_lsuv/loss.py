"""Whether the model is better or worse: `LossCheck` takes the training loss before LSUV and after it.

Both are taken on one mini-batch, in training mode, with dropout on and the same random numbers. `failure` says whether
the model came out far worse than it was, and far worse than one that predicts zeros."""
from __future__ import annotations

from math import isfinite
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .generators import Generators
from .ranks import any_rank, mean_of_ranks

__all__ = ['LossCheck']

# A loss so many times that of the start and of a constant prediction is far worse. Independent predictions of
# variance 1 double the mean squared error of standardized targets, and a mini-batch of few samples may add to that.
_FAR = 5


class LossCheck:
    "The training loss before and after."
    def __init__(self,
        model: nn.Module,
        loss: Callable[[Callable], Any] | None  # As in `lsuv_init`
    ):
        self.model,self.loss = model,loss
        self.before = self.after = self.constant = float('nan')
        self.error = ''  # Why the loss cannot be taken
        self.out: Any = None  # Of the model
        self.model_error: Exception | None = None
        self.generators = Generators()

    @property
    def pair(self) -> tuple[float, float] | None:
        "Loss before and after; `None` if it was not taken."
        return (self.before, self.after) if self.loss is not None and not self.error else None

    def take_before(self) -> None:
        "Take the loss of the model as it is, and that of predicting zeros."
        self.before = self._take(self._run)
        if self.error: return
        zeros = tree_map(lambda o: torch.zeros_like(o) if isinstance(o, Tensor) else o, self.out)
        self.constant = self._take(lambda *args, **kwargs: zeros)
        self.out,self.error = None,''  # not every loss is defined for zeros

    def take_after(self) -> None:
        "Take the loss of the model as LSUV has made it. One that cannot be taken any more counts as NaN."
        if self.pair is None: return
        self.after = self._take(self._run)
        self.error = ''

    def _run(self, *args, **kwargs) -> Any:
        "The model, which leaves its output behind, and any error of its own."
        try: self.out = self.model(*args, **kwargs)
        except Exception as e:
            self.model_error = e
            raise
        return self.out

    @torch.no_grad()
    def _take(self, model: Callable) -> float:
        self.model.train()
        loss,error = float('nan'),''
        try:
            with self.generators.again():
                loss = self.loss(model)
                loss = float(loss.detach().float().mean() if isinstance(loss, Tensor) else loss)
        except Exception as e:
            if e is self.model_error: raise
            loss,error = float('nan'),f"{type(e).__name__}: {e}".splitlines()[0]
        if any_rank(bool(error)): self.error = error or "another rank cannot take it"
        return mean_of_ranks(loss)

    @property
    def note(self) -> str:
        "What is to be said of the loss: why it was not taken, or that predicting zeros is much better."
        if self.error or self.pair is None: return self.error
        return f"predicting zeros gives {self.constant:.2g}" if 0 < 2*self.constant < self.after else ''

    @property
    def failure(self) -> str:
        "What the loss says against the model as it is now, in words; \"\" if it does not."
        if self.pair is None or not isfinite(self.before): return ''
        reference = max(self.before, self.constant) if isfinite(self.constant) else self.before
        # A ratio means nothing where a loss can be zero or negative, as that of a WGAN's critic.
        has_floor = min(self.before, reference, self.constant if isfinite(self.constant) else reference) > 0
        if isfinite(self.after) and (not has_floor or self.after <= _FAR*reference): return ''
        zeros = f", and predicting zeros gives {self.constant:.3g}" if isfinite(self.constant) else ''
        return f"the training loss is {self.after:.3g} after LSUV; it was {self.before:.3g} before{zeros}"
