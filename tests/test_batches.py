"Mini-batches as a Learner would feed them to its model, drawn without a trace."
import gc
import math
import random
import weakref
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.utils.data.dataloader
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelTrainException, DataLoader, DataLoaders, TfmdDL, before_batch_cb, set_seed)
from fastai.callback.all import MixedPrecision
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.mixup import CutMix, MixUp
from fastai.vision.augment import RandTransform
from learners import *
from torch import nn

from fastai_lsuv import LSUVCallback
from fastai_lsuv.learner.batches import model_inputs, no_trace


# --- mini-batches

def test_small_batches_are_joined():
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


def test_several_inputs_are_joined():
    learn = two_inputs()
    (x,v), = batches(learn, 1, 30)[0]
    assert x.shape == (32, 3, 12, 12) and v.shape == (32, 5)


def test_nested_inputs_are_joined():
    items = [({'a': torch.randn(3), 'b': [torch.randn(2), torch.randn(1)]}, torch.randn(1)) for _ in range(20)]
    (x,), = batches(learner(loaders(items, bs=4)), 1, 16)[0]
    assert x['a'].shape == (16, 3) and x['b'][1].shape == (16, 1)


def test_ragged_batches_are_not_joined_and_this_is_said():
    learn = classifier(LSUVCallback(), clas_bs=3)
    learn.fit(1)
    lines = said(learn)
    assert lines[0] == ('LSUV uses mini-batches of 3 samples: their shapes differ, so it cannot join them to '
                        'min_samples=16.')
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
    assert same(weights(learn.model), w) and not learn.lsuv.report


def test_a_stream_that_does_not_begin_again():
    items = images(24)
    class Stream:
        def __init__(self):
            parts = [items[i:i+8] for i in (0, 8, 16)]
            self.it = iter([(torch.stack([x for x, _ in p]), torch.stack([y for _, y in p])) for p in parts])
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


# --- what callbacks make of them

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
    assert scale_seen(cb(), **(dict(max_iter=1) if outside else {})) == pytest.approx(2, abs=0.05)
    assert scale_seen() == pytest.approx(1, abs=0.05)


class Autocast(Callback):
    "Mixed precision on the CPU, as fastai's on CUDA. It is entered before a batch and left after the loss."
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
    assert not torch.is_autocast_enabled('cpu')
    assert torch.autocast_decrement_nesting() == -1 and torch.autocast_increment_nesting() == 0
    assert disturbed(lambda cbs: learner(cbs=[*cbs, Autocast()])) == []
    learn.fit(1, 1e-3)
    assert math.isfinite(learn.recorder.losses[-1])


class AutocastAll(Callback):
    "Mixed precision that is entered for a whole epoch."
    def before_train(self):
        torch.autocast('cpu', dtype=torch.bfloat16).__enter__()
    def before_batch(self):
        assert torch.is_autocast_enabled('cpu')


def test_autocast_that_is_entered_before_the_batches():
    assert disturbed(lambda cbs: learner(cbs=[*cbs, AutocastAll()])) == []
    while torch.autocast_decrement_nesting() > 0:
        pass  # the callback leaves none of it
    torch.set_autocast_enabled('cpu', False)


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
    with pytest.raises(ValueError, match='yields no mini-batch'):
        learn.lsuv_init()


# --- everything as it was

@pytest.mark.parametrize('kind', KINDS)
def test_only_units_change(kind):
    assert disturbed(KINDS[kind]) == []


def test_every_attribute_is_looked_at():
    "The comparison itself sees a buffer, a hook, a hidden state, an attribute of a transform and a generator."
    learn = vision()
    changes = [
        lambda: learn.model[1].running_mean.add_(1),
        lambda: learn.model[0].register_forward_hook(print),
        lambda: setattr(learn.model, 'hidden', 1),
        lambda: random.random(),
        lambda: setattr(learn.dls.train.after_batch.fs[-1], 'do', 'x'),
        lambda: learn.dls.train.rng.random(),
        lambda: learn.model[5].eval(),
        lambda: np.random.rand(),
        lambda: torch.rand(1),
        lambda: learn.recorder.__dict__.update(losses=[1]),
    ]
    for change in changes:
        before = everything(learn)
        change()
        assert changed(before, everything(learn))


class Restless(Callback):
    "A callback with state of every sort. All of it moves in `before_batch`."
    def __init__(self):
        self.n,self.total,self.list,self.nested = 0,torch.zeros(2),[],{'a': [1]}
        self.rng,self.numpy,self.helper = random.Random(0),np.random.default_rng(0),Helper()
    def before_epoch(self):
        self.list.append('epoch')
    def before_train(self):
        self.nested['a'].append('train')
    def before_batch(self):
        self.n += 1
        self.total += 1  # in place
        self.list.append(self.rng.random())
        self.nested['a'].append(self.numpy.random())
        self.helper.seen.append(1)
        self.learn.xb = (self.x*2,)
        self.learn.seen_by_restless = self.n


class Helper:
    def __init__(self):
        self.seen = []


