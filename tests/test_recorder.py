"ActivationStatsRecorder: the numbers, against fastai's and against torch; what it must not disturb; what it shows."
import copy, importlib.util, pickle, sys, types, warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import (Callback, CancelBatchException, CancelFitException, CancelStepException, CastToTensor, DataLoader, DataLoaders, Learner, SGD,
                           TrainEvalCallback, load_learner, set_seed)
from fastai.callback.hook import ActivationStats
from fastai.callback import schedule  # noqa: F401 (adds `lr_find`)
from hypothesis import given, settings, strategies as st
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_lsuv import recorder as rec_mod
from fastai_lsuv.recorder import ActivationStatsRecorder
from fastai_lsuv.moments import flat
from fastai_lsuv.taps import Gauge


@pytest.fixture(autouse=True)
def _tidy():
    "One thread, as the tensors are small, and no figures left open."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    plt.close('all')


# ---- A small network on real digits ----

class Items(list):
    def new_empty(self): return Items()

def digits(n=96, valid=40, bs=16, shape=(1, 8, 8), shuffle=True, tfm=lambda x: x):
    set_seed(0)  # a DataLoader draws its generator's seed when it is made
    d = load_digits()
    x = torch.tensor(d.images[:n+valid], dtype=torch.float32).div(8).sub(1).view(-1, *shape)
    data = [(tfm(a), b) for a,b in zip(x, torch.tensor(d.target[:n+valid]))]
    return DataLoaders(DataLoader(Items(data[:n]), bs=bs, shuffle=shuffle), DataLoader(Items(data[n:]), bs=bs), device='cpu')

def convnet(inplace=True, nf=8):
    act = lambda: nn.ReLU(inplace=inplace)
    return nn.Sequential(nn.Conv2d(1, nf, 3, padding=1), act(), nn.Conv2d(nf, nf, 3, stride=2, padding=1), nn.BatchNorm2d(nf), act(),
                         nn.Dropout(0.3), nn.Flatten(), nn.Linear(nf*16, 10))

def learner(model=None, cbs=None, dls=None, seed=0, path='.', lr=0.01, **kw):
    set_seed(seed)
    model = convnet() if model is None else model if isinstance(model, nn.Module) else model()
    learn = Learner(dls or digits(), model, loss_func=nn.CrossEntropyLoss(), cbs=cbs, lr=lr, path=path, **kw)
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    return learn

def fit(learn, n=1, **kw):
    set_seed(1)
    with learn.no_logging(): learn.fit(n, **kw)
    return learn

def layers(model): return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

def hooks_on(model): return sum(len(m._forward_hooks) for m in model.modules())

class Do(Callback):
    "Run functions of the Learner at events."
    def __init__(self, order=0, **events):
        super().__init__()
        self.order = order
        for k,f in events.items(): setattr(self, k, lambda f=f: f(self.learn))


# ---- The numbers ----

@pytest.mark.parametrize('every', [1, 3])
@pytest.mark.parametrize('hist', [False, True])
def test_same_numbers_as_fastai(every, hist):
    model = convnet()
    ours,theirs = ActivationStatsRecorder(modules=layers(model), every=every, hist=hist), ActivationStats(modules=layers(model), every=every, with_hist=hist)
    fit(learner(model, cbs=[ours, theirs]), 2)
    assert len(theirs.stats) == 12//every
    for i in range(3):
        a,b = ours.layer_stats(i), theirs.layer_stats(i)
        assert type(a) is type(b) and len(a) == len(b) == 3
        for u,v in zip(a, b):
            assert type(u) is type(v) and type(u[0]) is type(v[0]) is float and len(u) == len(v)
            np.testing.assert_allclose(u, v, rtol=2e-6, atol=1e-7)
        if hist: assert torch.equal(ours.hist(i), theirs.hist(i)) and ours.hist(i).shape == (40, 12//every)

def test_same_plots_as_fastai_where_both_have_them():
    model = convnet()
    ours,theirs = ActivationStatsRecorder(modules=layers(model), hist=True), ActivationStats(modules=layers(model), with_hist=True)
    fit(learner(model, cbs=[ours, theirs]))
    axs = ours.plot_layer_stats(1)
    theirs.plot_layer_stats(1)
    for a,b in zip(axs, plt.gcf().axes): np.testing.assert_allclose(a.lines[0].get_ydata(), b.lines[0].get_ydata(), rtol=2e-6)
    _,(a,b) = plt.subplots(1, 2)
    assert ours.color_dim(1, ax=a) is a
    theirs.color_dim(1, ax=b)
    np.testing.assert_array_equal(a.images[0].get_array(), b.images[0].get_array())

def stats64(x, zero=0.05):
    x = x.double()
    return x.mean().item(), x.std().item(), (x <= torch.tensor(zero).float().double()).double().mean().item()

HARD = {
    'far from zero': lambda: torch.randn(64, 32, 12, 12)*1. + 1000,
    'far from zero, small': lambda: torch.randn(7)*1e-3 + 5,
    'constant': lambda: torch.full((3, 4, 5), 0.1),
    'constant but one': lambda: torch.cat([torch.full((9999,), 3.), torch.tensor([3.001])]),
    'zeros': lambda: torch.zeros(100, 20),
    'huge': lambda: torch.randn(50, 60)*1e25,
    'tiny': lambda: torch.randn(50, 60)*1e-25,
    'several chunks, odd': lambda: torch.randn(2*2**17 + 4321),
    'at the threshold': lambda: torch.tensor([0.05]*3 + [0.050000004, 0.049999997, -1., 0.]),
    'channels last': lambda: torch.randn(4, 30, 9, 7).to(memory_format=torch.channels_last)*torch.arange(1, 31)[:, None, None],
    'transposed': lambda: torch.randn(33, 44).t(),
    'gaps': lambda: torch.randn(20, 30)[::2, 3:17],
    'expanded': lambda: torch.randn(5, 1, 7).expand(5, 6, 7),
    'half': lambda: torch.randn(30, 40).half()*3 + 2,
    'bfloat16': lambda: torch.randn(30, 40).bfloat16(),
    'half, sums overflow': lambda: torch.full((300, 400), 300.).half(),
    'double': lambda: torch.randn(30, 40).double() + 1e6,
    'no dimensions': lambda: torch.tensor(2.),
}

@pytest.mark.parametrize('name', HARD)
def test_exact_on_hard_activations(name):
    torch.manual_seed(0)
    x = HARD[name]()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = Gauge(0.05, None)(x)
    mean,std,zero = stats64(x) if x.numel() > 1 else (x.item(), float('nan'), 0.)
    scale = max(abs(mean), std if np.isfinite(std) else 0.)
    assert float(m.mean) == pytest.approx(mean, abs=3e-6*scale)
    assert float(m.std) == pytest.approx(std, rel=2e-5 if name in ('far from zero, small', 'constant but one') else 3e-6, abs=1e-7*abs(mean), nan_ok=True)
    assert float(m.zeros)/m.n == pytest.approx(zero, abs=1e-12) and m.n == x.numel()

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_non_finite_activations_are_recorded_as_fastai_does(bad, dtype):
    x = torch.cat([torch.linspace(-1, 9, 1001), torch.tensor([bad])]).to(dtype)
    m = Gauge(0.05, (40, 0., 10.))(x)
    assert float(m.mean) == pytest.approx(float(x.mean()), nan_ok=True)
    assert np.isnan(float(m.std))
    assert float(m.zeros) == (x <= 0.05).sum()
    assert m.hist.sum() == ((x >= 0) & (x <= 10)).sum()

def test_elements_are_never_copied_to_be_reordered():
    x = torch.randn(4, 5, 6, 7)
    for y in (x, x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2)): assert flat(y).data_ptr() == y.data_ptr()
    assert sorted(flat(x.expand(2, 4, 5, 6, 7)).tolist()) == sorted(x.flatten().tolist()*2)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(-6, 6), st.integers(1, 40), st.integers(1, 700), st.integers(0, 10**6))
