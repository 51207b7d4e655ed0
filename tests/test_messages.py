"""All that the package says at run time, in one place: `messages.md` lists each situation, and what a user reads there.

Read that file aloud. `python tests/test_messages.py` writes it anew from the situations below. A second test finds
messages in the source that no situation shows."""
import ast
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import (Callback, CancelBatchException, CrossEntropyLossFlat, DataLoaders, Learner, SkipToEpoch,
                           load_learner, set_seed)
from fastai.callback import schedule  # noqa: F401
from learners import classifier
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastai_lsuv
from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, LSUVReport, layer_stats, lsuv_init
from fastai_lsuv.report.report import Row
from fastai_lsuv.statuses import OUTSIDE, STATUSES, words_for

FILE = Path(__file__).parent/'messages.md'
SITUATIONS = {}
OURS = 'LSUV', 'batches:', 'target_mean:', 'ActivationStats'  # Words of our warnings, and of no others


def situation(title):
    "Enters a function, which returns what is said or says it, under a title."
    def enter(f):
        assert title not in SITUATIONS, title
        SITUATIONS[title] = f
        return f
    return enter


def said_by(f):
    "What `f` raises, with its notes; what it warns of; and what it returns, if that is text."
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try: out = f()
        except Exception as e:
            text = str(e.args[0]) if isinstance(e, KeyError) else str(e)
            notes = getattr(e, '__notes__', [])
            if any(n.startswith('The error was raised in') for n in notes) and type(e) is RuntimeError:
                text = "(torch's own words)"  # they differ between its versions
            lines += [f'{type(e).__name__}: {text}', *notes]
        else: lines += [out] if isinstance(out, str) else out if isinstance(out, list) else []
    ours = [w for w in caught if any(word in str(w.message) for word in OURS)]
    return [*(f'{w.category.__name__}: {w.message}' for w in ours), *lines]


x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4


def net(*more): return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), *more)


def refused(title, make=lambda: (net(), x), **kwargs):
    "`lsuv_init` gets a bad argument."
    situation(title)(lambda: lsuv_init(*make(), **kwargs))


def weight_normed():
    return nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 4), dim=None))


# ---- Arguments

for order in ('std maen', 'Std, Mean', ['std', 'mean'], 'variance', 'std loop', '', 3, 'mean+mean'):
    refused(f'order={order!r}', order=order)
for preinit in ('xavier', nn.init.kaiming_normal_, 3):
    refused(f'preinit={getattr(preinit, "__name__", preinit)!r}', preinit=preinit)
for name in ('needed_std', 'cuda', 'prehint', 'shuffle'):
    refused(f'lsuv_init is given {name}', **{name: 1})
refused('target_mean=nan', target_mean=float('nan'))
refused('target_mean without a mean loop', target_mean=1., order='std')
refused('target_std=0', target_std=0)
refused('target_std is a function that gives 0', target_std=lambda name, module: 0)
refused('tol is text', tol='small')
refused('max_iter=0', max_iter=0)
refused('max_iter is text', max_iter='many')
refused('per_channel, of a weight with one number', lambda: (weight_normed(), x), per_channel=True)
refused('loss is a number', loss=3)
refused('modules matches nothing', modules='head')
refused('modules is a layer of another model', modules=nn.Linear(2, 2))
refused('modules=[]', modules=[])
refused('modules=3', modules=3)
refused('modules is an activation', modules='1')
refused('modules names a container and the layer inside it', lambda: (nn.Sequential(net(), nn.ReLU()), x),
        modules=['0', '0.0'])
refused('the model is a function', lambda: (F.relu, x))
refused('the model has no layer', lambda: (nn.Sequential(nn.ReLU()), x))
refused('the model is on the meta device', lambda: (net().to('meta'), x))
refused('the model has complex weights', lambda: (net().to(torch.complex64), x))
refused('the model is compiled by torch.jit', lambda: (nn.Sequential(torch.jit.trace(nn.Linear(8, 4), x)), x))
refused('the batch is a number', lambda: (net(), 3))
refused('the batch is a DataLoaders', lambda: (net(), DataLoaders.from_dsets(*[list(zip(x, y))]*2, bs=16)))
refused('the batches are empty', lambda: (net(), []))
refused('a mini-batch is text', lambda: (net(), ['text']))
refused('a mini-batch holds NaNs', lambda: (net(), x*float('nan')))
refused('a mini-batch holds its target', lambda: (net(), (x, y)))
refused('a mini-batch holds its target, and n_inp is too many', lambda: (net(), (x, y)), n_inp=2)
refused('a mini-batch names its inputs otherwise', lambda: (net(), {'x': x, 'y': y}))
refused('a mini-batch is of numpy', lambda: (net(), [x.numpy()]))
refused('a mini-batch with its target, as a list', lambda: (net(), [x, y]))
refused('two tensors as a list', lambda: (net(), [x, x + 1]))
refused('a mini-batch without samples', lambda: (net(), x[:0]))
refused('n_inp=0', n_inp=0)
refused('get_input=3', get_input=3)