def test_state_of_other_callbacks():
    assert disturbed(lambda cbs: learner(cbs=[*cbs, Restless()])) == []


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
    assert learn.hooks.stored[0] is None
    learn.lsuv_init()
    assert learn.hooks.stored[0] is None and len(learn.model[0]._forward_hooks) == 1


class Hooking(Callback):
    "Attaches a hook in each event, as a recorder would."
    def before_train(self):
        self.handles = [self.model[0].register_forward_hook(self.see)]
    def before_batch(self):
        self.handles.append(self.model[3].register_forward_pre_hook(self.see))
    def see(self, *args):
        self.saw = args


def test_hooks_that_callbacks_attach():
    assert disturbed(lambda cbs: learner(cbs=[*cbs, Hooking()])) == []


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


class Items:
    "A dataset with randomness and state of its own."
    def __init__(self):
        self.items,self.torch,self.python = images(),torch.Generator(),random.Random(0)
        self.calls,self.last = Counter(),[]
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        if isinstance(i, slice): return self.items[i]
        self.calls[i] += 1
        self.last.append(i)
        x,y = self.items[i]
        return x + torch.rand(1, generator=self.torch) + self.python.random(), y


@pytest.mark.parametrize('make', [loaders, torch_loaders])
def test_a_dataset_with_state(make):
    assert disturbed(lambda cbs: learner(make(Items()), cbs=cbs)) == []


# --- randomness

class Fed(Callback):
    "What the model is fed in training, with the states of the generators."
    order = 99
    def __init__(self):
        self.seen = []
    def before_batch(self):
        if self.training:
            self.seen.append((self.x[0] if isinstance(self.x, tuple) else self.x).clone())
            self.seen.append(torch.get_rng_state())
            self.seen.append(torch.tensor([hash(random.getstate())]))


def fed(make, cbs, **kwargs):
    fed = Fed()
    learn = make([*cbs, fed], **kwargs)
    set_seed(9)
    learn.fit(2, 0.)
    return learn, fed.seen, (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())


def weighted(cbs=None):
    train = WeightedDL(images(), wgts=range(1, 65), bs=16)
    return learner(DataLoaders(train, DataLoader(images(), bs=16)), cbs=cbs)


def partial_epochs(cbs=None):
    train = PartialDL(images(), partial_n=32, bs=16, shuffle=True)
    return learner(DataLoaders(train, DataLoader(images(), bs=16)), cbs=cbs)


def pytorch_seeded_by_all(cbs=None): return learner(torch_loaders(), cbs=cbs)


def one_weighted_sampler(cbs=None):
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(64), 64, generator=torch.Generator().manual_seed(1))
    train = torch.utils.data.DataLoader(images(), batch_size=16, sampler=sampler)
    return learner(DataLoaders(train, DataLoader(images(), bs=16)), cbs=cbs)


def mixed_up(cbs=None): return learner(cbs=[*cbs, MixUp()])
def cut_and_mixed(cbs=None): return learner(cbs=[*cbs, CutMix()])


@pytest.mark.parametrize('make', [
    plain,
    pytorch,
    pytorch_seeded_by_all,
    one_weighted_sampler,
    vision,
    language,
    classifier,
    tabular,
    weighted,
    partial_epochs,
    mixed_up,
    cut_and_mixed,
], ids=lambda f: f.__name__)
def test_training_sees_what_it_would_have_seen(make):
    with_it,without = fed(make, [LSUVCallback()]),fed(make, [])
    assert with_it[0].lsuv.report
    assert same(with_it[1], without[1]) and with_it[2] == without[2]


def with_workers(cbs=None, make=None): return learner(make(num_workers=2), cbs=cbs)


@pytest.mark.parametrize('make', [
    pytest.param(augmented, id='augmented'),
    pytest.param(loaders, id='fastai'),
    pytest.param(partial(torch_loaders, generator=torch.Generator().manual_seed(0)), id='pytorch'),
])
def test_the_same_with_workers(make):
    state = make.keywords['generator'].get_state() if isinstance(make, partial) else None
    results = []
    for cbs in [LSUVCallback()], []:
        if state is not None:
            make.keywords['generator'].set_state(state)
        set_seed(2)
        results.append(fed(partial(with_workers, make=make), cbs))
    assert results[0][0].lsuv.report
    assert same(results[0][1], results[1][1]) and results[0][2] == results[1][2]


@pytest.mark.parametrize('kind', ['plain', 'vision', 'tabular', 'classifier'])
def test_two_runs_with_one_seed(kind):
    def run():
        learn = KINDS[kind](LSUVCallback())
        set_seed(3)
        learn.lsuv_init()
        return weights(learn.model)
    assert same(run(), run())


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


class TrapItem(RandTransform):
    split_idx = None
    def __init__(self, trap, point):
        self.trap,self.point = trap,point
        super().__init__()
    def encodes(self, x: torch.Tensor):
        self.last = torch.rand(1)
        self.trap(self.point)
        return x


