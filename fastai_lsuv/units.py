"""What is normalized: a `Unit` is a module whose output is measured, with the weight and the bias that it owns.

A `Unit` knows its name, its target, what passes have seen of it (`Observation`), what was done to it and why not.
`find_units` makes them from a model and the `modules` argument, and decides which are left alone. Its `verdict` is the
one place where a `Status` is decided. `solvers` corrects units, `passes` shows them their output."""
from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .evidence import Doubt, doubt, mean_tolerance, varies
from .loops import Loops
from .moments import Moments, pool
from .weights import WeightRef, is_affine, is_layer, kind_of, layer_of, own, weights_of

__all__ = ['Status', 'Target', 'Observation', 'Unit', 'select_modules', 'measurable', 'find_units']

# Recent passes whose moments are pooled where fresh mini-batches keep disagreeing.
_RECENT = 4
# With `per_channel`, one channel may be this many `batch_tol`s off while their mean is within one.
_ONE_CHANNEL = 5


class Status(str, Enum):
    "What became of a unit. `report.STATUSES` says it in a sentence."
    OK = 'ok'
    NO_BIAS = 'no bias'
    OFF = 'off'
    FROZEN = 'frozen'
    TIED = 'tied'
    CONSTANT = 'constant'
    UNRESPONSIVE = 'unresponsive'
    ALIKE = 'alike'
    OUTLIER = 'outlier'
    NOT_CALLED = 'not called'
    NON_FINITE = 'non-finite'
    UNDONE = 'undone'


@dataclass(frozen=True)
class Target:
    "What the loops are to reach at a unit."
    loops: Loops
    mean: float
    std: float
    tol: float  # Within the mini-batch in use
    batch_tol: float  # On a fresh mini-batch, as a share of `std`
    per_channel: bool

    @property
    def scales(self) -> bool:
        "Whether any loop aims at the std. `layer_stats` has no loops, and judges by the std."
        return not self.loops or any('std' in words for words in self.loops)

    @property
    def ends_with_mean(self) -> bool:
        "Whether the order leaves the mean at its target: a std loop after the last mean loop moves it again."
        return bool(self.loops) and 'mean' in self.loops[-1]

    @property
    def shifts(self) -> bool: return any('mean' in words for words in self.loops)

    def std_met(self, m: Moments) -> bool:
        "Whether the std is within `batch_tol` of its target; with `per_channel`, of most channels, and none far off."
        _,std = m.stats(self.per_channel)
        if not self.per_channel: return bool(std > 0 and abs(std/self.std - 1) <= self.batch_tol)
        off = abs(std[std > 0]/self.std - 1)
        return off.size > 0 and bool(off.mean() <= self.batch_tol and off.max() <= _ONE_CHANNEL*self.batch_tol)

    def mean_met(self, m: Moments) -> bool:
        "Whether the mean is as close to its target as so many samples can tell."
        mean,_ = m.stats(self.per_channel)
        return bool(abs(mean - self.mean).mean() <= mean_tolerance(m.evidence, self.batch_tol)*self.std)


@dataclass
class Observation:
    "What one pass sees of a unit."
    by_channel: bool  # Whether the moments tell channels apart: biases differ, or each channel is normalized
    shape: tuple[int, ...] = ()  # Of the output, in the last call
    moments: list[Moments] = field(default_factory=list)  # Of each call's output, under the weights as they now are

    @property
    def pooled(self) -> Moments: return pool(self.moments)

    @property
    def repeated(self) -> bool: return len(self.moments) > 1


