"""What the numbers of a model tell of its past: whether its biases and norm layers may be as they were drawn.

PyTorch draws the weight and the bias of a linear or conv layer within 1/sqrt(fan in). Others start a bias at a
constant. Training soon moves some number beyond: 10 steps of Adam at 1e-3 did in 10 of 12 networks."""
from __future__ import annotations

from typing import Collection, Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..parallel import local

__all__ = ['NEW', 'MOVED', 'LEARNED', 'signs', 'sign_of', 'learned_layer', 'learned_norm']

NEW,MOVED,LEARNED = 'new','moved','learned'
# The std of a weight that PyTorch drew is 0.58 of its range. Beyond these, the weight was drawn by another rule.
_AS_DRAWN = 0.45,0.75
_ROUNDING = 1.01  # A weight in half precision may lie a little outside


def signs(
    model: nn.Module,
    but: Collection[int] = ()  # Ids of parameters that are not looked at
) -> Iterator[tuple[str, str]]:
    "The name of each layer that tells something of its past, and `NEW`, `MOVED` or `LEARNED`."
    for n, m in model.named_modules():
        w,b = m._parameters.get('weight'),m._parameters.get('bias')
        if w is None or is_lazy(w) or w.is_meta or not w.numel() or id(w) in but: continue
        if found := _sign(m, local(w.detach()), None if b is None else local(b.detach())): yield n, found


def _sign(m: nn.Module, w: Tensor, b: Tensor | None) -> str:
    if 'Norm' in type(m).__name__ and w.ndim == 1:
        return LEARNED if _varies(w) and (b is None or _varies(b)) else NEW
    if not isinstance(m, (nn.Linear, _ConvNd)) or not w.is_floating_point(): return ''
    reach = _ROUNDING/w[0].numel()**0.5
    inside = float(w.abs().max()) <= reach
    if b is None: return NEW if inside else ''  # a weight alone may have been drawn by any rule
    if not _varies(b): return NEW
    if float(b.abs().max()) > reach: return LEARNED
    low,high = _AS_DRAWN
    return MOVED if not inside and low < float(w.float().std())/reach < high else NEW


def _varies(p: Tensor) -> bool: return bool((p != p[:1]).any())


def sign_of(model: nn.Module) -> str:
    "What a model's layers tell together: `NEW` if they are all new, `LEARNED` if one has learned, else `MOVED`."
    found = {s for _, s in signs(model)}
    return LEARNED if LEARNED in found else NEW if found == {NEW} else MOVED


def learned_layer(model: nn.Module, but: Collection[int]) -> str:
    "The name of the first layer that has learned, or \"\"."
    return next((n or '(model)' for n, s in signs(model, but) if s == LEARNED), '')


def learned_norm(model: nn.Module) -> str:
    "The name of a norm layer that has learned, or \"\": nobody starts both weight and bias with several values."
    return next((n for n, s in signs(model) if s == LEARNED and 'Norm' in type(model.get_submodule(n)).__name__), '')
