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
from learners import classifier, quiet
from networks import Mod
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastai_lsuv
from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, LSUVReport, layer_stats, lsuv_init
from fastai_lsuv.report.report import Row
from fastai_lsuv.statuses import OUTSIDE, STATUSES, words_for

FILE = Path(__file__).parent/'messages.md'
SITUATIONS = {}
OURS = 'LSUV', 'batches:', 'target_mean:', 'ActivationStats'  # Words of our warnings, and of no others


def enter(table):
    "Enters situations: by title, a function that returns what is said, or says it."
    for title, f in table.items():
        assert title not in SITUATIONS, title
        SITUATIONS[title] = f


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


def refused(title, model=net, batches=x, **kwargs):
    "`lsuv_init` gets a bad argument."
    enter({title: lambda: lsuv_init(model(), batches, **kwargs)})


# ---- Arguments

def weight_normed(): return nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 4), dim=None))
def nested(): return nn.Sequential(net(), nn.ReLU())
def scripted(): return nn.Sequential(torch.jit.trace(nn.Linear(8, 4), x))


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
refused('per_channel, of a weight with one number', weight_normed, per_channel=True)
refused('loss is a number', loss=3)
refused('modules matches nothing', modules='head')
refused('modules is a layer of another model', modules=nn.Linear(2, 2))
refused('modules=[]', modules=[])
refused('modules=3', modules=3)
refused('modules is an activation', modules='1')
refused('modules names a container and the layer inside it', nested, modules=['0', '0.0'])
refused('the model is a function', lambda: F.relu)
refused('the model has no layer', lambda: nn.Sequential(nn.ReLU()))
refused('the model is on the meta device', lambda: net().to('meta'))
refused('the model has complex weights', lambda: net().to(torch.complex64))
refused('the model is compiled by torch.jit', scripted)
refused('the batch is a number', batches=3)
refused('the batch is a DataLoaders', batches=DataLoaders.from_dsets(*[list(zip(x, y))]*2, bs=16))
refused('the batches are empty', batches=[])
refused('a mini-batch is text', batches=['text'])
refused('a mini-batch holds NaNs', batches=x*float('nan'))
refused('a mini-batch holds its target', batches=(x, y))
refused('a mini-batch holds its target, and n_inp is too many', batches=(x, y), n_inp=2)
refused('a mini-batch names its inputs otherwise', batches={'x': x, 'y': y})
refused('a mini-batch is of numpy', batches=[x.numpy()])
refused('a mini-batch with its target, as a list', batches=[x, y])
refused('two tensors as a list', batches=[x, x + 1])
refused('a mini-batch without samples', batches=x[:0])
refused('n_inp=0', n_inp=0)
refused('get_input=3', get_input=3)


class Fourier(nn.Sequential):
    def forward(self, x): return torch.fft.fft(super().forward(x))


class Scales(Mod):
    "Its forward uses its weight in no linear operation."


def makes_a_layer(self, x):
    if self.last is None: self.last = nn.Linear(8, 4)
    return self.last(self.first(x))


def checkpointed(model): return checkpoint(model[2], model[0](x), use_reentrant=True).mean()


scales = Scales(lambda self, x: x*self.table[0], table=nn.Parameter(torch.ones(2, 8)))
enter({
    'an activation is complex': lambda: lsuv_init(nn.Sequential(Fourier(nn.Linear(8, 8))), x, modules='0'),
    'a model makes a layer as it runs': lambda: lsuv_init(Mod(makes_a_layer, first=nn.Linear(8, 8), last=None), x),
    'layer_stats with a loss and reentrant checkpoints': lambda: layer_stats(net(), x, loss=checkpointed),
    'a model applies its weights in no linear operation': lambda: lsuv_init(scales, x),
    'layer_stats with a loss that is no tensor': lambda: layer_stats(net(), x, loss=lambda model: 3.),
    'layer_stats with a loss that does not depend on the model':
        lambda: layer_stats(net(), x, loss=lambda model: torch.ones(1)),
    # Errors of the model (test_blame.py has more)
    'a double model, a float mini-batch': lambda: layer_stats(net().double(), x),
    'a mini-batch of other features': lambda: lsuv_init(net(), x[:, :3]),
})


# ---- What LSUV says of its run

def reported(*statuses, mean=0., **kwargs):
    "The report of a run with these statuses."
    ranges = dict(mean_range=(-0.4, 0.4), std_range=(0.9, 1.1))
    rows = [Row(f'blocks.{k}', 'Linear', (64, 8), mean, 1., None, None, 1, s, **ranges) for k, s in enumerate(statuses)]
    return LSUVReport(rows, 'std mean', 4, **kwargs)


