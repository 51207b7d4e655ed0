"`LSUVCallback` and `Learner.lsuv_init`: options, Learners, the callbacks beside it, the log and the progress bar."
import math
import pickle
import subprocess
import sys
from copy import deepcopy
from functools import partial

import matplotlib
import pytest
import torch
from fastai.basics import Callback, CancelFitException, Learner, Recorder, TrainEvalCallback, set_seed
from fastai.callback.all import (ActivationStats, ChannelsLast, CSVLogger, GradientAccumulation, GradientClip,
                                 MixedPrecision, SaveModelCallback, ShowGraphCallback, TerminateOnNaNCallback)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.distributed import DistributedTrainer
from learners import *
from torch import nn

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, lsuv_init
from fastai_lsuv.learner import callback as room


# --- options

def test_options_reach_lsuv():
    options = dict(order='mean std', target_std=2., preinit=None, baseline=True, modules=nn.Linear, per_channel=True)
    report = learner(cbs=LSUVCallback(**options)).lsuv_init()
    assert [r.kind for r in report] == ['Linear'] and report.order == 'mean std'
    assert report[0].std == pytest.approx(2, abs=0.2) and report[0].std_before is not None


def test_lsuv_init_takes_options_in_place_of_the_callbacks():
    learn = learner(cbs=LSUVCallback(target_std=2., min_samples=32))
    assert learn.lsuv_init(order='mean std').order == 'mean std'
    assert learn.lsuv.report[0].std == pytest.approx(2, abs=0.2)
    assert learn.lsuv.report[0].shape[0] == 32 and learn.lsuv_init(min_samples=5)[0].shape[0] == 16
    assert learn.lsuv.options['order'] == 'std mean'
    learn.lsuv_init(every_fit=True)
    learn.fit(1)
    assert learn.lsuv.every_fit and 'at std' in said(learn)[-1]


def test_lsuv_init_without_a_callback():
    learn = learner()
    report = learn.lsuv_init(target_std=0.5)
    assert learn.lsuv.report is report and report[0].std == pytest.approx(0.5, abs=0.05)
    learn.fit(1)
    assert 'initialized before' in said(learn)[-1]


def test_lsuv_init_inside_a_fit():
    learn = learner(cbs=[LSUVCallback(), Around(lambda l: l.lsuv_init(target_std=3.), 70)])
    learn.fit(1, cbs=Stop())
    assert learn.lsuv.report[0].std == pytest.approx(3, abs=0.3) and len(said(learn)) == 2


@pytest.mark.parametrize('options, message', [
    (dict(min_samples=0), 'min_samples'),
    (dict(min_samples=True), 'min_samples'),
    (dict(order='std men'), 'men'),
    (dict(tol=-1), 'tol'),
    (dict(max_iter=0), 'max_iter'),
    (dict(preinit='kaiming'), 'preinit'),
], ids=str)
def test_options_are_checked_when_given(options, message):
    learn = learner(cbs=LSUVCallback())
    for take in LSUVCallback, learn.lsuv_init:
        with pytest.raises(ValueError, match=message): take(**options)


def test_the_same_weights_as_lsuv_init():
    learn = learner(cbs=LSUVCallback())
    model,((xb,),) = deepcopy(learn.model),batches(learn, 1)[0]
    learn.lsuv_init(preinit=None, batch_tol=10.)
    lsuv_init(model, xb, preinit=None, batch_tol=10.)
    assert same(weights(model), weights(learn.model))


def test_lsuv_init_of_a_learner_is_at_hand_for_whoever_has_loaded_fastai():
    code = "from fastai.learner import Learner; import fastai_lsuv; assert hasattr(Learner, 'lsuv_init')"
    subprocess.run([sys.executable, '-c', code], check=True)


# --- Learners and models of all sorts

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_learner(kind):
    learn = KINDS[kind](LSUVCallback())
    learn.fit(1, 1e-3)
    assert learn.lsuv.report and math.isfinite(learn.recorder.losses[-1])
    assert all(abs(s - 1) < 0.2 for _, s in learn.lsuv.report.pairs)  # a head of two outputs has few numbers to go by


