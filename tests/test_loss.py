"The training loss before and after, and what it says against the result."
import math
import random
from copy import deepcopy
from itertools import chain, repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from networks import Mod
from torch import nn

from fastai_lsuv import lsuv_init
from fastai_lsuv.keep import Generators

nan,inf = math.nan,math.inf


# --- what is taken

@pytest.mark.parametrize('before, constant, after, fails', [
    (1., nan, 1., False),
    (1., nan, 3.9, False),
    (1., nan, 4.1, True),
    (1., 0.5, 4.1, True),
    (1., 2., 7.9, False),  # predicting zeros is worse than the start
    (1., 2., 8.1, True),
    (1.6, 1.61, 7.9, True),
    (1., inf, 5.1, True),
    (1., nan, inf, True),
    (1., nan, nan, True),
    (nan, 1., nan, False),  # it was so before
    (inf, 1., inf, False),
    (-1., nan, 100., False),  # a loss that may be negative has no zero to compare with
    (-1., 2., 100., False),
    (-1., nan, nan, True),
    (0., nan, 100., True),
    (1., -3., 5.1, False),  # nor has one that is negative for zeros
    (1., 0., 5.1, True),  # zeros may be the best prediction
    (1., nan, -100., False),
])
def test_a_loss_that_is_far_worse_puts_the_weights_back(before, constant, after, fails):
    net,x = nn.Linear(16, 8),torch.randn(64, 16)
    was,losses = net.weight.detach().clone(),chain([before, constant, constant, before], repeat(after))
    report = quietly(net, x, loss=lambda model: (model(x), next(losses))[1])
    assert bool(report.undone) == torch.equal(net.weight, was) == (report[0].status == 'undone') == fails
    assert report.loss == pytest.approx((before, after), nan_ok=True)
    if not fails: return
    assert report.undone.startswith(f'the training loss is {after:.3g} after LSUV; it was {before:.3g} before')
    assert ('predicting zeros' in report.undone) == math.isfinite(constant)


@pytest.mark.parametrize('as_loss', [
    torch.mean,
    lambda losses: losses,  # one number a sample
    lambda losses: losses.mean().item(),
    lambda losses: losses.mean().half(),
    lambda losses: np.float64(losses.mean().item()),
], ids=['mean', 'a sample each', 'number', 'half', 'numpy'])
def test_the_losses_of_the_model_before_and_after(as_loss):
    model,x,y = nn.Linear(3, 2),torch.randn(8, 3),torch.randn(8, 2)
    before = F.mse_loss(model(x), y).item()
    report = quietly(model, x, loss=lambda model: as_loss((model(x) - y).square()))
    assert report.loss == pytest.approx((before, F.mse_loss(model(x), y).item()), rel=1e-3)


def test_outputs_of_any_kind_from_any_call_are_replaced_by_zeros_and_by_one_answer():
    net,(x,y) = Mod(lambda self, x: {'pair': (self.lin(x), 'name')}, lin=nn.Linear(3, 2)),torch.randn(2, 8, 3)
    seen = []
    def loss(model):
        seen.append([model(x)['pair'], model(y)['pair']])
        return sum(out.mean() for out, _ in seen[-1])
    quietly(net, x, loss=loss)
    start,zeros,_,constant,_ = seen
    for (out,_),(zero,_),(same,name) in zip(start, zeros, constant):
        assert out.any() and not zero.any() and name == 'name'
        torch.testing.assert_close(same, out.mean(0).expand_as(out))


@pytest.mark.parametrize('layers,passes', [
    ([], [3, 2]), ([nn.BatchNorm1d(8)], [3, 2]), ([nn.Dropout(0.5)], [4, 2]), ([nn.Dropout(0.)], [3, 2])],
    ids=['plain', 'batch norm', 'dropout', 'dropout of 0'])
def test_the_verifying_pass_takes_the_loss_of_a_model_that_draws_nothing(layers, passes):
    model,(x, y) = nn.Sequential(nn.Linear(4, 8), *layers, nn.ReLU(), nn.Linear(8, 2)),torch.randn(2, 64, 4)
    took = []
    model.register_forward_hook(lambda m, args, out: took.append(len(out)))
    def loss(model): return F.mse_loss(model(x), y[:, :2])
    for expected in passes:  # the second time it is at its target
        took.clear()
        report = lsuv_init(model, x, loss=loss)
        assert report.ok and report.n_passes == len(took) == expected
    assert report.loss[0] == report.loss[1]
    if passes == [3, 2]: assert report.loss[1] == pytest.approx(loss(model.train()).item(), abs=1e-6)


