"The network of lesson 11: conv layers measured after their activation, whose shift is the bias."
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GeneralRelu(nn.Module):
    def __init__(self, leak=None, sub=None, maxv=None):
        super().__init__()
        self.leak,self.sub,self.maxv = leak,sub,maxv
    def forward(self, x):
        x = F.leaky_relu(x, self.leak) if self.leak is not None else F.relu(x)
        if self.sub is not None:
            x.sub_(self.sub)
        if self.maxv is not None:
            x.clamp_max_(self.maxv)
        return x


class ConvLayer(nn.Module):
    "As in the notebook: the shift is a plain number."
    def __init__(self, ni, nf, ks=3, stride=2, sub=0., **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(ni, nf, ks, padding=ks//2, stride=stride, bias=True)
        self.relu = GeneralRelu(sub=sub, **kwargs)
    def forward(self, x): return self.relu(self.conv(x))
    @property
    def bias(self): return -self.relu.sub
    @bias.setter
    def bias(self, v):
        self.relu.sub = -v
    @property
    def weight(self): return self.conv.weight


class LearnableConvLayer(ConvLayer):
    "As in the thread: the shift is learnt."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu.sub = nn.Parameter(torch.tensor(self.relu.sub))
    @property
    def bias(self): return -self.relu.sub
    @bias.setter
    def bias(self, v):
        self.relu.sub.data.copy_(-v)


def lesson11(layer=ConvLayer, widths=(8, 16, 32, 64, 64), channels=1, n_out=10, **kwargs):
    nfs = [channels, *widths]
    layers = [layer(i, o, 5 if k == 0 else 3, **kwargs) for k, (i, o) in enumerate(zip(nfs, nfs[1:]))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nfs[-1], n_out))
