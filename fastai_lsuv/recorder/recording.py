"""The recording of one fit.

A `FitRecording` decides which steps are due, and hands the records to the store. It knows nothing of fastai:
`ActivationStatsRecorder` calls it at the events of a `Learner`. Its `LayerHooks` measure the output of each layer as
soon as the layer has computed it, and its gradient. A training step makes one record, a validation another."""
from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from ..measure import first_tensor
from .layers import find_layers, layers_of
from .meter import ActivationMeter, Measure, pool
from .operations import ForwardWatch, RecordedOperations
from .records import COLUMNS, RecordStore

__all__ = ['FitRecording', 'LayerHooks']

_POOLED = 64  # Calls of a layer in validation that are kept before they are pooled


class _LayerHook:
    "The forward hook of a layer. A copied or pickled model carries hooks that do nothing."
    def __init__(self, hooks: LayerHooks | None = None, name: str = ''):
        self.name,self.take = name,hooks and hooks.take
        # A compiled model leaves its graph for the hook, so that the hook sees numbers. `torch.compile` imports dynamo.
        if hooks is not None and 'torch._dynamo' in sys.modules: self.take = torch.compiler.disable(self.take)

    def __call__(self, module, args, out):
        if self.take is not None: self.take(self.name, out)

    def __reduce__(self): return _LayerHook, ()


class LayerHooks:
    "Hooks on layers, which measure what passes while `recording`, and the gradients of that."
    def __init__(self, modules: dict[str, nn.Module], meter: ActivationMeter, grads: bool):
        self.modules,self.meter,self.grads = modules,meter,grads
        self.handles = []
        self.loss_scale = None  # What mixed precision multiplies the loss by, and with it the gradients
        self.start(False)

    def attach(self):
        "Put the hooks on the layers."
        self.handles = [m.register_forward_hook(_LayerHook(self, n)) for n, m in self.modules.items()]

    def detach(self):
        "Remove the hooks."
        for handle in self.handles: handle.remove()
        self.handles,self.recording = [],False

    def drop(self, names: set[str]):
        "Measure these layers no more."
        if names.isdisjoint(self.modules): return
        for n in names: self.modules.pop(n, None)
        self.detach()
        self.attach()

    def start(self, recording: bool = True):
        "Forget what was measured, and measure from now on if `recording`."
        self.recording = recording
        self.calls: dict[str, list[Measure]] = defaultdict(list)  # By layer
        self.grad_calls: dict[str, list[Measure]] = defaultdict(list)

    def take(self, name: str, out: Any, rows: slice | None = None):
        "Measure the output of a layer, or those `rows` of it that are the layer's, and its gradient when that comes."
        if not self.recording: return
        x = first_tensor(out)
        if x is None or not _is_measurable(x): return
        if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
            with _aside(): self.calls[name].append(self.meter(_plain(x if rows is None else x[rows])))
        else: self.calls[name].append(self.meter(x if rows is None else x[rows]))
        if not self.grads or not x.requires_grad or _plain(x) is not x: return
        # A tensor of a subclass is a view of the layer's own, and would lose its hook to an in-place activation.
        if type(x) is not Tensor and x._is_view() and x._base.numel() == x.numel(): x = x._base
        to = self.grad_calls[name]
        x.register_hook(lambda g: to.append(self.meter(g if rows is None else g[rows], grad=True)))

    def values(self, names: list[str]) -> Tensor | None:
        """Join what was measured since `start`, still on the device: (layers, columns and bins), in float32.

        A layer that was not called has NaN. Returns `None` if none was."""
        outputs,grads = ([pool(calls[n]) if calls.get(n) else None for n in names]
                         for calls in (self.calls, self.grad_calls))
        if not any(outputs): return None
        device = next((m.mean.device for m in outputs if m and isinstance(m.mean, Tensor)), None)
        parts = [_columns(outputs, COLUMNS, device)]
        if self.grads:
            parts.append(_columns(grads, COLUMNS[:3], device))
            if self.loss_scale is not None: parts[1][:, :2] /= self.loss_scale.to(parts[1].device)
        if self.meter.bins is not None:
            none = torch.full((self.meter.bins[0],), float('nan'), dtype=torch.float32, device=device)
            parts.append(torch.stack([none if m is None else m.hist.to(none) for m in outputs]))
        return torch.cat(parts, 1)


@contextmanager
def _aside() -> Iterator[None]:
    """Compute outside of the dispatch modes and the `torch.func` transforms that the model runs in.

    A mode may note what is computed: selective checkpointing expects the same operations once more. Inside a transform
    no number can be looked at."""
    with _disable_current_modes(), temporarily_clear_interpreter_stack(): yield


def _plain(x: Tensor) -> Tensor:
    "Give the tensor that transforms of `torch.func` have wrapped: of `vmap`, all samples."
    while torch._C._functorch.is_functorch_wrapped_tensor(x): x = torch._C._functorch.get_unwrapped(x)
    return x


