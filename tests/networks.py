"""The networks that LSUV is judged on: torchvision, timm, fastai, transformers, torch_geometric, and hard cases.

Weights are never downloaded."""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from importlib import import_module as lib  # others' packages are imported as a network is made
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import nn, randn
from torch.utils.checkpoint import checkpoint

NETWORKS: dict[str, Network] = {}


@dataclass
class Network:
    name: str
    make: Callable[[], tuple[nn.Module, Any]]  # The model, and a mini-batch: a tensor, or a tuple or dict of its inputs
    statuses: dict[str, str]  # By unit, those that are not "ok" or "no bias"

    def __call__(self) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return self.make()


def network(name: str, statuses: dict[str, str] | None = None):
    "Add what the decorated function makes to `NETWORKS`."
    def add(make): NETWORKS[name] = Network(name, make, statuses or {})
    return add


def unresponsive(*names: str): return dict.fromkeys(names, 'unresponsive')
def images(n: int = 16, size: int = 64, channels: int = 3): return randn(n, channels, size, size)
def param(*shape: int): return nn.Parameter(randn(shape)*0.02)


class Mod(nn.Module):
    "A module whose children or parameters are keyword arguments and whose forward is a function of it and its inputs."
    def __init__(self, forward: Callable | None, **children):
        super().__init__()
        self.f = forward
        for k, m in children.items():
            setattr(self, k, m)
    def forward(self, *args, **kwargs): return self.f(self, *args, **kwargs)


class Logged(nn.Module):
    "A linear layer and a batch norm, and a log of how many samples came."
    def __init__(self):
        super().__init__()
        self.lin,self.bn,self.log = nn.Linear(4, 8),nn.BatchNorm1d(8),[]
    def forward(self, x):
        self.log.append(len(x))
        return self.bn(self.lin(x))


def chain(widths: tuple[int, ...], layer: Callable, act: Callable):
    "Layers of these widths, each but the last with an activation."
    layers = [m for i, o in zip(widths, widths[1:]) for m in (layer(i, o), act())]
    return nn.Sequential(*layers[:-1])


def mlp(*widths: int, act=nn.ReLU): return chain(widths, nn.Linear, act)
def cnn(*widths: int, act=nn.ReLU): return chain(widths, partial(nn.Conv2d, kernel_size=3, padding=1), act)


# --- torchvision: as they come where they are small, else the same class with less of everything

def _torchvision(name: str, n: int = 8, size: int = 64, **kwargs):
    @network(f'torchvision/{name}')
    def _(): return getattr(lib('torchvision.models'), name)(weights=None, **kwargs), images(n, size)


for _name in ['resnet18', 'resnet50', 'squeezenet1_1', 'densenet121', 'mobilenet_v2', 'mobilenet_v3_small',
              'shufflenet_v2_x0_5', 'mnasnet0_5', 'efficientnet_b0', 'regnet_y_400mf']:
    _torchvision(_name)
_torchvision('googlenet', init_weights=False)  # returns a named tuple, with auxiliary heads
_torchvision('inception_v3', n=4, size=96, init_weights=False, aux_logits=False)


def narrow_classifier(model, width: int = 64):
    "The same layers with fewer units: `model.classifier` holds nine tenths of the weights."
    linear = [k for k, m in enumerate(model.classifier) if isinstance(m, nn.Linear)]
    for k, i, o in zip(linear, (model.classifier[linear[0]].in_features, width, width), (width, width, 10)):
        model.classifier[k] = nn.Linear(i, o)
    return model, images(8)


def _vgg(name: str, widths: list):
    @network(f'torchvision/{name}')
    def _():
        vgg = lib('torchvision.models.vgg')
        features = vgg.make_layers(widths, batch_norm='bn' in name)
        with torch.device('meta'):
            model = vgg.VGG(features, init_weights=False)  # 500 MB that are thrown away
        return narrow_classifier(model)