def test_histogram_counts_as_histc(bins, lo, width, n, seed):
    g = torch.Generator().manual_seed(seed)
    hi = lo + width
    x = torch.randn(n, generator=g)*width + lo
    x[::3] = (x[::3]*2).round()/2  # exact ties, on edges among them
    x[:2] = torch.tensor([hi, lo], dtype=torch.float32)[:n]
    ours,theirs = Gauge(0., (bins, float(lo), float(hi)))(x).hist, x.histc(bins, lo, hi)
    assert ours.sum() == theirs.sum() == ((x >= lo) & (x <= hi)).sum()
    # `histc` multiplies and divides, we multiply: an element within rounding of an edge may fall on either side.
    if np.log2(bins/width) % 1 == 0: assert torch.equal(ours.float(), theirs)
    at = (x.double()-lo)*bins/width
    assert (ours - theirs).abs().sum() <= 2*((at - at.round()).abs() < 1e-4).sum()

def test_histogram_of_several_chunks():
    x = torch.randn(9*2**17 + 11)*4 + 3
    for y in (x, x.relu(), torch.zeros_like(x), -x.abs(), x.abs()+10, x[:-4]):
        for bins in ((40, 0., 10.), (64, -8., 8.), (320, 0., 10.), (126, 0., 31.5), (127, -31.75, 0.)):
            assert torch.equal(Gauge(0., bins)(y).hist.float(), y.histc(*bins)), bins

@pytest.mark.parametrize('bins', [(40, 0., 9.9), (3, 0., 37.), (7, 0., 23.)])
def test_what_is_above_the_range_is_not_counted(bins):
    x = torch.randn(10000)*20
    assert Gauge(0., bins)(x).hist.sum() == x.histc(*bins).sum() == ((x >= bins[1]) & (x <= bins[2])).sum()

@pytest.mark.parametrize('bins', [(40, 100., 100.001), (200, 1e6, 1e6+1), (40, 1e6, 1e6+.01), (40, 100., 101.), (50, 10., 10.000301),
                                  (1, 126.99738921802668, 126.99742424652354), (127, 10000., 10000.73), (7, -7.3, -7.299985620754372)])
def test_bins_far_from_zero(bins):
    x = bins[1] + torch.randn(10000)*(bins[2] - bins[1])
    assert torch.equal(Gauge(0., bins)(x).hist.float(), x.histc(*bins))

@pytest.mark.parametrize('bins', [(40, -3e38, 3e38), (40, 0., 1e-37)])
def test_bins_at_the_ends_of_what_float32_holds(bins):
    x = torch.rand(1000)*bins[2]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        hist = Gauge(0., bins)(x).hist
    assert torch.equal(hist.float(), x.histc(*bins))

