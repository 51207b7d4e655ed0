"What `ActivationMeter` measures of one tensor, against torch in double precision and against `torch.histc`."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from recording import stats64

from fastai_lsuv.recorder.meter import ActivationMeter

FASTAI = 40, 0., 10.
HARD = {
    'far from zero': lambda: torch.randn(64, 32, 12, 12) + 1000,
    'far from zero, small': lambda: torch.randn(7)*1e-3 + 5,
    'constant': lambda: torch.full((3, 4, 5), 0.1),
    'constant but one': lambda: torch.cat([torch.full((9999,), 3.), torch.tensor([3.001])]),
    'zeros': lambda: torch.zeros(100, 20),
    'huge': lambda: torch.randn(50, 60)*1e25,
    'tiny': lambda: torch.randn(50, 60)*1e-25,
    'several chunks, odd': lambda: torch.randn(2*2**17 + 4321),
    'at the threshold': lambda: torch.tensor([0.05]*3 + [0.050000004, 0.049999997, -1., 0.]),
    'channels last': lambda: torch.randn(4, 30, 9, 7).to(memory_format=torch.channels_last)
                             * torch.arange(1, 31)[:, None, None],
    'transposed': lambda: torch.randn(33, 44).t(),
    'gaps': lambda: torch.randn(20, 30)[::2, 3:17],
    'expanded': lambda: torch.randn(5, 1, 7).expand(5, 6, 7),
    'half': lambda: torch.randn(30, 40).half()*3 + 2,
    'bfloat16': lambda: torch.randn(30, 40).bfloat16(),
    'half, sums overflow': lambda: torch.full((300, 400), 300.).half(),
    'double': lambda: torch.randn(30, 40).double() + 1e6,
    'no dimensions': lambda: torch.tensor(2.),
}
LOSES_DIGITS = 'far from zero, small', 'constant but one'


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64])
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', HARD)
def test_mean_std_and_share_are_exact(name):
    x = HARD[name]()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = ActivationMeter(0.05, FASTAI)(x)
    mean,std,zero = stats64(x)
    scale = max(abs(mean), std if np.isfinite(std) else 0.)
    rel = 2e-5 if name in LOSES_DIGITS else 3e-6
    assert float(m.mean) == pytest.approx(mean, abs=3e-6*scale)
    assert float(m.std) == pytest.approx(std, rel=rel, abs=1e-7*abs(mean), nan_ok=True)
    assert float(m.near_zero) == pytest.approx(zero, abs=1e-7)
    assert m.n == x.numel()
    assert torch.equal(m.hist.double(), (x if x.dtype == torch.float64 else x.float()).histc(*FASTAI).double())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('scale', [1e-3, 0.014, 0.3, 1., 50.])
def test_dead_elements_are_counted_on_the_scale_of_the_layer(scale, dtype):
    x = torch.randn(300, 1001)*scale
    for y in (x, x.relu()*(torch.rand_like(x) < 0.1)):
        threshold = min(0.05, 0.1*y.double().std().item())
        m = ActivationMeter(0.05)(y.to(dtype))
        assert float(m.dead)*m.n == pytest.approx((y <= threshold).sum().item(), abs=3)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_non_finite_activations_are_measured_as_fastai_does(bad, dtype):
    x = torch.cat([torch.linspace(-1, 9, 1001), torch.tensor([bad])]).to(dtype)
    m = ActivationMeter(0.05, FASTAI)(x)
    assert float(m.mean) == pytest.approx(float(x.mean()), nan_ok=True)
    assert np.isnan(float(m.std))
    assert float(m.near_zero) == float(m.dead) == pytest.approx((x <= 0.05).sum().item()/len(x))
    assert m.hist.sum() == ((x >= 0) & (x <= 10)).sum()


def test_one_meter_measures_layers_of_all_sizes_with_any_default_dtype(default_dtype):
    meter = ActivationMeter(0.05, FASTAI)
    for n in (7, 2**18, 1, 2**20 + 3, 8, 5):
        x = torch.randn(n, dtype=torch.float32)*4
        m,(mean,std,_) = meter(x),stats64(x)
        assert torch.equal(m.hist.to(x), x.histc(*FASTAI))
        assert m.near_zero == (x <= 0.05).sum().item()/n and m.mean == pytest.approx(mean, abs=1e-5)
        assert m.std == pytest.approx(std, rel=1e-5, nan_ok=True)


def histogram(x, bins): return ActivationMeter(0., bins)(x).hist


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(-6, 6), st.integers(1, 40), st.integers(1, 700), st.integers(0, 10**6))
def test_histogram_counts_as_histc(bins, lo, width, n, seed):
    g,hi = torch.Generator().manual_seed(seed),lo + width
    x = torch.randn(n, generator=g)*width + lo
    x[::3] = (x[::3]*2).round()/2  # exact ties, on edges among them
    x[:2] = torch.tensor([hi, lo], dtype=torch.float32)[:n]
    ours,theirs = histogram(x, (bins, float(lo), float(hi))),x.histc(bins, lo, hi)
    assert ours.sum() == theirs.sum() == ((x >= lo) & (x <= hi)).sum()
    # `histc` multiplies and divides, we multiply: an element within rounding of an edge may fall on either side.
    if np.log2(bins/width) % 1 == 0: assert torch.equal(ours.float(), theirs)
    at = (x.double()-lo)*bins/width
    assert (ours - theirs).abs().sum() <= 2*((at - at.round()).abs() < 1e-4).sum()


@pytest.mark.parametrize('bins', [(40, 100., 100.001), (200, 1e6, 1e6+1), (40, 1e6, 1e6+.01), (40, 100., 101.),
                                  (50, 10., 10.000301), (1, 126.99738921802668, 126.99742424652354),
                                  (127, 10000., 10000.73), (7, -7.3, -7.299985620754372)])
def test_bins_far_from_zero(bins):
    x = bins[1] + torch.randn(10000)*(bins[2] - bins[1])
    assert torch.equal(histogram(x, bins).float(), x.histc(*bins))


def test_samples_agree_within_the_standard_error_that_the_docs_state():
    k,n,errors = 4,64,[]
    for _ in range(60):
        # Samples differ from each other in their means and in their scales.
        x = torch.randn(n, 4200)*(1 + torch.rand(n, 1)) + torch.randn(n, 1)
        m,mean,std = ActivationMeter(0.05, sample=k)(x),x.mean().item(),x.std().item()
        s,q = x.mean(1).std().item(),(x-mean).square().mean(1).std().item()
        factor = ((k-1)/n)**0.5
        errors.append([(m.mean-mean)/(s*factor), (m.std-std)/(q*factor/(2*std))])
    rms = np.sqrt(np.mean(np.square(errors), 0))
    assert (abs(rms - 1) < 0.25).all(), rms
    assert np.abs(errors).max() < 4.5
