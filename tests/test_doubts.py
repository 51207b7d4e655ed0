"Whether statistics mean anything, from what they rest on."
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from networks import Mod, mlp
from torch import nn, randn

from fastai_lsuv import lsuv_init
from fastai_lsuv.measure.doubts import ALIKE_SPREAD, doubt, mean_tolerance, unusual, varies
from fastai_lsuv.measure.moments import Evidence, Moments, channel_moments, pool, whole_moments
from fastai_lsuv.statuses import DOUBTS, STATUSES, Status

FORMS = {
    'each channel': channel_moments,
    'means of channels': lambda x: channel_moments(x, by_channel=False),
    'whole': whole_moments,
    'of several calls': lambda x: pool([whole_moments(part) for part in x.chunk(2)]),
}


def resting_on(samples, top=0., spread=1., features=100, **told):
    "Moments that rest on this evidence."
    return Moments(samples*features, np.float64(0), np.float64(1), Evidence(samples, top, spread, **told))


# --- one sample that carries the std

MEMORY = {
    'contiguous': lambda x: x,
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    'samples sliced': lambda x: x.repeat_interleave(2, 0)[::2],
    'features sliced': lambda x: x.repeat_interleave(2, -1)[..., ::2],
    'offset': lambda x: torch.cat([x[:1], x])[1:],
}