@pytest.mark.parametrize('default', [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default):
    x = torch.randn(1001)*4
    want = Gauge(0.05, (40, 0., 10.))(x)
    torch.set_default_dtype(default)
    try: got = Gauge(0.05, (40, 0., 10.))(x)
    finally: torch.set_default_dtype(torch.float32)
    assert got[:4] == want[:4] and torch.equal(got.hist, want.hist)

def test_one_gauge_for_layers_of_all_sizes():
    gauge = Gauge(0.05, (40, 0., 10.))
    for n in (7, 2**18, 1, 2**20 + 3, 8, 5):
        x = torch.randn(n)*4
        m = gauge(x)
        assert torch.equal(m.hist.float(), x.histc(40, 0, 10)) and m.zeros == (x <= 0.05).sum()
        assert m.mean == pytest.approx(x.double().mean().item(), abs=1e-5) and (n == 1 or m.std == pytest.approx(x.double().std().item(), rel=1e-5))

def test_what_was_made_in_inference_mode_serves_outside_of_it():
    gauge,x = Gauge(0.05, (40, 0., 10.)),torch.randn(1000)*4
    with torch.inference_mode(): first = gauge(x)
    assert torch.equal(first.hist, gauge(x).hist) and first[:4] == gauge(x)[:4]

def test_taken_before_an_in_place_activation():
    seen,model = {},convnet(inplace=True)
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    learn = learner(model, cbs=(rec := ActivationStatsRecorder()))
    for i,m in enumerate(layers(twin)): m.register_forward_hook(lambda m,a,o,i=i: seen.__setitem__(i, o))
    learn.add_cb(Do(before_batch=lambda l: l.training and (twin.load_state_dict(model.state_dict()), twin.train(), set_seed(7), twin(*l.xb), set_seed(7))))
    fit(learn)
    for i,(m,s) in enumerate(rec.pairs): assert (m, s) == pytest.approx(stats64(seen[i])[:2], rel=1e-5)

class Odd(nn.Module):
    "Layers whose outputs are tuples, dicts, integers and empty, and one called three times."
    def __init__(self):
        super().__init__()
        class Tup(nn.Linear):
            def forward(self, x): return (x.argmax(1), [super().forward(x), x])
        class Dic(nn.Linear):
            def forward(self, x): return {'ids':x.argmax(1), 'out':super().forward(x)}
        class Int(nn.Linear):
            def forward(self, x): return x.long()
        class Cplx(nn.Linear):
            def forward(self, x): return torch.complex(x, x)
        self.tup,self.dic,self.int,self.cplx,self.shared,self.idle = Tup(64, 64),Dic(64, 64),Int(64, 64),Cplx(64, 64),nn.Linear(64, 64),nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)
    def forward(self, x):
        x = x.flatten(1)
        x = self.dic(self.tup(x)[1][0])['out'] + self.int(x).float()*0 + self.cplx(x).real*0
        x = torch.cat([self.shared(x), self.shared(x[:3]*2), self.shared(x[:1]+3)])
        return self.head(x)[:-4]

def test_outputs_of_every_shape():
    calls,model = [],Odd()
    model.shared.register_forward_hook(lambda m,a,o: calls.append(o.detach()))
    rec = ActivationStatsRecorder(hist=(10, -1., 1.), grads=True)
    learn = learner(model, cbs=rec, dls=digits(16, shuffle=False))
    fit(learn)
    got = dict(zip(rec.names, rec.pairs))
    assert rec.names == ['tup', 'dic', 'int', 'cplx', 'shared', 'idle', 'head']
    for silent in ('int', 'cplx', 'idle'): assert np.isnan(got[silent]).all()
    together = torch.cat([c.flatten() for c in calls[:3]])
    assert got['shared'] == pytest.approx(stats64(together)[:2], rel=1e-5)
    assert rec.layer_stats('shared')[2][0] == pytest.approx(stats64(together)[2])
    assert torch.equal(rec.hist('shared')[:, 0], together.histc(10, -1, 1).log1p())
    assert np.isfinite(got['tup']).all() and np.isfinite(got['dic']).all()
    assert rec.df().set_index('layer').loc['idle', ['mean', 'grad_std']].isna().all()

def test_awd_lstm_records():
    from fastai.text.models.awdlstm import AWD_LSTM
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder,self.head = AWD_LSTM(20, 12, 24, 2),nn.Linear(12, 10)
        def forward(self, x): return self.head(self.encoder(x)[:, -1])
        def reset(self): self.encoder.reset()
    model,outs = Classifier(),[]
    rec = ActivationStatsRecorder(grads=True)
    learn = learner(model, cbs=rec, dls=digits(shape=(64,), tfm=lambda x: ((x+1)*8).long()))
    learn.add_cb(Do(before_train=lambda l: model.encoder.rnns[1].module.register_forward_hook(lambda m,a,o: outs.append(o[0].detach()))))
    fit(learn)
    assert rec.names == ['encoder.rnns.0.module', 'encoder.rnns.1.module', 'head']
    assert rec.df().notna().all().all() and len(rec.df()) == 6*3
    assert rec.pairs[1] == pytest.approx(stats64(outs[5])[:2], rel=1e-5)
    # fastai's cannot: its statistics of a tuple are a list.
    theirs = ActivationStats(modules=[model.encoder.rnns[1].module])
    learn.add_cb(theirs)
    fit(learn)
    with pytest.raises(Exception): np.array(theirs.layer_stats(0)[0], dtype=float)

def test_recurrent_cells_and_packed_sequences():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.gru,self.cell,self.head = nn.GRU(8, 6, batch_first=True),nn.LSTMCell(6, 5),nn.Linear(5, 10)
        def forward(self, x):
            x = nn.utils.rnn.pack_padded_sequence(x, [8]*len(x), batch_first=True)
            x,_ = nn.utils.rnn.pad_packed_sequence(self.gru(x)[0], batch_first=True)
            h = None
            for t in range(8): h = self.cell(x[:, t], h)
            return self.head(h[0])
    model,outs = M(),[]
    model.cell.register_forward_hook(lambda m,a,o: outs.append(o[0].detach()))
    fit(learner(model, cbs=(rec := ActivationStatsRecorder()), dls=digits(16, valid=0, shape=(8, 8))))
    assert rec.names == ['gru', 'cell', 'head'] and np.isfinite(rec.pairs).all()
    assert rec.pairs[1] == pytest.approx(stats64(torch.cat(outs))[:2], rel=1e-5)

def test_mixed_precision():
    outs,model = [],convnet()
    rec = ActivationStatsRecorder(hist=True, grads=True)
    cast = torch.autocast('cpu', dtype=torch.bfloat16)
    learn = learner(model, cbs=[rec, Do(before_batch=lambda l: cast.__enter__(), after_loss=lambda l: cast.__exit__(None, None, None))])
    model[0].register_forward_hook(lambda m,a,o: outs.append(o.detach().clone()))
    fit(learn)
    assert outs[5].dtype == torch.bfloat16
    assert rec.pairs[0] == pytest.approx(stats64(outs[5])[:2], rel=1e-5)
    assert torch.equal(rec.hist(0)[:, 5], outs[5].float().histc(40, 0, 10).log1p())
    assert np.isfinite(rec.df()['grad_std']).all()

def test_subclassed_tensors():
    from fastai.vision.all import TensorImage
    rec = ActivationStatsRecorder(hist=True, grads=True)
    learn = learner(cbs=rec, dls=digits(tfm=TensorImage))
    learn.remove_cb(CastToTensor)
    kinds = []
    learn.add_cb(Do(after_pred=lambda l: kinds.append(type(l.pred))))
    fit(learn)
    assert TensorImage in kinds and type(rec._taps.calls[0][0].hist) is Tensor and rec.df().notna().all().all()

