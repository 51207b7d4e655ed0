"A pass: one forward through the model in which hooks measure each unit, run the loops there, and hand on the corrected output."
from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .loops import AffineMeter, Meter, run_loops
from .moments import Moments, all_ranks, channel_moments, first_tensor, pool, whole_moments
from .units import LAYERS, Knob, Unit

__all__ = ['Goal', 'Seen', 'Passes', 'arguments', 'call', 'varies']

# A closed-form step costs nothing; a step of any other unit costs a run of the unit (the paper stops at 10 too).
_MAX_STEPS, _MAX_RUNS = 100, 10
# What is left of a float32 activation that does not vary, relative to its magnitude.
_NOISE = 1e-6


@dataclass(frozen=True)
class Goal:
    "What the loops are to reach."
    loops: tuple[tuple[str, ...], ...]
    mean: float
    std: dict[Unit, float]  # Target of each unit
    tol: float
    batch_tol: float
    per_channel: bool

    def met(self, unit: Unit, m: Moments) -> bool:
        "Whether a fresh mini-batch finds the unit's std (or, where no loop scales, its mean) within `batch_tol` of its target."
        mean,std = m.stats(self.per_channel)
        if self.loops and not any('std' in words for words in self.loops): return bool(abs(mean - self.mean).mean() <= self.batch_tol*self.std[unit])
        if not self.per_channel: return bool(std > 0 and abs(std/self.std[unit] - 1) <= self.batch_tol)
        std = std[std > 0]
        return len(std) > 0 and bool(abs(std/self.std[unit] - 1).mean() <= self.batch_tol)


@dataclass
class Seen:
    "What one pass saw of a unit."
    by_channel: bool  # Whether its moments tell channels apart: where its biases differ, or each is normalized
    shape: tuple[int, ...] = ()  # Of its output, in the last call
    moments: list[Moments] = field(default_factory=list)  # Of each call's output, under the weights as they now are

    @property
    def pooled(self) -> Moments: return pool(self.moments)


