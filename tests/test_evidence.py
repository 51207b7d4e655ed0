"Whether statistics mean anything, from what they rest on."
import math

import pytest
import torch

from fastai_lsuv.evidence import ALIKE_SPREAD, Doubt, doubt, mean_tolerance, varies
from fastai_lsuv.moments import Evidence, channel_moments, whole_moments


# --- one sample that carries the std

@pytest.mark.parametrize('samples, top, says', [
    (1, 1., ''),  # one sample has nothing to be compared with
    (2, 0.9991, ''),
    (2, 0.9992, 'outlier'),
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
        assert doubt(Evidence(samples, top), needed) == says


@pytest.mark.parametrize('samples, ratio', [(2, 24.), (4, 12.), (8, 6.), (16, 3.), (64, 3.), (500, 3.)])
@pytest.mark.parametrize('moments', [channel_moments, whole_moments])
def test_an_outlier_makes_the_std_so_many_times_that_of_the_others(samples, ratio, moments):
    "The std of all, over that of the others, is what the share stands for."
    one = torch.tensor([[1., -1.], [-1., 1.]]).repeat(1, 32)
    x = one.repeat(samples, 1)[:samples].double()
    for off, says in ((0.99, ''), (1.01, 'outlier')):
        x[0] = one[0]*math.sqrt(samples*(off*ratio)**2 - (samples - 1))
        assert (x.std(correction=0)/x[1:].std(correction=0)).item() == pytest.approx(off*ratio)
        assert doubt(moments(x).evidence, 1.) == says


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
    assert doubt(Evidence(64, 0.1, norm), needed) == says


def test_an_outlier_among_samples_that_are_alike_is_an_outlier():
    assert doubt(Evidence(64, 0.99, 0.), 10.) == 'outlier'


def test_a_doubt_is_a_plain_string():
    assert [d.value for d in Doubt] == ['alike', 'outlier'] and type(doubt(Evidence(64, 1.), 1.)) is str


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
