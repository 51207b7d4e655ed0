"Moments against float64 numpy, of every layout, dtype and magnitude, pooled, and what they rest on."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastai_lsuv.measure.moments import Evidence, channel_moments, first_tensor, pool, whole_moments


def by_numpy(x, dim):
    "Mean and population variance of each channel, in float64."
    a = np.moveaxis(x.detach().as_subclass(torch.Tensor).double().numpy(), dim, 0)
    a = a.reshape(len(a), -1)
    return a.mean(1), a.var(1)


def check_stats(m, whole, rel, tiny):
    "Mean and std of everything against numpy's."
    mean, std = m.stats()
    np.testing.assert_allclose(mean, whole.mean(), rtol=rel, atol=tiny)
    if whole.size > 1:
        np.testing.assert_allclose(std, whole.std(ddof=1), rtol=rel, atol=tiny)


def check(x, dim=1, rel=1e-5):
    "Both forms of `channel_moments(x)`, and `whole_moments(x)`, against numpy."
    mean, var = by_numpy(x, dim)
    whole = x.detach().as_subclass(torch.Tensor).double().numpy()
    tiny = rel*max(var.mean()**0.5, 1e-30)
    for by_channel in (True, False):
        m = channel_moments(x, dim, by_channel)
        assert m.count == x.numel()//x.shape[dim] and m.mean.dtype == m.var.dtype == np.float64
        np.testing.assert_allclose(m.mean, mean, rtol=rel, atol=tiny)
        np.testing.assert_allclose(m.var, var if by_channel else var.mean(), rtol=rel, atol=tiny**2)
        check_stats(m, whole, rel, tiny)
    m = whole_moments(x)
    assert m.count == x.numel() and m.mean.shape == m.var.shape == () and m.mean.dtype == m.var.dtype == np.float64
    check_stats(m, whole, rel, tiny)
    m = channel_moments(x, dim, True)
    if m.count > 1:
        got_mean, got_std = m.stats(per_channel=True)
        np.testing.assert_allclose(got_std, (var*m.count/(m.count - 1))**0.5, rtol=rel, atol=tiny)


SHAPES = [(7,), (16, 5), (4, 3, 9), (4, 6, 5, 7), (2, 3, 4, 5, 6), (1, 8, 1, 1), (1, 1), (5, 1, 3, 3)]


@pytest.mark.parametrize('shape', SHAPES)
def test_every_dimension_can_hold_the_channels(shape):
    x = torch.randn(shape)*torch.rand(shape[-1])*3 + 0.5
    for dim in range(-len(shape), len(shape)):
        check(x, dim)


LAYOUTS = {
    'channels_last': lambda: torch.randn(4, 6, 5, 7).contiguous(memory_format=torch.channels_last),
    'channels_last_3d': lambda: torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    'permuted': lambda: torch.randn(5, 7, 6, 4).permute(3, 2, 0, 1),
    'strided': lambda: torch.randn(8, 12, 10, 7)[::2, ::2, ::2],
    'expanded': lambda: torch.randn(4, 6, 1, 1).expand(4, 6, 5, 7),
    'flipped view': lambda: torch.randn(4*6*35).view(4, 6, 35).transpose(0, 2),
    'offset': lambda: torch.randn(5, 6, 5, 7)[1:],
}

@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(layout):
    x = LAYOUTS[layout]() + 0.
    for dim in range(x.dim()):
        check(LAYOUTS[layout](), dim)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_half_is_accumulated_in_float32_or_better(dtype, layout):
    x = (torch.randn(64, 16, 32, 32) + 3).to(dtype)  # a sum in half precision would be off by percents, or infinite
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    check(x)
    check(x.flatten(1)[:, :100], -1)


def test_float16_squares_do_not_overflow():
    check(torch.full((2, 3, 4), 60000.).half() - torch.rand(2, 3, 4).half()*30000)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'linear'])
@pytest.mark.parametrize('offset', [1e4, -1e6])
def test_a_mean_that_dwarfs_the_std(layout, offset):
    x = torch.randn(32, 6, 14, 14) + offset
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == 'linear':
        x = x.flatten(0, 1).flatten(1)
    check(x, rel=2e-5)


def test_one_channel_off_zero_among_others():
    x = torch.randn(64, 4, 8, 8)
    x[:, 2] += 5e3
    check(x, rel=1e-4)


