"Which modules are normalized, what weight and bias each owns, and why one is left alone."
from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

__all__ = ['LAYERS', 'Knob', 'Unit', 'select_modules', 'measurable', 'find_units']

LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)  # What is normalized unless `modules` says otherwise

# The forwards known to be affine in the weight and bias that the module holds.
_AFFINE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.Bilinear)


class Knob:
    """One thing that a unit is made of: the tensor in `owner.name`, or the value behind a property of that name.

    Tensors are changed through `.data`, unseen by autograd: a model may take a gradient in its forward pass. They are
    counted as written by `Unit.count_write`, when all is done."""
    def __init__(self,
        owner: nn.Module,  # Module whose attribute it is
        name: str,  # Attribute: "weight", "weight_g", "bias", ...
        transposed_groups: int = 0  # Groups of a transposed conv, whose output channels are in dimension 1; 0 for dimension 0
    ):
        self.owner,self.name,self.transposed_groups = owner,name,transposed_groups
        is_tensor = name in owner._parameters or name in owner._buffers
        self.has_setter = not is_tensor and (getattr(getattr(type(owner), name, None), 'fset', None) is not None or name in vars(owner))

    @property
    def value(self) -> Any: return getattr(self.owner, self.name)

    @property
    def tensor(self) -> Tensor | None: return v if isinstance(v := self.value, Tensor) else None

    def frozen(self) -> bool:
        "Whether this is a parameter that training does not change."
        return isinstance(v := self.value, nn.Parameter) and not v.requires_grad

    @property
    def key(self) -> Any:
        "What two knobs on the same tensor have in common; what a property makes is new each time."
        return (id(self.owner), self.name) if self.has_setter else id(self.value)

    def copy(self) -> Any: return self.tensor.detach().clone() if self.tensor is not None else self.value

    @torch.no_grad()
    def assign(self, value: Any) -> None:
        if self.has_setter: setattr(self.owner, self.name, value)
        else: self.tensor.data.copy_(value)

    def _by_channel(self, by: np.ndarray) -> Tensor | float:
        "One number, or one a channel, shaped to meet this knob's value."
        if by.size == 1: return by.item()
        v,x,c = self.tensor,torch.from_numpy(by),len(by)
        if v is not None and self.transposed_groups and v.dim() > 1:  # (in, out/groups, ...): column j of group g's rows
            x = x.view(self.transposed_groups, -1).repeat_interleave(v.shape[0]//self.transposed_groups, dim=0)
        if v is None or v.shape[:x.dim()] != x.shape:
            raise ValueError(f"per_channel: {type(self.owner).__name__}.{self.name} does not hold a value for each of {c} channels; "
                             "pass per_channel=False, or leave the module out with `modules`")
        return x.reshape(*x.shape, *[1]*(v.dim() - x.dim())).to(v)

    @torch.no_grad()
    def mul(self, by: np.ndarray) -> None:
        to = self._by_channel(by)
        if self.has_setter: self.assign(self.value*to)
        else: self.tensor.data.mul_(to)

    @torch.no_grad()
    def add(self, by: np.ndarray) -> None:
        to = self._by_channel(by)
        if self.has_setter: self.assign(self.value + to)
        else: self.tensor.data.add_(to)


class Unit:
    """A module whose output is measured, with the weight and the bias that it owns.

    A container owns those of the first affine layer inside it, unless it has a `weight` or `bias` (a property, as the
    lesson-11 `ConvLayer`'s `bias`) of its own."""
    def __init__(self,
        name: str,  # As in `named_modules()`
        module: nn.Module
    ):
        self.name,self.module,self.kind = name,module,type(module).__name__
        self.layer = _layer_of(module)
        layer_scales = _weight_knobs(self.layer) if self.layer is not None else []
        own = [] if self.layer is module else _own(module, 'weight')
        self.scales = own or layer_scales           # What may scale the output, likeliest first
        own = [] if self.layer is module else _own(module, 'bias')
        bias = own or (_own(self.layer, 'bias') if self.layer is not None else [])
        self.bias: Knob | None = next((k for k in bias if not k.frozen()), None)
        self.left_alone = 'frozen' if self.scales and all(k.frozen() for k in self.scales) else ''
        self.scales = [k for k in self.scales if not k.frozen()]
        nd = self.layer.kernel_size.__len__() if isinstance(self.layer, _ConvNd) else 0
        self.channel_dim = -1 - nd
        self.affine = _is_affine(module)

    @property
    def knobs(self) -> list[Knob]: return [*self.scales, *([self.bias] if self.bias else [])]

    def count_write(self) -> None:
        "Tell autograd, and all who look at a tensor's version, that the unit's weights and biases have been written."
        for t in {*self.layer._parameters.values(), *(k.value for k in self.knobs if not k.has_setter)}:
            if isinstance(t, Tensor) and not t.is_inference(): torch.autograd.graph.increment_version(t)

    def __repr__(self): return f'Unit({self.name!r}, {self.kind})'


def _own(module: nn.Module, name: str) -> list[Knob]:
    "The knob that `module` itself has by this name, if any."
    v = getattr(module, name, None)
    if isinstance(v, Tensor): return [Knob(module, name)]
    # A number behind a property, as in the notebook; a plain `bias=True` is a flag.
    is_number = isinstance(v, (int, float)) and not isinstance(v, bool) and isinstance(getattr(type(module), name, None), property)
    return [k] if is_number and (k := Knob(module, name)).has_setter else []


def _layer_of(module: nn.Module) -> nn.Module | None:
    "The layer whose weight `module`'s output is made with: itself, an attention's output projection, or the first inside."
    if isinstance(module, nn.MultiheadAttention): return module.out_proj
    if isinstance(module, LAYERS): return module
    if getattr(module, 'weight', None) is not None and not any(isinstance(m, LAYERS) for m in module.modules()): return module
    inner = next((m for m in module.modules() if isinstance(m, LAYERS)), None)
    return _layer_of(inner) if inner is not None else None


def _weight_knobs(layer: nn.Module) -> list[Knob]:
    "What may scale the output of `layer`: its weight, what its weight is computed from, or a gain of its own."
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) else 0
    if parametrize.is_parametrized(layer, 'weight'):
        # `original0` is weight_norm's magnitude; the other parametrizations of torch have one `original`.
        originals = layer.parametrizations['weight']
        return [Knob(originals, 'original0' if hasattr(originals, 'original0') else 'original', groups)]
    if 'weight' not in layer._parameters:  # computed by a hook, or a property
        of = next((n for n in ('weight_g', 'weight_orig') if n in layer._parameters), None)
        return [Knob(layer, of, groups)] if of else [k for k in _own(layer, 'weight') if k.has_setter]
    knobs = [Knob(layer, 'weight', groups)]
    if not _is_affine(layer):
        # A subclass that standardizes its weight is scaled by its gain, one number a channel.
        knobs += [Knob(layer, n) for n, p in layer._parameters.items()
                  if n not in ('weight', 'bias') and p is not None and p.numel() in (1, layer.weight.shape[0])]
    return knobs


