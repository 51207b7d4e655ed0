"Mini-batches as a Learner would feed them to its model, drawn without a trace."
import gc
import math
import random
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelTrainException, DataLoader, DataLoaders, TfmdDL, before_batch_cb, set_seed)
from fastai.callback.all import MixedPrecision
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.mixup import CutMix, MixUp
from fastai.vision.augment import RandTransform
from learners import *
from torch import nn
from torch.utils._pytree import tree_leaves

from fastai_lsuv import LSUVCallback
from fastai_lsuv.learner.batches import model_inputs, no_trace


class Data:
    "A dataset whose items `change(i, x)` makes."
    def __init__(self, change=None, items=None):
        self.items = items or images()
        if change is not None: self.change = change
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        if isinstance(i, slice): return self.items[i]
        x,y = self.items[i]
        return self.change(i, x), y


# --- mini-batches

@pytest.mark.parametrize('n, bs, sizes', [(64, 5, [20, 20]), (6, 4, [16, 18])], ids=['small', 'used again'])
def test_small_mini_batches_are_joined_epoch_after_epoch(n, bs, sizes):
    learn = learner(loaders(images(n), bs=bs), cbs=LSUVCallback())
    seen,lines = batches(learn, 2, 16)
    assert [len(x) for x, in seen] == sizes and lines == []
    assert not torch.equal(seen[0][0], seen[1][0]) and learn.lsuv_init().ok


def test_several_inputs_and_nested_ones_are_joined():
    (x,v), = batches(two_inputs(), 1, 30)[0]
    assert x.shape == (32, 3, 12, 12) and v.shape == (32, 5)
    items = [({'a': torch.randn(3), 'b': [torch.randn(2), torch.randn(1)]}, torch.randn(1)) for _ in range(20)]
    (x,), = batches(learner(loaders(items, bs=4)), 1, 16)[0]
    assert x['a'].shape == (16, 3) and x['b'][1].shape == (16, 1)


def test_ragged_batches_are_not_joined_and_this_is_said():
    learn = classifier(LSUVCallback(), clas_bs=3)
    learn.fit(1)
    first,_ = said(learn)
    assert first == ('LSUV uses mini-batches of 3 samples: their shapes differ, so it cannot join them to '
                     'min_samples=16.')
    assert learn.lsuv.report[0].shape[0] == 3


def test_what_cannot_be_counted_is_used_as_it_is():
    class Graph: pass
    learn = learner(DataLoaders([(Graph(), torch.ones(1))]*3, [(Graph(), torch.ones(1))]))
    assert len(batches(learn, 2, 16)[0][0]) == 1


@pytest.mark.parametrize('items, options, says', [
    pytest.param(images(3), dict(drop_last=True), 'yields no mini-batch', id='no mini-batch'),
    pytest.param([(x*math.nan, y) for x, y in images(16)], {}, 'NaN', id='NaNs'),
])
def test_mini_batches_that_are_refused_change_nothing(items, options, says):
    learn = learner(loaders(items, **options), cbs=LSUVCallback())
    w = weights(learn.model)
    with pytest.raises(ValueError, match=says): learn.lsuv_init()
    assert same(weights(learn.model), w) and not learn.lsuv.report


def test_a_stream_that_does_not_begin_again():
    class Stream:
        def __init__(self): self.it = iter([(torch.randn(8, 3, 12, 12), torch.zeros(8, dtype=torch.long))]*3)
        def __iter__(self): return self.it
    learn = learner(DataLoaders(Stream(), Stream()))
    with no_trace(learn): assert [len(x) for x, in model_inputs(learn, 16, print)] == [16]


def test_a_loader_with_workers_starts_none(monkeypatch):
    learn = learner(torch_loaders(num_workers=2, prefetch_factor=3, timeout=60))
    monkeypatch.delattr('torch.utils.data.dataloader._MultiProcessingDataLoaderIter')
    assert len(batches(learn, 5)[0]) == 5
    assert learn.dls.train.num_workers == 2 and learn.dls.train.timeout == 60


# --- what callbacks make of them

class Twice(Callback):
    "Doubles the input by what its `before_fit` makes."
    def __init__(self, order=0): self.order = order
    def before_fit(self): self.by = 2.
    def before_batch(self): self.learn.xb = (self.x*self.by,)


