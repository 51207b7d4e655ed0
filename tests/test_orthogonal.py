"Random orthonormal matrices: exact, the same in every block, and like Haar's."
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torch import nn

from fastai_lsuv.start import orthogonal_, orthonormal

SMALL = [(1, 1), (2, 2), (1, 9), (9, 1), (64, 27), (31, 31), (64, 64), (10, 4096)]  # By QR
LARGE = [(128, 128), (127, 127), (64, 576), (576, 64), (2048, 512), (101, 1009), (256, 2304)]  # By rounds
GROUPED = [(9, 5, 1), (12, 30, 3), (384, 128, 3), (1500, 130, 2), *((*size, 1) for size in LARGE)]


def seeded(*args, seed=0, **kwargs):
    "The matrix from a fixed seed."
    torch.manual_seed(seed)
    return orthonormal(*args, **kwargs)


def by_torch(rows, cols, seed=0):
    "What torch makes of the same seed: Haar's distribution."
    torch.manual_seed(seed)
    return nn.init.orthogonal_(torch.empty(rows, cols))


def error(q):
    "The largest deviation of the Gram matrix from the identity, of the rows or of the columns, whichever are fewer."
    q = q.double() if len(q) <= q.shape[1] else q.double().T
    return (q @ q.T - torch.eye(len(q), dtype=torch.double)).abs().max().item()


# --- exact

@pytest.mark.parametrize('dtype,close', [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize('rows,cols,groups', [*((*size, 1) for size in SMALL), *GROUPED])
def test_rows_or_columns_of_each_group_are_orthonormal(rows, cols, groups, dtype, close):
    q = seeded(rows, cols, groups=groups, dtype=dtype)
    assert q.shape == (rows, cols) and q.dtype == dtype and all(error(part) < close for part in q.chunk(groups))
    assert groups == 1 or not torch.allclose(*q.chunk(groups)[:2])
    assert rows*cols == 1 or not torch.allclose(q, seeded(rows, cols, groups=groups, dtype=dtype, seed=1))


@pytest.mark.parametrize('rows,cols', SMALL)
def test_small_ones_are_those_of_torch(rows, cols): assert torch.equal(seeded(rows, cols), by_torch(rows, cols))


def test_no_rows_and_no_columns():
    assert orthonormal(0, 4).shape == (0, 4) and orthonormal(4, 0).shape == (4, 0)
    assert orthonormal(300, 400, start=7, stop=7).shape == (0, 400)


@pytest.mark.parametrize('shape', [(20, 30), (128, 128), (576, 64)])
@pytest.mark.parametrize('kind', [torch.half, torch.bfloat16])
def test_half_precision_is_rounded_at_the_end(shape, kind):
    assert torch.equal(seeded(*shape, dtype=kind), seeded(*shape).to(kind))


# --- the same whatever is asked for

@pytest.mark.parametrize('rows,cols,groups', GROUPED)
def test_a_block_is_cut_out_of_the_whole_and_leaves_the_same_state(rows, cols, groups):
    whole,after = seeded(rows, cols, groups=groups),torch.rand(3)
    for start, stop, left, right in [(0, 1, 0, cols), (rows//3, rows//2 + 1, 0, cols), (0, rows, cols//3, cols - 1),
                                     (rows//4, rows, cols//3, cols//2 + 1), (rows, rows, 0, cols)]:
        block = seeded(rows, cols, groups=groups, start=start, stop=stop, left=left, right=right)
        assert torch.equal(torch.rand(3), after)
        torch.testing.assert_close(block, whole[start:stop, left:right], atol=2e-7, rtol=0)


@pytest.mark.parametrize('shape', [(40, 60), (128, 130)])
@pytest.mark.parametrize('context', [lambda: torch.autocast('cpu'), torch.inference_mode, torch.no_grad])
def test_contexts_and_defaults_make_no_difference(shape, context):
    want,precision = seeded(*shape),torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        torch.set_default_dtype(torch.float64)
        with context(): q = seeded(*shape)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(q, want) and not q.requires_grad


def test_without_a_fourier_transform_it_is_by_qr(monkeypatch):
    def rfft(*args): raise RuntimeError('fft: not supported on this device')
    monkeypatch.setattr(torch.fft, 'rfft', rfft)
    assert torch.equal(seeded(128, 130, start=5), by_torch(128, 130)[5:])


@pytest.mark.parametrize('layer', [nn.Linear(130, 128), nn.Conv2d(64, 64, 3), nn.Conv2d(256, 256, 1, groups=2),
                                   nn.ConvTranspose2d(128, 32, 2), nn.Linear(130, 128).bfloat16()], ids=str)
def test_layers_get_them(layer):
    torch.manual_seed(5)
    orthogonal_(layer)
    w = layer.weight.detach()
    want = seeded(len(w), w[0].numel(), groups=getattr(layer, 'groups', 1), dtype=w.dtype, seed=5)
    assert torch.equal(w.flatten(1), want) and not layer.bias.any()


# --- like Haar's

def normalized(draw, rows, cols, count=4):
    "Some matrices, wide, whose entries have variance 1."
    q = torch.stack([draw(rows, cols, seed=seed) for seed in range(count)])
    return (q if rows <= cols else q.mT)*max(rows, cols)**.5


@pytest.mark.parametrize('rows,cols', LARGE)
def test_moments_spectra_and_correlations_are_those_of_haars(rows, cols):
    "Entries are nearly normal, with a kurtosis of 3n/(n + 2). The squares of two rows have a correlation of -1/n."
    z,haars = normalized(seeded, rows, cols),normalized(by_torch, rows, cols)
    n,some = z.shape[-1],torch.randperm(z.numel())[:200_000]
    for power, want in (1, 0), (2, 1), (3, 0), (4, 3*n/(n + 2)):
        assert z.pow(power).mean().item() == pytest.approx(want, abs=4*(96/z.numel())**.5)
    own = z.flatten()[some].numpy()
    assert kstest(own, 'norm').pvalue > .01 and ks_2samp(own, haars.flatten()[some].numpy()).pvalue > .01
    c = torch.stack([torch.corrcoef(m) for m in z[:, :64].square()])
    c = c[c < .999]
    assert abs(c.mean() + 1/n) < .07*n**-.5 and (c*n**.5).std().item() == pytest.approx(1, abs=.07)
    # The same at the shift where it is largest: two rounds alone make rows whose squares are alike up to a shift.
    waves = [torch.fft.rfft(nn.functional.normalize(q[:, :64].square() - 1, dim=-1)) for q in (z, haars)]
    own,want = (torch.fft.irfft(w[:, ::2]*w[:, 1::2].conj(), n).abs().amax(-1).mean() for w in waves)
    assert own < 1.05*want
    # Singular values of a quarter of the matrix, whose rows and columns follow each other.
    values = [torch.linalg.svdvals(q[:, 8:8 + q.shape[1]//2, :n//2]).mean(0)/n**.5 for q in (z, haars)]
    torch.testing.assert_close(*values, atol=.04, rtol=0)
