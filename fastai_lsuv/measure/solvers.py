"""How a unit is corrected: by one of two solvers as it runs, or between passes.

`ClosedForm` is for a unit whose output is affine in its weight and bias. It runs the loops on moments, and mends the
output in place. `RunAgain` is for every other unit. It runs the unit again on the input it was given, as the loops ask.
`BetweenPasses` corrects a unit that is called several times in a forward pass, after a pass that ran it as it was.

`choose_solver` chooses one of the first two, a `Solver`, when a unit is found. It is given what the unit puts out
(`Solver.observe`). A unit that turns out to be called several times gets the last, from the second pass on
(`BetweenPasses.after_pass`). So does one that only some ranks run: an expert."""
from __future__ import annotations

from typing import Any, Callable, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .doubts import varies
from .loops import AffineMeter, Meter, run_loops
from .moments import Evidence, Moments, channel_moments, first_tensor, whole_moments
from ..parallel.ranks import pool_ranks
from ..parallel.sharded import Portion, is_engine_hook, portion, reduced, whole
from ..units.units import Unit
from ..units.weights import WeightRef, is_layer

__all__ = ['Solver', 'ClosedForm', 'RunAgain', 'BetweenPasses', 'choose_solver', 'measure', 'biases', 'cloned']

# A closed-form step costs nothing. A step of any other unit costs a run of the unit (the paper stops at 10 too).
_MAX_STEPS,_MAX_RUNS = 100,10


def measure(
    u: Unit,
    x: Tensor,  # Its output
    by_channel: bool,  # Whether channels matter, or the whole is enough
    around: Evidence  # What is known beside the output. It may hold fewer samples than the output seems to
) -> Moments | None:  # `None` if no rank holds an element
    "Moments of an output, pooled over all ranks."
    with torch._C.DisableTorchFunction():  # what happens in here is not the model's
        part,m = portion_of(u, reduced(x)),None
        x = part.local
        if x.numel(): m = channel_moments(x, u.channel_dim, u.target.per_channel) if by_channel else whole_moments(x)
    if m is not None:
        samples,top,*_ = m.evidence
        m = Moments(m.count, m.mean, m.var, around._replace(samples=min(samples, around.samples), top=top))
    return m if u.apart else pool_ranks(m, u.name, part.first)


def portion_of(u: Unit, x: Tensor) -> Portion:
    "What this rank holds of the output `x` of `u`."
    weight = next((w for w in u.weights if w.name == 'weight'), None)
    return portion(x, u.channel_dim, weight and weight.tensor, weight.out_dim if weight else 0)


def biases(u: Unit) -> np.ndarray:
    "The bias of an affine unit: (C,) float64, or a number if it has none or all are the same."
    b = u.added
    if b is None: return np.float64(0)
    b = whole(b.detach()).to('cpu', torch.float64, copy=True).numpy()
    return b[0] if (b == b[0]).all() else b


def _loop(u: Unit, meter: Meter, max_steps: int) -> str:
    "Run the loops of `u`; a target std below 1 asks for a smaller tolerance."
    t = u.target
    return run_loops(t.loops, meter, t.mean, t.std, t.tol*min(1., t.std), max_steps)


def _version(t: Tensor) -> Any:
    "What changes when `t` is written to. Inference tensors have no version. Each is taken as changed."
    return object() if t.is_inference() else t._version


def cloned(inputs: Any) -> Any:
    "Nested `inputs` with each tensor copied."
    return tree_map(lambda o: o.clone() if isinstance(o, Tensor) else o, inputs)


class Solver(Protocol):
    "How a unit is corrected where it runs."
    needs_input: bool  # Whether it is shown the input of a module (`keep_input`), before other hooks change it
    needs_output: bool  # Whether it is shown the output (`keep_output`), before other hooks change it
    running: bool  # Whether it runs the unit again
    def keep_input(self, args: tuple, kwargs: dict) -> None: ...
    def keep_output(self, out: Any) -> None: ...
    def keep_call(self, again: Callable[[], Any]) -> None:
        "Keep what runs a unit again that is no module."
    def observe(self, out: Any) -> Any:
        "Correct the unit by its output. Returns the corrected output, or `None` if `out` is to go on."
    def clear(self) -> None:
        "Let go of what was kept."