def run(learn, outside):
    "LSUV outside a fit, or in one that ends where training would begin."
    if outside: learn.lsuv_init(max_iter=1)
    else: learn.fit(1, cbs=Stop())


def scale_seen(outside, *cbs):
    "The input's std as the model sees it, as a share of that of the data."
    seen = []
    learn = learner(cbs=[LSUVCallback(), *cbs])
    learn.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].std().item()))
    run(learn, outside)
    return np.mean(seen)/torch.stack([x for x, _ in images()]).std().item()


def double(self):
    self.learn.xb = (self.x*2,)


@pytest.mark.parametrize('outside', [False, True])
@pytest.mark.parametrize('cb', [
    pytest.param(Twice, id='order 0'),
    pytest.param(lambda: Twice(20), id='order 20'),
    pytest.param(lambda: Twice(200), id='order 200'),
    pytest.param(lambda: Callback(before_batch=double), id='instance'),
    pytest.param(lambda: before_batch_cb(lambda self, xb, yb: ((xb[0]*2,), yb)), id='before_batch_cb'),
])
def test_callbacks_change_the_input(cb, outside):
    "They may be of any order, in a fit and outside, before their `before_fit` has run and after."
    assert scale_seen(outside, cb()) == pytest.approx(2, abs=0.05)
    assert scale_seen(outside) == pytest.approx(1, abs=0.05)


class Autocast(Callback):
    "Mixed precision on the CPU, as fastai's on CUDA. It is entered before a batch and left after the loss."
    order = MixedPrecision.order
    def before_batch(self):
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.autocast.__exit__(None, None, None)


@pytest.mark.parametrize('outside', [False, True])
def test_in_the_autocast_that_a_callback_enters(outside):
    dtypes,loading = [],[]
    def loaded(i, x):
        loading.append(torch.is_autocast_enabled('cpu'))
        return x
    learn = learner(loaders(Data(loaded)), cbs=[LSUVCallback(), Autocast()])
    learn.model[3].register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    run(learn, outside)
    assert set(dtypes) == {torch.bfloat16} and loading and not any(loading) and learn.lsuv.report.ok
    assert not torch.is_autocast_enabled('cpu')
    assert torch.autocast_decrement_nesting() == -1 and torch.autocast_increment_nesting() == 0
    learn.fit(1, 1e-3)
    assert math.isfinite(learn.recorder.losses[-1])


class AutocastAll(Callback):
    "Mixed precision that is entered for a whole epoch."
    def before_train(self): torch.autocast('cpu', dtype=torch.bfloat16).__enter__()
    def before_batch(self): assert torch.is_autocast_enabled('cpu')


def test_autocast_that_is_entered_before_the_batches():
    assert disturbed(beside(AutocastAll)) == []
    while torch.autocast_decrement_nesting() > 0: pass  # the callback leaves none of it
    torch.set_autocast_enabled('cpu', False)


class Cancels(Callback):
    run_valid,order = False,55  # after Recorder, which needs to be told of each epoch
    def __init__(self, event, error, times=10**6): self.event,self.error,self.times = event,error,times
    def before_epoch(self): self.at('before_epoch')
    def before_train(self): self.at('before_train')
    def before_batch(self): self.at('before_batch')
    def at(self, event):
        if event == self.event and self.times > 0:
            self.times -= 1
            raise self.error


def test_a_batch_that_is_cancelled_is_not_used():
    learn = learner(cbs=[LSUVCallback(), Cancels('before_batch', CancelBatchException, 3)])
    learn.fit(1)
    assert learn.lsuv.report.ok


@pytest.mark.parametrize('event, error', [
    ('before_batch', CancelBatchException),
    ('before_batch', CancelTrainException),
    ('before_batch', CancelEpochException),
    ('before_batch', CancelFitException),
    ('before_train', CancelTrainException),
    ('before_epoch', CancelEpochException),
    ('before_epoch', CancelFitException),
])
def test_where_nothing_is_trained_nothing_is_initialized(event, error):
    learn = learner(cbs=[LSUVCallback(), Cancels(event, error)])
    w = weights(learn.model)
    learn.fit(1)
    assert same(weights(learn.model), w) and not learn.lsuv.report
    assert said(learn) == ['LSUV left the model as it is: the training DataLoader yields no mini-batch, or callbacks '
                           'cancel them all.']
    with pytest.raises(ValueError, match='yields no mini-batch'): learn.lsuv_init()


