"What `LSUVCallback` must not disturb: randomness, batches, and everything else that a Learner holds; and nothing at all if it fails."
import gc
import random
import weakref
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Callback, DataLoader, DataLoaders, TfmdDL, set_seed
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.data import PartialDL, WeightedDL
from fastai.vision.augment import RandTransform
from learners import *
from torch import nn

from fastai_lsuv import LSUVCallback


# --- everything as it was

@pytest.mark.parametrize('kind', KINDS)
def test_only_units_change(kind):
    assert disturbed(KINDS[kind]) == []


def test_every_attribute_is_looked_at():
    "The comparison itself: it sees a buffer, a hook, a hidden state, an attribute of a transform, a generator."
    learn = vision()
    for change in [lambda: learn.model[1].running_mean.add_(1), lambda: learn.model[0].register_forward_hook(print), lambda: setattr(learn.model, 'hidden', 1), lambda: random.random(),
                   lambda: setattr(learn.dls.train.after_batch.fs[-1], 'do', 'x'), lambda: learn.dls.train.rng.random(), lambda: learn.model[5].eval(), lambda: np.random.rand(),
                   lambda: torch.rand(1), lambda: learn.recorder.__dict__.update(losses=[1])]:
        before = everything(learn)
        change()
        assert changed(before, everything(learn))


class Restless(Callback):
    "A callback with state of every sort, all of which moves in `before_batch`."
    def __init__(self):
        self.n,self.total,self.list,self.nested,self.rng,self.numpy,self.helper = 0,torch.zeros(2),[],{'a': [1]},random.Random(0),np.random.default_rng(0),Helper()
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
        self.items,self.torch,self.python,self.calls,self.last = images(), torch.Generator(), random.Random(0), Counter(), []
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


def weighted(cbs=None): return learner(DataLoaders(WeightedDL(images(), wgts=range(1, 65), bs=16), DataLoader(images(), bs=16)), cbs=cbs)
def partial_epochs(cbs=None): return learner(DataLoaders(PartialDL(images(), partial_n=32, bs=16, shuffle=True), DataLoader(images(), bs=16)), cbs=cbs)
def pytorch_seeded_by_all(cbs=None): return learner(torch_loaders(), cbs=cbs)
def one_weighted_sampler(cbs=None):
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(64), 64, generator=torch.Generator().manual_seed(1))
    return learner(DataLoaders(torch.utils.data.DataLoader(images(), batch_size=16, sampler=sampler), DataLoader(images(), bs=16)), cbs=cbs)
def mixed_up(cbs=None): return learner(cbs=[*cbs, MixUp()])
def cut_and_mixed(cbs=None): return learner(cbs=[*cbs, CutMix()])


@pytest.mark.parametrize('make', [plain, pytorch, pytorch_seeded_by_all, one_weighted_sampler, vision, language, classifier, tabular, weighted, partial_epochs, mixed_up, cut_and_mixed],
                         ids=lambda f: f.__name__)
def test_training_sees_what_it_would_have_seen(make):
    with_it,without = fed(make, [LSUVCallback()]),fed(make, [])
    assert with_it[0].lsuv.report
    assert same(with_it[1], without[1]) and with_it[2] == without[2]


def with_workers(cbs=None, make=None): return learner(make(num_workers=2), cbs=cbs)


@pytest.mark.parametrize('make', [augmented, loaders, partial(torch_loaders, generator=torch.Generator().manual_seed(0))],
                         ids=['augmented', 'fastai', 'pytorch'])
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
    "Crops and augmentations are at work: the size is that which the batch transforms make."
    learn = vision(LSUVCallback())
    learn.lsuv_init()
    assert learn.lsuv.report[0].shape[-1] == 10 and learn.lsuv.report[0].shape[0] == 16


# --- failure at every point

def Trap():
    "Notes every point of the pass that is come by, and raises at one of them from some time on. (A function, which no snapshot looks into.)"
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
    dls = DataLoaders(TfmdDL(Data(), bs=8, shuffle=True, after_item=[], after_batch=[TrapItem(trap, 'batch transform')]), DataLoader(items[:8], bs=8))
    dls.train.after_item.add(TrapItem(lambda point: trap(point) if random.random() < 0.1 else None, 'item transform'))
    bn = nn.BatchNorm2d(8)
    model = nn.Sequential(Traps(trap, 'first'), nn.Conv2d(3, 8, 3), Traps(trap, 'after conv'), bn, nn.ReLU(inplace=True), Standardized(8, 8, 3), Traps(trap, 'after rerun'),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), Traps(trap, 'last'))
    model[1].register_forward_hook(lambda *_: trap('hook of a unit'))
    model[5].register_forward_pre_hook(lambda *_: trap('pre-hook of a unit'))
    bn.register_forward_hook(lambda *_: trap('hook'))
    def std(name, module):
        trap('target_std')
        return 1.
    def preinit(layer):
        trap('preinit')
        nn.init.orthogonal_(layer.weight)
    return learner(dls, model, [LSUVCallback(target_std=std, preinit=preinit, batch_tol=0.02, max_iter=2, min_samples=8), TrapCallback(trap), *cbs])


def points():
    "All points that one initialization comes by, and the weights it makes."
    trap,seen = Trap(),[]
    learn = trapped(trap, [Stop(), Around(lambda learn: seen.extend(trap.points), 10.6)])
    trap.points.clear()
    learn.fit(1)
    return seen, weights(learn.model)


def test_a_failure_anywhere_leaves_everything_as_it_was():
    came_by,clean = points()
    assert set(came_by) == {'dataset', 'item transform', 'batch transform', 'before_epoch', 'before_train', 'before_batch', 'first', 'after conv', 'after rerun', 'last', 'hook of a unit',
                            'pre-hook of a unit', 'hook', 'target_std', 'preinit'}
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
        assert learn.lsuv.report is None and said(learn) == []
        trap.point = None
        learn.fit(1)
        assert learn.lsuv.report and same(weights(learn.model), clean), (came_by[at], at)
