"The networks of the source documents."
from __future__ import annotations

from functools import partial, reduce

import torch
from torch import Tensor, nn

__all__ = ['torch_port', 'Maxout', 'ACTIVATIONS', 'FITNET4', 'Residual', 'fitnet4', 'deep_relu']


def torch_port(
    n_out: int = 10  # Classes
) -> nn.Sequential:
    "The MNIST network of the Torch port, for 32x32 images. It is the network of Torch's own example, with ReLU."
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(3, 3, padding=1),
        nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64*3*3, 200), nn.ReLU(), nn.Linear(200, n_out))


class Maxout(nn.Module):
    "Splits the channels into `pieces` and takes the largest value over the pieces."
    def __init__(self, pieces: int = 2):
        super().__init__()
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.maximum, x.chunk(self.pieces, 1))


ACTIVATIONS = {
    'maxout': Maxout,
    'ReLU': nn.ReLU,
    'VLReLU': partial(nn.LeakyReLU, 0.333),
    'tanh': nn.Tanh,
    'sigmoid': nn.Sigmoid,
}

# The stages, each of groups of (filters, layers). A pooling ends each stage.
FITNET4 = (((32, 3), (48, 2)), ((80, 6),), ((128, 6),))


def _layer(ni: int, nf: int, act: str, norm: bool) -> list[nn.Module]:
    "A 3x3 convolution and its activation, which gives `nf` channels."
    out = nf*(2 if act == 'maxout' else 1)
    conv = nn.Conv2d(ni, out, 3, padding=1, bias=not norm)
    normed = [conv, nn.BatchNorm2d(out)] if norm else [conv]
    return [*normed, ACTIVATIONS[act]()]


class Residual(nn.Module):
    "`x + layers(x)`."
    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def fitnet4(
    act: str = 'ReLU',  # One of `ACTIVATIONS`
    *,
    n_in: int = 3,  # Channels of the images
    n_out: int = 10,  # Classes
    width: float = 1.,  # Filters, as a share of the original's
    depth: float = 1.,  # Layers of each group, as a share of the original's
    norm: bool = False,  # Batch norm after each convolution
    residual: bool = False  # Skip past each two layers of equal width
) -> nn.Sequential:
    """FitNet-4, the thin deep net of the paper: 17 convolutions in three stages, then two linear layers.

    Pooling over the whole image follows the last stage. Maxout takes the larger of twice as many channels. The residual
    companion has the same layers. There, two layers that keep the width add to their input."""
    def scaled(n: int, by: float) -> int:
        return max(round(n*by), 1)
    ni,layers = n_in,[]
    for stage in FITNET4:
        for nf, n in stage:
            nf,n = scaled(nf, width),scaled(n, depth)
            layers += _layer(ni, nf, act, norm)
            ni = nf
            same = [_layer(nf, nf, act, norm) for _ in range(n - 1)]
            if residual:
                layers += [Residual(sum(same[i:i+2], [])) for i in range(0, n - 1, 2)]
            else:
                layers += sum(same, [])
        layers.append(nn.MaxPool2d(2) if stage is not FITNET4[-1] else nn.AdaptiveMaxPool2d(1))
    hidden = scaled(500, width)
    out = hidden*(2 if act == 'maxout' else 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(ni, out), ACTIVATIONS[act](), nn.Linear(hidden, n_out))


def deep_relu(
    depth: int,  # Linear layers
    n_in: int,  # Pixels of an image
    n_out: int = 10,  # Classes
    width: int = 64  # Units of each hidden layer
) -> nn.Sequential:
    "A plain ReLU network: linear layers with ReLU between them."
    widths = [n_in, *[width]*(depth - 1), n_out]
    layers = sum(([nn.Linear(i, o), nn.ReLU()] for i, o in zip(widths, widths[1:])), [])
    return nn.Sequential(nn.Flatten(), *layers[:-1])
