"""What a unit is made of: `WeightRef` reads, scales and shifts a weight or a bias, wherever a module keeps it.

`KINDS` is the table of the layers whose output is known to be affine in a weight and a bias. `parts_of` finds what a
module's output is made with: the layer, and its weights and bias as `WeightRef`s."""
from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..parallel.sharded import is_sharded, local, numbers_for, whole

__all__ = ['Kind', 'KINDS', 'is_layer', 'layer_types', 'WeightRef', 'Parts', 'parts_of', 'made_of']


@dataclass(frozen=True)
class Kind:
    "A class of layers whose output is affine in `weight` and `bias`, and where they hold the output channels."
    cls: type | str  # The class, or its dotted name, which is looked up without importing its module
    channel_dim: int = -1  # Dimension of the output that holds the channels
    transposed: bool = False  # Whether the weight holds the output channels in dimension 1, and not in dimension 0
    forwards: tuple[str, ...] = ('forward', '_conv_forward', '__call__')  # Methods that a subclass must not replace

    @property
    def loaded(self) -> type | tuple[()]:
        "The class, or `()` if its module has not been imported: no model holds such a layer then."
        if isinstance(self.cls, type): return self.cls
        module,_,name = self.cls.rpartition('.')
        return getattr(sys.modules.get(module), name, ())


KINDS = [
    *(Kind(c, -2 - d) for d, c in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d))),
    *(Kind(c, -2 - d, True) for d, c in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))),
    Kind(nn.Linear),
    Kind(nn.Bilinear),
]


def _kind_of(module: nn.Module) -> Kind | None:
    "The entry of `KINDS` that `module` is an instance of."
    for k in KINDS:
        if isinstance(module, k.loaded): return k
    return None


def layer_types() -> tuple:
    "The classes that are normalized unless `modules` says otherwise: conv, linear and attention layers."
    return (_ConvNd, nn.MultiheadAttention, *(k.loaded for k in KINDS))


def is_layer(module: nn.Module) -> bool:
    "Whether `module` is of one of `layer_types`."
    return isinstance(module, layer_types())


def _is_affine(module: nn.Module) -> bool:
    "Whether the output is affine in the `weight` and `bias` parameters that the module holds, and nothing intervenes."
    if isinstance(module, nn.MultiheadAttention):  # its output is that of `out_proj`, which it applies itself
        return type(module).forward is nn.MultiheadAttention.forward and _is_affine(module.out_proj)
    kind = _kind_of(module)
    if kind is None or 'weight' not in module._parameters or 'forward' in vars(module): return False
    own,known = type(module),kind.loaded
    return own is known or all(getattr(own, f, None) is getattr(known, f, None) for f in kind.forwards)


