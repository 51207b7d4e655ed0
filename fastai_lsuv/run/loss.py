"""Whether the model is better or worse: `LossCheck` takes the training loss before LSUV and after it.

Both are taken on one mini-batch, in training mode, with dropout on and the same random numbers. `failure` says whether
the model came out far worse than it was, and far worse than one that predicts zeros."""
from __future__ import annotations

from math import isfinite
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .blame import explained
from ..keep.generators import Generators
from ..parallel.ranks import any_rank, mean_of_ranks
from ..parallel.sharded import forwards
from ..measure.solvers import cloned

__all__ = ['LossCheck', 'LOSS_TAKES']

LOSS_TAKES = ("it takes a function of the model that gives its training loss: "
              "lambda model: F.cross_entropy(model(x), y)")

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
        self.before = self.after = float('nan')
        self.constant = self.negated = float('nan')  # Of predicting zeros, and of the output times -1
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
        self.constant,self.negated = self._of(torch.zeros_like),self._of(torch.neg)
        self.out = None

    def _of(self, change: Callable[[Tensor], Tensor]) -> float:
        "The loss of the output, changed; NaN where it is not defined."
        out = tree_map(lambda o: change(o) if isinstance(o, Tensor) and o.is_floating_point() else o, self.out)
        loss,self.error = self._take(lambda *args, **kwargs: out),''
        return loss

    def take_after(self) -> None:
        "Take the loss of the model as LSUV has made it. One that cannot be taken any more counts as NaN."
        if self.pair is None: return
        with forwards(self.model): self.after = self._take(self._run)
        self.error = ''

    def _run(self, *args, **kwargs) -> Any:
        "The model, which leaves its output behind, and any error of its own."
        args,kwargs = cloned((args, kwargs))  # the model may write to its input
        try:
            with explained(self.model): self.out = self.model(*args, **kwargs)
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

    def told(self, force: bool) -> str:
        "`note`, and that a far worse result was kept, as `force` asks."
        kept = "far worse, and kept with `force=True`" if force and self.failure else ''
        return '; '.join(filter(None, [kept, self.note]))

    @property
    def failure(self) -> str:
        "What the loss says against the model as it is now, in words; \"\" if it does not."
        if self.pair is None or not isfinite(self.before): return ''
        reference = max(self.before, self.constant) if isfinite(self.constant) else self.before
        # A loss that is negative for some output has no floor, and a ratio means nothing: that of a WGAN's critic, say.
        has_floor = not any(v < 0 for v in (self.before, self.constant, self.negated))
        if isfinite(self.after) and (not has_floor or self.after <= _FAR*reference): return ''
        zeros = f", and predicting zeros gives {self.constant:.3g}" if isfinite(self.constant) else ''
        return f"the training loss is {self.after:.3g} after LSUV; it was {self.before:.3g} before{zeros}"
