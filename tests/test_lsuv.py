"`lsuv_init` against the oracle, `layer_stats`, and the models that both refuse."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from fingerprint import fingerprint
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from lesson11 import ConvLayer, LearnableConvLayer, lesson11
from networks import Mod, cnn
from reference import NoEnd, reference_init
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.measure.loops import ORDERS
from fastai_lsuv.start import orthogonal_

SEQUENCES = [*ORDERS, 'mean', 'std mean std', 'mean+std std']


randn = lambda *s: torch.randn(*s, dtype=torch.float64)


# --- the oracle

def mlp(): return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))


def residual():
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.b(F.relu(self.norm(self.a(x))))
        x = F.relu(self.skip(x) + self.d(F.relu(self.c(x))))
        return self.head(x.mean((2, 3)))
    layers = dict(
        head=nn.Linear(16, 4),
        stem=nn.Conv2d(3, 8, 3),
        a=nn.Conv2d(8, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        b=nn.Conv2d(8, 8, 1, bias=False),
        c=nn.Conv2d(8, 16, 3, padding=1),
        d=nn.Conv2d(16, 16, 1),
        skip=nn.Conv2d(8, 16, 1),
    )
    return Mod(forward, **layers)


def in_reverse():
    layers = [nn.Linear(16, 4), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(8, 16)]
    def forward(self, x):
        for l in reversed(self.layers):
            x = F.leaky_relu(l(x), 0.1)
        return x
    return Mod(forward, layers=nn.ModuleList(layers))


def every_conv():
    def forward(self, x, s, v):
        return self.t2(F.relu(self.c2(x))), self.t1(F.relu(self.c1(s))), self.t3(F.relu(self.c3(v)))
    layers = dict(
        t2=nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        c2=nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode='reflect'),
        c1=nn.Conv1d(3, 6, 3, dilation=2),
        t1=nn.ConvTranspose1d(6, 9, 3, groups=3),
        c3=nn.Conv3d(2, 4, 3, stride=2),
        t3=nn.ConvTranspose3d(4, 2, 2),
    )
    return Mod(forward, **layers)


def without_bias():
    first,last = nn.Linear(12, 16, bias=False),nn.Linear(16, 4, bias=False)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), last)


def bilinear():
    def forward(self, x, y): return self.out(F.relu(self.both(x, y)))
    return Mod(forward, both=nn.Bilinear(5, 4, 12), out=nn.Linear(12, 3))


def off_zero():
    "Biases well off zero, and weights of very different size."
    m = mlp()
    for k, l in enumerate((m[0], m[2], m[4])):
        l.bias.data.uniform_(0.2, 1.2)
        l.weight.data *= (0.02, 30, 1)[k]
    return m


NETS = {
    'plain cnn': (lambda: cnn(3, 8, 16, 16), lambda: [randn(8, 3, 12, 12)]),
    'mlp': (mlp, lambda: [randn(64, 12)*3 + 1]),
    'residual': (residual, lambda: [randn(8, 3, 10, 10)]),
    'registered in reverse': (in_reverse, lambda: [randn(32, 8)]),
    'every conv': (every_conv, lambda: [randn(6, 4, 8, 8), randn(6, 3, 20), randn(6, 2, 7, 7, 7)]),
    'without bias': (without_bias, lambda: [randn(32, 12)]),
    'bilinear': (bilinear, lambda: [randn(64, 5), randn(64, 4)]),
    'off zero': (off_zero, lambda: [randn(64, 12)]),
    'tiny inputs': (mlp, lambda: [1e-3*randn(64, 12)]),
    'tokens': (mlp, lambda: [randn(4, 7, 3, 12)]),
}


def assert_same(a, b, close=1e-9):
    "The same weights to float tolerance."
    for (n, p), q in zip(a.named_parameters(), b.parameters()):
        near = close*max(q.abs().max().item(), 1e-3)
        torch.testing.assert_close(p, q, rtol=close, atol=near, msg=lambda m: f'{n}: {m}')


