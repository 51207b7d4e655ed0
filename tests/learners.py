"Small Learners of every kind, and all that a Learner holds, to compare before and after."
import random
import threading
import weakref
from collections import deque
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback
from torch import nn

from fastai_lsuv import LSUVCallback
from fastai_lsuv.learner.batches import model_inputs, no_trace
from fastai_lsuv.units import Ref, Selection


# --- data

def images(n=64, size=12, channels=3, classes=4):
    "Pairs of an image and its class, the same each time."
    g = torch.Generator().manual_seed(42)
    x = torch.randn(n, channels, size, size, generator=g)
    return list(zip(x, torch.randint(0, classes, (n,), generator=g)))


def loaders(items=None, bs=16, num_workers=0, **kwargs):
    "fastai DataLoaders of these items, training and validation alike."
    items = images() if items is None else items
    train = DataLoader(items, bs=bs, shuffle=True, num_workers=num_workers, **kwargs)
    return DataLoaders(train, DataLoader(items[:bs], bs=bs), device='cpu')


def torch_loaders(items=None, bs=16, generator=None, **kwargs):
    "The same of plain PyTorch."
    items = images() if items is None else items
    loader = torch.utils.data.DataLoader
    train = loader(items, batch_size=bs, shuffle=True, generator=generator, **kwargs)
    return DataLoaders(train, loader(items[:bs], batch_size=bs))


# --- models and Learners

def cnn(width=8, classes=4):
    stem = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    body = [nn.Conv2d(width, width, 3, stride=2), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def learner(dls=None, model=None, cbs=None, seed=1, **kwargs):
    "A Learner that shows no progress bar and keeps its log as `learn.lines`."
    set_seed(seed)
    learn = Learner(dls or loaders(), model or cnn(), **{'loss_func': CrossEntropyLossFlat(), **kwargs}, cbs=cbs)
    return quiet(learn)


def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.lines = []
    learn.logger = learn.lines.append
    return learn


def said(learn):
    "The lines that LSUV has logged."
    return [l for l in learn.lines if isinstance(l, str) and l.startswith('LSUV')]


def weights(model): return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    "Whether two lists of tensors hold the same bits."
    a,b = list(a),list(b)
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))


def stds(learn, x=None):
    "Std of each unit's output in training mode, on the whole of the training data."
    from fastai_lsuv import layer_stats
    if x is None:
        x = torch.stack([i[0] for i in learn.dls.train_ds])
    return [s for _, s in layer_stats(learn.model, x).pairs]


class Snapshots(Callback):
    "Takes `everything(learn)` in `before_fit`, just before LSUV or (`order` 10.6) just after."
    def __init__(self, order=10.4, but=None):
        self.order,self.but,self.of = order,but or units_and_notes,[]
    def before_fit(self):
        self.of.append(everything(self.learn, but=self.but(self.learn)))


def notes(learn):
    "What LSUV, and these tests, write down."
    known = [cb.known for cb in learn.cbs if isinstance(cb, LSUVCallback)]
    taken = [cb.of for cb in learn.cbs if isinstance(cb, Snapshots)]
    return [*known, *taken, learn.lines]


def units_and_notes(learn):
    "What LSUV may change: the weights and biases of the units, and its own notes."
    return [*unit_parameters(learn.model, learn.lsuv.options['modules']), *notes(learn)]


def unit_parameters(model, modules=None):
    "The weights and biases of layers, and of the blocks that `modules` selects."
    chosen = Selection(model, modules)
    of_layers = [p for _, m in chosen.layers for p in m.parameters(False)]
    return [*of_layers, *(r.param for u in chosen.blocks for r in u.refs if isinstance(r, Ref))]


def disturbed(make):
    """Where `make(cbs)`, a Learner, differs after LSUV in its first fit from before.

    LSUV must have run, and have changed weights.

    The fit ends where training would begin."""
    before,after = Snapshots(10.4),Snapshots(10.6)
    learn = make([LSUVCallback(), before, after, Stop()])
    w = weights(learn.model)
    learn.fit(1)
    assert learn.lsuv.report and not same(w, weights(learn.model)), learn.lines
    return changed(before.of[0], after.of[0])


class Stop(Callback):
    "Ends the fit before anything is trained."
    order = 100
    def before_train(self):
        raise CancelFitException


class Around(Callback):
    "Calls `f(learn)` in `before_fit`, just before LSUV (`order` 10.4) or just after it (10.6)."
    def __init__(self, f, order=10.4):
        self.f,self.order = f,order
    def before_fit(self):
        self.f(self.learn)


# --- every kind of Learner, as functions of its callbacks

KINDS = {}
def kind(f):
    KINDS[f.__name__] = f
    return f


