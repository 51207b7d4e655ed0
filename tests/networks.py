"""The networks that LSUV is judged on: torchvision, timm, fastai, transformers, torch_geometric, and hard cases.

Weights are never downloaded."""
from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NETWORKS: dict[str, Network] = {}


@dataclass
class Network:
    name: str
    make: Callable[[], tuple[nn.Module, Any]]  # The model, and a mini-batch: a tensor, or a tuple or dict of its inputs
    statuses: dict[str, str] = field(default_factory=dict)  # By unit, those that are not "ok" or "no bias"

    def __call__(self) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return self.make()


def network(name: str, **statuses: str):
    """Add what the decorated function makes to `NETWORKS`.

    `statuses` are those that differ, with `__` for a dot in a name."""
    def add(make):
        NETWORKS[name] = Network(name, make, {k.replace('__', '.'): v for k, v in statuses.items()})
        return make
    return add


def images(n: int = 16, size: int = 64, channels: int = 3): return torch.randn(n, channels, size, size)


# --- torchvision: as they come where they are small, else the same class with less of everything

def _torchvision(name: str, n: int = 8, size: int = 64, **kwargs):
    def make():
        import torchvision.models as tv
        return getattr(tv, name)(weights=None, **kwargs), images(n, size)
    NETWORKS[f'torchvision/{name}'] = Network(f'torchvision/{name}', make)


for _name in ['resnet18', 'resnet50', 'squeezenet1_1', 'densenet121', 'mobilenet_v2', 'mobilenet_v3_small',
              'shufflenet_v2_x0_5', 'mnasnet0_5', 'efficientnet_b0', 'regnet_y_400mf']:
    _torchvision(_name)
_torchvision('googlenet', init_weights=False)  # returns a named tuple, with auxiliary heads
_torchvision('inception_v3', n=4, size=96, init_weights=False, aux_logits=False)


@network('torchvision/alexnet')
def _(): return narrow_classifier(tv().AlexNet()), images(8)


def _vgg(name: str, widths: list):
    @network(f'torchvision/{name}')
    def _():
        from torchvision.models.vgg import make_layers
        features = make_layers(widths, batch_norm='bn' in name)
        with torch.device('meta'):
            model = tv().VGG(features, init_weights=False)  # 500 MB that are thrown away
        return narrow_classifier(model), images(8)


