"`LSUVCallback` beside fastai's other callbacks, and in every kind of Learner."
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, before_batch_cb
from fastai.callback.all import ActivationStats, ChannelsLast, CSVLogger, GradientAccumulation, GradientClip, MixedPrecision, SaveModelCallback, ShowGraphCallback, TerminateOnNaNCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.rnn import ModelResetter
from fastai.callback.tensorboard import TensorBoardCallback
from learners import *

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback


# --- every kind of Learner trains, normalized

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_learner(kind):
    learn = KINDS[kind](LSUVCallback())
    learn.fit(1, 1e-3)
    assert learn.lsuv.report and math.isfinite(learn.recorder.losses[-1])
    assert all(abs(s - 1) < 0.2 for _, s in learn.lsuv.report.pairs)  # a head of two outputs has few numbers to go by


def test_recurrent_state_is_reset_for_training():
    "`ModelResetter` begins training from no state, LSUV or not."
    seen = []
    learn = language([LSUVCallback(), Around(lambda l: seen.append([h[0].abs().sum().item() for h in l.model[0].hidden]), 10.6)])
    learn.fit(1)
    assert seen == [[0., 0.]] and any(isinstance(cb, ModelResetter) for cb in learn.cbs)


# --- beside other callbacks

class EMA(Callback):
    "As fastxtend's: averages the weights in a copy of the model that it makes in `before_fit`."
    order = 11
    def before_fit(self):
        self.copy = deepcopy(self.model)
    def after_batch(self):
        if self.training:
            for p, q in zip(self.model.parameters(), self.copy.parameters()):
                q.data.lerp_(p.data, 0.1)


def test_an_average_starts_from_the_lsuv_weights():
    learn,seen = learner(cbs=[EMA(), LSUVCallback()]),[]
    learn.fit(1, cbs=Around(lambda l: seen.append((weights(l.model), weights(l.ema.copy))), 12))
    assert same(*seen[0]) and learn.lsuv.report


@pytest.mark.parametrize('cb', [MixedPrecision, lambda: MixedPrecision(amp_mode='bf16'), ChannelsLast, lambda: GradientAccumulation(32), GradientClip, MixUp, CutMix, TerminateOnNaNCallback,
                                ActivationStats, lambda: ActivationStats(with_hist=True, every=2), ActivationStatsRecorder, CSVLogger, EMA],
                         ids=['fp16', 'bf16', 'channels last', 'accumulation', 'clip', 'mixup', 'cutmix', 'nan', 'stats', 'histograms', 'recorder', 'csv', 'ema'])
def test_beside(cb, tmp_path):
    "It runs, leaves no trace, and training goes on."
    def make(cbs):
        learn = learner(cbs=[*cbs, cb()])
        learn.path = tmp_path
        return learn
    assert disturbed(make) == []
    learn = make([LSUVCallback()])
    learn.fit(2, 1e-3)
    assert learn.lsuv.report.ok and math.isfinite(learn.recorder.losses[-1])
    assert len(said(learn)) == 1


def test_beside_what_needs_progress_and_files(tmp_path):
    "`SaveModelCallback` stores the trained network; `TensorBoardCallback` traces the model; `ShowGraphCallback` draws."
    import matplotlib
    matplotlib.use('Agg')
    learn = learner(cbs=LSUVCallback())
    learn.path = tmp_path
    learn.fit(1, 1e-3, cbs=[SaveModelCallback(), TensorBoardCallback(tmp_path/'runs', trace_model=True, log_preds=False), ProgressCallback(), ShowGraphCallback(), CSVLogger()])
    assert learn.lsuv.report.ok and (tmp_path/'models'/'model.pth').exists() and list((tmp_path/'runs').iterdir())
    assert (tmp_path/'history.csv').read_text().startswith('epoch,')


@pytest.mark.parametrize('hooked', [ActivationStats, ActivationStatsRecorder])
def test_hooks_that_change_nothing_cost_no_second_run(hooked):
    "A layer that is watched is still solved in closed form: it runs once a pass."
    calls = []
    learn = learner(cbs=[hooked(), LSUVCallback()])
    learn.model[3].register_forward_pre_hook(lambda *_: calls.append(1))
    learn.fit(1, cbs=Stop())
    assert learn.lsuv.report.ok and len(calls) == learn.lsuv.report.n_passes


def test_statistics_of_others_begin_with_training():
    with_it,without = learner(cbs=[ActivationStats(), LSUVCallback()]),learner(cbs=ActivationStats())
    for learn in with_it,without:
        learn.fit(1)
    assert len(with_it.activation_stats.stats) == len(without.activation_stats.stats)


# --- what the model is fed

class Twice(Callback):
    "Doubles the input."
    def __init__(self, order=0):
        self.order = order
    def before_fit(self):
        self.by = 2.
    def before_batch(self):
        self.learn.xb = (self.x*self.by,)


def scale_seen(*cbs, **kwargs):
    "What the input's std is as LSUV sees it, as a share of that of the data."
    seen = []
    learn = learner(cbs=[LSUVCallback(**kwargs), *cbs])
    learn.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].std().item()))
    learn.lsuv_init() if kwargs.get('max_iter') == 1 else learn.fit(1, cbs=Stop())
    return np.mean(seen)/torch.stack([x for x, _ in images()]).std().item()


