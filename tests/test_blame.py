"The note on an error of the model itself: which layer was running, what it was given, what to do."
import sys

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from torch import nn

from fastai_lsuv import LSUVCallback, layer_stats, lsuv_init
from fastai_lsuv.run.blame import explained

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason='this Python has no notes')


def conv_net(**kwargs):
    return nn.Sequential(nn.Conv2d(3, 8, 3, **kwargs), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 4))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.mask = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, mask=None):
        return self.lin(x) if mask is None else self.lin(x)*self.mask(mask)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = conv_net()

    def forward(self, x):
        return self.body(x).view(7, -1)


x = torch.randn(8, 3, 8, 8)
NOTES = {
    'a double model, a float mini-batch': (
        conv_net().double, x,
        "The error was raised in layer '0' (Conv2d). It was given float32 (8, 3, 8, 8). Its weight is float64: convert "
        "the mini-batch with `.to(torch.float64)`, or the model with `model.to(torch.float32)`."),
    'wrong channels': (
        conv_net, x[:, :1],
        "The error was raised in layer '0' (Conv2d). It was given float32 (8, 1, 8, 8). It takes 3 channels "
        "(dimension 1)."),
    'no samples dimension and more': (
        conv_net, x[0, 0],
        "The error was raised in layer '0' (Conv2d). It was given float32 (8, 8). It takes 4 dimensions: samples, "
        "channels and 2 more."),
    'wrong size of the images': (
        conv_net, torch.randn(8, 3, 9, 9),
        "The error was raised in layer '3' (Linear). It was given float32 (8, 392). Its last dimension must be 288."),
    'bytes': (
        conv_net, (x*50).byte(),
        "The error was raised in layer '0' (Conv2d). It was given uint8 (8, 3, 8, 8). It takes floating-point numbers: "
        "convert the mini-batch with `.float()`. If these are targets, pass `n_inp`, the number of inputs."),
    'a target that the model takes for a mask': (
        Masked, (torch.randn(16, 8), torch.randint(0, 4, (16,))),
        "The error was raised in layer 'mask' (Linear). It was given int64 (16,). It takes floating-point numbers: "
        "convert the mini-batch with `.float()`. If these are targets, pass `n_inp`, the number of inputs. Its last "
        "dimension must be 8. If the last of its 2 inputs is the target, pass `n_inp=1`."),
    'floats for tokens': (
        lambda: nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)), torch.randn(4, 6),
        "The error was raised in layer '0' (Embedding). It was given float32 (4, 6). It takes integers, such as the "
        "numbers of tokens."),
    'a norm layer of other channels': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(16)), x,
        "The error was raised in layer '1' (BatchNorm2d). It was given float32 (8, 8, 6, 6). It takes 16 channels "
        "(dimension 1)."),
    'one sample': (
        lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), torch.randn(1, 8),
        "The error was raised in layer '1' (BatchNorm1d). It was given float32 (1, 4). LSUV runs the model in train "
        "mode: pass a mini-batch of at least 2 samples."),
    'the forward of the model': (
        Broken, x,
        "The error was raised in the model (Broken). It was given float32 (8, 3, 8, 8)."),
}


def note_of(run):
    "What `run()` raises, and its one note."
    with pytest.raises(Exception) as e:
        run()
    notes = getattr(e.value, '__notes__', [])
    assert len(notes) == 1, notes
    return e.value, notes[0]


def with_baseline(model, batch):
    lsuv_init(model, batch, baseline=True)


def with_loss(model, batch):
    inputs = batch if isinstance(batch, tuple) else (batch,)
    lsuv_init(model, batch, loss=lambda f: f(*inputs).sum())


@pytest.mark.parametrize('case', NOTES)
@pytest.mark.parametrize('run', [lsuv_init, layer_stats, with_baseline, with_loss])
def test_an_error_of_the_model_says_where(case, run):
    make, batch, words = NOTES[case]
    model = make()
    model.train()
    with pytest.raises(Exception) as own:
        model(*batch) if isinstance(batch, tuple) else model(batch)
    error, note = note_of(lambda: run(model, batch))
    assert type(error) is type(own.value) and str(error) == str(own.value)
    assert note in (words, words.split(' If the last of')[0])  # the loss does not know the mini-batch


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.Linear(7, 4))
    assert note_of(lambda: lsuv_init(model, x))[1] == (
        "The error was raised in layer '2' (Linear). It was given float32 (8, 288). Its last dimension must be 7.")


def test_in_a_learner():
    dls = DataLoaders.from_dsets(*[[(torch.randn(8), torch.tensor(0))]*64]*2, bs=16, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(9, 4)), CrossEntropyLossFlat(), cbs=LSUVCallback())
    with learn.no_bar(), learn.no_logging():
        assert note_of(lambda: learn.fit(1))[1] == (
            "The error was raised in layer '0' (Linear). It was given float32 (16, 8). Its last dimension must be 9.")


def test_many_tensors_and_none():
    class Many(nn.Module):
        def forward(self, *args, **kwargs): raise RuntimeError('no')
    model = nn.Sequential(Many())

    def note(*args, **kwargs):
        def run():
            with explained(model): model[0](*args, **kwargs)
        return note_of(run)[1]

    assert note(3).endswith('(Many). It was given no tensor.')
    assert note([x]*5, mask=x[0]).endswith('It was given ' + ', '.join(['float32 (8, 3, 8, 8)']*4) + ' and 2 more.')


def test_an_error_outside_of_the_model_has_no_note():
    with pytest.raises(RuntimeError) as e:
        with explained(conv_net()): raise RuntimeError('no')
    assert not getattr(e.value, '__notes__', [])


def test_out_of_memory():
    class Large(nn.Module):
        def forward(self, x): raise torch.OutOfMemoryError('no memory')
    model = nn.Sequential(nn.Linear(8, 8), Large())
    error, note = note_of(lambda: lsuv_init(model, torch.randn(16, 8)))
    assert note.endswith("layer '1' (Large). It was given float32 (16, 8). Pass a smaller mini-batch.")
    assert isinstance(error, torch.OutOfMemoryError)
