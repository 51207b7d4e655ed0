"The numbers that `ActivationStatsRecorder` records of a network in training, against fastai's and against torch."
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import CastToTensor
from fastai.callback.hook import ActivationStats
from recording import (Do, Made, at_step, convnet, digits, fit, keep_outputs, layers, learner, recorded, same, stats64,
                       trained)
from torch import nn
from torch.nn.utils import parametrizations

from fastai_lsuv.recorder import ActivationStatsRecorder

FASTAI = 40, 0., 10.


@pytest.mark.parametrize('every, hist', [(1, None), (3, None), (1, FASTAI), (3, FASTAI), (1, True)])
def test_same_numbers_as_fastai(every, hist):
    model = convnet()
    ours = ActivationStatsRecorder(modules=layers(model), every=every, hist=hist)
    theirs = ActivationStats(modules=layers(model), every=every, with_hist=bool(hist))
    fit(learner(model, cbs=[ours, theirs]), 2)
    assert len(theirs.stats) == 12//every
    for i in range(3):
        a,b = ours.layer_stats(i),theirs.layer_stats(i)
        assert type(a) is type(b) and len(a) == len(b) == 3
        for u, v in zip(a, b):
            assert type(u) is type(v) and type(u[0]) is type(v[0]) is float and len(u) == len(v)
            np.testing.assert_allclose(u, v, rtol=2e-6, atol=1e-7)
        if not hist: continue
        assert ours.hist(i).shape == (80 if hist is True else 40, 12//every)
        assert torch.equal(ours.hist(i)[-40:], theirs.hist(i))  # of the default, the upper half
        assert hist is not True or ours.hist(i)[:40].sum() > 0


class As(nn.Linear):
    "A linear layer that puts out what `how` makes of its input and output."
    def __init__(self, how):
        super().__init__(64, 64)
        self.how = how

    def forward(self, x): return self.how(x, super().forward(x))


def test_outputs_of_every_shape():
    def forward(m, x):
        x = x.flatten(1)
        x = m.dic(m.tup(x)[1][0])['out'] + m.int(x).float()*0 + m.cplx(x).real*0
        return m.head(torch.cat([m.shared(x), m.shared(x[:3]*2), m.shared(x[:1]+3)]))[:-4]
    model = Made(forward, tup=As(lambda x, out: (x.argmax(1), [out, x])), dic=As(lambda x, out: {'n': 2, 'out': out}),
                 int=As(lambda x, out: x.long()), cplx=As(lambda x, out: torch.complex(x, x)),
                 shared=nn.Linear(64, 64), idle=nn.Linear(64, 64), head=nn.Linear(64, 10))
    calls = keep_outputs(model.shared)
    rec = recorded(model, dls=digits(16, shuffle=False), hist=(10, -1., 1.), grads=True)
    assert rec.names == ['tup', 'dic', 'int', 'cplx', 'shared', 'idle', 'head']
    first = at_step(rec, 0)
    assert first.loc[['int', 'cplx', 'idle'], ['mean', 'std', 'dead', 'grad_std']].isna().all(None)
    assert first.loc[['tup', 'dic'], ['mean', 'std']].notna().all(None)
    together = torch.cat([c.flatten() for c in calls])
    assert len(calls) == 3
    assert [v[0] for v in rec.layer_stats('shared')] == pytest.approx(stats64(together), rel=1e-5)
    assert torch.equal(rec.hist('shared')[:, 0], together.histc(10, -1, 1).log1p())


def test_awd_lstm_is_recorded_and_not_dead():
    from fastai.text.models.awdlstm import AWD_LSTM
    encoder = AWD_LSTM(20, 100, 300, 2)
    model = Made(lambda m, x: m.head(m.encoder(x)[:, -1]), encoder=encoder, head=nn.Linear(100, 10),
                 reset=encoder.reset)
    outs = keep_outputs(encoder.rnns[1].module)
    rec = recorded(model, dls=digits(shape=(64,), tfm=lambda x: ((x+1)*8).long()), grads=True)
    assert rec.names == ['encoder.rnns.0.module', 'encoder.rnns.1.module', 'head']
    assert rec.df().notna().all().all() and len(rec.df()) == 6*3
    assert rec.pairs[1] == pytest.approx(stats64(outs[5])[:2], rel=1e-5)
    assert (rec.df().near_zero > 0.9).any()  # its numbers are that small, and yet
    assert 'is mostly dead' not in [f.problem for f in rec.diagnose()]


def test_recurrent_cells_and_packed_sequences():
    def forward(m, x):
        x = nn.utils.rnn.pack_padded_sequence(x, [8]*len(x), batch_first=True)
        x,h = nn.utils.rnn.pad_packed_sequence(m.gru(x)[0], batch_first=True)[0],None
        for t in range(8): h = m.cell(x[:, t], h)
        return m.head(h[0])
    model = Made(forward, gru=nn.GRU(8, 6, batch_first=True), cell=nn.LSTMCell(6, 5), head=nn.Linear(5, 10))
    outs = keep_outputs(model.cell)
    rec = recorded(model, dls=digits(16, valid=0, shape=(8, 8)))
    assert rec.names == ['gru', 'cell', 'head'] and np.isfinite(rec.pairs).all()
    assert len(outs) == 8 and rec.pairs[1] == pytest.approx(stats64(torch.cat(outs))[:2], rel=1e-5)


def test_subclassed_tensors():
    from fastai.vision.all import TensorImage
    rec,kinds = ActivationStatsRecorder(hist=True, grads=True),[]
    learn = learner(cbs=[rec, Do(after_pred=lambda l: kinds.append(type(l.pred)))], dls=digits(tfm=TensorImage))
    learn.remove_cb(CastToTensor)
    fit(learn)
    assert TensorImage in kinds
    pd.testing.assert_frame_equal(rec.df(), recorded(grads=True).df())
    assert type(rec.hist(0)) is torch.Tensor


def test_large_activations_are_sampled_and_small_ones_are_not():
    big = nn.Sequential(nn.Conv2d(1, 320, 3, padding=1), nn.ReLU(), nn.Conv2d(320, 4, 8), nn.Flatten(),
                        nn.Linear(4, 10))
    outs,small = keep_outputs(big[0]),keep_outputs(big[2])
    rec = recorded(big, dls=digits(16, valid=0), sample=2, hist=True, grads=True)
    assert outs[0].numel() > 2**18 > small[0].numel()
    assert [v[0] for v in rec.layer_stats(0)] == pytest.approx(stats64(outs[0][::2]), rel=1e-5)
    assert rec.pairs[1] == pytest.approx(stats64(small[0])[:2], rel=1e-5)
    np.testing.assert_allclose(rec.hist(0)[:, 0].expm1(), 2*outs[0][::2].histc(80, -10, 10), rtol=1e-5, atol=1e-3)
    assert rec.df()['grad_std'].notna().all()


class OwnRMSNorm(nn.Module):
    "A norm layer of the user's own, as `LlamaRMSNorm` is."
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))

    def forward(self, x): return x*self.scale/x.square().mean(1, keepdim=True).add(1e-6).sqrt()