@situation('an activation is complex')
def _():
    class Fourier(nn.Sequential):
        def forward(self, x): return torch.fft.fft(super().forward(x))
    lsuv_init(nn.Sequential(Fourier(nn.Linear(8, 8))), x, modules='0')


@situation('a model makes a layer as it runs')
def _():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first,self.last = nn.Linear(8, 8),None

        def forward(self, x):
            x = self.first(x)
            if self.last is None: self.last = nn.Linear(8, 4)
            return self.last(x)
    lsuv_init(Late(), x)


@situation('layer_stats with a loss and reentrant checkpoints')
def _():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    def loss(model): return checkpoint(model[1], model[0](x), use_reentrant=True).mean()
    layer_stats(model, x, loss=loss)


@situation('a model applies its weights in no linear operation')
def _():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(2, 8))

        def forward(self, x): return x*self.table[0]
    lsuv_init(Scales(), x)


@situation('layer_stats with a loss that is no tensor')
def _(): layer_stats(net(), x, loss=lambda model: 3.)


@situation('layer_stats with a loss that does not depend on the model')
def _(): layer_stats(net(), x, loss=lambda model: torch.ones(1))


# ---- Errors of the model (test_blame.py has more)

@situation('a double model, a float mini-batch')
def _(): layer_stats(net().double(), x)


@situation('a mini-batch of other features')
def _(): lsuv_init(net(), x[:, :3])


# ---- What LSUV says of its run

def row(k, status='ok', **kwargs):
    fields = dict(name=f'blocks.{k}', kind='Linear', shape=(64, 8), mean=0., std=1., mean_before=None, std_before=None,
                  passes=1, status=status, mean_range=(-0.4, 0.4), std_range=(0.9, 1.1))
    return Row(**{**fields, **kwargs})


@situation('lsuv_init: the summary')
def _(): return lsuv_init(net(), x).summary


@situation('lsuv_init: the summary with a loss')
def _():
    return LSUVReport([row(k) for k in range(23)], 'std mean', 4, (1.4616, 1.3193)).summary


@situation('lsuv_init: the summary where a layer is frozen, and weights are outside')
def _():
    rows = [row(0), row(1, 'no bias'), row(2), row(3, 'frozen')]
    return LSUVReport(rows, 'std mean', 4, outside={'tok.weight': 'embedding'}, coverage=0.989).summary


@situation('the report of weights outside')
def _():
    outside = {f'{why.replace(" ", "_")}.weight': why for why in OUTSIDE}
    return str(LSUVReport([row(0)], 'std mean', 4, outside=outside, coverage=0.7)).splitlines()[-1]


@situation('the report of a mean that is off by more than batch_tol')
def _():
    return str(LSUVReport([row(0, mean=0.2)], 'std mean', 4)).splitlines()[-1]


@situation('lsuv_init: the summary with a loss that cannot be taken')
def _():
    def loss(model): raise ValueError('3 classes')
    return lsuv_init(net(), x, loss=loss).summary


@situation('lsuv_init: the summary where a prediction of zeros is better')
def _():
    return lsuv_init(net(), x, loss=lambda model: 1e-3 + (model(x)**2).mean(), force=True).summary


@situation('layer_stats: the summary')
def _(): return layer_stats(net(), x).summary


@situation('a report is asked for a layer that it does not have')
def _(): lsuv_init(net(), x)['head']


@situation('a layer is frozen')
def _():
    model = net()
    model[0].requires_grad_(False)
    lsuv_init(model, x)


@situation('layers with every status')
def _(): return LSUVReport([row(k, s) for k, s in enumerate(STATUSES)], 'std mean').warning


@situation('the mini-batch is not normalized')
def _(): lsuv_init(net(), 1e-3*x)


@situation('the mini-batch is one sample')
def _(): return LSUVReport([row(0)], 'std mean', unusual='it holds 1 sample and its std is 1e-06').warning


def far_worse(model): lsuv_init(model, x, loss=lambda model: 1 + (model(x)**4).mean(), target_std=100.)