_vgg('vgg11', [32, 'M', 64, 'M', 128, 128, 'M', 256, 256, 'M', 512, 512, 'M'])
_vgg('vgg11_bn', [32, 'M', 64, 'M', 128, 128, 'M', 256, 256, 'M', 512, 512, 'M'])
_vgg('vgg16', [32, 32, 'M', 64, 64, 'M', 128, 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M'])


def tv():
    import torchvision.models
    return torchvision.models


def narrow_classifier(model, width: int = 64):
    "The same layers with fewer units: `model.classifier` holds nine tenths of the weights."
    linear = [k for k, m in enumerate(model.classifier) if isinstance(m, nn.Linear)]
    for k, i, o in zip(linear, (model.classifier[linear[0]].in_features, width, width), (width, width, 10)):
        model.classifier[k] = nn.Linear(i, o)
    return model


@network('torchvision/convnext')
def _():
    from torchvision.models.convnext import CNBlockConfig
    blocks = [CNBlockConfig(24, 48, 2), CNBlockConfig(48, 96, 2), CNBlockConfig(96, None, 2)]
    return tv().ConvNeXt(blocks, num_classes=10), images(8)


@network('torchvision/vit', heads__head='constant')  # its head starts at zero
def _():
    sizes = dict(image_size=64, patch_size=16, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128)
    return tv().VisionTransformer(**sizes, num_classes=10), images(8)


@network('torchvision/swin')  # the attention applies the weights of its `qkv` and `proj` itself, without calling them
def _(): return tv().SwinTransformer([4, 4], 24, [2, 2, 2], [2, 4, 8], [4, 4], num_classes=10), images(8)


@network('torchvision/deeplabv3')
def _():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5), images(8)


# --- timm, likewise

def _timm(name: str, n: int = 8, size: int = 64, statuses: dict[str, str] | None = None, **kwargs):
    def make():
        import timm
        return timm.create_model(name, pretrained=False, num_classes=10, **kwargs), images(n, size)
    NETWORKS[f'timm/{name}'] = Network(f'timm/{name}', make, statuses or {})


for _name in ['resnet26', 'efficientnet_lite0', 'tf_efficientnet_b0', 'regnetz_b16', 'repvgg_a0', 'ghostnet_100',
              'xception41', 'poolformer_s12', 'convnextv2_atto']:
    _timm(_name)
_timm('vit_tiny_patch16_224', img_size=64, depth=4)
# The eps of its last norm layer swallows the class token, which training makes large: see `Status.FAINT`.
_timm('deit3_small_patch16_224', img_size=64, depth=3, embed_dim=96, num_heads=3, statuses={'head': 'faint'})
_timm('cait_xxs24_224', img_size=64, depth=4)
# It applies the weight of its `qkv` itself, with a bias that it puts together.
_timm('beit_base_patch16_224', img_size=64, depth=3, embed_dim=96, num_heads=4)
_timm('swinv2_cr_tiny_224', img_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4)
_timm('levit_128s', n=2, size=224)
_timm('coat_lite_tiny', img_size=64)


def _mixer(name: str, **options):
    @network(f'timm/{name}', head='constant')  # its head starts at zero
    def _():
        import timm.layers
        from timm.models import mlp_mixer
        def find(v):
            if not isinstance(v, str): return v
            return getattr(mlp_mixer, v, None) or getattr(timm.layers, v)
        found = {k: find(v) for k, v in options.items()}
        return mlp_mixer.MlpMixer(img_size=64, num_blocks=3, embed_dim=64, num_classes=10, **found), images(8)


_mixer('mixer')
_mixer('gmlp', mlp_ratio=6, block_layer='SpatialGatingBlock', mlp_layer='GatedMlp')
_mixer('resmlp', mlp_ratio=4, block_layer='ResBlock', norm_layer='Affine')


@network('timm/convmixer')
def _():
    from timm.models.convmixer import ConvMixer
    return ConvMixer(64, 6, num_classes=10), images(8)


@network('timm/nfnet_skipinit')  # weight-standardized convs, scaled through their gains; a zero gain after each branch
def _():
    from timm.models.nfnet import NfCfg, NormFreeNet
    cfg = NfCfg(depths=(1, 1), channels=(32, 64), stem_type='3x3', stem_chs=16, group_size=8, attn_layer='se',
                attn_kwargs={}, skipinit=True)
    return NormFreeNet(cfg, num_classes=10), images(8)


# The gain of each last conv starts at zero.
@network('timm/nfnet', stages__0__0__conv3='constant', stages__1__0__conv3='constant')
def _():
    from timm.models.nfnet import NfCfg, NormFreeNet
    cfg = NfCfg(depths=(1, 1), channels=(32, 64), stem_type='3x3', stem_chs=16, group_size=8)
    return NormFreeNet(cfg, num_classes=10), images(8)


@network('timm/resnetv2_bit', **{  # weight-standardized convs without a gain: nothing scales them
    'stem__conv': 'unresponsive',
    'stages__0__blocks__0__downsample__conv': 'unresponsive',
    'stages__0__blocks__0__conv1': 'unresponsive',
    'stages__0__blocks__0__conv2': 'unresponsive',
    'stages__0__blocks__0__conv3': 'unresponsive',
})
def _():
    from functools import partial
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2
    conv,norm = partial(StdConv2d, eps=1e-8),partial(GroupNormAct, num_groups=8)
    model = ResNetV2([1], channels=(32,), num_classes=10, stem_chs=16, conv_layer=conv, norm_layer=norm,
                     stem_type='fixed')
    return model, images(8)


# --- fastai

# The attention is fed by a batch norm that starts at zero.
@network('fastai/xresnet18_sa', **{'4__1__convpath__2__conv': 'constant'})
def _():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=10, sa=True), images(16)


@network('fastai/xresnext18')
def _():
    from fastai.vision.models.xresnet import xresnext18
    from fastai.layers import Mish
    return xresnext18(n_out=10, act_cls=Mish), images(16)


@network('fastai/unet', **{  # spectral norm
    'layers__5__conv2__2__query__0': 'unresponsive',
    'layers__5__conv2__2__key__0': 'unresponsive',
    'layers__5__conv2__2__value__0': 'unresponsive',
})
def _():
    from fastai.vision.learner import create_body
    from fastai.vision.models.unet import DynamicUnet
    from torchvision.models import resnet18
    body = create_body(resnet18(weights=None), pretrained=False)
    return DynamicUnet(body, 5, (64, 64), self_attention=True), images(8)


