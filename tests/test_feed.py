"The model's inputs: from tensors, tuples, dicts, lists, streams and DataLoaders."
from collections import UserDict

import pytest
import torch
from checked import init, statuses
from fingerprint import fingerprint
from networks import NETWORKS, Logged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_lsuv import layer_stats, lsuv_init


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(4, 8),nn.Linear(3, 8)
    def forward(self, x, y, *, scale=1.): return {'out': (self.a(x)*scale, self.b(y))}


def test_tuples_and_dicts_are_the_models_inputs():
    x, y = torch.randn(64, 4), torch.randn(64, 3)
    for batch in ((x, y), dict(x=x, y=y, scale=2.), [(x, y)], iter([(x, y)]), [dict(x=x, y=y)], [[x, y]]):
        assert lsuv_init(Two(), batch).ok


def test_a_mapping_that_is_no_dict():
    assert lsuv_init(Two(), UserDict(x=torch.randn(64, 4), y=torch.randn(64, 3))).ok
    with pytest.raises(ValueError, match='batches: .*NaN'):
        lsuv_init(Two(), UserDict(x=torch.randn(64, 4), y=torch.full((64, 3), float('nan'))))


def test_the_last_thing_a_dataloader_yields_is_the_target():
    t = torch.arange(64)
    assert lsuv_init(nn.Linear(4, 8), DataLoader(TensorDataset(torch.randn(64, 4), t), 32)).n_passes == 2
    assert lsuv_init(Two(), DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 3), t), 32)).ok
    assert lsuv_init(Two(), DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 3)), 32), n_inp=2).ok
    assert lsuv_init(nn.Linear(4, 8), DataLoader(TensorDataset(torch.randn(64, 4)), 32)).ok  # nothing but an input


def test_fastai_dataloaders():
    from fastai.data.load import DataLoader as FastaiDataLoader
    from fastai.data.core import DataLoaders, TfmdDL
    rows = [(torch.randn(4), torch.randn(3), i) for i in range(64)]
    assert lsuv_init(Two(), TfmdDL(rows, bs=32)).ok  # all but the last
    assert lsuv_init(Two(), TfmdDL([r[:2] for r in rows], bs=32), n_inp=2).ok  # its own `n_inp` is 1
    assert lsuv_init(nn.Linear(4, 8), TfmdDL([(r[0], r[2]) for r in rows], bs=32)).ok
    assert lsuv_init(nn.Linear(4, 8), FastaiDataLoader([r[0] for r in rows], bs=32)).ok
    assert lsuv_init(nn.Linear(4, 8), FastaiDataLoader([(r[0], r[2]) for r in rows], bs=32)).ok
    assert lsuv_init(Two(), FastaiDataLoader(rows, bs=32)).ok
    with pytest.raises(TypeError, match='batches: got DataLoaders; .* such as its `train`'):
        lsuv_init(nn.Linear(4, 8), DataLoaders(FastaiDataLoader(rows)))


def test_n_inp_and_get_input():
    x, y = torch.randn(64, 4), torch.zeros(64)
    m = lambda: nn.Linear(4, 8)
    assert lsuv_init(m(), [(x, y)], n_inp=1).ok and lsuv_init(m(), (x, y), n_inp=1).ok
    assert lsuv_init(m(), [(y, {'image': x})], get_input=lambda b: b[1]['image']).ok
    assert lsuv_init(m(), {'image': x, 'y': y}, get_input=lambda b: b['image']).ok
    assert lsuv_init(Two(), [(y, x, torch.randn(64, 3))], get_input=lambda b: list(b[1:])).ok
    # All are the model's inputs unless told otherwise.
    says = r'batches: mini-batch 1 holds 2 inputs, but Linear.forward takes \(input.*pass `n_inp`'
    with pytest.raises(TypeError, match=says):
        lsuv_init(m(), [(x, y)])
    with pytest.raises(TypeError, match=r'batches: mini-batch 1 holds 2 inputs, but .*pass `n_inp`'):
        layer_stats(m(), (x, y))
    with pytest.raises(TypeError, match=r"batches: mini-batch 1 holds the inputs 'image', 'y', but .*`get_input`"):
        lsuv_init(m(), {'image': x, 'y': y})
    with pytest.raises(TypeError, match=r"batches: mini-batch 1 holds 1 input, but Two.forward"):
        lsuv_init(Two(), x)


def test_inputs_that_the_model_makes_others_of():
    x = torch.randn(64, 4)
    hooked = nn.Sequential(nn.Linear(4, 8))
    hooked.register_forward_pre_hook(lambda m, args: args[:1])
    assert lsuv_init(hooked, (x, x)).ok
    class Calls(nn.Sequential):
        def __call__(self, x, y): return super().__call__(x + y)
    assert lsuv_init(Calls(nn.Linear(4, 8)), (x, x)).ok


def test_a_nan_in_a_later_mini_batch_puts_everything_back():
    model = Logged()
    was = fingerprint(model)
    with pytest.raises(ValueError, match='batches: mini-batch 2 holds NaNs'):
        lsuv_init(model, [torch.randn(32, 4), torch.full((32, 4), float('nan'))])
    assert fingerprint(model) == was


def test_lazy_layers_come_to_life_first():
    model, batch = NETWORKS['hand/lazy']()
    model.eval()
    rows = init(model, batch)
    assert statuses(rows) == {'0': 'ok', '4': 'ok'} and rows['0'].kind == 'Conv2d' and not model.eval().training