class WeightRef:
    """One tensor that a unit is made of, in `owner.name`, or the value behind a property of that name.

    It changes tensors through `.data`, unseen by autograd: a model may take a gradient in its forward pass.
    `Unit.finish` counts the changes once for all, when the run is over."""
    def __init__(self,
        owner: nn.Module,  # Module that has the attribute
        name: str,  # Attribute: "weight", "weight_g", "bias", ...
        out_dim: int = 0,  # Dimension of a weight that holds the output channels, 0 or 1
        groups: int = 1  # Groups of a transposed conv: dimension 1 holds the output channels of one of them
    ):
        self.owner,self.name,self.out_dim,self.groups = owner,name,out_dim,groups
        is_tensor = name in owner._parameters or name in owner._buffers
        self.has_setter = not is_tensor and (_has_property(owner, name) or name in vars(owner))
        # What stays between forwards: during one, `fully_shard` puts a gathered copy in its place.
        self.shard = v if not self.has_setter and is_sharded(v := self.value) else None

    @property
    def value(self) -> Any: return getattr(self.owner, self.name)

    @property
    def tensor(self) -> Tensor | None: return v if isinstance(v := self.value, Tensor) else None

    def frozen(self) -> bool:
        "Whether this is a parameter that training does not change."
        return isinstance(v := self.value, nn.Parameter) and not v.requires_grad

    @property
    def key(self) -> Any:
        "Identifies the tensor. A property makes a new one on each read, so its owner and name identify it."
        if self.has_setter: return id(self.owner), self.name
        return id(self.value if self.shard is None else self.shard)

    def own_grad(self, grad: Tensor) -> Tensor:
        "The part of the parameter's gradient that is this tensor's."
        return grad

    @property
    def _tensors(self) -> list[Tensor]:
        "The tensor, and the shard of it that stays if this is a gathered copy."
        t = self.tensor
        return [o for o in (t, self.shard if self.shard is not t else None) if o is not None]

    def copy(self) -> Any:
        "What `assign` takes."
        if self.has_setter: return self.tensor.detach().clone() if self.tensor is not None else self.value
        return [(t, local(t).detach().clone()) for t in self._tensors]

    @torch.no_grad()
    def assign(self, copied: Any) -> None:
        "Give it back what it held when it was copied."
        if self.has_setter: setattr(self.owner, self.name, copied)
        else:
            for t, value in copied: local(t).data.copy_(value)

    def rms_singular(self) -> float:
        "Root mean square of the weight's singular values. All are 1 in an orthonormal weight. 1 if it is not a matrix."
        w = self.tensor
        if w is None or w.dim() < 2: return 1.
        rows = w.shape[0]
        return whole(torch.linalg.vector_norm(w.detach().float())).item()/min(rows, w.numel()//rows)**0.5

    def mul(self, by: np.ndarray) -> None: self._change(Tensor.mul_, operator.mul, by)

    def add(self, by: np.ndarray) -> None: self._change(Tensor.add_, operator.add, by)

    def _change(self, in_place: Callable, change: Callable, by: np.ndarray) -> None:
        to = self._by_channel(by)
        if not self.has_setter:
            for t in self._tensors: in_place(local(t).data, _for(t, to))
            return
        with torch.no_grad(): self.assign(change(self.value, to))

    def _by_channel(self, by: np.ndarray) -> Tensor | float:
        "One number, or one a channel, in a shape that broadcasts with the value."
        if by.size == 1: return by.item()
        v,x,c = self.tensor,torch.from_numpy(by),len(by)
        if v is not None and self.out_dim == 1 and v.dim() > 1:  # (in, out/groups, ...)
            x = x.view(self.groups, -1).repeat_interleave(v.shape[0]//self.groups, dim=0)
        if v is None or v.shape[:x.dim()] != x.shape:
            raise ValueError(f"per_channel: {type(self.owner).__name__}.{self.name} does not hold a value for each of "
                             f"{c} channels; pass per_channel=False, or leave the module out with `modules`")
        x = x.reshape(*x.shape, *[1]*(v.dim() - x.dim()))
        return x.to(v.device, v.dtype) if self.has_setter else x


def _has_property(owner: nn.Module, name: str) -> bool:
    "Whether the class of a module has a property of this name that can be set."
    return getattr(getattr(type(owner), name, None), 'fset', None) is not None


def _for(t: Tensor, to: Tensor | float) -> Tensor | float:
    "One number, or those for what this rank holds of `t`."
    return numbers_for(t, to).to(t.device, t.dtype) if isinstance(to, Tensor) else to


# The weight and the bias of a layer, and what hooks compute a weight from
_MADE_OF = ('weight', 'bias', 'weight_g', 'weight_v', 'weight_orig')


def _refs(module: nn.Module, name: str) -> list[WeightRef]:
    "The weight or bias that `module` itself has by this name, if any."
    v = getattr(module, name, None)
    if isinstance(v, Tensor): return [WeightRef(module, name)]
    # The lesson-11 `ConvLayer` has a number behind a property. A plain `bias=True` is a flag.
    is_number = isinstance(v, (int, float)) and not isinstance(v, bool)
    if not (is_number and isinstance(getattr(type(module), name, None), property)): return []
    return [ref] if (ref := WeightRef(module, name)).has_setter else []


def _layer_of(module: nn.Module) -> nn.Module | None:
    "The layer whose weight makes `module`'s output: itself, an attention's output projection, or the first inside."
    if isinstance(module, nn.MultiheadAttention): return module.out_proj
    if is_layer(module): return module
    inner = next((m for m in module.modules() if is_layer(m)), None)
    if inner is not None: return _layer_of(inner)
    return module if getattr(module, 'weight', None) is not None else None


def _weights_of(layer: nn.Module) -> list[WeightRef]:
    "What may scale the output of `layer`: its weight, what its weight is computed from, or a gain of its own."
    kind = _kind_of(layer)
    transposed = isinstance(layer, _ConvTransposeNd) or kind is not None and kind.transposed
    place = (1, getattr(layer, 'groups', 1)) if transposed else (0, 1)
    if parametrize.is_parametrized(layer, 'weight'):
        # `original0` is the magnitude of weight_norm. Torch's other parametrizations have one `original`.
        originals = layer.parametrizations['weight']
        return [WeightRef(originals, 'original0' if hasattr(originals, 'original0') else 'original', *place)]
    if 'weight' not in layer._parameters:  # a hook or a property computes it
        of = next((n for n in ('weight_g', 'weight_orig') if n in layer._parameters), None)
        return [WeightRef(layer, of, *place)] if of else [ref for ref in _refs(layer, 'weight') if ref.has_setter]
    refs = [WeightRef(layer, 'weight', *place)]
    if _is_affine(layer): return refs
    # A subclass that standardizes its weight is scaled by its gain, one number a channel.
    gains = [n for n, p in layer._parameters.items() if n not in ('weight', 'bias') and p is not None]
    return refs + [WeightRef(layer, n) for n in gains if layer._parameters[n].numel() in (1, layer.weight.shape[0])]


def made_of(layer: nn.Module) -> list[nn.Parameter]:
    "The parameters that a layer's output is made with: weight and bias, what they are computed from, and gains."
    held = [p for n, p in layer._parameters.items() if n in _MADE_OF and p is not None and not is_lazy(p)]
    computed = list(layer.parametrizations.parameters()) if parametrize.is_parametrized(layer) else []
    if not _is_affine(layer): computed += [r.value for r in _weights_of(layer) if isinstance(r.value, nn.Parameter)]
    return held + computed


@dataclass
class Parts:
    "What the output of a module is made with."
    layer: nn.Module | None  # The layer whose weight makes it; `None` if there is none
    weights: list[WeightRef]  # What may scale the output, likeliest first, less what is frozen
    bias: WeightRef | None  # What may shift it, unless it is frozen
    frozen: bool  # Whether there are weights, and all of them are frozen
    channel_dim: int  # Dimension of the output that holds the channels
    affine: bool  # Whether the output is known to be affine in the weight and the bias


def parts_of(module: nn.Module) -> Parts:
    """What the output of `module` is made with.

    A container has the parts of the first affine layer inside it, unless it has a `weight` or `bias` of its own (a
    property, as the lesson-11 `ConvLayer`'s `bias`)."""
    layer = _layer_of(module)
    if layer is None: return Parts(None, [], None, False, -1, False)
    weights,biases = _weights_of(layer),_refs(layer, 'bias')
    if layer is not module: weights,biases = _refs(module, 'weight') or weights,_refs(module, 'bias') or biases
    kind = _kind_of(layer)
    channel_dim = kind.channel_dim if kind else -1
    if isinstance(layer, _ConvNd): channel_dim = -1 - len(layer.kernel_size)
    free,bias = [w for w in weights if not w.frozen()],next((b for b in biases if not b.frozen()), None)
    return Parts(layer, free, bias, bool(weights) and not free, channel_dim, _is_affine(module))
