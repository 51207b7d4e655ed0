"Small Learners of every kind, and all that a Learner holds, to compare before and after."
import random
import threading
import weakref
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


def batches(learn, n=3, min_samples=1):
    "The first mini-batches that LSUV would see, and what it says about them."
    lines = []
    with no_trace(learn):
        stream = model_inputs(learn, min_samples, lines.append)
        return [next(stream) for _ in range(n)], lines


# --- every kind of Learner, as functions of its callbacks

def plain(cbs=None, **kwargs): return learner(cbs=cbs, **kwargs)


def pytorch(cbs=None, num_workers=0):
    return learner(torch_loaders(generator=torch.Generator().manual_seed(3), num_workers=num_workers), cbs=cbs)


def vision(cbs=None, num_workers=0):
    "Random crops of items, and batch augmentations."
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, RandomResizedCrop, aug_transforms
    set_seed(0)
    pixels = np.random.RandomState(0).randint(0, 255, (48, 20, 20, 3)).astype('uint8')
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=lambda i: pixels[i],
        get_y=lambda i: 'abcd'[i % 4],
        splitter=IndexSplitter(range(9)),
        item_tfms=RandomResizedCrop(16, min_scale=0.3),
        batch_tfms=aug_transforms(size=12, max_rotate=30, p_affine=1., p_lighting=1.),
    )
    return learner(block.dataloaders(range(48), bs=16, num_workers=num_workers, device='cpu'), cbs=cbs)


def tabular(cbs=None):
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, pd, tabular_learner
    r = np.random.RandomState(0)
    numbers = dict(a=r.randn(96), b=r.randn(96)*5 + 3)
    df = pd.DataFrame({**numbers, 'c': r.choice(list('xyz'), 96), 'y': r.choice(['no', 'yes'], 96)})
    set_seed(1)
    columns = dict(cat_names=['c'], cont_names=['a', 'b'], y_names='y')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], valid_idx=list(range(24)), bs=16,
                                     device='cpu', **columns)
    return quiet(tabular_learner(dls, layers=[12, 8], n_out=2, cbs=cbs))


WORDS = [f'w{i}' for i in range(30)]


def text_loaders(lm, bs=8):
    from fastai.text.all import Categorize, Datasets, ItemGetter, LMDataLoader, Numericalize, SortedDL, pad_input
    set_seed(1)
    r = random.Random(0)
    texts = [(r.choices(WORDS, k=r.randint(5, 60)), r.choice(['neg', 'pos'])) for _ in range(72)]
    numericalize = [ItemGetter(0), Numericalize(vocab=['xxunk', 'xxpad', *WORDS])]
    tfms = [numericalize] if lm else [numericalize, [ItemGetter(1), Categorize()]]
    datasets = Datasets(texts, tfms, splits=[range(60), range(60, 72)], dl_type=LMDataLoader if lm else SortedDL)
    options = dict(seq_len=16) if lm else dict(before_batch=pad_input)
    return datasets.dataloaders(bs=bs, device='cpu', **options)


def language(cbs=None, pretrained=False):
    from fastai.text.all import AWD_LSTM, awd_lstm_lm_config, language_model_learner
    config = dict(awd_lstm_lm_config, emb_sz=12, n_hid=16, n_layers=2, tie_weights=False)
    dls = text_loaders(lm=True)
    return quiet(language_model_learner(dls, AWD_LSTM, config=config, pretrained=pretrained, cbs=cbs))


def classifier(cbs=None, clas_bs=20, pretrained=False):
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, text_classifier_learner
    config = dict(awd_lstm_clas_config, emb_sz=12, n_hid=16, n_layers=2)
    options = dict(config=config, pretrained=pretrained, lin_ftrs=[10])
    return quiet(text_classifier_learner(text_loaders(lm=False, bs=clas_bs), AWD_LSTM, **options, cbs=cbs))