def test_channels_last():
    rec,plain = ActivationStatsRecorder(hist=True),ActivationStatsRecorder(hist=True)
    fit(learner(cbs=plain, opt_func=partial(SGD, lr=0.)), lr=0.)
    fit(learner(lambda: convnet().to(memory_format=torch.channels_last), opt_func=partial(SGD, lr=0.), cbs=[rec, Do(before_batch=lambda l: setattr(l, 'xb', (l.xb[0].to(memory_format=torch.channels_last),)))]), lr=0.)
    for i in (0, 1):  # dropout, between these and the last layer, draws in the order of memory
        np.testing.assert_allclose(rec.layer_stats(i), plain.layer_stats(i), rtol=1e-4, atol=1e-6)
        assert (rec.hist(i).expm1() - plain.hist(i).expm1()).abs().max() < 1.5

def test_checkpointed_layers_count_once():
    from torch.utils.checkpoint import checkpoint
    class M(nn.Module):
        def __init__(self): super().__init__(); self.body,self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU()),nn.Linear(32, 10)
        def forward(self, x): return self.head(checkpoint(self.body, x.flatten(1), use_reentrant=False))
    rec = ActivationStatsRecorder(grads=True)
    learn = learner(M(), cbs=[rec, Do(order=-30, after_batch=lambda l: l.training and n.append([len(c) for c in rec._taps.calls]))])
    n = []
    fit(learn)
    assert n == [[1, 1]]*6 and rec.df().notna().all().all()


# ---- Gradients ----

def test_gradients_of_the_outputs():
    outs,model = {},convnet(inplace=False)
    def keep(m, a, o):
        if not o.requires_grad: return o
        outs[m] = o.clone()  # its gradient is the output's
        outs[m].retain_grad()
        return outs[m]
    for m in layers(model): m.register_forward_hook(keep)
    rec = ActivationStatsRecorder(grads=True)
    fit(learner(model, cbs=rec, dls=digits(32)))
    df = rec.df().query('step == 1').set_index('layer')
    # The hooks of the recorder come after `keep`, and see its clone.
    for n,m in model.named_modules():
        if m in outs:
            g = outs[m].grad.double()
            assert df.loc[n, 'grad_std'] == pytest.approx(g.std().item(), rel=1e-5)
            assert df.loc[n, 'grad_mean'] == pytest.approx(g.mean().item(), rel=1e-4, abs=1e-6*g.std().item())
            assert df.loc[n, 'grad_zero'] == pytest.approx((g == 0).double().mean().item())

def test_gradients_in_front_of_an_in_place_activation():
    a,b = (ActivationStatsRecorder(grads=True) for _ in range(2))
    fit(learner(lambda: convnet(inplace=True), cbs=a))
    fit(learner(lambda: convnet(inplace=False), cbs=b))
    pd.testing.assert_frame_equal(a.df(), b.df())

def test_gradients_are_freed_of_the_loss_scale():
    class Scale(Callback):
        order = 10
        def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**12, growth_interval=2)
        def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.loss_grad)
        def before_step(self): self.learn.scaler.step(self)
        def after_step(self): self.learn.scaler.update()
        @property
        def param_groups(self): return self.opt.param_groups
        def step(self, *a, **k): pass
    plain,scaled = ActivationStatsRecorder(grads=True),ActivationStatsRecorder(grads=True)
    fit(learner(cbs=plain, opt_func=partial(SGD, lr=0.)), lr=0.)
    learn = fit(learner(cbs=[scaled, Scale()], opt_func=partial(SGD, lr=0.)), lr=0.)
    assert learn.scaler.get_scale() > 2**12  # it grew on the way
    pd.testing.assert_frame_equal(plain.df(), scaled.df(), rtol=1e-5)


# ---- What it must not disturb ----

class Net(nn.Module):
    "Dropout, batch norm, an in-place activation and a transformer layer with a fast path in evaluation."
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Dropout(0.2))
        self.enc,self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),nn.Linear(16, 10)
    def forward(self, x): return self.head(self.enc(self.conv(x).flatten(2).transpose(1, 2)).mean(1))

def run(cbs=None):
    learn = learner(Net, cbs=cbs)
    losses = []
    learn.add_cb(Do(after_loss=lambda l: losses.append(l.loss.item())))
    fit(learn, 2)
    return losses, torch.cat([p.detach().flatten() for p in learn.model.parameters()]), torch.get_rng_state()

@pytest.mark.parametrize('kw', [{}, dict(hist=True, grads=True, every=2, max_steps=3)], ids=['plain', 'everything'])
def test_same_losses_bit_for_bit(kw, tmp_path):
    a,b = run(),run(ActivationStatsRecorder(**kw, fname=tmp_path/'a.csv'))
    assert a[0] == b[0] and len(a[0]) == 18 and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])

def test_same_training_losses_while_validation_is_recorded():
    # Torch turns the fast path of its transformer layers off where there are hooks: equal in validation to rounding only.
    a,b = run(),run(ActivationStatsRecorder(valid=True, hist=True))
    assert torch.equal(a[1], b[1])
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)

class Syncs(TorchDispatchMode):
    "Count what would wait for a device."
    def __init__(self): super().__init__(); self.n,self.seen = 0,0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        self.n += func._schema.name in ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::bincount', 'aten::equal', 'aten::is_nonzero', 'aten::masked_select')
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['cpu', 'as on other devices'])
def test_never_waits_for_the_device_between_epochs(dtype):
    # float64 is measured on the CPU as everything is on a GPU.
    rec = ActivationStatsRecorder(hist=dtype == torch.float64, grads=True, valid=True)
    mode = Syncs()
    learn = learner(convnet().to(dtype), cbs=rec, dls=digits(tfm=lambda x: x.to(dtype)), default_cbs=False)
    learn.add_cbs([TrainEvalCallback()])
    events = ['before_batch', 'after_pred', 'after_backward', 'after_batch', 'after_train', 'before_validate', 'after_validate']
    for e in events:
        f = getattr(rec, e)
        def counted(f=f):
            with mode: f()
        setattr(rec, e, counted)
    def begin(f=rec._begin):
        f()
        gauge = rec._taps.gauge
        class Counted(Gauge):
            def __call__(self, *a, **k):
                with mode: return super().__call__(*a, **k)
        rec._taps.gauge = Counted(gauge.near_zero, gauge.bins)
    rec._begin = begin
    fit(learn, 2)
    assert len(rec.df()) == 2*(6+1)*3 and mode.n == 0 and mode.seen > 200
    pending = [type(r.values) for r in rec._rows['train']]
    assert set(pending) == {np.ndarray}

