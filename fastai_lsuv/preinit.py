"Step one of the paper: orthonormal weights (Saxe et al. 2014), zero biases."
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from .ranks import from_rank_0
from .units import Unit

__all__ = ['preinitialize', 'orthogonal_']


_FEW = 16  # Fewer columns may come out nearly alike
_ROUNDING = 1e-4  # More than what float32 leaves of orthonormality, less than what anything narrower does


@torch.no_grad()
def orthogonal_(
    layer: nn.Module  # A conv, linear or bilinear layer, plain, parametrized or with `weight_norm`
) -> None:
    """Give `layer` an orthonormal weight, each group of a grouped conv its own, and a zero bias.

    A weight that is all zeros is left so: that is how a residual branch or a head is made to start at nothing. So is one
    that is frozen, or computed from something frozen."""
    w = getattr(layer, 'weight', None)
    if not isinstance(w, Tensor) or w.numel() == 0 or not w.any(): return
    if w.dim() < 2 or any(not p.requires_grad for n, p in layer.named_parameters() if 'bias' not in n): return
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    q = torch.empty(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
    for part in q.chunk(groups): part.copy_(_orthonormal(q.new_empty(len(part), part[0].numel()).normal_()).view_as(part))
    if parametrize.is_parametrized(layer, 'weight'):
        # There may be no way back from a weight to what it is computed from: none at all, or not as it is set up, or not from this one.
        if not all(hasattr(m, 'right_inverse') for m in layer.parametrizations.weight): return
        try: layer.weight = q.to(w)
        except (NotImplementedError, ValueError): return
    elif 'weight_g' in layer._parameters:  # weight_norm of old
        g,v = layer.weight_g,layer.weight_v
        v.data.copy_(q)
        dims = [d for d in range(v.dim()) if d >= g.dim() or g.shape[d] != v.shape[d]]
        g.data.copy_(torch.linalg.vector_norm(v, dim=dims or None, keepdim=bool(dims)).reshape(g.shape))
    else: (layer.weight_orig if 'weight_orig' in layer._parameters else w).data.copy_(q)
    bias = layer._parameters.get('bias')
    if bias is not None and bias.requires_grad: bias.data.zero_()


def _orthonormal(
    drawn: Tensor  # Normal numbers
) -> Tensor:  # Rows orthonormal, or columns, whichever are fewer: what `nn.init.orthogonal_` makes of them
    "The orthonormal factor Q of a QR decomposition, with positive diagonal of R."
    tall = drawn if drawn.shape[0] >= drawn.shape[1] else drawn.T
    q = None
    if tall.shape[0] >= 2*tall.shape[1] >= 2*_FEW:
        # Such a matrix of normals is well-conditioned, and R the Cholesky factor of its Gram matrix: four times as fast as
        # `qr` on two cores. Where products are taken in less than float32 (autocast, TF32) the check sends it to `qr`.
        r,_ = torch.linalg.cholesky_ex(tall.T @ tall, upper=True)
        q = torch.linalg.solve_triangular(r, tall, upper=True, left=False)
        v = tall[0]
        if not torch.linalg.vector_norm(q.T @ (q @ v) - v) <= _ROUNDING*torch.linalg.vector_norm(v): q = None
    if q is None:
        q,r = torch.linalg.qr(tall)
        q = q*r.diagonal().sign()
    return q if tall is drawn else q.T


@torch.no_grad()
def preinitialize(
    unit: Unit,
    preinit: str | Callable[[nn.Module], object]  # "orthogonal", or a function of the layer that holds the weight
) -> None:
    "Give `unit` its starting weights, the same on every rank of `torch.distributed`."
    layer,was = unit.layer,dict(unit.layer._parameters)
    kept = unit.anothers_bias.copy() if unit.anothers_bias is not None else None
    (orthogonal_ if preinit == 'orthogonal' else preinit)(layer)
    for n, p in was.items():  # an optimizer may hold the parameters: they get the values of any put in their place
        if p is not None and (new := layer._parameters[n]) is not p:
            p.data.copy_(new)
            layer._parameters[n] = p
    if kept is not None: unit.anothers_bias.assign(kept)
    from_rank_0(layer.parameters())