def _is_affine(module: nn.Module) -> bool:
    "Whether the module's output is known to be affine in the `weight` and `bias` parameters that it holds, as nothing intervenes."
    if isinstance(module, nn.MultiheadAttention):  # its output is that of `out_proj`, which it applies itself
        return type(module).forward is nn.MultiheadAttention.forward and _is_affine(module.out_proj)
    base = next((c for c in _AFFINE if isinstance(module, c)), None)
    return (base is not None and 'weight' in module._parameters and 'forward' not in vars(module)
            and all(getattr(type(module), f, None) is getattr(base, f, None) for f in ('forward', '_conv_forward', '__call__')))


def select_modules(
    model: nn.Module,
    modules: Any = None  # A type, a predicate of a module, a name or glob, a module, or a list of these; `None`: conv, linear and attention layers
) -> list[tuple[str, nn.Module]]:  # Names as in `named_modules()`, in order of registration
    "The modules of `model` that `modules` selects. Raises `ValueError` or `TypeError` if one of its entries matches nothing."
    named = list(model.named_modules())
    # What an attention holds is never called; whoever selects it means the attention.
    inside = {id(c): id(m) for _, m in named if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    if modules is None:
        picked = [(n, m) for n, m in named if isinstance(m, LAYERS) and id(m) not in inside]
        if not picked: raise ValueError(f"model: {type(model).__name__} has no conv, linear or attention layer; name what to measure with `modules`")
        return picked
    takes = "it takes types, a predicate of a module, names or globs as in `named_modules()`, modules, or a list of these"
    entries = list(modules) if isinstance(modules, (list, tuple, set, frozenset)) else [modules]
    if not entries: raise ValueError(f"modules: got {modules!r}, which selects nothing; {takes}")
    picked_ids: set[int] = set()
    for e in entries:
        test = _matcher(e)
        if test is None: raise TypeError(f"modules: got {e!r} of type {type(e).__name__}; {takes}")
        hits = [m for n, m in named if test(n, m)]
        if not hits:
            what = f"no module of {type(model).__name__} matches {e!r}" if not isinstance(e, nn.Module) else f"{type(e).__name__} is not in the model"
            raise ValueError(f"modules: {what}; {takes}. Names here: {_some(n for n, _ in named if n)}")
        picked_ids |= {inside.get(id(m), id(m)) for m in hits}
    return [(n, m) for n, m in named if id(m) in picked_ids]


def _matcher(entry: Any) -> Callable[[str, nn.Module], bool] | None:
    if isinstance(entry, str): return lambda n, m: n == entry or fnmatchcase(n, entry)
    if isinstance(entry, nn.Module): return lambda n, m: m is entry
    if isinstance(entry, type): return lambda n, m: isinstance(m, entry)
    if callable(entry): return lambda n, m: bool(entry(m))
    return None


def _is_matrix(m: torch.jit.ScriptModule) -> bool:
    "Whether this was a layer before it was compiled, as far as can be told."
    w = getattr(m, 'weight', None)
    return isinstance(w, Tensor) and w.dim() > 1 and 'Embedding' not in m.original_name


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ', '.join(map(repr, names[:most])) + (f', ... ({len(names)} in all)' if len(names) > most else '')


def measurable(
    model: nn.Module,
    modules: Any = None  # As in `select_modules`
) -> list[Unit]:
    "The selected modules of `model` as units, in order of registration. Raises `TypeError` for layers that are complex or compiled by `torch.jit`."
    for n, m in model.named_modules() if modules is None else select_modules(model, modules):
        if isinstance(m, torch.jit.ScriptModule) and _is_matrix(m):
            raise TypeError(f"model: {n or 'it'!r} is a {m.original_name} compiled by torch.jit, which Python hooks do not reach; "
                            "initialize the model first, then script or trace it")
    units = [Unit(n, m) for n, m in select_modules(model, modules)]
    for u in units:
        for k in u.knobs:
            if k.tensor is not None and k.tensor.is_complex():
                raise TypeError(f"model: {u.name!r} has a {k.tensor.dtype} {k.name}; LSUV normalizes real layers: leave it out with `modules`")
    return units


def find_units(
    model: nn.Module,
    modules: Any = None  # As in `select_modules`
) -> list[Unit]:
    """The units of `model`, in order of registration, each with what it owns or why it is left alone.

    Raises `ValueError` if a selected module holds no layer to scale, or two selected modules would scale the same one, and
    `TypeError` as `measurable` does."""
    units = measurable(model, modules)
    for u in units:
        if u.layer is None:
            raise ValueError(f"modules: {u.name!r} ({u.kind}) holds no conv, linear or attention layer, nor a `weight`, to scale; leave it out")
        if (other := next((o for o in units if o is not u and o.layer is u.layer and o.module in set(u.module.modules())), None)):
            raise ValueError(f"modules: {u.name!r} and {other.name!r} inside it are both selected, and both would scale the same layer; select one of them")
    # A weight that a module which is no unit holds too (an embedding tied to a decoder) means something else there.
    layers = {id(u.layer) for u in units} | {id(u.module) for u in units}
    elsewhere = {id(p) for m in model.modules() if id(m) not in layers for p in m._parameters.values() if p is not None}
    for u in units:
        if not u.left_alone and any(id(k.value) in elsewhere for k in u.scales if k.owner is u.layer): u.left_alone = 'tied'
    return units
