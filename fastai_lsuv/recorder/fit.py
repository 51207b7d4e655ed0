"""The recording of one fit.

A `FitRecording` puts hooks on the layers of a model, decides which steps are due, and hands the records to the store.
A training step makes one record. The batches of a validation make one record together.
It knows nothing of fastai: `ActivationStatsRecorder` calls it at the events of a `Learner`."""
from __future__ import annotations

from torch import Tensor, nn

from .hooks import RecordingHooks
from .layers import find_layers, layers_of
from .meter import ActivationMeter
from .operations import ForwardWatch, RecordedOperations
from .options import RecorderOptions
from .records import Record, RecordStore

__all__ = ['FitRecording']

_POOLED = 64  # Validation batches that are pooled at a time


class FitRecording:
    "Records the layers of a model during one fit. It does nothing outside of `enter` and `leave`."
    def __init__(self,
        store: RecordStore,  # Takes the records; its layers are set
        model: nn.Module,
        options: RecorderOptions
    ):
        self.store = store
        self.options = options
        self.model = model
        self.layers, modules = find_layers(model, options.modules)
        meter = ActivationMeter(options.near_zero, options.bins, options.sample)
        self.hooks = RecordingHooks(modules, meter, options.grads)
        self.operations = RecordedOperations(model, options.modules, modules, self.hooks.take)
        self.watch = ForwardWatch(self.operations)
        self.phase = None  # 'train' or 'valid' while the hooks are in place
        self.tail = []  # Records of the validation under way

    def enter(self, phase: str):
        "Put the hooks in place."
        self.leave()
        self.phase = phase
        self.tail = []
        self.hooks.attach()

    def leave(self):
        "Remove the hooks."
        self.phase = None
        self.hooks.detach()
        self.watch.detach()

    def before_batch(self,
        model: nn.Module,  # That is called, with all that wraps it
        epoch: int,
        step: int
    ):
        "Start measuring if this step is due."
        if self.phase is None: return
        due = True
        if self.phase == 'train':
            self.store.reach(epoch, step)
            due = step % self.options.every == 0 and self.store.is_due('train')
        self.hooks.start(due)
        self.operations.begin_step(due)
        if due:
            self.watch.attach(model)

    def after_pred(self, model: nn.Module):
        "Stop measuring: what runs the model from here to the next batch is not its forward pass."
        self.hooks.stop()
        self.operations.recording = False
        self.watch.detach()
        if self.phase == 'train' and self.hooks.due and not self.operations.settled and not self.hooks.misses(model):
            self._settle()

    def _settle(self):
        "The first step has shown which operations there are. Raises `ValueError` if an entry of `modules` names none."
        settled = self.operations.settle({n for n, calls in self.hooks.calls.items() if calls})
        found = layers_of(self.model, self.operations.names)
        if settled and self.operations.problem:
            self.leave()
            raise ValueError(self.operations.problem)
        others = self.operations.replaced.union(layer.name for layer in found)
        self.hooks.drop(others)
        layers = [layer for layer in self.store.layers if layer.name not in others]
        self.store.arrange(sorted([*layers, *found], key=lambda layer: layer.place))

    def after_backward(self, loss_scale: Tensor):
        "Note by how much mixed precision scaled the gradients of this step."
        self.hooks.loss_scale = loss_scale

    def after_batch(self, model: nn.Module, epoch: int, step: int):
        "Keep what was measured, on the device."
        if self.phase is None: return
        record = self.hooks.record([layer.name for layer in self.store.layers])
        self.hooks.compile_again_if_missed(model)
        if record is None: return
        if self.phase == 'train':
            self.store.add(record, 'train', epoch, step)
            return
        self.tail.append(record)
        if len(self.tail) == _POOLED:
            self.tail = [Record.merge(self.tail)]

    def after_validate(self, epoch: int, step: int):
        "Make one record of the validation, and remove the hooks."
        if self.phase == 'valid' and self.tail and self.store.is_due('valid'):
            self.store.add(Record.merge(self.tail), 'valid', epoch, step)
        self.leave()
