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
from networks import NETWORKS, Mod, cnn
from reference import NoEnd, reference_init
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.measure.loops import ORDERS
from fastai_lsuv.start import orthogonal_

SEQUENCES = [*ORDERS, 'mean', 'std mean std', 'mean+std std']
every_order = pytest.mark.parametrize('order', SEQUENCES)


# --- the oracle

def mlp(bias=True):
    first,last = nn.Linear(12, 32, bias=bias),nn.Linear(32, 5, bias=bias)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), last)


def leaky():
    "Lets something through where the mean is at -2. Biases that outweigh the target std are another matter."
    model = cnn(3, 8, 16, 16, act=lambda: nn.LeakyReLU(0.2))
    for l in model[::2]: l.bias.data *= 0.1
    return model


def with_biases(fill):
    "Where all biases are the same the whole output is measured, else each channel."
    model,batch = NETWORKS['hand/conv1d_transposed_3d']()
    for i, b in enumerate(m.bias for m in model.modules() if getattr(m, 'bias', None) is not None): fill(b.data, i)
    return model,batch


def one_off(b, i):
    b.fill_(0.7)
    b[-1:] += 1e-7


def residual():
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.b(F.relu(self.norm(self.a(x))))
        x = F.relu(self.skip(x) + self.d(F.relu(self.c(x))))
        return self.head(x.mean((2, 3)))
    first = dict(head=nn.Linear(16, 4), stem=nn.Conv2d(3, 8, 3))
    branch = dict(a=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8), b=nn.Conv2d(8, 8, 1, bias=False))
    wider = dict(c=nn.Conv2d(8, 16, 3, padding=1), d=nn.Conv2d(16, 16, 1), skip=nn.Conv2d(8, 16, 1))
    return Mod(forward, **first, **branch, **wider)


NETS = {
    'plain cnn': lambda: (cnn(3, 8, 16, 16), torch.randn(8, 3, 12, 12)),
    'channels last': lambda: [o.to(memory_format=torch.channels_last) for o in NETS['plain cnn']()],
    'leaky cnn': lambda: (leaky(), torch.randn(8, 3, 12, 12)),
    'mlp': lambda: (mlp(), 3*torch.randn(64, 12) + 1),
    'residual': lambda: (residual(), torch.randn(8, 3, 10, 10)),
    'registered in reverse': NETWORKS['hand/registered_in_reverse'],
    'every conv': NETWORKS['hand/conv1d_transposed_3d'],
    'biases all the same': lambda: with_biases(lambda b, i: b.fill_(0.3*(i + 1))),
    'biases the same in every other layer': lambda: with_biases(lambda b, i: b.fill_(0.3*(i + 1)) if i % 2 else None),
    'one bias off by a little': lambda: with_biases(one_off),
    'grouped convs': NETWORKS['hand/grouped_depthwise'],
    'without bias': lambda: (mlp(bias=False), torch.randn(32, 12)),
    'bilinear': NETWORKS['hand/bilinear'],
    'tiny inputs': lambda: (mlp(), 1e-3*torch.randn(64, 12)),
    'tokens': lambda: (mlp(), torch.randn(4, 7, 3, 12)),
}


def in_double(net):
    "The model, and its inputs."
    model,batch = NETS[net]()
    return model.double(), [x.double() for x in (batch if isinstance(batch, tuple) else (batch,))]


def against_reference(model, batch, order, close=1e-9, **kwargs):
    "Initialize two copies of `model`, compare weights and pairs to float tolerance, and return report and oracle."
    oracle = deepcopy(model)
    pairs = reference_init(oracle, *batch, order=order, **kwargs)
    options = {dict(mean='target_mean', std='target_std').get(k, k): v for k, v in kwargs.items()}
    report = quietly(model, tuple(batch), order=order, preinit=None, **options)
    for (n, p), q in zip(model.named_parameters(), oracle.parameters()):
        near = close*max(q.abs().max().item(), 1e-3)
        torch.testing.assert_close(p, q, rtol=close, atol=near, msg=lambda m: f'{n}: {m}')
    assert len(report) == len(pairs)
    if 'per_channel' not in kwargs:
        for pair, of_oracle in zip(report.pairs, pairs):
            assert pair == pytest.approx(of_oracle, rel=max(close, 1e-6), abs=max(close, 2e-6))
    return report,oracle


