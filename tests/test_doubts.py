"Whether statistics mean anything, from what they rest on."
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from networks import Mod
from torch import nn

from fastai_lsuv import lsuv_init
from fastai_lsuv.measure.doubts import ALIKE_SPREAD, doubt, mean_tolerance, samples_alike, unusual, varies
from fastai_lsuv.measure.moments import Evidence, Moments, channel_moments, whole_moments
from fastai_lsuv.statuses import DOUBTS, STATUSES, Status


def resting_on(samples, top=0., spread=1., features=100, **told):
    "Moments that rest on this evidence."
    return Moments(samples*features, np.float64(0), np.float64(1), Evidence(samples, top, spread, **told))


# --- one sample that carries the std

@pytest.mark.parametrize('samples, top, says', [
    (1, 1., ''),  # one sample has nothing to be compared with
    (3, 1., ''),  # nor do three tell
    (4, 0.9947, ''),
    (4, 0.9949, 'outlier'),
    (8, 0.9756, ''),
    (8, 0.9758, 'outlier'),
    (16, 0.8958, ''),
    (16, 0.8959, 'outlier'),
    (64, 0.8906, ''),
    (64, 0.8907, 'outlier'),
    (100_000, 0.8888, ''),
    (100_000, 0.8889, 'outlier'),
    (64, 0., ''),
    (64, 1., 'outlier'),
])
def test_the_share_that_makes_an_outlier(samples, top, says):
    for needed in (0.1, 1., 10.):
        assert doubt(resting_on(samples, top), needed) == says


@pytest.mark.parametrize('samples, ratio', [(4, 12.), (8, 6.), (16, 3.), (64, 3.), (500, 3.)])
@pytest.mark.parametrize('moments', [channel_moments, whole_moments])
def test_an_outlier_makes_the_std_so_many_times_that_of_the_others(samples, ratio, moments):
    "The std of all, over that of the others, is what the share stands for."
    one = torch.tensor([[1., -1.], [-1., 1.]]).repeat(1, 32)
    x = one.repeat(samples, 1)[:samples].double()
    for off, says in ((0.99, ''), (1.01, 'outlier')):
        x[0] = one[0]*math.sqrt(samples*(off*ratio)**2 - (samples - 1))
        assert (x.std(correction=0)/x[1:].std(correction=0)).item() == pytest.approx(off*ratio)
        assert doubt(moments(x), 1.) == says


# --- samples that are alike behind a norm layer

@pytest.mark.parametrize('norm, needed, says', [
    (1., 100., ''),
    (0.11, 100., ''),
    (ALIKE_SPREAD, 100., ''),
    (0.099, 2.1, 'alike'),
    (0.099, 2., ''),  # noise would not be scaled up by much
    (0.099, 0.5, ''),
    (0., 2.1, 'alike'),
    (0., 1e6, 'alike'),
    (0., 1., ''),
])
def test_the_spread_and_the_gain_that_make_samples_alike(norm, needed, says):
    assert doubt(resting_on(64, 0.1, norm), needed) == says


def test_an_outlier_among_samples_that_are_alike_is_an_outlier():
    assert doubt(resting_on(64, 0.99, 0.), 10.) == 'outlier'


def test_a_doubt_is_a_status_and_each_status_has_a_sentence():
    assert {d.value for d in DOUBTS} == {'alike', 'outlier', 'faint'} and doubt(resting_on(64, 1.), 1.) in DOUBTS
    assert [s.value for s in Status] == list(STATUSES)


# --- samples that are alike without one, and next to nothing behind one

@pytest.mark.parametrize('features, needed, says', [
    (63, 2.1, 'alike'),  # the std of so few numbers is chance
    (63, 2., ''),
    (64, 7.9, ''),
    (64, 8.1, 'alike'),
])
def test_alike_samples_and_the_features_of_each(features, needed, says):
    assert doubt(resting_on(64, features=features, alike=True), needed) == says


@pytest.mark.parametrize('normed, needed, size, says', [
    (True, 101., 1., 'faint'),
    (True, 99., 1., ''),
    (True, 1e4, 1e-3, ''),  # the weight is small, and not the input
    (True, 1e4, 2e-2, 'faint'),
    (False, 1e6, 1., ''),  # an input of small numbers
])
def test_the_gain_that_a_unit_may_need_behind_a_norm_layer(normed, needed, size, says):
    assert doubt(resting_on(64, normed=normed), needed, lambda: size) == says


@pytest.mark.parametrize('batch, says', [
    (torch.ones(8, 4), True),
    (torch.randn(1, 4).repeat(8, 1), True),
    (torch.randn(1, 4) + 0.01*torch.randn(8, 4), True),
    (torch.randn(8, 4), False),
    (torch.randn(1, 4), False),  # one sample is like no other
    (torch.arange(4).repeat(8, 1), True),
    (torch.arange(8), False),
    ((torch.ones(8, 2), torch.randn(8, 2)), False),
    ({'x': torch.ones(8, 2), 'scale': torch.randn(2)}, True),
    ((torch.randn(8, 2, dtype=torch.half), 3), False),
    ('text', False),
])
def test_samples_that_are_alike(batch, says): assert samples_alike(batch) is says


