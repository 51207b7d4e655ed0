"""The projections inside of `F.multi_head_attention_forward`, which no hook and no `TorchFunctionMode` sees.

`input_projections` gives each projection of an input as a linear layer. `beside` computes one only to measure it.
`with_projected` makes attention take inputs that are projected already."""
from __future__ import annotations

import inspect
from typing import Any, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['Projection', 'arguments_of', 'input_projections', 'beside', 'with_projected']

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class Projection(NamedTuple):
    "A projection of an input of attention."
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    letter: str  # "q", "k" or "v" where one parameter holds all three, else ""
    argument: str  # The argument that holds the weight
    rows: slice  # Of the bias, and of a weight that holds all three


def arguments_of(args: tuple, kwargs: dict) -> dict[str, Any]:
    "The arguments of a call of `F.multi_head_attention_forward`, by name."
    return _SIGNATURE.bind(*args, **kwargs).arguments


def input_projections(arguments: dict[str, Any]) -> Iterator[Projection]:
    "The projections of query, key and value."
    size,separate = arguments['embed_dim_to_check'],arguments.get('use_separate_proj_weight', False)
    bias = arguments['in_proj_bias']
    for i, name in enumerate(('query', 'key', 'value')):
        rows,letter,x = slice(i*size, (i + 1)*size),name[0],arguments[name]
        x = x.transpose(0, 1) if x.dim() == 3 else x  # samples first
        argument = f'{letter}_proj_weight' if separate else 'in_proj_weight'
        weight = arguments[argument] if separate else arguments[argument][rows]
        yield Projection(x, weight, bias[rows] if bias is not None else None, '' if separate else letter, argument,
                         rows)


@torch.no_grad()
def beside(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    "A projection that is only measured. Autocast must not keep the weight it casts here, which has no gradient."
    return F.linear(x.detach(), weight.detach(), bias.detach() if bias is not None else None)


def with_projected(arguments: dict[str, Any], qkv: list[Tensor]) -> dict[str, Any]:
    "The arguments for inputs that are projected already, samples first. Attention's own projection is the identity."
    inputs = dict(zip(('query', 'key', 'value'), (x.transpose(0, 1) if x.dim() == 3 else x for x in qkv)))
    same = torch.eye(arguments['embed_dim_to_check'], dtype=qkv[0].dtype, device=qkv[0].device)
    weights = dict(q_proj_weight=same, k_proj_weight=same, v_proj_weight=same, in_proj_weight=None, in_proj_bias=None)
    return arguments | inputs | weights | dict(use_separate_proj_weight=True)