@situation('the loss comes out far worse')
def _():
    far_worse(net())


class Sealed(nn.Module):
    "Its forward writes to an array, and then seals it."
    def __init__(self):
        super().__init__()
        self.lin,self.seen = nn.Linear(8, 4),np.zeros(2)

    def forward(self, x):
        if self.seen.flags.writeable: self.seen += 1
        self.seen.flags.writeable = False
        return self.lin(x)


@situation('something cannot be put back')
def _(): lsuv_init(Sealed(), x)


# ---- In a Learner

class Items(list):
    "Items that a Learner can be exported without."
    def new_empty(self): return Items()


def learner(*cbs, model=None, **kwargs):
    items = Items(zip(x, y))
    dls = DataLoaders.from_dsets(items, items, bs=16, device='cpu')
    learn = Learner(dls, model or net(), CrossEntropyLossFlat(), cbs=list(cbs), **kwargs)
    learn.path = Path(tempfile.mkdtemp())
    learn.lines = []
    learn.logger = lambda line: learn.lines.append(line) if isinstance(line, str) else None
    return learn


def fit(learn, *args, **kwargs):
    "The lines that a fit logs."
    learn.lines.clear()
    logger = learn.logger
    with learn.no_bar(), learn.no_logging():
        learn.logger = logger
        learn.fit(*(args or (1, 0.)), **kwargs)
    return [re.sub(r'\d\.\d\d', '0.12', line) for line in learn.lines]


@situation('learn.lsuv.report before a fit')
def _(): return repr(learner(LSUVCallback()).lsuv.report)


@situation('learn.lsuv.report.plot() before a fit')
def _(): learner(LSUVCallback()).lsuv.report.plot()


@situation('a fit')
def _(): return fit(learner(LSUVCallback()))


@situation('a fit after lr_find')
def _():
    learn = learner(LSUVCallback())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=20, stop_div=False)
    return fit(learn)


@situation('a second fit')
def _():
    learn = learner(LSUVCallback())
    fit(learn)
    return fit(learn)


@situation('a fit after learn.load')
def _():
    learn = learner(LSUVCallback())
    learn.save('model')
    learn.load('model', with_opt=False)
    return fit(learn)


@situation('a fit of a model that was trained without LSUV')
def _():
    learn = learner()
    fit(learn, 1, 0.1)
    learn.add_cb(LSUVCallback())
    return fit(learn)


@situation('a fit of a model whose norm layer has learned')
def _():
    model = net(nn.BatchNorm1d(4))
    nn.init.normal_(model[3].weight)
    nn.init.normal_(model[3].bias)
    return fit(learner(LSUVCallback(), model=model))


@situation('a fit from a later epoch')
def _(): return fit(learner(LSUVCallback()), 3, 0., cbs=SkipToEpoch(2))


@situation('a fit of a Learner from a file')
def _():
    learn = learner(LSUVCallback())
    learn.export('learner.pkl')
    new = load_learner(learn.path/'learner.pkl')
    new.dls,new.lines = learn.dls,[]
    new.logger = lambda line: new.lines.append(line) if isinstance(line, str) else None
    return fit(new)


class Cancels(Callback):
    def before_batch(self): raise CancelBatchException()


@situation('a fit whose mini-batches are all cancelled')
def _():
    learn = learner(LSUVCallback())
    learn.add_cb(Cancels())
    return fit(learn)


@situation('learn.lsuv_init() where mini-batches are all cancelled')
def _(): learner(LSUVCallback(), Cancels()).lsuv_init()


@situation('a fit with small mini-batches of several shapes')
def _():
    learn = classifier(LSUVCallback(), clas_bs=3)
    learn.lines = []
    learn.logger = lambda line: learn.lines.append(line) if isinstance(line, str) else None
    return fit(learn)[:1]


@situation('a second LSUVCallback')
def _(): learner(LSUVCallback(), LSUVCallback())


@situation('min_samples=0')
def _(): LSUVCallback(min_samples=0)


# ---- The recorder

def recorded(**kwargs):
    recorder = ActivationStatsRecorder(**kwargs)
    fit(learner(recorder), 1, 0.)
    return recorder


for bad in (dict(every=0), dict(max_steps=1), dict(sample=0), dict(near_zero='small'), dict(hist='yes')):
    (name, value), = bad.items()
    situation(f'{name}={value!r}')(lambda bad=bad: ActivationStatsRecorder(**bad))
