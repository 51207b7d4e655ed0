"The initial weights of the networks."
from __future__ import annotations

from functools import partial
from typing import Callable

import torch
from fastai.basics import Callback
from torch import Tensor, nn

from fastai_lsuv import LSUVCallback

__all__ = ['STARTS', 'fill', 'mirrored', 'start']


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


@torch.no_grad()
def mirrored(
    model: nn.Module  # Conv and linear layers one after the other, in the order of `modules()`
) -> None:
    """Orthonormal weights in pairs: half of the rows are the negatives of the others, and biases are zero.

    The next layer takes the difference of a pair. One of its two ReLUs is open, so nothing is lost, and the network
    starts as a linear one: the looks-linear start of Balduzzi et al. (2017). The last layer puts out no pairs.
    GELU and SiLU do as well as ReLU. An odd function such as tanh gains nothing, and makes half of the units copies."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    known = {id(m.weight) for m in layers if getattr(m, 'groups', 1) == 1}
    other = next((name for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in known), None)
    if other: raise ValueError(f"model: {other!r} is no weight of a Conv2d without groups or of a Linear layer; "
                               "`mirrored` takes a chain of these alone")
    paired = False  # Whether what comes in are pairs
    for m in layers:
        out,ins,*kernel = m.weight.shape
        pairs = m is not layers[-1] and out % 2 == 0
        w = nn.init.orthogonal_(torch.empty(out//(1 + pairs), ins//(1 + paired), *kernel))
        if paired: w = torch.cat([w, -w], 1)
        m.weight.copy_(torch.cat([w, -w]) if pairs else w)
        if m.bias is not None: m.bias.zero_()
        paired = pairs


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
    pairs: bool = False,  # Begin from `mirrored` weights
    **kwargs  # Other options of `LSUVCallback`
) -> list[Callback]:  # The callbacks that a Learner needs to complete the start: `LSUVCallback`, or none
    "Give `model` the initial weights that `name` names."
    if pairs: mirrored(model)
    elif STARTS[name] is not None: fill(model, STARTS[name])
    return [LSUVCallback(order=order, preinit=None, **kwargs)] if name == 'LSUV' else []
