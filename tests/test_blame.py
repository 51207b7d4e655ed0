"The note on an error of the model itself: which layer was running, what it was given, what to do."
import sys

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from networks import Mod
from torch import nn

from fastai_lsuv import LSUVCallback, layer_stats, lsuv_init

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason='this Python has no notes')


def conv_net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 4))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin,self.mask = nn.Linear(8, 4),nn.Linear(8, 4)

    def forward(self, x, mask=None): return self.lin(x) if mask is None else self.lin(x)*self.mask(mask)


def fails(error):
    def forward(self, *args, **kwargs): raise error
    return Mod(forward)


def passing(*args, **kwargs):
    "Of a layer that is passed these and fails."
    return Mod(lambda self, x: self.inner(*args, **kwargs), lin=nn.Linear(8, 8), inner=fails(RuntimeError('no')))


x,rows = torch.randn(8, 3, 8, 8),torch.randn(16, 8)
FLOATS = ("It takes floating-point numbers: convert the mini-batch with `.float()`. If these are targets, pass "
          "`n_inp`, the number of inputs.")
NOTES = {  # A model, a mini-batch, and what is said after "The error was raised in "
    'a double model, a float mini-batch': (
        conv_net().double(), x,
        "layer '0' (Conv2d). It was given float32 (8, 3, 8, 8). Its weight is float64: convert the mini-batch with "
        "`.to(torch.float64)`, or the model with `model.to(torch.float32)`."),
    'wrong channels': (
        conv_net(), x[:, :1],
        "layer '0' (Conv2d). It was given float32 (8, 1, 8, 8). It takes 3 channels (dimension 1)."),
    'no samples dimension and more': (
        conv_net(), x[0, 0],
        "layer '0' (Conv2d). It was given float32 (8, 8). It takes 4 dimensions: samples, channels and 2 more."),
    'wrong size of the images': (
        conv_net(), torch.randn(8, 3, 9, 9),
        "layer '3' (Linear). It was given float32 (8, 392). Its last dimension must be 288."),
    'a lazy layer before': (
        nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.Linear(7, 4)), x,
        "layer '2' (Linear). It was given float32 (8, 288). Its last dimension must be 7."),
    'bytes': (
        conv_net(), (x*50).byte(),
        f"layer '0' (Conv2d). It was given uint8 (8, 3, 8, 8). {FLOATS}"),
    'a target that the model takes for a mask': (
        Masked(), (rows, torch.randint(0, 4, (16,))),
        f"layer 'mask' (Linear). It was given int64 (16,). {FLOATS} Its last dimension must be 8. If the last of its 2 "
        "inputs is the target, pass `n_inp=1`."),
    'floats for tokens': (
        nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)), torch.randn(4, 6),
        "layer '0' (Embedding). It was given float32 (4, 6). It takes integers, such as the numbers of tokens."),
    'a norm layer of other channels': (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(16)), x,
        "layer '1' (BatchNorm2d). It was given float32 (8, 8, 6, 6). It takes 16 channels (dimension 1)."),
    'one sample': (
        nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), rows[:1],
        "layer '1' (BatchNorm1d). It was given float32 (1, 4). LSUV runs the model in train mode: pass a mini-batch of "
        "at least 2 samples."),
    'no memory': (
        nn.Sequential(nn.Linear(8, 8), fails(torch.OutOfMemoryError('no memory'))), rows,
        "layer '1' (Mod). It was given float32 (16, 8). Pass a smaller mini-batch."),
    'the forward of the model': (
        Mod(lambda self, x: self.body(x).view(7, -1), body=conv_net()), x,
        "the model (Mod). It was given float32 (8, 3, 8, 8)."),
    'no tensor': (passing(3), rows, "layer 'inner' (Mod). It was given no tensor."),
    'many tensors': (
        passing(*[x]*5, mask=x[0]), rows,
        f"layer 'inner' (Mod). It was given {', '.join(['float32 (8, 3, 8, 8)']*4)} and 2 more."),
}


def note_of(run):
    "What `run()` raises, and its one note."
    with pytest.raises(Exception) as e:
        run()
    note, = e.value.__notes__
    return e.value, note.removeprefix('The error was raised in ')


def with_baseline(model, batch): lsuv_init(model, batch, baseline=True)


def with_loss(model, batch):
    inputs = batch if isinstance(batch, tuple) else (batch,)
    lsuv_init(model, batch, loss=lambda f: f(*inputs).sum())


@pytest.mark.parametrize('case', NOTES)
@pytest.mark.parametrize('run', [lsuv_init, layer_stats, with_baseline, with_loss])
@pytest.mark.filterwarnings('ignore')
def test_an_error_of_the_model_says_where(case, run):
    model,batch,words = NOTES[case]
    error, note = note_of(lambda: run(model, batch))
    with pytest.raises(type(error)) as own:
        model(*batch) if isinstance(batch, tuple) else model(batch)
    assert str(error) == str(own.value)
    assert note in (words, words.split(' If the last of')[0])  # the loss does not know the mini-batch


def test_in_a_learner():
    dls = DataLoaders.from_dsets(*[[(torch.randn(8), torch.tensor(0))]*64]*2, bs=16, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(9, 4)), CrossEntropyLossFlat(), cbs=LSUVCallback())
    with learn.no_bar(), learn.no_logging():
        assert note_of(lambda: learn.fit(1))[1] == (
            "layer '0' (Linear). It was given float32 (16, 8). Its last dimension must be 9.")


def test_an_error_outside_of_the_model_has_no_note():
    def loss(model): raise RuntimeError('no')
    with pytest.raises(RuntimeError) as e: layer_stats(conv_net(), x, loss=loss)
    assert not getattr(e.value, '__notes__', [])
