"""What is normalized: a `Unit` is something whose output is measured, with the weight and the bias that it owns.

It is a module here. `discovery.OperationUnit` is a part of a parameter that operations use. A `Unit` knows its name,
its target, what was done to it and why not. What passes have seen of it is in `Unit.seen`. `Unit.verdict` decides its
`Status`. `selection` makes the units of a model, `correction` starts and measures them, `solvers` corrects them."""
from __future__ import annotations

from typing import Any, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ..measure.doubts import doubt, varies
from ..measure.moments import Moments
from ..measure.observations import RECENT, Observations
from ..parallel.sharded import Shards, class_of
from .status import DOUBTS, Status
from ..measure.targets import Target
from .weights import Parts, WeightRef, parts_of

__all__ = ['Unit']


class Unit:
    "A module whose output is measured, with the weight and the bias that it owns (`weights.parts_of`)."
    is_module = True  # Whether a call of the module puts out what is measured
    apart = False  # Whether some ranks of `torch.distributed` may run it and others not

    def __init__(self,
        name: str,  # As in `named_modules()`
        module: nn.Module,
        parts: Parts | None = None  # What its output is made with; by default what `parts_of` finds
    ):
        self.name,self.module,self.kind = name,module,class_of(module).__name__
        parts = parts or parts_of(module)
        self.layer,self.channel_dim,self.affine = parts.layer,parts.channel_dim,parts.affine
        self.weights,self.bias = parts.weights,parts.bias
        self.shards = Shards.inside(parts.layer if parts.layer is not None else module)
        self.anothers_bias: WeightRef | None = None  # A bias that a unit before this one owns
        self.left_alone = 'frozen' if parts.frozen else ''
        self.target: Target | None = None
        self.seen = Observations()
        # What is done, and why not
        self.passes = 0  # That changed the weight or the bias
        self.gain = 1.  # Factor of the weight since its start
        self.claimed = self.started = self.changed = self.written = False
        self.stale = False  # Other units have changed since it last ran
        self.reason = ''  # "unresponsive", "tied", "non-finite", or one of `DOUBTS`
        self.immovable = False  # The bias does not move the mean
        self.biases_differ: bool | None = None  # Whether the biases of its channels do; `None` until it is looked at

    def __repr__(self): return f'Unit({self.name!r}, {self.kind})'

    @property
    def refs(self) -> list[WeightRef]: return [*self.weights, *([self.bias] if self.bias else [])]

    @property
    def added(self) -> Tensor | None:
        "The bias that is in the output, whoever owns it."
        return getattr(self.layer, 'bias', None)

    @property
    def parameters(self) -> list[nn.Parameter]:
        "The parameters that may change with it."
        holders = [*([self.module] if self.module is not self.layer else []), *self.layer.modules()]
        return [p for m in holders for p in m._parameters.values() if p is not None]

    @property
    def versioned(self) -> Iterable[Tensor | None]:
        "The tensors whose version tells of a change."
        return [*self.layer._parameters.values(), *(r.value for r in self.refs if not r.has_setter)]

    @property
    def can_shift(self) -> bool: return self.bias is not None and not self.immovable

    # ---- A pass

    def begin_pass(self, fresh: bool = True) -> None:
        "Begin a pass, on another mini-batch than the last or (not `fresh`) on the same."
        self.seen.begin_pass(fresh, self.seen.now is not None and not self.doubts(self.seen.now.pooled))
        self.changed = False
        if self.reason in DOUBTS: self.reason = ''  # a fresh mini-batch may be better

    def end_pass(self) -> None:
        self.passes += self.changed
        self.written |= self.changed

    def claim(self, owners: dict[Any, Unit]) -> None:
        "Be the owner of the weight and the bias, unless a unit that ran before is. It is called once a weight."
        self.claimed = True
        if self.left_alone: return
        if not self.weights: self.reason = 'unresponsive'
        elif owners.setdefault(self.weights[0].key, self) is not self: self.reason = 'tied'
        if self.bias is not None and owners.setdefault(self.bias.key, self) is not self:
            self.anothers_bias,self.bias = self.bias,None

    @property
    def may_change(self) -> bool: return not self.left_alone and self.reason not in ('unresponsive', 'tied')

    def due(self) -> bool:
        "Whether to correct the unit now: in the first pass that runs it, and later if it is off its target."
        seen = self.seen
        return seen.last is None or not (seen.last.repeated or seen.now.repeated or self.met(self.judged()))

    def met(self, m: Moments) -> bool:
        "Whether these moments meet the target."
        return self.target.met(m, self.can_shift)

    def judged(self) -> Moments:
        "What tells whether the target is met: the last pass, or recent passes where mini-batches keep disagreeing."
        m = self.seen.latest.pooled
        return m if len(self.seen.earlier) < RECENT - 1 or self.met(m) else self.seen.recent()

    def doubts(self,
        m: Moments,
        x: Tensor | None = None  # The output that they are of, if it is at hand
    ) -> str:
        "Why the unit is not to be corrected from these moments, or \"\"."
        return doubt(m, self.target.gain(m), self.weights[0].rms_singular if self.weights else lambda: 1., x)

    def note_change(self, scale: np.ndarray | float = 1.) -> None:
        "Note that the bias or the weight has changed, the weight by a factor of `scale`."
        self.gain *= float(np.exp(np.mean(np.log(scale))) if np.ndim(scale) else scale)
        self.changed = True
        torch.clear_autocast_cache()  # it may hold the weight as it was, in half precision

    def finish(self) -> None:
        "Tell autograd, and all who look at a tensor's version, that the weights and biases have been written."
        if not self.written: return
        for t in set(self.versioned):
            if isinstance(t, Tensor) and not t.is_inference(): torch.autograd.graph.increment_version(t)

    def verdict(self) -> Status:
        "What became of the unit, as the last pass found it."
        if self.seen.latest is None: return Status.NOT_CALLED
        m = self.judged()
        if not m.finite(): return Status.NON_FINITE
        if not varies(m): return Status.CONSTANT
        why = self.left_alone or (self.reason if self.reason == 'tied' else '') or doubt(m, 1.)
        if why: return Status(why)
        if self.stale: return Status.OFF
        if not self.met(m): return Status(self.reason) if self.reason in ('unresponsive', *DOUBTS) else Status.OFF
        return Status.NO_BIAS if not self.can_shift and self.target.misses_mean(m) else Status.OK
