"What `diagnose` says of networks that are well, and of networks with one trouble each."
from functools import partial

import pytest
import torch
from fastai.basics import CancelStepException
from fastai.vision.all import xresnet18
from recording import Do, Made, convnet, digits, layers, mlp, recorded
from torch import nn

from fastai_lsuv.recorder.layers import find_layers


def untrained(model, modules=None, scale=None):
    """A recorder of five steps of a network that does not train, whose layers start with Kaiming's weights.

    `scale` multiplies weights by a function of the step, by the name of the layer."""
    torch.manual_seed(0)
    for m in layers(model):
        nn.init.kaiming_normal_(m.weight)
        nn.init.zeros_(m.bias)
    start = {name: model.get_submodule(name).weight.detach().clone() for name in scale or {}}

    def change(learn):
        for name, w in start.items(): model.get_submodule(name).weight.data.copy_(w*scale[name](learn.train_iter))

    def skip(learn): raise CancelStepException()
    return recorded(model, cbs=[Do(order=-40, before_batch=change, before_step=skip)], dls=digits(80), modules=modules)


def problems(rec, **limits): return [(f.layer, f.problem) for f in rec.diagnose(**limits)]


def shift(m, by): m.register_forward_hook(lambda m, a, o: o + by)


def test_a_healthy_network():
    d = untrained(mlp()).diagnose()
    assert d == [] and d.unseen == []
    assert repr(d) == 'No layer vanishes, explodes, saturates or is mostly dead in 5 records (steps 0 to 4).'


@pytest.mark.parametrize('by,problem', [(1e-4, 'vanishes'), (1e4, 'explodes'), (float('nan'), 'explodes'),
                                        (float('inf'), 'explodes')])
def test_layer_and_steps_are_named(by, problem):
    d = untrained(mlp(), scale={'5': lambda t: by if t in (1, 2, 4) else 1.}).diagnose()
    assert [(f.layer, f.problem, f.spans, f.records, f.of) for f in d] == [('5', problem, [(1, 2), (4, 4)], 3, 5)]
    assert repr(d).splitlines()[0] == '1 layer has a problem in 5 records (steps 0 to 4):'
    assert f'- 5 Linear 32>10 {problem} in 3 of 5 records (steps 1 to 2, 4): ' in repr(d)


def test_findings_come_in_the_order_of_execution_zeros_are_dead_and_layers_that_no_record_shows_are_named():
    model = Made(lambda m, x: m.head(m.mid(m.dead(x.flatten(1)).relu())), idle=nn.Linear(9, 9),
                 mid=nn.Linear(16, 16, bias=False), dead=nn.Linear(64, 16), head=nn.Linear(16, 10))
    nn.init.constant_(model.dead.bias, -90.)
    rec = recorded(model)
    assert rec.names == ['idle', 'mid', 'dead', 'head']
    assert problems(rec) == [('dead', 'is mostly dead'), ('mid', 'is mostly dead')]
    assert rec.diagnose().unseen == ['idle']
    assert repr(rec.diagnose()).splitlines()[-1] == 'No record shows 1 layer: idle.'


@pytest.mark.parametrize('scale', [0.02, 1., 30.])
def test_a_layer_is_healthy_at_any_scale(scale):
    assert problems(untrained(mlp(), scale={'1': lambda t: scale, '3': lambda t: 1/scale})) == []


@pytest.mark.parametrize('scale', [0.05, 1., 30.])
def test_what_a_relu_silences_is_dead_at_any_scale(scale):
    model,limits = mlp(),dict(vanish=1e-4, explode=1e4)
    shift(model[1], -2.5*scale)  # about two std
    rec = untrained(model, ['1', '2'], scale={'1': lambda t: scale})
    assert problems(rec, **limits) == [('1', 'is mostly dead'), ('2', 'is mostly dead')]  # before the ReLU, and after
    assert all(' in 5 of 5 records (steps 0 to 4): dead share up to ' in str(f) for f in rec.diagnose(**limits))
    assert problems(rec, **limits, dead=1.) == []


@pytest.mark.parametrize('after, name, by', [(lambda: nn.BatchNorm1d(32), '1', -4), (nn.Tanh, '1', -4),
                                             (nn.GELU, '1', -4), (nn.LeakyReLU, '1', -4), (nn.ReLU, '5', -9)])
def test_numbers_below_zero_that_no_relu_follows_are_not_dead(after, name, by):
    model = mlp(after)
    shift(model.get_submodule(name), by)
    rec = untrained(model)
    assert rec.df().query(f"layer == '{name}'").dead.min() > 0.9
    assert 'is mostly dead' not in [f.problem for f in rec.diagnose()]


CAN_DIE = {
    'max pooling and ReLU': (nn.Sequential(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.Dropout(), nn.ReLU()), '0', True),
    'a ReLU outside': (nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.ReLU()), '0.0', True),
    'a ReLU inside': (nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8)), '0', True),
    'a norm that a ReLU follows': (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 8)), '0', True),
    'a linear layer': (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), '0', False),
    'recurrent with ReLU': (nn.Sequential(nn.RNN(8, 8, nonlinearity='relu')), '0', True),
    'attention': (nn.TransformerEncoderLayer(8, 2), 'self_attn', False),
    'a function': (nn.TransformerEncoderLayer(8, 2), 'linear1', True),
}


@pytest.mark.parametrize('case', CAN_DIE)
def test_whether_a_layer_can_die_is_read_from_what_follows(case):
    model,name,can_die = CAN_DIE[case]
    (layer,),_ = find_layers(model, name)
    assert layer.can_die is can_die


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, partial(nn.GroupNorm, 2)])
def test_what_is_dead_behind_its_norm_is_named_first(norm):
    model = convnet(norm=norm)
    model.append(nn.Identity())
    nn.init.constant_(model[3].bias, -90.)
    rec = recorded(model)
    assert problems(rec) == [('3', 'is mostly dead')] and 'dead share up to 1' in str(rec.diagnose()[0])


def test_residual_branches_whose_norm_starts_at_zero_are_healthy():
    model = xresnet18(n_out=10, c_in=1)
    zero = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()}
    rec = recorded(model, 2, dls=digits(32), lr=1e-3)
    assert len(zero) == 8 and zero < set(rec.names) and not {f.layer for f in rec.diagnose()} & zero


def test_a_norm_whose_weight_stays_at_zero_is_dead():
    model = mlp()
    model.insert(2, nn.BatchNorm1d(32).requires_grad_(False))
    nn.init.zeros_(model[2].weight)
    assert ('2', 'is mostly dead') in problems(recorded(model))


@pytest.mark.parametrize('act,by', [(nn.Tanh, 4.), (nn.Sigmoid, 8.)])
def test_a_layer_before_a_flat_activation_saturates(act, by):
    assert not problems(untrained(mlp(act)))
    d = untrained(mlp(act), scale={'1': lambda t: by if t > 2 else 1.}).diagnose()
    assert [(f.layer, f.problem, f.spans) for f in d] == [('1', 'saturates', [(3, 4)])]


@pytest.mark.parametrize('act', [nn.Tanh, nn.Sigmoid])
def test_an_activation_at_its_bounds_saturates(act):
    rec = untrained(mlp(act), act, scale={'1': lambda t: 1e3})
    assert problems(rec) == [('2', 'saturates')] and problems(rec, saturate=1.1) == []