_vgg('vgg11', [32, 'M', 64, 'M', 128, 128, 'M', 256, 256, 'M', 512, 512, 'M'])
_vgg('vgg11_bn', [32, 'M', 64, 'M', 128, 128, 'M', 256, 256, 'M', 512, 512, 'M'])
_vgg('vgg16', [32, 32, 'M', 64, 64, 'M', 128, 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M'])


class Torchvision:
    def alexnet(): return narrow_classifier(lib('torchvision.models').AlexNet())
    def convnext():
        convnext = lib('torchvision.models.convnext')
        blocks = [convnext.CNBlockConfig(*sizes, 2) for sizes in ((24, 48), (48, 96), (96, None))]
        return convnext.ConvNeXt(blocks, num_classes=10), images(8)
    def vit():
        sizes = dict(image_size=64, patch_size=16, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128)
        return lib('torchvision.models').VisionTransformer(**sizes, num_classes=10), images(8)
    def swin():  # the attention applies the weights of its `qkv` and `proj` itself, without calling them
        swin = lib('torchvision.models').SwinTransformer
        return swin([4, 4], 24, [2, 2, 2], [2, 4, 8], [4, 4], num_classes=10), images(8)
    def deeplabv3():
        make = lib('torchvision.models.segmentation').deeplabv3_mobilenet_v3_large
        return make(weights=None, weights_backbone=None, num_classes=5), images(8)


# --- timm, likewise

def _timm(name: str, statuses: dict[str, str] | None = None, n: int = 8, size: int = 64, **kwargs):
    @network(f'timm/{name}', statuses)
    def _(): return lib('timm').create_model(name, pretrained=False, num_classes=10, **kwargs), images(n, size)


for _name in ['resnet26', 'efficientnet_lite0', 'tf_efficientnet_b0', 'regnetz_b16', 'repvgg_a0', 'ghostnet_100',
              'xception41', 'poolformer_s12', 'convnextv2_atto']:
    _timm(_name)
_timm('vit_tiny_patch16_224', img_size=64, depth=4)
# The eps of its last norm layer swallows the class token, which training makes large: see `Status.FAINT`.
_timm('deit3_small_patch16_224', {'head': 'faint'}, img_size=64, depth=3, embed_dim=96, num_heads=3)
_timm('cait_xxs24_224', img_size=64, depth=4)
# It applies the weight of its `qkv` itself, with a bias that it puts together.
_timm('beit_base_patch16_224', img_size=64, depth=3, embed_dim=96, num_heads=4)
_timm('swinv2_cr_tiny_224', img_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4)
_timm('levit_128s', n=2, size=224)
_timm('coat_lite_tiny', img_size=64)


def _mixer(name: str, **options):
    @network(f'timm/{name}', {'head': 'constant'})  # its head starts at zero
    def _():
        mixer = lib('timm.models.mlp_mixer')
        holders = dict(block_layer=mixer, mlp_layer=lib('timm.layers'), norm_layer=mixer)
        found = {k: getattr(holders[k], v) if k in holders else v for k, v in options.items()}
        return mixer.MlpMixer(img_size=64, num_blocks=3, embed_dim=64, num_classes=10, **found), images(8)


_mixer('mixer')
_mixer('gmlp', mlp_ratio=6, block_layer='SpatialGatingBlock', mlp_layer='GatedMlp')
_mixer('resmlp', mlp_ratio=4, block_layer='ResBlock', norm_layer='Affine')


def _nfnet(name: str, statuses: dict[str, str], **options):
    @network(f'timm/{name}', statuses)
    def _():
        nfnet = lib('timm.models.nfnet')
        cfg = nfnet.NfCfg((1, 1), (32, 64), stem_type='3x3', stem_chs=16, group_size=8, **options)
        return nfnet.NormFreeNet(cfg, num_classes=10), images(8)


# Weight-standardized convs, scaled through their gains, and a zero gain after each branch.
_nfnet('nfnet_skipinit', {}, attn_layer='se', attn_kwargs={}, skipinit=True)
# The gain of each last conv starts at zero.
_nfnet('nfnet', {'stages.0.0.conv3': 'constant', 'stages.1.0.conv3': 'constant'})


class Timm:
    def convmixer(): return lib('timm.models.convmixer').ConvMixer(64, 6, num_classes=10), images(8)
    def resnetv2_bit():
        layers,make = lib('timm.layers'),lib('timm.models.resnetv2').ResNetV2
        conv,norm = partial(layers.StdConv2d, eps=1e-8),partial(layers.GroupNormAct, num_groups=8)
        options = dict(channels=(32,), stem_chs=16, conv_layer=conv, norm_layer=norm, stem_type='fixed')
        return make([1], num_classes=10, **options), images(8)


# --- fastai

class Fastai:
    def xresnet18_sa(): return lib('fastai.vision.models.xresnet').xresnet18(n_out=10, sa=True), images(16)
    def xresnext18():
        make = lib('fastai.vision.models.xresnet').xresnext18
        return make(n_out=10, act_cls=lib('fastai.layers').Mish), images(16)
    def unet():
        resnet = lib('torchvision').models.resnet18(weights=None)
        body = lib('fastai.vision.learner').create_body(resnet, pretrained=False)
        return lib('fastai.vision.models.unet').DynamicUnet(body, 5, (64, 64), self_attention=True), images(8)
    def tabular():
        make = lib('fastai.tabular.model').TabularModel
        model = make([(10, 6), (5, 3)], 4, 3, [200, 100], ps=0.1, embed_p=0.1)
        return model, (torch.stack([torch.randint(0, 10, (64,)), torch.randint(0, 5, (64,))], 1), randn(64, 4))


def _awd_lstm(name: str, statuses: dict[str, str], make: str, *sizes: int, n: int, **kwargs):
    @network(f'fastai/{name}', statuses)
    def _():
        lstm,core = lib('fastai.text.models.awdlstm').AWD_LSTM,lib('fastai.text.models.core')
        config = dict(emb_sz=40, n_hid=60, n_layers=2, pad_token=1, bidir=False, hidden_p=0.2, input_p=0.2,
                      embed_p=0.1, weight_p=0.2, output_p=0.1, **kwargs)
        return getattr(core, make)(lstm, *sizes, config=config), torch.randint(2, 200, (n, 30))


_awd_lstm('awd_lstm_lm', {'1.decoder': 'tied'}, 'get_language_model', 200, n=16, tie_weights=True, out_bias=True)
_awd_lstm('awd_lstm_classifier', {}, 'get_text_classifier', 200, 3, n=32)


# --- hard cases, made by hand: each function makes a model and a mini-batch

class Hand:
    def plain_100_layers(): return cnn(3, *[16]*100), images(8, 16)
    def inplace_activations(): return cnn(3, 16, 32, 32, act=partial(nn.ReLU, inplace=True)), images(16, 16)
    def unbatched(): return cnn(3, 8, 8), randn(3, 24, 24)
    def half(): return cnn(3, 16, 16, 8).half(), images(16, 16).half()
    def bfloat16(): return mlp(16, 64, 64, 8).bfloat16(), randn(256, 16).bfloat16()
    def compiled(): return torch.compile(cnn(3, 16, 16, 8)), images(16, 16)
    # The mean is many times the std: the moments must not lose digits.
    def data_off_zero(): return mlp(32, 64, 8), 1000 + randn(256, 32)
    def frozen_parameter():
        w = param(16, 24).requires_grad_(False)
        return Mod(lambda self, x: x @ self.w @ self.v, w=w, v=param(24, 8)), 3*randn(256, 16)
    def numbers_by_name():
        def forward(self, x): return F.linear(torch.mul(x, other=2.), torch.div(self.w, other=3.)) @ self.v
        return Mod(forward, w=param(24, 16), v=param(24, 8)), randn(256, 16)
    # An autoencoder that goes back through the same weight.
    def tied_pair(): return Mod(lambda self, x: F.relu(x @ self.w) @ self.w.T, w=param(32, 16)), randn(128, 32)
    def registered_in_reverse():
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3)]
        def forward(self, x):
            for l in reversed(self.layers):
                x = F.relu(l(x))
            return self.head(x.mean((2, 3)))
        return Mod(forward, head=nn.Linear(32, 10), layers=nn.ModuleList(layers[::-1])), images(16, 16)
    def conv1d_transposed_3d():
        def forward(self, x, v, s): return self.t(F.relu(self.c(s))), self.t3(self.c3(v)), self.t2(self.c2(x))
        c,t = nn.Conv1d(4, 8, 5, stride=2),nn.ConvTranspose1d(8, 6, 5, stride=2, groups=2)
        c3,t3 = nn.Conv3d(2, 4, 3, bias=False),nn.ConvTranspose3d(4, 3, 3)
        c2 = nn.Conv2d(3, 8, 3, dilation=2, padding_mode='reflect', padding=2)
        t2 = nn.ConvTranspose2d(8, 4, 2, stride=2)
        batch = images(8, 16),randn(8, 2, 8, 8, 8),randn(8, 4, 33)
        return Mod(forward, c=c, t=t, c3=c3, t3=t3, c2=c2, t2=t2), batch
    def grouped_depthwise():
        grouped,depthwise = nn.Conv2d(4, 32, 3, groups=2),nn.Conv2d(32, 32, 3, groups=32)
        pointwise,dilated = nn.Conv2d(32, 64, 1),nn.Conv2d(64, 128, 3, groups=64, dilation=2)
        model = nn.Sequential(grouped, nn.ReLU6(), depthwise, nn.SiLU(), pointwise, nn.PReLU(), dilated)
        return model, images(16, 24, 4)
    def shared_head_on_a_pyramid():  # one conv, called at three scales
        def forward(self, x):
            p = [F.relu(self.stem(x))]
            for d in self.down:
                p.append(F.relu(d(p[-1])))
            return [self.head(o) for o in p]
        down = nn.ModuleList([nn.Conv2d(16, 16, 3, stride=2) for _ in range(2)])
        return Mod(forward, stem=nn.Conv2d(3, 16, 3), down=down, head=nn.Conv2d(16, 4, 3)), images(16, 32)
    def recurrent_conv():  # one conv, called four times on its own output
        def forward(self, x):
            x = F.relu(self.stem(x))
            for _ in range(4):
                x = F.relu(self.cell(x))
            return self.head(x.mean((2, 3)))
        stem,cell = nn.Conv2d(3, 16, 3),nn.Conv2d(16, 16, 3, padding=1)
        return Mod(forward, stem=stem, cell=cell, head=nn.Linear(16, 10)), images(16, 16)
    def recurrent_residual():  # one block, called four times, each time added to its input
        def forward(self, x):
            x = self.stem(x)
            for _ in range(4):
                x = x + self.out(F.gelu(self.into(x)))
            return self.head(x)
        into,out = nn.Linear(32, 64),nn.Linear(64, 32)
        return Mod(forward, stem=nn.Linear(8, 32), into=into, out=out, head=nn.Linear(32, 4)), randn(128, 8)
    def elman_rnn():  # two linear layers, called at each of twelve steps
        def forward(self, x):
            h = x.new_zeros(len(x), 32)
            for t in range(x.shape[1]):
                h = torch.tanh(self.i(x[:, t]) + self.h(h))
            return self.o(h)
        return Mod(forward, i=nn.Linear(8, 32), h=nn.Linear(32, 32), o=nn.Linear(32, 4)), randn(64, 12, 8)
    def tied_embedding():
        def forward(self, x): return self.decoder(torch.tanh(self.mix(self.emb(x))))
        m = Mod(forward, emb=nn.Embedding(50, 16), mix=nn.Linear(16, 16), decoder=nn.Linear(16, 50, bias=False))
        m.decoder.weight = m.emb.weight
        return m, torch.randint(0, 50, (32, 7))
    def weight_norm():
        old,new = torch.nn.utils.weight_norm,torch.nn.utils.parametrizations.weight_norm
        first,second = old(nn.Conv2d(3, 16, 3)),new(nn.Conv2d(16, 16, 3))
        third,head = old(nn.ConvTranspose2d(16, 8, 3), dim=None),new(nn.Linear(8*14*14, 10))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.Flatten(), head), images(16, 16)
    def parametrized():
        utils,scaled = torch.nn.utils,nn.Linear(16, 16)
        symmetric = Mod(lambda self, w: w.triu() + w.triu(1).transpose(-1, -2))
        utils.parametrize.register_parametrization(scaled, 'weight', symmetric)
        old,new = utils.spectral_norm(nn.Linear(8, 16)),utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        orthogonal = utils.parametrizations.orthogonal(nn.Linear(16, 16))
        return nn.Sequential(old, nn.Tanh(), new, nn.Tanh(), scaled, nn.Tanh(), orthogonal), randn(64, 8)
    def pruned():
        m = mlp(16, 32, 8)
        for l in (m[0], m[2]):
            lib('torch.nn.utils.prune').l1_unstructured(l, 'weight', amount=0.5)
        return m, randn(64, 16)
    def standardized():
        class Standardized(nn.Conv2d):
            def forward(self, x):
                w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True))/self.weight.std((1, 2, 3), keepdim=True)
                return self._conv_forward(x, w, self.bias)
        layers = lib('timm.layers')
        first,second = layers.StdConv2d(3, 16, 3),Standardized(16, 16, 3)
        third,last = layers.ScaledStdConv2d(16, 16, 3),layers.Conv2dSame(16, 8, 3, stride=2)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), last), images(16, 24)
    def attention():
        def forward(self, x):
            x = self.proj(x)
            x = x + self.attn(x, x, x)[0]
            return self.head(self.enc(x))
        proj,attn = nn.Linear(8, 32),nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
        enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        return Mod(forward, proj=proj, attn=attn, enc=enc, head=nn.Linear(32, 4)), randn(16, 20, 8)
    def bilinear():
        def forward(self, x, y): return self.out(F.relu(self.both(x, y)))
        return Mod(forward, both=nn.Bilinear(8, 6, 16), out=nn.Linear(16, 4)), (randn(64, 8), randn(64, 6))
    def lazy():
        layers = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
        return nn.Sequential(*layers), images(16, 12)
    def fed_zeros():  # by a zero-initialized norm
        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.after(F.relu(self.norm(x)))).mean((2, 3)))
        norm = nn.BatchNorm2d(8)
        nn.init.zeros_(norm.weight)
        stem,after = nn.Conv2d(3, 8, 3),nn.Conv2d(8, 8, 1)
        return Mod(forward, stem=stem, norm=norm, after=after, head=nn.Linear(8, 4)), images(16, 12)
    def zero_initialized():
        m = mlp(8, 16, 4)
        for p in m[2].parameters():
            nn.init.zeros_(p)
        return m, randn(64, 8)
    def channels_last():
        last = torch.channels_last
        return cnn(3, 16, 32, 32).to(memory_format=last), images(16, 16).to(memory_format=last)
    def keywords_and_dicts():
        def forward(self, x, *, mask): return {'logits': self.b(F.relu(self.a(x))*mask), 'aux': self.c(x)}
        model = Mod(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4), c=nn.Linear(8, 2))
        return model, dict(x=randn(64, 8), mask=(torch.rand(64, 1) > 0.3).float())
    def control_flow():  # which branch runs depends on what the layer before put out
        def forward(self, x):
            x = self.a(x)
            return self.b(x) if x.std() > 0.5 else self.never(x)
        return Mod(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4), never=nn.Linear(16, 4)), 3*randn(64, 8)
    def checkpointed():
        def forward(self, x):
            x = checkpoint(self.a, x, use_reentrant=False)
            return self.head(checkpoint(self.b, x, use_reentrant=True).mean((2, 3)))
        return Mod(forward, a=cnn(3, 16, 16), b=cnn(16, 16, 16), head=nn.Linear(16, 4)), images(16, 16)
    def frozen():
        m = cnn(3, 16, 16, 8)
        m[0].requires_grad_(False)
        return m, images(16, 16)
    def einsum_attention():
        def forward(self, x):
            q, k, v = (torch.einsum('bnd,dhc->bhnc', x, w) for w in (self.q, self.k, self.v))
            a = torch.einsum('bhnc,bhmc->bhnm', q, k).mul(8**-0.5).softmax(-1)
            return torch.einsum('bhnc,hcd->bnd', a @ v, self.o)
        q,k,v = (param(32, 4, 8) for _ in range(3))
        return Mod(forward, q=q, k=k, v=v, o=param(4, 8, 32)), randn(16, 20, 32)
    def low_rank_pairs():
        def forward(self, x):
            x = F.relu(x @ self.a @ self.b)
            return F.linear(x, self.c @ self.d)  # a product of weights is no activation: these two are outside
        return Mod(forward, a=param(32, 4), b=param(4, 48), c=param(16, 4), d=param(4, 48)), randn(128, 32)
    def hypernetwork():  # the weight of the output is computed from another input
        def forward(self, x, z): return torch.bmm(torch.tanh(z @ self.made).view(-1, 8, 16), x[..., None])[..., 0]
        return Mod(forward, made=param(6, 128)), (randn(64, 16), randn(64, 6))
    def computed_weight():  # not linear in the parameter
        def forward(self, x): return self.out(F.relu(F.linear(x, self.w.w.sin()*2)))
        return Mod(forward, w=Mod(None, w=param(24, 16)), out=nn.Linear(24, 4)), randn(128, 16)
    def slices_of_a_parameter():
        def forward(self, x): return F.relu(F.linear(x, self.qk[:24])*F.linear(x, self.qk[24:])) @ self.out[:, :12]
        return Mod(forward, qk=param(48, 16), out=param(24, 12)), randn(128, 16)
    def one_weight_twice():
        def forward(self, x): return F.linear(F.relu(F.linear(x, self.w)), self.w)
        return Mod(forward, w=param(32, 32)), randn(128, 32)
    def equalized():  # the weight is multiplied by a number before use, as in StyleGAN
        def forward(self, x): return F.linear(F.leaky_relu(F.linear(x, self.a*0.25, self.x)), self.b*self.gain, self.y)
        return Mod(forward, a=param(32, 16), b=param(8, 32), x=param(32), y=param(8), gain=32**-0.5), randn(128, 16)
    def experts():  # no sample is sent to the last
        def forward(self, x):
            out = torch.zeros_like(x)
            for i in range(3):
                mine = torch.arange(len(x)) % 3 == i
                out[mine] = F.gelu(x[mine] @ self.up[i]) @ self.down[i]
            return out
        return Mod(forward, up=param(4, 16, 32), down=param(4, 32, 16)), randn(128, 16)
    def own_recurrent_cell():
        def forward(self, x):
            h = x.new_zeros(len(x), 32)
            for t in range(x.shape[1]):
                h = torch.tanh(x[:, t] @ self.i + h @ self.h)
            return h @ self.o
        return Mod(forward, i=param(8, 32), h=param(32, 32), o=param(32, 4)), randn(64, 12, 8)
    def recurrent():
        def forward(self, x): return self.out(self.gru(self.lstm(x)[0])[0])
        return Mod(forward, lstm=nn.LSTM(8, 16), gru=nn.GRU(16, 16), out=nn.Linear(16, 4)), randn(12, 64, 8)
    def attention_of_other_inputs():
        def forward(self, x, y): return self.out(self.attn(x, y, y)[0])
        attn = nn.MultiheadAttention(32, 4, kdim=12, vdim=12, add_bias_kv=True, batch_first=True)
        return Mod(forward, attn=attn, out=nn.Linear(32, 4)), (randn(16, 10, 32), randn(16, 14, 12))