# --- everything as it was

def test_every_attribute_is_looked_at():
    "The comparison itself sees a buffer, a hook, a hidden state, an attribute of a transform and a generator."
    learn = vision()
    changes = [
        lambda: learn.model[1].running_mean.add_(1),
        lambda: learn.model[0].register_forward_hook(print),
        lambda: setattr(learn.model, 'hidden', 1),
        random.random,
        lambda: setattr(learn.dls.train.after_batch.fs[-1], 'do', 'x'),
        lambda: learn.dls.train.rng.random(),
        lambda: learn.model[5].eval(),
        np.random.rand,
        lambda: torch.rand(1),
        lambda: learn.recorder.__dict__.update(losses=[1]),
    ]
    for change in changes:
        before = everything(learn)
        change()
        assert changed(before, everything(learn))


class Restless:
    "State of every sort. All of it moves when an input is `changed`."
    def __init__(self):
        self.n,self.total,self.array,self.list = 0,torch.zeros(()),np.zeros(1),[torch.zeros(1)]
        self.nested,self.helper = {'a': [1], 'n': np.zeros(())},SimpleNamespace(seen=[])
        self.rng,self.numpy,self.torch = random.Random(0),np.random.default_rng(0),torch.Generator()
        super().__init__()
    def changed(self, x):
        self.n += 1
        for held in self.total, self.array, self.list[0], self.nested['n']: held += 1  # in place
        self.list.append(self.rng.random())
        self.nested['a'].append(self.numpy.random())
        self.nested[self.n] = 'new'
        self.helper.seen.append(1)
        by = self.n + self.total.item() + self.array[0] + self.list[0].item() + self.nested['n'].item() + self.list[-1]
        return x*(1 + by/100) + self.nested['a'][-1] + torch.rand(1, generator=self.torch)


class RestlessCallback(Restless, Callback):
    def before_epoch(self): self.list.append('epoch')
    def before_train(self): self.nested['a'].append('train')
    def before_batch(self):
        self.learn.xb = (self.changed(self.x),)
        self.learn.seen_by_restless = self.n


class RestlessTransform(Restless, RandTransform):
    split_idx = None
    def encodes(self, x: torch.Tensor): return self.changed(x) if x.is_floating_point() else x


class RestlessData(Restless, Data):
    def change(self, i, x): return self.changed(x)


class RestlessList(Restless, list):
    "A dataset that is a list, and counts."
    def __getitem__(self, i):
        if isinstance(i, slice): return super().__getitem__(i)
        x,y = super().__getitem__(i)
        return self.changed(x),y


def restless_list():
    data = RestlessList()
    data += [images()[i] for i in range(len(images()))]
    return data


def restless_transform(cbs, where):
    train = TfmdDL(images(), bs=16, shuffle=True, num_workers=0)
    getattr(train, where).add(RestlessTransform())
    return learner(of_train(train), cbs=cbs)


def of_train(train): return DataLoaders(train, DataLoader(images(), bs=16))


RESTLESS = {
    'callback': lambda cbs: learner(cbs=[*cbs, RestlessCallback()]),
    'dataset': lambda cbs: learner(loaders(RestlessData()), cbs=cbs),
    'dataset of pytorch': lambda cbs: learner(torch_loaders(RestlessData()), cbs=cbs),
    'dataset that is a list': lambda cbs: learner(loaders(restless_list()), cbs=cbs),
    'item transform': partial(restless_transform, where='after_item'),
    'batch transform': partial(restless_transform, where='after_batch'),
}


class Hooking(Callback):
    "Attaches a hook in each event, as a recorder would."
    def before_train(self): self.handles = [self.model[0].register_forward_hook(self.see)]
    def before_batch(self): self.handles.append(self.model[3].register_forward_pre_hook(self.see))
    def see(self, *args): self.saw = args


def beside(cb): return lambda cbs: learner(cbs=[*cbs, cb()])


DISTURBABLE = {**KINDS, **RESTLESS, 'autocast': beside(Autocast), 'hooks': beside(Hooking)}
@pytest.mark.parametrize('make', DISTURBABLE.values(), ids=DISTURBABLE)
def test_only_units_change(make): assert disturbed(make) == []


