"""Which modules and parameters are units.

`select_modules` reads the `modules` argument. A `Selection` holds what it comes to for one model: the blocks, which are
measured as a whole, the layers that are expected to run, and which parameters an operation may use as a unit."""
from __future__ import annotations

import inspect
from fnmatch import fnmatchcase
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..text import some_names
from .kinds import RECURRENT, is_layer, is_plain, made_of, parts_of
from .unit import Unit, block_unit
from .views import Source

__all__ = ['NothingToDo', 'Selection', 'sources_of', 'select_modules', 'loose_of', 'is_named', 'names_in',
           'names_module']

Named = Sequence[tuple[str, nn.Module]]  # As `named_modules()` gives them

_TAKES = ("it takes types, a function of a module (or of its name and a module), names or globs as in "
          "`named_modules()`, modules, or a list of these")


def sources_of(
    model: nn.Module,
    named: Named | None = None  # The modules of `model`, where they are listed already
) -> list[Source]:
    """The parameters that an operation may take, each with the layer whose weight it is, if there is one.

    What a weight is computed from is not among them: it goes through operations that do not see an activation."""
    named,found = named or list(model.named_modules()),[]
    of_layer: dict[int, tuple[str, nn.Module]] = {}  # By id of the weight
    for n, m in named:
        if isinstance(m, nn.MultiheadAttention): of_layer[id(m.out_proj.weight)] = n,m
        elif is_layer(m) and m._parameters.get('weight') is not None: of_layer.setdefault(id(m.weight), (n, m))
    for n, m in named:
        if isinstance(m, (*RECURRENT, parametrize.ParametrizationList)): continue
        computed = is_layer(m) and 'weight' not in m._parameters and not isinstance(m, nn.MultiheadAttention)
        for k, p in m._parameters.items():
            if p is None or is_lazy(p) or not p.is_floating_point() or computed and k != 'bias': continue
            found.append(Source(f'{n}.{k}' if n else k, m, k, p, of_layer.get(id(p))))
    return found


def loose_of(sources: Iterable[Source]) -> list[Source]:
    "The parameters that no layer is made of. An entry of `modules` may name them."
    sources = list(sources)
    layers = [s.module for s in sources if is_layer(s.module) and not isinstance(s.module, nn.MultiheadAttention)]
    taken = {id(p) for m in layers for p in made_of(m)}
    return [s for s in sources if id(s.param) not in taken]


def select_modules(
    model: nn.Module,
    modules: Any = None,  # Types, a function of a module, names or globs, modules, or a list; `None`: every layer
    loose: Sequence[Source] = (),  # Parameters that an entry may name, or a module may hold, in place of layers
    named: Named | None = None,  # As in `sources_of`
    argument: str = 'modules',  # What errors call `modules`
    told: Sequence[Source] | None = None  # Those of `loose` that errors name; `None`: all
) -> list[tuple[str, nn.Module]]:  # Names as in `named_modules()`, in order of registration
    "The modules of `model` that `modules` selects. Raises `ValueError` or `TypeError` if an entry matches nothing."
    named = named or list(model.named_modules())
    # An attention applies its inner layers itself, without calling them. One that is selected stands for the attention.
    inside = {id(c): id(m) for _, m in named if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    if modules is None:
        picked = [(n, m) for n, m in named if is_layer(m) and id(m) not in inside]
        if picked or any(s.param.dim() > 1 for s in loose): return picked
        raise NothingToDo(model)
    entries = _entries(modules)
    if not entries: raise ValueError(f"{argument}: got {modules!r}, which selects nothing; {_TAKES}")
    picked_ids: set[int] = set()
    for e in entries:
        test = _matcher(e)
        if test is None: raise TypeError(f"{argument}: got {e!r} of type {type(e).__name__}; {_TAKES}")
        hits = [m for n, m in named if test(n, m)]
        if not hits and not (isinstance(e, str) and any(_names(e, s.name) for s in loose)):
            raise ValueError(f'{argument}: {_no_match(e, model, loose if told is None else told)}')
        picked_ids |= {inside.get(id(m), id(m)) for m in hits}
    return [(n, m) for n, m in named if id(m) in picked_ids]


def _no_match(entry: Any, model: nn.Module, loose: Sequence[Source]) -> str:
    "Says that an entry of `modules` matches nothing in `model`, and what there is."
    if isinstance(entry, nn.Module): problem = f"{type(entry).__name__} is not in the model"
    else: problem = f"no module of {type(model).__name__} matches {entry!r}"
    names = some_names((repr(n) for n, _ in model.named_modules() if n), 8)
    weights = [repr(s.name) for s in loose if s.param.dim() > 1]
    more = f"; weights that no layer applies: {some_names(weights, 8)}" if weights else ''
    return f"{problem}; {_TAKES}. Names here: {names}{more}"


def _entries(modules: Any) -> list:
    if modules is None: return []
    return list(modules) if isinstance(modules, (list, tuple, set, frozenset)) else [modules]


def _names(entry: str, name: str) -> bool:
    "Whether an entry of `modules` is the name or a glob of a parameter, or of a part of it: `experts.up[3]`."
    return name == entry or fnmatchcase(name, entry) or entry.startswith(f'{name}[')


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
    if not callable(entry): return None
    if _takes_two(entry): return lambda n, m: bool(entry(n, m))
    return lambda n, m: bool(entry(m))


def _takes_two(f: Callable) -> bool:
    "Whether a function needs two arguments: a name and a module."
    try: parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError): return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 2


