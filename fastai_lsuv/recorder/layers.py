"""The layers that a recorder measures, and what is known of each.

`find_layers` picks them out of a model and describes each as a `RecordedLayer`: its name, a label for plots, and how it
can fail. What follows a layer in the model tells this: before a ReLU it can die, before a tanh it can saturate."""
from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ..parallel import is_sharded
from ..text import shortened
from ..units import Unit, loose_of, select_modules, sources_of

__all__ = ['RecordedLayer', 'Bound', 'find_layers', 'layers_of', 'label_of']

_BOUNDS = {nn.Sigmoid: (0., 1.), nn.Hardsigmoid: (0., 1.), nn.Tanh: (-1., 1.), nn.Softsign: (-1., 1.)}
_FLAT_AT = {nn.Sigmoid: 5.4, nn.Tanh: 2.7}
_RECTIFIERS = nn.ReLU, nn.ReLU6, nn.Threshold
# Numbers at or below 0 pass through these as such.
_SIGN_KEEPERS = nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd, nn.Flatten, nn.Unflatten, nn.Identity
_RECURRENT = nn.RNNBase, nn.RNNCellBase
_NORMS = nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm
_NAMED_NORM = re.compile('Norm(?![a-z])')  # `LlamaRMSNorm`, and not `Normalize`
_SIZES = (('in_channels', 'out_channels'), ('in_features', 'out_features'), ('input_size', 'hidden_size'),
          ('embed_dim', 'embed_dim'), ('num_features', 'num_features'), ('num_channels', 'num_channels'))
_TORCH = 'torch.nn.modules.'
_LONGEST_LABEL = 44  # Characters


class Bound(NamedTuple):
    "How a layer saturates: its output is bounded, or it feeds a bounded activation."
    lo: float = 0.  # Ends of a bounded output
    hi: float = 0.
    at: float | None = None  # Root mean square above which the activation that the layer feeds gets flat


class RecordedLayer(NamedTuple):
    "What is known of a layer."
    name: str  # As in `named_modules()`; of an operation that of its weight, as in `named_parameters()`
    label: str  # Name, kind and channels, for plots
    bound: Bound | None = None  # How it saturates; `None`: not at all, as far as the model shows
    can_die: bool = True  # Numbers at or below 0 in its output are silent, as far as the model shows
    place: tuple[int, ...] = ()  # In the order of registration
    starts_at_zero: bool = False  # It is a norm layer whose weight is 0 when the fit starts


def find_layers(model: nn.Module, modules: Any = None) -> tuple[list[RecordedLayer], dict[str, nn.Module]]:
    "Describe the layers that `modules` selects, in order of registration, and give their modules by name."
    named = {name.replace('_orig_mod.', ''): m for name, m in _select(model, modules)}
    around = _Around(model)
    return [RecordedLayer(n, label_of(n, m), *around.trouble(m), around.place(m), _starts_at_zero(m))
            for n, m in named.items()], named


def layers_of(model: nn.Module, operations: dict[Unit, str]) -> list[RecordedLayer]:
    "Describe operations, by their names, on weights that no layer applies. They come in no order."
    around,layers = _Around(model),[]
    for u, name in operations.items():
        m,view = u.module,u.weight.view
        _,out,into = u.weight.shape
        # What follows a module follows its operation if this is all that the module does.
        trouble = (None, True) if any(True for _ in m.children()) else around.trouble(m)
        place = *around.place(m), list(m._parameters).index(view.source.attribute), view.offset
        layers.append(RecordedLayer(name, _labelled(name, f'{u.kind} {into}>{out}'), *trouble, place))
    return layers


def _select(model: nn.Module, modules: Any) -> list[tuple[str, nn.Module]]:
    "Select as `select_modules`, by default norm and recurrent layers too."
    loose = loose_of(sources_of(model))
    if modules is not None: return select_modules(model, modules, loose)
    named = list(model.named_modules())
    layers = {id(m) for n, m in named if isinstance(m, _RECURRENT) or _is_norm(m) and '.parametrizations.' not in n}
    try: layers |= {id(m) for _, m in select_modules(model, None, loose)}
    except ValueError:
        if not layers: raise
    return [(n, m) for n, m in named if id(m) in layers]