def last_line(report): return str(report).splitlines()[-1]


def no_loss(model): raise ValueError('3 classes')
def square(model): return 1e-3 + (model(x)**2).mean()
def fourth_power(model): return 1 + (model(x)**4).mean()


def frozen():
    model = net()
    model[0].requires_grad_(False)
    return model


def write_and_seal(self, x):
    if self.seen.flags.writeable: self.seen += 1
    self.seen.flags.writeable = False
    return self.lin(x)


ADDED = {'tok.weight': 'embedding'}
EACH_REASON = {f'{why.replace(" ", "_")}.weight': why for why in OUTSIDE}
enter({
    'lsuv_init: the summary': lambda: lsuv_init(net(), x).summary,
    'lsuv_init: the summary with a loss': lambda: reported(*['ok']*23, loss=(1.4616, 1.3193)).summary,
    'lsuv_init: the summary where a layer is frozen, and weights are outside':
        lambda: reported('ok', 'no bias', 'ok', 'frozen', outside=ADDED, coverage=0.989).summary,
    'the report of weights outside': lambda: last_line(reported('ok', outside=EACH_REASON, coverage=0.7)),
    'the report of a mean that is off by more than batch_tol': lambda: last_line(reported('ok', mean=0.2)),
    'lsuv_init: the summary with a loss that cannot be taken': lambda: lsuv_init(net(), x, loss=no_loss).summary,
    'lsuv_init: the summary where a prediction of zeros is better':
        lambda: lsuv_init(net(), x, loss=square, force=True).summary,
    'layer_stats: the summary': lambda: layer_stats(net(), x).summary,
    'a report is asked for a layer that it does not have': lambda: lsuv_init(net(), x)['head'],
    'a layer is frozen': lambda: lsuv_init(frozen(), x),
    'layers with every status': lambda: reported(*STATUSES).warning,
    'the mini-batch is not normalized': lambda: lsuv_init(net(), 1e-3*x),
    'the mini-batch is one sample': lambda: reported('ok', unusual='it holds 1 sample and its std is 1e-06').warning,
    'the loss comes out far worse': lambda: lsuv_init(net(), x, loss=fourth_power, target_std=100.),
    'something cannot be put back':
        lambda: lsuv_init(Mod(write_and_seal, lin=nn.Linear(8, 4), seen=np.zeros(2)), x),
})


# ---- In a Learner

class Items(list):
    "Items that a Learner can be exported without."
    def new_empty(self): return Items()


class Cancels(Callback):
    def before_batch(self): raise CancelBatchException()


def learner(*cbs, model=None):
    items = Items(zip(x, y))
    dls = DataLoaders.from_dsets(items, items, bs=16, device='cpu')
    return quiet(Learner(dls, model or net(), CrossEntropyLossFlat(), cbs=list(cbs), path=Path(tempfile.mkdtemp())))


def fit(learn, epochs=1, lr=0., **kwargs):
    "The lines that a fit logs."
    learn.lines.clear()
    learn.fit(epochs, lr, **kwargs)
    return [re.sub(r'\d\.\d\d', '0.12', line) for line in learn.lines if isinstance(line, str)]


def fit_after(f):
    "What a fit logs after `f(learn)`."
    learn = learner(LSUVCallback())
    f(learn)
    return fit(learn)


def reload(learn):
    learn.save('model')
    learn.load('model', with_opt=False)


def with_a_norm_layer():
    model = net(nn.BatchNorm1d(4))
    nn.init.normal_(model[3].weight)
    nn.init.normal_(model[3].bias)
    return model


def trained_without_lsuv():
    learn = learner()
    fit(learn, 1, 0.1)
    learn.add_cb(LSUVCallback())
    return learn


def from_a_file():
    learn = learner(LSUVCallback())
    learn.export('learner.pkl')
    new = quiet(load_learner(learn.path/'learner.pkl'))
    new.dls = learn.dls
    return new