# --- transformers and torch_geometric, from small configurations

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, dropout=0.,
             attention_dropout=0., activation_dropout=0., layerdrop=0.)


def tokens(n: int = 16, length: int = 24): return torch.randint(3, 99, (n, length))


def _transformers(name: str, model: str, statuses: dict | None = None, batch: Callable | None = None, **sizes):
    "The model of this class, of the configuration that it takes, changed by `sizes`."
    @network(f'transformers/{name}', statuses)
    def _():
        cls = getattr(lib('transformers'), model)
        made = cls(cls.config_class(**{k: v for k, v in {**SMALL, **sizes}.items() if v is not None}))
        return made, batch() if batch else dict(input_ids=tokens(), use_cache=False)


def encoded(): return dict(input_ids=tokens())
def pictures(): return dict(pixel_values=images(16, 32))
def translated(): return dict(input_ids=tokens(), decoder_input_ids=tokens(length=12), use_cache=False)
def heard(): return dict(input_features=randn(8, 16, 48), decoder_input_ids=tokens(8, 12), use_cache=False)


TIED = {'lm_head': 'tied'}
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
CODED = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
             encoder_attention_heads=4, decoder_attention_heads=4)
_transformers('gpt2', 'GPT2LMHeadModel', TIED, n_embd=32, n_layer=2, n_head=4)
_transformers('openai_gpt', 'OpenAIGPTLMHeadModel', TIED, encoded, n_embd=32, n_layer=2, n_head=4)
_transformers('llama', 'LlamaForCausalLM')
_transformers('mixtral', 'MixtralForCausalLM', **EXPERTS, num_key_value_heads=2)
_transformers('mixtral_eager', 'MixtralForCausalLM', **EXPERTS, num_key_value_heads=2, experts_implementation='eager')
_transformers('qwen3_moe', 'Qwen3MoeForCausalLM', **EXPERTS, head_dim=8)
_transformers('gpt_oss', 'GptOssForCausalLM', **EXPERTS, head_dim=8, num_key_value_heads=2)
_transformers('t5', 'T5ForConditionalGeneration', TIED, translated, d_model=32, d_kv=8, d_ff=48, num_layers=2,
              num_heads=4, decoder_start_token_id=0)