def test_one_transfer_an_epoch(monkeypatch):
    moved = []
    monkeypatch.setattr(Tensor, 'cpu', lambda self, f=Tensor.cpu: moved.append(tuple(self.shape)) or f(self))
    rec = ActivationStatsRecorder(hist=(10, 0., 1.), valid=True)
    learn = learner(cbs=rec, default_cbs=False)
    learn.add_cb(TrainEvalCallback())
    fit(learn, 2)
    assert moved == [(7, 3, 13)]*2

def test_keeps_no_activations():
    import gc, weakref
    refs = []
    rec = ActivationStatsRecorder(hist=True, grads=True, valid=True)
    model = convnet()
    for m in layers(model): m.register_forward_hook(lambda m,a,o: refs.append(weakref.ref(o)))
    fit(learner(model, cbs=rec))
    gc.collect()
    assert len(refs) == 27 and not any(r() is not None for r in refs)

def test_memory_is_bounded():
    rec,most = ActivationStatsRecorder(hist=(8, 0., 1.), max_steps=10, valid=True),[]
    learn = learner(cbs=[rec, Do(after_batch=lambda l: most.append(len(rec._rows['train'])))], dls=digits(96, 8, bs=4))
    fit(learn, 6)  # 144 steps
    assert max(most) == 10 and len(rec._rows['valid']) == 6
    steps = rec.df().query("phase == 'train'").step.unique()
    assert list(steps) == list(range(0, 144, 16))
    every = ActivationStatsRecorder(hist=(8, 0., 1.))
    fit(learner(cbs=every, dls=digits(96, 8, bs=4)), 6)
    kept = every.df().query("phase == 'train' and step % 16 == 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(rec.df().query("phase == 'train'").reset_index(drop=True), kept)
    assert torch.equal(rec.hist(1), every.hist(1)[:, ::16])

def test_validation_records_are_bounded_too():
    rec = ActivationStatsRecorder(max_steps=2, valid=True, every=100)
    fit(learner(cbs=rec, dls=digits(8, 8, bs=8)), 9)
    assert list(rec.df().query("phase == 'valid'").epoch.unique()) == [0, 8]


# ---- Which steps are recorded ----

def test_validation_is_one_record_of_all_its_batches(monkeypatch):
    outs,model = [],convnet()
    model[0].register_forward_hook(lambda m,a,o: outs.append(o.detach().clone()) if not m.training else None)
    rec = ActivationStatsRecorder(valid=True, hist=True, grads=True)
    fit(learner(model, cbs=rec, dls=digits(16, 300, bs=4)))  # 75 batches: more than are pooled at a time
    assert len(outs) == 75
    (m,),(s,),(z,) = rec.layer_stats(0, 'valid')
    assert (m, s, z) == pytest.approx(stats64(torch.cat(outs)), rel=1e-5)
    np.testing.assert_allclose(rec.hist(0, 'valid')[:, 0], torch.cat(outs).histc(40, 0, 10).log1p(), rtol=1e-6)
    valid = rec.df().query("phase == 'valid'")
    assert valid.grad_std.isna().all() and (valid.step == 4).all()

def test_not_a_number_shows_in_validation():
    model = convnet()
    model[0].register_forward_hook(lambda m,a,o: o*(float('nan') if not m.training and learn.iter == 1 else 1))
    rec = ActivationStatsRecorder(valid=True, grads=True)
    learn = learner(model, cbs=rec)
    fit(learn)
    assert np.isnan(rec.layer_stats(0, 'valid')[0][0]) and np.isfinite(rec.layer_stats(0)[0]).all()

def test_the_passes_of_lsuv_are_not_recorded():
    from fastai_lsuv import LSUVCallback
    rec = ActivationStatsRecorder()
    fit(learner(cbs=[LSUVCallback(), rec]))
    assert len(rec.df()) == 18
    assert [s for _,s in rec._records('train')[0].values[:, :2]] == pytest.approx([1, 1, 1], abs=0.25)

def test_only_the_batches_of_a_fit_are_recorded():
    rec,other = ActivationStatsRecorder(valid=True),torch.full((4, 1, 8, 8), 1e4)
    def forward(l): l.model(other)
    class Gathers(Callback):
        run_valid = False
        def after_batch(self): forward(self.learn)
        def after_loss(self): forward(self.learn)
        def before_fit(self): forward(self.learn); rec_fit.append(hooks_on(self.model))
        def after_epoch(self):
            self.learn.one_batch(0, (other, torch.zeros(4).long()))  # as TensorBoardCallback does
    class Fetches(Callback):
        def after_validate(self):
            if not hasattr(self.learn, 'gather_preds'): self.learn.get_preds(dl=[(other, torch.zeros(4).long())], inner=True, cbs=None)
    rec_fit,ref = [],ActivationStatsRecorder(valid=True)
    net = lambda: nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 10))
    fit(learner(net, cbs=ref), 2)
    fit(learner(net, cbs=[rec, Gathers(), Fetches()]), 2)
    assert rec_fit == [0]
    np.testing.assert_allclose(rec.df().query("step == 0")['mean'], ref.df().query("step == 0")['mean'])
    assert rec.df()['mean'].abs().max() < 10 and len(rec.df()) == len(ref.df())