class Passes:
    """Passes through one model towards one goal.

    Call it with a mini-batch. Afterwards `seen` holds what each unit that ran put out, in order of execution, `found` the
    same of the last pass in which it ran, `corrected` how many passes changed it, `written` which were changed at all, given
    their first weights included, `reason` why it could not be brought to its goal, and `immovable` those whose bias does not
    move the mean."""
    def __init__(self,
        model: nn.Module,
        units: list[Unit],
        goal: Goal,
        watch: Callable[[int, int], object] | None = None,  # Told during a pass how many units of how many have been called
        start: Callable[[Unit], object] | None = None  # Gives a unit its first weights, when it is called for the first time
    ):
        self.model,self.units,self.goal,self.watch,self.start = model,units,goal,watch,start
        self._started: set[Unit] = set()
        self.written: set[Unit] = set()
        # What these are given may be overwritten before they run again: by a container itself, or by others' hooks.
        self._copied = {u for u in units if not isinstance(u.module, LAYERS) or u.module._forward_pre_hooks}
        self.seen: dict[Unit, Seen] = {}
        self.found: dict[Unit, Seen] = {}
        self.corrected: dict[Unit, int] = {u: 0 for u in units}
        self.reason: dict[Unit, str] = {}
        self.immovable: set[Unit] = set()
        self._nudges: dict[Unit, tuple[np.ndarray, np.ndarray]] = {}  # How far off, in logarithms, and the step that was taken
        self._owner: dict[Any, Unit] = {}  # Of each weight, the unit that ran first
        self._given: dict[Unit, Any] = {}  # What a unit that may have to run again was given
        self._raw: dict[Unit, tuple] = {}  # What layers put out, where others' hooks follow
        self._rerunning = False

    @torch.no_grad()
    def __call__(self,
        batch: Any,  # A tensor, or a tuple or dict of the model's inputs
        correct: bool = True  # Run the loops, or only measure
    ) -> bool:  # Whether any unit was changed
        self.last,self.seen,self._changed,self._correct = self.seen,{},set(),correct
        with self._hooked(), _eager():
            call(self.model, batch)
        if correct:
            for u in self.last.keys() & self.seen.keys():
                if len(self.seen[u].moments) > 1: self._nudge(u)
        self.found.update(self.seen)
        for u in self._changed: self.corrected[u] += 1
        self.written |= self._changed
        return bool(self._changed)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(lambda: (self._given.clear(), self._raw.clear()))
            def attach(register, f, **kw): stack.callback(register(partial(f, u), **kw).remove)
            for u in self.units:
                # Ahead of others' hooks, which may change the input or compute the weight, and run again when the unit does.
                if not u.affine or u.module._forward_hooks: attach(u.module.register_forward_pre_hook, self._keep_input, prepend=True, with_kwargs=True)
                if u.affine and u.module._forward_hooks: attach(u.module.register_forward_hook, self._keep_output, prepend=True)
                if self.start is not None: attach(u.module.register_forward_pre_hook, self._begin, prepend=True)
                attach(u.module.register_forward_hook, self._see)
            yield

    def _begin(self, u: Unit, module, args) -> None:
        """Start a unit when it is first called: the weight of one that never is, which its parent may use by itself, stays
        as it was while everything after it is measured."""
        if self._rerunning or not self._correct or u in self._started: return
        self._started.add(u)
        if not self._may_change(u): return
        self.written.add(u)
        self.start(u)
        torch.clear_autocast_cache()

    def _keep_input(self, u: Unit, module, args, kwargs) -> None:
        "Running a unit again needs what it was given."
        if self._correct and not self._rerunning: self._given[u] = _cloned((args, kwargs)) if u in self._copied else (args, kwargs)

    def _keep_output(self, u: Unit, module, args, out) -> None:
        "Another's forward hook may change a layer's output, which is then no longer affine in the weight."
        if not self._rerunning and isinstance(out, Tensor): self._raw[u] = (out, _version(out))

    def _see(self, u: Unit, module, args, out) -> Any:
        "The hook: measure the output, run the loops if it is off, return it corrected."
        if self._rerunning: return None
        x,raw,given = first_tensor(out),self._raw.pop(u, None),self._given.pop(u, None)
        if x is None or x.numel() == 0: return None
        may_change = self._correct and self._may_change(u)
        seen = self.seen.get(u)
        if seen is None: seen = self.seen[u] = Seen(self.goal.per_channel or bool(may_change and u.affine and _biases(u).ndim))
        seen.shape = tuple(x.shape)
        if self.watch is not None: self.watch(len(self.seen), len(self.units))
        seen.moments.append(self.measure(u, x, seen.by_channel))
        if not may_change: return None
        # Called several times, it is brought to its goal call by call in the first pass, and between the passes after that.
        if u in self.last and (len(self.last[u].moments) > 1 or len(seen.moments) > 1 or self.goal.met(u, seen.pooled)): return None
        if u.affine and (raw is None or (raw[0] is out and raw[1] == _version(out))): return self._solve(u, seen, x)
        return self._rerun(u, seen, given, out)

    def _may_change(self, u: Unit) -> bool:
        if u.left_alone or self.reason.get(u) in ('unresponsive', 'tied'): return False
        if not u.scales: self.reason[u] = 'unresponsive'
        elif self._owner.setdefault(u.scales[0].key, u) is not u: self.reason[u] = 'tied'
        return self.reason.get(u) not in ('unresponsive', 'tied')

    def _loop(self, u: Unit, meter: Meter, max_steps: int) -> str:
        target = self.goal.std[u]
        return run_loops(self.goal.loops, meter, self.goal.mean, target, self.goal.tol*min(1., target), max_steps)  # a small target asks for more

    @np.errstate(all='ignore')
    def _solve(self, u: Unit, seen: Seen, x: Tensor) -> None:
        "Run the loops of an affine unit on its moments, and mend its output in place by one fused multiply-add."
        b = _biases(u)
        if b.ndim and not seen.by_channel: return  # they were alike when it was first called; the next pass finds them differ
        z = [m.affine(1., -b) for m in seen.moments]
        meter = AffineMeter(pool(z), b, u.bias is not None, self.goal.per_channel)
        if varies(meter.z, seen.pooled): self.reason[u] = self._loop(u, meter, _MAX_STEPS)
        a,shift = meter.weight_scale,meter.bias_shift
        if self.reason.get(u) or ((a == 1).all() and (shift == 0).all()): return
        u.scales[0].mul(a)
        if u.bias is not None: u.bias.add(shift)
        self._mark(u)
        seen.moments = [m.affine(a, b + shift) for m in z]
        x = x.as_subclass(Tensor)
        if x.requires_grad: x = x.data  # the model takes a gradient by itself: it should be that of the new weights
        shape = [1]*x.dim()
        if x.dim(): shape[u.channel_dim] = -1
        def by_channel(v): return torch.as_tensor(v).to(x).reshape(shape)
        offset = (1 - a)*b + shift
        if not offset.any() and a.size == 1: x.mul_(a.item())
        elif a.size == 1: torch.add(by_channel(offset), x, alpha=a.item(), out=x)
        else: torch.addcmul(by_channel(offset), by_channel(a), x, out=x)

    def _rerun(self, u: Unit, seen: Seen, given: tuple[tuple, dict], out: Any) -> Any:
        "Run the loops by running the unit again on what it was given; returns the output of its last run."
        if not varies(seen.moments[-1]): return None
        for knob in list(u.scales):
            meter = _RunMeter(self, u, knob, given, seen.moments[-1], out)
            why = self._loop(u, meter, _MAX_RUNS)
            if why == 'immovable':  # the bias sits where it cannot move the mean (before a ReLU, say): leave it be
                meter.put_back()
                meter.can_shift = False
                why = self._loop(u, meter, _MAX_RUNS)
                if not why: self.immovable.add(u)
            self.reason[u] = why
            if not why:
                u.scales.sort(key=lambda k: k is not knob)
                if meter.moved: self._mark(u)
                seen.moments[-1] = meter.moments
                return meter.out
            meter.put_back()
        return None

    def _nudge(self, u: Unit) -> None:
        """Correct a unit that is called several times, after a pass that ran it as it was.

        Where its output comes back as its input, std grows as some power of the weight's scale: 1 where the calls have
        nothing to do with each other, the number of calls in a chain of as many layers. That power is read off the last two
        passes; it starts halfway."""
        m,goal = self.seen[u].pooled,self.goal
        if not self._may_change(u) or not varies(m) or goal.met(u, m): return
        mean,std = m.stats(goal.per_channel)
        calls = len(self.seen[u].moments)
        power = np.full_like(std, calls**0.5)
        with np.errstate(all='ignore'):
            height = np.log(std/goal.std[u])
            if u in self._nudges:
                height_before,step_before = self._nudges[u]
                slope = (height - height_before)/step_before
                power = np.where(np.isfinite(slope) & (slope > 0), slope.clip(0.5, 4*calls), power)
            step = np.where(np.isfinite(height), -height/power, 0.)
        self._nudges[u] = height,step
        u.scales[0].mul(np.exp(step))
        if u.bias is not None and u not in self.immovable and any('mean' in words for words in goal.loops): u.bias.add(goal.mean - mean)
        self._mark(u)

    def _mark(self, u: Unit) -> None:
        self._changed.add(u)
        torch.clear_autocast_cache()

    def measure(self, u: Unit, x: Tensor, by_channel: bool) -> Moments:
        "Moments of an output, on all ranks: of the whole, unless channels matter."
        return all_ranks(channel_moments(x, u.channel_dim, self.goal.per_channel) if by_channel else whole_moments(x))

    def run_again(self, u: Unit, given: tuple[tuple, dict]) -> Any:
        "What `u` puts out for what it was `given`, run alone."
        args,kwargs = _cloned(given) if u in self._copied else given
        self._rerunning = True
        try: return u.module(*args, **kwargs)
        finally: self._rerunning = False


