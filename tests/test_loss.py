"The training loss before and after, and what it says against the result."
import math
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from torch import nn

from fastai_lsuv import lsuv_init
from fastai_lsuv.keep.generators import Generators
from fastai_lsuv.run.loss import LossCheck

nan,inf = math.nan,math.inf


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
def test_a_loss_that_is_far_worse(before, constant, after, fails):
    check = LossCheck(nn.Linear(2, 2), lambda model: 0.)
    check.before,check.constant,check.after = before,constant,after
    assert bool(check.failure) == fails
    if not fails: return
    assert check.failure.startswith(f'the training loss is {after:.3g} after LSUV; it was {before:.3g} before')
    assert ('predicting zeros' in check.failure) == math.isfinite(constant)


def test_without_a_loss_nothing_is_taken():
    check = LossCheck(nn.Linear(2, 2), None)
    check.take_after()
    assert check.pair is None and check.failure == ''


def test_the_losses_of_the_model_and_of_predicting_zeros():
    model,x,y = nn.Linear(3, 2),torch.randn(8, 3),torch.randn(8, 2)
    check = LossCheck(model, lambda model: F.mse_loss(model(x), y))
    check.take_before()
    want = F.mse_loss(model(x), y).item()
    model.weight.data *= 10
    check.take_after()
    assert check.pair == pytest.approx((want, F.mse_loss(model(x), y).item()))
    assert check.constant == pytest.approx(y.square().mean().item()) and check.error == ''


@pytest.mark.parametrize('loss', [
    lambda out: out.square().mean(),
    lambda out: out.square().mean().item(),
    lambda out: out.square(),  # one number a sample
    lambda out: out.square().mean().half(),
    lambda out: np.float64(out.square().mean().item()),
])
def test_a_loss_may_be_a_number_or_a_tensor(loss):
    model,x = nn.Linear(3, 1),torch.randn(8, 3)
    check = LossCheck(model, lambda model: loss(model(x)))
    check.take_before()
    assert check.before == pytest.approx(model(x).square().mean().item(), rel=1e-3)


def test_outputs_of_any_kind_are_replaced_by_zeros():
    class Many(nn.Linear):
        def forward(self, x): return {'out': super().forward(x), 'pair': (super().forward(x), 'name')}
    seen,x = [],torch.randn(8, 3)
    def loss(model):
        out = model(x)
        seen.append(out)
        return out['out'].mean() + out['pair'][0].mean() + 1
    check = LossCheck(Many(3, 2), loss)
    check.take_before()
    assert check.constant == 1. and seen[1]['pair'][1] == 'name' and not seen[1]['out'].any()
    assert seen[0]['out'].any()


def test_the_model_trains_with_dropout_on_and_gradients_off():
    seen = []
    model = nn.Sequential(nn.Linear(100, 100), nn.Dropout(0.5)).eval()
    def loss(run):
        out = run(torch.ones(100))
        seen.append((model.training, out.requires_grad, bool((out == 0).any())))
        return out.mean()
    LossCheck(model, loss).take_before()
    assert seen[0] == (True, False, True)


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
    torch.manual_seed(0)
    plain = [m for m in model if not isinstance(m, nn.Dropout) or not m.p]
    if len(plain) == len(model): assert report.loss[1] == pytest.approx(loss(model.train()).item(), abs=1e-6)
    assert report.loss[0] == report.loss[1]


@pytest.mark.parametrize('given', [lambda x: x.clone(), lambda x: x[:32]], ids=['a copy', 'a part'])
def test_a_loss_on_other_inputs_is_taken_on_its_own(given):
    model,x = nn.Linear(4, 2),torch.randn(64, 4)
    other = given(x)
    report = lsuv_init(model, x, loss=lambda model: model(other).square().mean() + 1)
    assert report.n_passes == 4 and report.loss[1] == pytest.approx(model(other).square().mean().item() + 1, abs=1e-6)


def test_the_same_random_numbers_before_and_after():
    x = torch.randn(64, 8)
    def loss(model): return model(x).square().mean() + random.random() + np.random.rand()
    check = LossCheck(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), loss)
    check.take_before()
    random.random()
    np.random.rand()
    torch.rand(9)
    now = Generators()
    check.take_after()
    assert check.before == check.after
    got = random.random(),np.random.rand(),torch.rand(1)
    now.restore()
    assert got == (random.random(), np.random.rand(), torch.rand(1))


def test_an_error_in_the_loss_function_is_kept_and_no_loss_is_taken():
    check = LossCheck(nn.Linear(3, 2), lambda model: F.cross_entropy(model(torch.randn(8, 3)), 'classes'))
    check.take_before()
    assert check.error.startswith('TypeError: ') and '\n' not in check.error
    check.take_after()
    assert check.pair is None and check.failure == '' and math.isnan(check.after)


def test_an_error_in_the_model_is_raised():
    class Breaks(nn.Linear):
        def forward(self, x): raise ZeroDivisionError('of the model')
    with pytest.raises(ZeroDivisionError, match='of the model'):
        LossCheck(Breaks(3, 2), lambda model: model(torch.randn(8, 3)).mean()).take_before()


def test_an_interrupt_in_the_loss_function_is_raised():
    def loss(model): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        LossCheck(nn.Linear(3, 2), loss).take_before()


