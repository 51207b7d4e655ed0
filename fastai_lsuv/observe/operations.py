"""The linear operations: which of their arguments are weight and bias, and what each dimension of the weight is for.

`OPERATIONS` has a line for each function of torch whose output is linear in one of its arguments. A line names the
arguments, tells which of them may be the weight and which is the bias, and how the weight is laid out. Most say that
with an equation, as `torch.einsum` takes it."""
from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters, ascii_uppercase
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..units import Layout

__all__ = ['Operation', 'Call', 'OPERATIONS', 'GROUPED', 'COPIES']


@dataclass(frozen=True)
class Call:
    "One call of an operation: its arguments by name."
    arguments: dict[str, Any]
    operation: Operation

    @property
    def bias(self) -> Tensor | None: return self.arguments.get(self.operation.bias)

    @property
    def times(self) -> float:
        "The factor that the bias is added with."
        return float(self.arguments.get('beta', 1))

    def layout(self, name: str) -> Layout | None:
        "How the argument of this name is laid out as a weight; `None` if the output is not linear in it."
        return self.operation.layout(self.arguments, name)


@dataclass(frozen=True)
class Operation:
    "A function whose output is linear in one of its arguments."
    names: str  # Names of its arguments, in order
    layout: Callable[[dict[str, Any], str], Layout | None]
    weights: str  # Arguments that may be the weight
    bias: str = ''  # The argument that is added
    bias_is_row: bool = True  # Whether the bias always has one number a channel

    def call(self, args: tuple, kwargs: dict) -> Call:
        return Call({**dict(zip(self.names.split(), args)), **kwargs}, self)


# ---- Layouts

def _of_equation(inputs: list[str], output: str, which: int) -> Layout | None:
    "The layout of an operand, by the labels of its dimensions. An ellipsis is one label, a dot."
    w,others = inputs[which],set().union(*(labels for i, labels in enumerate(inputs) if i != which))
    if '.' in w or len(set(w)) < len(w): return None
    out = [c for c in w if c in output and c not in others]
    batch = [c for c in w if c in output and c in others]
    fan_in = [c for c in w if c not in output]
    channels = sorted(out or batch, key=output.index)[-1:]
    if not fan_in or not channels or '.' in output[output.index(channels[0]):]: return None

    def dims(labels): return tuple(map(w.index, labels))

    return Layout(dims(out), dims(batch), dims(fan_in), dims(channels), output.index(channels[0]) - len(output))


def _equation(equation: str, operands: str) -> Callable[[dict[str, Any], str], Layout | None]:
    "The layout by an equation over arguments of these names."
    inputs,output = equation.replace('...', '.').split('->')
    return lambda arguments, name: _of_equation(inputs.split(','), output, operands.split().index(name))


def _matmul(arguments: dict[str, Any], name: str) -> Layout | None:
    a,b = arguments['input'].dim(),arguments['other'].dim()
    if not a or not b: return None
    batch = ascii_uppercase[:max(a, b, 2) - 2]
    left = 'i' if a == 1 else batch[len(batch) - a + 2:] + 'ni'
    right = 'i' if b == 1 else batch[len(batch) - b + 2:] + 'io'
    output = batch + 'n'*(a > 1) + 'o'*(b > 1)
    return _of_equation([left, right], output, int(name == 'other'))


def _einsum(arguments: dict[str, Any], name: str) -> Layout | None:
    if not isinstance(arguments['equation'], str): return None
    inputs,arrow,output = arguments['equation'].replace(' ', '').replace('...', '.').partition('->')
    labels = inputs.replace(',', '')
    if not arrow: output = '.'*('.' in labels) + ''.join(sorted(c for c in set(labels) - {'.'} if labels.count(c) == 1))
    return _of_equation(inputs.split(','), output, int(name[1:]))


def _tensordot(arguments: dict[str, Any], name: str) -> Layout | None:
    a,b,dims = arguments['a'],arguments['b'],arguments.get('dims', 2)
    if isinstance(dims, Tensor): return None
    if isinstance(dims, int): dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    left,right = list(ascii_letters[:a.dim()]),list(ascii_letters[a.dim():a.dim() + b.dim()])
    for i, j in zip(*([d] if isinstance(d, int) else d for d in dims)): right[j] = left[i]
    shared = set(left) & set(right)
    output = ''.join(c for c in left + right if c not in shared)
    return _of_equation([''.join(left), ''.join(right)], output, int(name == 'b'))