NORMS = {'BatchNorm2d': nn.BatchNorm2d, 'GroupNorm': partial(nn.GroupNorm, 2), 'InstanceNorm2d': nn.InstanceNorm2d,
         'LayerNorm': lambda n: nn.LayerNorm([n, 4, 4]), 'RMSNorm': lambda n: nn.RMSNorm([n, 4, 4]),
         'OwnRMSNorm': OwnRMSNorm}


@pytest.mark.parametrize('kind', NORMS)
def test_norm_layers_are_recorded(kind):
    if kind == 'OwnRMSNorm':
        model,at = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), OwnRMSNorm(16), nn.Linear(16, 10)),1
    else: model,at = convnet(inplace=False, norm=NORMS[kind]),2
    outs = keep_outputs(model[3])
    rec = recorded(model)
    assert rec.names[at] == '3' and len(rec.names) == at + 2
    assert rec.pairs[at] == pytest.approx(stats64(outs[5])[:2], rel=1e-5, abs=1e-6)


def test_weight_norm_is_no_norm_layer():
    model = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 10)))
    assert recorded(model).names == ['1']


HOW = {'vmap': lambda net, x: torch.func.vmap(net)(x)[:, None],
       'grad': lambda net, x: torch.func.grad(net)(x)[:, :10],
       'jvp': lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
       'vmap of grad': lambda net, x: torch.func.vmap(torch.func.grad(net))(x)[:, :10]}