@network('fastai/tabular')
def _():
    from fastai.tabular.model import TabularModel
    model = TabularModel([(10, 6), (5, 3)], 4, 3, [200, 100], ps=0.1, embed_p=0.1)
    return model, (torch.stack([torch.randint(0, 10, (64,)), torch.randint(0, 5, (64,))], 1), torch.randn(64, 4))


AWD_CONFIG = dict(emb_sz=40, n_hid=60, n_layers=2, pad_token=1, bidir=False, hidden_p=0.2, input_p=0.2, embed_p=0.1,
                  weight_p=0.2)


@network('fastai/awd_lstm_lm', **{'1__decoder': 'tied'})
def _():
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import get_language_model
    config = dict(AWD_CONFIG, output_p=0.1, tie_weights=True, out_bias=True)
    model = get_language_model(AWD_LSTM, 200, config=config)
    return model, torch.randint(2, 200, (16, 30))


@network('fastai/awd_lstm_classifier')
def _():
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import get_text_classifier
    model = get_text_classifier(AWD_LSTM, 200, 3, config=dict(AWD_CONFIG, output_p=0.1))
    return model, torch.randint(2, 200, (32, 30))


# --- hard cases, made by hand

class Mod(nn.Module):
    "A module whose children are keyword arguments and whose forward is a function of it and its inputs."
    def __init__(self, forward: Callable, **children):
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


def cnn(*widths: int, act=nn.ReLU, conv=nn.Conv2d, **kwargs):
    "Convolutions 3x3 of these widths, each but the last with an activation."
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [conv(i, o, 3, padding=1, **kwargs), act()]
    return nn.Sequential(*layers[:-1])


@network('hand/plain_100_layers')
def _(): return cnn(3, *[16]*100), images(8, 16)


@network('hand/inplace_activations')
def _(): return cnn(3, 16, 32, 32, act=lambda: nn.ReLU(inplace=True)), images(16, 16)


@network('hand/registered_in_reverse')
def _():
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3)]
    def forward(self, x):
        for l in reversed(self.layers):
            x = F.relu(l(x))
        return self.head(x.mean((2, 3)))
    return Mod(forward, head=nn.Linear(32, 10), layers=nn.ModuleList(layers[::-1])), images(16, 16)


@network('hand/conv1d_transposed_3d')
def _():
    def forward(self, x, v, s): return self.t(F.relu(self.c(s))), self.t3(self.c3(v)), self.t2(self.c2(x))
    layers = dict(
        c=nn.Conv1d(4, 8, 5, stride=2),
        t=nn.ConvTranspose1d(8, 6, 5, stride=2, groups=2),
        c3=nn.Conv3d(2, 4, 3, bias=False),
        t3=nn.ConvTranspose3d(4, 3, 3),
        c2=nn.Conv2d(3, 8, 3, dilation=2, padding_mode='reflect', padding=2),
        t2=nn.ConvTranspose2d(8, 4, 2, stride=2),
    )
    return Mod(forward, **layers), (images(8, 16), torch.randn(8, 2, 8, 8, 8), torch.randn(8, 4, 33))


@network('hand/grouped_depthwise')
def _():
    grouped,depthwise = nn.Conv2d(4, 32, 3, groups=2),nn.Conv2d(32, 32, 3, groups=32)
    pointwise,dilated = nn.Conv2d(32, 64, 1),nn.Conv2d(64, 128, 3, groups=64, dilation=2)
    return nn.Sequential(grouped, nn.ReLU6(), depthwise, nn.SiLU(), pointwise, nn.PReLU(), dilated), images(16, 24, 4)


@network('hand/shared_head_on_a_pyramid')  # one conv, called at three scales
def _():
    def forward(self, x):
        p = [F.relu(self.stem(x))]
        for d in self.down:
            p.append(F.relu(d(p[-1])))
        return [self.head(o) for o in p]
    down = nn.ModuleList([nn.Conv2d(16, 16, 3, stride=2) for _ in range(2)])
    return Mod(forward, stem=nn.Conv2d(3, 16, 3), down=down, head=nn.Conv2d(16, 4, 3)), images(16, 32)