def test_recurrent_state_of_a_running_model():
    "Outside a fit a language model keeps the hidden state of its last batch."
    learn = language(LSUVCallback())
    learn.model(torch.randint(0, 30, (8, 16)))
    before = everything(learn, but=units_and_notes(learn))
    learn.lsuv_init()
    assert changed(before, everything(learn, but=units_and_notes(learn))) == []


def test_what_others_hooks_saw():
    "fastai's `Hook` keeps the last output: not that of a mini-batch of LSUV's."
    from fastai.callback.hook import hook_outputs
    learn = learner(cbs=LSUVCallback())
    learn.hooks = hook_outputs(learn.model, detach=True)
    learn.lsuv_init()
    assert learn.hooks.stored[0] is None and len(learn.model[0]._forward_hooks) == 1


def test_nothing_is_kept_of_the_batches():
    alive = []
    class Seen(nn.Module):
        def forward(self, x):
            alive.append(weakref.ref(x))
            return x*1
    learn = learner(model=nn.Sequential(Seen(), *cnn()), cbs=LSUVCallback())
    learn.lsuv_init()
    gc.collect()
    assert len(alive) >= 2 and not any(r() is not None for r in alive)


# --- randomness

class Fed(Callback):
    "What the model is fed in training, with the states of the generators."
    order = 99
    def __init__(self): self.seen = []
    def before_batch(self):
        if not self.training: return
        self.seen += [tree_leaves(self.x)[0].clone(), torch.get_rng_state(), torch.tensor([hash(random.getstate())])]


def fed(make, cbs):
    "What training sees with these callbacks, and the states of the generators after it."
    set_seed(2)
    learn = make([*cbs, fed := Fed()])
    set_seed(9)
    learn.fit(2, 0.)
    assert not cbs or learn.lsuv.report
    return fed.seen, (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())


def one_weighted_sampler():
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(64), 64, generator=torch.Generator().manual_seed(1))
    return of_train(torch.utils.data.DataLoader(images(), batch_size=16, sampler=sampler))


@pytest.mark.parametrize('make', [
    *(pytest.param(f, id=f.__name__) for f in (plain, pytorch, vision, language, classifier, tabular)),
    *(pytest.param(f, id=f'a restless {name}') for name, f in RESTLESS.items()),
    pytest.param(lambda cbs: learner(torch_loaders(), cbs=cbs), id='pytorch, seeded by all'),
    pytest.param(lambda cbs: learner(one_weighted_sampler(), cbs=cbs), id='a weighted sampler'),
    pytest.param(lambda cbs: learner(of_train(WeightedDL(images(), wgts=range(1, 65), bs=16)), cbs=cbs), id='weighted'),
    pytest.param(lambda cbs: learner(of_train(PartialDL(images(), partial_n=32, bs=16)), cbs=cbs), id='partial epochs'),
    pytest.param(beside(MixUp), id='mixup'),
    pytest.param(beside(CutMix), id='cutmix'),
    pytest.param(partial(vision, num_workers=2), id='vision, with workers'),
    pytest.param(lambda cbs: learner(loaders(num_workers=2), cbs=cbs), id='plain, with workers'),
    pytest.param(partial(pytorch, num_workers=2), id='pytorch, with workers'),
])
def test_training_sees_what_it_would_have_seen(make):
    (with_it,after),(without,wanted) = fed(make, [LSUVCallback()]),fed(make, [])
    assert same(with_it, without) and after == wanted


def test_what_it_draws_is_what_training_could_see():
    "Crops and augmentations are at work. The size is what the batch transforms make."
    learn = vision(LSUVCallback())
    learn.lsuv_init()
    assert learn.lsuv.report[0].shape[-1] == 10 and learn.lsuv.report[0].shape[0] == 16


# --- failure at every point

def Trap():
    """Notes every point of the pass that is come by, and raises at one of them from some time on.

    It is a function, which no snapshot looks into."""
    def trap(point):
        trap.points.append(point)
        if point == trap.point and len(trap.points) > trap.at: raise trap.error
    trap.points,trap.at,trap.point,trap.error = [],None,None,None
    return trap