@pytest.mark.parametrize('how', HOW)
def test_layers_inside_transforms_are_measured_and_train_the_same(how):
    def forward(m, x): return m.head(x.flatten(1)) + HOW[how](lambda x: m.b(m.a(x).tanh()).sum(), x.flatten(1))

    def model(): return Made(forward, a=nn.Linear(64, 16), b=nn.Linear(16, 1), head=nn.Linear(64, 10))
    outs = []
    keep = Do(before_batch=lambda l: outs.append(l.model.a(l.x.flatten(1)).detach()), order=-30)
    rec = ActivationStatsRecorder(hist=True, grads=True)
    assert same(trained(model), trained(model, rec, keep))
    first = at_step(rec, 0)
    assert (first['mean']['a'], first['std']['a']) == pytest.approx(stats64(outs[0])[:2], rel=1e-4, abs=1e-6)
    assert rec.hist('a')[:, 0].expm1().sum() == pytest.approx(16*16) and first['grad_std'].notna()['head']


def test_layers_that_one_stands_for_are_named():
    def ensemble(m, x):
        params,buffers = torch.func.stack_module_state(list(m.ms))
        def one(p, b, x): return torch.func.functional_call(m.ms[0], (p, b), (x,))
        return torch.func.vmap(one, in_dims=(0, 0, None))(params, buffers, x.flatten(1)).mean(0)
    rec = recorded(Made(ensemble, ms=nn.ModuleList(nn.Linear(64, 10) for _ in range(3))))
    assert np.isfinite(rec.pairs).all(1).tolist() == [True, False, False]
    assert rec.diagnose().unseen == ['ms.1', 'ms.2']


def test_gradients_of_the_outputs():
    outs,model = {},convnet(inplace=False)

    def keep(m, a, o):
        if not o.requires_grad: return o
        outs[m] = o.clone()  # its gradient is the output's, and the recorder sees this clone
        outs[m].retain_grad()
        return outs[m]
    for m in layers(model): m.register_forward_hook(keep)
    last = at_step(recorded(model, dls=digits(32), grads=True), 1)
    assert len(outs) == 3
    for name, m in zip(last.index, layers(model)):
        g = outs[m].grad.double()
        assert last['grad_std'][name] == pytest.approx(g.std().item(), rel=1e-5)
        assert last['grad_mean'][name] == pytest.approx(g.mean().item(), rel=1e-4, abs=1e-6*g.std().item())
        assert last['grad_zero'][name] == pytest.approx((g == 0).double().mean().item())


def test_outputs_and_gradients_are_measured_in_front_of_an_in_place_activation():
    a,b = (recorded(lambda: convnet(inplace), grads=True) for inplace in (True, False))
    pd.testing.assert_frame_equal(a.df(), b.df())


def test_gradients_are_freed_of_the_loss_scale():
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**12)
    scale = Do(order=10, before_fit=lambda l: setattr(l, 'scaler', scaler),
               before_backward=lambda l: setattr(l, 'loss_grad', scaler.scale(l.loss_grad)),
               after_batch=lambda l: scaler.update(2*scaler.get_scale()))
    plain,scaled = recorded(lr=0., grads=True),recorded(cbs=[scale], lr=0., grads=True)
    assert scaler.get_scale() > 2**12  # it grew on the way
    pd.testing.assert_frame_equal(plain.df(), scaled.df(), rtol=1e-5)


def test_pairs_print_as_a_table():
    rec = recorded()
    last = at_step(rec, 5)
    assert rec.pairs == list(zip(last['mean'], last['std']))
    assert all(type(v) is float for p in rec.pairs for v in p)
    lines = repr(rec.pairs).splitlines()
    assert lines[0].strip() == 'step 5 (epoch 0)'
    assert lines[1].split() == ['layer', 'mean', 'std']
    assert lines[2].split() == ['0', *(f'{v:.4f}' for v in rec.pairs[0])]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1


def test_df_is_tidy_and_a_layer_is_asked_for_by_place_or_by_name():
    rec = recorded(n=2, grads=True, valid=True)
    df = rec.df()
    assert list(df) == ['epoch', 'step', 'phase', 'layer', 'mean', 'std', 'near_zero', 'dead',
                        'grad_mean', 'grad_std', 'grad_zero']
    assert not df.duplicated(['epoch', 'step', 'phase', 'layer']).any() and len(df) == 2*7*3
    assert list(df.phase[::3]) == (['train']*6 + ['valid'])*2
    assert list(df.step[::3]) == [*range(6), 6, *range(6, 12), 12]
    assert list(df.layer[:3]) == rec.names == ['0', '2', '7']
    assert rec.layer_stats(-1) == rec.layer_stats('7') == rec.layer_stats(2)