@network('hand/recurrent_conv')  # one conv, called four times on its own output
def _():
    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(4):
            x = F.relu(self.cell(x))
        return self.head(x.mean((2, 3)))
    stem,cell = nn.Conv2d(3, 16, 3),nn.Conv2d(16, 16, 3, padding=1)
    return Mod(forward, stem=stem, cell=cell, head=nn.Linear(16, 10)), images(16, 16)


@network('hand/recurrent_residual')  # one block, called four times, each time added to its input
def _():
    def forward(self, x):
        x = self.stem(x)
        for _ in range(4):
            x = x + self.out(F.gelu(self.into(x)))
        return self.head(x)
    into,out = nn.Linear(32, 64),nn.Linear(64, 32)
    return Mod(forward, stem=nn.Linear(8, 32), into=into, out=out, head=nn.Linear(32, 4)), torch.randn(128, 8)


@network('hand/elman_rnn')  # two linear layers, called at each of twelve steps
def _():
    def forward(self, x):
        h = x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            h = torch.tanh(self.i(x[:, t]) + self.h(h))
        return self.o(h)
    return Mod(forward, i=nn.Linear(8, 32), h=nn.Linear(32, 32), o=nn.Linear(32, 4)), torch.randn(64, 12, 8)


@network('hand/tied_embedding', decoder='tied')
def _():
    def forward(self, x): return self.decoder(torch.tanh(self.mix(self.emb(x))))
    m = Mod(forward, emb=nn.Embedding(50, 16), mix=nn.Linear(16, 16), decoder=nn.Linear(16, 50, bias=False))
    m.decoder.weight = m.emb.weight
    return m, torch.randint(0, 50, (32, 7))


@network('hand/weight_norm')
def _():
    old,new = torch.nn.utils.weight_norm,torch.nn.utils.parametrizations.weight_norm
    first,second = old(nn.Conv2d(3, 16, 3)),new(nn.Conv2d(16, 16, 3))
    third,head = old(nn.ConvTranspose2d(16, 8, 3), dim=None),new(nn.Linear(8*14*14, 10))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.Flatten(), head), images(16, 16)


@network('hand/parametrized', **{'0': 'unresponsive', '2': 'unresponsive', '6': 'unresponsive'})
def _():
    class Symmetric(nn.Module):
        def forward(self, w): return w.triu() + w.triu(1).transpose(-1, -2)
    scaled = nn.Linear(16, 16)
    torch.nn.utils.parametrize.register_parametrization(scaled, 'weight', Symmetric())
    utils = torch.nn.utils
    old,new = utils.spectral_norm(nn.Linear(8, 16)),utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    orthogonal = utils.parametrizations.orthogonal(nn.Linear(16, 16))
    return nn.Sequential(old, nn.Tanh(), new, nn.Tanh(), scaled, nn.Tanh(), orthogonal), torch.randn(64, 8)


@network('hand/pruned')
def _():
    from torch.nn.utils.prune import l1_unstructured
    m = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    for l in (m[0], m[2]):
        l1_unstructured(l, 'weight', amount=0.5)
    return m, torch.randn(64, 16)


@network('hand/standardized', **{'0': 'unresponsive', '2': 'unresponsive'})
def _():
    from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
    class Standardized(nn.Conv2d):
        def forward(self, x):
            w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True))/self.weight.std((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w, self.bias)
    first,second = StdConv2d(3, 16, 3),Standardized(16, 16, 3)
    third,last = ScaledStdConv2d(16, 16, 3),Conv2dSame(16, 8, 3, stride=2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), last), images(16, 24)


@network('hand/attention')
def _():
    def forward(self, x):
        x = self.proj(x)
        x = x + self.attn(x, x, x)[0]
        return self.head(self.enc(x))
    layers = dict(
        proj=nn.Linear(8, 32),
        attn=nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True),
        enc=nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        head=nn.Linear(32, 4),
    )
    return Mod(forward, **layers), torch.randn(16, 20, 8)


@network('hand/bilinear')
def _():
    def forward(self, x, y): return self.out(F.relu(self.both(x, y)))
    return Mod(forward, both=nn.Bilinear(8, 6, 16), out=nn.Linear(16, 4)), (torch.randn(64, 8), torch.randn(64, 6))


@network('hand/lazy')
def _():
    layers = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    return nn.Sequential(*layers), images(16, 12)