class _RunMeter:
    "The loops' view of a unit that is measured by running it again, alone."
    affine = False
    def __init__(self, passes: Passes, unit: Unit, knob: Knob, given: tuple[tuple, dict], moments: Moments, out: Any):
        self.passes,self.unit,self.knob,self.given = passes,unit,knob,given
        self.can_shift,self.moved,self.stale = unit.bias is not None,False,False
        self.first = self.moments,self.out = moments,out
        self.was = [(k, k.copy()) for k in (knob, unit.bias) if k is not None]

    def stats(self):
        if self.stale:
            self.out = self.passes.run_again(self.unit, self.given)
            self.moments,self.stale = self.passes.measure(self.unit, first_tensor(self.out), self.moments.mean.ndim > 0),False
        return self.moments.stats(self.passes.goal.per_channel)

    def shift(self, by): self.unit.bias.add(by); self._touched()
    def scale(self, by): self.knob.mul(by); self._touched()

    def _touched(self):
        self.moved = self.stale = True
        torch.clear_autocast_cache()  # it may hold the weight as it was, in half precision

    def put_back(self):
        "Undo what was moved."
        for k, v in self.was: k.assign(v)
        self._touched()
        self.moments,self.out = self.first
        self.moved = self.stale = False


def varies(m: Moments, beside: Moments | None = None) -> bool:
    "Whether an activation varies by more than the rounding error of float32, in itself or `beside` what it is part of."
    _,std = m.stats()
    size = max(abs(o.mean).max() + o.var.max()**0.5 for o in ((m,) if beside is None else (m, beside)))
    return bool(std > _NOISE*size)


def _biases(u: Unit) -> np.ndarray:
    "The bias of an affine unit: (C,) float64, or a number if it has none or all are the same."
    b = getattr(u.layer, 'bias', None)
    if b is None: return np.float64(0)
    b = b.detach().to('cpu', torch.float64, copy=True).numpy()
    return b[0] if (b == b[0]).all() else b


def arguments(batch: Any) -> tuple[tuple, Mapping]:
    "Positional and keyword arguments that a model gets of a mini-batch: a tensor, or a tuple or dict of its inputs."
    if isinstance(batch, Mapping): return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def call(model: nn.Module, batch: Any) -> Any:
    "What `model` makes of a mini-batch."
    args,kwargs = arguments(batch)
    return model(*args, **kwargs)


def _version(t: Tensor) -> Any:
    "What changes when `t` is written to; in inference mode, where nobody counts, it may always have been."
    return object() if t.is_inference() else t._version


def _cloned(inputs: Any) -> Any:
    "Nested `inputs` with each tensor copied."
    return tree_map(lambda o: o.clone() if isinstance(o, Tensor) else o, inputs)


def _eager():
    "Run compiled modules as the plain ones they wrap, so that hooks see every layer."
    return torch.compiler.set_stance('force_eager') if hasattr(torch.compiler, 'set_stance') else nullcontext()