def body(pretrained=False):
    "A network that the vision factories cut before its pool."
    def block(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    blocks = block(3, 8),block(8, 16),block(16, 16)
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    if pretrained: model.load_state_dict(pretrained_weights(model))
    return model


def pretrained_weights(model):
    "Weights that only training could have given."
    g = torch.Generator().manual_seed(7)
    def trained(v): return torch.rand(v.shape, generator=g) + 0.5 if v.is_floating_point() else v
    return {k: trained(v) for k, v in model.state_dict().items()}


def unet(cbs=None):
    from fastai.vision.all import TensorImage, TensorMask, unet_learner
    set_seed(1)
    pairs = [(TensorImage(torch.randn(3, 32, 32)), TensorMask(torch.randint(0, 2, (32, 32)))) for _ in range(8)]
    options = dict(loss_func=CrossEntropyLossFlat(axis=1), normalize=False, pretrained=False)
    return quiet(unet_learner(loaders(pairs, bs=4), body, n_out=2, **options, cbs=cbs))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image,self.numbers,self.head = nn.Conv2d(3, 8, 3),nn.Linear(5, 8),nn.Linear(16, 4)
    def forward(self, x, v):
        return self.head(torch.cat([F.relu(self.image(x)).mean((2, 3)), F.relu(self.numbers(v))], 1))


def two_inputs(cbs=None):
    g = torch.Generator().manual_seed(5)
    dls = loaders([(x, torch.randn(5, generator=g), y) for x, y in images()])
    dls.n_inp = 2
    return learner(dls, TwoInputs(), cbs=cbs)


KINDS = {f.__name__: f for f in (plain, pytorch, vision, tabular, language, classifier, unet, two_inputs)}


# --- before and after

class Stop(Callback):
    "Ends the fit before anything is trained."
    order = 100
    def before_train(self): raise CancelFitException


class Around(Callback):
    "Calls `f(learn)` in `before_fit`, just before LSUV (`order` 10.4) or just after it (10.6)."
    def __init__(self, f, order=10.4): self.f,self.order = f,order
    def before_fit(self): self.f(self.learn)


class Snapshots(Callback):
    "Takes `everything(learn)` in `before_fit`, just before LSUV or (`order` 10.6) just after."
    def __init__(self, order=10.4, but=None): self.order,self.but,self.of = order,but or units_and_notes,[]
    def before_fit(self): self.of.append(everything(self.learn, but=self.but(self.learn)))


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

    LSUV must have run, and have changed weights. The fit ends where training would begin."""
    before,after = Snapshots(10.4),Snapshots(10.6)
    learn = make([LSUVCallback(), before, after, Stop()])
    w = weights(learn.model)
    learn.fit(1)
    assert learn.lsuv.report and not same(w, weights(learn.model)), learn.lines
    return changed(before.of[0], after.of[0])


def changed(before, after, but=('.lsuv.report',)):
    "Paths at which two results of `everything` differ, less those that hold one of `but`."
    differ = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    return sorted(k for k in differ if not any(b in k for b in but))


def _bits(t):
    t = t.detach().as_subclass(torch.Tensor).contiguous().view(-1)
    return t.view(torch.uint8).numpy().tobytes() if t.numel() else b''


_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, FunctionType, BuiltinFunctionType, ModuleType,
           torch.dtype, torch.device, threading.Thread)
_STATES = {
    torch.Tensor: _bits,
    np.ndarray: lambda a: repr(a.tolist()),
    torch.Generator: lambda g: g.get_state().numpy().tobytes(),
    random.Random: lambda g: g.getstate(),
    np.random.Generator: lambda g: repr(g.bit_generator.state),
    np.random.RandomState: lambda g: repr(g.get_state()),
}


def everything(*roots, but=()):
    """All that is reached from some objects, as {path: value}.

    That is every attribute of every object, tensors and arrays by their bits, generators by their state, and the
    generators of random, numpy and torch. Of the objects `but`, it tells only which they are."""
    out,seen,todo,but = {},{},[(type(r).__name__, r) for r in roots],{id(o) for o in but}
    while todo:
        path,v = todo.pop()
        if isinstance(v, _LEAVES): out[path] = v
        elif id(v) in seen: out[path] = 'as ' + seen[id(v)][0]
        else:
            seen[id(v)] = path,v  # keeps `v`, and so its id
            out[path] = 'tuple' if isinstance(v, tuple) else f'{type(v).__name__} {id(v)}'
            if isinstance(v, torch.Tensor): out[path] += f' {v.dtype} {v.shape} {v.requires_grad} {v.grad is not None}'
            if id(v) in but: continue
            out[path + ' holds'],parts = _inside(v)
            todo += [(f'{path}.{k}', o) for k, o in parts]
    return out | outside()


def _inside(v):
    "What an object holds, in a form that compares, and the objects to look into, with their names."
    def name(k): return k if isinstance(k, _LEAVES) else id(k)
    for kind, state in _STATES.items():
        if isinstance(v, kind): return state(v), []
    if isinstance(v, dict): return [name(k) for k in v], [(name(k), o) for k, o in v.items()]
    if isinstance(v, (list, tuple)): return len(v), list(enumerate(v))
    if isinstance(v, (set, frozenset)): return {name(o) for o in v}, []
    if isinstance(v, MethodType): return v.__func__, [('__self__', v.__self__)]
    skipped = isinstance(v, (weakref.ref, weakref.WeakSet)) or type(v).__module__.split('.')[0] == 'pandas'
    attributes = {} if skipped else getattr(v, '__dict__', {})
    return sorted(attributes), list(attributes.items())


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