def test_lr_find_predictions_and_validation_leave_records_alone(tmp_path):
    rec = ActivationStatsRecorder(valid=True, fname='a.csv')
    learn = fit(learner(cbs=rec, path=tmp_path), 2)
    before,file = rec.df(),(tmp_path/'a.csv').read_text()
    with learn.no_logging(), learn.no_mbar():
        learn.lr_find(num_it=10, show_plot=False)
        learn.get_preds()
        learn.validate()
    pd.testing.assert_frame_equal(rec.df(), before)
    assert (tmp_path/'a.csv').read_text() == file and hooks_on(learn.model) == 0

def test_a_new_fit_starts_anew_unless_append(tmp_path):
    for append,rows in ((False, 6), (True, 6+1+6)):
        rec = ActivationStatsRecorder(append=append, every=1, fname=f'{append}.csv')
        learn = fit(learner(cbs=rec, path=tmp_path))
        if append: fit(learn, cbs=Do(after_batch=lambda l: (_ for _ in ()).throw(CancelFitException())))
        fit(learn)
        df = rec.df()
        assert len(df) == rows*3 and list(df.step[::3]) == list(range(rows))
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path/f'{append}.csv', dtype={'layer':str}), df, check_dtype=False, rtol=1e-6)
    assert list(df.epoch.unique()) == [0, 1, 2]

def test_appending_to_another_model_starts_anew():
    rec = ActivationStatsRecorder(append=True)
    fit(learner(cbs=rec))
    with pytest.warns(UserWarning, match='layers changed'): fit(learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), cbs=rec))
    assert rec.names == ['1'] and len(rec.df()) == 6

def test_fit_from_a_later_epoch():
    rec = ActivationStatsRecorder(valid=True)
    fit(learner(cbs=rec), 3, start_epoch=2)
    assert list(rec.df().epoch.unique()) == [2]

def test_cancelled_batches_leave_no_record():
    rec = ActivationStatsRecorder()
    def cancel(l):
        if l.training and l.train_iter % 2: raise CancelBatchException()
    fit(learner(cbs=[rec, Do(before_batch=cancel)]))
    assert list(rec.df().step.unique()) == [0, 2, 4]

@pytest.mark.parametrize('modules,names', [(nn.Conv2d, ['0', '2']), ('7', ['7']), (['2', nn.Linear], ['2', '7']), (lambda m: isinstance(m, nn.BatchNorm2d), ['3'])])
def test_modules(modules, names):
    rec = ActivationStatsRecorder(modules)
    fit(learner(cbs=rec))
    assert rec.names == names and list(rec.df().layer.unique()) == names

def test_several_processes_write_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rec_mod, 'rank_distrib', lambda: 1)
    rec = ActivationStatsRecorder(fname='a.csv')
    fit(learner(cbs=rec, path=tmp_path))
    assert not (tmp_path/'a.csv').exists() and len(rec.df()) == 18


# ---- Interruptions, pickles, compiled models ----

class Boom(Exception): pass

@pytest.mark.parametrize('error', [KeyboardInterrupt, Boom, CancelFitException])
@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_finished_epochs_are_on_disk_when_a_run_is_interrupted(error, suffix, tmp_path):
    if suffix == '.parquet': pytest.importorskip('pyarrow')
    rec,path = ActivationStatsRecorder(fname=f'sub/a{suffix}', valid=True),tmp_path/f'sub/a{suffix}'
    model,read = convnet(),pd.read_parquet if suffix == '.parquet' else partial(pd.read_csv, dtype={'layer':str})
    def boom(m, a, o):
        if learn.epoch == 2 and m.training and learn.iter == 3: raise error('now')
    sizes = []
    learn = learner(model, cbs=[rec, Do(order=100, after_epoch=lambda l: sizes.append(len(read(path))))], path=tmp_path)
    hook = model[7].register_forward_hook(boom)
    with (nullcontext() if error is CancelFitException else pytest.raises(error)): fit(learn, 4)
    assert sizes == [21, 42]
    df = read(path)
    assert len(df) == (42 if error is not CancelFitException else 42+9) and list(df.epoch.unique())[:2] == [0, 1]
    assert len(rec.df()) == 42+9  # what was in memory can still be read
    pd.testing.assert_frame_equal(df, rec.df()[:len(df)], check_dtype=False, rtol=1e-6)
    # And the next fit is a clean one.
    hook.remove()
    fit(learn)
    assert len(rec.df()) == len(read(path)) == 21 and hooks_on(model) == 0

def test_parquet_without_pyarrow_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    with pytest.raises(ImportError, match='fname.*pyarrow'): ActivationStatsRecorder(fname='a.parquet')

def test_exports_without_its_data(tmp_path):
    rec = ActivationStatsRecorder(hist=True, grads=True)
    learn = fit(learner(cbs=rec, path=tmp_path))
    learn.export('a.pkl')
    assert len(rec.df()) == 18
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'a.pkl')
    other = again.activation_stats_recorder
    assert other._bins == (40, 0., 10.) and other.names == [] and not any(other._rows.values())
    again.dls = digits()
    fit(again)
    assert len(other.df()) == 18

def test_copies_made_during_a_fit_record_nothing(tmp_path):
    rec,copies = ActivationStatsRecorder(),[]
    learn = learner(path=tmp_path, cbs=[rec, Do(after_pred=lambda l: copies.append((copy.deepcopy(l.model), pickle.loads(pickle.dumps(l.model)))) if not copies else None,
                                                before_batch=lambda l: [m(torch.full((2, 1, 8, 8), 1e4)) for c in copies for m in c])])
    fit(learn)
    assert rec.df()['mean'].abs().max() < 10
    exported = learner(path=tmp_path, cbs=[rec2 := ActivationStatsRecorder(), Do(after_train=lambda l: None)])
    exported.add_cb(Do(order=-30, after_batch=lambda l: pickle.dumps(l.model)))
    fit(exported)
    assert len(rec2.df()) == 18 and hooks_on(exported.model) == 0