class OwnNoise(nn.Module):
    "Dropout that draws from a generator of its own, or from the global one without moving it on."
    def __init__(self, fork):
        super().__init__()
        self.fork,self.generator = fork,torch.Generator().manual_seed(0)
    def forward(self, x):
        if not self.fork: return x*(.5 + torch.rand(1, generator=self.generator.manual_seed(0)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return F.dropout(x, .5, True)


def twice(model, net, x): return model(x).square().mean() + model(x/2).square().mean()
def beside(model, net, x): return model(x).square().mean() + net(x/2).square().mean()
def a_part(model, net, x): return model(x).square().mean() + net[0](x/2).square().mean()
def plain(model, net, x): return model(x).square().mean()
def in_eval(model, net, x): return net.eval() and model(x).square().mean()
def a_copy(model, net, x): return model(x.clone()).square().mean()


def in_half(model, net, x):
    with torch.autocast('cpu', torch.bfloat16): return model(x).float().square().mean()


@pytest.mark.parametrize('loss, layers, passes', [
    (plain, [nn.ReLU()], 3), (beside, [nn.ReLU()], 3), (a_part, [nn.ReLU()], 3), (twice, [nn.ReLU()], 4),
    (a_copy, [nn.ReLU()], 4), (in_half, [nn.ReLU()], 4), (in_eval, [nn.BatchNorm1d(32)], 4),
    (plain, [nn.Dropout(1.)], 4), (plain, [OwnNoise(False)], 4), (plain, [OwnNoise(True)], 4)],
    ids=lambda v: v.__name__ if callable(v) else '')
def test_the_loss_after_is_that_of_the_model_and_does_not_steer_lsuv(loss, layers, passes):
    torch.manual_seed(0)
    net,batches = nn.Sequential(nn.Linear(16, 32), *layers, nn.Linear(32, 8)),list(torch.randn(3, 64, 16))
    other = deepcopy(net)
    report = quietly(net, batches, loss=lambda model: loss(model, net, batches[1]), force=True, batch_tol=.3)
    quietly(other, batches, batch_tol=.3)
    assert all(map(torch.equal, net.parameters(), other.parameters())) and report.n_passes == passes
    with torch.no_grad(): assert report.loss[1] == pytest.approx(loss(net.train(), net, batches[1]).item(), rel=1e-6)


def test_the_loss_is_that_of_training_and_draws_the_same_random_numbers_each_time():
    net,x,seen = nn.Sequential(nn.Linear(100, 100), nn.Dropout(0.5)).eval(),torch.ones(64, 100),[]
    def loss(model):
        drops = bool((model(x) == 0).any())
        seen.append((net.training, drops, torch.is_grad_enabled(), random.random(), np.random.rand(), torch.rand(1)))
        return model(x).square().mean()
    now = Generators()
    assert quietly(net, x, loss=loss).loss and not net.training
    assert seen[0][:3] == (True, True, False) and seen[0] == seen[-1] and len(seen) > 1
    got = random.random(),np.random.rand(),torch.rand(1)
    now.restore()
    assert got == (random.random(), np.random.rand(), torch.rand(1))


# --- errors

def test_an_error_in_the_loss_function_is_told_and_no_loss_is_taken():
    net,x = nn.Linear(3, 2),torch.randn(8, 3)
    report = quietly(net, x, loss=lambda model: F.cross_entropy(model(x), 'classes'))
    assert report.loss is None and not report.undone
    assert report.loss_note.startswith('TypeError: ') and '\n' not in report.loss_note


@pytest.mark.parametrize('where, error', [('model', ZeroDivisionError), ('loss', KeyboardInterrupt)])
def test_an_error_of_the_model_and_an_interrupt_are_raised(where, error):
    def fail(at, out):
        if at == where and not out.any(): raise error
        return out
    net = Mod(lambda self, x: self.lin(fail('model', x)), lin=nn.Linear(3, 2))
    def loss(model): return fail('loss', 0*model(torch.zeros(8, 3)))
    with pytest.raises(error): quietly(net, torch.randn(8, 3), loss=loss)


@pytest.mark.parametrize('refused, status', [
    pytest.param(lambda out: not out.any(), 'ok', id='zeros, which is no matter'),
    pytest.param(lambda out: out.std() > 0.9, 'undone', id='the result, which is put back'),
])
def test_a_loss_that_is_not_defined_at(refused, status):
    net,x = nn.Linear(16, 8),torch.randn(64, 16)
    was = net.weight.detach().clone()
    def loss(model):
        out = model(x)
        if refused(out): raise ArithmeticError('the loss is undefined')
        return out.square().mean()
    report = quietly(net, x, loss=loss)
    assert report[0].status == status and not report.loss_note
    assert torch.equal(net.weight, was) == (status == 'undone') == math.isnan(report.loss[1])


# --- a model that returns its own loss

class Own(nn.Module):
    "Its loss grows with the sixth power of its output."
    def __init__(self, form):
        super().__init__()
        self.a,self.b,self.form = nn.Linear(16, 64),nn.Linear(64, 10),form
    def forward(self, x, labels=None):
        z = self.b(F.relu(self.a(x)))**6*100
        losses = (z - labels[:, None]).square().mean(1) if labels is not None else z.square().mean(1)
        return self.form(losses, z)


@pytest.mark.parametrize('form, loss', [
    pytest.param(lambda losses, z: z, lambda out: out.square().mean(), id='no loss'),
    pytest.param(lambda losses, z: losses.mean(), lambda out: out, id='the loss'),
    pytest.param(lambda losses, z: losses, torch.mean, id='a loss a sample'),
    pytest.param(lambda losses, z: (losses.mean(), z), lambda out: out[0], id='a tuple'),
    pytest.param(lambda losses, z: {'loss': losses.mean(), 'logits': z}, lambda out: out['loss'], id='a dict'),
    pytest.param(lambda losses, z: {'loss': losses}, lambda out: out['loss'].mean(), id='a dict, a loss a sample'),
])
def test_a_far_worse_model_is_put_back_whatever_it_returns(form, loss):
    net,x = Own(form),torch.randn(64, 16)
    was = net.a.weight.detach().clone()
    assert quietly(net, x, loss=lambda model: loss(model(x))).undone and torch.equal(net.a.weight, was)
    kept = quietly(net, x, loss=lambda model: loss(model(x)), force=True)
    assert ' (far worse, and kept with `force=True`)' in kept.summary and kept.ok


@pytest.mark.parametrize('form', [
    pytest.param(lambda losses, z: {'loss': losses.mean(), 'logits': z}, id='an item'),
    pytest.param(lambda losses, z: SimpleNamespace(loss=losses.mean(), logits=z), id='an attribute'),
    pytest.param(lambda losses, z: {'near': losses.mean(), 'far': losses.max()}, id='a dict of losses'),
])
def test_the_loss_that_a_model_returns_for_labels_is_taken_by_default(form):
    net,x,labels = Own(form),torch.randn(64, 16),torch.zeros(64)
    out = net(x, labels)
    want = out.loss if not isinstance(out, dict) else out['loss'] if 'loss' in out else sum(out.values())
    report = quietly(net, dict(x=x, labels=labels))
    assert report.undone and report.loss[0] == pytest.approx(want.item())


def test_labels_without_a_loss_are_no_reason_to_speak():
    report = quietly(Own(lambda losses, z: z), dict(x=torch.randn(64, 16), labels=torch.zeros(64)))
    assert report.ok and report.loss is None and not report.loss_note


# --- whether a model looks trained

def mlp(init=None):
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    if init is not None:
        for m in net[::2]: init(m.weight)
    return net


def task(n=64, regression=False):
    x = torch.randn(n, 8)
    y = x @ torch.linspace(-1, 1, 8)
    return (x, y[:, None].expand(n, 3), F.mse_loss) if regression else (x, (y > 0).long() + (y > 1), F.cross_entropy)


def trained(net, regression=False):
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        x,y,loss = task(regression=regression)
        opt.zero_grad()
        loss(net(x), y).backward()
        opt.step()
    return net


def looks_trained(net, x, y, loss):
    report = quietly(deepcopy(net), x, loss=lambda model: loss(model(x), y))
    return 'it looked trained: its loss is' in report.loss_note


@pytest.mark.parametrize('regression', [False, True])
@pytest.mark.parametrize('init', [None, nn.init.kaiming_normal_, nn.init.orthogonal_, nn.init.xavier_uniform_])
def test_a_trained_model_looks_trained_and_no_new_one_does(init, regression):
    for seed in range(20):
        torch.manual_seed(seed)
        for n in (2, 4, 16, 64): assert not looks_trained(mlp(init), *task(n, regression))
    for n in (16, 64): assert looks_trained(trained(mlp(init), regression), *task(n, regression))


def test_fewer_than_16_samples_prove_nothing_where_weights_have_hardly_moved():
    net = mlp()
    for m in net[::2]: m.weight.data[0, 0] = 1.5*m.in_features**-0.5  # beyond what PyTorch draws
    for n in (8, 16):
        x = torch.randn(n, 8)
        assert looks_trained(net, x, 0.9*net(x).detach(), F.mse_loss) == (n == 16)


def test_a_new_network_that_comes_near_by_its_form_is_not_trained():
    "One number through a line, and a copy of the input."
    for seed in range(50):
        torch.manual_seed(seed)
        x = torch.randn(64, 1)
        assert not looks_trained(nn.Linear(1, 1), x, 0.7*x, F.mse_loss)
    net = Mod(lambda self, x: x + 0.01*self.b(F.relu(self.a(x))), a=nn.Linear(8, 32), b=nn.Linear(32, 8))
    x = torch.randn(64, 8)
    assert not looks_trained(net, x, x, F.mse_loss)


def test_lsuv_init_says_that_a_model_looks_trained():
    net,(x,y,loss) = trained(mlp()),task()
    with pytest.warns(UserWarning, match='it looks trained: its loss is 0.*, a constant answer'):
        report = lsuv_init(net, x, loss=lambda model: loss(model(x), y), force=True)
    assert report.ok and 'it looked trained: its loss is' in report.summary