def _is_measurable(x: Tensor) -> bool:
    "Tell whether `x` holds real numbers, at least one, in plain memory."
    return not x.is_complex() and x.numel() > 0 and x.layout == torch.strided and not x.is_nested


def _columns(measures: list[Measure | None], fields: Sequence[str], device: torch.device | None) -> Tensor:
    "Put the numbers of all layers in one tensor (layers, fields). They are Python numbers where `device` is `None`."
    rows = [[float('nan')]*len(fields) if m is None else [getattr(m, f) for f in fields] for m in measures]
    if device is None: return torch.tensor(rows, dtype=torch.float32)

    def on_device(v):
        if isinstance(v, Tensor): return v.to(device, torch.float32)
        return torch.full((), v, dtype=torch.float32, device=device)

    return torch.stack([on_device(v) for row in rows for v in row]).view(len(rows), len(fields))


class FitRecording:
    "Records the layers of a model during one fit. It does nothing outside of `enter` and `leave`."
    def __init__(self, store: RecordStore, model: nn.Module, options: SimpleNamespace):
        self.store,self.options,self.model = store,options,model
        self.layers,modules = find_layers(model, options.modules)
        meter = ActivationMeter(options.near_zero, options.bins, options.sample)
        self.hooks = LayerHooks(modules, meter, options.grads)
        self.operations = RecordedOperations(model, options.modules, modules, self.hooks.take)
        self.watch = ForwardWatch(self.operations)
        self.phase = None  # 'train' or 'valid' while the hooks are in place
        self.due = self.looked = False  # Whether this step is recorded; whether the first one has called all hooks

    def enter(self, phase: str):
        "Put the hooks in place."
        self.leave()
        self.phase = phase
        self.hooks.attach()
        self.hooks.start(False)

    def leave(self):
        "Remove the hooks."
        self.phase = None
        self.hooks.detach()
        self.watch.detach()

    def before_batch(self, model: nn.Module, epoch: int, step: int):
        "Start measuring if this step is due. `model` is what is called, with all that wraps it."
        if self.phase is None: return
        if self.phase == 'train':
            self.store.reach(epoch, step)
            self.due = step % self.options.every == 0 and self.store.is_due('train')
            self.hooks.start(self.due)
        else: self.due = self.hooks.recording = True  # what a validation measures is kept until its end
        self.operations.begin_step(self.due)
        if self.due: self.watch.attach(model)

    def after_pred(self, model: nn.Module):
        "Stop measuring: what runs the model from here to the next batch is not its forward pass."
        self.hooks.recording = False  # the gradients of what was measured are still to come
        self.operations.recording = False
        self.watch.detach()
        if self.phase != 'train' or not self.due or self.operations.settled or self._misses(model): return
        self._settle()

    def _settle(self):
        "Take the operations that the first step has shown. Raises `ValueError` if an entry of `modules` names none."
        settled = self.operations.settle({n for n, calls in self.hooks.calls.items() if calls})
        found = layers_of(self.model, self.operations.names)
        if settled and self.operations.problem:
            self.leave()
            raise ValueError(self.operations.problem)
        others = self.operations.replaced.union(layer.name for layer in found)
        self.hooks.drop(others)
        layers = [layer for layer in self.store.layers if layer.name not in others]
        self.store.arrange(sorted([*layers, *found], key=lambda layer: layer.place))

    def _misses(self, model: nn.Module) -> bool:
        "Tell whether code that was compiled before there were hooks has not called some."
        if not self.due or self.looked or all(self.hooks.calls.get(n) for n in self.hooks.modules): return False
        return any(hasattr(m, '_orig_mod') or getattr(m, '_compiled_call_impl', None) for m in model.modules())

    def after_batch(self, model: nn.Module, epoch: int, step: int):
        "Keep what was measured, on the device."
        if self.phase is None: return
        missed = self._misses(model)
        self.looked |= self.due
        if self.phase == 'train' and self.due: self._add('train', epoch, step)
        if self.phase == 'valid': self.hooks.calls.update({n: [pool(calls)] for n, calls in self.hooks.calls.items()
                                                           if len(calls) >= _POOLED})
        self.due = False
        if not missed: return
        warnings.warn("ActivationStatsRecorder missed some layers in this step: the model was compiled before the "
                      "recorder was attached. It is compiled again for the next step.")
        torch.compiler.reset()

    def after_validate(self, epoch: int, step: int):
        "Make one record of the validation, and remove the hooks."
        if self.phase == 'valid' and any(self.hooks.calls.values()) and self.store.is_due('valid'):
            self._add('valid', epoch, step)
        self.leave()

    def _add(self, phase: str, epoch: int, step: int):
        values = self.hooks.values([layer.name for layer in self.store.layers])
        if values is not None: self.store.add(values, phase, epoch, step, self.hooks.calls)