def against_reference(model, batch, order, close=1e-9, modules=None, **kwargs):
    "Initialize two copies of `model`, compare them, and return the report."
    other = deepcopy(model)
    pairs = reference_init(other, *batch, order=order, **({} if modules is None else dict(modules=modules)), **kwargs)
    options = {dict(mean='target_mean', std='target_std').get(k, k): v for k, v in kwargs.items()}
    report = quietly(model, tuple(batch), order=order, preinit=None, modules=modules, **options)
    assert_same(model, other, close)
    assert len(report) == len(pairs)
    if 'per_channel' not in kwargs:
        got,want = torch.tensor(report.pairs),torch.tensor(pairs)
        torch.testing.assert_close(got, want, rtol=max(close, 1e-6), atol=max(close, 2e-6))
    return report


@pytest.mark.parametrize('order', SEQUENCES)
@pytest.mark.parametrize('net', NETS)
def test_same_weights_as_the_oracle(net, order):
    make, batch = NETS[net]
    report = against_reference(make().double(), batch(), order)
    if 'std' in order:
        assert report.ok and report.n_passes == 2


BIASES = {  # Where all are the same the whole output is measured, else each channel
    'all the same': lambda b, i: b.data.fill_(0.3*(i + 1)),
    'same in every other layer': lambda b, i: b.data.fill_(0.3*(i + 1)) if i % 2 else None,
    'one off by a little': lambda b, i: (b.data.fill_(0.7), b.data[-1:].add_(1e-9)),
}

@pytest.mark.parametrize('order', SEQUENCES)
@pytest.mark.parametrize('biases', BIASES)
def test_biases_that_are_and_are_not_alike(biases, order):
    model = NETS['every conv'][0]().double()
    for i, b in enumerate(m.bias for m in model.modules() if getattr(m, 'bias', None) is not None):
        BIASES[biases](b, i)
    against_reference(model, NETS['every conv'][1](), order)


@pytest.mark.parametrize('order', SEQUENCES)
def test_same_weights_as_the_oracle_in_float32(order):
    against_reference(residual(), [torch.randn(8, 3, 10, 10)], order, close=2e-5)
    last = torch.channels_last
    x = torch.randn(8, 3, 12, 12).contiguous(memory_format=last)
    against_reference(cnn(3, 8, 16, 16).to(memory_format=last), [x], order, close=2e-5)