@pytest.mark.parametrize('value', [0., 1., -3.7, 1e4])
@pytest.mark.parametrize('shape', [(8, 3, 5, 5), (16, 4)])
def test_constants(value, shape):
    m = channel_moments(torch.full(shape, value))
    np.testing.assert_allclose(m.mean, value, rtol=1e-6)
    assert (m.var <= (1e-6*abs(value))**2).all() and (m.var >= 0).all()


def test_one_element_has_no_std():
    m = channel_moments(torch.tensor([[2.5]]))
    mean, std = m.stats()
    assert mean.item() == 2.5 and np.isnan(std) and m.finite()
    mean, _ = channel_moments(torch.tensor(2.5)).stats()  # a scalar
    assert mean.item() == 2.5


def test_not_finite():
    for bad in (float('nan'), float('inf')):
        x = torch.randn(4, 3, 5)
        x[1, 2, 3] = bad
        assert not channel_moments(x).finite()
        assert not channel_moments(x, by_channel=False).finite()
        assert not whole_moments(x).finite()
    assert channel_moments(torch.randn(4, 3, 5)).finite() and whole_moments(torch.randn(4, 3, 5)).finite()


def test_refusals():
    for moments in (channel_moments, whole_moments):
        with pytest.raises(TypeError, match='complex64'):
            moments(torch.randn(4, 3, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r'batches: .*\(0, 3\) is empty'):
            moments(torch.empty(0, 3))


def test_tensor_subclass():
    from fastai.vision.core import TensorImage
    x = TensorImage(torch.rand(4, 3, 8, 8, requires_grad=True))
    check(x)


def test_the_activation_is_not_changed():
    x = torch.randn(4, 3, 8, 8) + 1e4
    was = x.clone()
    channel_moments(x)
    whole_moments(x)
    assert torch.equal(x, was)


FORMS = {
    'each channel': channel_moments,
    'means of channels': lambda x: channel_moments(x, by_channel=False),
    'whole': whole_moments,
}

@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([*FORMS]), st.integers(0, 999))
def test_pool_is_the_moments_of_all_together(parts, form, seed):
    torch.manual_seed(seed)
    moments = FORMS[form]
    xs = [torch.randn(n, 3, 4, dtype=torch.float64)*(i + 1) + torch.randn(3, 1)*4 for i, n in enumerate(parts)]
    got,want = pool([moments(x) for x in xs]),moments(torch.cat(xs))
    assert got.count == want.count
    for a, b in zip([got.mean, got.var, *got.stats()], [want.mean, want.var, *want.stats()]):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@given(scale=st.floats(-3, 3), seed=st.integers(0, 999))
def test_affine_is_the_moments_of_the_scaled_and_shifted(scale, seed):
    torch.manual_seed(seed)
    x, shift = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for form, moments in FORMS.items():
        by = shift if form != 'whole' else shift[:1]
        got = moments(x).affine(scale, by.numpy() if form != 'whole' else by.item())
        want = moments(x*scale + by[:, None])
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.var, want.var, rtol=1e-7, atol=1e-7)


def test_first_tensor():
    x, i = torch.randn(2), torch.arange(2)
    for out in (x, (x, i), [i, x], {'a': i, 'b': (None, x)}, ((i, [x]),)):
        assert first_tensor(out) is x
    for out in (None, i, 'x', (), {'a': i}):
        assert first_tensor(out) is None


# --- evidence

def squares_of_samples(x):
    "The sum of squares of each sample, in float64."
    return x.detach().double().reshape(len(x), -1).square().sum(1).numpy()


def top_of(x):
    "The largest share, about the mean where that matters."
    x = x.detach().double()
    mean,var = x.mean(),x.var(correction=0)
    s = squares_of_samples(x - mean if mean**2 > 0.04*var else x)
    return (s.max()/s.sum()).item()


MEMORY = {
    'contiguous': lambda x: x,
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    'samples sliced': lambda x: x.repeat_interleave(2, 0)[::2],
    'features sliced': lambda x: x.repeat_interleave(2, -1)[..., ::2],
    'offset': lambda x: torch.cat([x[:1], x])[1:],
}


@given(
    n=st.integers(1, 40),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    memory=st.sampled_from([*MEMORY]),
    outlier=st.sampled_from([1., 3., 30.]),
    seed=st.integers(0, 999),
)
def test_top_is_the_largest_share_of_squares_that_a_sample_holds(n, shape, memory, outlier, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, *shape, dtype=torch.float64)
    x = x*(-1)**torch.arange(x.numel()).view(x.shape)  # means near zero, which no centring moves
    x[seed % n] *= outlier
    x = MEMORY[memory](x)
    for m in (whole_moments(x), channel_moments(x), channel_moments(x, by_channel=False)):
        e = m.evidence
        assert e.samples == n and e.spread == 1.
        if x.numel() > 1 and n > 1: assert e.top == pytest.approx(top_of(x), rel=1e-9)


