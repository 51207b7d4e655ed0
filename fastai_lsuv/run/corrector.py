"""What happens to a unit as the model runs it: `Corrector` measures, plans a correction, and mends the output.

It is the `Observer` of a pass. Units are shown to it in the order of execution, so everything upstream is right when a
unit is measured. It writes to outputs alone: the plans are applied to the weights once the pass is over.

A weight that linear operations take has a closed form. The loops run on moments, and the output is mended in place. A
block is run again, as often as the loops ask. A unit that is called several times is planned call by call in the first
pass that runs it, and after later ones from all calls together."""
from __future__ import annotations

import sys
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from ..measure import (AffineMeter, Evidence, Meter, Moments, Observation, channel_moments, first_tensor, n_samples,
                       pool_ranks, run_loops, samples_alike, varies, whole_moments)
from ..observe import NormWatch, Use
from ..parallel import digest, local, portion, reduced, several_ranks, whole
from ..statuses import Status
from ..units import Plan, Ref, Unit

__all__ = ['Corrector']

# A closed-form step costs nothing. A step of a block costs a run of it (the paper stops at 10 too).
_MAX_STEPS,_MAX_RUNS = 100,10


class Corrector:
    "Measures units, plans their corrections, and mends their outputs."
    in_graph = False

    def __init__(self, watch: Callable[[int], object] | None = None):
        self.watch = watch  # Told how many units have run in this pass
        self.changes = self.busy = False
        self.ran: list[Unit] = []  # The units that have run in this pass, in order
        self.norms = NormWatch()
        self.samples,self.alike,self.batch = sys.maxsize,False,0.  # Of this mini-batch
        self.owners: dict[Any, Unit] = {}  # Of what scales blocks, the unit that took it first
        self.waits: Callable[[Unit], bool] = lambda u: False  # Whether a unit is to get a start after this pass

    def begin_pass(self, changes: bool, batch: Any = None, fresh: bool = True) -> None:
        "Begin a pass that corrects units if it `changes` them. The arguments are those of `Passes`."
        self.changes,self.ran = changes,[]
        self.norms.reset()
        if fresh and batch is not None:
            self.samples,self.alike,self.batch = n_samples(batch),samples_alike(batch),digest(batch)

    # ---- As an observer

    def observe(self, use: Use, out: Any) -> Any:
        u = use.unit
        with torch._C.DisableTorchFunction():  # what happens in here is not the model's
            x = first_tensor(out)
            if x is None or x.is_nested: return out
            if use.rows is not None: x = x[use.rows]  # a view: what mends it mends the whole
            b = _biases(use.bias)*use.times if use.is_row else np.float64(0)
            if u.plan is not None:
                _mend(u, x, use, b, u.plan)
                b = b + u.plan.shift if u.bias is not None else b
            by_channel = u.target.per_channel or self.changes and u.may_change and b.ndim > 0
            if not self._record(u, x, bool(by_channel), self.samples): return out
            m = u.seen.now.moments[-1]
            z = m.affine(1., -b) if b.ndim == 0 or m.mean.ndim else m  # without the bias
            if _is_silent(u, z, m, not self.alike and self.norms.spread == 1.): return out
            if self._is_due(u, x, z): self._plan(u, x, use, b)
        return out

    def observe_block(self, u: Unit, out: Any, again: Callable, args: tuple) -> Any:
        with torch._C.DisableTorchFunction():
            x = first_tensor(out)
            if x is None or not self._record(u, x, u.target.per_channel): return out
            if not self._is_due(u, x, u.seen.now.moments[-1]): return out
        was,self.busy = self.busy,True
        try: return self._plan_block(u, out, again)
        finally: self.busy = was

    def _record(self, u: Unit, x: Tensor, by_channel: bool, samples: int = sys.maxsize) -> bool:
        "Measure a unit's output, and note what is seen. Returns whether there was anything to see."
        if x.numel() == 0 and not several_ranks(): return False
        now,norms = u.seen.now or Observation(by_channel),self.norms
        # An operation may see the tokens of a sample as rows. They count as one sample.
        now.around = Evidence(samples, 0., norms.spread, norms.normed, self.alike, self.batch)
        m = measure(u, x, now.by_channel, now.around)
        if m is None: return False
        if u.seen.now is None:
            u.seen.now = now
            self.ran.append(u)
        now.shape = tuple(x.shape)
        now.moments.append(m)
        if self.watch is not None: self.watch(len(self.ran))
        return True

    def _is_due(self, u: Unit, x: Tensor, z: Moments) -> bool:
        "Whether to plan a correction now. If the moments without the bias are in doubt, `Unit.reason` says why."
        if u.apart or not (self.changes and u.may_change and u.due()): return False
        if self.waits(u): return False
        u.reason = u.doubts(z, local(x))
        return not u.reason

    # ---- Plans

    @np.errstate(all='ignore')
    def _plan(self, u: Unit, x: Tensor, use: Use, b: np.ndarray) -> None:
        "Run the loops on moments, and mend the output."
        if not use.is_row: return self._plan_sum(u, x, use)
        recent = u.seen.recent()
        meter = AffineMeter(recent.affine(1., -b), b, u.bias is not None, u.target.per_channel)
        if varies(meter.z, recent): u.reason = _loop(u, meter, _MAX_STEPS)
        a,shift = meter.weight_scale,meter.bias_shift
        if u.reason or (np.all(a == 1) and not np.any(shift)): return
        u.seen.transform(a, (1 - a)*b + shift)
        _mend(u, x, use, b, Plan(a, shift))
        u.plan = u.plan.then(a, shift) if u.plan is not None else Plan(a, shift)

    def _plan_sum(self, u: Unit, x: Tensor, use: Use) -> None:
        "Run the loops on the sum of the product and a tensor of any shape, as `torch.addmm` gives it."
        z,b = x - use.times*use.bias.detach(),use.times*use.bias.detach()
        u.immovable = u.immovable or u.target.per_channel  # the bias holds other numbers than one a channel

        def again(weight: Ref, plan: Plan) -> Tensor:
            return z*_by_channel(plan.gain, u, x) + b + float(plan.shift)

        new = self._plan_block(u, x, again)
        if new is not x: x.copy_(new)

    def _plan_block(self, u: Unit, out: Any, again: Callable) -> Any:
        "Run the loops with each weight that may scale the output, until one responds. Returns what to go on with."
        if not varies(u.seen.now.moments[-1]): return out
        free = [w for w in u.weights if self.owners.get(w.key, u) is u]
        for weight in free:
            meter = AgainMeter(u, weight, out, again)
            why = _loop(u, meter, _MAX_RUNS)
            if why == 'immovable':  # the bias cannot move the mean (it sits before a ReLU, say), and stays as it was
                meter = AgainMeter(u, weight, out, again)
                meter.can_shift = False
                why = _loop(u, meter, _MAX_RUNS)
                u.immovable = u.immovable or not why
            u.reason = why
            if why: continue
            u.weights.sort(key=lambda w: w is not weight)
            self.owners[weight.key] = u
            if meter.moved: u.plan,u.seen.earlier = meter.plan,[]
            u.seen.now.moments[-1] = meter.moments
            return meter.out
        if len(free) < len(u.weights): u.left_alone = 'tied'
        return out


