"The initial weights of the networks."
from __future__ import annotations

from functools import partial
from typing import Callable

import torch
from fastai.basics import Callback
from torch import Tensor, nn

from .. import LSUVCallback

__all__ = ['STARTS', 'fill', 'start']


@torch.no_grad()
def fill(
    model: nn.Module,
    weight_: Callable[[Tensor], object],  # Fills a weight in place
    zero_bias: bool = True  # Zero the biases; otherwise they stay as PyTorch made them
) -> None:
    "Give every conv and linear layer of `model` its first weight."
    for m in model.modules():
        if not isinstance(m, (nn.Conv2d, nn.Linear)): continue
        weight_(m.weight)
        if zero_bias and m.bias is not None:
            m.bias.zero_()


STARTS = {
    'LSUV': nn.init.orthogonal_,  # LSUV begins with these
    'orthonormal': nn.init.orthogonal_,
    'Xavier': nn.init.xavier_uniform_,
    'MSRA': partial(nn.init.kaiming_normal_, nonlinearity='relu'),
    'PyTorch': None,  # the weights stay as PyTorch made them
}


def start(
    model: nn.Module,  # Fresh from its constructor
    name: str,  # One of `STARTS`
    order: str = 'std',  # Of LSUV's loops
    **kwargs  # Other options of `LSUVCallback`
) -> list[Callback]:  # The callbacks that a Learner needs to complete the start: `LSUVCallback`, or none
    "Give `model` the initial weights that `name` names."
    if STARTS[name] is not None:
        fill(model, STARTS[name])
    return [LSUVCallback(order=order, preinit=None, **kwargs)] if name == 'LSUV' else []
