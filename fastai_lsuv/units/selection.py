"""Which modules are units: `select_modules` reads the `modules` argument, `find_units` makes the units of a model.

`measurable` refuses what hooks or LSUV cannot handle. `find_units` also decides which units are left alone: a weight
that a module outside of the units holds too is tied."""
from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..report.text import some_names
from .units import Unit
from ..observe.views import Source
from .weights import layer_types, made_of

__all__ = ['select_modules', 'measurable', 'find_units', 'loose_parameters', 'outside_of', 'wanted', 'is_named',
           'names_in', 'names_module', 'RECURRENT']

Named = Sequence[tuple[str, nn.Module]]  # As `named_modules()` gives them

RECURRENT = nn.RNNBase, nn.RNNCellBase  # They apply their weights out of sight
_TAKES = "it takes types, a function of a module, names or globs as in `named_modules()`, modules, or a list of these"


def select_modules(
    model: nn.Module,
    modules: Any = None,  # Types, a function of a module, names or globs, modules, or a list; `None`: every layer
    loose: Sequence[Source] = (),  # Parameters that an entry may name, or a module may hold, in place of layers
    named: Named | None = None  # The modules of `model`, where they are listed already
) -> list[tuple[str, nn.Module]]:  # Names as in `named_modules()`, in order of registration
    "The modules of `model` that `modules` selects. Raises `ValueError` or `TypeError` if an entry matches nothing."
    named = named or list(model.named_modules())
    # An attention applies its inner layers itself, without calling them. One that is selected stands for the attention.
    inside = {id(c): id(m) for _, m in named if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    if modules is None:
        layers = layer_types()
        picked = [(n, m) for n, m in named if isinstance(m, layers) and id(m) not in inside]
        if picked or any(h.param.dim() > 1 for h in loose): return picked
        raise ValueError(f"model: {type(model).__name__} has no conv, linear or attention layer; name what to measure "
                         "with `modules`")
    entries = _entries(modules)
    if not entries: raise ValueError(f"modules: got {modules!r}, which selects nothing; {_TAKES}")
    picked_ids: set[int] = set()
    for e in entries:
        test = _matcher(e)
        if test is None: raise TypeError(f"modules: got {e!r} of type {type(e).__name__}; {_TAKES}")
        hits = [m for n, m in named if test(n, m)]
        if not hits and not (isinstance(e, str) and any(_names(e, h.name) for h in loose)):
            raise ValueError(_no_match(e, model, loose))
        picked_ids |= {inside.get(id(m), id(m)) for m in hits}
    return [(n, m) for n, m in named if id(m) in picked_ids]


def _no_match(entry: Any, model: nn.Module, loose: Sequence[Source]) -> str:
    "Says that an entry of `modules` matches nothing in `model`, and what there is."
    if isinstance(entry, nn.Module): problem = f"{type(entry).__name__} is not in the model"
    else: problem = f"no module of {type(model).__name__} matches {entry!r}"
    names = some_names((repr(n) for n, _ in model.named_modules() if n), 8)
    weights = [repr(h.name) for h in loose if h.param.dim() > 1]
    more = f"; weights that no layer applies: {some_names(weights, 8)}" if weights else ''
    return f"modules: {problem}; {_TAKES}. Names here: {names}{more}"


def loose_parameters(
    model: nn.Module,
    named: Named | None = None  # As in `select_modules`
) -> list[Source]:
    "The parameters that no layer of `model` is made of. An operation may take them as its weight or its bias."
    named,layers = named or list(model.named_modules()),layer_types()
    taken = {id(p) for _, m in named if isinstance(m, layers) for p in made_of(m)}
    others = ((n, m, k, p) for n, m in named for k, p in m._parameters.items() if p is not None and id(p) not in taken)
    return [Source(f'{n}.{k}' if n else k, m, k, p) for n, m, k, p in others
            if not isinstance(m, RECURRENT) and not is_lazy(p) and p.is_floating_point()]


def _entries(modules: Any) -> list:
    return list(modules) if isinstance(modules, (list, tuple, set, frozenset)) else [modules]


def outside_of(units: Iterable[Unit], loose: Iterable[Source]) -> list[Source]:
    "The loose parameters that no unit is made of. An affine unit is a layer, whose parameters are not loose."
    taken = {id(p) for u in units if u.layer is not None and not u.affine for p in made_of(u.layer)}
    return [s for s in loose if id(s.param) not in taken]


def _names(entry: str, name: str) -> bool:
    "Whether an entry of `modules` is the name or a glob of a parameter, or of a part of it: `experts.up[3]`."
    return name == entry or fnmatchcase(name, entry) or entry.startswith(f'{name}[')


def wanted(
    model: nn.Module,
    modules: Any,  # As in `select_modules`
    units: Iterable[Unit]  # The modules that are measured
) -> Callable[[str, Source], bool]:
    """Whether `modules` selects a unit that an operation shows.

    An entry may give the unit's name, its parameter's, or a module that holds the parameter and is not a unit."""
    if modules is None: return lambda name, of: True
    tests = [_matcher(e) for e in _entries(modules)]
    measured = {id(u.module) for u in units if not isinstance(u.module, nn.MultiheadAttention)}
    holders = [m for n, m in model.named_modules() if id(m) not in measured and any(t(n, m) for t in tests)]
    held = {id(c) for m in holders for c in m.modules()}
    return lambda name, of: id(of.module) in held or is_named(modules, name, of)


def is_named(
    modules: Any,  # As in `select_modules`
    name: str,  # Name of a part of a parameter
    of: Source  # The parameter
) -> bool:
    "Whether an entry is the name or a glob of a parameter, or of this part of it."
    return any(e in (name, of.name) or fnmatchcase(name, e) or fnmatchcase(of.name, e) for e in names_in(modules))


def names_in(modules: Any) -> list[str]:
    "Those entries of `modules` that are names or globs."
    return [e for e in _entries(modules) if isinstance(e, str)]


def names_module(entry: str, model: nn.Module) -> bool:
    "Whether an entry is the name or a glob of a module."
    return any(n == entry or fnmatchcase(n, entry) for n, _ in model.named_modules())


def _matcher(entry: Any) -> Callable[[str, nn.Module], bool] | None:
    if isinstance(entry, str): return lambda n, m: n == entry or fnmatchcase(n, entry)
    if isinstance(entry, nn.Module): return lambda n, m: m is entry
    if isinstance(entry, type): return lambda n, m: isinstance(m, entry)
    if callable(entry): return lambda n, m: bool(entry(m))
    return None


def _is_compiled_layer(m: nn.Module) -> bool:
    "Whether this was a layer before `torch.jit` compiled it, as far as can be told."
    if not isinstance(m, torch.jit.ScriptModule): return False
    w = getattr(m, 'weight', None)
    return isinstance(w, Tensor) and w.dim() > 1 and 'Embedding' not in m.original_name


def _refuse_compiled(named: Iterable[tuple[str, nn.Module]]) -> None:
    for n, m in named:
        if _is_compiled_layer(m):
            raise TypeError(f"model: {repr(n) if n else 'it'} is a {m.original_name} compiled by torch.jit, which "
                            "Python hooks do not reach; initialize the model first, then script or trace it")


def measurable(
    model: nn.Module,
    modules: Any = None,
    loose: Sequence[Source] = (),
    named: Named | None = None  # These as in `select_modules`
) -> list[Unit]:
    "The selected modules as units, in order of registration. Raises `TypeError` for complex or `torch.jit` layers."
    named = named or list(model.named_modules())
    if modules is None: _refuse_compiled(named)
    selected = select_modules(model, modules, loose, named)
    _refuse_compiled(selected)
    units = [Unit(n, m) for n, m in selected]
    for u in units:
        for r in u.refs:
            if (t := r.tensor) is not None and t.is_complex():
                raise TypeError(f"model: {u.name!r} has a {t.dtype} {r.name}; LSUV normalizes real layers: "
                                "leave it out with `modules`")
    return units


def find_units(
    model: nn.Module,
    modules: Any = None,
    loose: Sequence[Source] = (),
    named: Named | None = None  # These as in `select_modules`
) -> list[Unit]:
    """The units of `model`, in order of registration, each with what it owns or why it is left alone.

    A module that holds loose parameters and no layer is not a unit. The operations on its parameters are.

    Raises `ValueError` if a selected module holds no layer to scale, or two selected modules would scale the same one,
    and `TypeError` as `measurable` does."""
    named = named or list(model.named_modules())
    units,holders = measurable(model, modules, loose, named),{id(h.module) for h in loose if h.param.dim() > 1}
    units = [u for u in units if u.layer is not None or holders.isdisjoint(map(id, u.module.modules()))]
    of_layer: dict[int, list[Unit]] = {}
    for u in units: of_layer.setdefault(id(u.layer), []).append(u)
    for u in units:
        if u.layer is None:
            raise ValueError(f"modules: {u.name!r} ({u.kind}) has no conv, linear or attention layer and no "
                             "`weight` to scale; leave it out")
        rivals = (o for o in of_layer[id(u.layer)] if o is not u)
        inner = next((o for o in rivals if o.module in set(u.module.modules())), None)
        if inner is not None:
            raise ValueError(f"modules: {u.name!r} and {inner.name!r} inside it are both selected, and both would "
                             "scale the same layer; select one of them")
    # A module that is not a unit may hold the weight too (an embedding tied to a decoder), and use it in another way.
    layers = {id(u.layer) for u in units} | {id(u.module) for u in units}
    others = (m for _, m in named if id(m) not in layers)
    elsewhere = {id(p) for m in others for p in m._parameters.values() if p is not None}
    for u in units:
        shared = any(id(w.value) in elsewhere for w in u.weights if w.owner is u.layer)
        if shared and not u.left_alone: u.left_alone = 'tied'
    return units
