"The advice to start mirrored: where samples become alike in a plain network of rectifiers, and nowhere else."
import pytest
import torch
from checked import quietly
from torch import nn

from fastai_lsuv import lsuv_init


def mlp(act, depth=40, *more):
    layers = [m for _ in range(depth) for m in (nn.Linear(64, 64), *[make() for make in more], act())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


class Functional(nn.Module):
    "The same, its ReLU a function."
    def __init__(self):
        super().__init__()
        self.layers,self.head = nn.ModuleList(nn.Linear(64, 64) for _ in range(40)),nn.Linear(64, 10)
    def forward(self, x):
        for layer in self.layers: x = torch.relu(layer(x))
        return self.head(x)


@pytest.mark.parametrize('model,advised', [
    (lambda: mlp(nn.ReLU), True), (lambda: mlp(nn.LeakyReLU), True), (Functional, True),
    (lambda: mlp(nn.ReLU, 2), False), (lambda: mlp(nn.Tanh), False), (lambda: mlp(nn.SELU), False),
    (lambda: mlp(nn.ReLU, 40, lambda: nn.BatchNorm1d(64)), False),
    (lambda: mlp(nn.ReLU, 40, lambda: nn.LayerNorm(64)), False)],
    ids=['ReLU', 'leaky ReLU', 'torch.relu', 'two layers', 'tanh', 'SELU', 'batch norm', 'layer norm'])
def test_mirrored_weights_are_advised_where_samples_become_alike(model, advised):
    torch.manual_seed(0)
    model,x = model(),torch.randn(64, 64)
    report = lsuv_init(model, x, order='std')
    assert ("`preinit='mirrored'` may keep them apart" in report.summary) == advised and report.warning == ''
    if advised:
        out = model(x)
        share = (out - out.mean(0)).square().mean()/(out - out.mean()).square().mean()
        assert f"Samples become alike: {100*share:.0f} % of the variance of the model's output is" in str(report)
        report = lsuv_init(model, x, order='std', preinit='mirrored')
        assert 'alike' not in report.summary and 'start mirrored' in report.summary
        out = model(x)
        assert (out - out.mean(0)).square().mean() > .5*(out - out.mean()).square().mean()


class RMSNorm(nn.Module):
    def forward(self, x): return x/x.square().mean(-1, keepdim=True).sqrt()


def frozen(model): return model.requires_grad_(False)
def of_no_samples(model):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
        def forward(self, x): return self.model(x).T
    return Net()


def with_a_dead_layer(model):
    model[20].weight.data.zero_()
    model[20].bias.data.fill_(-1.)
    return model


@pytest.mark.parametrize('make, n', [
    (lambda: with_a_dead_layer(mlp(nn.ReLU)), 64),
    (lambda: mlp(nn.ReLU), 1), (lambda: frozen(mlp(nn.ReLU)), 64), (lambda: mlp(nn.ReLU, 40, RMSNorm), 64),
    (lambda: of_no_samples(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))), 8)],
    ids=['a dead layer', 'one sample', 'frozen', 'RMSNorm', 'the output is not of samples'])
def test_nothing_is_advised_without_grounds(make, n):
    torch.manual_seed(0)
    assert 'mirrored' not in quietly(make(), torch.randn(n, 64), order='std').summary


def test_nothing_is_advised_where_the_mini_batch_is_alike():
    torch.manual_seed(0)
    x = torch.randn(1, 64) + 1e-3*torch.randn(64, 64)
    with pytest.warns(UserWarning): report = lsuv_init(mlp(nn.ReLU), x)
    assert 'mirrored' not in report.summary
