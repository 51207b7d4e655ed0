"Networks that people train: those of the study `benefit`. `ZOO` has their tasks and builders."
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import torch
from fastai.callback.rnn import rnn_cbs
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_text_classifier
from fastai.vision.models.xresnet import ResBlock, XResNet
from torch import Tensor, nn
from torchvision.models import ConvNeXt, DenseNet, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.squeezenet import Fire

from .networks import Maxout, Residual, fitnet4
from .starts import fill
from .tasks import Task

__all__ = ['Entry', 'ZOO', 'plain_cnn', 'NormFree', 'UNet', 'GPT']


def plain_cnn(
    task: Task,
    act: Callable[[], nn.Module],
    width: int = 8,  # Channels of the first stage
    pieces: int = 1,  # Channels that the activation makes one of
    lecun: bool = False,  # Whether it starts from LeCun's weights, as networks with SELU do
    norm: bool = False  # Whether a batch norm follows each convolution
) -> nn.Sequential:
    "Seven convolutions in three stages with max pooling between them, and a linear layer."
    ni,layers = task.n_in,[]
    for k, (nf, n) in enumerate(((width, 2), (2*width, 2), (4*width, 3))):
        for _ in range(n):
            layers += [nn.Conv2d(ni, nf*pieces, 3, padding=1, bias=not norm), *[nn.BatchNorm2d(nf)]*norm, act()]
            ni = nf
        layers.append(nn.MaxPool2d(2) if k < 2 else nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(ni, task.n_out))
    if lecun: fill(model, partial(nn.init.kaiming_normal_, nonlinearity='linear'))
    return model


def NormFree(task: Task, width: int = 8) -> nn.Sequential:
    "A residual network without norm: six blocks of ReLU, conv, ReLU, conv."
    def conv(ni, nf, stride=1): return nn.Conv2d(ni, nf, 3, stride, 1)
    def block(nf): return Residual([nn.ReLU(), conv(nf, nf), nn.ReLU(), conv(nf, nf)])
    stages = [[conv(ni, nf, stride), block(nf), block(nf)]
              for ni, nf, stride in ((task.n_in, width, 1), (width, 2*width, 2), (2*width, 4*width, 2))]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4*width, task.n_out)]
    return nn.Sequential(*sum(stages, []), *head)


