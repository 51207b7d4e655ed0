"""The gradients of a loss by layer: `gradients_of` runs one forward and one backward, and touches no `.grad`.

They tell whether layers will learn at the same pace. Under `torch.distributed` they are those of this rank, as plain
autograd gives them."""
from __future__ import annotations

import math
from typing import Any, Callable, Iterable

import torch
from torch import Tensor, nn

from ..measure import Moments, first_tensor, pool, whole_moments
from .passes import Passes
from ..observe import Use
from ..units import Ref, Unit

__all__ = ['gradients_of']


def gradients_of(
    passes: Passes,  # Through the model
    loss: Callable[[nn.Module], Any]  # As in `layer_stats`
) -> dict[Unit, dict[str, float | None]]:  # `grad_std` and `weight_grad` of each, as in `Row`
    "Std of the gradient at each unit's output, and norm of the weight's gradient over that of the weight."
    listener = _Listener()
    params = [p for p in passes.model.parameters() if p.requires_grad]
    grad_of: dict[int, Tensor] = {}

    def run() -> None:
        value = _mean(loss(passes.model))
        _refuse_reentrant(value)
        if not value.requires_grad or not params: return
        grads = torch.autograd.grad(value, params, allow_unused=True)
        grad_of.update((id(p), g) for p, g in zip(params, grads) if g is not None)

    with torch.enable_grad(): passes.show(listener, run)
    if not grad_of:
        raise ValueError("loss: no gradient of it reaches the model; compute it from what `model(x)` gives, without "
                         "`detach`, of a model with weights that have `requires_grad`")
    moments = listener.moments
    return {u: dict(grad_std=_std(moments.get(u, [])), weight_grad=_relative(u, grad_of)) for u in passes.units}


class _Listener:
    "Takes the moments of the gradient at the output of each unit. It is an `Observer`."
    changes = busy = False
    in_graph = True

    def __init__(self): self.moments: dict[Unit, list[Moments]] = {}

    def observe(self, use: Use, out: Any) -> Any: return self._listen(use.unit, out, use.rows)
    def observe_block(self, u: Unit, out: Any, again: Any, args: tuple) -> Any: return self._listen(u, out)

    def _listen(self, u: Unit, out: Any, rows: slice | None = None) -> Any:
        def arrived(grad):
            if rows is not None: grad = grad[rows]
            if grad.numel(): self.moments.setdefault(u, []).append(whole_moments(grad))

        x = first_tensor(out)
        # A tensor's hook belongs to the value that it has now, whatever an in-place activation writes to it later.
        if x is not None and x.requires_grad: x.register_hook(arrived)
        return out


def _refuse_reentrant(value: Tensor) -> None:
    "Raise `ValueError` if the graph goes through a reentrant checkpoint, whose inside it does not show."
    seen,todo = set(),[value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen: continue
        seen.add(node)
        if node.name().startswith('CheckpointFunction'):
            raise ValueError("loss: the model uses reentrant checkpoints, which hide the gradients of the layers "
                             "inside; pass use_reentrant=False to torch.utils.checkpoint.checkpoint")
        todo += [n for n, _ in node.next_functions]


def _mean(loss: Any) -> Tensor:
    "The loss as one number. Raises `TypeError` if it is not a tensor."
    if isinstance(loss, Tensor): return loss.float().mean() if loss.dtype.itemsize < 4 else loss.mean()
    raise TypeError(f"loss: it gives a {type(loss).__name__}; `layer_stats` takes a loss that gives a tensor")


def _std(calls: list[Moments]) -> float | None:
    if not calls: return None
    _,std = pool(calls).stats()
    return float(std)


def _relative(u: Unit, grad_of: dict[int, Tensor]) -> float | None:
    "Norm of the gradient over that of the weight; `None` if no gradient reaches it."
    reached = [r for r in u.weights if isinstance(r, Ref) and id(r.param) in grad_of]
    if not reached: return None
    grad,size = _norm(r.own_grad(grad_of[id(r.param)]) for r in reached),_norm(r.tensor for r in reached)
    return grad/size if size else math.inf if grad else 0.


def _norm(tensors: Iterable[Tensor]) -> float:
    def one(t):
        t = t.detach().to_dense() if t.layout != torch.strided else t.detach()
        return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).item()
    return math.hypot(*map(one, tensors))