@pytest.mark.parametrize('order', SEQUENCES)
@pytest.mark.parametrize('layer', [ConvLayer, LearnableConvLayer])
def test_lesson_11_has_the_oracles_weights_and_shifts(layer, order, digits):
    model = lesson11(layer)
    other = deepcopy(model)
    pairs = reference_init(other, digits[0], order=order, modules=ConvLayer)
    report = quietly(model, digits[0], order=order, modules=ConvLayer, preinit=None)
    assert_same(model, other, 2e-5)
    shifts = lambda m: torch.tensor([float(l.bias) for l in m if isinstance(l, ConvLayer)])
    torch.testing.assert_close(shifts(model), shifts(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(report.pairs), torch.tensor(pairs), rtol=1e-5, atol=1e-5)
    assert [r.name for r in report] == list('01234')
    if layer is ConvLayer and 'mean' in order:
        assert all(type(l.relu.sub) is float and l.relu.sub != 0 for l in model if isinstance(l, ConvLayer))


@pytest.mark.parametrize('order', SEQUENCES)
@pytest.mark.parametrize('mean, std, tol', [(0.5, 1., 1e-3), (-2., 0.3, 1e-3), (0., 2.5, 0.05), (1., 4., 1e-6)])
def test_targets_and_tolerances(order, mean, std, tol):
    # A ReLU would let nothing through where the mean is at -2.
    model = cnn(3, 8, 16, 16, act=lambda: nn.LeakyReLU(0.2)).double()
    for l in model[::2]:
        l.bias.data *= 0.1  # biases that outweigh the target std are another matter
    report = against_reference(model, [randn(8, 3, 12, 12)], order, mean=mean, std=std, tol=tol)
    if order == 'std mean':
        for r in report:
            assert abs(r.mean - mean) <= tol + 1e-9 and abs(r.std - std) <= tol + 1e-9


@pytest.mark.parametrize('order', SEQUENCES)
@pytest.mark.parametrize('net', ['plain cnn', 'mlp', 'every conv', 'without bias', 'bilinear', 'tokens'])
def test_per_channel_has_the_oracles_weights(net, order):
    make, batch = NETS[net]
    model, batch = make().double(), batch()
    against_reference(model, batch, order, per_channel=True)
    if order != 'std mean': return
    seen = {}
    for n, m in model.named_modules():
        if getattr(m, 'weight', None) is not None:
            m.register_forward_hook(lambda m, a, o: seen.update({m: o}))
    model(*batch)
    for m, o in seen.items():
        o = o.movedim(1 if isinstance(m, nn.modules.conv._ConvNd) else -1, 0).flatten(1)
        assert (o.std(1) - 1).abs().max() < 1.001e-3 and (m.bias is None or o.mean(1).abs().max() < 1.001e-3)


@st.composite
def affine_networks(draw):
    """Random stacks of linear or conv layers.

    Widths, biases, activations, the size of the weights and the number of samples are drawn."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    conv, depth = draw(st.booleans()), draw(st.integers(1, 5))
    widths = draw(st.lists(st.integers(1, 9), min_size=depth + 1, max_size=depth + 1))
    layers = []
    for i, o in zip(widths, widths[1:]):
        bias = draw(st.booleans())
        layer = nn.Conv2d(i, o, 3, padding=1, bias=bias) if conv else nn.Linear(i, o, bias=bias)
        layer.weight.data *= draw(st.sampled_from([1e-2, 1., 50.]))
        if bias:
            layer.bias.data *= draw(st.sampled_from([0., 1.]))
        layers += [layer, draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.Sigmoid, nn.SELU, nn.Identity]))()]
    n = draw(st.integers(2, 33))
    return nn.Sequential(*layers).double(), randn(n, widths[0], 4, 4) if conv else randn(n, widths[0])


@settings(max_examples=150)
@given(affine_networks(), st.sampled_from(SEQUENCES), st.sampled_from([(0., 1.), (0.3, 0.7), (-1., 2.)]))
def test_same_weights_as_the_oracle_on_any_affine_network(net, order, targets):
    model, x = net
    options = dict(order=order, target_mean=targets[0], target_std=targets[1])
    assume('outlier' not in {r.status for r in quietly(deepcopy(model), x, preinit=None, **options)})
    try:
        against_reference(model, [x], order, close=1e-7, mean=targets[0], std=targets[1])
    except NoEnd:
        reject()  # the thread's own loops would run forever: dead activations, biases that outweigh the target


def test_orthogonal_start():
    model, x = cnn(3, 8, 16, 16).double(), randn(8, 3, 12, 12)
    other = deepcopy(model)
    torch.manual_seed(3)
    for l in other[::2]:
        orthogonal_(l)
    w = other[2].weight.flatten(1)
    torch.testing.assert_close(w @ w.T, torch.eye(16, dtype=torch.float64))
    reference_init(other, x)
    torch.manual_seed(3)
    lsuv_init(model, x, preinit='orthogonal')
    assert_same(model, other)


# --- the documents' picture

def test_the_threads_picture(digits):
    "Notebook order leaves the means well off zero. Every other order with both words brings mean and std there."
    start = lambda m: (nn.init.kaiming_normal_(m.weight), nn.init.zeros_(m.bias))  # as the notebook starts
    def pairs(order, layer, seed):
        torch.manual_seed(seed)
        return lsuv_init(lesson11(layer), digits[0], order=order, modules=ConvLayer, preinit=start).pairs
    for layer in (ConvLayer, LearnableConvLayer):
        for seed in range(3):
            for order in ORDERS:
                means, stds = map(torch.tensor, zip(*pairs(order, layer, seed)))
                assert (stds - 1).abs().max() < 1e-3, order
                if order == 'mean std':
                    assert 0.01 < means.abs().min() and means.abs().max() < 0.4, means
                elif 'mean' in order:
                    assert means.abs().max() < 1e-5, order
                else:
                    assert means.min() > 0.4  # variance only: a ReLU's mean stays


def test_where_no_loop_scales_the_mean_decides():
    "The std is left as it is."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = lsuv_init(model, torch.randn(64, 8), order='mean', preinit=None)
    assert report.ok and report.n_passes == 2 and [r.passes for r in report] == [1, 1]
    assert all(abs(r.mean) < 1e-6 and abs(r.std - 1) > 0.1 for r in report)


# --- models that are refused

X = torch.randn(32, 4)


@pytest.mark.parametrize('model, error, says', [
    (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), ValueError, 'no conv, linear or attention layer'),
    (lambda: 'resnet', TypeError, 'torch.nn.Module'),
    (lambda: nn.Linear(4, 4, device='meta'), ValueError, 'meta'),
    (lambda: nn.Linear(4, 4, dtype=torch.complex64), TypeError, 'complex64'),
    (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), TypeError, 'torch.jit'),
    (lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), X), TypeError, 'torch.jit'),
    (lambda: torch.jit.script(nn.Linear(4, 4)), TypeError, 'torch.jit'),
    (lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))), TypeError, 'torch.jit'),
])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_models_that_are_refused(model, error, says):
    model = model()
    for f in (lsuv_init, layer_stats):
        with pytest.raises(error, match=says) as e:
            f(model, X)
        assert str(e.value).startswith('model: ')


def test_complex_activations_are_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), Mod(lambda self, x: self.lin(x + 0j).real, lin=nn.Linear(4, 4)))
    model[1].lin.to(torch.complex64)
    was = fingerprint(model)
    with pytest.raises(TypeError, match="'1.lin'.*complex64"):
        lsuv_init(model, X)
    assert fingerprint(model) == was and lsuv_init(model, X, modules='0').ok


# --- layer_stats

def test_layer_stats_measures_as_the_model_trains_and_changes_nothing():
    head = [nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(8*36, 5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), *head).eval()
    x = torch.randn(16, 3, 10, 10)*4 + 3
    was = fingerprint(model)
    stats = layer_stats(model, x)
    assert fingerprint(model) == was
    outs = {}
    other = deepcopy(model).train()
    other[3].p = 0.
    for k in (0, 4, 6):
        other[k].register_forward_hook(lambda m, a, o, k=k: outs.update({str(k): o.double()}))
    other(x)
    assert [r.name for r in stats] == ['0', '4', '6']
    for r in stats:
        out = outs[r.name]
        assert r.mean == pytest.approx(out.mean().item(), abs=1e-6)
        assert r.std == pytest.approx(out.std().item(), rel=1e-6)
        assert r.status == ('ok' if abs(r.std - 1) <= .1 else 'off')
        assert r.passes == 0 and r.shape == tuple(out.shape)
    assert stats.n_passes == 1 and layer_stats(model, [(x, 0)], n_inp=1, modules='4').pairs == stats.pairs[1:2]


def test_layer_stats_measures_modules_without_a_weight():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(64, 4)
    for row in layer_stats(model, x, modules=[nn.Tanh, nn.Sequential]):
        assert (row.mean, row.std) == pytest.approx((model(x).mean().item(), model(x).std().item()), abs=1e-6)


def test_layer_stats_leaves_frozen_and_tied_layers_to_their_std():
    m = nn.Linear(4, 4).requires_grad_(False)
    m.weight.data = torch.eye(4)
    m.bias.data.zero_()
    assert layer_stats(m, torch.randn(256, 4))[0].status == 'ok'


def test_layer_stats_of_a_model_that_samples_leaves_the_generator_alone():
    net = Mod(lambda self, x: self.lin(x + torch.randn_like(x)), lin=nn.Linear(16, 8))
    was = torch.get_rng_state()
    layer_stats(net, torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), was)
