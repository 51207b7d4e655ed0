"The words of an order, and the loops on made-up meters. `test_lsuv.py` compares the loops with the oracle's."
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastai_lsuv.measure.loops import ORDERS, AffineMeter, parse_order, run_loops
from fastai_lsuv.measure.moments import channel_moments


@pytest.mark.parametrize('order, loops', [
    ('std mean', (('std',), ('mean',))),
    ('mean std', (('mean',), ('std',))),
    ('mean+std', (('mean', 'std'),)),
    ('std+mean', (('std', 'mean'),)),
    ('mean std mean std', (('mean',), ('std',))*2),
    ('std', (('std',),)),
    ('  mean\n mean+std ', (('mean',), ('mean', 'std'))),
])
def test_reading_an_order(order, loops):
    assert parse_order(order) == loops


def test_the_orders_of_the_documents():
    assert list(ORDERS) == ['std mean', 'mean std', 'mean+std', 'mean std mean std', 'std']


@pytest.mark.parametrize('order, error, says', [
    ('var', ValueError, "unknown word 'var'"),
    ('std, mean', ValueError, "unknown word 'std,'"),
    ('Std', ValueError, "unknown word 'Std'"),
    ('mean+', ValueError, "unknown word ''"),
    ('  ', ValueError, 'holds no loop'),
    ('mean+mean', ValueError, 'names a word twice'),
    (None, TypeError, 'NoneType'),
    (['std'], TypeError, 'list'),
    (1, TypeError, 'int'),
])
def test_what_is_no_order(order, error, says):
    with pytest.raises(error) as e:
        parse_order(order)
    assert str(e.value).startswith('order: ') and says in str(e.value) and "'mean' and 'std'" in str(e.value)


class Made:
    "A meter of a mean and a std that answer to a shift and a scale by these functions, and a log of what was done."
    can_shift,affine = True,False
    def __init__(self, mean, std, shift=lambda m, s, by: (m + by, s), scale=lambda m, s, by: (m*by, s*by)):
        self.mean,self.std,self._shift,self._scale,self.moves = np.array([mean]),np.array([std]),shift,scale,[]
    def stats(self): return self.mean, self.std
    def shift(self, by):
        self.moves.append('shift')
        self.mean,self.std = self._shift(self.mean, self.std, by)
    def scale(self, by):
        self.moves.append('scale')
        self.mean,self.std = self._scale(self.mean, self.std, by)


def run(meter, order, tol=1e-3, steps=200): return run_loops(parse_order(order), meter, 0., 1., tol, steps)
def follows(power): return lambda m, s, by: (m, s*by**power)


def test_a_statistic_within_tolerance_is_left_alone():
    for order in ('std mean', 'mean+std'):
        m = Made(9e-4, 2., scale=follows(1))
        assert run(m, order) == '' and m.moves == ['scale'] and m.mean.item() == 9e-4
        m = Made(0.5, 1.0009)
        assert run(m, order) == '' and m.moves == ['shift'] and m.std.item() == 1.0009


def test_both_statistics_of_a_joint_loop_are_taken_before_either_is_corrected():
    by = []
    m = Made(2., 4., shift=lambda m, s, b: (by.append(b.item()), (m + b, s*0.5))[1])
    run(m, 'mean+std', steps=1)
    assert by == [-2.] and m.std.item() == 4*0.5/4


@pytest.mark.parametrize('order, meter, says', [
    ('std', Made(0., 2., scale=follows(0.)), 'unresponsive'),
    ('std', Made(0., 2., scale=follows(0.05)), 'unresponsive'),
    ('std', Made(0., 2., scale=follows(0.5)), ''),  # slow is not deaf
    ('std', Made(0., 0.5, scale=follows(1e-4)), 'unresponsive'),
    ('std', Made(0., 0.5, scale=follows(0.05)), ''),  # what has to grow is not given up as long as it stirs
    ('mean', Made(3., 1., shift=lambda m, s, by: (m, s)), 'immovable'),
    ('mean', Made(3., 1., shift=lambda m, s, by: (m*0.2, s*0.2)), 'immovable'),  # it goes only as activations die
    ('std', Made(0., 2., scale=lambda m, s, by: (m, s*float('nan'))), 'non-finite'),
])
def test_what_does_not_follow_is_given_up(order, meter, says):
    assert run(meter, order) == says


def test_what_does_not_vary_is_left_as_it_is_and_a_loop_stops_after_so_many_steps():
    m = Made(0., 0.)
    assert run(m, 'std') == '' and m.moves == []
    m = Made(0., 2., scale=follows(0.5))
    run(m, 'std', steps=3)
    assert m.moves == ['scale']*3


@pytest.mark.parametrize('weight, biases, says', [
    (1e-9, 0.5, ''),
    (1., 0.9, ''),
    (30., 0.9, ''),
    (1., 3., 'unresponsive'),
    (1e-9, 3., 'unresponsive'),
])
def test_an_affine_unit_is_given_up_only_if_its_biases_outweigh_the_target(weight, biases, says):
    z, b = torch.randn(256, 64, dtype=torch.float64)*weight, torch.randn(64, dtype=torch.float64)
    meter = AffineMeter(channel_moments(z), (b/b.std(correction=0)*biases).numpy(), True, False)
    assert run(meter, 'std mean') == says
    if not says:
        mean, std = meter.stats()
        assert std.item() == pytest.approx(1, abs=1.1e-3) and mean.item() == pytest.approx(0, abs=1e-3)


def test_a_tolerance_below_rounding_is_no_reason_to_give_up():
    biases = np.random.default_rng(0).normal(size=8)/3
    meter = AffineMeter(channel_moments(torch.randn(256, 8) + 3), biases, True, False)
    assert run(meter, 'mean+std', tol=1e-30) == '' and meter.stats()[1].item() == pytest.approx(1, abs=1e-9)


@given(st.integers(0, 9999), st.sampled_from([*ORDERS, 'mean', 'std mean std', 'mean+std std']), st.booleans())
def test_the_affine_meter_says_what_the_output_would_be(seed, order, per_channel):
    torch.manual_seed(seed)
    z, b = torch.randn(64, 4, 3, dtype=torch.float64)*torch.rand(4, 1).add(.3), torch.randn(4, dtype=torch.float64)*0.2
    meter = AffineMeter(channel_moments(z, by_channel=per_channel), b.numpy(), True, per_channel)
    run(meter, order)
    o = z*torch.as_tensor(meter.weight_scale).view(-1, 1) + (b + torch.as_tensor(meter.bias_shift))[:, None]
    for got, want in zip(meter.stats(), channel_moments(o).stats(per_channel)):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    if order.split()[-1] != 'mean':
        np.testing.assert_allclose(meter.stats()[1], 1, rtol=0, atol=1.001e-3)