@network('hand/fed_zeros', after='no signal')  # by a zero-initialized norm
def _():
    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.after(F.relu(self.norm(x)))).mean((2, 3)))
    m = Mod(forward, stem=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), after=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 4))
    nn.init.zeros_(m.norm.weight)
    return m, images(16, 12)


@network('hand/zero_initialized', **{'2': 'constant'})
def _():
    m = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for p in m[2].parameters():
        nn.init.zeros_(p)
    return m, torch.randn(64, 8)


@network('hand/unbatched')
def _(): return cnn(3, 8, 8), torch.randn(3, 24, 24)


@network('hand/half')
def _(): return cnn(3, 16, 16, 8).half(), images(16, 16).half()


@network('hand/bfloat16')
def _():
    layers = nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    return nn.Sequential(*layers).bfloat16(), torch.randn(256, 16).bfloat16()


@network('hand/channels_last')
def _():
    last = torch.channels_last
    return cnn(3, 16, 32, 32).to(memory_format=last), images(16, 16).to(memory_format=last)


@network('hand/keywords_and_dicts')
def _():
    def forward(self, x, *, mask): return {'logits': self.b(F.relu(self.a(x))*mask), 'aux': self.c(x)}
    model = Mod(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4), c=nn.Linear(8, 2))
    return model, dict(x=torch.randn(64, 8), mask=(torch.rand(64, 1) > 0.3).float())


@network('hand/control_flow', never='not called')  # which branch runs depends on what the layer before put out
def _():
    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x.std() > 0.5 else self.never(x)
    return Mod(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4), never=nn.Linear(16, 4)), 3*torch.randn(64, 8)


@network('hand/checkpointed')
def _():
    def forward(self, x):
        x = checkpoint(self.a, x, use_reentrant=False)
        return self.head(checkpoint(self.b, x, use_reentrant=True).mean((2, 3)))
    return Mod(forward, a=cnn(3, 16, 16), b=cnn(16, 16, 16), head=nn.Linear(16, 4)), images(16, 16)


@network('hand/compiled')
def _(): return torch.compile(cnn(3, 16, 16, 8)), images(16, 16)


@network('hand/frozen', **{'0': 'frozen'})
def _():
    m = cnn(3, 16, 16, 8)
    for p in m[0].parameters():
        p.requires_grad_(False)
    return m, images(16, 16)


@network('hand/data_off_zero')  # mean many times its std: the moments must not lose digits
def _(): return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), 1000 + torch.randn(256, 32)


# --- transformers and torch_geometric, from small configurations

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, dropout=0.,
             attention_dropout=0., activation_dropout=0., layerdrop=0.)


def tokens(n: int = 16, length: int = 24): return torch.randint(3, 99, (n, length))


def _transformers(name: str, model: str, statuses: dict | None = None, batch: Callable | None = None, **sizes):
    "The model of this class, of the configuration that it takes, changed by `sizes`."
    def make():
        import transformers
        cls = getattr(transformers, model)
        made = cls(cls.config_class(**{k: v for k, v in {**SMALL, **sizes}.items() if v is not None}))
        return made, batch() if batch else dict(input_ids=tokens(), use_cache=False)
    NETWORKS[f'transformers/{name}'] = Network(f'transformers/{name}', make, statuses or {})


def encoded(): return dict(input_ids=tokens())
def pictures(): return dict(pixel_values=images(16, 32))
def translated(): return dict(input_ids=tokens(), decoder_input_ids=tokens(length=12), use_cache=False)


EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_transformers('gpt2', 'GPT2LMHeadModel', {'lm_head': 'tied'}, n_embd=32, n_layer=2, n_head=4)
_transformers('openai_gpt', 'OpenAIGPTLMHeadModel', {'lm_head': 'tied'}, encoded, n_embd=32, n_layer=2, n_head=4)
_transformers('llama', 'LlamaForCausalLM')
_transformers('mixtral', 'MixtralForCausalLM', **EXPERTS, num_key_value_heads=2)
_transformers('mixtral_eager', 'MixtralForCausalLM', **EXPERTS, num_key_value_heads=2, experts_implementation='eager')
_transformers('qwen3_moe', 'Qwen3MoeForCausalLM', **EXPERTS, head_dim=8)
_transformers('gpt_oss', 'GptOssForCausalLM', **EXPERTS, head_dim=8, num_key_value_heads=2)
_transformers('t5', 'T5ForConditionalGeneration', {'lm_head': 'tied'}, translated, d_model=32, d_kv=8, d_ff=48,
              num_layers=2, num_heads=4, decoder_start_token_id=0)