class TrapCallback(Callback):
    order = 20  # its `before_fit` is yet to run
    def __init__(self, trap):
        self.trap = trap
    def before_fit(self):
        self.n,self.counts = 0,torch.zeros(1)
    def before_epoch(self):
        self.n += 1
        self.trap('before_epoch')
    def before_train(self):
        self.n += 1
        self.trap('before_train')
    def before_batch(self):
        self.n += 1
        self.counts += 1
        self.learn.xb = (self.x + 0.1*torch.rand(1),)
        self.trap('before_batch')


class Traps(nn.Module):
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
    items = images(24, size=7)
    class Data:
        def __len__(self): return len(items)
        def __getitem__(self, i):
            if not i % 6:
                trap('dataset')
            return items[i]
    train = TfmdDL(Data(), bs=8, shuffle=True, after_item=[], after_batch=[TrapItem(trap, 'batch transform')])
    dls = DataLoaders(train, DataLoader(items[:8], bs=8))
    dls.train.after_item.add(TrapItem(lambda point: trap(point) if random.random() < 0.1 else None, 'item transform'))
    bn = nn.BatchNorm2d(8)
    model = nn.Sequential(
        Traps(trap, 'first'),
        nn.Conv2d(3, 8, 3),
        Traps(trap, 'after conv'),
        bn,
        nn.ReLU(inplace=True),
        Standardized(8, 8, 3),
        Traps(trap, 'after rerun'),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
        Traps(trap, 'last'),
    )
    model[1].register_forward_hook(lambda *_: trap('hook of a unit'))
    model[5].register_forward_pre_hook(lambda *_: trap('pre-hook of a unit'))
    bn.register_forward_hook(lambda *_: trap('hook'))
    def std(name, module):
        trap('target_std')
        return 1.
    def preinit(layer):
        trap('preinit')
        nn.init.orthogonal_(layer.weight)
    lsuv = LSUVCallback(target_std=std, preinit=preinit, batch_tol=0.02, max_iter=2, min_samples=8)
    return learner(dls, model, [lsuv, TrapCallback(trap), *cbs])


def points():
    "All points that one initialization comes by, and the weights it makes."
    trap,seen = Trap(),[]
    learn = trapped(trap, [Stop(), Around(lambda learn: seen.extend(trap.points), 10.6)])
    trap.points.clear()
    learn.fit(1)
    return seen, weights(learn.model)


def test_a_failure_anywhere_leaves_everything_as_it_was():
    came_by,clean = points()
    assert set(came_by) == {
        'dataset', 'item transform', 'batch transform', 'before_epoch', 'before_train', 'before_batch', 'first',
        'after conv', 'after rerun', 'last', 'hook of a unit', 'pre-hook of a unit', 'hook', 'target_std', 'preinit',
    }
    errors = [RuntimeError('x'), torch.OutOfMemoryError('no memory'), KeyboardInterrupt(), ValueError('y')]
    # each point the first time and the last
    times = {i for p in set(came_by) for at in [[i for i, q in enumerate(came_by) if q == p]] for i in (at[0], at[-1])}
    for n, at in enumerate(sorted(times)):
        trap = Trap()
        before = Snapshots(but=notes)
        learn = trapped(trap, [Stop(), before])
        trap.points,trap.at,trap.point,trap.error = [],at,came_by[at],errors[n % len(errors)]
        with pytest.raises(type(trap.error)):
            learn.fit(1)
        assert changed(before.of[0], everything(learn, but=notes(learn)), but=()) == [], (came_by[at], at)
        assert not learn.lsuv.report and said(learn) == []
        trap.point = None
        learn.fit(1)
        assert learn.lsuv.report and same(weights(learn.model), clean), (came_by[at], at)


class Counts:
    "A dataset that counts."
    def __init__(self, n): self.n,self.items = n,images()
    def __len__(self): return 64
    def __getitem__(self, i):
        if isinstance(i, slice): return self.items[i]
        x,y = self.items[i]
        return counted(self.n, x), y


class CountsTransform(RandTransform):
    split_idx = None
    def __init__(self, n):
        self.n = n
        super().__init__()
    def encodes(self, x: torch.Tensor): return counted(self.n, x) if x.is_floating_point() else x


def counted(n, x):
    held = n['n'] if isinstance(n, dict) else n[0] if isinstance(n, list) else n
    held += 1
    return x + held.item()/100


@pytest.mark.parametrize('counter', [lambda: torch.zeros(()), lambda: np.zeros(1), lambda: [torch.zeros(1)],
                                     lambda: {'n': np.zeros(())}])
@pytest.mark.parametrize('where', ['dataset', 'item transform', 'batch transform'])
def test_what_counts_in_a_tensor_or_an_array(counter, where):
    def make(cbs):
        set_seed(0)
        if where == 'dataset': return learner(loaders(Counts(counter())), cbs=cbs)
        train = TfmdDL(images(), bs=16, shuffle=True, num_workers=0)
        (train.after_item if where == 'item transform' else train.after_batch).add(CountsTransform(counter()))
        return learner(DataLoaders(train, DataLoader(images(), bs=16)), cbs=cbs)
    (_,with_it,_),(_,without,_) = fed(make, [LSUVCallback()]),fed(make, [])
    assert same(with_it, without)
