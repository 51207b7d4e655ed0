"The training loss before and after, and what it says against the result."
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from torch import nn

from fastai_lsuv.keep.generators import Generators
from fastai_lsuv.run.loss import LossCheck

nan,inf = math.nan,math.inf


@pytest.mark.parametrize('before, constant, after, fails', [
    (1., nan, 1., False),
    (1., nan, 4.9, False),
    (1., nan, 5.1, True),
    (1., 0.5, 5.1, True),
    (1., 2., 9.9, False),  # predicting zeros is worse than the start
    (1., 2., 10.1, True),
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
    assert check.out is None


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
    assert 'after (far worse, and kept with `force=True`).' in kept.summary and kept.ok