def test_without_recorder_and_default_callbacks():
    set_seed(0)
    learn = Learner(loaders(), cnn(), loss_func=CrossEntropyLossFlat(), cbs=LSUVCallback(), default_cbs=False)
    learn.lines = []
    learn.logger = learn.lines.append
    for _ in range(2): learn.fit(1)
    assert learn.lsuv.report.ok and len(said(learn)) == 2


def compiled_in_place(model):
    model.compile(backend='eager')
    return model


@pytest.mark.parametrize('put, names', [
    (lambda model: nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), ['1']),
    (partial(torch.compile, backend='eager'), ['0', '3', '8']),
    (compiled_in_place, ['0', '3', '8']),
], ids=['another', 'compiled', 'compiled in place'])
def test_a_model_put_in_place_of_another(put, names):
    learn = learner(cbs=LSUVCallback())
    learn.model = put(learn.model)
    learn.fit(1, 1e-3)
    assert learn.lsuv.report.ok and [r.name for r in learn.lsuv.report] == names
    learn.fit(1, 1e-3)
    assert 'initialized before' in said(learn)[-1]
    learn.model,learn.opt = cnn(),None
    learn.fit(1)
    assert ' at std 1' in said(learn)[-1]


def test_a_model_on_another_device_than_the_data():
    "It is run where it is. `meta` holds no numbers, so this tests only the move."
    learn = learner(cbs=LSUVCallback())
    learn.dls.device = torch.device('meta')
    learn.dls.train.device = None
    assert learn.lsuv_init().ok and next(learn.model.parameters()).device.type == 'cpu'


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    assert learner(model=model, cbs=LSUVCallback(), opt_func=lambda *args, **kwargs: None).lsuv_init().ok


def test_removed_and_added_again():
    learn = learner(cbs=LSUVCallback())
    with learn.removed_cbs(learn.lsuv): learn.model.load_state_dict(cnn().state_dict())
    learn.fit(1)
    assert 'its weights were loaded' in said(learn)[0]


def test_a_model_of_embeddings_is_left_and_the_fit_goes_on():
    class Dot(nn.Module):
        def __init__(self):
            super().__init__()
            self.users,self.items = nn.Embedding(5, 4),nn.Embedding(5, 4)
        def forward(self, x): return (self.users(x[:, 0])*self.items(x[:, 1])).sum(1)
    rows = [(torch.randint(0, 5, (2,)), torch.rand(())) for _ in range(64)]
    learn = learner(loaders(rows), Dot(), cbs=LSUVCallback(), loss_func=nn.MSELoss())
    learn.fit(1)
    line, = said(learn)
    assert line.startswith('LSUV left the model as it is: Dot has no conv') and '`modules`' not in line
    assert repr(learn.lsuv.report) == line and len(learn.recorder.losses) == 4
    with pytest.raises(ValueError, match='there is nothing to normalize'): learn.lsuv_init()


# --- beside other callbacks

class EMA(Callback):
    "It averages the weights in a copy of the model that it makes in `before_fit`, as fastxtend's does."
    order = 11
    def before_fit(self): self.copy = deepcopy(self.model)
    def after_batch(self):
        if not self.training: return
        for p, q in zip(self.model.parameters(), self.copy.parameters()): q.data.lerp_(p.data, 0.1)


def test_an_average_starts_from_the_lsuv_weights():
    learn,seen = learner(cbs=[EMA(), LSUVCallback()]),[]
    learn.fit(1, cbs=Around(lambda l: seen.append((weights(l.model), weights(l.ema.copy))), 12))
    assert same(*seen[0]) and learn.lsuv.report


