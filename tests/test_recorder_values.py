"The numbers that `ActivationStatsRecorder` records of a network in training, against fastai's and against torch."
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import SGD, Callback, CastToTensor
from fastai.callback.hook import ActivationStats
from recording import Do, Odd, convnet, digits, fit, keep_outputs, layers, learner, stats64, twin_of
from torch import Tensor, nn

from fastai_lsuv.recorder import ActivationStatsRecorder

FASTAI = 40, 0., 10.
still = dict(opt_func=partial(SGD, lr=0.))  # a Learner whose weights stay


# ---- Against fastai ----

@pytest.mark.parametrize('every', [1, 3])
@pytest.mark.parametrize('hist', [None, FASTAI])
def test_same_numbers_as_fastai(every, hist):
    model = convnet()
    ours = ActivationStatsRecorder(modules=layers(model), every=every, hist=hist)
    theirs = ActivationStats(modules=layers(model), every=every, with_hist=bool(hist))
    fit(learner(model, cbs=[ours, theirs]), 2)
    assert len(theirs.stats) == 12//every
    for i in range(3):
        a, b = ours.layer_stats(i), theirs.layer_stats(i)
        assert type(a) is type(b) and len(a) == len(b) == 3
        for u, v in zip(a, b):
            assert type(u) is type(v) and type(u[0]) is type(v[0]) is float and len(u) == len(v)
            np.testing.assert_allclose(u, v, rtol=2e-6, atol=1e-7)
        if hist:
            assert torch.equal(ours.hist(i), theirs.hist(i))
            assert ours.hist(i).shape == (40, 12//every)


def test_the_upper_half_of_the_default_histogram_is_that_of_fastai():
    model = convnet()
    ours = ActivationStatsRecorder(modules=layers(model), hist=True)
    theirs = ActivationStats(modules=layers(model), with_hist=True)
    fit(learner(model, cbs=[ours, theirs]))
    for i in range(3):
        assert ours.hist(i).shape == (80, 6)
        assert torch.equal(ours.hist(i)[40:], theirs.hist(i))
        assert ours.hist(i)[:40].sum() > 0


# ---- Outputs of every kind ----

def test_the_output_is_measured_before_an_in_place_activation():
    seen, model = {}, convnet(inplace=True)
    twin = twin_of(model)
    for i, m in enumerate(layers(twin)):
        m.register_forward_hook(lambda m, a, o, i=i: seen.__setitem__(i, o))

    def run_twin(learn):
        if not learn.training: return
        twin.load_state_dict(model.state_dict())
        state = torch.get_rng_state()
        twin.train()(*learn.xb)
        torch.set_rng_state(state)
    rec = ActivationStatsRecorder()
    fit(learner(model, cbs=[rec, Do(before_batch=run_twin)]))
    for i, pair in enumerate(rec.pairs):
        assert pair == pytest.approx(stats64(seen[i])[:2], rel=1e-5)


def test_outputs_of_every_shape():
    model = Odd()
    calls = keep_outputs(model.shared)
    rec = ActivationStatsRecorder(hist=(10, -1., 1.), grads=True)
    fit(learner(model, cbs=rec, dls=digits(16, shuffle=False)))
    got = dict(zip(rec.names, rec.pairs))
    assert rec.names == ['tup', 'dic', 'int', 'cplx', 'shared', 'idle', 'head']
    for silent in ('int', 'cplx', 'idle'):
        assert np.isnan(got[silent]).all()
    together = torch.cat([c.flatten() for c in calls[:3]])
    assert got['shared'] == pytest.approx(stats64(together)[:2], rel=1e-5)
    assert rec.layer_stats('shared')[2][0] == pytest.approx(stats64(together)[2])
    assert torch.equal(rec.hist('shared')[:, 0], together.histc(10, -1, 1).log1p())
    assert np.isfinite(got['tup']).all() and np.isfinite(got['dic']).all()
    assert rec.df().set_index('layer').loc['idle', ['mean', 'dead', 'grad_std']].isna().all()


class LanguageClassifier(nn.Module):
    "fastai's AWD_LSTM, and a head on its last output."
    def __init__(self, width=12, hidden=24):
        from fastai.text.models.awdlstm import AWD_LSTM
        super().__init__()
        self.encoder, self.head = AWD_LSTM(20, width, hidden, 2), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.encoder(x)[:, -1])

    def reset(self):
        self.encoder.reset()


def letters():
    return digits(shape=(64,), tfm=lambda x: ((x+1)*8).long())


