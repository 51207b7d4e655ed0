"""The units that no layer applies: `Discovery` knows which parameters a linear operation may take as its weight.

A model may hold weights in no conv or linear layer: experts in one parameter, a library's own linear layer, `x @ w`.
Where a linear operation takes such a parameter, or a view of it, the view is an `OperationUnit`. `Discovery.uses` says
which units an operation uses, and makes them when they are first used. `hooks` asks it as the model runs."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from .operations import GROUPED, OPERATIONS, Call, Layout
from ..parallel.ranks import several_ranks
from ..parallel.sharded import Shards
from ..units.units import Unit
from .views import Copy, Source, Sources, View, ViewRef
from ..units.weights import Parts

__all__ = ['OperationUnit', 'Use', 'Discovery', 'unused_slices']


class OperationUnit(Unit):
    "A view of a parameter that linear operations take as their weight. What they put out is measured."
    is_module = False

    def __init__(self, name: str, view: View, layout: Layout, bias: View | None, affine: bool):
        weight,bias = ViewRef(view, layout),ViewRef(bias) if bias is not None else None
        frozen,source = weight.frozen(),view.source
        if bias is not None and bias.frozen(): bias = None
        super().__init__(name, source.module, Parts(source.module, [] if frozen else [weight], bias, frozen,
                                                    layout.channel_dim, affine))
        self.weight = weight
        self.replaces: Unit | None = source.unit  # The unit of a layer that the model does not call
        if self.replaces is not None: self.kind = self.replaces.kind
        self.added_bias: Tensor | None = None  # The bias that the operation adds, whoever owns it
        self.apart = several_ranks() and view.index() is not None
        of_bias = bias.view.recipe if bias is not None else None
        self.recipe = (*view.recipe, layout, of_bias, affine)  # what other ranks can make it of
        views = [view, *([bias.view] if bias is not None else [])]
        self.shards = Shards((v.source.module, v.source.attribute, v.source.param) for v in views)

    @property
    def added(self) -> Tensor | None: return self.added_bias

    @property
    def parameters(self) -> list[nn.Parameter]: return [r.value for r in (self.weight, self.bias) if r is not None]

    @property
    def versioned(self) -> Iterable[Tensor]: return (r.value for r in self.refs)


@dataclass
class Use:
    "One use of a unit by an operation."
    unit: OperationUnit
    copies: list[Copy]  # Copies of the weight and the bias that the operation takes
    rows: slice | None = None  # Which rows of the output are the unit's; `None`: all

    def refresh(self) -> None:
        "Compute the copies again from what the parameters now hold."
        for c in self.copies: c.refresh()


class Discovery:
    "Finds the units in the linear operations on parameters that no other unit owns."
    def __init__(self,
        sources: Iterable[Source],  # The parameters that may be found
        selects: Callable[[str, Source], bool],  # Whether a unit is wanted, by its name and its parameter
        prepare: Callable[[Unit], object]  # Gives a unit its target, and says whether it is left alone
    ):
        self.sources,self.selects,self.prepare = Sources(sources),selects,prepare
        self.units: dict[Any, OperationUnit] = {}
        self.declined: set[int] = set()  # Parameters in units that are not wanted, by id
        self.taken: set[int] = set()  # Parameters that some function took, by id
        self.closed = False  # Whether there are no further units

    def look_for(self, units: Iterable[Unit]) -> bool:  # Whether there are any such weights
        """From now on, look for the weights of these layers in operations too. The model does not call the layers.

        A parent may apply their weights itself. The rows of the layers are then those of the operations."""
        layers = [u for u in units if u.is_module and u.layer is u.module and u.affine and not u.left_alone]
        sources = [Source(f'{u.name}.{k}' if u.name else k, u.module, k, p, u) for u in layers
                   for k, p in u.module._parameters.items() if p is not None]
        self.sources.add(sources)
        return bool(sources)

    # ---- What an operation uses

    def concerns(self, args: tuple, kwargs: dict) -> bool:
        "Whether an argument of a function, or a tensor in an argument that is a list, comes from a parameter."
        for o in (*args, *kwargs.values()):
            for t in o if isinstance(o, (list, tuple)) else (o,):
                if isinstance(t, Tensor) and self.sources.find(t) is not None: return True
        return False

    def uses(self, func: Callable, args: tuple, kwargs: dict) -> list[Use]:
        "The uses of units by a linear operation."
        call = OPERATIONS[func].call(args, kwargs)
        views = {n: self.sources.find(call.arguments.get(n)) for n in call.operation.weights.split()}
        found = {n: v for n, v in views.items() if v is not None}
        if len(found) != 1: return []
        (name, view), = found.items()
        layout = call.layout(name)
        if layout is None or not self._has_input(call, name): return []
        if func in GROUPED: return list(self._grouped(call, view, layout))
        bias = call.bias
        affine = bias is None or call.plain and (call.operation.sure or _is_row(bias, layout))
        return self._use(view, layout, bias, affine)

    def uses_as_linear(self, weight: Tensor, bias: Tensor | None, letter: str = '') -> list[Use]:
        "The use of a weight as that of a linear layer. A letter tells it from others in the same parameter."
        view = self.sources.find(weight)
        if view is None: return []
        layout = OPERATIONS[F.linear].call((None, weight, bias), {}).layout('weight')
        return self._use(view, layout, bias, name=f'{view.source.name}[{letter}]' if letter else '')

    def _has_input(self, call: Call, weight: str) -> bool:
        "Whether anything but weights goes into the operation. A product of weights is not an activation."
        others = [a for n, a in call.arguments.items() if n not in (weight, call.operation.bias)]
        views = [self.sources.find(a) for a in others if isinstance(a, Tensor)]
        return any(v is None or 0 in v.stride or len(v.size) > 2 for v in views)

    def _grouped(self, call: Call, view: View, layout: Layout) -> Iterator[Use]:
        "A use for each expert, whose rows lie one after the other."
        start = 0
        for i, end in enumerate(call.arguments['offs'].tolist()):
            one = View(view.source, view.offset + i*view.stride[0], view.size[1:], view.stride[1:], view.copy)
            if end > start: yield from self._use(one, layout, rows=slice(start, end))
            start = end

    def _use(self, view: View, layout: Layout, bias: Tensor | None = None, affine: bool = True,
             rows: slice | None = None, name: str = '') -> list[Use]:
        "One use of a view as a weight, if it is one that is wanted."
        view,added = view.once(),self.sources.find(bias)
        u = self._unit(view, layout, added, affine, name)
        if u is None: return []
        u.channel_dim,u.added_bias = layout.channel_dim,bias.detach().flatten() if bias is not None else None
        return [Use(u, [v.copy for v in (view, added) if v is not None and v.copy is not None], rows)]

    # ---- Units

    def made(self, recipe: tuple) -> OperationUnit | None:
        "The unit of this recipe, which may come from another rank; `None` if it is not wanted."
        by_name = {s.name: s for s in self.sources.by_id.values()}
        name,offset,size,stride,layout,of_bias,affine = recipe
        view = View(by_name[name], offset, size, stride)
        bias = View(by_name[of_bias[0]], *of_bias[1:]) if of_bias is not None else None
        return self._unit(view, layout, bias, affine)

    def _unit(self, view: View, layout: Layout, bias: View | None, affine: bool, name: str = ''
              ) -> OperationUnit | None:
        "The unit of a view and of the direction of its use. It is made at the first use, if it is wanted."
        key = _key(view, layout)
        if key in self.units or self.closed: return self.units.get(key)
        of_layer,name = view.source.unit,name or view.name
        if of_layer is not None and view.whole: name = of_layer.name
        if of_layer is None and not self.selects(name, view.source):
            self.declined.add(id(view.source.param))
            return None
        others = [u.weight.view for u in self.units.values() if u.weight.value is view.source.param]
        u = OperationUnit(self._free(name), view, layout, bias.flat() if bias is not None else None, affine)
        is_table = isinstance(view.source.module, (nn.Embedding, nn.EmbeddingBag))
        if not u.left_alone and (is_table or any(map(view.overlaps, others))): u.left_alone = 'tied'
        self.prepare(u)
        self.units[key] = u
        return u

    def close(self) -> None:
        "Make the units of unused slices, and none after them. The recorder closes it after the first step."
        self.units |= {_key(u.weight.view, u.weight.layout): u for u in unused_slices(self)}
        self.closed = True

    def _free(self, name: str) -> str:
        "The name, with a number if another unit has it."
        names = {u.name for u in self.units.values()}
        if name not in names: return name
        return next(n for i in range(2, len(names) + 3) if (n := f'{name} ({i})') not in names)


def unused_slices(discovery: Discovery) -> Iterator[OperationUnit]:
    "Units for the slices that no operation took, of parameters with slices that were taken: experts without a token."
    by_param: dict[int, dict[int, OperationUnit]] = {}
    for u in discovery.units.values():
        if (i := u.weight.view.index()) is not None: by_param.setdefault(id(u.weight.value), {})[i] = u
    for used in by_param.values():
        weight = next(iter(used.values())).weight
        view,p = weight.view,weight.value
        for i in (i for i in range(len(p)) if i not in used):
            other = View(view.source, p.storage_offset() + i*p.stride(0), view.size, view.stride)
            if not discovery.selects(other.name, view.source): continue
            unit = OperationUnit(other.name, other, weight.layout, None, True)
            discovery.prepare(unit)
            yield unit


def _key(view: View, layout: Layout) -> Any:
    "Identifies a view and the direction in which it is used."
    return view.key((*layout.out, *layout.batch)) if layout.split == 1 else view.key()


def _is_row(bias: Tensor, layout: Layout) -> bool:
    "Whether a bias that may have any shape has one number a channel."
    return layout.channel_dim == -1 and bias.dim() > 0 and bias.numel() == bias.shape[-1]