@kind
def plain(cbs=None, **kwargs): return learner(cbs=cbs, **kwargs)


@kind
def pytorch(cbs=None, **kwargs):
    return learner(torch_loaders(generator=torch.Generator().manual_seed(3)), cbs=cbs, **kwargs)


@kind
def vision(cbs=None, num_workers=0, **kwargs):
    "Random crops of items, and batch augmentations."
    return learner(augmented(num_workers), cbs=cbs, **kwargs)


def augmented(num_workers=0, n=48):
    from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, RandomResizedCrop, RandomSplitter,
                                   aug_transforms)
    set_seed(0)
    pixels = np.random.RandomState(0).randint(0, 255, (n, 20, 20, 3)).astype('uint8')
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=lambda i: pixels[i],
        get_y=lambda i: 'abcd'[i % 4],
        splitter=RandomSplitter(0.2, seed=0),
        item_tfms=RandomResizedCrop(16, min_scale=0.3),
        batch_tfms=aug_transforms(size=12, max_rotate=30, p_affine=1., p_lighting=1.),
    )
    return block.dataloaders(range(n), bs=16, num_workers=num_workers, device='cpu')


@kind
def tabular(cbs=None, **kwargs):
    import pandas as pd
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
    r = np.random.RandomState(0)
    df = pd.DataFrame({
        'a': r.randn(96),
        'b': r.randn(96)*5 + 3,
        'c': r.choice(list('xyz'), 96),
        'y': r.choice(['no', 'yes'], 96),
    })
    set_seed(1)
    columns = dict(cat_names=['c'], cont_names=['a', 'b'], y_names='y')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], valid_idx=list(range(24)), bs=16,
                                     device='cpu', **columns)
    return quiet(tabular_learner(dls, layers=[12, 8], n_out=2, cbs=cbs, **kwargs))


WORDS = [f'w{i}' for i in range(30)]


def texts(n=72):
    r = random.Random(0)
    return [(r.choices(WORDS, k=r.randint(5, 60)), r.choice(['neg', 'pos'])) for _ in range(n)]


def text_loaders(lm, bs=8):
    from fastai.text.all import Categorize, Datasets, ItemGetter, LMDataLoader, Numericalize, SortedDL, pad_input
    set_seed(1)
    numericalize = [ItemGetter(0), Numericalize(vocab=['xxunk', 'xxpad', *WORDS])]
    splits = [range(60), range(60, 72)]
    if lm:
        datasets = Datasets(texts(), [numericalize], splits=splits, dl_type=LMDataLoader)
        return datasets.dataloaders(bs=bs, seq_len=16, device='cpu')
    datasets = Datasets(texts(), [numericalize, [ItemGetter(1), Categorize()]], splits=splits, dl_type=SortedDL)
    return datasets.dataloaders(bs=bs, before_batch=pad_input, device='cpu')


@kind
def language(cbs=None, lm_bs=8, **kwargs):
    from fastai.text.all import AWD_LSTM, awd_lstm_lm_config, language_model_learner
    config = dict(awd_lstm_lm_config, emb_sz=12, n_hid=16, n_layers=2, tie_weights=False)
    dls = text_loaders(lm=True, bs=lm_bs)
    return quiet(language_model_learner(dls, AWD_LSTM, config=config, **{'pretrained': False, **kwargs}, cbs=cbs))


@kind
def classifier(cbs=None, clas_bs=20, **kwargs):
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, text_classifier_learner
    config = dict(awd_lstm_clas_config, emb_sz=12, n_hid=16, n_layers=2)
    dls = text_loaders(lm=False, bs=clas_bs)
    options = {'pretrained': False, **kwargs}
    return quiet(text_classifier_learner(dls, AWD_LSTM, config=config, lin_ftrs=[10], **options, cbs=cbs))


