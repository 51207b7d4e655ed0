"What the demonstration and the studies share: lesson 11's network, scikit-learn's digits, and how a command is run."
from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders
from fastcore.script import anno_parser
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ['GeneralRelu', 'ConvLayer', 'lesson11', 'shuffled', 'digits', 'split_digits', 'loaders', 'digits_dls',
           'pair', 'run_command']

_SEED = 42  # Of every split and every choice of images, so that these are always the same


class GeneralRelu(nn.Module):
    "Leaky ReLU minus a shift. The notebook treats the shift as the bias of the layer."
    def __init__(self, leak: float = 0.1, sub: float = 0.4):
        super().__init__()
        self.leak,self.sub = leak,sub

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.leak) - self.sub


class ConvLayer(nn.Module):
    "`ConvLayer` of the lesson-11 notebook. It ends with its activation, and its `bias` is the activation's shift."
    def __init__(self, ni: int, nf: int, ks: int = 3, stride: int = 2, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(ni, nf, ks, padding=ks//2, stride=stride)
        self.relu = GeneralRelu(**kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))

    @property
    def bias(self) -> float:
        return -self.relu.sub

    @bias.setter
    def bias(self, v: float) -> None:
        self.relu.sub = -v

    @property
    def weight(self) -> Tensor:
        return self.conv.weight


def lesson11(
    n_in: int = 1,  # Channels of the images
    n_out: int = 10,  # Classes
    nfs: tuple[int, ...] = (8, 16, 32, 64, 64),  # Filters of each layer
    **kwargs  # `leak` and `sub` of each `GeneralRelu`
) -> nn.Sequential:
    """The network of lesson 11's `07a_lsuv` notebook, for 28x28 images.

    It has five `ConvLayer`s of stride 2, average pooling and a linear layer."""
    widths = [n_in, *nfs]
    convs = [ConvLayer(i, o, 5 if k == 0 else 3, **kwargs) for k, (i, o) in enumerate(zip(widths, widths[1:]))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nfs[-1], n_out))


def shuffled(
    n: int,  # How many numbers
    seed: int = _SEED  # Of their order
) -> Tensor:
    "The numbers below `n` in a random order that depends on the seed alone."
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def digits(
    size: int = 28  # Pixels a side that the 8x8 images are enlarged to
) -> tuple[Tensor, Tensor]:  # Images (1797, 1, size, size) with mean 0 and std 1, and their classes
    "scikit-learn's digits. They are part of scikit-learn, so nothing is downloaded."
    images,classes = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8), size, mode='bilinear')
    return (x - x.mean())/x.std(), torch.tensor(classes)


def split_digits(
    size: int = 28,  # Pixels a side
    valid: int = 360  # Images to validate on
) -> list[tuple[Tensor, Tensor]]:  # The images and classes to train on, then those to validate on
    "`digits`, split at random. The split is always the same."
    x,y = digits(size)
    idx = shuffled(len(x))
    return [(x[part], y[part]) for part in (idx[valid:], idx[:valid])]


def loaders(
    train: tuple[Tensor, Tensor],  # Images and classes
    valid: tuple[Tensor, Tensor],
    **kwargs  # Of `DataLoaders.from_dsets`
) -> DataLoaders:
    "Images and their classes in fastai's DataLoaders, in this process alone."
    return DataLoaders.from_dsets(list(zip(*train)), list(zip(*valid)), num_workers=0, **kwargs)


def digits_dls(
    bs: int = 64,  # Batch size
    valid: int = 360  # Images to validate on
) -> DataLoaders:
    "`digits` in DataLoaders, split at random. The split is always the same."
    return loaders(*split_digits(valid=valid), bs=bs, val_bs=256, device='cpu')


def pair(mean: float, std: float) -> str:
    "(mean, std) with four decimals, the way a person reads them."
    mean = round(mean, 4) + 0.  # + 0. turns -0. into 0.
    return f'({mean:.4f}, {std:.4f})'


def run_command(
    f: Callable,  # Its parameters are the options; their comments are the help
    argv: list[str],  # The options as given
    prog: str  # The program, as the help names it
) -> Any:  # What `f` returns
    "Run a function as a command."
    options = vars(anno_parser(f, prog=prog).parse_args(argv))
    return f(**{k: v for k, v in options.items() if k not in ('pdb', 'xtra')})  # these two are fastcore's own