class Unit:
    """A module whose output is measured, with the weight and the bias that it owns.

    A container owns those of the first affine layer inside it, unless it has a `weight` or `bias` (a property, as the
    lesson-11 `ConvLayer`'s `bias`) of its own."""
    def __init__(self,
        name: str,  # As in `named_modules()`
        module: nn.Module
    ):
        self.name,self.module,self.kind = name,module,type(module).__name__
        self._find_weights()
        self.target: Target | None = None
        # What passes see
        self.seen: Observation | None = None  # In this pass
        self.last: Observation | None = None  # In the last pass before this one that ran it
        self.history: list[Moments] = []  # Of recent passes, under the weights as they now are
        self.comparable = True  # Whether what this pass sees can be pooled with what the next sees
        # What is done, and why not
        self.passes = 0  # That changed the weight or the bias
        self.gain = 1.  # Factor of the weight since its start
        self.started = self.changed = self.written = False
        self.reason = ''  # "unresponsive", "tied", "non-finite", or a `Doubt`
        self.immovable = False  # The bias does not move the mean

    def _find_weights(self) -> None:
        self.layer = layer_of(self.module)
        inside = self.layer is not self.module
        weights = inside and own(self.module, 'weight') or (weights_of(self.layer) if self.layer is not None else [])
        bias = inside and own(self.module, 'bias') or (own(self.layer, 'bias') if self.layer is not None else [])
        self.left_alone = 'frozen' if weights and all(w.frozen() for w in weights) else ''
        self.weights = [w for w in weights if not w.frozen()]  # What may scale the output, likeliest first
        self.bias: WeightRef | None = next((b for b in bias if not b.frozen()), None)
        self.anothers_bias: WeightRef | None = None  # A bias that a unit before this one owns
        kind = kind_of(self.layer) if self.layer is not None else None
        self.channel_dim = kind.channel_dim if kind else -1
        if isinstance(self.layer, _ConvNd): self.channel_dim = -1 - len(self.layer.kernel_size)
        self.affine = is_affine(self.module)

    def __repr__(self): return f'Unit({self.name!r}, {self.kind})'

    @property
    def refs(self) -> list[WeightRef]: return [*self.weights, *([self.bias] if self.bias else [])]

    def biases(self) -> np.ndarray:
        "The bias of an affine unit: (C,) float64, or a number if it has none or all are the same."
        b = getattr(self.layer, 'bias', None)
        if b is None: return np.float64(0)
        b = b.detach().to('cpu', torch.float64, copy=True).numpy()
        return b[0] if (b == b[0]).all() else b

    @property
    def can_shift(self) -> bool: return self.bias is not None and not self.immovable

    # ---- A pass

    def begin(self) -> None:
        "Begin a pass."
        if self.seen is not None:
            self.last = self.seen
            m = self.seen.pooled
            if self.comparable and not self.doubts(m): self.history.append(m)
        self.seen,self.changed,self.comparable = None,False,True
        if self.reason in tuple(Doubt): self.reason = ''  # a fresh mini-batch may be better

    def forget(self) -> None:
        "Forget what passes have seen."
        self.seen = self.last = None
        self.history = []

    @property
    def latest(self) -> Observation | None: return self.seen or self.last

    def claim(self, owners: dict[Any, Unit]) -> bool:
        "Whether the unit may be changed: the first unit that runs with a weight or a bias owns it."
        if self.left_alone or self.reason in ('unresponsive', 'tied'): return False
        if not self.weights: self.reason = 'unresponsive'
        elif owners.setdefault(self.weights[0].key, self) is not self: self.reason = 'tied'
        if self.bias is not None and owners.setdefault(self.bias.key, self) is not self:
            self.anothers_bias,self.bias = self.bias,None
        return self.reason not in ('unresponsive', 'tied')

    def due(self) -> bool:
        "Whether to correct the unit now: in the first pass that runs it, and later if it is off its target."
        if self.last is None: return True
        return not (self.last.repeated or self.seen.repeated or self.met(self.judged()))

    def met(self, m: Moments) -> bool:
        "Whether a fresh mini-batch finds the unit at its target."
        if self.target.scales and not self.target.std_met(m): return False
        return not (self.target.ends_with_mean and self.can_shift) or self.target.mean_met(m)

    def recent(self) -> Moments:
        "What to correct from: the last pass, and from the third correction on, recent passes with it."
        m = self.latest.pooled
        before = [h for h in self.history[1 - _RECENT:] if h.mean.shape == m.mean.shape]
        return pool([*before, m]) if len(before) > 1 else m

    def judged(self) -> Moments:
        "What tells whether the target is met: the last pass, or recent passes where mini-batches keep disagreeing."
        m = self.latest.pooled
        return m if len(self.history) < _RECENT - 1 or self.met(m) else self.recent()

    def doubts(self, m: Moments) -> str:
        "Why the unit is not to be corrected from these moments, or \"\"."
        _,std = m.stats(self.target.per_channel)
        needed = float(np.median(self.target.std/std[std > 0])) if np.any(std > 0) else 1.
        return doubt(m.evidence, needed if self.target.scales else 1.)

    def scaled(self, by: np.ndarray | float) -> None:
        "Note that the weight was multiplied by `by`."
        self.gain *= float(np.exp(np.mean(np.log(by))))

    def end(self) -> None:
        "End a pass."
        self.passes += self.changed
        self.written |= self.changed

    def finish(self) -> None:
        "Tell autograd, and all who look at a tensor's version, that the weights and biases have been written."
        if not self.written: return
        for t in {*self.layer._parameters.values(), *(r.value for r in self.refs if not r.has_setter)}:
            if isinstance(t, Tensor) and not t.is_inference():
                torch.autograd.graph.increment_version(t)

    def verdict(self) -> Status:
        "What became of the unit, as the last pass found it."
        if self.latest is None: return Status.NOT_CALLED
        m = self.judged()
        if not m.finite(): return Status.NON_FINITE
        if not varies(m): return Status.CONSTANT
        why = self.left_alone or (self.reason if self.reason == 'tied' else '') or doubt(m.evidence, 1.)
        if why: return Status(why)
        if not self.met(m): return Status(self.reason) if self.reason in ('unresponsive', *Doubt) else Status.OFF
        mean,_ = m.stats(self.target.per_channel)
        off = (abs(mean - self.target.mean) > self.target.batch_tol*self.target.std).any()
        return Status.NO_BIAS if self.target.shifts and off and not self.can_shift else Status.OK