@pytest.mark.parametrize('shape', [
    (16, 3, 32, 32),
    (8, 64, 24, 24),
    (4, 3, 224, 224),
    (32, 2048),
    (32, 1023),
    (32, 1025),
])
@pytest.mark.parametrize('memory', ['contiguous', 'channels last', 'samples sliced'])
def test_top_of_large_samples(shape, memory):
    x = torch.randn(shape)
    x[3] *= 4
    x = MEMORY[memory](x)
    for m in (whole_moments(x), channel_moments(x), channel_moments(x, by_channel=False)):
        assert m.evidence.samples == len(x) and m.evidence.top == pytest.approx(top_of(x), rel=1e-4)


def test_top_of_samples_that_no_rows_divide_is_off_by_a_row_at_most():
    n,size,row = 8,12289,1024  # a prime
    x = torch.randn(n, size)
    x[3] *= 4
    s = squares_of_samples(x)
    of_a_row = x[3].double().square().mean().item()*row
    assert abs(whole_moments(x).evidence.top - s.max()/s.sum()) < 1.1*of_a_row/s.sum()


@pytest.mark.parametrize('shape', [(5000, 1), (5000, 7), (10_000, 64), (20_000, 3, 2), (5000, 300)])
def test_top_of_thousands_of_samples_is_that_of_a_few_neighbours_at_most(shape):
    "A row of memory holds several small samples. The share is the sample's at least, and with its neighbours at most."
    x = torch.randn(shape)
    x[4321] *= 500
    s = squares_of_samples(x)
    for m in (whole_moments(x), channel_moments(x), channel_moments(x, by_channel=False)):
        assert m.evidence.samples == len(x)
        assert top_of(x)*(1 - 1e-5) <= m.evidence.top <= s[4321 - 256:4321 + 256].sum()/s.sum()*(1 + 1e-5)


def test_an_outlier_beside_a_mean_that_dwarfs_the_std():
    "Squares are taken about the mean there."
    x = torch.randn(16, 64)
    x[5] *= 100
    assert whole_moments(x + 1000).evidence.top == pytest.approx(top_of(x - x.mean()), rel=1e-3)
    assert channel_moments(x + 1000).evidence.top == pytest.approx(top_of(x - x.mean()), rel=1e-3)


@pytest.mark.parametrize('x, samples', [
    (torch.tensor(2.), 1),
    (torch.randn(1, 3, 4), 1),
    (torch.zeros(5, 3), 5),
    (torch.randn(6, 4).t().contiguous().t(), 6),  # samples do not come one after the other in memory
])
def test_no_sample_holds_a_share_where_none_can_be_told(x, samples):
    for f in (whole_moments, channel_moments) if x.dim() > 1 else (whole_moments,):
        assert f(x).evidence == Evidence(samples, 0., 1.)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.sampled_from([*FORMS]), st.integers(0, 999))
def test_pool_adds_up_evidence(parts, form, seed):
    torch.manual_seed(seed)
    xs = [torch.randn(n, 3, 4, dtype=torch.float64)*(i + 1) for i, n in enumerate(parts)]
    xs[seed % len(xs)][1] *= 9
    xs = [torch.cat([x, -x], -1) for x in xs]  # each channel of each sample has a mean of 0
    moments = [replace(m, evidence=m.evidence._replace(spread=1/(i + 1))) for i, m in enumerate(map(FORMS[form], xs))]
    e = pool(moments).evidence
    assert e.samples == sum(parts) and e.spread == 1/len(parts)
    assert e.top == pytest.approx(top_of(torch.cat(xs)), rel=1e-9)


def test_pool_of_what_does_not_vary():
    zeros = whole_moments(torch.zeros(4, 3))
    assert pool([zeros, zeros]).evidence == Evidence(8, 0., 1.)


def test_numpy_may_raise_for_what_over_or_underflows():
    for x in torch.randn(8, 75).double()*1e-161, torch.randn(8, 75).double()*1e200, torch.randn(8, 75)*1e30:
        with np.errstate(all='raise'): m = whole_moments(x)
        assert m.mean == pytest.approx(x.mean().item(), rel=1e-5)