class TrapTransform(RandTransform):
    split_idx = None
    def __init__(self, trap, point):
        self.trap,self.point = trap,point
        super().__init__()
    def encodes(self, x: torch.Tensor):
        self.last = torch.rand(1)
        if self.point != 'item transform' or random.random() < 0.1: self.trap(self.point)
        return x


class TrapCallback(Callback):
    order = 20  # its `before_fit` is yet to run
    def __init__(self, trap): self.trap = trap
    def before_fit(self): self.n,self.counts = 0,torch.zeros(1)
    def before_epoch(self): self.at('before_epoch')
    def before_train(self): self.at('before_train')
    def before_batch(self):
        self.counts += 1
        self.learn.xb = (self.x + 0.1*torch.rand(1),)
        self.at('before_batch')
    def at(self, event):
        self.n += 1
        self.trap(event)


class TrapModule(nn.Module):
    "Passes what it is given, after writing to a buffer and a list."
    def __init__(self, trap, point):
        super().__init__()
        self.trap,self.point,self.seen = trap,point,[]
        self.register_buffer('n', torch.zeros(1))
    def forward(self, x):
        self.n += 1
        self.seen.append(1)
        self.trap(self.point)
        return x


class Standardized(nn.Conv2d):
    "A conv that is run again by itself."
    def forward(self, x): return self._conv_forward(x, self.weight*2, self.bias)


def trapped(trap, cbs):
    set_seed(1)
    def item(i, x):
        if i % 6 == 0: trap('dataset')
        return x
    items = Data(item, images(24, size=7))
    train = TfmdDL(items, bs=8, shuffle=True, after_item=[], after_batch=[TrapTransform(trap, 'batch transform')])
    train.after_item.add(TrapTransform(trap, 'item transform'))
    stem = [TrapModule(trap, 'first'), nn.Conv2d(3, 8, 3), TrapModule(trap, 'after conv'), nn.BatchNorm2d(8), nn.ReLU()]
    body = [Standardized(8, 8, 3), TrapModule(trap, 'after rerun'), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*stem, *body, nn.Linear(8, 4), TrapModule(trap, 'last'))
    model[1].register_forward_hook(lambda *_: trap('hook of a unit'))
    model[5].register_forward_pre_hook(lambda *_: trap('pre-hook of a unit'))
    model[3].register_forward_hook(lambda *_: trap('hook'))
    def std(name, module):
        trap('target_std')
        return 1.
    def preinit(layer):
        trap('preinit')
        nn.init.orthogonal_(layer.weight)
    lsuv = LSUVCallback(target_std=std, preinit=preinit, batch_tol=0.02, max_iter=2, min_samples=8)
    return learner(DataLoaders(train, DataLoader(items[:8], bs=8)), model, [lsuv, TrapCallback(trap), *cbs])


def test_a_failure_anywhere_leaves_everything_as_it_was():
    trap,came_by = Trap(),[]
    learn = trapped(trap, [Stop(), Around(lambda learn: came_by.extend(trap.points), 10.6)])
    trap.points.clear()
    learn.fit(1)
    clean = weights(learn.model)
    assert set(came_by) == {
        'dataset', 'item transform', 'batch transform', 'before_epoch', 'before_train', 'before_batch', 'first',
        'after conv', 'after rerun', 'last', 'hook of a unit', 'pre-hook of a unit', 'hook', 'target_std', 'preinit',
    }
    errors = [RuntimeError('x'), torch.OutOfMemoryError('no memory'), KeyboardInterrupt(), ValueError('y')]
    # each point the first time and the last
    times = {came_by.index(p) for p in came_by} | {len(came_by) - 1 - came_by[::-1].index(p) for p in came_by}
    for n, at in enumerate(sorted(times)):
        trap,before = Trap(),Snapshots(but=notes)
        learn = trapped(trap, [Stop(), before])
        trap.points,trap.at,trap.point,trap.error = [],at,came_by[at],errors[n % len(errors)]
        with pytest.raises(type(trap.error)): learn.fit(1)
        assert changed(before.of[0], everything(learn, but=notes(learn)), but=()) == [], (came_by[at], at)
        assert not learn.lsuv.report and said(learn) == []
        trap.point = None
        learn.fit(1)
        assert learn.lsuv.report and same(weights(learn.model), clean), (came_by[at], at)