def _refuse_compiled(named: Iterable[tuple[str, nn.Module]]) -> None:
    "Raise `TypeError` for a layer that `torch.jit` has compiled, as far as can be told."
    for n, m in named:
        if not isinstance(m, torch.jit.ScriptModule): continue
        w = getattr(m, 'weight', None)
        if isinstance(w, Tensor) and w.dim() > 1 and 'Embedding' not in m.original_name:
            raise TypeError(f"model: {repr(n) if n else 'it'} is a {m.original_name} compiled by torch.jit, which "
                            "Python does not see run; initialize the model first, then script or trace it")


def _refuse_complex(named: Iterable[tuple[str, nn.Module]]) -> None:
    for n, m in named:
        if not is_layer(m): continue
        for k, p in m._parameters.items():
            if p is not None and p.is_complex():
                raise TypeError(f"model: {n!r} has a {p.dtype} {k}; LSUV normalizes real layers: leave it out with "
                                "`exclude`")


class NothingToDo(ValueError):
    "The model applies no weight in a linear operation."
    def __init__(self, model: nn.Module):
        super().__init__(f"model: {type(model).__name__} has no conv, linear or attention layer, and applies no weight "
                         "in a linear operation: there is nothing to normalize")


class Selection:
    "What `modules` and `exclude` select in one model. Raises `ValueError` or `TypeError` as `select_modules` does."
    def __init__(self,
        model: nn.Module,
        modules: Any = None,  # As in `select_modules`
        exclude: Any = None,  # Modules and parameters to leave out, as `modules` names them; what is inside them, too
        scales: bool = True  # Whether each block must have a weight to scale, or may be measured alone
    ):
        self.modules,self.exclude,self.named = modules,exclude,list(model.named_modules())
        self.by_user = modules is not None or bool(_entries(exclude))
        self.sources = sources_of(model, self.named)
        loose = loose_of(self.sources)
        out = select_modules(model, exclude, self.sources, self.named, 'exclude', loose) if _entries(exclude) else []
        self._excluded = {id(c) for _, m in out for c in m.modules()}
        if modules is None: _refuse_compiled(self.named)
        picked = [(n, m) for n, m in select_modules(model, modules, loose, self.named) if id(m) not in self._excluded]
        _refuse_compiled(picked)
        _refuse_complex(picked)
        self.layers: list[tuple[str, nn.Module]] = []  # Layers that are seen by the operation that they call
        self.blocks: list[Unit] = []
        self._held: set[int] = set()  # Modules and weights that an operation may use as a unit, by id
        holders = {id(s.module) for s in loose if s.param.dim() > 1}
        for n, m in picked: self._take(n, m, holders, scales)
        if scales: self._check_rivals()

    def _take(self, name: str, module: nn.Module, holders: set[int], scales: bool) -> None:
        if isinstance(module, nn.MultiheadAttention):
            self._held |= {id(c) for c in module.modules()}
            self.layers.append((name, module))
            return
        if is_layer(module): self._held |= {id(module), id(module._parameters.get('weight'))}
        if is_layer(module) and is_plain(module): return self.layers.append((name, module))
        parts = parts_of(name, module)
        if parts.layer is None and not holders.isdisjoint(map(id, module.modules())):
            self._held |= {id(c) for c in module.modules()}
            return
        if parts.layer is None and scales:
            raise ValueError(f"modules: {name!r} ({type(module).__name__}) has no conv, linear or attention layer and "
                             "no `weight` to scale; leave it out")
        self.blocks.append(block_unit(name, module, parts))

    def _check_rivals(self) -> None:
        "Raise if two selected modules would scale the same layer."
        chosen = [(n, m, m) for n, m in self.layers] + [(u.name, u.module, u.layer) for u in self.blocks]
        for name, module, layer in chosen:
            inside = set(module.modules()) - {module}
            inner = next((n for n, m, l in chosen if l is layer and m in inside), None)
            if inner is not None:
                raise ValueError(f"modules: {name!r} and {inner!r} inside it are both selected, and both would scale "
                                 "the same layer; select one of them")

    def selects(self,
        name: str,  # Of the unit
        of: Source  # Its parameter
    ) -> bool:
        "Whether a unit that an operation shows is wanted."
        if id(of.module) in self._excluded or is_named(self.exclude, name, of): return False
        if self.modules is None: return True
        return id(of.module) in self._held or id(of.param) in self._held or is_named(self.modules, name, of)