def body(pretrained=False):
    "A network that the vision factories cut before its pool."
    def block(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    blocks = block(3, 8),block(8, 16),block(16, 16)
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    if pretrained:
        model.load_state_dict(pretrained_weights(model))
    return model


def pretrained_weights(model):
    "Weights that only training could have given."
    g = torch.Generator().manual_seed(7)
    def trained(v): return torch.rand(v.shape, generator=g) + 0.5 if v.is_floating_point() else v
    return {k: trained(v) for k, v in model.state_dict().items()}


@kind
def unet(cbs=None, **kwargs):
    from fastai.vision.all import TensorImage, TensorMask, unet_learner
    set_seed(1)
    pairs = [(TensorImage(torch.randn(3, 32, 32)), TensorMask(torch.randint(0, 2, (32, 32)))) for _ in range(8)]
    dls = loaders(pairs, bs=4)
    options = {'loss_func': CrossEntropyLossFlat(axis=1), 'normalize': False, 'pretrained': False, **kwargs}
    return quiet(unet_learner(dls, body, n_out=2, **options, cbs=cbs))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image,self.numbers,self.head = nn.Conv2d(3, 8, 3),nn.Linear(5, 8),nn.Linear(16, 4)
    def forward(self, x, v):
        return self.head(torch.cat([F.relu(self.image(x)).mean((2, 3)), F.relu(self.numbers(v))], 1))


@kind
def two_inputs(cbs=None, **kwargs):
    g = torch.Generator().manual_seed(5)
    items = [(x, torch.randn(5, generator=g), y) for x, y in images()]
    dls = loaders(items)
    dls.n_inp = 2
    return learner(dls, TwoInputs(), cbs=cbs, **kwargs)


def batches(learn, n=3, min_samples=1):
    "The first mini-batches that LSUV would see, and what it says about them."
    lines = []
    with no_trace(learn):
        stream = model_inputs(learn, min_samples, lines.append)
        return [next(stream) for _ in range(n)], lines


# --- all that a Learner holds

_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, FunctionType, BuiltinFunctionType, ModuleType,
           torch.dtype, torch.device, threading.Thread)


def everything(*roots, but=()):
    """All that is reached from some objects, as {path: value}.

    That is every attribute of every object, tensors and arrays by their bits, generators by their state, and the
    generators of random, numpy and torch. Of the objects `but`, it tells only which they are."""
    out,seen,todo,but = {},{},[(type(r).__name__, r) for r in roots],{id(o) for o in but}
    while todo:
        path,v = todo.pop()
        if isinstance(v, _LEAVES):
            out[path] = v
            continue
        if id(v) in seen:
            out[path] = 'as ' + seen[id(v)][0]
            continue
        seen[id(v)] = path,v  # keeps `v`, and so its id
        out[path] = f'{type(v).__name__} {id(v)}' if not isinstance(v, tuple) else 'tuple'
        if isinstance(v, torch.Tensor):
            out[path] += f' {v.dtype} {v.shape} {v.requires_grad} {v.grad is not None}'
        if id(v) in but: continue
        if isinstance(v, torch.Tensor):
            t = v.detach().as_subclass(torch.Tensor)
            out[path + ' bits'] = t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if v.numel() else b''
        elif isinstance(v, np.ndarray):
            out[path + ' bits'] = repr(v.tolist())
        elif isinstance(v, torch.Generator):
            out[path + ' state'] = v.get_state().numpy().tobytes()
        elif isinstance(v, random.Random):
            out[path + ' state'] = v.getstate()
        elif isinstance(v, np.random.Generator):
            out[path + ' state'] = repr(v.bit_generator.state)
        elif isinstance(v, np.random.RandomState):
            out[path + ' state'] = repr(v.get_state())
        elif isinstance(v, dict):
            out[path + ' keys'] = [k if isinstance(k, _LEAVES) else id(k) for k in v]
            todo += [(f'{path}[{k if isinstance(k, _LEAVES) else id(k)}]', o) for k, o in v.items()]
        elif isinstance(v, (list, tuple, deque)):
            out[path + ' len'] = len(v)
            todo += [(f'{path}[{i}]', o) for i, o in enumerate(v)]
        elif isinstance(v, (set, frozenset)):
            out[path + ' items'] = {o if isinstance(o, _LEAVES) else id(o) for o in v}
        elif isinstance(v, MethodType):
            out[path] = v.__func__
            todo.append((path + '.__self__', v.__self__))
        elif isinstance(v, (weakref.ref, weakref.WeakSet)) or type(v).__module__.split('.')[0] == 'pandas':
            pass
        elif hasattr(v, '__dict__'):
            out[path + ' attributes'] = sorted(vars(v))
            todo += [(f'{path}.{k}', o) for k, o in vars(v).items()]
    return out | outside()


def outside():
    "What belongs to no object: the generators of random, numpy and torch, autocast, and whether gradients are taken."
    return {
        'random': random.getstate(),
        'numpy': repr(np.random.get_state()),
        'torch': torch.get_rng_state().numpy().tobytes(),
        'grad': torch.is_grad_enabled(),
        'autocast on': torch.is_autocast_enabled('cpu'),
        'autocast type': torch.get_autocast_dtype('cpu'),
        'autocast cache': torch.is_autocast_cache_enabled(),
    }


def changed(before, after, but=('.lsuv.report',)):
    "Paths at which two results of `everything` differ, less those that hold one of `but`."
    differ = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    return sorted(k for k in differ if not any(b in k for b in but))