@pytest.mark.slow
@pytest.mark.parametrize('how', ['torch.compile(model)', 'model.compile()', 'compiled before', 'a part'])
def test_compiled_models(how):
    torch.compiler.reset()
    plain,rec = (ActivationStatsRecorder(hist=True, grads=True, valid=True) for _ in range(2))
    net = lambda: nn.Sequential(convnet()[:5], nn.Flatten(), nn.Linear(128, 10))
    fit(learner(net, cbs=plain))
    learn = learner(net, cbs=rec)
    learn.model = {'torch.compile(model)': lambda m: torch.compile(m, backend='eager'), 'compiled before': lambda m: torch.compile(m, backend='eager'),
                   'model.compile()': lambda m: m.compile(backend='eager') or m,
                   'a part': lambda m: nn.Sequential(torch.compile(m[0], backend='eager'), *m[1:])}[how](learn.model)
    skip = 0
    if how == 'compiled before':
        state = copy.deepcopy(learn.model.state_dict())
        learn.model.train()(torch.randn(16, 1, 8, 8))
        learn.model.load_state_dict(state)
        with pytest.warns(UserWarning, match='compiled again'): fit(learn)
        skip = 3  # the first step
    else: fit(learn)
    assert rec.names == plain.names == ['0.0', '0.2', '2']
    pd.testing.assert_frame_equal(rec.df().query(f'step >= {skip//3}').reset_index(drop=True), plain.df()[skip:].reset_index(drop=True), rtol=1e-4, atol=1e-6)
    assert hooks_on(learn.model) == 0


# ---- TensorBoard and Weights & Biases ----

def test_scalars_to_tensorboard_and_wandb(monkeypatch):
    logged,written = [],[]
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(log=lambda d, step: logged.append((d, step))))
    class TensorBoardCallback(Callback):
        order = 51
        def before_fit(self): self.writer = types.SimpleNamespace(add_scalar=lambda *a: written.append(a))
    class WandbCallback(Callback):
        order,_wandb_step = 51,41
    class MyBoard(TensorBoardCallback):
        def before_fit(self): self.run = False
    rec = ActivationStatsRecorder(valid=True, every=2)
    fit(learner(cbs=[rec, TensorBoardCallback(), WandbCallback(), MyBoard()]), 2)
    assert len(written) == 2*(3+1)*3*3 and len(logged) == 2 and len(logged[0][0]) == 2*3*3
    want = rec.df().query("layer == '2' and phase == 'train'")
    assert [(s, v) for n,v,s in written if n == 'activations/train/2/std'] == list(zip(want.step, want['std']))
    assert logged[-1][1] == 41 and logged[-1][0]['activations/train/2/std'] == want['std'].iloc[-1]
    assert 'activations/valid/7/near_zero' in logged[-1][0]

@pytest.mark.skipif(importlib.util.find_spec('tensorboard') is None, reason='tensorboard is not installed')
@pytest.mark.slow
def test_the_tensorboard_callback_of_fastai(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    rec = ActivationStatsRecorder()
    fit(learner(cbs=[rec, TensorBoardCallback(log_dir=tmp_path, trace_model=False, log_preds=False)]))
    events = EventAccumulator(str(tmp_path)).Reload().Scalars('activations/train/0/std')
    np.testing.assert_allclose([e.value for e in events], rec.layer_stats(0)[1])

def test_importing_needs_neither(tmp_path):
    import subprocess
    code = "import sys; from fastai.basics import *; before = set(sys.modules); import fastai_lsuv.recorder; new = set(sys.modules) - before; assert not [m for m in new if m.split('.')[0] in ('tensorboard', 'wandb', 'matplotlib', 'pyarrow') or m == 'torch._dynamo'], new"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, cwd=Path(rec_mod.__file__).parent.parent)


# ---- Tables and diagnosis ----

def test_pairs_print_as_a_table():
    rec = ActivationStatsRecorder()
    fit(learner(cbs=rec))
    last = rec.df().query('step == 5')
    assert rec.pairs == list(zip(last['mean'], last['std'])) and all(type(v) is float for p in rec.pairs for v in p)
    lines = repr(rec.pairs).splitlines()
    assert lines[0].strip() == 'step 5 (epoch 0)' and lines[1].split() == ['layer', 'mean', 'std'] and lines[2].split() == ['0', *(f'{v:.4f}' for v in rec.pairs[0])]
    assert len(lines) == 5 and len({len(l) for l in lines}) == 1

def test_df_is_tidy():
    rec = ActivationStatsRecorder(grads=True, valid=True)
    fit(learner(cbs=rec), 2)
    df = rec.df()
    assert list(df) == ['epoch', 'step', 'phase', 'layer', 'mean', 'std', 'near_zero', 'grad_mean', 'grad_std', 'grad_zero']
    assert not df.duplicated(['epoch', 'step', 'phase', 'layer']).any() and len(df) == 2*7*3
    assert list(df.phase[::3]) == (['train']*6 + ['valid'])*2 and list(df.step[::3]) == [*range(6), 6, *range(6, 12), 12]
    assert list(df.layer[:3]) == rec.names == ['0', '2', '7']

def diagnose(net, scale=None, n=1, **kw):
    "Diagnosis of a network whose named layers have their weights scaled, by step where `scale` is a function of it."
    rec,model = ActivationStatsRecorder(),net
    def change(l):
        for k,f in (scale or {}).items():
            m = model.get_submodule(k)
            m.weight.data.copy_(start[k]*f(l.train_iter))
    def skip(l): raise CancelStepException()
    learn = learner(model, cbs=[rec, Do(order=-40, before_batch=change, before_step=skip)], opt_func=partial(SGD, lr=0.), dls=digits(80))
    torch.manual_seed(0)
    for m in layers(model): nn.init.kaiming_normal_(m.weight), nn.init.zeros_(m.bias)
    start = {k:model.get_submodule(k).weight.detach().clone() for k in scale or {}}
    fit(learn, n, lr=0.)
    return rec.diagnose(**kw)

def mlp(act=nn.ReLU): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 10))

def test_diagnosis_of_a_healthy_network():
    d = diagnose(mlp())
    assert d == [] and repr(d) == 'No layer vanishes, explodes, saturates or is mostly dead in 5 records (steps 0 to 4).'

