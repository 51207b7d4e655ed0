"Random orthonormal matrices: exact, sliceable, and like Haar's."
import math

import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_lsuv.start import orthogonal
from fastai_lsuv.start.orthogonal import Deck, orthonormal
from fastai_lsuv.start.preinit import orthogonal_

SMALL = [(1, 1), (2, 2), (1, 9), (9, 1), (64, 27), (31, 31), (64, 64), (10, 4096)]  # By QR
LARGE = [(128, 128), (127, 127), (256, 256), (64, 576), (576, 64), (2048, 512), (101, 1009)]  # By Fourier transforms
# From tiles of 512x512, 512x512, 256x256, 64x512, 1024x128 and 2048x64
TILED = [(512, 1024), (1024, 512), (256, 2304), (64, 8192), (4096, 128), (8192, 64)]


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

@pytest.mark.parametrize('rows,cols', SMALL + LARGE + TILED)
def test_rows_or_columns_are_orthonormal(rows, cols):
    q = seeded(rows, cols)
    assert q.shape == (rows, cols) and q.dtype == torch.float32 and error(q) < 2e-6
    assert error(seeded(rows, cols, dtype=torch.float64)) < 1e-13


@pytest.mark.parametrize('rows,cols', SMALL)
def test_small_ones_are_those_of_torch(rows, cols): assert torch.equal(seeded(rows, cols), by_torch(rows, cols))


@pytest.mark.parametrize('n', range(1, 13))
def test_rounds_are_exact_at_every_size(n, monkeypatch):
    monkeypatch.setattr(orthogonal, '_SMALL', 0)
    q = seeded(n, n, dtype=torch.float64)
    assert error(q) < 1e-14 and (n < 3 or not torch.allclose(q, seeded(n, n, dtype=torch.float64, seed=1)))


def test_no_rows_and_no_columns():
    assert orthonormal(5, 0, deck=Deck([(5, 0)]*2)).shape == (5, 0)
    assert orthonormal(0, 4).shape == (0, 4) and orthonormal(4, 0).shape == (4, 0)
    assert orthonormal(300, 400, start=7, stop=7).shape == (0, 400)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shape', [(20, 30), (128, 128)])
def test_half_precision_is_rounded_at_the_end(dtype, shape):
    q = seeded(*shape, dtype=dtype)
    assert q.dtype == dtype and torch.equal(q, seeded(*shape).to(dtype))


# --- slices, groups, chunks

@pytest.mark.parametrize('rows,cols,groups', [(9, 5, 1), (12, 30, 3), *((*s, 1) for s in LARGE + TILED), (384, 128, 3)])
def test_slices_put_together_are_the_whole(rows, cols, groups):
    whole,after = seeded(rows, cols, groups=groups),torch.rand(3)
    cuts = 0,1,rows//3,rows//2 + 1,rows
    parts = []
    for start, stop in zip(cuts, cuts[1:]):
        parts.append(seeded(rows, cols, groups=groups, start=start, stop=stop))
        assert torch.equal(torch.rand(3), after)
    assert [len(p) for p in parts] == [b - a for a, b in zip(cuts, cuts[1:])]
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-7, rtol=0)
    assert not torch.allclose(orthonormal(rows, cols, groups=groups), whole)


@pytest.mark.parametrize('rows,cols,groups', [(9, 5, 1), (12, 30, 3), *((*s, 1) for s in LARGE + TILED), (384, 128, 3)])
def test_a_block_is_cut_out_of_the_whole(rows, cols, groups):
    whole,after = seeded(rows, cols, groups=groups),torch.rand(3)
    start,stop,left,right = rows//4,rows//2 + 1,cols//3,cols - 1
    block = seeded(rows, cols, groups=groups, start=start, stop=stop, left=left, right=right)
    assert torch.equal(torch.rand(3), after)
    torch.testing.assert_close(block, whole[start:stop, left:right], atol=2e-7, rtol=0)


@pytest.mark.parametrize('rows,cols', [(4, 9), (9, 4), (128, 130)])
def test_each_group_is_a_matrix_of_its_own(rows, cols):
    q = seeded(3*rows, cols, groups=3)
    assert all(error(part) < 2e-6 for part in q.chunk(3)) and not torch.allclose(q[:rows], q[rows:2*rows])


@pytest.mark.parametrize('kwargs,message', [
    (dict(start=-1), '-1:6'), (dict(stop=7), '0:7'), (dict(start=3, stop=2), '3:2'),
    (dict(left=2, right=5), 'columns 2:5'), (dict(groups=4), '6 rows.*4 g')])
def test_what_it_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message): orthonormal(6, 4, **kwargs)


class Largest(TorchDispatchMode):
    "The most numbers that an operation puts out, a complex one being two."
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor): self.numbers = max(self.numbers, out.numel()*(1 + out.is_complex()))
        return out


