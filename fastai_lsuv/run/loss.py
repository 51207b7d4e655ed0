"""Whether the model is better or worse: `LossCheck` takes the training loss before LSUV and after it.

Both are taken on one mini-batch, in training mode, with dropout on and the same random numbers. `failure` says whether
the model came out far worse than it was, and far worse than one that predicts zeros. `trained` says whether it was so
much better than a constant answer, before, that it looks trained. `own_loss` is for a model that returns its loss."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..keep import Generators
from ..observe import cloned
from ..parallel import any_rank, forwards, mean_of_ranks
from .blame import explained, warn_caller
from .passes import arguments
from .signs import LEARNED, MOVED, NEW, sign_of

__all__ = ['LooksTrained', 'LossCheck', 'LOSS_TAKES', 'UnlessTrained', 'own_loss']

LOSS_TAKES = ("it takes a function of the model that gives its training loss: "
              "lambda model: F.cross_entropy(model(x), y)")

# A loss so many times that of the start and of a constant prediction is far worse. Independent predictions of
# variance 1 double the mean squared error of standardized targets, and few samples add to that by chance: of 1,500
# MLPs with one output, 6 came to more than 4 times on 64 samples, and 140 on 16.
_FAR = 4
# A loss below this share of a constant answer's looks trained, by what the weights tell. New networks of 20 kinds came
# down to 0.57 in 16 samples of digits, and to 0.2 where the data has one dimension; trained ones to 0.3 and less.
_LOW = {LEARNED: 0.8, MOVED: 0.5}
_LEAST_SAMPLES = 16  # Fewer prove nothing, unless the weights speak as well


class LooksTrained(Exception):
    "The model looks trained: nothing was changed."


class UnlessTrained:
    "A training loss that ends the run with `LooksTrained`, before anything is changed, if the model looks trained."
    def __init__(self,
        loss: Callable[[Callable], Any],  # As in `lsuv_init`
        ends: bool = True  # Without it, the run goes on, and the report mentions it
    ):
        self.loss,self.ends = loss,ends

    def __call__(self, model: Callable) -> Any: return self.loss(model)

    def on_trained(self, why: str) -> None:
        if self.ends: raise LooksTrained(why)


def own_loss(
    batch: Any  # The model's inputs
) -> Callable[[Callable], Any] | None:  # `None` if they hold no labels
    "The loss that a model returns itself, as those of transformers and of torchvision's detection do for `labels`."
    if not _holds_labels(batch): return None
    args,kwargs = arguments(batch)
    return lambda model: _loss_in(model(*args, **kwargs))


def _holds_labels(o: Any) -> bool:
    if isinstance(o, Mapping): return 'labels' in o or any(map(_holds_labels, o.values()))
    return isinstance(o, (list, tuple)) and any(map(_holds_labels, o))


def _loss_in(out: Any) -> Tensor:
    "The loss in a model's output: `.loss`, the item `loss`, or the sum of a dict of losses."
    loss = out.get('loss') if isinstance(out, Mapping) else getattr(out, 'loss', None)
    if isinstance(loss, Tensor): return loss
    losses = list(out.values()) if isinstance(out, Mapping) else []
    if losses and all(isinstance(v, Tensor) and v.dim() == 0 for v in losses): return sum(losses)
    raise NoOwnLoss


class NoOwnLoss(Exception):
    "The model is given labels, and returns no loss."


class LossCheck:
    "The training loss before and after."
    def __init__(self,
        model: nn.Module,
        loss: Callable[[Callable], Any] | None  # As in `lsuv_init`
    ):
        self.model,self.loss = model,loss
        self.before = self.after = float('nan')
        # Of predicting zeros, of one answer for all samples, the mean output; and of the output times -1
        self.constant = self.same = self.negated = float('nan')
        self.trained = ''  # Why the model looks trained; "" if it does not
        self.error = ''  # Why the loss cannot be taken
        self.calls: list[_Call] = []  # Of the model, for the loss before
        self.outs: list[Any] = []  # Of these calls
        self.draws = False  # Whether the model draws random numbers as it trains
        self.current = False  # Whether `after` is that of the weights as they are now
        self.model_error: Exception | None = None
        self.generators = Generators()

    @property
    def pair(self) -> tuple[float, float] | None:
        "Loss before and after; `None` if it was not taken."
        return (self.before, self.after) if self.loss is not None and not self.error else None

    def take_before(self) -> None:
        "Take the loss of the model as it is, and of its output changed. Ask whether the model looks trained."
        self.before = self.after = self._take(self._run)
        if self.pair is None: return
        self.current = True
        self.constant,self.negated,self.same = map(self._of, (torch.zeros_like, _negated, _mean_over_samples))
        if self.constant == self.before: self.constant = float('nan')  # the model gives its loss itself
        self.trained,self.outs = _looks_trained(self),[]
        if self.trained: getattr(self.loss, 'on_trained', _warn)(self.trained)

    def _of(self, change: Callable[[Tensor], Tensor]) -> float:
        "The loss of the output, changed; NaN where it is not defined. A loss that the model gives itself stays."
        def changed(o): return change(o) if isinstance(o, Tensor) and o.is_floating_point() and o.dim() else o

        outs = iter(tree_map(changed, self.outs))
        loss,self.error = self._take(lambda *args, **kwargs: next(outs)),''
        return loss

    @property
    def has_floor(self) -> bool:
        "A loss that is negative for some output has no floor, and a ratio means nothing: that of a WGAN's critic, say."
        return not any(v < 0 for v in (self.before, self.constant, self.negated))

    def take_from(self,
        out: Any,  # What the model put out in a pass
        batch: Any,  # What it was given
        altered: bool  # Whether dropout was switched off in the pass
    ) -> None:
        """Take the loss after from a pass, if the pass ran the model as the loss does: once, on this mini-batch, under
        the same conditions, and with no random numbers drawn."""
        plain = _Call.of(self.model, *arguments(batch), training=True)
        if any_rank(self.pair is None or self.draws or altered or self.calls != [plain]): return
        calls: list[_Call] = []

        def given(*args, **kwargs):
            calls.append(_Call.of(self.model, args, kwargs))
            return out

        after = self._take(given)
        self.current = not any_rank(bool(self.error) or calls != [plain])
        if self.current: self.after = after
        self.error = ''

    def take_after(self, anew: bool = False) -> bool:  # Whether it took a forward
        "Take the loss of the model as LSUV has made it, unless it is known. One that cannot be taken counts as NaN."
        if self.pair is None or not any_rank(anew or not self.current): return False
        with forwards(self.model): self.after = self._take(self._run)
        self.error,self.outs = '',[]
        return True

    def _run(self, *args, **kwargs) -> Any:
        "The model, which leaves its output behind, and any error of its own."
        self.calls.append(_Call.of(self.model, args, kwargs))
        args,kwargs = cloned((args, kwargs))  # the model may write to its input
        try:
            with explained(self.model): self.outs.append(out := self.model(*args, **kwargs))
        except Exception as e:
            self.model_error = e
            raise
        return out

    @torch.no_grad()
    def _take(self, model: Callable) -> float:
        self.model.train()
        loss,error = float('nan'),''
        try:
            with self.generators.again():
                loss = self.loss(model)
                loss = float(loss.detach().float().mean() if isinstance(loss, Tensor) else loss)
                self.draws = self.draws or not self.generators.unused
        except Exception as e:
            if e is self.model_error: raise
            loss,error = float('nan'),f"{type(e).__name__}: {e}".splitlines()[0]
            if isinstance(e, NoOwnLoss): self.loss,error = None,''
        if any_rank(bool(error)): self.error = error or "another rank cannot take it"
        return mean_of_ranks(loss)

    @property
    def note(self) -> str:
        "What is to be said of the loss: why it was not taken, or that predicting zeros is much better."
        if self.error or self.pair is None: return self.error
        return f"predicting zeros gives {self.constant:.2g}" if 0 < 2*self.constant < self.after else ''

    def told(self, force: bool) -> str:
        "`note`, that the model looked trained, and that a far worse result was kept, as `force` asks."
        kept = "far worse, and kept with `force=True`" if force and self.failure else ''
        return '; '.join(filter(None, [self.trained.replace('looks', 'looked'), kept, self.note]))

    @property
    def failure(self) -> str:
        "What the loss says against the model as it is now, in words; \"\" if it does not."
        if self.pair is None or not isfinite(self.before): return ''
        reference = max(self.before, self.constant) if isfinite(self.constant) else self.before
        if isfinite(self.after) and (not self.has_floor or self.after <= _FAR*reference): return ''
        zeros = f", and predicting zeros gives {self.constant:.3g}" if isfinite(self.constant) else ''
        return f"the training loss is {self.after:.3g} after LSUV; it was {self.before:.3g} before{zeros}"


def _looks_trained(check: LossCheck) -> str:
    "Why the model looks trained, or \"\": the loss of an answer that is the same for all samples is far higher."
    if not check.has_floor or not check.before < _LOW[LEARNED]*check.same: return ''
    sign = sign_of(check.model)
    if sign == NEW or not check.before < _LOW[sign]*check.same: return ''
    if sign == MOVED and _n_samples(check.outs) < _LEAST_SAMPLES: return ''
    return f"it looks trained: its loss is {check.before:.2f}, a constant answer's {check.same:.2f}"


@dataclass(frozen=True)
class _Call:
    "A call of the model: what it was given, by identity, and the conditions."
    ids: list[int]
    training: bool
    autocast: list[tuple]  # Whether it is on, and its dtype, by device

    @classmethod
    def of(cls, model: nn.Module, args: Any, kwargs: Any, training: bool | None = None) -> _Call:
        autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ('cpu', 'cuda')]
        return cls([*map(id, tree_leaves((args, kwargs)))], model.training if training is None else training, autocast)


def _negated(o: Tensor) -> Tensor:
    "The output times -1, where it takes both signs: losses of samples, and what a ReLU puts out, do not."
    return -o if bool((o < 0).any()) else o


def _n_samples(outs: list[Any]) -> int:
    return sum(max((len(t) for t in tree_leaves(o) if isinstance(t, Tensor) and t.dim()), default=0) for o in outs)


def _mean_over_samples(o: Tensor) -> Tensor: return o.mean(0, keepdim=True).expand_as(o)


def _warn(why: str) -> None:
    warn_caller(f"LSUV was given a model of which the loss says that {why}. It replaces trained weights.")