_transformers('bart', 'BartForConditionalGeneration', TIED, translated, **CODED)
_transformers('mamba', 'MambaForCausalLM', TIED, state_size=8)
_transformers('whisper', 'WhisperForConditionalGeneration', {'proj_out': 'tied'}, heard, **CODED, num_mel_bins=16,
              max_source_positions=24, max_target_positions=32, decoder_start_token_id=1)
_transformers('bert', 'BertForMaskedLM', {'cls.predictions.decoder': 'tied'}, encoded)
_transformers('albert', 'AlbertForSequenceClassification', batch=encoded, embedding_size=16)
_transformers('xlnet', 'XLNetLMHeadModel', {'lm_loss': 'tied'}, encoded, d_model=32, n_layer=2, n_head=4, d_inner=48,
              max_position_embeddings=None)
_transformers('bloom', 'BloomForCausalLM', TIED, n_layer=2, n_head=4)
_transformers('deberta', 'DebertaV2ForSequenceClassification', batch=encoded, relative_attention=True,
              pos_att_type=['p2c', 'c2p'])
_transformers('vit', 'ViTForImageClassification', batch=pictures, image_size=32, patch_size=8)
_transformers('beit', 'BeitForImageClassification', batch=pictures, image_size=32, patch_size=8,
              use_relative_position_bias=True)
