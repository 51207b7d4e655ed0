"""The layers that are units by default, and what a block's output is made with.

A layer with the forward of one of torch's classes is seen by the operation that it calls. A block is measured as a
whole: a container, or a layer with a forward of its own or a computed weight."""
from __future__ import annotations

from typing import Iterable, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .refs import Property, Ref, Refs
from .views import Layout, Source, View

__all__ = ['LAYERS', 'RECURRENT', 'EMBEDDINGS', 'is_layer', 'is_plain', 'whole_of', 'Parts', 'parts_of', 'made_of']

LAYERS = _ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention  # What is normalized by default
RECURRENT = nn.RNNBase, nn.RNNCellBase  # They apply their weights out of sight
EMBEDDINGS = nn.Embedding, nn.EmbeddingBag

_FORWARDS = 'forward', '_conv_forward', '__call__'
# The weight and the bias of a layer, and what hooks compute a weight from
_MADE_OF = 'weight', 'bias', 'weight_g', 'weight_v', 'weight_orig'


def is_layer(module: nn.Module) -> bool: return isinstance(module, LAYERS)


def is_plain(layer: nn.Module) -> bool:
    "Whether the layer hands its parameters to the operation as they are."
    if isinstance(layer, nn.MultiheadAttention): return True
    if 'weight' not in layer._parameters or 'forward' in vars(layer): return False
    torchs = next((c for c in type(layer).__mro__ if c.__module__.startswith('torch.nn.modules')), None)
    return torchs is not None and all(getattr(type(layer), f, None) is getattr(torchs, f, None) for f in _FORWARDS)


def whole_of(name: str, module: nn.Module, attribute: str, out_dim: int = 0) -> Ref:
    "The whole of a parameter, with its channels in dimension `out_dim`."
    p = module._parameters[attribute]
    view,d = View.whole_of(Source(name, module, attribute, p)),p.dim()
    if d < 2: return Ref(view)
    return Ref(view, Layout((out_dim,), (), tuple(i for i in range(d) if i != out_dim), (out_dim,), -1))


class Parts(NamedTuple):
    "What a block's output is made with."
    layer: nn.Module | None  # The layer whose weight makes it; `None` if there is none
    weights: list[Refs]  # What may scale the output, likeliest first, less what is frozen
    bias: Refs | None  # What may shift it, unless it is frozen
    frozen: bool  # Whether there are weights, and all of them are frozen
    channel_dim: int  # Dimension of the output that holds the channels


def parts_of(name: str, module: nn.Module) -> Parts:
    """What the output of a block is made with.

    A container has the parts of the first layer inside it, unless it has a `weight` or `bias` of its own (a property,
    as the lesson-11 `ConvLayer`'s `bias`)."""
    layer = _layer_of(module)
    if layer is None: return Parts(None, [], None, False, -1)
    weights,biases = _weights_of(name, layer),_held(name, layer, 'bias')
    if layer is not module:
        weights,biases = _held(name, module, 'weight') or weights,_held(name, module, 'bias') or biases
    channel_dim = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1
    free,bias = [w for w in weights if not w.frozen],next((b for b in biases if not b.frozen), None)
    return Parts(layer, free, bias, bool(weights) and not free, channel_dim)


def _layer_of(module: nn.Module) -> nn.Module | None:
    "The layer whose weight makes `module`'s output: itself, an attention's output projection, or the first inside."
    if isinstance(module, nn.MultiheadAttention): return module.out_proj
    if is_layer(module): return module
    inner = next((m for m in module.modules() if is_layer(m)), None)
    if inner is not None: return _layer_of(inner)
    return module if getattr(module, 'weight', None) is not None else None


def _held(name: str, module: nn.Module, attribute: str) -> list[Refs]:
    "The weight or bias that `module` itself has by this name, if any."
    if module._parameters.get(attribute) is not None:
        return [whole_of(f'{name}.{attribute}' if name else attribute, module, attribute)]
    prop = getattr(type(module), attribute, None)
    # A plain `bias=True` is a flag.
    if getattr(prop, 'fset', None) is None or parametrize.is_parametrized(module, attribute): return []
    v = getattr(module, attribute)
    is_number = isinstance(v, (int, float)) and not isinstance(v, bool)
    return [Property(module, attribute)] if is_number or isinstance(v, Tensor) else []


def _weights_of(name: str, layer: nn.Module) -> list[Refs]:
    "What may scale the output of `layer`: what its weight is computed from, its weight, or a gain of its own."
    held,out_dim = layer._parameters,1 if isinstance(layer, _ConvTransposeNd) and layer.groups == 1 else 0

    def ref(attribute, owner=layer, path=''):
        return whole_of('.'.join(filter(None, [name, path, attribute])), owner, attribute, out_dim)

    if parametrize.is_parametrized(layer, 'weight'):
        # `original0` is the magnitude of weight_norm. Torch's other parametrizations have one `original`.
        originals = layer.parametrizations['weight']
        name_of = 'original0' if hasattr(originals, 'original0') else 'original'
        return [ref(name_of, originals, 'parametrizations.weight')]
    if 'weight' not in held:  # a hook or a property computes it
        of = next((n for n in ('weight_g', 'weight_orig') if n in held), None)
        return [ref(of)] if of else _held(name, layer, 'weight')
    # A subclass that standardizes its weight is scaled by its gain, one number a channel.
    gains = [n for n, p in held.items() if n not in ('weight', 'bias') and p is not None]
    return [ref('weight'), *(ref(n) for n in gains if held[n].numel() in (1, layer.weight.shape[0]))]


def made_of(layer: nn.Module) -> list[nn.Parameter]:
    "The parameters that a layer's output is made with: weight and bias, what they are computed from, and gains."
    held = [p for n, p in layer._parameters.items() if n in _MADE_OF and p is not None and not is_lazy(p)]
    computed: Iterable = layer.parametrizations.parameters() if parametrize.is_parametrized(layer) else ()
    gains = [] if is_plain(layer) or not is_layer(layer) else \
        [r.param for r in _weights_of('', layer) if isinstance(r, Ref)]
    return list({id(p): p for p in (*held, *computed, *gains)}.values())
