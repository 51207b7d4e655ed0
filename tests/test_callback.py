"`LSUVCallback` and `Learner.lsuv_init`: what they take, gather, log and show."
from copy import deepcopy

import pytest
import torch
from fastai.basics import DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback
from learners import *
from torch import nn

import fastai_lsuv.callback
from fastai_lsuv import LSUVCallback, lsuv_init
from fastai_lsuv.batches import model_inputs, no_trace


def batches(learn, n=3, min_samples=1):
    "The first mini-batches that LSUV would see, and what it says about them."
    lines = []
    with no_trace(learn):
        return [next(b) for b in [model_inputs(learn, min_samples, lines.append)] for _ in range(n)], lines


# --- options

def test_options_reach_lsuv():
    learn = learner(cbs=LSUVCallback(order='mean std', target_std=2., preinit=None, baseline=True, modules=nn.Linear, per_channel=True))
    report = learn.lsuv_init()
    assert [r.kind for r in report] == ['Linear'] and report[0].std == pytest.approx(2, abs=0.2) and report[0].std_before is not None and report.order == 'mean std'


def test_lsuv_init_takes_options_in_place_of_the_callbacks():
    learn = learner(cbs=LSUVCallback(target_std=2., min_samples=32))
    assert learn.lsuv_init(order='mean std').order == 'mean std' and learn.lsuv.report[0].std == pytest.approx(2, abs=0.2)
    assert learn.lsuv.report[0].shape[0] == 32 and learn.lsuv_init(min_samples=5)[0].shape[0] == 16
    assert learn.lsuv.options['order'] == 'std mean'


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


@pytest.mark.parametrize('options,message', [(dict(min_samples=0), 'min_samples'), (dict(min_samples=True), 'min_samples'), (dict(order='std men'), 'men'), (dict(tol=-1), 'tol'),
                                             (dict(max_iter=0), 'max_iter'), (dict(preinit='kaiming'), 'preinit')])
def test_options_are_checked_when_given(options, message):
    with pytest.raises(ValueError, match=message):
        LSUVCallback(**options)
    learn = learner(cbs=LSUVCallback())
    with pytest.raises(ValueError, match=message):
        learn.lsuv_init(**options)


def test_the_same_weights_as_lsuv_init():
    learn = learner(cbs=LSUVCallback())
    model = deepcopy(learn.model)
    (xb,),_ = batches(learn, 1)
    learn.lsuv_init(preinit=None, batch_tol=10.)
    lsuv_init(model, xb, preinit=None, batch_tol=10.)
    assert same(weights(model), weights(learn.model))


# --- mini-batches

def test_small_batches_are_gathered():
    learn = learner(loaders(bs=5))
    seen,lines = batches(learn, 2, 16)
    assert [len(x) for x, in seen] == [20, 20] and lines == []
    assert not torch.equal(seen[0][0], seen[1][0])


def test_a_small_training_set_is_used_again():
    learn = learner(loaders(images(6), bs=4))
    assert [len(x) for x, in batches(learn, 2, 16)[0]] == [16, 18]
    learn.add_cb(LSUVCallback())
    learn.fit(1)
    assert learn.lsuv.report.ok


def test_several_inputs_are_gathered():
    learn = two_inputs()
    (x,v), = batches(learn, 1, 30)[0]
    assert x.shape == (32, 3, 12, 12) and v.shape == (32, 5)


def test_nested_inputs_are_gathered():
    items = [({'a': torch.randn(3), 'b': [torch.randn(2), torch.randn(1)]}, torch.randn(1)) for _ in range(20)]
    (x,), = batches(learner(loaders(items, bs=4)), 1, 16)[0]
    assert x['a'].shape == (16, 3) and x['b'][1].shape == (16, 1)


def test_ragged_batches_are_not_gathered_and_this_is_said():
    learn = classifier(LSUVCallback(), clas_bs=3)
    learn.fit(1)
    lines = said(learn)
    assert lines[0] == 'LSUV: mini-batches of 3 are of different shapes and cannot be gathered to min_samples=16; each is used as it is'
    assert len(lines) == 2 and learn.lsuv.report[0].shape[0] == 3


def test_what_cannot_be_counted_is_used_as_it_is():
    class Graph: pass
    learn = learner(DataLoaders([(Graph(), torch.ones(1))]*3, [(Graph(), torch.ones(1))]))
    assert len(batches(learn, 2, 16)[0][0]) == 1


def test_no_batch():
    learn = learner(loaders(images(3), bs=16, drop_last=True), cbs=LSUVCallback())
    w = weights(learn.model)
    with pytest.raises(ValueError, match='yields no mini-batch'):
        learn.lsuv_init()
    assert same(weights(learn.model), w) and learn.lsuv.report is None


def test_a_stream_that_does_not_begin_again():
    items = images(24)
    class Stream:
        def __init__(self):
            self.it = iter([(torch.stack([x for x, _ in items[i:i+8]]), torch.stack([y for _, y in items[i:i+8]])) for i in (0, 8, 16)])
        def __iter__(self): return self.it
    learn = learner(DataLoaders(Stream(), Stream()))
    with no_trace(learn):
        assert [len(x) for x, in model_inputs(learn, 16, print)] == [16]


def test_nans_in_a_batch_stop_the_fit_and_change_nothing():
    learn = learner(loaders([(x*float('nan'), y) for x, y in images(16)]), cbs=LSUVCallback())
    w = weights(learn.model)
    with pytest.raises(ValueError, match='NaN'):
        learn.fit(1)
    assert same(weights(learn.model), w)