@pytest.mark.parametrize('cb', [
    pytest.param(MixedPrecision, id='fp16'),
    pytest.param(partial(MixedPrecision, amp_mode='bf16'), id='bf16'),
    pytest.param(ChannelsLast, id='channels last'),
    pytest.param(partial(GradientAccumulation, 32), id='accumulation'),
    pytest.param(GradientClip, id='clip'),
    pytest.param(MixUp, id='mixup'),
    pytest.param(CutMix, id='cutmix'),
    pytest.param(TerminateOnNaNCallback, id='nan'),
    pytest.param(ActivationStats, id='stats'),
    pytest.param(partial(ActivationStats, with_hist=True, every=2), id='histograms'),
    pytest.param(ActivationStatsRecorder, id='recorder'),
    pytest.param(CSVLogger, id='csv'),
    pytest.param(EMA, id='ema'),
])
def test_beside(cb, tmp_path):
    "It runs, leaves no trace, and training goes on."
    def make(cbs):
        learn = learner(cbs=[*cbs, cb()])
        learn.path = tmp_path
        return learn
    assert disturbed(make) == []
    learn = make([LSUVCallback()])
    learn.fit(2, 1e-3)
    assert learn.lsuv.report.ok and math.isfinite(learn.recorder.losses[-1]) and len(said(learn)) == 1


def test_beside_what_needs_progress_and_files(tmp_path):
    "`SaveModelCallback` stores the trained network; `TensorBoardCallback` traces the model; `ShowGraphCallback` draws."
    matplotlib.use('Agg')
    learn = learner(cbs=LSUVCallback())
    learn.path = tmp_path
    board = TensorBoardCallback(tmp_path/'runs', trace_model=True, log_preds=False)
    learn.fit(1, 1e-3, cbs=[SaveModelCallback(), board, ProgressCallback(), ShowGraphCallback(), CSVLogger()])
    assert learn.lsuv.report.ok and (tmp_path/'models'/'model.pth').exists() and list((tmp_path/'runs').iterdir())
    assert (tmp_path/'history.csv').read_text().startswith('epoch,')


@pytest.mark.parametrize('hooked', [ActivationStats, ActivationStatsRecorder])
def test_a_layer_that_is_watched_runs_once_a_pass_and_the_statistics_begin_with_training(hooked):
    calls,training,watch = [],[],hooked()
    learn = learner(cbs=[watch, LSUVCallback(), Around(lambda learn: training.append(len(calls)), 10.6)])
    learn.model[3].register_forward_pre_hook(lambda *_: calls.append(1))
    learn.fit(1)
    assert learn.lsuv.report.ok and training == [learn.lsuv.report.n_passes]
    if hooked is ActivationStats: assert len(watch.stats) == len(learn.dls.train)


def test_a_cancelled_pass_cancels_the_fit():
    "A hook of the user's that ends the fit ends it, and the weights are as they were."
    learn = learner(cbs=LSUVCallback())
    def stop(*_): raise CancelFitException
    learn.model[-1].register_forward_hook(stop)
    w = weights(learn.model)
    learn.fit(1)
    assert same(weights(learn.model), w) and not hasattr(learn.recorder, 'losses')


def test_its_order():
    cb = LSUVCallback
    assert max(TrainEvalCallback.order, ChannelsLast.order, Callback.order, MixedPrecision.order) < cb.order
    assert cb.order < min(DistributedTrainer.order, EMA.order, LRFinder.order, Recorder.order, ProgressCallback.order)


# --- the progress bar

class Bar:
    "Stands in for fastprogress's."
    made = []
    def __init__(self, gen, leave):
        self.total,self.leave,self.seen,self.last_v = len(gen),leave,[],None
        Bar.made.append(self)
    def update(self, v):
        assert self.seen or v == 0, "fastprogress needs a start"
        self.last_v = v if v < self.total else None
        self.seen.append(v)
        if self.last_v is None: self.on_iter_end()
    def on_iter_end(self):
        self.seen.append('end')
        self.last_v = None


@pytest.fixture
def bars(monkeypatch):
    Bar.made = []
    monkeypatch.setattr(room, 'progress_bar', Bar)
    monkeypatch.setattr(room, '_LONG', -1.)
    return Bar.made


def with_progress(**kwargs):
    learn = learner(cbs=LSUVCallback(), **kwargs)
    learn.add_cb(ProgressCallback())
    return learn


