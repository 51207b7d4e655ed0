"""What is normalized: a `Unit` is an output that is measured, with the weight and the bias that it is made with.

Most units are a weight in the direction of its use: a parameter, or a view of one, that linear operations take. Others
are a block, a module that is measured as a whole. A `Unit` knows its name, its target, the plan of the present pass,
what was done to it and why not. What passes have seen of it is in `Unit.seen`."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from ..measure import RECENT, Moments, Observations, Target, doubt, varies
from ..parallel import class_of
from ..statuses import DOUBTS, Status
from .kinds import Parts, whole_of
from .refs import Factor, Ref, Refs
from .views import Layout

__all__ = ['Plan', 'Unit', 'block_unit', 'layer_unit', 'view_unit']

# Calls of a unit that its first pass corrects one by one. A cell may be called a thousand times.
_CALL_BY_CALL = 16


@dataclass
class Plan:
    "What a pass has found: to be applied to the weight and the bias once the pass is over."
    gain: Factor = 1.  # The weight is multiplied by it
    shift: Factor = 0.  # It is added to the bias

    def then(self, gain: Factor, shift: Factor) -> Plan:
        "This plan, and another after it."
        return Plan(self.gain*gain, self.shift + shift)


class Unit:
    "An output that is measured, with the weight and the bias that it is made with."
    def __init__(self,
        name: str,  # Of a layer or a block as in `named_modules()`, else as in `named_parameters()`: `experts.up[3]`
        module: nn.Module,  # The layer, the block, or the module that holds the weight
        weights: list[Refs],  # What may scale the output, likeliest first
        bias: Refs | None,  # What may shift it
        channel_dim: int = -1,  # Dimension of the output that holds the channels
        why: str = '',  # Why it is left alone, such as "frozen"
    ):
        self.name,self.module,self.kind = name,module,class_of(module).__name__
        self.weights,self.bias,self.channel_dim,self.left_alone = weights,bias,channel_dim,why
        self.is_block = self.apart = False
        self.called = False  # Whether the model has called this block
        self.layer: nn.Module | None = None  # Of a block: the layer whose weight makes its output
        self.recipe: tuple = ()  # What other ranks can make it of
        self.target: Target | None = None
        self.seen = Observations()
        self.plan: Plan | None = None  # Of this pass
        # What was done, and why not
        self.passes = 0  # That changed the weight or the bias
        self.gain = 1.  # Factor of the weight since its start
        self.started = self.written = False
        self.start = ''  # "mirrored", if it has that start
        self.stale = False  # Other units have changed since it last ran
        self.reason = ''  # "unresponsive", "non-finite", or one of `DOUBTS`
        self.immovable = False  # The bias does not move the mean

    def __repr__(self): return f'Unit({self.name!r}, {self.kind})'

    @property
    def weight(self) -> Refs: return self.weights[0]

    @property
    def layout(self) -> Layout: return self.weight.layout

    @property
    def refs(self) -> list[Refs]: return [*self.weights, *([self.bias] if self.bias else [])]

    @property
    def parameters(self) -> list[nn.Parameter]:
        "The parameters that it is made of."
        return list({id(r.param): r.param for r in self.refs if isinstance(r, Ref)}.values())

    @cached_property
    def zero_weight(self) -> bool:
        "Whether the weight is all zeros, as that of a layer that is to start at nothing. Its bias may mean something."
        if self.apart or not self.weights: return False  # ranks would have to ask at once
        return isinstance(self.weight, Ref) and self.weight.is_zero()

    @property
    def can_shift(self) -> bool: return self.bias is not None and not self.immovable

    @property
    def may_change(self) -> bool:
        return not self.left_alone and bool(self.weights) and self.reason != 'unresponsive' and not self.zero_weight

    # ---- A pass

    def begin_pass(self, fresh: bool = True) -> None:
        "Begin a pass, on another mini-batch than the last or (not `fresh`) on the same."
        seen = self.seen
        seen.begin_pass(fresh, seen.now is not None and not self.doubts(seen.now.pooled))
        self.plan = None
        if self.reason in (Status.NO_SIGNAL, *DOUBTS): self.reason = ''  # a fresh mini-batch may be better

    def due(self) -> bool:
        "Whether to correct the unit now: in the first pass that runs it, and later if it is off its target."
        seen = self.seen
        if seen.last is None: return seen.now.calls <= _CALL_BY_CALL
        return not (seen.now.calls > 1 or seen.last.calls > 1 or self.met(self.judged()))

    def apply(self) -> None:
        "Write the plan to the weight and the bias."
        plan,self.plan = self.plan,None
        self.weight.mul(plan.gain)
        if self.bias is not None and np.any(plan.shift): self.bias.add(plan.shift)
        self.gain *= float(np.exp(np.mean(np.log(plan.gain))))
        self.passes += 1
        self.written = True

    def note_start(self) -> None:
        "Note that the weight has got its start. The pass that corrects it counts as one with that."
        self.started = self.written = True
        self.passes = max(self.passes, 1)

    # ---- What was seen

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
        return doubt(m, self.target.gain(m), self.weight.rms_singular if self.weights else lambda: 1., x)

    def verdict(self) -> Status:
        "What became of the unit, as the last pass found it."
        if self.seen.latest is None: return Status.NOT_CALLED
        m = self.judged()
        if not m.finite(): return Status.NON_FINITE
        why = self.left_alone
        if self.zero_weight: return Status.CONSTANT
        if not why and self.reason == Status.NO_SIGNAL: return Status.NO_SIGNAL
        if not varies(m): return Status.CONSTANT
        if why := why or doubt(m, 1.): return Status(why)
        if self.stale: return Status.OFF
        if not self.weights and self.target.loops and not self.met(m): return Status.UNRESPONSIVE
        if not self.met(m):  # a pass that only measures notes no doubt
            why = self.reason or self.target.loops and self.doubts(m)
            return Status(why) if why in ('unresponsive', *DOUBTS) else Status.OFF
        return Status.NO_BIAS if not self.can_shift and self.target.misses_mean(m) else Status.OK


def view_unit(name: str, module: nn.Module, weight: Ref, bias: Ref | None, why: str) -> Unit:
    "The unit of a weight that linear operations take."
    free = bias if bias is not None and not bias.frozen else None
    return Unit(name, module, [weight], free, weight.layout.channel_dim, 'frozen' if weight.frozen else why)


def block_unit(name: str, module: nn.Module, parts: Parts) -> Unit:
    "The unit of a module that is measured as a whole."
    u = Unit(name, module, parts.weights, parts.bias, parts.channel_dim, 'frozen' if parts.frozen else '')
    u.is_block,u.layer = True,parts.layer
    return u


def layer_unit(name: str, layer: nn.Module) -> Unit:
    "The unit of a layer that no operation has used."
    is_attention = isinstance(layer, nn.MultiheadAttention)
    holder,at = (layer.out_proj, 'out_proj.weight') if is_attention else (layer, 'weight')
    weight = whole_of(f'{name}.{at}' if name else at, holder, 'weight')
    return Unit(name, layer, [weight], None, weight.layout.channel_dim, 'frozen' if weight.frozen else '')
