"""Finds the units in the linear operations that a model calls.

Where an operation takes a parameter, or a view of one, as its weight, that weight in that direction is a unit.
`Discovery.uses` says which units an operation uses, and makes them when they are first used."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..parallel import several_ranks
from ..units import EMBEDDINGS, Layout, Ref, Selection, Source, Sources, Unit, View, is_layer, view_unit
from .operations import GROUPED, OPERATIONS, Call

__all__ = ['Use', 'Discovery', 'unused_slices']


@dataclass
class Use:
    "One use of a unit by an operation."
    unit: Unit
    bias: Tensor | None = None  # What the operation adds, whoever owns it
    times: float = 1.  # The factor that it is added with
    is_row: bool = True  # Whether it has one number a channel
    rows: slice | None = None  # Which rows of the output are the unit's; `None`: all
    input: Any = None  # What the operation multiplies by the weight, if it is at hand


class Discovery:
    "The units in the operations of one model."
    def __init__(self,
        selection: Selection,  # Which units are wanted
        prepare: Callable[[Unit], object]  # Gives a unit its target, and says whether it is left alone
    ):
        self.selection,self.prepare,self.sources = selection,prepare,Sources(selection.sources)
        self.units: dict[Any, Unit] = {}
        self.declined: set[int] = set()  # Parameters in units that are not wanted, by id
        self.taken: set[int] = set()  # Parameters that some function took, by id
        self.transformed: set[int] = set()  # Parameters that an operation took inside of a `torch.func` transform
        self.reshaped: set[int] = set()  # Parameters of one dimension that an operation took as a matrix
        self.closed = False  # Whether there are no further units
        self._known: dict[tuple, tuple[Unit | None, Layout]] = {}  # By function and id of a parameter
        self._of_param: dict[int, list[Unit]] = {}  # By id of their parameter
        self._names,self._bias_owners = set(),{}  # Of units; and of each bias, the unit that took it first
        # A module that is no layer may hold a weight too (an embedding tied to a decoder), and use it in another way.
        self.elsewhere = {id(p) for _, m in selection.named if isinstance(m, EMBEDDINGS) for p in m.parameters(False)}
        # A layer with a forward of its own is measured as a block, unless the model applies its weight without it.
        self._blocks = {id(s.param): u for u in selection.blocks if is_layer(u.module) for s in selection.sources
                        if s.module is u.module and s.attribute == 'weight'}
        self._replaced: set[int] = set()

    def begin_pass(self) -> None:
        if self.sources.sharded: self._known = {}  # of gathered copies, which a pass makes anew

    def is_replaced(self, block: Unit) -> bool:  # Whether it is a layer whose weight the model applies itself
        return id(block) in self._replaced

    def uses(self, func: Callable, args: tuple, kwargs: dict) -> list[Use]:
        "The uses of units by a linear operation."
        if func in GROUPED and (args[2] if len(args) > 2 else kwargs.get('offs')) is None:
            func = torch.bmm  # groups of the same size, stacked
        operation = OPERATIONS[func]
        if operation.names.startswith('input weight bias') and not kwargs and isinstance(args[1], nn.Parameter):
            return self._known_use(func, args)
        call = operation.call(args, kwargs)
        views = {n: self.sources.find(call.arguments.get(n)) for n in operation.weights.split()}
        found = {n: v for n, v in views.items() if v is not None}
        if len(found) != 1: return []
        (name, view), = found.items()
        layout = call.layout(name)
        if layout is None or not _has_input(call, name, self.sources): return []
        if func in GROUPED: return list(self._grouped(call, view, layout))
        bias = self.sources.find(call.bias)
        if bias is not None: bias = replace(bias, factor=call.times*bias.factor)
        u = self._unit(view.once(), layout, bias)
        if u is None: return []
        is_row = call.bias is None or operation.bias_is_row or _is_row(call.bias, layout)
        others = [a for n, a in call.arguments.items() if n not in (name, operation.bias) and isinstance(a, Tensor)]
        return [Use(u, call.bias, call.times, is_row, input=others[0] if is_row and len(others) == 1 else None)]

    def _known_use(self, func: Callable, args: tuple) -> list[Use]:
        "The use of a whole parameter by a function of input, weight and bias, such as a conv."
        key = func,id(args[1])
        if key not in self._known:
            view = self.sources.find(args[1])
            call = OPERATIONS[func].call(args, {})
            layout = call.layout('weight') if view is not None else None
            u = self._unit(view, layout, self.sources.find(call.bias)) if layout is not None else None
            self._known[key] = u,layout
        u = self._known[key][0]
        return [Use(u, args[2] if len(args) > 2 else None, input=args[0])] if u is not None else []

    def uses_as_linear(self, weight: Tensor, bias: Tensor | None, letter: str = '') -> list[Use]:
        "The use of a weight as that of a linear layer. A letter tells it from others in the same parameter."
        view = self.sources.find(weight)
        if view is None: return []
        layout = OPERATIONS[F.linear].call((None, weight, bias), {}).layout('weight')
        u = self._unit(view, layout, self.sources.find(bias), f'{view.source.name}[{letter}]' if letter else '')
        return [Use(u, bias)] if u is not None else []

    def _grouped(self, call: Call, view: View, layout: Layout) -> Iterator[Use]:
        "A use for each expert, whose rows lie one after the other."
        start = 0
        for i, end in enumerate(call.arguments['offs'].tolist()):
            one = View(view.source, view.offset + i*view.stride[0], view.size[1:], view.stride[1:], view.factor)
            if end > start and (u := self._unit(one, layout, None)) is not None: yield Use(u, rows=slice(start, end))
            start = end

    # ---- Units

    def made(self, recipe: tuple) -> Unit | None:
        "The unit of this recipe, which may come from another rank; `None` if it is not wanted."
        by_name = {s.name: s for s in self.sources.by_id.values()}
        name,offset,size,stride,layout,of_bias = recipe
        bias = View(by_name[of_bias[0]], *of_bias[1:]) if of_bias is not None else None
        return self._unit(View(by_name[name], offset, size, stride), layout, bias)

    def _unit(self, view: View, layout: Layout, bias: View | None, name: str = '') -> Unit | None:
        "The unit of a view and of the direction of its use. It is made at the first use, if it is wanted."
        key = _key(view, layout)
        if key in self.units or self.closed: return self.units.get(key)
        source,p = view.source,view.source.param
        if id(p) in self._blocks and self._blocks[id(p)].called: return None
        if not self.selection.selects(name or view.name, source):
            self.declined.add(id(p))
            return None
        if p.dim() < 2: self.reshaped.add(id(p))
        of_layer = source.layer is not None and view.whole and key == _natural(source)
        label,module = source.layer if of_layer else (name or view.name, source.module)
        others = self._of_param.setdefault(id(p), [])
        tied = id(p) in self.elsewhere or any(view.overlaps(u.weight.view) for u in others)
        of_bias = Ref(bias.flat()) if bias is not None else None
        u = view_unit(_free(label, self._names), module, Ref(view, layout), of_bias, 'tied' if tied else '')
        if u.bias is not None and self._bias_owners.setdefault(u.bias.key, u) is not u: u.bias = None
        u.apart = several_ranks() and view.index() is not None
        u.recipe = (*_recipe(view), layout, _recipe(bias) if bias is not None else None)
        if id(p) in self._blocks: self._replaced.add(id(self._blocks[id(p)]))
        self.prepare(u)
        self.units[key] = u
        others.append(u)
        return u

    def close(self) -> None:
        "Make the units of unused slices, and none after them. The recorder closes it after the first step."
        self.units |= {_key(u.weight.view, u.layout): u for u in unused_slices(self)}
        self.closed = True


def unused_slices(discovery: Discovery) -> Iterator[Unit]:
    "Units for the slices that no operation took, of parameters with slices that were taken: experts without a token."
    by_param: dict[int, dict[int, Unit]] = {}
    for u in discovery.units.values():
        if (i := u.weight.view.index()) is not None: by_param.setdefault(id(u.weight.param), {})[i] = u
    for used in by_param.values():
        weight = next(iter(used.values())).weight
        view,p = weight.view,weight.param
        for i in (i for i in range(len(p)) if i not in used):
            other = View(view.source, p.storage_offset() + i*p.stride(0), view.size, view.stride)
            if not discovery.selection.selects(other.name, view.source): continue
            unit = view_unit(other.name, view.source.module, Ref(other, weight.layout), None, '')
            discovery.prepare(unit)
            yield unit


def _key(view: View, layout: Layout) -> Any:
    "Identifies a view and the direction in which it is used."
    return view.key((*layout.out, *layout.batch)) if layout.split == 1 else view.key()


def _has_input(call: Call, weight: str, sources: Sources) -> bool:
    "Whether anything but weights goes into the operation. A product of weights is not an activation."
    others = [a for n, a in call.arguments.items() if n not in (weight, call.operation.bias)]
    views = [sources.find(a) for a in others if isinstance(a, Tensor)]
    return any(v is None or 0 in v.stride or len(v.size) > 2 for v in views)


def _free(name: str, names: set[str]) -> str:
    "The name, with a number if another unit has it. It is added to `names`."
    free = next(n for i in range(1, len(names) + 3) if (n := f'{name} ({i})' if i > 1 else name) not in names)
    names.add(free)
    return free


def _natural(source: Source) -> Any:
    "The key of a layer's weight in the direction in which the layer uses it."
    view,layer = View.whole_of(source),source.layer[1]
    if not isinstance(layer, _ConvTransposeNd): return view.key((0,))
    return view.key((1,)) if layer.groups == 1 else view.key()


def _recipe(view: View) -> tuple: return view.source.name, view.offset, view.size, view.stride


def _is_row(bias: Tensor, layout: Layout) -> bool:
    "Whether a bias that may have any shape has one number a channel."
    return layout.channel_dim == -1 and bias.dim() > 0 and bias.numel() == bias.shape[-1]