def test_a_bar_for_each_long_pass_and_none_for_a_short_one(bars, monkeypatch):
    learn = with_progress()
    learn.lsuv_init()
    # the forward that takes the loss of the result measures nothing, and has no bar
    assert [b.seen for b in bars] == [[0, 1, 2, 3, 'end']]*(learn.lsuv.report.n_passes - 1)
    assert not any(b.leave for b in bars)
    bars.clear()
    monkeypatch.setattr(room, '_LONG', 1e9)
    learn.lsuv_init()
    assert bars == []


@pytest.mark.parametrize('without', ['no_logging', 'no_mbar', 'no_bar'])
def test_no_bar_where_none_is_wanted(bars, without):
    learn = with_progress()
    with getattr(learn, without)(): learn.lsuv_init()
    assert bars == [] and bool(said(learn)) == (without != 'no_logging')


def test_no_bar_is_left_behind(bars):
    "A pass that fails leaves none, nor does one that does not call every layer."
    learn = with_progress()
    hook = learn.model[4].register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): learn.lsuv_init()
    assert [b.seen for b in bars] == [[0, 1, 2, 'end']]
    hook.remove()
    bars.clear()
    learn.model.unused = nn.Linear(2, 2)
    learn.model.forward = lambda x: nn.Sequential(*list(learn.model)[:-1])(x)
    learn.lsuv_init()
    assert all(b.seen == [0, 1, 2, 3, 'end'] for b in bars)


def test_fastprogress_itself(monkeypatch, capsys):
    monkeypatch.setattr(room, '_LONG', -1.)
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(20)], nn.Flatten(), nn.Linear(432, 4))
    assert with_progress(model=model).lsuv_init().ok


# --- what is said

def test_what_was_left_alone_is_said():
    learn = learner(cbs=LSUVCallback())
    learn.model[3].requires_grad_(False)
    learn.fit(1)
    line, = said(learn)
    assert '- frozen: 3. ' in line and 'The frozen layers look new: `learn.unfreeze()` and' in line


def test_one_half_of_a_gan():
    from fastai.vision.gan import GANLearner
    generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 27))
    critic = nn.Sequential(nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    rows = [(torch.randn(8), torch.randn(27)) for _ in range(64)]
    learn = quiet(GANLearner.wgan(loaders(rows), generator, critic, cbs=LSUVCallback()))
    learn.lsuv_init()
    assert said(learn)[0].endswith('initialize the generator before the fit, by '
                                   '`lsuv_init(learn.model.generator, x)` with a mini-batch of its inputs.')


def test_a_loader_that_does_not_shuffle_is_named_where_its_mini_batches_differ():
    rows = [((1 + 9*c)*torch.randn(8), c) for c in range(4) for _ in range(32)]
    def log(shuffle):
        dls = DataLoaders(DataLoader(rows, bs=16, shuffle=shuffle), DataLoader(rows, bs=16))
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        learn = learner(dls, model, cbs=LSUVCallback(preinit='orthogonal', max_iter=1, force=True))
        learn.fit(1)
        return said(learn)[0]
    hint = 'The training DataLoader does not shuffle'
    assert ' off ' in log(False) and hint in log(False) and hint not in log(True)


def test_the_report_before_a_fit_says_what_to_do():
    learn = learner(cbs=LSUVCallback())
    report = learn.lsuv.report
    words = 'LSUV has not run: it runs when the first fit begins. `learn.lsuv_init()` runs it now.'
    assert not report and len(report) == 0 and list(report) == []
    assert repr(report) == str(report) == words and f'<p>{words}</p>' == report._repr_html_()
    for ask in 'plot', 'df', 'ok', 'pairs':
        with pytest.raises(AttributeError, match='there is no report yet.*has not run.*`learn.lsuv_init'):
            getattr(report, ask)
    with pytest.raises(KeyError, match='has not run'): report[0]
    assert repr(deepcopy(report)) == repr(pickle.loads(pickle.dumps(report))) == words