@pytest.mark.parametrize('outside', [False, True])
@pytest.mark.parametrize('cb', [Twice, lambda: Twice(20), lambda: Twice(200), lambda: Callback(before_batch=double), lambda: before_batch_cb(lambda self, xb, yb: ((xb[0]*2,), yb))],
                         ids=['order 0', 'order 20', 'order 200', 'instance', 'before_batch_cb'])
def test_callbacks_change_the_input(cb, outside):
    "Of any order, in a fit and outside, before their `before_fit` has run and after."
    assert scale_seen(cb(), **(dict(max_iter=1) if outside else {})) == pytest.approx(2, abs=0.05)
    assert scale_seen() == pytest.approx(1, abs=0.05)


def double(self):
    self.learn.xb = (self.x*2,)


class Autocast(Callback):
    "Mixed precision on the CPU, as fastai's on CUDA: entered before a batch, left after the loss."
    order = MixedPrecision.order
    def before_batch(self):
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self):
        self.learn.pred = self.pred.float()
    def after_loss(self):
        self.autocast.__exit__(None, None, None)


@pytest.mark.parametrize('outside', [False, True])
def test_in_the_autocast_that_a_callback_enters(outside):
    dtypes,loading = [],[]
    class Data:
        def __init__(self):
            self.items = images()
        def __len__(self): return 64
        def __getitem__(self, i):
            if isinstance(i, int):
                loading.append(torch.is_autocast_enabled('cpu'))
            return self.items[i]
    learn = learner(loaders(Data()), cbs=[LSUVCallback(), Autocast()])
    learn.model[3].register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    if outside:
        learn.lsuv_init()
    else:
        learn.fit(1, cbs=Stop())
    assert set(dtypes) == {torch.bfloat16} and not any(loading) and learn.lsuv.report.ok
    assert not torch.is_autocast_enabled('cpu') and torch.autocast_decrement_nesting() == -1 and torch.autocast_increment_nesting() == 0
    assert disturbed(lambda cbs: learner(cbs=[*cbs, Autocast()])) == []
    learn.fit(1, 1e-3)
    assert math.isfinite(learn.recorder.losses[-1])


class AutocastAll(Callback):
    "Entered for a whole epoch."
    def before_train(self):
        torch.autocast('cpu', dtype=torch.bfloat16).__enter__()
    def before_batch(self):
        assert torch.is_autocast_enabled('cpu')


def test_autocast_that_is_entered_before_the_batches():
    assert disturbed(lambda cbs: learner(cbs=[*cbs, AutocastAll()])) == []
    while torch.autocast_decrement_nesting() > 0:
        pass  # the callback leaves none of it
    torch.set_autocast_enabled('cpu', False)


# --- Cancel exceptions

class Cancels(Callback):
    run_valid,order = False,55  # after Recorder, which needs to be told of each epoch
    def __init__(self, event, error, times=10**6):
        self.event,self.error,self.times = event,error,times
    def before_epoch(self):
        self._at('before_epoch')
    def before_train(self):
        self._at('before_train')
    def before_batch(self):
        self._at('before_batch')
    def _at(self, event):
        if event == self.event and self.times > 0:
            self.times -= 1
            raise self.error


def test_a_batch_that_is_cancelled_is_not_used():
    learn = learner(cbs=[LSUVCallback(), Cancels('before_batch', CancelBatchException, 3)])
    learn.fit(1)
    assert learn.lsuv.report.ok


@pytest.mark.parametrize('event,error', [('before_batch', CancelBatchException), ('before_batch', CancelTrainException), ('before_batch', CancelEpochException), ('before_train', CancelTrainException),
                                         ('before_epoch', CancelEpochException), ('before_epoch', CancelFitException), ('before_batch', CancelFitException)])
def test_where_nothing_is_trained_nothing_is_initialized(event, error):
    learn = learner(cbs=[LSUVCallback(), Cancels(event, error)])
    w = weights(learn.model)
    learn.fit(1)
    assert same(weights(learn.model), w) and learn.lsuv.report is None
    assert said(learn) == ['LSUV left the model as it is: the training DataLoader yields no mini-batch, or callbacks cancel them all.']
    with pytest.raises(ValueError, match='yields no mini-batch'):
        learn.lsuv_init()


def test_a_cancelled_pass_cancels_the_fit():
    "A hook of the user's that ends the fit ends it, and the weights are as they were."
    learn = learner(cbs=LSUVCallback())
    def stop(*_):
        raise CancelFitException
    learn.model[-1].register_forward_hook(stop)
    w = weights(learn.model)
    learn.fit(1)
    assert same(weights(learn.model), w) and not hasattr(learn.recorder, 'losses')


# --- order

def test_its_order():
    from fastai.callback.schedule import LRFinder
    from fastai.distributed import DistributedTrainer
    from fastai.basics import Recorder, TrainEvalCallback
    cb = LSUVCallback
    assert max(TrainEvalCallback.order, ChannelsLast.order, Callback.order, MixedPrecision.order) < cb.order
    assert cb.order < min(DistributedTrainer.order, EMA.order, LRFinder.order, Recorder.order, ProgressCallback.order)