@pytest.mark.parametrize('by,problem', [(1e-4, 'vanishes'), (1e4, 'explodes'), (float('nan'), 'explodes'), (float('inf'), 'explodes')])
def test_diagnosis_names_layer_and_steps(by, problem):
    d = diagnose(mlp(), {'5': lambda t: by if t in (1, 2, 4) else 1.})
    assert [(f.layer, f.problem, f.spans, f.records, f.of) for f in d] == [('5', problem, [(1, 2), (4, 4)], 3, 5)]
    assert repr(d).splitlines()[0] == '1 layer in trouble in 5 records (steps 0 to 4):'
    assert f'- 5 {problem} over steps 1 to 2, 4 (3 of 5 records; ' in repr(d)

def test_diagnosis_of_dead_layers():
    model = mlp()
    model[1].register_forward_hook(lambda m, a, o: o - 20)
    d = diagnose(nn.Sequential(model[0], nn.Sequential(*model[1:3]), *model[3:]))
    got = [(f.layer, f.problem) for f in d]
    assert ('1.0', 'is mostly dead') in got and not any(p == 'saturates' for _,p in got)
    assert all('share near zero up to 1' in str(f) for f in d if f.problem == 'is mostly dead')

@pytest.mark.parametrize('act,by', [(nn.Tanh, 4.), (nn.Sigmoid, 8.)])
def test_diagnosis_of_saturation(act, by):
    assert not diagnose(mlp(act))
    d = diagnose(mlp(act), {'1': lambda t: by if t > 2 else 1.})
    assert [(f.layer, f.problem, f.spans) for f in d] == [('1', 'saturates', [(3, 4)])]
    # Measured after the activation: everything is at a bound.
    rec,model = ActivationStatsRecorder(act),mlp(act)
    learn = learner(model, cbs=[rec], opt_func=partial(SGD, lr=0.))
    model[1].weight.data.mul_(1e3)
    fit(learn, lr=0.)
    assert [(f.layer, f.problem) for f in rec.diagnose()] == [('2', 'saturates')]
    assert rec.diagnose(saturate=1.1) == []

def test_layers_that_are_not_called_are_no_trouble():
    rec = ActivationStatsRecorder()
    fit(learner(Odd(), cbs=rec))
    assert not {'idle', 'int', 'cplx'} & {f.layer for f in rec.diagnose()}


# ---- Plots ----

def deep(n): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *[m for _ in range(n-2) for m in (nn.ReLU(), nn.Linear(16, 16))], nn.Linear(16, 10))

@pytest.mark.parametrize('n', [1, 5, 100])
def test_plots(n):
    rec = ActivationStatsRecorder(hist=True, grads=True, valid=True)
    fit(learner(deep(n) if n > 1 else nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), cbs=rec))
    axs = rec.plot_stats()
    assert len(axs) == 2 and all(len(a.lines) == n for a in axs) and [a.get_title() for a in axs] == ['mean', 'std']
    np.testing.assert_allclose(axs[1].lines[n-1].get_ydata(), rec.layer_stats(n-1)[1])
    fig = axs[0].figure
    if n == 100: assert len(fig.axes) == 3 and '1' in [t.get_text() for t in fig.axes[2].get_yticklabels()]  # a colour bar
    else: assert [t.get_text() for t in axs[1].get_legend().get_texts()] == rec.names
    _,ax = plt.subplots()
    assert rec.plot_stats('grad_std', ax=ax)[0] is ax
    assert len(rec.plot_layer_stats(0)) == 3
    assert len(rec.color_dim()) == n and rec.color_dim(0).images[0].get_array().shape == (40, 6)
    ax = rec.dead_chart()
    assert ax.images[0].get_array().shape == (n, 6) and 1 <= len(ax.get_yticks()) <= 34
    assert rec.dead_chart(phase='valid', figsize=(3, 2)).figure.get_size_inches().tolist() == [3, 2]
    for f in map(plt.figure, plt.get_fignums()): f.canvas.draw()

def test_too_few_axes():
    rec = ActivationStatsRecorder(hist=True)
    fit(learner(cbs=rec))
    with pytest.raises(ValueError, match='ax: got 1 axes; this plot draws on 3'): rec.plot_layer_stats(0, ax=plt.gca())


# ---- Errors ----

@pytest.mark.parametrize('kw,error,match', [
    (dict(every=0), ValueError, 'every: got 0'), (dict(every=1.5), ValueError, 'every: got 1.5'), (dict(every=True), ValueError, 'every'),
    (dict(max_steps=1), ValueError, 'max_steps: got 1'), (dict(near_zero='x'), TypeError, "near_zero: got 'x'"),
    (dict(hist=(10, 0)), TypeError, 'hist: got'), (dict(hist=(0, 0, 1)), ValueError, 'hist: got'), (dict(hist=(10, 1, 1)), ValueError, 'hist: got'), (dict(hist=40), TypeError, 'hist: got 40'),
])
def test_bad_options(kw, error, match):
    with pytest.raises(error, match=match): ActivationStatsRecorder(**kw)

def test_bad_questions():
    rec = ActivationStatsRecorder()
    with pytest.raises(ValueError, match='nothing|no step'): rec.df()
    fit(learner(cbs=rec))
    with pytest.raises(ValueError, match='i: got 3.*below 3.*0, 2, 7'): rec.layer_stats(3)
    with pytest.raises(ValueError, match="i: got 'conv'"): rec.layer_stats('conv')
    with pytest.raises(ValueError, match='hist=True'): rec.hist(0)
    with pytest.raises(ValueError, match='hist=True'): rec.color_dim()
    with pytest.raises(ValueError, match='valid=True'): rec.layer_stats(0, 'valid')
    with pytest.raises(ValueError, match="phase: got 'test'"): rec.layer_stats(0, 'test')
    with pytest.raises(ValueError, match="stats: got 'grad_std'"): rec.plot_stats('grad_std')
    assert rec.layer_stats(-1) == rec.layer_stats('7') == rec.layer_stats(2)
    with pytest.raises(ValueError, match='modules'): fit(learner(cbs=ActivationStatsRecorder('nowhere')))