@pytest.mark.parametrize('rows,cols,stop', [(4096, 4096, 8), (4096, 1024, 8), (1024, 4096, None)])
def test_memory_is_a_chunk_or_a_tile_besides_the_result(rows, cols, stop):
    with Largest() as largest: q = orthonormal(rows, cols, stop=stop)
    tile = orthogonal._tile(rows, cols)
    tiles = math.prod(tile) if tile != (rows, cols) else 0
    assert largest.numbers <= max(q.numel(), tiles, 1.1*orthogonal._CHUNK) < rows*cols + (stop is None)


@pytest.mark.parametrize('rows,cols', [(128, 200), (200, 128)])
def test_chunks_do_not_show(rows, cols, monkeypatch):
    whole = seeded(rows, cols)
    monkeypatch.setattr(orthogonal, '_CHUNK', 1000)
    torch.testing.assert_close(seeded(rows, cols), whole, atol=2e-7, rtol=0)


# --- wherever it is drawn

@pytest.mark.parametrize('shape', [(40, 60), (128, 130)])
@pytest.mark.parametrize('context', [lambda: torch.autocast('cpu', torch.bfloat16), torch.inference_mode, torch.no_grad,
                                     torch.enable_grad], ids=['autocast', 'inference', 'no_grad', 'enable_grad'])
def test_contexts_make_no_difference(shape, context):
    with context(): q = seeded(*shape)
    assert torch.equal(q, seeded(*shape)) and not q.requires_grad


def test_narrow_products_and_other_defaults_make_no_difference():
    want,precision = seeded(128, 130),torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        torch.set_default_dtype(torch.float64)
        assert torch.equal(seeded(128, 130), want)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)


def test_without_a_fourier_transform_it_is_by_qr(monkeypatch):
    def rfft(*args): raise RuntimeError('fft: not supported on this device')
    monkeypatch.setattr(torch.fft, 'rfft', rfft)
    assert torch.equal(seeded(128, 130), by_torch(128, 130))
    assert torch.equal(seeded(128, 130, start=5, stop=50), by_torch(128, 130)[5:50])


@pytest.mark.parametrize('layer', [nn.Linear(130, 128), nn.Conv2d(64, 64, 3), nn.Conv2d(256, 256, 1, groups=2),
                                   nn.ConvTranspose2d(128, 32, 2), nn.Linear(130, 128).bfloat16()], ids=str)
def test_layers_get_them(layer):
    torch.manual_seed(5)
    orthogonal_(layer)
    groups,w = getattr(layer, 'groups', 1),layer.weight.detach()
    want = seeded(len(w), w[0].numel(), groups=groups, dtype=w.dtype, seed=5)
    assert torch.equal(w.flatten(1), want) and not layer.bias.any()


# --- like Haar's

STATISTICS = [(128, 128), (127, 127), (64, 576), (512, 512), (512, 128), (101, 1009), (64, 4096), *TILED]


def normalized(draw, rows, cols, count=4):
    "Some matrices, wide, whose entries have variance 1."
    q = torch.stack([draw(rows, cols, seed=seed) for seed in range(count)])
    return (q if rows <= cols else q.mT)*max(rows, cols)**.5


