"""The hooks that a recorder puts on a model.

`RecordingHooks` measures the output of each layer as soon as the layer has computed it, and its gradient.
It measures between `start` and `stop` only. `record` joins what was measured into one `Record`, still on the device.
The data flow is: layer output -> forward hook -> `ActivationMeter` -> `Measure` -> `Record`."""
from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..measure.moments import first_tensor
from .meter import ActivationMeter, Measure, pool
from .records import Record

__all__ = ['RecordingHooks']

_NAN = float('nan')


class _LayerHook:
    "Forward hook of a layer. A copied or pickled model carries hooks that do nothing."
    def __init__(self, hooks: RecordingHooks | None = None, name: str = ''):
        self.name = name
        self.take = None if hooks is None else hooks.take
        # A compiled model leaves its graph for the hook, so that the hook sees numbers. `torch.compile` imports dynamo.
        if hooks is not None and 'torch._dynamo' in sys.modules:
            self.take = torch.compiler.disable(self.take)

    def __call__(self, module, args, out):
        if self.take is not None:
            self.take(self.name, out)

    def __reduce__(self):
        return _LayerHook, ()


class RecordingHooks:
    "Hooks on layers, which measure what passes between `start` and `stop`, and the gradients of that."
    def __init__(self,
        modules: dict[str, nn.Module],  # The layers, by name
        meter: ActivationMeter,  # Measures outputs and gradients
        grads: bool  # Measure gradients too
    ):
        self.modules = modules
        self.meter = meter
        self.grads = grads
        self.handles = []
        self.loss_scale = None  # What mixed precision multiplies the loss by, and with it the gradients
        self.checked_compile = False
        self.start(False)

    def attach(self):
        "Put the hooks on the layers."
        self.handles = [m.register_forward_hook(_LayerHook(self, n)) for n, m in self.modules.items()]

    def detach(self):
        "Remove the hooks."
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.recording = False

    def drop(self, names: set[str]):
        "Measure these layers no more."
        if names.isdisjoint(self.modules): return
        for n in names: self.modules.pop(n, None)
        self.detach()
        self.attach()

    def start(self, recording: bool = True):
        "Forget what was measured, and measure from now on if `recording`."
        self.recording = self.due = recording
        self.calls = defaultdict(list)  # By layer
        self.grad_calls = defaultdict(list)

    def stop(self):
        "Measure no more outputs. The gradients of those measured are still to come."
        self.recording = False

    def take(self,
        name: str,  # Of a layer
        out: Any,  # What it put out
        rows: slice | None = None  # Rows of a tensor that are the layer's; `None`: all
    ):
        "Measure the output of a layer, and its gradient when that comes."
        if not self.recording: return
        x = first_tensor(out)
        if x is None or not _is_measurable(x): return
        self.calls[name].append(self.meter(x if rows is None else x[rows]))
        if not self.grads or not x.requires_grad: return
        # A tensor of a subclass is a view of the layer's own, and would lose its hook to an in-place activation.
        if type(x) is not Tensor and x._is_view() and x._base.numel() == x.numel():
            x = x._base
        to = self.grad_calls[name]
        x.register_hook(lambda g: to.append(self.meter(g if rows is None else g[rows], grad=True)))

    def record(self,
        names: list[str]  # The layers, in order
    ) -> Record | None:
        "What was measured since `start`, still on the device; `None` if no layer was called."
        if not any(self.calls.get(n) for n in names): return None
        outputs, grads = ([pool(calls[n]) if calls.get(n) else None for n in names]
                          for calls in (self.calls, self.grad_calls))
        grads = grads if self.grads else None
        device = next((m.mean.device for m in outputs if m and isinstance(m.mean, Tensor)), None)
        columns = _columns(outputs, ('mean', 'std', 'near_zero', 'dead'), device)
        if grads is not None:
            grad_columns = _columns(grads, ('mean', 'std', 'near_zero'), device)
            if self.loss_scale is not None:
                grad_columns[:, :2] /= self.loss_scale.to(grad_columns.device)
            columns = torch.cat([columns, grad_columns], 1)
        if self.meter.bins is not None:
            columns = torch.cat([columns, _histograms(outputs, device, self.meter.bins[0])], 1)
        kinds = [outputs] if grads is None else [outputs, grads]
        return Record(np.array([[m.n if m else 0 for m in kind] for kind in kinds]).T, columns)

    def misses(self, model: nn.Module) -> bool:
        "Whether some layers were not called in this step, and the model will be compiled again for that."
        if not self.due or self.checked_compile: return False
        return not all(self.calls.get(n) for n in self.modules) and _is_compiled(model)

    def compile_again_if_missed(self, model: nn.Module):
        "Code compiled before there were hooks does not call them: have it compiled again. Looks once a fit."
        missed = self.misses(model)
        self.checked_compile |= self.due
        if not missed: return
        warnings.warn("ActivationStatsRecorder missed some layers in this step: the model was compiled before the "
                      "recorder was attached. It is compiled again for the next step.")
        torch.compiler.reset()


def _is_measurable(x: Tensor) -> bool:
    "`x` holds real numbers, at least one, in plain memory."
    return not x.is_complex() and x.numel() > 0 and x.layout == torch.strided and not x.is_nested


def _is_compiled(model: nn.Module) -> bool:
    "`model` or a part of it is compiled."
    return any(hasattr(m, '_orig_mod') or getattr(m, '_compiled_call_impl', None) is not None for m in model.modules())


def _columns(
    measures: list[Measure | None],  # One for each layer; `None`: not called
    fields: tuple[str, ...],  # A column each
    device: torch.device | None  # Where the numbers are; `None`: Python numbers
) -> Tensor:  # (layers, fields), float32; NaN for layers that were not called
    "Numbers of all layers."
    rows = [[_NAN]*len(fields) if m is None else [getattr(m, f) for f in fields] for m in measures]
    if device is None: return torch.tensor(rows, dtype=torch.float32)
    return torch.stack([_on(v, device) for row in rows for v in row]).view(len(rows), len(fields))


def _histograms(measures: list[Measure | None], device: torch.device | None, bins: int) -> Tensor:
    "Histograms of all layers, (layers, bins); NaN for layers that were not called."
    none = torch.full((bins,), _NAN, dtype=torch.float32, device=device)
    return torch.stack([none if m is None else m.hist.to(none) for m in measures])


def _on(value: Any, device: torch.device) -> Tensor:
    "A number, or a tensor of one, as a float32 tensor on the device."
    if isinstance(value, Tensor): return value.to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)
