"What a recorder must leave alone: losses, random numbers, memory and the pace of the device."
import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import TrainEvalCallback
from recording import Do, convnet, digits, fit, layers, learner
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_lsuv.recorder import recording
from fastai_lsuv.recorder import ActivationStatsRecorder
from fastai_lsuv.recorder.meter import ActivationMeter


# ---- Training ----

class Net(nn.Module):
    "Dropout, batch norm, an in-place activation and a transformer layer with a fast path in evaluation."
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(True), nn.Dropout(0.2))
        self.enc, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.enc(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


def run(cbs=None):
    "Losses of two epochs, the weights after them, and the state of the random numbers."
    learn, losses = learner(Net, cbs=cbs), []
    learn.add_cb(Do(after_loss=lambda l: losses.append(l.loss.item())))
    fit(learn, 2)
    return losses, torch.cat([p.detach().flatten() for p in learn.model.parameters()]), torch.get_rng_state()


@pytest.mark.parametrize('kw', [{}, dict(hist=True, grads=True, every=2, max_steps=3, sample=2)],
                         ids=['plain', 'everything'])
def test_losses_weights_and_random_numbers_are_the_same_to_the_bit(kw, tmp_path):
    a, b = run(), run(ActivationStatsRecorder(**kw, fname=tmp_path/'a.csv'))
    assert a[0] == b[0] and len(a[0]) == 18
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[2], b[2])


def test_training_is_the_same_to_the_bit_while_validation_is_recorded():
    # Torch turns the fast path of its transformer layers off where there are hooks: validation is equal to rounding.
    a, b = run(), run(ActivationStatsRecorder(valid=True, hist=True))
    assert torch.equal(a[1], b[1])
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)


# ---- The device ----

class Syncs(TorchDispatchMode):
    "Counts what would wait for a device."
    WAITING = ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::bincount', 'aten::equal', 'aten::is_nonzero',
               'aten::masked_select')

    def __init__(self):
        super().__init__()
        self.waits, self.seen = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        self.waits += func._schema.name in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['cpu', 'as on other devices'])
def test_never_waits_for_the_device_between_epochs(dtype, monkeypatch):
    # float64 is measured on the CPU as everything is on a GPU.
    mode = Syncs()

    class Counted(ActivationMeter):
        def __call__(self, *args, **kwargs):
            with mode:
                return super().__call__(*args, **kwargs)
    monkeypatch.setattr(recording, 'ActivationMeter', Counted)
    rec = ActivationStatsRecorder(hist=dtype == torch.float64, grads=True, valid=True)
    for event in ('before_batch', 'after_pred', 'after_backward', 'after_batch', 'after_train', 'before_validate',
                  'after_validate'):
        def counted(f=getattr(rec, event)):
            with mode:
                f()
        setattr(rec, event, counted)
    learn = learner(convnet().to(dtype), cbs=[rec, TrainEvalCallback()], dls=digits(tfm=lambda x: x.to(dtype)),
                    default_cbs=False)
    fit(learn, 2)
    assert len(rec.df()) == 2*(6+1)*3
    assert mode.waits == 0 and mode.seen > 200


def test_one_transfer_an_epoch(monkeypatch):
    moved = []

    def counted(self, cpu=Tensor.cpu):
        moved.append(tuple(self.shape))
        return cpu(self)
    monkeypatch.setattr(Tensor, 'cpu', counted)
    rec = ActivationStatsRecorder(hist=(10, 0., 1.), valid=True)
    fit(learner(cbs=[rec, TrainEvalCallback()], default_cbs=False), 2)
    assert moved == [(7, 3, 4+10)]*2


# ---- Memory ----

def test_keeps_no_activations():
    refs = []
    rec = ActivationStatsRecorder(hist=True, grads=True, valid=True)
    model = convnet()
    for m in layers(model):
        m.register_forward_hook(lambda m, a, o: refs.append(weakref.ref(o)))
    fit(learner(model, cbs=rec))
    gc.collect()
    assert len(refs) == 27
    assert not any(r() is not None for r in refs)


def test_past_max_steps_every_second_record_is_dropped():
    rec, most = ActivationStatsRecorder(hist=(8, 0., 1.), max_steps=10, valid=True), []
    count = Do(after_batch=lambda l: most.append(len(rec._store.rows['train'])))
    fit(learner(cbs=[rec, count], dls=digits(96, 8, bs=4)), 6)  # 144 steps
    assert max(most) == 10 and len(rec._store.rows['valid']) == 6
    assert list(rec.df().query("phase == 'train'").step.unique()) == list(range(0, 144, 16))
    every = ActivationStatsRecorder(hist=(8, 0., 1.))
    fit(learner(cbs=every, dls=digits(96, 8, bs=4)), 6)
    kept = every.df().query("phase == 'train' and step % 16 == 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(rec.df().query("phase == 'train'").reset_index(drop=True), kept)
    assert torch.equal(rec.hist(1), every.hist(1)[:, ::16])


def test_validation_records_are_bounded_too():
    rec = ActivationStatsRecorder(max_steps=2, valid=True, every=100)
    fit(learner(cbs=rec, dls=digits(8, 8, bs=8)), 9)
    assert list(rec.df().query("phase == 'valid'").epoch.unique()) == [0, 8]