class UNet(nn.Module):
    "A U-Net of three levels."
    def __init__(self, task: Task, width: int = 8, norm: bool = False):
        super().__init__()
        def one(ni, nf): return [nn.Conv2d(ni, nf, 3, padding=1, bias=not norm), *[nn.BatchNorm2d(nf)]*norm, nn.ReLU()]
        def two(ni, nf): return nn.Sequential(*one(ni, nf), *one(nf, nf))
        self.pool = nn.MaxPool2d(2)
        self.down1,self.down2,self.bottom = two(task.n_in, width),two(width, 2*width),two(2*width, 4*width)
        self.up2,self.up1 = nn.ConvTranspose2d(4*width, 2*width, 2, 2),nn.ConvTranspose2d(2*width, width, 2, 2)
        self.join2,self.join1 = two(4*width, 2*width),two(2*width, width)
        self.head = nn.Conv2d(width, task.n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        x = self.bottom(self.pool(b))
        x = self.join2(torch.cat([self.up2(x), b], 1))
        return self.head(self.join1(torch.cat([self.up1(x), a], 1)))


class _Block(nn.Module):
    "A block of a GPT: attention, then two linear layers, each added to its input and behind a layer norm."
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1,self.norm2 = nn.LayerNorm(dim),nn.LayerNorm(dim)
        self.qkv,self.proj = nn.Linear(dim, 3*dim),nn.Linear(dim, dim)
        self.fc1,self.fc2 = nn.Linear(dim, 4*dim),nn.Linear(4*dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q,k,v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    "A small GPT with GPT-2's start: normal weights of std 0.02, and less at the end of a residual branch."
    def __init__(self, task: Task, dim: int = 32, blocks: int = 2, heads: int = 4, length: int = 32):
        super().__init__()
        self.tokens,self.places = nn.Embedding(task.n_in, dim),nn.Parameter(torch.zeros(length, dim))
        self.blocks = nn.Sequential(*[_Block(dim, heads) for _ in range(blocks)])
        self.norm,self.head = nn.LayerNorm(dim),nn.Linear(dim, task.n_out, bias=False)
        for name, p in self.named_parameters():
            last = name.endswith(('proj.weight', 'fc2.weight'))
            if p.ndim > 1: nn.init.normal_(p, std=.02/(2*blocks)**.5 if last else .02)
            elif 'norm' not in name: nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:  # (N, classes, length), as cross-entropy takes it
        x = self.tokens(x) + self.places[:x.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


class _InColour(nn.Module):
    "A network for images of three channels, given grey ones."
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor: return self.model(x.expand(-1, 3, -1, -1))


def _xresnet(task: Task, width: int = 16) -> nn.Module:
    model = XResNet(ResBlock, 1, [1]*4, c_in=task.n_in, n_out=task.n_out, stem_szs=(width, width, 64), widen=width/64)
    return nn.Sequential(nn.Upsample(scale_factor=2), model)  # it begins by halving the image twice


def _resnet(task: Task, width: int = 16) -> nn.Sequential:
    "torchvision's resnet18 with fewer filters, and a stem for small images. It starts as torchvision's does."
    def conv(ni, nf, size, stride=1):
        return nn.Sequential(nn.Conv2d(ni, nf, size, stride, size//2, bias=False), nn.BatchNorm2d(nf))
    blocks,ni = [],width
    for k in range(4):
        nf,stride = width*2**k,min(k + 1, 2)
        down = conv(ni, nf, 1, stride) if k else None
        blocks += [BasicBlock(ni, nf, stride, down), BasicBlock(nf, nf)]
        ni = nf
    body = nn.Sequential(conv(task.n_in, width, 3), nn.ReLU(), *blocks)
    for m in body.modules():
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ni, task.n_out))


def _convnext(task: Task, width: int = 24) -> nn.Module:
    stages = [CNBlockConfig(width, 2*width, 2), CNBlockConfig(2*width, None, 2)]
    model = ConvNeXt(stages, num_classes=task.n_out)
    stem = model.features[0][0]  # made for large images, it would leave 2x2 pixels of 8x8
    stem.stride,stem.kernel_size,stem.weight = (2, 2),(2, 2),nn.Parameter(stem.weight.detach()[..., 1:3, 1:3].clone())
    return _InColour(model)


def _vit(task: Task, size: int = 8, width: int = 48) -> nn.Module:
    return _InColour(VisionTransformer(size, size//4, 4, 4, width, 2*width, num_classes=task.n_out))


def _mlp(task: Task, width: int = 64, depth: int = 6) -> nn.Sequential:
    widths = [task.n_in, *[width]*(depth - 1), task.n_out]
    return nn.Sequential(*sum(([nn.Linear(i, o), nn.ReLU()] for i, o in zip(widths, widths[1:])), [])[:-1])


def _mlp_of_10(task: Task, size: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), _mlp(replace(task, n_in=task.n_in*size**2), depth=10))


def _cnn_of_20(task: Task, width: int = 16) -> nn.Sequential:
    "Nineteen convolutions, two of them with stride 2, and a linear layer."
    layers,ni = [],task.n_in
    for k in range(19):
        nf = width*2**(k//7)
        layers += [nn.Conv2d(ni, nf, 3, 2 if k in (7, 14) else 1, 1), nn.ReLU()]
        ni = nf
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ni, task.n_out))


def _squeezenet(task: Task, width: int = 16) -> nn.Sequential:
    "SqueezeNet 1.1, with a stem for small images."
    def fire(ni, nf): return Fire(ni, nf//8, nf//2, nf//2)
    stages = [fire(width, 2*width), fire(2*width, 2*width), nn.MaxPool2d(2),
              fire(2*width, 4*width), fire(4*width, 4*width), nn.MaxPool2d(2),
              fire(4*width, 6*width), fire(6*width, 6*width), fire(6*width, 8*width), fire(8*width, 8*width)]
    head = [nn.Conv2d(8*width, task.n_out, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(task.n_in, width, 3, padding=1), nn.ReLU(), *stages, *head)


def _densenet(task: Task, growth: int = 8) -> nn.Module:
    model = DenseNet(growth, (4, 4, 4), 2*growth, bn_size=2, num_classes=task.n_out)
    for m in list(model.modules()):
        for name, child in m.named_children():
            if isinstance(child, nn.BatchNorm2d): setattr(m, name, nn.Identity())
    model.features.conv0,model.features.pool0 = nn.Conv2d(task.n_in, 2*growth, 3, padding=1),nn.Identity()
    return model


def _tabular(task: Task) -> nn.Module:
    "What `tabular_learner` builds for 8 sizes (and an unknown one) and 30 numbers."
    return TabularModel([(9, 5)], 30, task.n_out, [64, 32])


def _awd_lstm(task: Task) -> nn.Module:
    config = dict(emb_sz=32, n_hid=48, n_layers=2)
    return get_text_classifier(AWD_LSTM, task.n_in, task.n_out, config=config, drop_mult=.3)


@dataclass(frozen=True)
class Entry:
    "A network of the zoo."
    what: str  # It, in words
    task: str  # One of the names in `benefit.tasks`
    build: Callable[[Task], nn.Module]
    sgd: bool = False  # Whether SGD trains it, too
    cbs: Callable[[], list] = list  # Callbacks that it needs
    size: int = 8  # Pixels a side of the images that it is made for
    normed: bool = False  # Whether LSUV is also tried without the layers before a norm
    longer: int = 1  # Times the epochs of the scale; in four a U-Net has found the background, and no digit


ZOO = {
    'CNN ReLU': Entry('plain CNN of 8 layers, ReLU', 'classify', partial(plain_cnn, act=nn.ReLU), True),
    'CNN GELU': Entry('plain CNN of 8 layers, GELU', 'classify', partial(plain_cnn, act=nn.GELU)),
    'CNN tanh': Entry('plain CNN of 8 layers, tanh', 'classify', partial(plain_cnn, act=nn.Tanh), True),
    'CNN SELU': Entry("plain CNN of 8 layers, SELU, LeCun's weights", 'classify',
                      partial(plain_cnn, act=nn.SELU, lecun=True)),
    'CNN maxout': Entry('plain CNN of 8 layers, maxout', 'classify', partial(plain_cnn, act=Maxout, pieces=2)),
    'FitNet-4 ReLU': Entry("FitNet-4, 19 layers, a quarter of its filters", 'classify',
                           lambda t: fitnet4('ReLU', n_in=t.n_in, n_out=t.n_out, width=.25), True),
    'norm-free ResNet': Entry('residual network of 16 layers without norm', 'classify', NormFree, True),
    'xresnet': Entry("fastai's xresnet of 4 blocks, batch norm", 'classify', _xresnet, True),
    'ResNet': Entry("torchvision's resnet18 with a quarter of its filters, batch norm", 'classify', _resnet, True),
    'ConvNeXt': Entry("torchvision's ConvNeXt of 4 blocks, layer norm", 'classify', _convnext),
    'ViT': Entry("torchvision's ViT of 4 blocks, layer norm", 'classify', _vit),
    'U-Net': Entry('U-Net of 3 levels without norm', 'segment', UNet, longer=3),
    'U-Net batch norm': Entry('U-Net of 3 levels, batch norm', 'segment', partial(UNet, norm=True), longer=3),
    'MLP': Entry('MLP of 6 layers, ReLU', 'diabetes', _mlp),
    'tabular': Entry("the model of fastai's tabular_learner, batch norm", 'tumours', _tabular),
    'AWD-LSTM': Entry("fastai's AWD-LSTM classifier", 'pages', _awd_lstm, cbs=rnn_cbs),
    'GPT': Entry("GPT of 2 blocks, GPT-2's start, layer norm", 'characters', GPT),
    'CNN of 20': Entry('plain CNN of 20 layers, ReLU', 'classify', _cnn_of_20, True, size=16),
    'SqueezeNet': Entry("torchvision's SqueezeNet with a quarter of its filters", 'classify', _squeezenet, True,
                        size=16),
    'DenseNet norm-free': Entry("torchvision's DenseNet of 12 layers, without norm", 'classify', _densenet, True,
                                size=16),
    'ResNet norm-free': Entry('residual network of 16 layers without norm', 'classify', NormFree, True, size=16),
    'MLP of 10': Entry('MLP of 10 layers, ReLU', 'classify', _mlp_of_10, True, size=16),
    'ResNet batch norm': Entry("torchvision's resnet18 with a quarter of its filters", 'classify', _resnet, True,
                               size=16, normed=True),
    'xresnet batch norm': Entry("fastai's xresnet of 4 blocks", 'classify', _xresnet, True, size=16, normed=True),
    'CNN batch norm': Entry('plain CNN of 8 layers, ReLU, batch norm', 'classify',
                            partial(plain_cnn, act=nn.ReLU, norm=True), True, size=16, normed=True),
}
