"""Units that are found by what operates on a weight: `Discovery` sees the linear operations of a pass.

A model may hold weights in no conv or linear layer: experts in one parameter, a library's own linear layer, `x @ w`.
Where a linear operation takes such a parameter or a view of it, the view is an `OperationUnit`. It is started before
the operation runs, and measured and corrected after it, as a layer is by its hooks."""
from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .operations import COPIES, GROUPED, OPERATIONS, Call, Layout
from .ranks import several_ranks
from .sharded import Shards
from .units import Unit
from .views import Copy, Held, Sources, View, ViewRef
from .weights import Parts

if TYPE_CHECKING: from .passes import Passes

__all__ = ['OperationUnit', 'Discovery']


class OperationUnit(Unit):
    "A view of a parameter that linear operations take as their weight. What they put out is measured."
    is_module = False

    def __init__(self, name: str, view: View, layout: Layout, bias: View | None, affine: bool):
        weight,bias = ViewRef(view, layout),ViewRef(bias) if bias is not None else None
        frozen = weight.frozen()
        if bias is not None and bias.frozen(): bias = None
        super().__init__(name, view.held.module, Parts(view.held.module, [] if frozen else [weight], bias, frozen,
                                                       layout.channel_dim, affine))
        self.weight,self.given_bias = weight,None
        self.apart = several_ranks() and view.index() is not None
        of_bias = bias.view.recipe if bias is not None else None
        self.recipe = (*view.recipe, layout, of_bias, affine)  # what other ranks can make it of
        self.shards = Shards((v.held.module, v.held.attribute, v.held.param) for v in (view, bias and bias.view) if v)

    @property
    def added(self) -> Tensor | None: return self.given_bias

    @property
    def parameters(self) -> list[nn.Parameter]: return [r.value for r in (self.weight, self.bias) if r is not None]

    @property
    def _layers_own(self) -> Iterable[nn.Parameter]: return ()


@dataclass
class Use:
    "One use of a unit by an operation."
    unit: OperationUnit
    layout: Layout
    bias: Tensor | None  # What is added
    copies: list[Copy]  # Copies of the weight and the bias that the operation takes
    rows: slice | None = None  # Which rows of the output are the unit's; `None`: all

    def refresh(self) -> None:
        for c in self.copies: c.refresh()