situation('the recorder is given with_hist')(lambda: ActivationStatsRecorder(with_hist=True))
situation('LSUVCallback is given max_attempts')(lambda: LSUVCallback(max_attempts=3))
situation('hist=(0, 1, 2)')(lambda: ActivationStatsRecorder(hist=(0, 1, 2)))
situation('a plot before a fit')(lambda: ActivationStatsRecorder().plot_stats())
situation('a plot of a validation that was not recorded')(lambda: recorded().plot_stats(phase='valid'))
situation('phase is unknown')(lambda: recorded().plot_stats(phase='test'))
situation('histograms that were not recorded')(lambda: recorded().hist(0))
situation('a layer that was not recorded')(lambda: recorded().layer_stats('head'))
situation('gradients that were not recorded')(lambda: recorded().plot_stats('grad_std'))
situation('too few axes')(lambda: recorded().plot_layer_stats(0, ax=[None]))
situation('diagnose: nothing')(lambda: repr(recorded().diagnose()))
situation('diagnose: vanishing')(lambda: repr(recorded().diagnose(vanish=10.)))


@situation('a .parquet file without pyarrow')
def _():
    held = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split('.')[0] == 'pyarrow'}
    sys.modules['pyarrow'] = None
    try: ActivationStatsRecorder(fname='stats.parquet')
    finally:
        del sys.modules['pyarrow']
        sys.modules.update(held)


@situation('append, with other layers')
def _():
    recorder = ActivationStatsRecorder(append=True)
    learn = learner(recorder)
    fit(learn)
    learn.model = nn.Sequential(nn.Linear(8, 4))
    fit(learn)


def everything():
    "The contents of `messages.md`."
    parts = ["# What fastai_lsuv says\n\nEach situation, and what a user reads there. `test_messages.py` compares."]
    for title, f in SITUATIONS.items():
        set_seed(0)  # fastai shuffles with Python's random numbers
        lines = said_by(f)
        assert lines, f'{title}: nothing is said'
        parts.append(f'## {title}\n\n' + '\n'.join(f'> {line}' for text in lines for line in text.splitlines()))
    parts += [f'## Status {s!r}\n\n> {words_for(s, True).note}' for s in STATUSES if s != 'ok']
    looks = dict.fromkeys(words_for(s, False, std) for s in STATUSES for std in (1., 1e-9, 1e9))
    told = {f'{meaning}.' for meaning in STATUSES.values()}
    parts += [f'## layer_stats: {w.word!r}\n\n> {w.note}' for w in looks if w.note and w.note not in told]
    return '\n\n'.join(parts) + '\n'


@pytest.mark.skipif(sys.version_info < (3, 11), reason='this Python has no notes')
def test_what_is_said_is_what_the_list_says():
    now,was = (t.split('\n## ') for t in (everything(), FILE.read_text()))
    assert [p.split('\n')[0] for p in now] == [p.split('\n')[0] for p in was]
    changed = [p for p, q in zip(now, was) if p != q]
    assert changed == [], f'if this is as it is to be, run python {Path(__file__).name}'


# What only several processes, a broken system or the code itself can bring about.
OUT_OF_REACH = {
    '__init__.py': ['has no attribute'],
    'ranks.py': ['another rank failed', 'LSUV needs every rank to run the same layers'],
    'orthogonal.py': ['are not a slice of', 'do not make'],
    'refs.py': ['channels; pass per_channel=False, or leave it out', 'is one number; pass per_channel=False'],
    'start.py': ['mirror the model before it is sharded'],
    'lsuv.py': ['a sharded model', 'before it is cut into stages'],
    'moments.py': ['is empty; pass mini-batches'],
    'recording.py': ['missed some layers in this step'],
    'shards.py': [''],  # all of them
}


def messages_of(source):
    "The longest fixed part of each message that the source raises or warns of."
    for node in ast.walk(ast.parse(source)):
        is_warning = isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'warn'
        if not is_warning and not isinstance(node, ast.Raise): continue
        parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if longest := max(parts, key=len, default=''): yield longest


def test_no_message_of_the_source_is_missing_from_the_list():
    shown = FILE.read_text()
    package = Path(fastai_lsuv.__file__).parent
    files = [f for f in package.rglob('*.py') if f.name != '__main__.py']
    missing = {}
    for f in files:
        known = OUT_OF_REACH.get(f.name, [])
        lost = [m for m in messages_of(f.read_text()) if m not in shown and not any(k in m or m in k for k in known)]
        if lost: missing[f.name] = lost
    assert missing == {}


if __name__ == '__main__':
    FILE.write_text(everything())
    print(f'{FILE}: {len(SITUATIONS)} situations')
