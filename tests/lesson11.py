"The network of lesson 11: conv layers measured after their activation, whose shift is the bias."
import torch
import torch.nn.functional as F
from torch import nn

from fastai_lsuv import demo


class GeneralRelu(nn.Module):
    "A ReLU minus a shift, in place."
    def __init__(self, sub):
        super().__init__()
        self.sub = sub
    def forward(self, x): return F.relu(x).sub_(self.sub)


class ConvLayer(demo.ConvLayer):
    "As in the notebook: the shift is a plain number."
    def __init__(self, ni, nf, ks, sub):
        super().__init__(ni, nf, ks)
        self.relu = GeneralRelu(sub)


class LearnableConvLayer(ConvLayer):
    "As in the thread: the shift is learnt."
    def __init__(self, ni, nf, ks, sub):
        super().__init__(ni, nf, ks, nn.Parameter(torch.tensor(sub)))
    @property
    def bias(self): return -self.relu.sub
    @bias.setter
    def bias(self, v): self.relu.sub.data.copy_(-v)


def lesson11(layer=ConvLayer, sub=0.):
    widths = [1, 8, 16, 32, 64, 64]
    convs = [layer(i, o, 5 if i == 1 else 3, sub) for i, o in zip(widths, widths[1:])]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