class Discovery:
    """Finds the units in the linear operations on parameters that no other unit owns.

    `handlers` are to see the functions that the model calls. They show each unit to `passes`."""
    def __init__(self,
        held: Iterable[Held],  # The parameters that may be found
        selects: Callable[[str, Held], bool],  # Whether a unit is wanted, by its name and its parameter
        prepare: Callable[[Unit], object]  # Gives a unit its target, and says whether it is left alone
    ):
        self.sources,self.selects,self.prepare = Sources(held),selects,prepare
        self.units: dict[Any, OperationUnit] = {}
        self.declined: set[int] = set()  # Parameters in units that are not wanted, by id
        self.taken: set[int] = set()  # Parameters that some function took, by id
        self.passes: Passes | None = None
        self.own: Callable[[list[nn.Parameter]], object] = lambda params: None  # Called before parameters change

    @property
    def handlers(self) -> dict[Callable, Callable]:
        "By function: what is called in its place, with what runs it, its arguments and its keyword arguments."
        if not self.sources.matrices: return {}
        return {**{f: partial(self._operation, f) for f in OPERATIONS}, **{f: partial(self._copy, f) for f in COPIES},
                F.multi_head_attention_forward: self._attention}

    def end(self) -> None:
        "End a pass."
        self.sources.copies = {}

    def adopt(self, units: Iterable[Unit]) -> bool:  # Whether there are any
        """Look for the weights of layers that were not called from now on.

        Their parent may apply them by itself. Their rows are then those of the operations that do."""
        layers = [u for u in units if u.is_module and u.layer is u.module and u.affine and not u.left_alone]
        held = [Held(f'{u.name}.{k}' if u.name else k, u.module, k, p, u) for u in layers
                for k, p in u.module._parameters.items() if p is not None]
        self.sources.add(held)
        return bool(held)

    def made(self, recipe: tuple) -> OperationUnit | None:
        "The unit of this recipe, which may come from another rank; `None` if it is not wanted."
        held = {h.name: h for h in self.sources.by_id.values()}
        name,offset,size,stride,layout,of_bias,affine = recipe
        view = View(held[name], offset, size, stride)
        key = self._key(view, layout)
        if key not in self.units:
            bias = View(held[of_bias[0]], *of_bias[1:]) if of_bias is not None else None
            u = self._new(view.name, view, layout, bias, affine)
            if u is None: return None
            self.units[key] = u
        return self.units[key]

    def missed(self) -> Iterator[OperationUnit]:
        "Units for the slices of a parameter that no operation took, where it took others: experts without a token."
        by_param: dict[int, dict[int, OperationUnit]] = {}
        for u in self.units.values():
            if (i := u.weight.view.index()) is not None: by_param.setdefault(id(u.weight.value), {})[i] = u
        for found in by_param.values():
            u = next(iter(found.values()))
            view,step = u.weight.view,u.weight.value.stride(0)
            first = u.weight.value.storage_offset()
            for i in range(len(u.weight.value)):
                if i in found: continue
                other = View(view.held, first + i*step, view.size, view.stride)
                if not self.selects(other.name, view.held): continue
                unit = OperationUnit(other.name, other, u.weight.layout, None, True)
                self.prepare(unit)
                yield unit

    # ---- Handlers

    def _copy(self, func: Callable, run: Callable, args: tuple, kwargs: dict) -> Any:
        out = run(*args, **kwargs)
        if not self.idle(): self.sources.note(out, args, COPIES[func])
        return out

    def _operation(self, func: Callable, run: Callable, args: tuple, kwargs: dict) -> Any:
        uses = self._uses(func, args, kwargs)
        return self._show(uses, partial(run, *args, **kwargs)) if uses else run(*args, **kwargs)

    def _attention(self, run: Callable, args: tuple, kwargs: dict) -> Any:
        "Attention projects its inputs out of sight. The same is done here before, to measure and correct it."
        if self.idle(): return run(*args, **kwargs)
        given = _SIGNATURE.bind(*args, **kwargs).arguments
        in_graph,projected = self.in_graph,[]
        project = F.linear if in_graph else _beside
        for x, w, b, letter in _projections(given):
            uses = self._linear(w, b, letter)
            if uses or in_graph: projected.append(self._show(uses, partial(project, x, w, b)))
        run = partial(run, **(_projected(given, projected) if in_graph else given))
        last = self._linear(given['out_proj_weight'], given['out_proj_bias'])  # unless a layer owns it
        for u in last: self.before(u)
        out = run()
        for u in last: self.after(u, out[0], lambda: run()[0])
        return out

    def _linear(self, weight: Tensor, bias: Tensor | None, letter: str = '') -> list[Use]:
        "The use of a weight as that of a linear layer."
        view = self.sources.find(weight)
        if view is None: return []
        layout = OPERATIONS[F.linear].call((None, weight, bias), {}).layout('weight')
        return self._use(view, layout, bias, name=f'{view.held.name}[{letter}]' if letter else '')

    def _show(self, uses: list[Use], run: Callable[[], Any]) -> Any:
        "Run an operation whose weights are units, and show the passes what it puts out."
        for u in uses: self.before(u)
        out = run()
        for u in uses: out = self.after(u, out, run)
        return out

    @property
    def in_graph(self) -> bool:
        "Whether gradients are to reach what is shown. They reach what is used."
        return self.passes.hear is not None

    def idle(self) -> bool:
        "Whether nothing is to be looked at: a unit is run again, or a transform of `torch.func` runs."
        return self.passes.busy or torch._C._functorch.peek_interpreter_stack() is not None

    def before(self, use: Use) -> None:
        "An operation is about to run."
        if self.passes.begin(use.unit): use.refresh()

    def after(self, use: Use, out: Any, again: Callable[[], Any]) -> Any:  # What to go on with
        "An operation has run; `again()` runs it once more."
        u = use.unit
        u.channel_dim,u.given_bias,u.most_samples = use.layout.channel_dim,use.bias,self.passes.n_samples
        solver = self.passes.solvers[u]

        def run_again():
            use.refresh()
            return again()

        if not u.affine: solver.given,solver.call = ((), {}),run_again
        part = out if use.rows is None else out[use.rows]
        new = self.passes.observe(u, part)
        if u.changed: use.refresh()
        return out if new is None else new

    # ---- What an operation uses

    def _uses(self, func: Callable, args: tuple, kwargs: dict) -> list[Use]:
        "The units that an operation uses."
        find = self.sources.find
        flat = [a for o in args for a in (o if isinstance(o, (list, tuple)) else (o,))] + list(kwargs.values())
        if not any(isinstance(t, Tensor) and find(t) is not None for t in flat) or self.idle(): return []
        call = OPERATIONS[func].call(args, kwargs)
        found = {n: v for n in call.operation.weights.split() if (v := find(call.arguments.get(n))) is not None}
        if len(found) != 1: return []
        (name, view), = found.items()
        layout = call.layout(name)
        if layout is None or not self._has_input(call, name): return []
        if func in GROUPED: return self._grouped(call, view, layout)
        bias = call.bias
        plain = bias is None or call.plain and (call.operation.sure or _is_row(bias, layout))
        return self._use(view, layout, bias, plain)

    def _has_input(self, call: Call, name: str) -> bool:
        "Whether anything but weights goes into the operation. A product of weights is no activation."
        given = {n: a for n, a in call.arguments.items() if n not in (name, call.operation.bias)}
        others = [a for a in given.values() if isinstance(a, Tensor)]
        views = [self.sources.find(t) for t in others]
        return any(v is None or 0 in v.stride or len(v.size) > 2 for v in views)

    def _use(self, view: View, layout: Layout, bias: Tensor | None = None, plain: bool = True,
             rows: slice | None = None, name: str = '') -> list[Use]:
        "One use of a view as a weight, if it is one that is wanted."
        view = view.once()
        key = self._key(view, layout)
        added = self.sources.find(bias)
        copies = [v.copy for v in (view, added) if v is not None and v.copy is not None]
        u = self.units.get(key)
        if u is None:
            u = self._new(name or view.name, view, layout, added.flat() if added is not None else None, plain)
            if u is None: return []
            self.units[key] = u
        return [Use(u, layout, bias.detach().flatten() if bias is not None else None, copies, rows)]

    def _key(self, view: View, layout: Layout) -> Any:
        "Identifies a view and the direction in which it is used."
        return view.key((*layout.out, *layout.batch)) if layout.split == 1 else view.key()

    def _new(self, name: str, view: View, layout: Layout, bias: View | None, affine: bool) -> OperationUnit | None:
        adopted = view.held.unit
        if adopted is not None and view.whole: name = adopted.name
        if adopted is None and not self.selects(name, view.held):
            self.declined.add(id(view.held.param))
            return None
        others = [u.weight.view for u in self.units.values() if u.weight.value is view.held.param]
        taken = {u.name for u in self.units.values()}
        if name in taken: name = next(n for i in range(2, len(taken) + 3) if (n := f'{name} ({i})') not in taken)
        u = OperationUnit(name, view, layout, bias, affine)
        tied = isinstance(view.held.module, (nn.Embedding, nn.EmbeddingBag)) or any(map(view.overlaps, others))
        if tied and not u.left_alone: u.left_alone = 'tied'
        self.prepare(u)
        if not u.left_alone: self.own(u.parameters)
        if adopted is not None: u.kind = adopted.kind
        self.found(u, adopted)
        return u

    def found(self, u: OperationUnit, adopted: Unit | None) -> None:
        "A unit is new. It may stand for a layer that was not called."
        self.passes.add(u, adopted)

    def _grouped(self, call: Call, view: View, layout: Layout) -> list[Use]:
        "A use for each expert, whose rows lie one after the other."
        uses,start = [],0
        for i, end in enumerate(call.arguments['offs'].tolist()):
            one = View(view.held, view.offset + i*view.stride[0], view.size[1:], view.stride[1:], view.copy)
            if end > start: uses += self._use(one, layout, rows=slice(start, end))
            start = end
        return uses