def _is_silent(
    u: Unit,
    z: Moments,  # Of its output without its bias
    m: Moments,  # Of its output
    differ: bool  # Whether the samples differ
) -> bool:
    "Whether a unit puts out nothing but its bias, although the samples differ. One that does in all calls is noted."
    if varies(z, m): u.reason = '' if u.reason == Status.NO_SIGNAL else u.reason
    elif u.seen.now.calls == 1 and differ: u.reason = Status.NO_SIGNAL
    return u.reason == Status.NO_SIGNAL


class AgainMeter:
    "The loops' view of a unit that runs again for each measurement."
    affine = False

    def __init__(self, u: Unit, weight: Any, out: Any, again: Callable):
        self.unit,self.weight,self.out,self.again = u,weight,out,again
        self.can_shift,self.plan,self.moments = u.can_shift,Plan(np.float64(1), np.float64(0)),u.seen.now.moments[-1]
        self.moved = self.stale = False

    def stats(self) -> tuple[np.ndarray, np.ndarray]:
        if self.stale:
            self.out = self.again(self.weight, self.plan)
            now = self.unit.seen.now
            with torch._C.DisableTorchFunction():
                self.moments = measure(self.unit, first_tensor(self.out), now.by_channel, now.around)
            self.stale = False
        return self.moments.stats(self.unit.target.per_channel)

    def shift(self, by: np.ndarray) -> None:
        self.plan = Plan(self.plan.gain, self.plan.shift + by)
        self.moved = self.stale = True

    def scale(self, by: np.ndarray) -> None:
        self.plan = Plan(self.plan.gain*by, self.plan.shift)
        self.moved = self.stale = True


