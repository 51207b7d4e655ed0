"Step one of the paper: orthonormal weights (Saxe et al. 2014), zero biases."
from __future__ import annotations

from typing import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..observe.discovery import OperationUnit
from .orthogonal import Deck, orthonormal
from ..parallel.ranks import meet
from ..parallel.sharded import Shards, any_nonzero, drawn_alike, from_rank_0, is_sharded, local, slices_of
from ..units.units import Unit
from ..observe.views import ViewRef

__all__ = ['preinitialize', 'orthogonal_', 'deck_for']


@torch.no_grad()
def orthogonal_(
    layer: nn.Module,  # A conv, linear or bilinear layer, plain, parametrized or with `weight_norm`
    deck: Deck | None = None,  # As in `orthonormal`
    shards: Shards | None = None  # Where the weight lies, if `layer` has a gathered copy
) -> None:
    """Give `layer` an orthonormal weight, each group of a grouped conv its own, and a zero bias.

    A weight that is all zeros is left so: that is how a residual branch or a head is made to start at nothing.
    So is one that is frozen, or computed from something frozen."""
    w = getattr(layer, 'weight', None)
    if not isinstance(w, Tensor) or w.numel() == 0 or _is_zero(w): return
    if w.dim() < 2 or any(not p.requires_grad for n, p in layer.named_parameters() if 'bias' not in n): return
    if parametrize.is_parametrized(layer, 'weight'):
        # Three cases have no way back from a weight to what it is computed from: no `right_inverse`, one that is not
        # implemented, and one that rejects this weight.
        if not all(hasattr(m, 'right_inverse') for m in layer.parametrizations.weight): return
        try: layer.weight = _draw(layer, torch.empty_like(w), deck)
        except (NotImplementedError, ValueError): return
    elif 'weight_g' in layer._parameters:  # weight_norm of old
        g,v = layer.weight_g,_draw(layer, layer.weight_v.data, deck)
        dims = [d for d in range(v.dim()) if d >= g.dim() or g.shape[d] != v.shape[d]]
        g.data.copy_(torch.linalg.vector_norm(v, dim=dims or None, keepdim=bool(dims)).reshape(g.shape))
    else:
        w = layer._parameters.get('weight_orig', w)
        finer = shards.finer(w) if shards is not None else None
        if finer is None: _draw(layer, w, deck)
        else: shards.write(w, _draw(layer, torch.empty_like(w, dtype=finer), deck))
    bias = layer._parameters.get('bias')
    if bias is not None and bias.requires_grad: local(bias).data.zero_()


def _is_zero(w: Tensor) -> bool:
    "Whether `w` holds nothing but zeros. The first number tells of most that do not."
    if is_sharded(w): return not any_nonzero(w)
    return not w[(0,)*w.dim()] and not w.any()


def _draw(layer: nn.Module, w: Tensor, deck: Deck | None) -> Tensor:
    "Fill `w` with an orthonormal weight for `layer`, in place where its memory allows; of a shard, its slice."
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    rows,cols = w.shape[0],w.numel()//w.shape[0]
    t,(of_rows,of_cols,*others) = local(w).data,slices_of(w)
    each = cols//w.shape[1]
    block = dict(start=of_rows.start, stop=of_rows.stop, left=of_cols.start*each, right=of_cols.stop*each)
    if any(s.stop - s.start < n for s, n in zip(others, w.shape[2:])): block = {}
    kind = dict(groups=groups, dtype=t.dtype, device=t.device, deck=deck)
    if not block: t.copy_(orthonormal(rows, cols, **kind).view(w.shape)[slices_of(w)])
    elif t.is_contiguous() and not t.is_inference():
        orthonormal(rows, cols, groups=groups, **block, out=t.view(len(t), block['right'] - block['left']), deck=deck)
    else: t.copy_(orthonormal(rows, cols, **kind, **block).view(t.shape))
    return w


def deck_for(units: Iterable[Unit]) -> Deck:
    "A deck for the weights of these units."
    layers = (u.layer for u in units if not u.left_alone)
    weights = (m._parameters.get('weight') for m in layers if getattr(m, 'groups', 1) == 1)
    sized = (w for w in weights if w is not None and not is_lazy(w) and w.dim() > 1 and w.numel())
    return Deck((len(w), w.numel()//len(w)) for w in sized)


@torch.no_grad()
def preinitialize(
    unit: Unit,
    preinit: str | Callable[[nn.Module], object],  # "orthogonal", or a function of the layer that holds the weight
    deck: Deck | None = None  # As in `orthonormal`
) -> None:
    "Give `unit` its starting weights, the same on every rank of `torch.distributed`, or a slice of the same."
    meet(f"the start of layer {unit.name!r}")
    w = next((p for p in unit.layer.parameters() if p.dim() > 1), None)
    # A function fills what a rank holds with numbers of its own. `orthogonal_` takes them from one matrix.
    apart = sum(s.start for s in slices_of(w)) if preinit != 'orthogonal' and is_sharded(w) else 0
    with drawn_alike(w.device if w is not None else torch.device('cpu'), apart), unit.shards.written():
        if isinstance(unit, OperationUnit): _start_view(unit, preinit)
        else: _start(unit, preinit, deck)


def _start(unit: Unit, preinit: str | Callable[[nn.Module], object], deck: Deck | None) -> None:
    "Give a layer its starting weights."
    layer,was = unit.layer,dict(unit.layer._parameters)
    kept = unit.anothers_bias.copy() if unit.anothers_bias is not None else None
    if preinit == 'orthogonal':
        with torch._C.DisableTorchFunction(): orthogonal_(layer, deck, unit.shards)
    else: preinit(layer)
    for n, p in was.items():  # an optimizer may hold the parameters: they get the values of any put in their place
        if p is not None and (new := layer._parameters[n]) is not p:
            p.data.copy_(new)
            layer._parameters[n] = p
    if kept is not None: unit.anothers_bias.assign(kept)
    from_rank_0(unit.shards.others(layer) if preinit == 'orthogonal' else layer.parameters())


def _start_view(unit: OperationUnit, preinit: str | Callable[[nn.Module], object]) -> None:
    """Give a view of a parameter its starting weights, by the fan that it is used with.

    A function gets a linear layer of this weight and bias, one for each matrix."""
    weight,bias = unit.weight,unit.bias
    n,rows,cols = weight.shape
    w = weight.matrices
    if preinit == 'orthogonal':
        if not w.any(): return
        w.copy_(orthonormal(n*rows, cols, groups=n, dtype=w.dtype, device=w.device).view(w.shape))
        if bias is not None: bias.tensor.zero_()
    else:
        parts = [w] if not weight.layout.batch else w.flatten(0, len(weight.layout.batch) - 1)
        new = [_started(p.reshape(rows, cols) if weight.layout.batch else p, bias, preinit) for p in parts]
        w.copy_(torch.stack([l.weight for l in new]).view(w.shape))
        if bias is not None: bias.tensor.copy_(new[0].bias)
    from_rank_0([weight.tensor, *([bias.tensor] if bias is not None else [])])


def _started(weight: Tensor, bias: ViewRef | None, preinit: Callable[[nn.Module], object]) -> nn.Linear:
    "A linear layer with copies of these that a function has started."
    layer = nn.utils.skip_init(nn.Linear, 1, 1, bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None: layer.bias = nn.Parameter(bias.tensor.clone())
    layer.in_features,layer.out_features = weight[0].numel(),len(weight)
    preinit(layer)
    return layer