def with_outlier(shape, ratio):
    "Samples of the same size, and one that makes the std this many times that of the others."
    x = randn(shape, dtype=torch.float64)
    x = x.sub_(x.flatten(1).mean(1).view(-1, *[1]*(x.dim() - 1)))
    x /= x.flatten(1).std(1, correction=0).view(-1, *[1]*(x.dim() - 1))
    x[len(x)//2] *= math.sqrt(max(0., len(x)*ratio**2 - (len(x) - 1)))
    return x


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('shape, ratio', [
    ((4, 64), 12.),
    ((8, 64), 6.),
    ((16, 64), 3.),
    ((500, 64), 3.),
    ((16, 3, 32, 32), 3.),
    ((8, 64, 24, 24), 6.),
    ((32, 1023), 3.),
    ((32, 1025), 3.),
    ((16, 40009), 3.),  # a prime: no rows of memory divide it
    ((10_000, 3, 2), 3.),  # rows hold several samples
    ((5000, 300), 3.),
], ids=str)
def test_an_outlier_makes_the_std_so_many_times_that_of_the_others(shape, ratio, form):
    # The share is coarser beside a mean of about the std, and where a row holds the end of one sample and more.
    near,coarse = 1.5 if shape[-1] == 40009 else 1.05, 3.
    for mean, off, says in [(0., 0.95, ''), (0., near, 'outlier'), (0.5, coarse, 'outlier'), (2., coarse, 'outlier'),
                            (1000., 0.95, ''), (1000., near, 'outlier')]:
        x = with_outlier(shape, off*ratio).float() + mean
        for name, memory in MEMORY.items():
            assert doubt(FORMS[form](memory(x)), 1.) == says, (mean, off, name)


@pytest.mark.parametrize('x', [randn(3, 64)*torch.tensor([1., 1., 1e4])[:, None], randn(1, 64), torch.tensor(2.)])
def test_fewer_than_four_samples_do_not_tell_an_outlier(x):
    assert doubt(whole_moments(x), 1.) == doubt(channel_moments(x, -1), 1.) == ''


# --- samples that are alike behind a norm layer, or next to nothing behind one

@pytest.mark.parametrize('moments, needed, says', [
    (resting_on(64, 0.1, ALIKE_SPREAD), 100., ''),
    (resting_on(64, 0.1, 0.099), 2.1, 'alike'),
    (resting_on(64, 0.1, 0.099), 2., ''),  # noise would not be scaled up by much
    (resting_on(64, 0.1, 0.), 1e6, 'alike'),
    (resting_on(64, 0.1, 0.), 1., ''),
    (resting_on(64, 0.99, 0.), 10., 'outlier'),
    (resting_on(64, features=63, alike=True), 2.1, 'alike'),  # the std of so few numbers is chance
    (resting_on(64, features=63, alike=True), 2., ''),
    (resting_on(64, features=64, alike=True), 7.9, ''),
    (resting_on(64, features=64, alike=True), 8.1, 'alike'),
    (resting_on(64, normed=True), 101., 'faint'),
    (resting_on(64, normed=True), 99., ''),
    (resting_on(64), 1e6, ''),  # an input of small numbers
])
def test_the_gain_that_a_unit_may_need(moments, needed, says):
    assert doubt(moments, needed) == says


@pytest.mark.parametrize('size, says', [(1e-3, ''), (2e-2, 'faint')])
def test_a_small_weight_is_no_small_input(size, says):
    assert doubt(resting_on(64, normed=True), 1e4, lambda: size) == says


def test_a_doubt_is_a_status_and_each_status_has_a_sentence():
    assert {d.value for d in DOUBTS} == {'alike', 'outlier', 'faint'}
    assert [s.value for s in Status] == list(STATUSES)


# --- other questions to the data

@pytest.mark.parametrize('x, says', [
    (torch.zeros(8, 4), False),
    (torch.full((8, 4), 3.), False),
    (torch.full((8, 4), 1000.) + torch.arange(32.).view(8, 4)*1e-4, False),
    (torch.full((8, 4), 1000.) + torch.arange(32.).view(8, 4)*1e-2, True),
    (randn(8, 4)*1e-20, True),
])
def test_what_varies_by_more_than_rounding(x, says):
    assert varies(channel_moments(x)) is says and varies(whole_moments(x)) is says


def test_what_varies_beside_what_it_is_part_of():
    small,large = whole_moments(randn(64, 4)*1e-5),whole_moments(randn(64, 4)*100)
    assert varies(small) and not varies(small, large) and varies(large, small)


@pytest.mark.parametrize('samples, batch_tol, tolerance', [
    (9, 0.1, 1.),
    (900, 0.1, 0.1),
    (10**6, 0.01, 0.01),
    (100, 0.5, 0.5),
])
def test_a_mean_may_be_off_by_what_its_sampling_error_allows(samples, batch_tol, tolerance):
    assert mean_tolerance(Evidence(samples), batch_tol) == pytest.approx(tolerance)


# --- what sets a mini-batch apart

def spoiled(x, at, value):
    x[at] = value
    return x


ALIKE,CARRIED,ONE = "its samples are alike","one sample alone sets its std","it holds 1 sample"


@pytest.mark.parametrize('batch, says', [
    (randn(16, 3, 8, 8), ''),
    (torch.rand(16, 3, 8, 8), ''),  # an image that is not normalized by its statistics
    (5 + randn(16, 10), ''),
    (torch.randint(9, (16, 10)), ''),  # token ids
    (randn(16), ''),  # times, say
    ((torch.randint(9, (16, 10)), 1e4*torch.rand(16)), ''),
    (randn(1, 3, 8, 8), ONE),
    (torch.randint(9, (1, 10)), ONE),
    (torch.ones(1, 1), ONE),  # one number has no std
    (randn(1, 10).repeat(16, 1), ALIKE),
    (torch.linspace(-2, 2, 10) + 0.2*randn(16, 10), ALIKE),
    (torch.linspace(-2, 2, 10) + 0.6*randn(16, 10), ''),
    (torch.randint(9, (1, 10)).repeat(16, 1), ALIKE),
    ((randn(1, 2).repeat(16, 1), randn(16, 2)), ''),
    ({'x': randn(1, 10).repeat(16, 1), 'scale': randn(2)}, ALIKE),
    ((randn(16, 10, dtype=torch.half), 3), ''),
    (spoiled(randn(16, 10), slice(1, None), 0.), CARRIED),
    (spoiled(randn(16, 10), 0, torch.linspace(-29, 29, 10)), CARRIED),
    (1e-4*randn(16, 100), r"its std is (0.0001|0.000099?|9.\de-05)"),
    (torch.randint(256, (16, 3, 8, 8)).float(), "its std is 7."),
    ({'ids': torch.randint(9, (16, 10)), 'x': 1e3*torch.ones(16, 10)}, "its std is 0"),
    (torch.zeros(16, 10), f"{ALIKE} and its std is 0"),
    ((), ''),
    ('text', ''),
])
def test_what_sets_a_mini_batch_apart(batch, says):
    assert re.fullmatch(says, unusual(batch))


def test_a_part_of_a_mini_batch_may_hold_one_sample(monkeypatch):
    monkeypatch.setattr('fastai_lsuv.measure.doubts.several_ranks', lambda: True)
    assert unusual(randn(1, 3, 8, 8)) == ''


def test_a_layer_that_puts_out_the_same_for_each_sample_is_not_scaled_up():
    net = mlp(16, 64, 64, 10)
    nn.init.zeros_(net[0].weight)
    report = quietly(net, randn(64, 16))
    assert [r.status for r in report] == ['constant', 'alike', 'alike'] and {r.gain for r in report} == {1.}


def test_the_first_tensor_tells_the_samples():
    def forward(self, x, table): return self.b(F.relu(self.a(x))) + table[:10]
    net = Mod(forward, a=nn.Linear(16, 100), b=nn.Linear(100, 10))
    assert lsuv_init(net, (randn(64, 16)*.01, torch.zeros(100))).ok


@pytest.mark.parametrize('max_iter', [1, 2, 10])
def test_a_layer_in_doubt_is_said_to_be_however_many_passes_there_are(max_iter):
    torch.manual_seed(0)
    x = torch.randn(1, 32) + 1e-7*torch.randn(64, 32)
    body = nn.Linear(32, 64),nn.BatchNorm1d(64),nn.ReLU(),nn.Linear(64, 64),nn.ReLU()
    model = nn.Sequential(*body, nn.Linear(64, 8))
    report = quietly(model, x, max_iter=max_iter)
    assert [r.status for r in report] == ['ok', 'alike', 'alike']