def measure(
    u: Unit,
    x: Tensor,  # Its output
    by_channel: bool,  # Whether channels matter, or the whole is enough
    around: Evidence  # What is known beside the output. It may hold fewer samples than the output seems to
) -> Moments | None:  # `None` if no rank holds an element
    "Moments of an output, pooled over all ranks."
    part,m = _portion(u, reduced(x)),None
    x = part.local
    if x.numel(): m = channel_moments(x, u.channel_dim, u.target.per_channel) if by_channel else whole_moments(x)
    if m is not None:
        samples,top,*_ = m.evidence
        m = Moments(m.count, m.mean, m.var, around._replace(samples=min(samples, around.samples), top=top))
    return m if u.apart else pool_ranks(m, u.name, part.first, part.share)


def _portion(u: Unit, x: Tensor):
    "What this rank holds of the output `x` of `u`."
    w = u.weights[0] if u.weights and isinstance(u.weights[0], Ref) else None
    return portion(x, u.channel_dim, w.param if w is not None else None, w.layout.channels[0] if w is not None else 0)


def _biases(b: Tensor | None) -> np.ndarray:
    "A bias: (C,) float64, or a number if it is none or all are the same."
    if b is None: return np.float64(0)
    b = whole(b.detach()).to('cpu', torch.float64, copy=True).flatten().numpy()
    return b[0] if len(b) == 0 or (b == b[0]).all() else b


def _loop(u: Unit, meter: Meter, max_steps: int) -> str:
    "Run the loops of `u`; a target std below 1 asks for a smaller tolerance."
    t = u.target
    return run_loops(t.loops, meter, t.mean, t.std, t.tol*min(1., t.std), max_steps)


def _mend(u: Unit, x: Tensor, use: Use, b: np.ndarray, plan: Plan) -> None:
    "Make an output hold what it will once a plan is applied: `a*x + (1 - a)*b + shift`."
    a,shift = (np.asarray(v, dtype=np.float64) for v in (plan.gain, plan.shift))
    part = _portion(u, x)
    x = part.local
    if not x.numel(): return
    x = x.data if x.requires_grad else x.as_subclass(Tensor)
    if not use.is_row:
        z = use.times*use.bias.detach()
        x.sub_(z).mul_(_by_channel(a, u, x)).add_(z).add_(float(shift))
        return
    offset = ((1 - a)*b + (shift if u.bias is not None else 0.))/part.terms
    mine = slice(part.first, part.first + x.shape[u.channel_dim] if x.dim() else None)
    a,offset = (v[mine] if v.size > 1 else v for v in (a, offset))
    if not offset.any() and a.size == 1: x.mul_(a.item())
    elif a.size == 1: torch.add(_by_channel(offset, u, x), x, alpha=a.item(), out=x)
    else: torch.addcmul(_by_channel(offset, u, x), _by_channel(a, u, x), x, out=x)


def _by_channel(v: np.ndarray | float, u: Unit, x: Tensor) -> Tensor:
    "One number, or one a channel, in a shape that broadcasts with an output `x` of `u`."
    if not np.ndim(v): return x.new_tensor(float(v))
    shape = [1]*x.dim()
    if x.dim(): shape[u.channel_dim] = -1
    return torch.from_numpy(v).to(x).reshape(shape)
