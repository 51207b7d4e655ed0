"Which layers and which steps are recorded, over one fit and over several."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import CancelBatchException, CancelFitException
from fastai.callback import schedule  # noqa: F401 (adds `lr_find`)
from recording import Do, Net, at_step, convnet, digits, fit, hooks_on, keep_outputs, learner, recorded, stats64
from torch import nn

from fastai_lsuv import LSUVCallback
from fastai_lsuv.recorder import ActivationStatsRecorder

FASTAI = 40, 0., 10.


@pytest.mark.parametrize('make, module, name', [(convnet, '0', '0'), (Net, 'conv1d', 'conv1d.weight')])
def test_validation_is_one_record_of_all_its_batches(make, module, name):
    model = make()
    outs = keep_outputs(model.get_submodule(module), training=False)
    rec = recorded(model, dls=digits(16, 300, bs=4), valid=True, hist=FASTAI, grads=True)
    assert len(outs) == 75  # more than are pooled at a time
    assert [v[0] for v in rec.layer_stats(name, 'valid')] == pytest.approx(stats64(torch.cat(outs)), rel=1e-4)
    np.testing.assert_allclose(rec.hist(name, 'valid')[:, 0], torch.cat(outs).histc(*FASTAI).log1p(), rtol=1e-6)
    valid = rec.df().query("phase == 'valid'")
    assert valid.grad_std.isna().all() and (valid.step == 4).all() and list(valid.layer) == rec.names


def test_not_a_number_in_one_validation_batch_shows():
    model = convnet()
    model[0].register_forward_hook(lambda m, a, o: o if m.training or len(o) == 16 else o*float('nan'))
    rec = recorded(model, valid=True, grads=True)
    assert np.isnan(rec.layer_stats(0, 'valid')[0][0]) and np.isfinite(rec.layer_stats(0)[0]).all()


def test_the_passes_of_lsuv_are_not_recorded():
    rec = recorded(cbs=[LSUVCallback()])
    assert len(rec.df()) == 18 and list(at_step(rec, 0)['std']) == pytest.approx([1, 1, 1], abs=0.25)


def test_only_the_batches_of_a_fit_are_recorded():
    other,labels,hooks = torch.full((4, 1, 8, 8), 1e4),torch.zeros(4).long(),[]

    def net(): return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 10))

    def run(learn): learn.model(other)

    def predict(learn):
        if not hasattr(learn, 'gather_preds'): learn.get_preds(dl=[(other, labels)], inner=True, cbs=None)
    runs = Do(before_fit=lambda l: [run(l), hooks.append(hooks_on(l.model))], after_loss=run, after_batch=run,
              after_epoch=lambda l: l.one_batch(0, (other, labels)))  # as TensorBoardCallback does
    runs.run_valid = False
    rec,alone = recorded(net, 2, [runs, Do(after_validate=predict)], valid=True),recorded(net, 2, valid=True)
    assert hooks == [0]
    np.testing.assert_allclose(at_step(rec, 0)['mean'], at_step(alone, 0)['mean'])
    assert rec.df()['mean'].abs().max() < 10 and len(rec.df()) == len(alone.df())


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


def test_cancelled_batches_leave_no_record():
    def cancel(learn):
        if learn.training and learn.train_iter % 2: raise CancelBatchException()
    assert list(recorded(cbs=[Do(before_batch=cancel)]).df().step.unique()) == [0, 2, 4]


@pytest.mark.parametrize('append,rows', [(False, 6), (True, 6+1+6)])
def test_a_new_fit_starts_anew_unless_append(append, rows, tmp_path):
    rec = ActivationStatsRecorder(append=append, fname='a.csv')
    learn = fit(learner(cbs=rec, path=tmp_path))

    def stop(learn): raise CancelFitException()
    fit(learn, cbs=Do(after_batch=stop))
    fit(learn)
    df,on_disk = rec.df(),pd.read_csv(tmp_path/'a.csv', dtype={'layer': str})
    assert len(df) == rows*3 and list(df.step[::3]) == list(range(rows))
    assert list(df.epoch.unique()) == [[0], [0, 1, 2]][append]
    pd.testing.assert_frame_equal(on_disk, df, check_dtype=False, rtol=1e-6)


def test_appending_to_another_model_starts_anew():
    rec = recorded(append=True)
    with pytest.warns(UserWarning, match='layers changed'):
        fit(learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), cbs=rec))
    assert rec.names == ['1'] and len(rec.df()) == 6


def test_a_fit_from_a_later_epoch():
    rec = ActivationStatsRecorder(valid=True)
    fit(learner(cbs=rec), 3, start_epoch=2)
    assert list(rec.df().epoch.unique()) == [2]