_transformers('wav2vec2', 'Wav2Vec2ForCTC', batch=lambda: dict(input_values=randn(4, 1600)), conv_dim=(16, 16),
              conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)


class Transformers:
    def clip():
        vision = dict(SMALL, image_size=32, patch_size=8, projection_dim=16)
        config = lib('transformers').CLIPConfig(text_config=SMALL, vision_config=vision, projection_dim=16)
        return lib('transformers').CLIPModel(config), {**pictures(), **encoded()}


def graph(): return randn(120, 12), torch.randint(0, 120, (2, 720))


def _geometric(name: str, cls: str, **kwargs):
    @network(f'torch_geometric/{name}')
    def _(): return getattr(lib('torch_geometric.nn'), cls)(12, 16, 3, 5, **kwargs), graph()


_geometric('gcn', 'GCN')
_geometric('graph_sage', 'GraphSAGE')
_geometric('gin', 'GIN')
_geometric('gat', 'GAT', heads=2)
_geometric('gatv2', 'GAT', heads=2, v2=True)
_geometric('pna', 'PNA', aggregators=['mean', 'max', 'std'], scalers=['identity', 'amplification'],
           deg=torch.tensor([1, 4, 20, 40, 40, 15]))


class Torch_Geometric:
    def rgcn():
        def forward(self, x, edges, kind): return self.b(F.relu(self.a(x, edges, kind)), edges, kind)
        conv,(x,edges) = lib('torch_geometric.nn').RGCNConv,graph()
        return Mod(forward, a=conv(12, 16, 3), b=conv(16, 5, 3, num_bases=2)), (x, edges, torch.arange(720) % 3)
    def transformer():
        def forward(self, x, edges): return self.b(F.relu(self.a(x, edges)), edges)
        conv = lib('torch_geometric.nn').TransformerConv
        return Mod(forward, a=conv(12, 8, heads=2), b=conv(16, 5)), graph()