@pytest.mark.parametrize('rows,cols', STATISTICS)
def test_entries_are_distributed_as_haars(rows, cols):
    "Entries of Haar's are nearly normal, with a kurtosis of 3n/(n + 2)."
    z = normalized(seeded, rows, cols)
    n,size = z.shape[-1],z.numel()
    for power, want in (1, 0), (2, 1), (3, 0), (4, 3*n/(n + 2)):
        assert z.pow(power).mean().item() == pytest.approx(want, abs=4*(96/size)**.5)
    some = torch.randperm(size)[:size*max(orthogonal._tile(rows, cols))//n]  # each number comes in each tile
    own,haars = (of.flatten()[some].numpy() for of in (z, normalized(by_torch, rows, cols)))
    assert kstest(own, 'norm').pvalue > .01 and ks_2samp(own, haars).pvalue > .01
    assert z.abs().max() < (2*torch.tensor(size).log()).sqrt() + 1


def test_every_entry_has_the_same_variance():
    z = normalized(seeded, 104, 104, count=400)
    variance,kurtosis = z.square().mean(0),104*3/106
    assert abs(variance - 1).max() < 5.5*((kurtosis - 1)/400)**.5


def likeness(z):
    "The correlation of the squares of two rows at the shift where it is largest: the mean over pairs."
    e = z[:, :64].square() - 1
    e = e/torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    f = torch.fft.rfft(e)
    return torch.fft.irfft(f[:, ::2]*f[:, 1::2].conj(), z.shape[-1]).abs().amax(-1).mean().item()


@pytest.mark.parametrize('rows,cols', STATISTICS)
def test_squares_of_rows_are_as_unlike_as_haars(rows, cols):
    assert likeness(normalized(seeded, rows, cols)) < 1.05*likeness(normalized(by_torch, rows, cols))


@pytest.mark.parametrize('rows,cols', STATISTICS)
def test_squares_in_a_column_are_uncorrelated(rows, cols):
    """Haar's have a correlation of -1/n, with a deviation of n**-.5. In tiles of length k, it is -1/k.

    Of tiles one below the other, columns that stay together have that of one tile, with a deviation of k**-.5."""
    n,k = (max(size) for size in [(rows, cols), orthogonal._tile(rows, cols)])
    together = (orthogonal._run(cols) - 1)/(cols - 1) if rows > cols else 0.
    c = torch.stack([torch.corrcoef(m) for m in normalized(seeded, rows, cols)[:, :64].square()])
    c = c[c < .999]
    deviation = (1 + together*(n/k - 1))**.5
    assert abs(c.mean() + 1/k) < .07*n**-.5 and (c*n**.5).std().item() == pytest.approx(deviation, abs=.07)
    assert deviation < 1.1


@pytest.mark.parametrize('rows,cols', STATISTICS)
def test_singular_values_of_blocks_are_those_of_haars(rows, cols):
    "Of a quarter of the matrix whose rows and columns follow each other."
    def values(draw):
        q = normalized(draw, rows, cols)/max(rows, cols)**.5
        return torch.linalg.svdvals(q[:, 8:8 + min(rows, cols)//2, :q.shape[-1]//2])
    ours,haars = values(seeded),values(by_torch)
    assert (ours.mean(0) - haars.mean(0)).abs().max() < .04


@pytest.mark.parametrize('n', [128, 127])
def test_spectrum_of_a_product_of_ten(n):
    "Of ten whole matrices: angles of eigenvalues, evenly spread. Of ten with half of their columns: singular values."
    def values(draw):
        angles,logs = [],[]
        for seed in range(6):
            q = torch.stack([draw(n, n, seed=100*seed + i) for i in range(10)])
            angles.append(torch.linalg.eigvals(torch.linalg.multi_dot(list(q))).angle().sort()[0])
            logs.append(torch.linalg.svdvals(torch.linalg.multi_dot(list(q[:, :n//2, :n//2].double())))[:n//4].log())
        angles = torch.stack(angles)
        return angles,angles.diff().flatten().numpy(),torch.stack(logs).mean(0)
    (angles, gaps, logs),(_, haars_gaps, haars_logs) = values(seeded),values(by_torch)
    even = torch.linspace(-torch.pi, torch.pi, n + 1)[:-1] + torch.pi/n
    assert (angles - even).abs().max() < 10*torch.pi/n
    assert ks_2samp(gaps, haars_gaps).pvalue > .01
    torch.testing.assert_close(logs, haars_logs, atol=.25, rtol=0)


@pytest.mark.parametrize('rows, cols', [(16, 8), (300, 200), (200, 3000)])
def test_the_same_matrix_is_drawn_into_memory_that_is_given(rows, cols):
    torch.manual_seed(3)
    want = orthonormal(rows, cols)
    torch.manual_seed(3)
    out = torch.full((rows, cols), 7.)
    assert orthonormal(rows, cols, out=out) is out and torch.equal(out, want)


# --- Dealt again

def dealt(rows, cols, n, seed=0, **kwargs):
    "A matrix, and `n` that are dealt from it."
    deck = Deck([(rows, cols)]*(n + 1))
    torch.manual_seed(seed)
    return [orthonormal(rows, cols, deck=deck, **kwargs) for _ in range(n + 1)], deck


@pytest.mark.parametrize('rows, cols', [(1, 1), (3, 3), (32, 48), (48, 32), *LARGE, *TILED])
def test_a_dealt_matrix_is_orthonormal(rows, cols):
    (first, *others), deck = dealt(rows, cols, 3)
    for q in others:
        gram = q @ q.T if rows <= cols else q.T @ q
        assert torch.allclose(gram, torch.eye(len(gram)), atol=2e-6)
        assert torch.equal(q.abs().flatten().sort()[0], first.abs().flatten().sort()[0])
    assert not deck.kept  # nothing is kept that does not come again


@pytest.mark.parametrize('rows, cols', [(48, 32), (64, 576), (576, 64)])
def test_a_slice_of_a_dealt_matrix_is_that_of_the_whole(rows, cols):
    whole,_ = dealt(rows, cols, 2)
    state = torch.get_rng_state()
    parts,_ = dealt(rows, cols, 2, start=5, stop=17)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q[5:17]) for p, q in zip(parts, whole))


def test_dealt_matrices_are_as_free_of_each_other_as_independent_ones():
    "The spectra of sums, and of products with masks between them, are Haar's; squares do not correlate."
    n = 128

    def spectra(matrices):
        p = torch.eye(n)
        for k, m in enumerate(matrices): p = m @ (p*(torch.arange(n) % 4 != k % 4)[:, None])
        levels = torch.tensor([.25, .5, .75, .95])
        squares = torch.corrcoef(torch.stack([m.square().flatten() for m in matrices]))
        sums = torch.quantile(torch.linalg.svdvals(matrices[0] + matrices[1]), levels)
        return sums, torch.quantile(torch.linalg.svdvals(p), levels), squares[~torch.eye(len(squares), dtype=bool)]

    torch.manual_seed(0)
    haar = [spectra([nn.init.orthogonal_(torch.empty(n, n)) for _ in range(6)]) for _ in range(16)]
    found = [spectra(dealt(n, n, 5, seed)[0]) for seed in range(16)]
    for k in range(2):
        want,got = (torch.stack([s[k] for s in of]).mean(0) for of in (haar, found))
        assert torch.allclose(got, want, atol=0.05)
    assert torch.cat([s[2] for s in found]).abs().max() < 5/n
    same = [nn.init.orthogonal_(torch.empty(n, n))]*2
    assert not torch.allclose(spectra(same)[0], torch.stack([h[0] for h in haar]).mean(0), atol=0.05)


def test_matrices_of_the_same_tiles_are_as_free_of_each_other_as_independent_ones(monkeypatch):
    "The spectra of sums, and of products of wide and tall ones with masks between them, are Haar's."
    n,many,levels = 128,384,torch.tensor([.25, .5, .75, .95])
    monkeypatch.setattr(orthogonal, '_LARGE', n*many)

    def spectra(draw):
        p,mask = torch.eye(n),(torch.arange(many) % 4 > 0)[:, None]
        for _ in range(3): p = draw(n, many) @ (mask*(draw(many, n) @ p))
        pairs = draw(n, many) + draw(n, many), draw(many, n) + draw(many, n), p
        return torch.stack([torch.quantile(torch.linalg.svdvals(m), levels) for m in pairs])

    def laid(sizes=[(n, many), (many, n)]*5):
        deck = Deck(sizes)
        found = spectra(lambda *size: orthonormal(*size, deck=deck))
        assert not deck.kept
        return found

    torch.manual_seed(0)
    haar = torch.stack([spectra(lambda *size: nn.init.orthogonal_(torch.empty(size))) for _ in range(6)]).mean(0)
    assert torch.allclose(torch.stack([laid() for _ in range(6)]).mean(0), haar, atol=.05)


@pytest.mark.parametrize('rows, cols', TILED)
def test_no_tile_shows(rows, cols):
    "Half of a matrix, and a tile's worth of it, have the singular values of Haar's. No two rows are alike."
    k = max(orthogonal._tile(rows, cols))

    def values(draw, part):
        m = draw(rows, cols)
        return torch.linalg.svdvals(m[:, :part] if rows <= cols else m[:part])

    for part in k, max(rows, cols)//2:
        torch.testing.assert_close(values(seeded, part), values(by_torch, part), atol=.1, rtol=0)
    for q in seeded(rows, cols), seeded(rows, cols).T:
        squares = torch.corrcoef(q[:3000].square()).fill_diagonal_(0.)
        assert squares.max() < .9


def test_a_deck_keeps_what_comes_again_and_is_not_too_large(monkeypatch):
    deck = Deck([(8, 8), (8, 8), (4, 8), (64, 64), (64, 64)])
    monkeypatch.setattr('fastai_lsuv.start.orthogonal._MOST_KEPT', 64)
    for shape in [(8, 8), (4, 8), (64, 64), (5, 5)]: orthonormal(*shape, deck=deck)
    assert [tuple(k[:2]) for k in deck.kept] == [(8, 8)]
    orthonormal(8, 8, deck=deck)
    assert not deck.kept


@pytest.mark.parametrize('rows, cols', [(32, 2**15), (2**15, 32), (2**19, 2), (2**14, 2**15)])
def test_too_few_rows_or_too_many_numbers_are_no_tile(rows, cols): assert orthogonal._tile(rows, cols) == (rows, cols)


def test_a_deck_keeps_one_tile_for_matrices_of_several_sizes():
    deck = Deck([(512, 1024), (1024, 512), (512, 1536), (512, 768)])
    for shape in [(512, 1024), (512, 768), (1024, 512)]:
        orthonormal(*shape, deck=deck)
        assert [tuple(k[:2]) for k in deck.kept] == [(512, 512)]
    orthonormal(512, 1536, deck=deck)
    assert not deck.kept