def test_awd_lstm_is_recorded():
    model, outs = LanguageClassifier(), []
    last = model.encoder.rnns[1].module
    attach = Do(before_train=lambda l: last.register_forward_hook(lambda m, a, o: outs.append(o[0].detach())))
    rec = ActivationStatsRecorder(grads=True)
    learn = fit(learner(model, cbs=[rec, attach], dls=letters()))
    assert rec.names == ['encoder.rnns.0.module', 'encoder.rnns.1.module', 'head']
    assert rec.df().notna().all().all() and len(rec.df()) == 6*3
    assert rec.pairs[1] == pytest.approx(stats64(outs[5])[:2], rel=1e-5)
    # fastai's cannot: its statistics of a tuple are a list.
    theirs = ActivationStats(modules=[last])
    learn.add_cb(theirs)
    fit(learn)
    with pytest.raises(TypeError):
        np.array(theirs.layer_stats(0)[0], dtype=float)


class Cells(nn.Module):
    "A recurrent layer on packed sequences, and a cell that is called for each of eight steps."
    def __init__(self):
        super().__init__()
        self.gru, self.cell, self.head = nn.GRU(8, 6, batch_first=True), nn.LSTMCell(6, 5), nn.Linear(5, 10)

    def forward(self, x):
        x = nn.utils.rnn.pack_padded_sequence(x, [8]*len(x), batch_first=True)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.gru(x)[0], batch_first=True)
        h = None
        for t in range(8):
            h = self.cell(x[:, t], h)
        return self.head(h[0])


def test_recurrent_cells_and_packed_sequences():
    model, outs = Cells(), []
    model.cell.register_forward_hook(lambda m, a, o: outs.append(o[0].detach()))
    rec = ActivationStatsRecorder()
    fit(learner(model, cbs=rec, dls=digits(16, valid=0, shape=(8, 8))))
    assert rec.names == ['gru', 'cell', 'head']
    assert np.isfinite(rec.pairs).all()
    assert rec.pairs[1] == pytest.approx(stats64(torch.cat(outs))[:2], rel=1e-5)


def test_mixed_precision():
    model = convnet()
    rec = ActivationStatsRecorder(hist=FASTAI, grads=True)
    cast = torch.autocast('cpu', dtype=torch.bfloat16)
    within = Do(before_batch=lambda l: cast.__enter__(), after_loss=lambda l: cast.__exit__(None, None, None))
    outs = keep_outputs(model[0])
    fit(learner(model, cbs=[rec, within]))
    assert outs[5].dtype == torch.bfloat16
    assert rec.pairs[0] == pytest.approx(stats64(outs[5])[:2], rel=1e-5)
    assert torch.equal(rec.hist(0)[:, 5], outs[5].float().histc(*FASTAI).log1p())
    assert np.isfinite(rec.df()['grad_std']).all()


def test_subclassed_tensors():
    from fastai.vision.all import TensorImage
    rec, kinds = ActivationStatsRecorder(hist=True, grads=True), []
    learn = learner(cbs=[rec, Do(after_pred=lambda l: kinds.append(type(l.pred)))], dls=digits(tfm=TensorImage))
    learn.remove_cb(CastToTensor)
    stored = []
    learn.add_cb(Do(order=-15, after_batch=lambda l: stored.append(type(rec._store.rows['train'][-1].values))))
    fit(learn)
    assert TensorImage in kinds
    assert set(stored) == {Tensor}
    assert rec.df().notna().all().all()


def test_channels_last():
    rec, plain = ActivationStatsRecorder(hist=True), ActivationStatsRecorder(hist=True)

    def to_channels_last(learn):
        learn.xb = (learn.xb[0].to(memory_format=torch.channels_last),)
    fit(learner(cbs=plain, **still), lr=0.)
    fit(learner(lambda: convnet().to(memory_format=torch.channels_last), cbs=[rec, Do(before_batch=to_channels_last)],
                **still), lr=0.)
    for i in (0, 1):  # dropout, between these and the last layer, draws in the order of memory
        np.testing.assert_allclose(rec.layer_stats(i), plain.layer_stats(i), rtol=1e-4, atol=1e-6)
        assert (rec.hist(i).expm1() - plain.hist(i).expm1()).abs().max() < 1.5


