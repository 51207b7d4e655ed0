"Moments against float64 numpy, of every layout, dtype and magnitude, and pooled."
import numpy as np
import pytest
import torch
from fastai.vision.core import TensorImage
from hypothesis import given
from hypothesis import strategies as st
from torch import randn

from fastai_lsuv.measure.moments import channel_moments, pool, whole_moments

FORMS = {
    'each channel': channel_moments,
    'means of channels': lambda x: channel_moments(x, by_channel=False),
    'whole': whole_moments,
}


def check_stats(m, whole, rel, tiny):
    "Mean and std of everything against numpy's."
    mean, std = m.stats()
    np.testing.assert_allclose(mean, whole.mean(), rtol=rel, atol=tiny)
    if whole.size > 1:
        np.testing.assert_allclose(std, whole.std(ddof=1), rtol=rel, atol=tiny)


def check(x, dim, rel):
    "Both forms of `channel_moments(x)`, and `whole_moments(x)`, against numpy."
    whole = x.detach().as_subclass(torch.Tensor).double().numpy()
    of_channels = np.moveaxis(whole, dim, 0).reshape(x.shape[dim], -1)
    mean,var = of_channels.mean(1),of_channels.var(1)
    tiny = rel*max(var.mean()**0.5, 1e-30)
    for by_channel in (True, False):
        m = channel_moments(x, dim, by_channel)
        assert m.count == x.numel()//x.shape[dim] and m.mean.dtype == m.var.dtype == np.float64
        np.testing.assert_allclose(m.mean, mean, rtol=rel, atol=tiny)
        np.testing.assert_allclose(m.var, var if by_channel else var.mean(), rtol=rel, atol=tiny**2)
        check_stats(m, whole, rel, tiny)
        if by_channel and m.count > 1:
            np.testing.assert_allclose(m.stats(True)[1], of_channels.std(1, ddof=1), rtol=rel, atol=tiny)
    m = whole_moments(x)
    assert m.count == x.numel() and m.mean.shape == m.var.shape == () and m.mean.dtype == m.var.dtype == np.float64
    check_stats(m, whole, rel, tiny)


SHAPES = [(7,), (16, 5), (4, 3, 9), (4, 6, 5, 7), (2, 3, 4, 5, 6), (1, 8, 1, 1), (1, 1), (5, 1, 3, 3)]
KINDS = [torch.half, torch.bfloat16, torch.double]
INPUTS = {
    **{f'of shape {s}': lambda s=s: randn(s)*torch.rand(s[-1])*3 + 0.5 for s in SHAPES},
    'channels last': lambda: randn(4, 6, 5, 7).contiguous(memory_format=torch.channels_last),
    'channels last, 3d': lambda: randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    'permuted': lambda: randn(5, 7, 6, 4).permute(3, 2, 0, 1),
    'strided': lambda: randn(8, 12, 10, 7)[::2, ::2, ::2],
    'expanded': lambda: randn(4, 6, 1, 1).expand(4, 6, 5, 7),
    'flipped view': lambda: randn(4*6*35).view(4, 6, 35).transpose(0, 2),
    'offset': lambda: randn(5, 6, 5, 7)[1:],
    'of a subclass': lambda: TensorImage(torch.rand(4, 3, 8, 8, requires_grad=True)),
    'whose squares overflow': lambda: torch.full((2, 3, 4), 60000.).half() - torch.rand(2, 3, 4).half()*30000,
}
OFF_ZERO = {  # A sum in half precision would be off by percents, or infinite
    **{f'of {kind}': lambda kind=kind: (randn(64, 16, 32, 32) + 3).to(kind) for kind in KINDS},
    'of half, channels last': lambda: (randn(64, 16, 32, 32) + 3).half().contiguous(memory_format=torch.channels_last),
    **{f'off by {by}': lambda by=by: randn(32, 6, 14, 14) + by for by in (1e4, -1e6)},
    'off, channels last': lambda: randn(32, 6, 14, 14).contiguous(memory_format=torch.channels_last) + 1e4,
    'off, linear': lambda: randn(32*6, 14*14) - 1e6,
    'one channel is off': lambda: randn(64, 4, 8, 8) + torch.tensor([0, 0, 5e3, 0]).view(4, 1, 1),
}


@pytest.mark.parametrize('name', [*INPUTS, *OFF_ZERO])
def test_moments_are_those_of_numpy_whichever_dimension_holds_the_channels(name):
    x,rel = (INPUTS[name](),1e-5) if name in INPUTS else (OFF_ZERO[name](),1e-4)
    was = x.clone()
    for dim in range(-x.dim(), x.dim()):
        check(x, dim, rel)
    assert torch.equal(x, was)


@pytest.mark.parametrize('value', [0., 1., -3.7, 1e4])
@pytest.mark.parametrize('shape', [(8, 3, 5, 5), (16, 4)])
def test_constants(value, shape):
    m = channel_moments(torch.full(shape, value))
    np.testing.assert_allclose(m.mean, value, rtol=1e-6)
    assert (m.var <= (1e-6*abs(value))**2).all() and (m.var >= 0).all()


def test_one_element_has_no_std():
    for x in torch.tensor([[2.5]]), torch.tensor(2.5):
        m = channel_moments(x)
        mean, std = m.stats()
        assert mean.item() == 2.5 and np.isnan(std) and m.finite()


@pytest.mark.parametrize('form', FORMS)
def test_what_is_not_finite_is_told_and_what_cannot_be_measured_is_refused(form):
    x = randn(4, 3, 5)
    assert FORMS[form](x).finite()
    for bad in (float('nan'), float('inf')):
        x[1, 2, 3] = bad
        assert not FORMS[form](x).finite()
    with pytest.raises(TypeError, match='complex64'):
        FORMS[form](randn(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r'batches: .*\(0, 3\) is empty'):
        FORMS[form](torch.empty(0, 3))


@pytest.mark.parametrize('x', [randn(8, 75).double()*1e-161, randn(8, 75).double()*1e200, randn(8, 75)*1e30])
def test_numpy_may_raise_for_what_over_or_underflows(x):
    with np.errstate(all='raise'): m = whole_moments(x)
    assert m.mean == pytest.approx(x.mean().item(), rel=1e-5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([*FORMS]), st.integers(0, 999))
def test_pool_is_the_moments_of_all_together(parts, form, seed):
    torch.manual_seed(seed)
    moments = FORMS[form]
    xs = [randn(n, 3, 4, dtype=torch.float64)*(i + 1) + randn(3, 1)*4 for i, n in enumerate(parts)]
    got,want = pool([moments(x) for x in xs]),moments(torch.cat(xs))
    assert got.count == want.count
    for a, b in zip([got.mean, got.var, *got.stats()], [want.mean, want.var, *want.stats()]):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@given(scale=st.floats(-3, 3), seed=st.integers(0, 999), form=st.sampled_from([*FORMS]))
def test_affine_is_the_moments_of_the_scaled_and_shifted(scale, seed, form):
    torch.manual_seed(seed)
    x,shift = randn(5, 3, 4, dtype=torch.float64),randn(1 if form == 'whole' else 3, dtype=torch.float64)
    got,want = FORMS[form](x).affine(scale, shift.squeeze().numpy()),FORMS[form](x*scale + shift[:, None])
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-7, atol=1e-7)
