"""The layers that a recorder measures, and what is known of each.

`find_layers` picks them out of a model and describes each as a `RecordedLayer`: its name, a label for plots, and how it
can fail. What follows a layer in the model tells this: before a ReLU it can die, before a tanh it can saturate."""
from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..observe.discovery import OperationUnit
from ..report.text import shortened
from ..units.selection import loose_parameters, select_modules

__all__ = ['RecordedLayer', 'Bound', 'find_layers', 'layers_of', 'label_of']

_BOUNDS = {nn.Sigmoid: (0., 1.), nn.Hardsigmoid: (0., 1.), nn.Tanh: (-1., 1.), nn.Softsign: (-1., 1.)}
_FLAT_AT = {nn.Sigmoid: 5.4, nn.Tanh: 2.7}
_RECTIFIERS = nn.ReLU, nn.ReLU6, nn.Threshold
# Numbers at or below 0 pass through these as such.
_SIGN_KEEPERS = nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd, nn.Flatten, nn.Unflatten, nn.Identity
_RECURRENT = nn.RNNBase, nn.RNNCellBase
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


def find_layers(
    model: nn.Module,
    modules: Any = None  # As `select_modules` takes; `None`: conv, linear, attention and recurrent layers
) -> tuple[list[RecordedLayer], dict[str, nn.Module]]:  # The layers in order of registration; modules by name
    "The layers of `model` that `modules` selects."
    named = {name.replace('_orig_mod.', ''): m for name, m in _select(model, modules)}
    around = _Around(model)
    layers = [RecordedLayer(n, label_of(n, m), *around.trouble(m), around.place(m)) for n, m in named.items()]
    return layers, named


def layers_of(
    model: nn.Module,
    operations: dict[OperationUnit, str]  # And their names
) -> list[RecordedLayer]:
    "Operations on weights that no layer applies, in no order."
    around, layers = _Around(model), []
    for u, name in operations.items():
        m, view = u.module, u.weight.view
        _, out, into = u.weight.shape
        label = _labelled(name, f'{u.kind} {into}>{out}')
        # What follows a module follows its operation if this is all that the module does.
        trouble = (None, True) if any(True for _ in m.children()) else around.trouble(m)
        place = *around.place(m), list(m._parameters).index(view.source.attribute), view.offset
        layers.append(RecordedLayer(name, label, *trouble, place))
    return layers


class _Around:
    "What is around the modules of a model."
    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.places = {id(m): i for i, m in enumerate(modules)}
        self.followers = _followers(model)
        self.last = next((m for m in reversed(modules) if any(True for _ in m.parameters(recurse=False))), None)

    def place(self, m: nn.Module) -> tuple[int, ...]: return self.places[id(m)],

    def trouble(self, m: nn.Module) -> tuple[Bound | None, bool]:
        "How a module saturates, and whether it can die."
        after = self.followers.get(id(_chain(m)[-1]), [])
        return _bound_of(m, after), _can_die(m, after, self.last)


def _chain(m: nn.Module) -> list[nn.Module]:
    "The modules that an `nn.Sequential` calls in turn, inner ones included; another module is a chain of one."
    if not isinstance(m, nn.Sequential) or not len(m): return [m]
    return [c for part in m for c in _chain(part)]


def _followers(model: nn.Module) -> dict[int, list[nn.Module]]:
    "By the id of a module: what an `nn.Sequential` calls after it."
    followers = {}
    for s in model.modules():  # the outer ones come first, and see further
        chain = _chain(s)
        for i, m in enumerate(chain[:-1]):
            followers.setdefault(id(m), chain[i+1:])
    return followers


def _select(model: nn.Module, modules: Any) -> list[tuple[str, nn.Module]]:
    "As `select_modules`, but recurrent layers are among the default ones."
    loose = loose_parameters(model)
    if modules is not None: return select_modules(model, modules, loose)
    recurrent = {id(m) for m in model.modules() if isinstance(m, _RECURRENT)}
    try:
        layers = {id(m) for _, m in select_modules(model, None, loose)}
    except ValueError:
        if not recurrent: raise
        layers = set()
    return [(n, m) for n, m in model.named_modules() if id(m) in layers | recurrent]


def label_of(
    name: str,  # As in `named_modules()`
    module: nn.Module
) -> str:  # Such as "0 Conv2d 3>16"
    "Name, kind and channels of a layer. The front of a long name is cut."
    widths = [w for m in module.modules() if (w := _channels(m)) is not None]
    return _labelled(name, type(module).__name__ + (f' {widths[0][0]}>{widths[-1][1]}' if widths else ''))


def _labelled(name: str, rest: str) -> str:
    room = max(_LONGEST_LABEL - len(rest) - 1, 8)
    return f'{shortened(name, room)} {rest}'.strip()


def _channels(m: nn.Module) -> tuple[int, int] | None:
    "Channels that a module takes and gives; `None` if it has no such numbers yet, or at all."
    if isinstance(m, nn.MultiheadAttention): return m.embed_dim, m.embed_dim
    for i, o in (('in_channels', 'out_channels'), ('in_features', 'out_features'), ('input_size', 'hidden_size')):
        ins, outs = getattr(m, i, None), getattr(m, o, None)
        if isinstance(ins, int) and isinstance(outs, int) and ins and outs: return ins, outs
    return None


def _last_of(m: nn.Module) -> nn.Module:
    "The module that a container ends in; a module without parts is its own."
    return list(m.modules())[-1]


def _bound_of(m: nn.Module, after: list[nn.Module]) -> Bound | None:
    "How a module saturates."
    last = _last_of(m)
    if type(last) is nn.Hardtanh: return Bound(last.min_val, last.max_val)
    if type(last) in _BOUNDS: return Bound(*_BOUNDS[type(last)])
    at = _FLAT_AT.get(type(after[0])) if after else None
    return None if at is None else Bound(at=at)


def _can_die(
    m: nn.Module,
    after: list[nn.Module],  # What follows it in its `nn.Sequential`
    last: nn.Module | None  # The last module of the model that has parameters
) -> bool:
    "Whether a ReLU silences what is at or below 0 in a module's output. Where the model does not show it, it may."
    end = _last_of(m)
    if isinstance(m, _RECURRENT): return getattr(m, 'nonlinearity', 'tanh') == 'relu'
    if isinstance(m, nn.MultiheadAttention): return False
    if isinstance(end, _RECTIFIERS): return True
    if type(end).__module__ == _TORCH + 'activation': return False
    if end is not m and not type(end).__module__.startswith(_TORCH): return True  # an activation of the user's own
    follower = next((a for a in after if not isinstance(a, _SIGN_KEEPERS)), None)
    if follower is None: return end is not last
    return isinstance(follower, _RECTIFIERS) or not type(follower).__module__.startswith(_TORCH)