def test_a_loss_that_is_not_defined_at_zeros_is_taken_all_the_same():
    model,x = nn.Linear(3, 2),torch.randn(8, 3)
    def loss(model):
        out = model(x)
        if not out.any(): raise ValueError('all zeros')
        return out.square().mean()
    check = LossCheck(model, loss)
    check.take_before()
    check.take_after()
    assert check.error == '' and math.isnan(check.constant)
    assert check.pair == pytest.approx((model(x).square().mean().item(),)*2)


def test_the_output_is_not_kept():
    check = LossCheck(nn.Linear(3, 2), lambda model: model(torch.randn(8, 3)).mean())
    check.take_before()
    assert check.outs == []


def test_a_loss_that_cannot_be_taken_any_more_puts_the_weights_back():
    net,x = nn.Linear(16, 8),torch.randn(64, 16)
    was = net.weight.detach().clone()

    def loss(model):
        out = model(x)
        if out.std() > 0.9: raise ArithmeticError('the loss is undefined')
        return out.square().mean()

    assert quietly(net, x, loss=loss)[0].status == 'undone' and torch.equal(net.weight, was)


def test_zeros_may_be_the_best_prediction():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(16, 64),nn.Linear(64, 10)
        def forward(self, x): return self.b(F.relu(self.a(x)))**6*100

    net,x = Grows(),torch.randn(64, 16)
    report = quietly(net, x, loss=lambda model: model(x).square().mean())
    assert {r.status for r in report} == {'undone'}
    kept = quietly(net, x, loss=lambda model: model(x).square().mean(), force=True)
    assert ' (far worse, and kept with `force=True`).' in kept.summary and kept.ok


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


@pytest.mark.parametrize('form', [
    pytest.param(lambda losses, z: losses.mean(), id='the loss'),
    pytest.param(lambda losses, z: losses, id='a loss a sample'),
    pytest.param(lambda losses, z: (losses.mean(), z), id='a tuple'),
    pytest.param(lambda losses, z: {'loss': losses.mean(), 'logits': z}, id='a dict'),
    pytest.param(lambda losses, z: {'loss': losses, 'logits': z}, id='a dict, a loss a sample'),
])
def test_a_far_worse_model_that_returns_its_own_loss_is_put_back(form):
    net,x = Own(form),torch.randn(64, 16)
    def loss(model):
        out = model(x)
        return (out['loss'] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out).mean()
    was = net.a.weight.detach().clone()
    report = quietly(net, x, loss=loss)
    assert report.undone and torch.equal(net.a.weight, was)


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


def test_a_loss_that_calls_the_model_twice():
    model,(x,y) = nn.Linear(3, 2),torch.randn(2, 8, 3)
    check = LossCheck(model, lambda model: (model(x) - model(y)).square().mean() + 1)
    check.take_before()
    a,b = model(x),model(y)
    assert check.constant == 1 and check.same == pytest.approx(1 + (a.mean(0) - b.mean(0)).square().mean().item())


# --- whether a model looks trained

def mlp(init=None):
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    if init is not None:
        for m in net[::2]: init(m.weight)
    return net


def task(n=64, regression=False):
    x = torch.randn(n, 8)
    y = (x @ torch.linspace(-1, 1, 8))
    return (x, y[:, None].expand(n, 3), F.mse_loss) if regression else (x, (y > 0).long() + (y > 1), F.cross_entropy)


def trained(net, steps=60, **kwargs):
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        x,y,loss = task(**kwargs)
        opt.zero_grad()
        loss(net(x), y).backward()
        opt.step()
    return net


def looks(net, x, y, loss):
    check = LossCheck(net, lambda model: loss(model(x), y))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check.take_before()
    return check.trained


@pytest.mark.parametrize('regression', [False, True])
@pytest.mark.parametrize('init', [None, nn.init.kaiming_normal_, nn.init.orthogonal_, nn.init.xavier_uniform_])
def test_a_trained_model_looks_trained_and_no_new_one_does(init, regression):
    for seed in range(20):
        torch.manual_seed(seed)
        for n in (2, 4, 16, 64): assert not looks(mlp(init), *task(n, regression))
    for n in (16, 64): assert looks(trained(mlp(init), regression=regression), *task(n, regression))


def test_a_line_through_one_number_is_no_proof():
    "A new layer of one number may well be near."
    for seed in range(50):
        torch.manual_seed(seed)
        x = torch.randn(64, 1)
        assert not looks(nn.Linear(1, 1), x, 0.7*x, F.mse_loss)


def test_a_new_network_that_copies_its_input_is_not_trained():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(8, 32),nn.Linear(32, 8)
        def forward(self, x): return x + 0.01*self.b(F.relu(self.a(x)))
    x = torch.randn(64, 8)
    assert not looks(Copies(), x, x, F.mse_loss)


def test_lsuv_init_says_that_a_model_looks_trained():
    net,(x,y,loss) = trained(mlp()),task()
    with pytest.warns(UserWarning, match='it looks trained: its loss is 0.*, a constant answer'):
        report = lsuv_init(net, x, loss=lambda model: loss(model(x), y), force=True)
    assert report.ok and 'it looked trained: its loss is' in report.summary