_transformers('bart', 'BartForConditionalGeneration', {'lm_head': 'tied'}, translated, d_model=32, encoder_layers=2,
              decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
              decoder_attention_heads=4)
_transformers('mamba', 'MambaForCausalLM', {'lm_head': 'tied'}, state_size=8)
_transformers('whisper', 'WhisperForConditionalGeneration', {'proj_out': 'tied'},
              lambda: dict(input_features=torch.randn(8, 16, 48), decoder_input_ids=tokens(8, 12), use_cache=False),
              d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
              encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=16, max_source_positions=24,
              max_target_positions=32, decoder_start_token_id=1)
_transformers('bert', 'BertForMaskedLM', {'cls.predictions.decoder': 'tied'}, encoded)
_transformers('albert', 'AlbertForSequenceClassification', batch=encoded, embedding_size=16)
_transformers('xlnet', 'XLNetLMHeadModel', {'lm_loss': 'tied'}, encoded, d_model=32, n_layer=2, n_head=4, d_inner=48,
              max_position_embeddings=None)
_transformers('bloom', 'BloomForCausalLM', {'lm_head': 'tied'}, n_layer=2, n_head=4)
_transformers('deberta', 'DebertaV2ForSequenceClassification', batch=encoded, relative_attention=True,
              pos_att_type=['p2c', 'c2p'])
_transformers('vit', 'ViTForImageClassification', batch=pictures, image_size=32, patch_size=8)
_transformers('beit', 'BeitForImageClassification', batch=pictures, image_size=32, patch_size=8,
              use_relative_position_bias=True)
_transformers('wav2vec2', 'Wav2Vec2ForCTC', batch=lambda: dict(input_values=torch.randn(4, 1600)),
              conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16,
              num_conv_pos_embedding_groups=4)


@network('transformers/clip')
def _():
    from transformers import CLIPConfig, CLIPModel
    vision = dict(SMALL, image_size=32, patch_size=8, projection_dim=16)
    config = CLIPConfig(text_config=SMALL, vision_config=vision, projection_dim=16)
    return CLIPModel(config), {**pictures(), **encoded()}


def graph(n: int = 120, channels: int = 12): return torch.randn(n, channels), torch.randint(0, n, (2, 6*n))


def _geometric(name: str, cls: str, statuses: dict[str, str] | None = None, **kwargs):
    def make():
        import torch_geometric.nn
        return getattr(torch_geometric.nn, cls)(12, 16, 3, 5, **kwargs), graph()
    NETWORKS[f'torch_geometric/{name}'] = Network(f'torch_geometric/{name}', make, statuses or {})


_geometric('gcn', 'GCN')
_geometric('graph_sage', 'GraphSAGE')
_geometric('gin', 'GIN')
_geometric('gat', 'GAT', heads=2)
_geometric('gatv2', 'GAT', heads=2, v2=True)
_geometric('pna', 'PNA', aggregators=['mean', 'max', 'std'], scalers=['identity', 'amplification'],
           deg=torch.tensor([1, 4, 20, 40, 40, 15]))


@network('torch_geometric/rgcn')
def _():
    from torch_geometric.nn import RGCNConv
    def forward(self, x, edges, kind): return self.b(F.relu(self.a(x, edges, kind)), edges, kind)
    x, edges = graph()
    return Mod(forward, a=RGCNConv(12, 16, 3), b=RGCNConv(16, 5, 3, num_bases=2)), (x, edges, torch.arange(720) % 3)


@network('torch_geometric/transformer')
def _():
    from torch_geometric.nn import TransformerConv
    def forward(self, x, edges): return self.b(F.relu(self.a(x, edges)), edges)
    return Mod(forward, a=TransformerConv(12, 8, heads=2), b=TransformerConv(16, 5)), graph()


# --- weights that no layer applies, made by hand

class Weights(nn.Module):
    "A module with parameters of these shapes, and a forward that is a function of it and its inputs."
    def __init__(self, forward: Callable, **shapes: tuple):
        super().__init__()
        self.f = forward
        for n, shape in shapes.items():
            setattr(self, n, nn.Parameter(torch.randn(shape)*0.02))
    def forward(self, *args): return self.f(self, *args)


