"The networks of the source documents."
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['GeneralRelu', 'ConvLayer', 'lesson11']


class GeneralRelu(nn.Module):
    "Leaky ReLU less a shift that the notebook treats as the layer's bias."
    def __init__(self, leak: float = 0.1, sub: float = 0.4):
        super().__init__()
        self.leak,self.sub = leak,sub
    def forward(self, x: Tensor) -> Tensor: return F.leaky_relu(x, self.leak) - self.sub


class ConvLayer(nn.Module):
    "The lesson-11 notebook's `ConvLayer`: measured after its activation, its `bias` the activation's shift."
    def __init__(self, ni: int, nf: int, ks: int = 3, stride: int = 2, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(ni, nf, ks, padding=ks//2, stride=stride)
        self.relu = GeneralRelu(**kwargs)
    def forward(self, x: Tensor) -> Tensor: return self.relu(self.conv(x))
    @property
    def bias(self) -> float: return -self.relu.sub
    @bias.setter
    def bias(self, v: float) -> None: self.relu.sub = -v
    @property
    def weight(self) -> Tensor: return self.conv.weight


def lesson11(
    n_in: int = 1,  # Channels of the images
    n_out: int = 10,  # Classes
    nfs: tuple[int, ...] = (8, 16, 32, 64, 64),  # Filters of each layer
    **kwargs  # `leak` and `sub` of each `GeneralRelu`
) -> nn.Sequential:
    "The network of lesson 11's `07a_lsuv` notebook, for 28x28 images: five `ConvLayer`s of stride 2, pooled into a linear layer."
    widths = [n_in, *nfs]
    convs = [ConvLayer(i, o, 5 if k == 0 else 3, **kwargs) for k, (i, o) in enumerate(zip(widths, widths[1:]))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nfs[-1], n_out))