def _is_norm(m: nn.Module) -> bool:
    return isinstance(m, _NORMS) or bool(_NAMED_NORM.search(type(m).__name__)) and next(m.children(), None) is None


def _starts_at_zero(m: nn.Module) -> bool:
    w = getattr(m, 'weight', None)
    if not _is_norm(m) or not isinstance(w, nn.Parameter) or is_lazy(w) or is_sharded(w): return False
    return w.numel() > 0 and not w.is_meta and not w.any()


def label_of(name: str, module: nn.Module) -> str:
    "Give the name, kind and channels of a layer, such as \"0 Conv2d 3>16\". The front of a long name is cut."
    sizes = [size for m in module.modules() if m is module or not _is_norm(m) for size in _channels(m)]
    sizes = sizes[-1:] if _is_norm(module) else sizes[:1] + sizes[-1:]
    return _labelled(name, ' '.join([type(module).__name__, *(['>'.join(map(str, sizes))] if sizes else [])]))


def _labelled(name: str, rest: str) -> str:
    return f'{shortened(name, max(_LONGEST_LABEL - len(rest) - 1, 8))} {rest}'.strip()


def _channels(m: nn.Module) -> tuple[int, ...]:
    "Give the channels that a module takes and gives, if it has such numbers yet."
    if shape := getattr(m, 'normalized_shape', None): return shape[-1], shape[-1]
    found = ((getattr(m, i, None), getattr(m, o, None)) for i, o in _SIZES)
    return next((c for c in found if all(isinstance(n, int) and n for n in c)), ())


class _Around:
    "What is around the modules of a model."
    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.places = {id(m): i for i, m in enumerate(modules)}
        self.last = next((m for m in reversed(modules) if any(True for _ in m.parameters(recurse=False))), None)
        self.followers: dict[int, list[nn.Module]] = {}  # Maps a module's id to the modules called after it
        for s in modules:  # the outer ones come first, and see further
            chain = _chain(s)
            for i, m in enumerate(chain[:-1]): self.followers.setdefault(id(m), chain[i+1:])

    def place(self, m: nn.Module) -> tuple[int, ...]: return self.places[id(m)],

    def trouble(self, m: nn.Module) -> tuple[Bound | None, bool]:
        "Tell how a module saturates, and whether it can die."
        after = self.followers.get(id(_chain(m)[-1]), [])
        end = list(m.modules())[-1]
        at = _FLAT_AT.get(type(after[0])) if after else None
        if type(end) is nn.Hardtanh: bound = Bound(end.min_val, end.max_val)
        elif type(end) in _BOUNDS: bound = Bound(*_BOUNDS[type(end)])
        else: bound = None if at is None else Bound(at=at)
        return bound, self._can_die(m, end, after)

    def _can_die(self, m: nn.Module, end: nn.Module, after: list[nn.Module]) -> bool:
        "Tell whether a ReLU silences what is at or below 0 in a module's output. Where nothing shows it, it may."
        if isinstance(m, _RECURRENT): return getattr(m, 'nonlinearity', 'tanh') == 'relu'
        if isinstance(m, nn.MultiheadAttention): return False
        if isinstance(end, _RECTIFIERS): return True
        if type(end).__module__ == _TORCH + 'activation': return False
        if end is not m and not type(end).__module__.startswith(_TORCH): return True  # an activation of the user's own
        follower = next((a for a in after if not isinstance(a, _SIGN_KEEPERS)), None)
        if follower is None: return end is not self.last
        return isinstance(follower, _RECTIFIERS) or not type(follower).__module__.startswith(_TORCH)


def _chain(m: nn.Module) -> list[nn.Module]:
    "List the modules that an `nn.Sequential` calls in turn, inner ones included; another module is a chain of one."
    if not isinstance(m, nn.Sequential) or not len(m): return [m]
    return [c for part in m for c in _chain(part)]