def _conv(arguments: dict[str, Any], name: str) -> Layout:
    d = arguments['weight'].dim()
    return Layout((0,), (), tuple(range(1, d)), (0,), 1 - d, arguments.get('groups', 1))


def _conv_transpose(arguments: dict[str, Any], name: str) -> Layout:
    d,groups = arguments['weight'].dim(),arguments.get('groups', 1)
    if groups == 1: return Layout((1,), (), (0, *range(2, d)), (1,), 1 - d)
    return Layout((2,), (0,), (1, *range(3, d + 1)), (0, 2), 1 - d, split=groups)


class _Einsum(Operation):
    "`torch.einsum`, whose operands come one by one or in a list."
    def call(self, args: tuple, kwargs: dict) -> Call:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return Call({'equation': args[0], **{f'_{i}': o for i, o in enumerate(operands)}}, self)


# ---- The table

_CONV = 'input weight bias stride padding dilation groups'
_TRANSPOSED = 'input weight bias stride padding output_padding groups dilation'
_mm = Operation('input mat2', _equation('ni,io->no', 'input mat2'), 'input mat2')
_bmm = Operation('input mat2', _equation('bni,bio->bno', 'input mat2'), 'input mat2')
_mv = Operation('input vec', _equation('ni,i->n', 'input vec'), 'input')
_matmuls = Operation('input other', _matmul, 'input other')
_addmm = Operation('input mat1 mat2', _equation('ni,io->no', 'mat1 mat2'), 'mat1 mat2', 'input', False)
_baddbmm = Operation('input batch1 batch2', _equation('bni,bio->bno', 'batch1 batch2'), 'batch1 batch2', 'input', False)
_grouped = Operation('input mat2 offs bias', _equation('ni,io->no', 'input mat2'), 'mat2')  # of each expert's rows

GROUPED = [f for m in (torch, F) for n in ('_grouped_mm', 'grouped_mm') if (f := getattr(m, n, None))]

OPERATIONS: dict[Callable, Operation] = {
    F.linear: Operation('input weight bias', _equation('...i,oi->...o', 'input weight'), 'weight', 'bias'),
    F.bilinear: Operation('input1 input2 weight bias', _equation('...i,...j,oij->...o', 'input1 input2 weight'),
                          'weight', 'bias'),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), Operation(_CONV, _conv, 'weight', 'bias')),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
                    Operation(_TRANSPOSED, _conv_transpose, 'weight', 'bias')),
    **dict.fromkeys((torch.mm, Tensor.mm), _mm),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmuls),
    **dict.fromkeys((torch.mv, Tensor.mv), _mv),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _baddbmm),
    torch.einsum: _Einsum('', _einsum, '_0 _1 _2 _3'),
    torch.tensordot: Operation('a b dims', _tensordot, 'a b'),
    **dict.fromkeys(GROUPED, _grouped),
}

def _one(args: tuple, of: Tensor) -> float: return 1.
def _minus_one(args: tuple, of: Tensor) -> float: return -1.


def _times(args: tuple, of: Tensor) -> float | None:
    if len(args) < 2: return None  # given by keyword
    other = args[1] if args[0] is of else args[0]
    is_number = isinstance(other, (int, float)) or isinstance(other, Tensor) and other.numel() == 1
    return float(other) if is_number else None


def _divided(args: tuple, of: Tensor) -> float | None:
    by = _times(args, of)
    return 1/by if by and args[0] is of else None


# Functions whose output is one of their arguments, converted or multiplied by a number; and what gives that number.
COPIES: dict[Callable, Callable[[tuple, Any], float | None]] = {
    **dict.fromkeys((Tensor.to, Tensor.half, Tensor.bfloat16, Tensor.float, Tensor.double, Tensor.type, Tensor.type_as,
                     Tensor.cpu, Tensor.cuda, Tensor.contiguous, Tensor.clone, torch.clone), _one),
    **dict.fromkeys((Tensor.mul, torch.mul), _times),
    **dict.fromkeys((Tensor.div, torch.div), _divided),
    Tensor.neg: _minus_one,
}
