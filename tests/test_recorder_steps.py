"Which layers and which steps are recorded, over one fit and over several."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CancelFitException
from fastai.callback import schedule  # noqa: F401 (adds `lr_find`)
from recording import Do, convnet, digits, fit, hooks_on, learner, stats64
from torch import nn

from fastai_lsuv import LSUVCallback
from fastai_lsuv.recorder import ActivationStatsRecorder

FASTAI = 40, 0., 10.


@pytest.mark.parametrize('modules,names', [(nn.Conv2d, ['0', '2']), ('7', ['7']), (['2', nn.Linear], ['2', '7']),
                                           (lambda m: isinstance(m, nn.ReLU), ['1', '4'])])
def test_modules_pick_the_layers(modules, names):
    rec = ActivationStatsRecorder(modules)
    fit(learner(cbs=rec))
    assert rec.names == names
    assert list(rec.df().layer.unique()) == names


# ---- Validation ----

def test_validation_is_one_record_of_all_its_batches():
    model = convnet()
    outs = []
    model[0].register_forward_hook(lambda m, a, o: outs.append(o.detach().clone()) if not m.training else None)
    rec = ActivationStatsRecorder(valid=True, hist=FASTAI, grads=True)
    fit(learner(model, cbs=rec, dls=digits(16, 300, bs=4)))  # 75 batches: more than are pooled at a time
    assert len(outs) == 75
    together = torch.cat(outs)
    (mean,), (std,), (zero,) = rec.layer_stats(0, 'valid')
    assert (mean, std, zero) == pytest.approx(stats64(together), rel=1e-5)
    np.testing.assert_allclose(rec.hist(0, 'valid')[:, 0], together.histc(*FASTAI).log1p(), rtol=1e-6)
    valid = rec.df().query("phase == 'valid'")
    assert valid.grad_std.isna().all() and (valid.step == 4).all()


def test_not_a_number_in_one_validation_batch_shows():
    model = convnet()

    def break_one(m, a, o):
        return o*float('nan') if not m.training and learn.iter == 1 else o
    model[0].register_forward_hook(break_one)
    rec = ActivationStatsRecorder(valid=True, grads=True)
    learn = learner(model, cbs=rec)
    fit(learn)
    assert np.isnan(rec.layer_stats(0, 'valid')[0][0])
    assert np.isfinite(rec.layer_stats(0)[0]).all()


# ---- What is no training ----

def test_the_passes_of_lsuv_are_not_recorded():
    rec = ActivationStatsRecorder()
    fit(learner(cbs=[LSUVCallback(), rec]))
    assert len(rec.df()) == 18
    assert list(rec.df().query('step == 0')['std']) == pytest.approx([1, 1, 1], abs=0.25)


def test_only_the_batches_of_a_fit_are_recorded():
    other, labels = torch.full((4, 1, 8, 8), 1e4), torch.zeros(4).long()
    hooks = []

    class Runs(Callback):
        "Runs the model on other data, at every event where one may."
        run_valid = False

        def before_fit(self):
            self.learn.model(other)
            hooks.append(hooks_on(self.model))

        def after_loss(self):
            self.learn.model(other)

        def after_batch(self):
            self.learn.model(other)

        def after_epoch(self):
            self.learn.one_batch(0, (other, labels))  # as TensorBoardCallback does

    class Predicts(Callback):
        def after_validate(self):
            if not hasattr(self.learn, 'gather_preds'):
                self.learn.get_preds(dl=[(other, labels)], inner=True, cbs=None)

    def net():
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 10))
    rec, alone = ActivationStatsRecorder(valid=True), ActivationStatsRecorder(valid=True)
    fit(learner(net, cbs=alone), 2)
    fit(learner(net, cbs=[rec, Runs(), Predicts()]), 2)
    assert hooks == [0]
    np.testing.assert_allclose(rec.df().query('step == 0')['mean'], alone.df().query('step == 0')['mean'])
    assert rec.df()['mean'].abs().max() < 10 and len(rec.df()) == len(alone.df())


def test_lr_find_predictions_and_validation_leave_records_alone(tmp_path):
    rec = ActivationStatsRecorder(valid=True, fname='a.csv')
    learn = fit(learner(cbs=rec, path=tmp_path), 2)
    before, file = rec.df(), (tmp_path/'a.csv').read_text()
    with learn.no_logging(), learn.no_mbar():
        learn.lr_find(num_it=10, show_plot=False)
        learn.get_preds()
        learn.validate()
    pd.testing.assert_frame_equal(rec.df(), before)
    assert (tmp_path/'a.csv').read_text() == file
    assert hooks_on(learn.model) == 0


def test_cancelled_batches_leave_no_record():
    rec = ActivationStatsRecorder()

    def cancel(learn):
        if learn.training and learn.train_iter % 2: raise CancelBatchException()
    fit(learner(cbs=[rec, Do(before_batch=cancel)]))
    assert list(rec.df().step.unique()) == [0, 2, 4]


# ---- Several fits ----

@pytest.mark.parametrize('append,rows', [(False, 6), (True, 6+1+6)])
def test_a_new_fit_starts_anew_unless_append(append, rows, tmp_path):
    rec = ActivationStatsRecorder(append=append, fname='a.csv')
    learn = fit(learner(cbs=rec, path=tmp_path))

    def stop(learn):
        raise CancelFitException()
    fit(learn, cbs=Do(after_batch=stop))
    fit(learn)
    df = rec.df()
    assert len(df) == rows*3 and list(df.step[::3]) == list(range(rows))
    assert list(df.epoch.unique()) == [[0], [0, 1, 2]][append]
    on_disk = pd.read_csv(tmp_path/'a.csv', dtype={'layer': str})
    pd.testing.assert_frame_equal(on_disk, df, check_dtype=False, rtol=1e-6)


def test_appending_to_another_model_starts_anew():
    rec = ActivationStatsRecorder(append=True)
    fit(learner(cbs=rec))
    with pytest.warns(UserWarning, match='layers changed'):
        fit(learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), cbs=rec))
    assert rec.names == ['1'] and len(rec.df()) == 6


def test_a_fit_from_a_later_epoch():
    rec = ActivationStatsRecorder(valid=True)
    fit(learner(cbs=rec), 3, start_epoch=2)
    assert list(rec.df().epoch.unique()) == [2]
