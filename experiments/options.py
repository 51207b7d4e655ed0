"Options that several experiments share, and what they give: the images, the network and its training."
from typing import Any

from fastai.callback.channelslast import ChannelsLast
from fastcore.basics import store_attr
from fastcore.meta import delegates
from torch import nn

from .data import Augment, Images, get_images
from .networks import fitnet4
from .starts import start
from .study import OUT, Runs, positive

__all__ = ['ImageOptions', 'FitNetOptions']


class ImageOptions:
    """Options of an experiment that trains on images. A command takes them over with `@delegates`.

    Its module must not import `annotations` from `__future__`: the command line needs the types themselves."""
    def __init__(self,
        data: str = 'digits',  # 'digits', 'mnist', 'cifar', or a folder: train/<class>/ and test/<class>/, or IDX files
        download: bool = False,  # Let fastai fetch 'mnist' or 'cifar'
        n: int = 0,  # Images to train on, and a quarter as many to test; 0: all
        size: int = 16,  # Pixels a side of the images
        bs: int = 32,  # Batch size
        mom: float = 0.9,  # Momentum of SGD
        augment: bool = False,  # Flip and shift the images in training
        out: str = OUT  # Folder for tables and picture; '' saves nothing
    ):
        positive(size=size, bs=bs)
        store_attr()

    def images(self) -> Images:
        "The images that the options name."
        return get_images(self.data, n=self.n, size=self.size, download=self.download)


class FitNetOptions(ImageOptions):
    "Options of an experiment with FitNet-4."
    @delegates(ImageOptions)
    def __init__(self,
        width: float = 0.25,  # Filters, as a share of FitNet-4's
        depth: float = 1.,  # Layers, as a share of FitNet-4's 17
        lr: float = 0.01,  # Learning rate of SGD; this is the paper's first
        wd: float = 5e-4,  # Weight decay
        order: str = 'std',  # LSUV's loops; the paper scales only
        **kwargs
    ):
        super().__init__(**kwargs)
        positive(width=width, depth=depth, lr=lr)
        store_attr('width,depth,lr,wd,order')

    def network(self,
        images: Images,  # The network fits their channels and classes
        act: str,  # One of `ACTIVATIONS`
        **kwargs: Any  # Other options of `fitnet4`
    ) -> nn.Sequential:
        "FitNet-4 at the chosen width and depth."
        return fitnet4(act, n_in=images.channels, n_out=images.classes, width=self.width, depth=self.depth, **kwargs)

    def train(self,
        runs: Runs,
        arm: dict[str, Any],  # What tells the arm apart, a column each
        seed: int,  # Of the batches
        model: nn.Module,
        init: str,  # One of `STARTS`
        pairs: bool = False  # As in `start`
    ) -> None:
        "Initialize `model` and train it as one arm."
        cbs = [*start(model, init, self.order, pairs), ChannelsLast(), *([Augment()] if self.augment else [])]
        runs.fit(arm, seed, model, self.lr, cbs, mom=self.mom, wd=self.wd)