@network('hand/einsum_attention')
def _():
    def forward(self, x):
        q, k, v = (torch.einsum('bnd,dhc->bhnc', x, w) for w in (self.q, self.k, self.v))
        a = torch.einsum('bhnc,bhmc->bhnm', q, k).mul(8**-0.5).softmax(-1)
        return torch.einsum('bhnc,hcd->bnd', a @ v, self.o)
    into = (32, 4, 8)
    return Weights(forward, q=into, k=into, v=into, o=(4, 8, 32)), torch.randn(16, 20, 32)


@network('hand/low_rank_pairs')
def _():
    def forward(self, x):
        x = F.relu(x @ self.a @ self.b)
        return F.linear(x, self.c @ self.d)  # a product of weights is no activation: these two are outside
    return Weights(forward, a=(32, 4), b=(4, 48), c=(16, 4), d=(4, 48)), torch.randn(128, 32)


@network('hand/hypernetwork')  # the weight of the output is computed from another input
def _():
    def forward(self, x, z):
        w = torch.tanh(z @ self.made).view(-1, 8, 16)
        return torch.bmm(w, x[..., None])[..., 0]
    return Weights(forward, made=(6, 128)), (torch.randn(64, 16), torch.randn(64, 6))


@network('hand/computed_weight')  # not linear in the parameter
def _():
    def forward(self, x): return self.out(F.relu(F.linear(x, self.w.w.sin()*2)))
    return Mod(forward, w=Weights(lambda self: None, w=(24, 16)), out=nn.Linear(24, 4)), torch.randn(128, 16)


@network('hand/slices_of_a_parameter')
def _():
    def forward(self, x):
        q, k = F.linear(x, self.qk[:24]),F.linear(x, self.qk[24:])
        return F.relu(q*k) @ self.out[:, :12]
    return Weights(forward, qk=(48, 16), out=(24, 12)), torch.randn(128, 16)


@network('hand/tied_pair', **{'w (2)': 'tied'})  # an autoencoder that goes back through the same weight
def _(): return Weights(lambda self, x: F.relu(x @ self.w) @ self.w.T, w=(32, 16)), torch.randn(128, 32)


@network('hand/one_weight_twice')
def _():
    def forward(self, x): return F.linear(F.relu(F.linear(x, self.w)), self.w)
    return Weights(forward, w=(32, 32)), torch.randn(128, 32)


@network('hand/equalized')  # the weight is multiplied by a number before use, as in StyleGAN
def _():
    def forward(self, x): return F.linear(F.leaky_relu(F.linear(x, self.a*0.25, self.x)), self.b*self.gain, self.y)
    model = Weights(forward, a=(32, 16), b=(8, 32), x=(32,), y=(8,))
    model.gain = 32**-0.5
    return model, torch.randn(128, 16)


@network('hand/experts', **{'up[3]': 'not called', 'down[3]': 'not called'})  # no sample is sent to the last
def _():
    def forward(self, x):
        out = torch.zeros_like(x)
        for i in range(3):
            mine = torch.arange(len(x)) % 3 == i
            out[mine] = F.gelu(x[mine] @ self.up[i]) @ self.down[i]
        return out
    return Weights(forward, up=(4, 16, 32), down=(4, 32, 16)), torch.randn(128, 16)


@network('hand/own_recurrent_cell')
def _():
    def forward(self, x):
        h = x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ self.i + h @ self.h)
        return h @ self.o
    return Weights(forward, i=(8, 32), h=(32, 32), o=(32, 4)), torch.randn(64, 12, 8)


@network('hand/recurrent')
def _():
    def forward(self, x): return self.out(self.gru(self.lstm(x)[0])[0])
    return Mod(forward, lstm=nn.LSTM(8, 16), gru=nn.GRU(16, 16), out=nn.Linear(16, 4)), torch.randn(12, 64, 8)


@network('hand/attention_of_other_inputs')
def _():
    def forward(self, x, y): return self.out(self.attn(x, y, y)[0])
    attn = nn.MultiheadAttention(32, 4, kdim=12, vdim=12, add_bias_kv=True, batch_first=True)
    return Mod(forward, attn=attn, out=nn.Linear(32, 4)), (torch.randn(16, 10, 32), torch.randn(16, 14, 12))