def test_a_loader_with_workers_starts_none():
    learn = learner(torch_loaders(num_workers=2, prefetch_factor=3, timeout=60))
    class No:
        def __init__(self, *args):
            raise AssertionError('a worker was started')
    import torch.utils.data.dataloader as module
    was,module._MultiProcessingDataLoaderIter = module._MultiProcessingDataLoaderIter,No
    try:
        assert len(batches(learn, 5)[0]) == 5
    finally:
        module._MultiProcessingDataLoaderIter = was
    assert learn.dls.train.num_workers == 2 and learn.dls.train.timeout == 60


# --- Learners of all sorts

def test_without_recorder_and_default_callbacks():
    set_seed(0)
    learn = Learner(loaders(), cnn(), loss_func=CrossEntropyLossFlat(), cbs=LSUVCallback(), default_cbs=False)
    learn.lines = []
    learn.logger = learn.lines.append
    learn.fit(1)
    learn.fit(1)
    assert learn.lsuv.report.ok and len(said(learn)) == 2


def test_a_model_put_in_place_of_another():
    learn = learner(cbs=LSUVCallback())
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(3*12*12, 4))
    learn.fit(1)
    assert [r.name for r in learn.lsuv.report] == ['1']


@pytest.mark.parametrize('compile', [lambda m: torch.compile(m, backend='eager'), lambda m: (m.compile(backend='eager'), m)[1]], ids=['torch.compile', 'in place'])
def test_a_compiled_model(compile):
    learn = learner(cbs=LSUVCallback())
    learn.model = compile(learn.model)
    learn.fit(1, 1e-3)
    assert learn.lsuv.report.ok and [r.name for r in learn.lsuv.report] == ['0', '3', '8']
    learn.fit(1, 1e-3)
    assert 'initialized before' in said(learn)[-1]


def test_a_model_on_another_device_than_the_data():
    "It is run where it is. (`meta` holds no numbers, so it is only the move that is tested.)"
    learn = learner(cbs=LSUVCallback())
    learn.dls.device = torch.device('meta')
    learn.dls.train.device = None
    assert learn.lsuv_init().ok and next(learn.model.parameters()).device.type == 'cpu'


def test_lazy_layers():
    learn = learner(model=nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)), cbs=LSUVCallback(), opt_func=lambda *args, **kwargs: None)
    assert learn.lsuv_init().ok


def test_removed_and_added_again():
    learn = learner(cbs=LSUVCallback())
    with learn.removed_cbs(learn.lsuv):
        learn.model.load_state_dict(cnn().state_dict())
    learn.fit(1)
    assert 'its weights were loaded' in said(learn)[0]


# --- the log and the progress bar

class Bar:
    "Stands in for fastprogress's."
    made = []
    def __init__(self, gen, leave):
        self.total,self.leave,self.seen,self.last_v = len(gen),leave,[],None
        Bar.made.append(self)
    def update(self, v):
        if not self.seen:
            assert v == 0, "fastprogress needs a start"
        self.last_v = None if v >= self.total else v
        self.seen.append(v)
        if self.last_v is None:
            self.on_iter_end()
    def on_iter_end(self):
        self.seen.append('end')
        self.last_v = None


@pytest.fixture
def bars(monkeypatch):
    Bar.made = []
    monkeypatch.setattr(fastai_lsuv.callback, 'progress_bar', Bar)
    monkeypatch.setattr(fastai_lsuv.callback, '_LONG', -1.)
    return Bar.made


def with_progress(**kwargs):
    learn = learner(**kwargs)
    learn.add_cb(ProgressCallback())
    return learn


def test_a_bar_for_each_long_pass(bars):
    learn = with_progress(cbs=LSUVCallback())
    learn.lsuv_init()
    # the forward that takes the loss of the result measures nothing, and has no bar
    assert [b.seen for b in bars] == [[0, 1, 2, 3, 'end']]*(learn.lsuv.report.n_passes - 1) and not any(b.leave for b in bars)


def test_no_bar_for_a_short_pass(bars, monkeypatch):
    monkeypatch.setattr(fastai_lsuv.callback, '_LONG', 1e9)
    with_progress(cbs=LSUVCallback()).lsuv_init()
    assert bars == []


@pytest.mark.parametrize('without', ['no_logging', 'no_mbar', 'no_bar'])
def test_no_bar_where_none_is_wanted(bars, without):
    learn = with_progress(cbs=LSUVCallback())
    with getattr(learn, without)():
        learn.lsuv_init()
    assert bars == [] and bool(said(learn)) == (without != 'no_logging')


def test_no_bar_is_left_behind(bars):
    "By a pass that fails, nor by one that does not call every layer."
    learn = with_progress(cbs=LSUVCallback())
    hook = learn.model[4].register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError):
        learn.lsuv_init()
    assert [b.seen for b in bars] == [[0, 1, 2, 'end']]
    hook.remove()
    bars.clear()
    learn.model.unused = nn.Linear(2, 2)
    learn.model.forward = lambda x: nn.Sequential(*list(learn.model)[:-1])(x)
    learn.lsuv_init()
    assert all(b.seen == [0, 1, 2, 3, 'end'] for b in bars)


def test_fastprogress_itself(monkeypatch, capsys):
    monkeypatch.setattr(fastai_lsuv.callback, '_LONG', -1.)
    assert with_progress(model=nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(20)], nn.Flatten(), nn.Linear(432, 4)), cbs=LSUVCallback()).lsuv_init().ok


def test_what_was_left_alone_is_said():
    learn = learner(cbs=LSUVCallback())
    learn.model[3].requires_grad_(False)
    learn.fit(1)
    assert len(said(learn)) == 1 and "frozen" in said(learn)[0] and said(learn)[0].endswith(': 3')