# --- other questions to the data

@pytest.mark.parametrize('x, says', [
    (torch.zeros(8, 4), False),
    (torch.full((8, 4), 3.), False),
    (torch.full((8, 4), 1000.) + torch.arange(32.).view(8, 4)*1e-4, False),
    (torch.full((8, 4), 1000.) + torch.arange(32.).view(8, 4)*1e-2, True),
    (torch.randn(8, 4)*1e-20, True),
    (torch.randn(8, 4), True),
])
def test_what_varies_by_more_than_rounding(x, says):
    assert varies(channel_moments(x)) is says and varies(whole_moments(x)) is says


def test_what_varies_beside_what_it_is_part_of():
    small,large = whole_moments(torch.randn(64, 4)*1e-5),whole_moments(torch.randn(64, 4)*100)
    assert varies(small) and not varies(small, large) and varies(large, small)


@pytest.mark.parametrize('samples, batch_tol, tolerance', [
    (1, 0.1, 3.),
    (9, 0.1, 1.),
    (100, 0.1, 0.3),
    (900, 0.1, 0.1),
    (10**6, 0.1, 0.1),
    (10**6, 0.01, 0.01),
    (100, 0.5, 0.5),
])
def test_a_mean_may_be_off_by_what_its_sampling_error_allows(samples, batch_tol, tolerance):
    assert mean_tolerance(Evidence(samples), batch_tol) == pytest.approx(tolerance)


# --- what sets a mini-batch apart

def spoiled(x, at, value):
    x[at] = value
    return x


@pytest.mark.parametrize('batch, says', [
    (torch.randn(16, 3, 8, 8), ''),
    (torch.rand(16, 3, 8, 8), ''),  # an image that is not normalized by its statistics
    (5 + torch.randn(16, 10), ''),
    (torch.randint(9, (16, 10)), ''),  # token ids
    (torch.randn(16), ''),  # times, say
    ((torch.randint(9, (16, 10)), 1e4*torch.rand(16)), ''),
    (torch.randn(1, 3, 8, 8), "it holds 1 sample"),
    (torch.randint(9, (1, 10)), "it holds 1 sample"),
    (torch.ones(1, 1), "it holds 1 sample"),  # one number has no std
    (torch.randn(1, 10).repeat(16, 1), "its samples are alike"),
    (torch.linspace(-2, 2, 10) + 0.2*torch.randn(16, 10), "its samples are alike"),
    (torch.linspace(-2, 2, 10) + 0.6*torch.randn(16, 10), ''),
    (torch.randint(9, (1, 10)).repeat(16, 1), "its samples are alike"),
    (spoiled(torch.randn(16, 10), slice(1, None), 0.), "one sample alone sets its std"),
    (spoiled(torch.randn(16, 10), 0, torch.linspace(-29, 29, 10)), "one sample alone sets its std"),
    (1e-4*torch.randn(16, 100), r"its std is (0.0001|0.000099?|9.\de-05)"),
    (torch.randint(256, (16, 3, 8, 8)).float(), "its std is 7."),
    ({'ids': torch.randint(9, (16, 10)), 'x': 1e3*torch.ones(16, 10)}, "its std is 0"),
    (torch.zeros(16, 10), "its samples are alike and its std is 0"),
    ((), ''),
    ('text', ''),
])
def test_what_sets_a_mini_batch_apart(batch, says):
    assert re.fullmatch(says, unusual(batch))


def test_a_part_of_a_mini_batch_may_hold_one_sample(monkeypatch):
    monkeypatch.setattr('fastai_lsuv.measure.doubts.several_ranks', lambda: True)
    assert unusual(torch.randn(1, 3, 8, 8)) == ''


@pytest.mark.parametrize('mean', [0., 0.5, 2., 20., 1000.])
@pytest.mark.parametrize('moments', [whole_moments, channel_moments])
@pytest.mark.parametrize('samples', [8, 64])
def test_a_mean_hides_no_outlier(mean, moments, samples):
    x = .1*torch.randn(samples, 32, dtype=torch.float64)
    x[3] *= 40
    assert doubt(moments(x + mean), 1.) == 'outlier'
    assert doubt(moments(torch.randn(samples, 32) + mean), 1.) == ''


def test_a_layer_that_puts_out_the_same_for_each_sample_is_not_scaled_up():
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    nn.init.zeros_(net[0].weight)
    report = quietly(net, torch.randn(64, 16))
    assert [r.status for r in report] == ['constant', 'alike', 'alike'] and {r.gain for r in report} == {1.}


def test_the_first_tensor_tells_the_samples():
    def forward(self, x, table): return self.b(F.relu(self.a(x))) + table[:10]

    net = Mod(forward, a=nn.Linear(16, 100), b=nn.Linear(100, 10))
    assert lsuv_init(net, (torch.randn(64, 16)*.01, torch.zeros(100))).ok