class RunAgain:
    "Runs the unit again on the input it was given, as often as the loops ask."
    needs_input,needs_output = True,False

    def __init__(self, unit: Unit):
        self.unit,self.running = unit,False
        # A container, or another's hook, may overwrite the input before the unit runs again.
        self.copies = unit.is_module and (not is_layer(unit.module) or bool(unit.module._forward_pre_hooks))
        self.again: Callable[[], Any] | None = None

    def keep_input(self, args: tuple, kwargs: dict) -> None:
        if self.running: return
        kept = cloned((args, kwargs)) if self.copies else (args, kwargs)

        def again():
            args,kwargs = cloned(kept) if self.copies else kept
            return self.unit.module(*args, **kwargs)

        self.keep_call(again)

    def keep_output(self, out: Any) -> None: ...

    def keep_call(self, again: Callable[[], Any]) -> None: self.again = again

    def clear(self) -> None: self.again = None

    def run(self) -> Any:
        "What the unit puts out for its input, with its weights as they now are."
        self.running = True
        try: return self.again()
        finally: self.running = False

    def observe(self, out: Any) -> Any:  # The output to go on with, or `None` for `out`
        "Run the loops with each weight that may scale the output, until one responds."
        u = self.unit
        if not varies(u.seen.now.moments[-1]): return None
        for weight in list(u.weights):
            meter = RunAgainMeter(self, weight, out)
            why = _loop(u, meter, _MAX_RUNS)
            if why == 'immovable':  # the bias cannot move the mean (it sits before a ReLU, say), and stays as it was
                meter.put_back()
                meter.can_shift = False
                why = _loop(u, meter, _MAX_RUNS)
                u.immovable = u.immovable or not why
            u.reason = why
            if not why: return self._accept(meter)
            meter.put_back()
        return None

    def _accept(self, meter: RunAgainMeter) -> Any:
        u = self.unit
        if meter.weight is not u.weights[0]:
            u.weights.sort(key=lambda w: w is not meter.weight)
            u.claimed = False  # another unit may own this weight
        if meter.moved:
            u.note_change(meter.gain)
            u.seen.earlier = []
        u.seen.now.moments[-1] = meter.moments
        return meter.out


class RunAgainMeter:
    "The loops' view of a unit that runs again for each measurement."
    affine = False

    def __init__(self, solver: RunAgain, weight: WeightRef, out: Any):
        u = solver.unit
        self.solver,self.unit,self.weight = solver,u,weight
        self.can_shift = u.can_shift
        self.first = u.seen.now.moments[-1],out
        self.was = [(r, r.copy()) for r in (weight, u.bias) if r is not None]
        self._reset()

    def stats(self) -> tuple[np.ndarray, np.ndarray]:
        if self.stale:
            self.out = self.solver.run()
            now = self.unit.seen.now
            self.moments = measure(self.unit, first_tensor(self.out), now.by_channel, now.around)
            self.stale = False
        return self.moments.stats(self.unit.target.per_channel)

    def shift(self, by: np.ndarray) -> None:
        self.unit.bias.add(by)
        self._touched()

    def scale(self, by: np.ndarray) -> None:
        self.weight.mul(by)
        self.gain = self.gain*by
        self._touched()

    def _touched(self) -> None:
        self.moved = self.stale = True
        torch.clear_autocast_cache()

    def put_back(self) -> None:
        "Undo what was moved."
        for ref, value in self.was: ref.assign(value)
        torch.clear_autocast_cache()
        self._reset()

    def _reset(self) -> None:
        self.moments,self.out = self.first
        self.gain = np.float64(1)
        self.moved = self.stale = False


