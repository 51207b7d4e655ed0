"What a Learner tells of why layers were not normalized, or should not have been. `Hints` says it beside the report."
from __future__ import annotations

from fastai.basics import Learner
from torch.utils.data import SequentialSampler

from ..lsuv import plain
from ..report import LSUVReport
from ..run import learned_layer

__all__ = ['Hints']


class Hints:
    "Made before LSUV changes the weights, and asked after it."
    def __init__(self,
        learn: Learner,
        held: set[int]  # Ids of the parameters that are known to be loaded, or were frozen
    ):
        self.learn,self.model = learn,plain(learn.model)
        frozen = {id(p) for p in self.model.parameters() if not p.requires_grad}
        self.learned = learned_layer(self.model, held | frozen)
        pretrained = vars(learn).get('pretrained') or not held <= frozen or learned_layer(self.model, ())
        self.new_but_frozen = bool(frozen) and not pretrained

    def of(self,
        report: LSUVReport,
        anyway: bool  # Whether weights that were loaded are initialized too
    ) -> list[str]:  # Sentences
        statuses,hints = {r.status for r in report},[]
        if self.learned and not anyway:
            hints.append(f"LSUV cannot tell whether {self.learned!r} is new: it looks trained, and the loss does not. "
                         "Where weights were loaded, freeze them, or load them after the callback is attached.")
        if self.new_but_frozen and 'frozen' in statuses:
            hints.append("The frozen layers look new: `learn.unfreeze()` and `learn.lsuv_init()` initialize them.")
        if hasattr(self.model, 'gen_mode') and hasattr(self.model, 'generator'):  # a `GANModule`
            other = 'critic' if self.model.gen_mode else 'generator'
            hints.append(f"One half of a GAN runs at a time: initialize the {other} before the fit, by "
                         f"`lsuv_init(learn.model.{other}, x)` with a mini-batch of its inputs.")
        if 'off' in statuses and self._in_order():
            hints.append("The training DataLoader does not shuffle, so its mini-batches differ: try `shuffle=True`.")
        return hints

    def _in_order(self) -> bool:
        "Whether training goes through the items in the order of the dataset."
        dl = self.learn.dls.train
        return not getattr(dl, 'shuffle', True) or isinstance(getattr(dl, 'sampler', None), SequentialSampler)
