"""The weights before the loops: `preinit`.

`Start` gives layers their starting weights between passes: those that are known before the first pass, and those of
weights that an operation shows, after the pass that showed them. "orthogonal" is step one of the paper: orthonormal
weights (Saxe et al. 2014), zero biases. "mirrored" is in a file of its own."""
from __future__ import annotations

from functools import partial
from typing import Any, Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..observe import Discovery
from ..parallel import any_rank, drawn_alike, from_rank_0, is_sharded, local, meet, of_all_ranks, slices_of, whole
from ..units import Ref, Selection, Unit, layer_unit
from .mirrored import Pairing, SymmetryTest, fill
from .orthogonal import orthonormal

__all__ = ['Start', 'orthogonal_']

Preinit = str | Callable[[nn.Module], object] | None


class Start:
    "Gives each weight its start, once."
    def __init__(self,
        preinit: Preinit,  # As in `lsuv_init`
        discovery: Discovery,  # Of the units
        keeps: Callable[[Unit], bool],  # Whether a unit is left alone
        keep: Callable[[list[Tensor]], object],  # Told of parameters before they change
        show: Callable[..., Any]  # Runs the model on a few samples or on all, its units shown to an observer
    ):
        if preinit == 'mirrored': _refuse_sharded(discovery.selection)
        self.preinit,self.discovery,self.keeps,self.keep,self.show = preinit,discovery,keeps,keep,show
        self.note = ''  # Why nothing is mirrored
        self.started: dict[int, list[nn.Parameter]] = {}  # By id of a weight: what was written with it

    @torch.no_grad()
    def __call__(self, units: Iterable[Unit] | None = None) -> bool:  # Whether any weight was written
        "Start these units, or, before the first pass, all layers."
        if self.preinit is None: return False
        before = len(self.started)
        if units is None: self._mirror() if self.preinit == 'mirrored' else self._start_layers()
        else:
            for u in units:
                if self.waits(u): self._start_unit(u)
                elif not u.started and self._was_started(u): u.note_start()
        return len(self.started) > before

    def waits(self, u: Unit) -> bool:
        "Whether a unit is to get a start, and has none yet."
        if self.preinit in (None, 'mirrored') or u.is_block or not u.may_change: return False
        return not (u.started or self._was_started(u))

    def _was_started(self, u: Unit) -> bool:
        return bool(u.weights) and isinstance(u.weight, Ref) and id(u.weight.param) in self.started

    def unused(self) -> list[nn.Parameter]:
        "The parameters that were started, and that the model did not use."
        return [p for params in self.started.values() for p in params
                if id(p) not in self.discovery.taken and not is_sharded(p)]

    # ---- Mirrored

    def _mirror(self) -> None:
        "Mirror the units for which it holds, the same on every rank. The others keep their weights."
        pairings,self.note = self._pairings()
        by_name,self.note = of_all_ranks(({u.name: p for u, p in pairings.items()}, self.note))[0]
        for u in pairings:
            if u.name not in by_name: continue
            self.keep(u.parameters)
            self.started[id(u.weight.param)] = u.parameters
            with drawn_alike(u.weight.param.device): fill(u, by_name[u.name])
            u.start,u.started,u.written = 'mirrored',True,True
        torch.clear_autocast_cache()  # it may hold weights as they were, in half precision

    def _pairings(self) -> tuple[dict[Unit, Pairing], str]:
        "What the symmetry test finds: on a few samples or, if the model does not take them, on all."
        pairings,note = {},''
        for few in (True, False):
            failed = False
            try: pairings,note = SymmetryTest()(partial(self.show, few))
            except Exception as e:
                failed,said = True,str(e).replace('\n', ' ')
                note = f"the model does not run on the test's noise ({said})"
            if not any_rank(failed): break
        return pairings, note

    # ---- Layers

    def _start_layers(self) -> None:
        selection = self.discovery.selection
        for name, m in selection.layers:
            u = layer_unit(name, m)
            if self.keeps(u): continue
            if isinstance(m, nn.MultiheadAttention): self._start_projections(m)
            self._start_layer(u, getattr(m, 'out_proj', m) if isinstance(m, nn.MultiheadAttention) else m)
        for u in selection.blocks:
            if not self.keeps(u) and u.layer is not None: self._start_layer(u, u.layer)

    def _start_layer(self, u: Unit, layer: nn.Module) -> None:
        params = [p for p in layer.parameters() if p.requires_grad]
        weight = u.weight.param if u.weights and isinstance(u.weight, Ref) else next(iter(params), None)
        if weight is None or id(weight) in self.started or id(weight) in self.discovery.elsewhere: return
        meet(f"the start of layer {u.name!r}")
        self.keep(params)
        self.started[id(weight)] = params
        with drawn_alike(weight.device):
            if self.preinit == 'orthogonal': orthogonal_(layer)
            else: _fill(layer, self.preinit)

    def _start_projections(self, m: nn.MultiheadAttention) -> None:
        "Start the projections of an attention's inputs."
        packed = m.in_proj_weight is not None
        weights = [m.in_proj_weight] if packed else [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
        if self.preinit != 'orthogonal' or not all(w.requires_grad for w in weights): return
        params = [*weights, *([m.in_proj_bias] if m.in_proj_bias is not None else [])]
        self.keep(params)
        with drawn_alike(params[0].device):
            for w in weights:
                self.started[id(w)] = params
                full = whole(w.data).clone()
                for part in full.chunk(3) if packed else [full]:
                    if not _is_zero(part): part.copy_(orthonormal(*part.shape, dtype=part.dtype, device=part.device))
                local(w).data.copy_(full[slices_of(w)])
        if m.in_proj_bias is not None: local(m.in_proj_bias).data.zero_()

    # ---- Units that an operation has shown

    def _start_unit(self, u: Unit) -> None:
        meet(f"the start of layer {u.name!r}")
        self.keep(u.parameters)
        u.note_start()
        self.started.setdefault(id(u.weight.param) if u.weight.view.whole else hash(u.weight.key), u.parameters)
        _start_view(u, self.preinit)


def _start_view(u: Unit, preinit: Preinit) -> None:
    """Give a view of a parameter its starting weights, by the fan that it is used with.

    A function gets a linear layer of this weight and bias, one for each matrix."""
    w = u.weight
    p,full = w.param,whole(w.param.data)
    full = full.clone() if is_sharded(p) else full
    part = w.layout.of(w.view.of(full)).permute(*w.layout.batch, *w.layout.out, *w.layout.fan_in)
    n,rows,cols = w.shape
    if not part.any(): return
    bias,new_bias = u.bias.view.of(whole(u.bias.param.data)) if u.bias is not None else None, 0.
    with drawn_alike(p.device):
        if preinit == 'orthogonal':
            part.copy_(orthonormal(n*rows, cols, groups=n, dtype=part.dtype, device=part.device).view(part.shape))
        else:
            parts = [part] if not w.layout.batch else part.flatten(0, len(w.layout.batch) - 1)
            new = [_linear(q.reshape(rows, cols) if w.layout.batch else q, bias, preinit) for q in parts]
            part.copy_(torch.stack([l.weight for l in new]).view(part.shape))
            if bias is not None: new_bias = new[0].bias.detach()
    from_rank_0([full])
    if is_sharded(p): local(p).data.copy_(full[slices_of(p)])
    if bias is not None: _set_bias(u, new_bias)


def _refuse_sharded(selection: Selection) -> None:
    if any(is_sharded(s.param) for s in selection.sources):
        raise ValueError("preinit: got 'mirrored' for a sharded model; it takes None or 'orthogonal' there: mirror the "
                         "model before it is sharded")


def _set_bias(u: Unit, value: Tensor | float) -> None:
    p = u.bias.param
    full = whole(p.data).clone() if is_sharded(p) else p.detach()
    part = u.bias.view.of(full)
    if isinstance(value, Tensor): part.copy_(value.view(part.shape))
    else: part.fill_(value)
    from_rank_0([full])
    if is_sharded(p): local(p).data.copy_(full[slices_of(p)])


def _fill(layer: nn.Module, preinit: Callable[[nn.Module], object]) -> None:
    """Have a function start a layer. It is given whole weights, of which a rank then keeps what it holds.

    An optimizer may hold the parameters: they get the numbers of any that the function puts in their place."""
    held = [(m, n, p) for m in layer.modules() for n, p in m._parameters.items() if p is not None]
    for m, n, p in held:
        if is_sharded(p): m._parameters[n] = nn.Parameter(whole(p).clone(), requires_grad=p.requires_grad)
    try:
        preinit(layer)
        new = [m._parameters[n] for m, n, _ in held]
        from_rank_0(new)
        for q, (_, _, p) in zip(new, held):
            if q is not p: local(p).data.copy_(q.detach()[slices_of(p)])
    finally:
        for m, n, p in held: m._parameters[n] = p


def _linear(weight: Tensor, bias: Tensor | None, preinit: Callable[[nn.Module], object]) -> nn.Linear:
    "A linear layer with copies of these that a function has started."
    layer = nn.utils.skip_init(nn.Linear, 1, 1, bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None: layer.bias = nn.Parameter(bias.clone())
    layer.in_features,layer.out_features = weight[0].numel(),len(weight)
    preinit(layer)
    return layer


# ---- Orthonormal weights

@torch.no_grad()
def orthogonal_(
    layer: nn.Module  # A conv, linear or bilinear layer, plain, parametrized or with `weight_norm`
) -> None:
    """Give `layer` an orthonormal weight, each group of a grouped conv its own, and a zero bias.

    A weight that is all zeros stays so: that is how a residual branch or a head is made to start at nothing. So does
    one that is frozen, or computed from something frozen."""
    w = getattr(layer, 'weight', None)
    if not isinstance(w, Tensor) or w.numel() == 0 or w.dim() < 2 or _is_zero(w): return
    if any(not p.requires_grad for n, p in layer.named_parameters() if 'bias' not in n): return
    if parametrize.is_parametrized(layer, 'weight'):
        # Three cases have no way back from a weight to what it is computed from: no `right_inverse`, one that is not
        # implemented, and one that rejects this weight.
        if not all(hasattr(m, 'right_inverse') for m in layer.parametrizations.weight): return
        try: layer.weight = _draw(layer, torch.empty_like(w))
        except (NotImplementedError, ValueError): return
    elif 'weight_g' in layer._parameters:  # weight_norm of old
        g,v = layer.weight_g,_draw(layer, layer.weight_v.data)
        dims = [d for d in range(v.dim()) if d >= g.dim() or g.shape[d] != v.shape[d]]
        g.data.copy_(torch.linalg.vector_norm(v, dim=dims or None, keepdim=bool(dims)).reshape(g.shape))
    else: _draw(layer, layer._parameters.get('weight_orig', w))
    bias = layer._parameters.get('bias')
    if bias is not None and bias.requires_grad: _inside(bias, lambda: local(bias).data.zero_())


def _inside(t: Tensor, write: Callable[[], object]) -> None:
    "Write to a tensor that may be an inference tensor."
    with torch.inference_mode() if t.is_inference() else torch.no_grad(): write()


def _is_zero(w: Tensor) -> bool:
    "Whether `w` holds nothing but zeros. Check one element first; it usually decides."
    if is_sharded(w): return not any_rank(bool(local(w).any()))
    return not w[(0,)*w.dim()] and not w.any()


def _draw(layer: nn.Module, w: Tensor) -> Tensor:
    "Fill `w` with an orthonormal weight for `layer`; of a shard, the slice that this rank holds."
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    rows,cols = w.shape[0],w.numel()//w.shape[0]
    t,(of_rows,of_cols,*others) = local(w).data,slices_of(w)
    each = cols//w.shape[1]
    kind = dict(groups=groups, dtype=t.dtype, device=t.device)
    block = dict(start=of_rows.start, stop=of_rows.stop, left=of_cols.start*each, right=of_cols.stop*each)
    if any(s.stop - s.start < n for s, n in zip(others, w.shape[2:])):
        return _inside(w, lambda: t.copy_(orthonormal(rows, cols, **kind).view(w.shape)[slices_of(w)])) or w
    if t.is_contiguous() and not t.is_inference():
        orthonormal(rows, cols, groups=groups, **block, out=t.view(len(t), block['right'] - block['left']))
    else: _inside(w, lambda: t.copy_(orthonormal(rows, cols, **kind, **block).view(t.shape)))
    return w