class ClosedForm:
    """Runs the loops on the moments of the unit's output, and mends the output in place.

    Another's forward hook may change the output, which is then no longer affine in the weight: the unit runs again."""
    def __init__(self, unit: Unit):
        self.unit,self.raw = unit,None
        hooked = unit.is_module and not all(map(is_engine_hook, unit.module._forward_hooks.values()))
        self.fallback = RunAgain(unit) if hooked else None
        self.needs_input = self.needs_output = hooked

    @property
    def running(self) -> bool: return self.fallback is not None and self.fallback.running

    def keep_input(self, args: tuple, kwargs: dict) -> None: self.fallback.keep_input(args, kwargs)

    def keep_output(self, out: Any) -> None:
        if isinstance(out, Tensor) and not self.running: self.raw = out,_version(out)

    def keep_call(self, again: Callable[[], Any]) -> None: ...  # one output tells all

    def clear(self) -> None:
        self.raw = None
        if self.fallback is not None: self.fallback.clear()

    def observe(self, out: Any) -> Any:  # The output to go on with, or `None` for `out`
        raw,self.raw = self.raw,None
        if raw is not None and not (raw[0] is out and raw[1] == _version(out)): return self.fallback.observe(out)
        with torch._C.DisableTorchFunction(): self._solve(first_tensor(out))
        return None

    @np.errstate(all='ignore')
    def _solve(self, x: Tensor) -> None:
        u,b,now = self.unit,biases(self.unit),self.unit.seen.now
        if b.ndim and not now.by_channel:  # the biases have come to differ since they were looked at
            u.biases_differ = True
            if now.repeated: return  # the next pass sees all calls by channel
            now.by_channel,now.moments = True,[measure(u, x, True, now.around)]
        recent = u.seen.recent()
        meter = AffineMeter(recent.affine(1., -b), b, u.bias is not None, u.target.per_channel)
        if varies(meter.z, recent): u.reason = _loop(u, meter, _MAX_STEPS)
        a,shift = meter.weight_scale,meter.bias_shift
        if u.reason or ((a == 1).all() and (shift == 0).all()): return
        u.weights[0].mul(a)
        if u.bias is not None: u.bias.add(shift)
        u.note_change(a)
        offset = (1 - a)*b + shift
        u.seen.transform(a, offset)
        _mend(portion_of(u, x), a, offset, u.channel_dim)


def _mend(part: Portion, a: np.ndarray, offset: np.ndarray, channel_dim: int) -> None:
    "Make an output `x` hold `a*x + offset`, each one number or one a channel."
    x = part.local.as_subclass(Tensor)
    if not x.numel(): return
    mine = slice(part.first, part.first + x.shape[channel_dim] if x.dim() else None)
    a,offset = (v[mine] if v.size > 1 else v for v in (a, offset))
    offset = offset/part.terms
    if x.requires_grad: x = x.data  # the model takes a gradient by itself: it should be that of the new weights
    shape = [1]*x.dim()
    if x.dim(): shape[channel_dim] = -1

    def by_channel(v): return torch.from_numpy(v).to(x).reshape(shape) if v.ndim else x.new_tensor(v.item())

    if not offset.any() and a.size == 1: x.mul_(a.item())
    elif a.size == 1: torch.add(by_channel(offset), x, alpha=a.item(), out=x)
    else: torch.addcmul(by_channel(offset), by_channel(a), x, out=x)


class BetweenPasses:
    """Corrects a unit that is called several times, after a pass that ran it as it was.

    Where its output comes back as its input, the std grows as some power of the weight's scale: 1 where the calls have
    nothing to do with each other, the number of calls in a chain of as many layers. The last two passes tell that power
    (the secant method). It starts at the root of the number of calls."""
    def __init__(self, unit: Unit):
        self.unit = unit
        self.height: np.ndarray | None = None  # Logarithm of std over target, in the pass before
        self.step: np.ndarray | None = None  # Logarithm of the factor that followed

    @np.errstate(all='ignore')
    def after_pass(self) -> bool:
        "Correct the unit if it is off its target. Returns whether it was changed."
        u,t,m = self.unit,self.unit.target,self.unit.seen.now.pooled
        if not varies(m) or u.met(m): return False
        u.reason = u.doubts(m)
        if u.reason: return False
        mean,std = m.stats(t.per_channel)
        calls = len(u.seen.now.moments)
        power,height = np.full_like(std, calls**0.5),np.log(std/t.std)
        if self.height is not None:
            slope = (height - self.height)/self.step
            power = np.where(np.isfinite(slope) & (slope > 0), slope.clip(0.5, 4*calls), power)
        step = np.where(np.isfinite(height), -height/power, 0.) if t.scales else np.zeros_like(std)
        self.height,self.step = height,step
        u.weights[0].mul(np.exp(step))
        if u.can_shift and t.shifts: u.bias.add(t.mean - mean)
        u.note_change(np.exp(step))
        return True


def choose_solver(unit: Unit) -> Solver:
    return ClosedForm(unit) if unit.affine else RunAgain(unit)