STATUSES = {
    'torchvision/vit': {'heads.head': 'constant'},  # its head starts at zero
    # Weight-standardized convs without a gain: nothing scales them.
    'timm/resnetv2_bit': unresponsive('stem.conv', *(f'stages.0.blocks.0.{name}' for name in (
        'downsample.conv', 'conv1', 'conv2', 'conv3'))),
    'fastai/xresnet18_sa': {'4.1.convpath.2.conv': 'constant'},  # fed by a batch norm that starts at zero
    # With spectral norm.
    'fastai/unet': unresponsive(*(f'layers.5.conv2.2.{name}.0' for name in ('query', 'key', 'value'))),
    'hand/tied_embedding': {'decoder': 'tied'},
    'hand/parametrized': unresponsive('0', '2', '6'),
    'hand/standardized': unresponsive('0', '2'),
    'hand/fed_zeros': {'after': 'no signal'},
    'hand/zero_initialized': {'2': 'constant'},
    'hand/control_flow': {'never': 'not called'},
    'hand/frozen': {'0': 'frozen'},
    'hand/frozen_parameter': {'w': 'frozen'},
    'hand/tied_pair': {'w (2)': 'tied'},
    'hand/experts': {'up[3]': 'not called', 'down[3]': 'not called'},
}
for _family in (Torchvision, Timm, Fastai, Hand, Transformers, Torch_Geometric):
    for _name, _make in vars(_family).items():
        name = f'{_family.__name__.lower()}/{_name}'
        if callable(_make): network(name, STATUSES.get(name))(_make)