def test_large_activations_are_sampled_and_small_ones_are_not():
    big = nn.Sequential(nn.Conv2d(1, 320, 3, padding=1), nn.ReLU(), nn.Conv2d(320, 4, 8), nn.Flatten(),
                        nn.Linear(4, 10))
    rec = ActivationStatsRecorder(sample=2, hist=True, grads=True)
    outs, small = keep_outputs(big[0]), keep_outputs(big[2])
    fit(learner(big, cbs=rec, dls=digits(16, valid=0)))
    assert outs[0].numel() > 2**18 > small[0].numel()
    assert rec.pairs[0] == pytest.approx(stats64(outs[0][::2])[:2], rel=1e-5)
    assert rec.pairs[1] == pytest.approx(stats64(small[0])[:2], rel=1e-5)
    assert rec.layer_stats(0)[2][0] == pytest.approx(stats64(outs[0][::2])[2], rel=1e-6)
    np.testing.assert_allclose(rec.hist(0)[:, 0].expm1(), 2*outs[0][::2].histc(80, -10, 10), rtol=1e-5, atol=1e-3)
    assert rec.df()['grad_std'].notna().all()


# ---- Gradients ----

def test_gradients_of_the_outputs():
    outs, model = {}, convnet(inplace=False)

    def keep(m, a, o):
        if not o.requires_grad: return o
        outs[m] = o.clone()  # its gradient is the output's
        outs[m].retain_grad()
        return outs[m]
    for m in layers(model):
        m.register_forward_hook(keep)
    rec = ActivationStatsRecorder(grads=True)
    fit(learner(model, cbs=rec, dls=digits(32)))
    df = rec.df().query('step == 1').set_index('layer')
    assert len(outs) == 3
    # The hooks of the recorder come after `keep`, and see its clone.
    for name, m in model.named_modules():
        if m not in outs: continue
        g = outs[m].grad.double()
        assert df.loc[name, 'grad_std'] == pytest.approx(g.std().item(), rel=1e-5)
        assert df.loc[name, 'grad_mean'] == pytest.approx(g.mean().item(), rel=1e-4, abs=1e-6*g.std().item())
        assert df.loc[name, 'grad_zero'] == pytest.approx((g == 0).double().mean().item())


def test_gradients_in_front_of_an_in_place_activation():
    a, b = (ActivationStatsRecorder(grads=True) for _ in range(2))
    fit(learner(lambda: convnet(inplace=True), cbs=a))
    fit(learner(lambda: convnet(inplace=False), cbs=b))
    pd.testing.assert_frame_equal(a.df(), b.df())


class Scale(Callback):
    "What fastai's `MixedPrecision` does to the loss, on the CPU."
    order = 10

    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**12, growth_interval=2)

    def before_backward(self):
        self.learn.loss_grad = self.learn.scaler.scale(self.loss_grad)

    def before_step(self):
        self.learn.scaler.step(self)

    def after_step(self):
        self.learn.scaler.update()

    @property
    def param_groups(self):
        return self.opt.param_groups

    def step(self, *args, **kwargs):
        pass


def test_gradients_are_freed_of_the_loss_scale():
    plain, scaled = ActivationStatsRecorder(grads=True), ActivationStatsRecorder(grads=True)
    fit(learner(cbs=plain, **still), lr=0.)
    learn = fit(learner(cbs=[scaled, Scale()], **still), lr=0.)
    assert learn.scaler.get_scale() > 2**12  # it grew on the way
    pd.testing.assert_frame_equal(plain.df(), scaled.df(), rtol=1e-5)


# ---- Tables ----

def test_pairs_print_as_a_table():
    rec = ActivationStatsRecorder()
    fit(learner(cbs=rec))
    last = rec.df().query('step == 5')
    assert rec.pairs == list(zip(last['mean'], last['std']))
    assert all(type(v) is float for p in rec.pairs for v in p)
    lines = repr(rec.pairs).splitlines()
    assert lines[0].strip() == 'step 5 (epoch 0)'
    assert lines[1].split() == ['layer', 'mean', 'std']
    assert lines[2].split() == ['0', *(f'{v:.4f}' for v in rec.pairs[0])]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1


def test_df_is_tidy():
    rec = ActivationStatsRecorder(grads=True, valid=True)
    fit(learner(cbs=rec), 2)
    df = rec.df()
    assert list(df) == ['epoch', 'step', 'phase', 'layer', 'mean', 'std', 'near_zero', 'dead',
                        'grad_mean', 'grad_std', 'grad_zero']
    assert not df.duplicated(['epoch', 'step', 'phase', 'layer']).any() and len(df) == 2*7*3
    assert list(df.phase[::3]) == (['train']*6 + ['valid'])*2
    assert list(df.step[::3]) == [*range(6), 6, *range(6, 12), 12]
    assert list(df.layer[:3]) == rec.names == ['0', '2', '7']
