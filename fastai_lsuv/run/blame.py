"""Where an error or a warning comes from.

An error of the model itself is raised as it is, with a note (`explained`): which layer was running, what it was given,
what to do. Nothing is done while the model runs. Once an error is raised, the frames of its traceback tell. A warning
points at the line that called this package (`warn_caller`)."""
from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

__all__ = ['explained', 'warn_caller']

_START = 'The error was raised in '
_MOST_TENSORS = 4


def warn_caller(message: str) -> None:
    "Warn, and point at the line that called this package."
    level,frame = 1,sys._getframe()
    while frame is not None and frame.f_globals.get('__name__', '').startswith('fastai_lsuv.'):
        level,frame = level + 1,frame.f_back
    warnings.warn(message, stacklevel=level)


@contextmanager
def explained(
    model: nn.Module,
    batch: Any = None  # What the model is given; `None` if it is not known
) -> Iterator[None]:
    "Add a note to what `model` raises inside, where Python has notes."
    try: yield
    except Exception as e:
        told = any(n.startswith(_START) for n in getattr(e, '__notes__', ()))
        if hasattr(e, 'add_note') and not told and (note := _note(model, batch, e)): e.add_note(note)
        raise


def _note(model: nn.Module, batch: Any, error: Exception) -> str:
    called = _last_called(model, error)
    if called is None: return ''
    name,module,args,kwargs = called
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    what = f'layer {name!r}' if name else 'the model'
    shown = ', '.join(f'{_dtype(t.dtype)} {tuple(t.shape)}' for t in given[:_MOST_TENSORS])
    more = f' and {len(given) - _MOST_TENSORS} more' if len(given) > _MOST_TENSORS else ''
    took = f'It was given {shown}{more}.' if given else 'It was given no tensor.'
    hints = [h for h in (_about_kind(module, given), _about_size(module, given), _about_error(error),
                         _about_batch(batch)) if h]
    return ' '.join([f'{_START}{what} ({type(module).__name__}). {took}', *hints])


def _last_called(model: nn.Module, error: Exception) -> tuple[str, nn.Module, tuple, dict] | None:
    "The innermost module of `model` that was being called, its name, and what it was given."
    names = {id(m): n for n, m in model.named_modules()}
    tb,called = error.__traceback__,None
    while tb is not None:
        held = tb.tb_frame.f_locals if tb.tb_frame.f_code is nn.Module._call_impl.__code__ else {}
        m = held.get('self')
        if id(m) in names: called = names[id(m)],m,held['args'],held['kwargs']
        tb = tb.tb_next
    return called


def _dtype(dtype: torch.dtype) -> str: return str(dtype).removeprefix('torch.')


def _about_kind(module: nn.Module, given: list[Tensor]) -> str:
    "Whether the first tensor is of the wrong dtype."
    weight = next((p for p in module.parameters(recurse=False) if p.is_floating_point()), None)
    if weight is None or not given: return ''
    x,has = given[0].dtype,weight.dtype
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "It takes integers, such as the numbers of tokens." if x.is_floating_point else ''
    if not x.is_floating_point and not x.is_complex:
        return ("It takes floating-point numbers: convert the mini-batch with `.float()`. If these are targets, pass "
                "`n_inp`, the number of inputs.")
    if x == has or torch.is_autocast_enabled(given[0].device.type): return ''
    return (f"Its weight is {_dtype(has)}: convert the mini-batch with `.to({has})`, or the model with "
            f"`model.to({x})`.")


def _about_size(module: nn.Module, given: list[Tensor]) -> str:
    "Whether the first tensor has the wrong number of channels or dimensions."
    if not given: return ''
    shape = given[0].shape
    if isinstance(module, nn.Linear) and shape[-1:] != (module.in_features,):
        return f"Its last dimension must be {module.in_features}."
    if isinstance(module, _ConvNd):
        n = len(module.kernel_size)
        if len(shape) not in (n + 1, n + 2): return f"It takes {n + 2} dimensions: samples, channels and {n} more."
        at = len(shape) - n - 1
        if shape[at] != module.in_channels: return f"It takes {module.in_channels} channels (dimension {at})."
    if isinstance(module, _BatchNorm) and len(shape) > 1 and shape[1] != module.num_features:
        return f"It takes {module.num_features} channels (dimension 1)."
    return ''


def _about_error(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError): return "Pass a smaller mini-batch."
    if 'more than 1 value per channel' in str(error):
        return "LSUV runs the model in train mode: pass a mini-batch of at least 2 samples."
    return ''


def _about_batch(batch: Any) -> str:
    "Whether the last of several inputs looks like a target."
    if not isinstance(batch, tuple) or len(batch) < 2 or not isinstance(batch[-1], Tensor): return ''
    is_target = batch[-1].dim() <= 1 or not batch[-1].is_floating_point()
    return f"If the last of its {len(batch)} inputs is the target, pass `n_inp={len(batch) - 1}`." if is_target else ''