@every_order
@pytest.mark.parametrize('net', NETS)
def test_same_weights_as_the_oracle(net, order):
    report,_ = against_reference(*in_double(net), order)
    if 'std' in order: assert report.ok and report.n_passes == 2


@every_order
@pytest.mark.parametrize('net', ['residual', 'channels last'])
def test_same_weights_as_the_oracle_in_float32(net, order):
    model,x = NETS[net]()
    against_reference(model, [x], order, close=2e-5)


@every_order
@pytest.mark.parametrize('net', ['plain cnn', 'mlp', 'every conv', 'grouped convs', 'without bias', 'bilinear',
                                 'tokens'])
def test_per_channel_has_the_oracles_weights(net, order):
    against_reference(*in_double(net), order, per_channel=True)


@every_order
@pytest.mark.parametrize('mean, std, tol', [(0.5, 1., 1e-3), (-2., 0.3, 1e-3), (0., 2.5, 0.05), (1., 4., 1e-6)])
def test_targets_and_tolerances(mean, std, tol, order):
    report,_ = against_reference(*in_double('leaky cnn'), order, mean=mean, std=std, tol=tol)
    if order == 'std mean': assert all(p == pytest.approx((mean, std), rel=0, abs=tol + 1e-9) for p in report.pairs)


@every_order
@pytest.mark.parametrize('layer', [ConvLayer, LearnableConvLayer])
def test_lesson_11_has_the_oracles_weights_and_shifts(layer, order, digits):
    model = lesson11(layer)
    report,oracle = against_reference(model, digits[:1], order, close=2e-5, modules=ConvLayer)
    shifts,wanted = ([float(l.bias) for l in m[:5]] for m in (model, oracle))
    assert shifts == pytest.approx(wanted, rel=1e-5, abs=1e-5) and [r.name for r in report] == list('01234')
    if layer is ConvLayer and 'mean' in order: assert all(type(l.relu.sub) is float and l.relu.sub for l in model[:5])


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
        if bias: layer.bias.data *= draw(st.sampled_from([0., 1.]))
        layers += [layer, draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.Sigmoid, nn.SELU, nn.Identity]))()]
    shape = draw(st.integers(2, 33)), widths[0], *[4, 4]*conv
    return nn.Sequential(*layers).double(), torch.randn(shape, dtype=torch.float64)


@settings(max_examples=150)
@given(affine_networks(), st.sampled_from(SEQUENCES), st.sampled_from([(0., 1.), (0.3, 0.7), (-1., 2.)]))
def test_same_weights_as_the_oracle_on_any_affine_network(net, order, targets):
    (model, x),(mean, std) = net,targets
    report = quietly(deepcopy(model), x, preinit=None, order=order, target_mean=mean, target_std=std)
    assume('outlier' not in {r.status for r in report})
    try: against_reference(model, [x], order, close=1e-7, mean=mean, std=std)
    except NoEnd: reject()  # dead activations, or biases that outweigh the target: the thread's loops would never end


def test_the_orthogonal_start_has_orthonormal_rows_and_then_the_oracles_weights():
    model,x = in_double('plain cnn')
    oracle = deepcopy(model)
    torch.manual_seed(3)
    for l in oracle[::2]: orthogonal_(l)
    w = oracle[2].weight.flatten(1)
    torch.testing.assert_close(w @ w.T, torch.eye(16, dtype=torch.float64))
    reference_init(oracle, *x)
    torch.manual_seed(3)
    lsuv_init(model, *x, preinit='orthogonal')
    for p, q in zip(model.parameters(), oracle.parameters()): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