def select_modules(
    model: nn.Module,
    modules: Any = None  # Types, a predicate of a module, names or globs, modules, or a list; `None`: every layer
) -> list[tuple[str, nn.Module]]:  # Names as in `named_modules()`, in order of registration
    "The modules of `model` that `modules` selects. Raises `ValueError` or `TypeError` if an entry matches nothing."
    named,what = list(model.named_modules()),type(model).__name__
    # A parent applies an attention's inner layers by itself. Whoever selects one of them means the attention.
    inside = {id(c): id(m) for _, m in named if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    if modules is None:
        picked = [(n, m) for n, m in named if is_layer(m) and id(m) not in inside]
        if picked: return picked
        raise ValueError(f"model: {what} has no conv, linear or attention layer; name what to measure with `modules`")
    takes = ("it takes types, a predicate of a module, names or globs as in `named_modules()`, modules, or a list of "
             "these")
    entries = list(modules) if isinstance(modules, (list, tuple, set, frozenset)) else [modules]
    if not entries: raise ValueError(f"modules: got {modules!r}, which selects nothing; {takes}")
    picked_ids: set[int] = set()
    for e in entries:
        test = _matcher(e)
        if test is None: raise TypeError(f"modules: got {e!r} of type {type(e).__name__}; {takes}")
        hits = [m for n, m in named if test(n, m)]
        if not hits:
            of_model = isinstance(e, nn.Module)
            problem = f"{type(e).__name__} is not in the model" if of_model else f"no module of {what} matches {e!r}"
            raise ValueError(f"modules: {problem}; {takes}. Names here: {_some(n for n, _ in named if n)}")
        picked_ids |= {inside.get(id(m), id(m)) for m in hits}
    return [(n, m) for n, m in named if id(m) in picked_ids]


def _matcher(entry: Any) -> Callable[[str, nn.Module], bool] | None:
    if isinstance(entry, str): return lambda n, m: n == entry or fnmatchcase(n, entry)
    if isinstance(entry, nn.Module): return lambda n, m: m is entry
    if isinstance(entry, type): return lambda n, m: isinstance(m, entry)
    if callable(entry): return lambda n, m: bool(entry(m))
    return None


def _is_compiled_layer(m: nn.Module) -> bool:
    "Whether this was a layer before `torch.jit` compiled it, as far as can be told."
    if not isinstance(m, torch.jit.ScriptModule): return False
    w = getattr(m, 'weight', None)
    return isinstance(w, Tensor) and w.dim() > 1 and 'Embedding' not in m.original_name


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ', '.join(map(repr, names[:most])) + (f', ... ({len(names)} in all)' if len(names) > most else '')


def measurable(
    model: nn.Module,
    modules: Any = None  # As in `select_modules`
) -> list[Unit]:
    "The selected modules as units, in order of registration. Raises `TypeError` for complex or `torch.jit` layers."
    for n, m in model.named_modules() if modules is None else select_modules(model, modules):
        if _is_compiled_layer(m):
            raise TypeError(f"model: {n or 'it'!r} is a {m.original_name} compiled by torch.jit, which Python hooks do "
                            "not reach; initialize the model first, then script or trace it")
    units = [Unit(n, m) for n, m in select_modules(model, modules)]
    for u in units:
        for r in u.refs:
            if r.tensor is not None and r.tensor.is_complex():
                raise TypeError(f"model: {u.name!r} has a {r.tensor.dtype} {r.name}; LSUV normalizes real layers: "
                                "leave it out with `modules`")
    return units


def find_units(
    model: nn.Module,
    modules: Any = None  # As in `select_modules`
) -> list[Unit]:
    """The units of `model`, in order of registration, each with what it owns or why it is left alone.

    Raises `ValueError` if a selected module holds no layer to scale, or two selected modules would scale the same one,
    and `TypeError` as `measurable` does."""
    units = measurable(model, modules)
    for u in units:
        if u.layer is None:
            raise ValueError(f"modules: {u.name!r} ({u.kind}) holds no conv, linear or attention layer, nor a "
                             "`weight`, to scale; leave it out")
        rivals = (o for o in units if o is not u and o.layer is u.layer)
        inner = next((o for o in rivals if o.module in set(u.module.modules())), None)
        if inner is not None:
            raise ValueError(f"modules: {u.name!r} and {inner.name!r} inside it are both selected, and both would "
                             "scale the same layer; select one of them")
    # A module that is no unit may hold the weight too (an embedding tied to a decoder), and use it in another way.
    layers = {id(u.layer) for u in units} | {id(u.module) for u in units}
    others = (m for m in model.modules() if id(m) not in layers)
    elsewhere = {id(p) for m in others for p in m._parameters.values() if p is not None}
    for u in units:
        shared = any(id(w.value) in elsewhere for w in u.weights if w.owner is u.layer)
        if shared and not u.left_alone: u.left_alone = 'tied'
    return units
