"What `diagnose` says of networks that are well, and of networks with one trouble each."
from functools import partial

import pytest
import torch
from fastai.basics import SGD, CancelStepException
from recording import Do, digits, fit, layers, learner, mlp
from test_recorder_values import LanguageClassifier, letters
from torch import nn

from fastai_lsuv.recorder import ActivationStatsRecorder
from fastai_lsuv.recorder.layers import find_layers


def recorded(model, modules=None, scale=None):
    """A recorder of five steps of a network that does not train, whose layers start with Kaiming's weights.

    `scale` multiplies weights by a function of the step, by the name of the layer."""
    scale = scale or {}

    def change(learn):
        for name, f in scale.items():
            model.get_submodule(name).weight.data.copy_(start[name]*f(learn.train_iter))

    def skip(learn):
        raise CancelStepException()
    rec = ActivationStatsRecorder(modules)
    learn = learner(model, cbs=[rec, Do(order=-40, before_batch=change, before_step=skip)],
                    opt_func=partial(SGD, lr=0.), dls=digits(80))
    torch.manual_seed(0)
    for m in layers(model):
        nn.init.kaiming_normal_(m.weight)
        nn.init.zeros_(m.bias)
    start = {name: model.get_submodule(name).weight.detach().clone() for name in scale}
    fit(learn, lr=0.)
    return rec


def problems(diagnosis):
    return [(f.layer, f.problem) for f in diagnosis]


def shift(m, by):
    m.register_forward_hook(lambda m, a, o: o + by)


def test_a_healthy_network():
    d = recorded(mlp()).diagnose()
    assert d == []
    assert repr(d) == 'No layer vanishes, explodes, saturates or is mostly dead in 5 records (steps 0 to 4).'


@pytest.mark.parametrize('by,problem', [(1e-4, 'vanishes'), (1e4, 'explodes'), (float('nan'), 'explodes'),
                                        (float('inf'), 'explodes')])
def test_layer_and_steps_are_named(by, problem):
    d = recorded(mlp(), scale={'5': lambda t: by if t in (1, 2, 4) else 1.}).diagnose()
    assert [(f.layer, f.problem, f.spans, f.records, f.of) for f in d] == [('5', problem, [(1, 2), (4, 4)], 3, 5)]
    assert repr(d).splitlines()[0] == '1 layer has a problem in 5 records (steps 0 to 4):'
    assert f'- 5 Linear 32>10 {problem} in 3 of 5 records (steps 1 to 2, 4): ' in repr(d)


# ---- Death ----

def test_a_healthy_awd_lstm_is_not_dead():
    rec = ActivationStatsRecorder()
    fit(learner(LanguageClassifier(100, 300), cbs=rec, dls=letters()))
    assert (rec.df().near_zero > 0.9).any()  # although its numbers are that small
    assert not [f for f in rec.diagnose() if f.problem == 'is mostly dead']


@pytest.mark.parametrize('scale', [0.02, 1., 30.])
def test_a_layer_is_healthy_at_any_scale(scale):
    rec = recorded(mlp(), scale={'1': lambda t: scale, '3': lambda t: 1/scale})
    assert problems(rec.diagnose()) == []


@pytest.mark.parametrize('scale', [0.05, 1., 30.])
def test_what_a_relu_silences_is_dead_at_any_scale(scale):
    model = mlp()
    shift(model[1], -2.5*scale)  # about two std
    rec = recorded(model, ['1', '2'], scale={'1': lambda t: scale})
    d = rec.diagnose(vanish=1e-4, explode=1e4)
    assert problems(d) == [('1', 'is mostly dead'), ('2', 'is mostly dead')]  # before the ReLU, and after it
    assert all(' in 5 of 5 records (steps 0 to 4): dead share up to ' in str(f) for f in d)
    assert rec.diagnose(vanish=1e-4, explode=1e4, dead=1.) == []


@pytest.mark.parametrize('after', [lambda: nn.BatchNorm1d(32), nn.Tanh, nn.GELU, nn.LeakyReLU])
def test_numbers_below_zero_that_no_relu_follows_are_not_dead(after):
    model = mlp(after)
    shift(model[1], -4)
    rec = recorded(model)
    assert rec.df().query("layer == '1'").dead.min() > 0.9
    assert not [f for f in rec.diagnose() if f.problem == 'is mostly dead']


def test_the_last_layer_may_be_below_zero():
    model = mlp()
    shift(model[5], -9)
    rec = recorded(model)
    assert rec.df().query("layer == '5'").dead.min() > 0.9
    assert rec.diagnose() == []


CAN_DIE = {
    'ReLU': (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), '0', True),
    'max pooling and ReLU': (nn.Sequential(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.Dropout(), nn.ReLU()), '0', True),
    'a ReLU outside': (nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.ReLU()), '0.0', True),
    'a ReLU inside': (nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8)), '0', True),
    'a norm': (nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 8)), '0', False),
    'a norm that a ReLU follows': (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 8)), '0', True),
    'a linear layer': (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), '0', False),
    'nothing': (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), '2', False),
    'recurrent': (nn.Sequential(nn.LSTM(8, 8)), '0', False),
    'recurrent with ReLU': (nn.Sequential(nn.RNN(8, 8, nonlinearity='relu')), '0', True),
    'attention': (nn.TransformerEncoderLayer(8, 2), 'self_attn', False),
    'a function': (nn.TransformerEncoderLayer(8, 2), 'linear1', True),
}


@pytest.mark.parametrize('case', CAN_DIE)
def test_whether_a_layer_can_die_is_read_from_what_follows(case):
    model, name, can_die = CAN_DIE[case]
    (layer,), _ = find_layers(model, name)
    assert layer.can_die is can_die


# ---- Saturation ----

@pytest.mark.parametrize('act,by', [(nn.Tanh, 4.), (nn.Sigmoid, 8.)])
def test_a_layer_before_a_flat_activation_saturates(act, by):
    assert not recorded(mlp(act)).diagnose()
    d = recorded(mlp(act), scale={'1': lambda t: by if t > 2 else 1.}).diagnose()
    assert [(f.layer, f.problem, f.spans) for f in d] == [('1', 'saturates', [(3, 4)])]


@pytest.mark.parametrize('act', [nn.Tanh, nn.Sigmoid])
def test_an_activation_at_its_bounds_saturates(act):
    rec = recorded(mlp(act), act, scale={'1': lambda t: 1e3})
    assert problems(rec.diagnose()) == [('2', 'saturates')]
    assert rec.diagnose(saturate=1.1) == []