def _is_row(bias: Tensor, layout: Layout) -> bool:
    "Whether a bias that may have any shape has one number a channel."
    return layout.channel_dim == -1 and bias.dim() > 0 and bias.numel() == bias.shape[-1]


@torch.no_grad()
def _beside(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    "A projection that is measured alone. Autocast must not keep a weight that was cast here, without its gradient."
    return F.linear(x.detach(), weight.detach(), bias.detach() if bias is not None else None)


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _projections(given: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor | None, str]]:
    "Input, weight and bias of the projections of attention, each with its letter if one parameter holds all three."
    e,separate = given['embed_dim_to_check'],given.get('use_separate_proj_weight', False)
    for i, (letter, x) in enumerate(zip('qkv', (given['query'], given['key'], given['value']))):
        rows,bias = slice(i*e, (i + 1)*e),given['in_proj_bias']
        weight = given[f'{letter}_proj_weight'] if separate else given['in_proj_weight'][rows]
        x = x.transpose(0, 1) if x.dim() == 3 else x  # samples first
        yield x, weight, bias[rows] if bias is not None else None, '' if separate else letter


def _projected(given: dict[str, Any], qkv: list[Tensor]) -> dict[str, Any]:
    "The arguments of an attention that has its inputs projected, samples first. Its own projection changes nothing."
    inputs = dict(zip(('query', 'key', 'value'), (x.transpose(0, 1) if x.dim() == 3 else x for x in qkv)))
    same = torch.eye(given['embed_dim_to_check'], dtype=qkv[0].dtype, device=qkv[0].device)
    weights = dict(q_proj_weight=same, k_proj_weight=same, v_proj_weight=same, in_proj_weight=None, in_proj_bias=None)
    return given | inputs | weights | dict(use_separate_proj_weight=True)