# --- the documents' picture

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('layer', [ConvLayer, LearnableConvLayer])
def test_the_notebooks_order_leaves_the_means_off_zero_and_every_other_brings_them_there(layer, order, seed, digits):
    torch.manual_seed(seed)
    start = lambda m: (nn.init.kaiming_normal_(m.weight), nn.init.zeros_(m.bias))  # as the notebook starts
    report = lsuv_init(lesson11(layer), digits[0], order=order, modules=ConvLayer, preinit=start)
    means,stds = map(torch.tensor, zip(*report.pairs))
    assert (stds - 1).abs().max() < 1e-3
    if order == 'mean std': assert 0.01 < means.abs().min() and means.abs().max() < 0.4
    elif 'mean' in order: assert means.abs().max() < 1e-5
    else: assert means.min() > 0.4  # variance only: a ReLU's mean stays


def test_where_no_loop_scales_the_mean_decides_and_the_std_stays():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = lsuv_init(model, 20*torch.randn(64, 8), order='mean', preinit=None)
    assert report.ok and report.summary == "LSUV: 2 of 2 layers at mean 0 (2 passes)."
    assert [r.passes for r in report] == [1, 1] and all(abs(r.mean) < 1e-5 and r.std > 2 for r in report)


# --- models that are refused

X = torch.randn(32, 4)


@pytest.mark.parametrize('make, error, says', [
    (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), ValueError, 'no conv, linear or attention layer'),
    (lambda: 'resnet', TypeError, 'torch.nn.Module'),
    (lambda: nn.Linear(4, 4, device='meta'), ValueError, 'meta'),
    (lambda: nn.Linear(4, 4, dtype=torch.complex64), TypeError, 'complex64'),
    (lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), X), TypeError, 'torch.jit'),
    (lambda: torch.jit.script(nn.Linear(4, 4)), TypeError, 'torch.jit'),
    (lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))), TypeError, 'torch.jit'),
])
@pytest.mark.parametrize('f', [lsuv_init, layer_stats])
def test_models_that_are_refused(f, make, error, says):
    model = make()
    with pytest.raises(error, match=f'^model: .*{says}'): f(model, X)


def test_complex_activations_are_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), Mod(lambda self, x: self.lin(x + 0j).real, lin=nn.Linear(4, 4)))
    model[1].lin.to(torch.complex64)
    was = fingerprint(model)
    with pytest.raises(TypeError, match="'1.lin'.*complex64"): lsuv_init(model, X)
    assert fingerprint(model) == was and lsuv_init(model, X, modules='0').ok


# --- layer_stats

def test_layer_stats_measures_as_the_model_trains_and_changes_nothing():
    head = [nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(8*36, 5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), *head).eval()
    x = torch.randn(16, 3, 10, 10)*4 + 3
    was = fingerprint(model)
    stats = layer_stats(model, x)
    assert fingerprint(model) == was and [r.name for r in stats] == ['0', '4', '6'] and stats.n_passes == 1
    assert layer_stats(model, [(x, 0)], n_inp=1, modules='4').pairs == stats.pairs[1:2]
    model.train()[3].p = 0.
    for k, m in enumerate(model):
        x = m(x)
        if k not in (0, 4, 6): continue
        row,std = stats[str(k)],x.double().std().item()
        assert row.mean == pytest.approx(x.double().mean().item(), abs=1e-6) and row.std == pytest.approx(std, rel=1e-6)
        assert row.status == ('ok' if abs(std - 1) <= .1 else 'off') and row.passes == 0 and row.shape == tuple(x.shape)


def test_layer_stats_measures_modules_without_a_weight():
    model,x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()),torch.randn(64, 4)
    for row in layer_stats(model, x, modules=[nn.Tanh, nn.Sequential]):
        assert (row.mean, row.std) == pytest.approx((model(x).mean().item(), model(x).std().item()), abs=1e-6)


def test_layer_stats_judges_a_frozen_layer_by_its_std():
    model = nn.Linear(4, 4, bias=False).requires_grad_(False)
    nn.init.eye_(model.weight)
    assert layer_stats(model, torch.randn(256, 4))[0].status == 'ok'


def test_layer_stats_of_a_model_that_samples_leaves_the_generator_alone():
    net = Mod(lambda self, x: self.lin(x + torch.randn_like(x)), lin=nn.Linear(16, 8))
    x,was = torch.randn(64, 16),torch.get_rng_state()
    layer_stats(net, x)
    assert torch.equal(torch.get_rng_state(), was)