enter({
    'learn.lsuv.report before a fit': lambda: repr(learner(LSUVCallback()).lsuv.report),
    'learn.lsuv.report.plot() before a fit': lambda: learner(LSUVCallback()).lsuv.report.plot(),
    'a fit': lambda: fit(learner(LSUVCallback())),
    'a fit after lr_find': lambda: fit_after(lambda learn: learn.lr_find(show_plot=False, num_it=20, stop_div=False)),
    'a second fit': lambda: fit_after(fit),
    'a fit after learn.load': lambda: fit_after(reload),
    'a fit of a model that was trained without LSUV': lambda: fit(trained_without_lsuv()),
    'a fit of a model whose norm layer has learned': lambda: fit(learner(LSUVCallback(), model=with_a_norm_layer())),
    'a fit from a later epoch': lambda: fit(learner(LSUVCallback()), 3, cbs=SkipToEpoch(2)),
    'a fit of a Learner from a file': lambda: fit(from_a_file()),
    'a fit whose mini-batches are all cancelled': lambda: fit(learner(LSUVCallback(), Cancels())),
    'learn.lsuv_init() where mini-batches are all cancelled':
        lambda: learner(LSUVCallback(), Cancels()).lsuv_init(),
    'a fit with small mini-batches of several shapes': lambda: fit(classifier(LSUVCallback(), clas_bs=3))[:1],
    'a second LSUVCallback': lambda: learner(LSUVCallback(), LSUVCallback()),
    'min_samples=0': lambda: LSUVCallback(min_samples=0),
})


# ---- The recorder

def recorded(**kwargs):
    recorder = ActivationStatsRecorder(**kwargs)
    fit(learner(recorder))
    return recorder


def without_pyarrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'pyarrow', None)
        ActivationStatsRecorder(fname='stats.parquet')


def append_to_other_layers():
    learn = learner(ActivationStatsRecorder(append=True))
    fit(learn)
    learn.model = nn.Sequential(nn.Linear(8, 4))
    fit(learn)


enter({
    'every=0': lambda: ActivationStatsRecorder(every=0),
    'max_steps=1': lambda: ActivationStatsRecorder(max_steps=1),
    'sample=0': lambda: ActivationStatsRecorder(sample=0),
    "near_zero='small'": lambda: ActivationStatsRecorder(near_zero='small'),
    "hist='yes'": lambda: ActivationStatsRecorder(hist='yes'),
    'the recorder is given with_hist': lambda: ActivationStatsRecorder(with_hist=True),
    'LSUVCallback is given max_attempts': lambda: LSUVCallback(max_attempts=3),
    'hist=(0, 1, 2)': lambda: ActivationStatsRecorder(hist=(0, 1, 2)),
    'a plot before a fit': lambda: ActivationStatsRecorder().plot_stats(),
    'a plot of a validation that was not recorded': lambda: recorded().plot_stats(phase='valid'),
    'phase is unknown': lambda: recorded().plot_stats(phase='test'),
    'histograms that were not recorded': lambda: recorded().hist(0),
    'a layer that was not recorded': lambda: recorded().layer_stats('head'),
    'gradients that were not recorded': lambda: recorded().plot_stats('grad_std'),
    'too few axes': lambda: recorded().plot_layer_stats(0, ax=[None]),
    'diagnose: nothing': lambda: repr(recorded().diagnose()),
    'diagnose: vanishing': lambda: repr(recorded().diagnose(vanish=10.)),
    'a .parquet file without pyarrow': without_pyarrow,
    'append, with other layers': append_to_other_layers,
})


# ---- The list, and the tests

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
OUT_OF_REACH = [
    'has no attribute', 'another rank failed', 'LSUV needs every rank to run the same layers', 'are not a slice of',
    'do not make', 'channels; pass per_channel=False, or leave it out', 'is one number; pass per_channel=False',
    'mirror the model before it is sharded', 'a sharded model', 'before it is cut into stages',
    'is empty; pass mini-batches', 'missed some layers in this step',
]


def messages_of(source):
    "The longest fixed part of each message that the source raises or warns of."
    for node in ast.walk(ast.parse(source)):
        is_warning = isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'warn'
        if not is_warning and not isinstance(node, ast.Raise): continue
        parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if longest := max(parts, key=len, default=''): yield longest


def test_no_message_of_the_source_is_missing_from_the_list():
    shown,found = FILE.read_text(),0
    for f in Path(fastai_lsuv.__file__).parent.rglob('*.py'):
        if f.name in ('__main__.py', 'shards.py'): continue
        for m in messages_of(f.read_text()):
            found += 1
            assert m in shown or any(k in m or m in k for k in OUT_OF_REACH), f'{f}: {m}'
    assert found > 50


if __name__ == '__main__':
    FILE.write_text(everything())
    print(f'{FILE}: {len(SITUATIONS)} situations')
