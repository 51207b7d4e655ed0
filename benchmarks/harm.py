"""What a bad mini-batch does to a network, and whether the report says so.

Each network of `tests/networks.py` that gives an output a sample is initialized from a mini-batch of each kind below.
Then its training loss is taken on real data, and compared with the loss before and with that of predicting zeros.

Real data are made up for each network, in the shape and scale of its own mini-batch. There are four classes. Numbers
are a smooth pattern of the class plus as much noise. Of token ids, half come from the class's quarter of the
vocabulary, and half from anywhere. The loss is the cross-entropy of a fixed random linear readout of the model's
first output. The model is in training mode, with dropout off. A readout of outputs with std 1 costs about a third
more than predicting zeros.

A case is a violation if the loss comes out twice as high as before and as that of predicting zeros, or non-finite, and
the report says nothing that it does not say of good data: no status other than "ok" and "no bias", no large gain, and
nothing unusual about the mini-batch. A layer is kept back in vain if the report calls it "alike" or "outlier", and the
same run without such doubts does no harm and brings it within a factor of 2 of std 1 on real data."""
import csv
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv import statuses
from fastai_lsuv.units import unit as units
from fastai_lsuv.measure.moments import first_tensor
from _common import RESULTS, call, first_line, forward, markdown, networks, on_device, where

CLASSES = 4
PAD = 1  # Token id that pads a text, as in fastai
FAR = 2.  # A loss so many times that of before is harm
DONE = 'ok', 'no bias'
DOUBTS = {d.value for d in statuses.DOUBTS}
COLUMNS = ['network', 'kind', 'outcome', 'before', 'after', 'zeros', 'ratio', 'right', 'said', 'violation', 'in_vain',
           'with_loss', 'passes', 'seconds', 'error']

# Big ones, whose like is in the table in a smaller size, and those that give no output a sample or need a first call.
LEFT_OUT = ('torchvision/resnet50', 'torchvision/densenet121', 'torchvision/inception_v3', 'torchvision/googlenet',
            'torchvision/vgg*', 'torchvision/deeplabv3', 'torchvision/efficientnet_b0', 'torchvision/mnasnet0_5',
            'torchvision/regnet_y_400mf', 'torchvision/mobilenet_v2', 'timm/xception41', 'timm/levit_128s',
            'timm/regnetz_b16', 'timm/tf_efficientnet_b0', 'timm/efficientnet_lite0', 'timm/repvgg_a0', 'timm/coat*',
            'timm/ghostnet_100', 'timm/cait*', 'timm/poolformer_s12', 'timm/convnextv2_atto', 'timm/resnet26',
            'fastai/unet', 'fastai/xresnext18', 'hand/unbatched', 'hand/lazy', 'hand/compiled', 'hand/plain_100_layers',
            'hand/conv1d_transposed_3d', 'hand/keywords_and_dicts')


# --- Data

@dataclass(frozen=True)
class Kind:
    "What is wrong with a mini-batch."
    floats: Callable | None = None  # Makes bad numbers of good ones, with a function that gives noise of their shape
    tokens: Callable | None = None  # Makes bad token ids of good ones, with a function that gives others
    classes: str = 'all'  # 'all', 'one', or 'sorted': a mini-batch a class
    dtype: torch.dtype | None = None  # Of the model and its numbers


def copies(x):
    return x[:1].expand_as(x).clone()


def near(eps):
    "Copies of one sample, and so much noise."
    return lambda x, noise: copies(x) + eps*x.std()*noise()


def near_tokens(share):
    "Copies of one sample, in which this share of the tokens is another."
    return lambda x, other: torch.where(torch.rand(x.shape) < share, other(), copies(x))


def one_outlier(x, noise):
    x = x.clone()
    x[0] *= 1e4
    return x


def heavy_tailed(x, noise):
    return x.mean() + x.std()*noise()/noise()


def constant_channel(x, noise):
    x = x.clone()
    if x.dim() > 1:
        x.select(1 if x.dim() == 4 else -1, 0).fill_(x.mean())
    return x


def mostly_padding(x, noise):
    "One sample is left."
    x = x.clone()
    x[1:] = 0
    return x


def mostly_padding_tokens(x, other):
    "The first tenth of each text is left."
    x = x.clone()
    if x.dim() > 1:
        x[:, 1 + x.shape[1]//10:] = PAD
    return x


def bytes_(x, noise):
    "Whole numbers from 0 to 255, as an image has before it is normalized."
    return (128 + 50*(x - x.mean())/x.std()).round().clamp(0, 255)


KINDS = {
    'good': Kind(),
    'alike': Kind(near(0.), near_tokens(0.)),
    'alike but for 1e-4': Kind(near(1e-4)),
    'alike but for 1e-3': Kind(near(1e-3)),
    'alike but for 1 %': Kind(near(1e-2), near_tokens(1e-2)),
    'similar (10 %)': Kind(near(0.1), near_tokens(0.1)),
    'one outlier (1e4)': Kind(one_outlier),
    'heavy-tailed': Kind(heavy_tailed),
    'constant channel': Kind(constant_channel),
    'sorted by class': Kind(classes='sorted'),
    'single class': Kind(classes='one'),
    'padding': Kind(lambda x, noise: torch.zeros_like(x), lambda x, other: torch.full_like(x, PAD)),
    'one sample': Kind(lambda x, noise: x[:1], lambda x, other: x[:1]),
    'mostly padding': Kind(mostly_padding, mostly_padding_tokens),
    'tiny (1e-4)': Kind(lambda x, noise: 1e-4*x),
    'huge (1e4)': Kind(lambda x, noise: 1e4*x),
    'integer-valued': Kind(bytes_),
    'float16': Kind(dtype=torch.float16),
    'bfloat16': Kind(dtype=torch.bfloat16),
}


class Data:
    "Real data like a network's own mini-batch."
    def __init__(self, like):
        self.like,self.spec = tree_flatten(like)
        self.n = len(self.like[0])
        self.patterns = [self.pattern(x) for x in self.like]

    def pattern(self, x):
        "A pattern a class: smooth numbers with std 1, or tokens of the class's own."
        shape = (CLASSES, *x.shape[1:])
        if not x.is_floating_point():
            def quarter(labels):
                of = labels.view(-1, *[1]*(x.dim() - 1))
                return self.ids(x, (of + torch.rand(len(labels), *x.shape[1:]))/CLASSES)
            return quarter
        p = torch.randn(shape)
        if x.dim() == 4:
            p = F.interpolate(p[..., :4, :4], shape[2:], mode='bilinear')
        p = (p - p.mean())/p.std()
        return lambda labels: p[labels]

    def draw(self, labels):
        "A good mini-batch: its tensors."
        def leaf(x, pattern):
            if x.is_floating_point():
                return x.float().mean() + x.float().std()*0.5**0.5*(pattern(labels) + torch.randn(x.shape))
            return torch.where(torch.rand(x.shape) < 0.5, pattern(labels), self.other(x)())
        return [leaf(x, p) for x, p in zip(self.like, self.patterns)]

    def other(self, x):
        "Gives noise, or random tokens, of the shape of `x`."
        if x.is_floating_point(): return lambda: torch.randn(x.shape)
        return lambda: self.ids(x, torch.rand(x.shape))

    def ids(self, x, share):
        "Token ids from numbers of 0 to 1: this share of those between the lowest and the highest of each column."
        low,high = x.amin(0),x.amax(0)
        return low + (share*(high - low + 1)).long()

    def whole(self, leaves, dtype=None):
        "Tensors as the model takes them."
        leaves = [x.to(dtype or like.dtype) if x.is_floating_point() else x for x, like in zip(leaves, self.like)]
        return tree_unflatten(leaves, self.spec)

    def labels(self):
        return torch.randint(CLASSES, (self.n,))

    def bad(self, kind):
        "What `lsuv_init` gets. `None` if a mini-batch of the network's cannot be of this kind."
        if kind.classes == 'sorted':
            return [self.whole(self.draw(torch.full((self.n,), c))) for c in range(CLASSES)]
        leaves = self.draw(torch.zeros(self.n, dtype=torch.long) if kind.classes == 'one' else self.labels())
        if kind.floats or kind.tokens:
            spoil = [kind.floats if x.is_floating_point() else kind.tokens for x in leaves]
            if not any(spoil): return None
            leaves = [f(x, self.other(like)) if f else x for f, x, like in zip(spoil, leaves, self.like)]
        return self.whole(leaves, kind.dtype)


# --- Judging

def loss(model, batch, labels):
    "The training loss, and that of predicting zeros. Raises `ValueError` if there is no output a sample."
    if hasattr(model, 'reset'):
        model.reset()
    torch.manual_seed(0)
    return readout_loss(forward(model, batch), labels), math.log(CLASSES)


def readout_loss(out, labels):
    "The cross-entropy of a fixed random readout of a model's output."
    out = first_tensor(out)
    if len(out) != len(labels):
        raise ValueError(f'an output of shape {tuple(out.shape)} for {len(labels)} samples')
    out = out.float().flatten(1)
    readout = torch.randn(out.shape[1], CLASSES, generator=torch.Generator().manual_seed(0)).to(out.device)
    return F.cross_entropy(out @ readout/out.shape[1]**0.5, labels).item()


@contextmanager
def without_doubts():
    "Correct every layer, whatever its statistics rest on."
    was = units.doubt
    units.doubt = lambda *args: ''
    try:
        yield
    finally:
        units.doubt = was


def said(report):
    "What the report says: statuses, large gains to a power of ten, and what is unusual about the mini-batch."
    gains = [f'{r.name or "model"} by 1e{round(math.log10(r.gain)):+d}' for r in report.large_gains]
    statuses = [f'{r.name or "model"}: {r.status}' for r in report if r.status not in DONE]
    return statuses + gains + [f'mini-batch: {report.unusual}']*bool(report.unusual)


class Subject:
    "A network, its weights as they were, and its real data."
    def __init__(self, network, dtype, seed, device):
        self.model,like = network()
        torch.manual_seed(seed)
        self.data = Data(like)
        self.labels = self.data.labels()
        self.real = on_device(self.data.whole(self.data.draw(self.labels), dtype), device)
        self.labels = self.labels.to(device)
        self.model = self.model.to(device, dtype)
        self.was = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.before,self.zeros = self.loss()
        self.usual = []  # What the report says of it if all is well
        self.judged = []  # The layers that are initialized if all is well

    def loss(self):
        return loss(self.model, self.real, self.labels)

    def initialize(self, batches, seed):
        "The report, the loss and the stds of the layers on real data, after an initialization from the start."
        self.model.load_state_dict(self.was)
        torch.manual_seed(seed)
        report = lsuv_init(self.model, batches)
        after,_ = self.loss()
        return report, after, {r.name: r.std for r in layer_stats(self.model, self.real)}

    def said_with_loss(self, batches, seed):
        "What the report says of the loss, in an initialization that is given the loss on real data."
        self.model.load_state_dict(self.was)
        torch.manual_seed(seed)
        report = lsuv_init(self.model, batches, loss=lambda model: readout_loss(call(model, self.real), self.labels))
        return report.undone or f"{number(report.loss[0])} before, {number(report.loss[1])} after, {report.loss_note}"

    def ratio(self, after):
        "The loss beside that of before, or of predicting zeros if that is worse; infinite if it is no number."
        known = [v for v in (self.before, self.zeros) if math.isfinite(v)]
        return after/max(known) if math.isfinite(after) else math.inf

    def right(self, stds, name):
        "Whether a layer's std is within a factor of 2 of 1."
        return 0.5 <= stds.get(name, math.nan) <= 2


def judge(subject, name, kind, seed, device):
    "A network and a kind, as a row. `None` if they do not go together."
    torch.manual_seed(seed + 1)
    batches = subject.data.bad(kind)
    if batches is None: return None
    batches = [on_device(b, device) for b in batches] if isinstance(batches, list) else on_device(batches, device)
    row = dict.fromkeys(COLUMNS, '') | dict(kind=name, outcome='ended', before=subject.before, zeros=subject.zeros)
    start = time.perf_counter()
    try:
        report,after,stds = subject.initialize(batches, seed)
    except Exception as e:
        return row | dict(outcome='raised', error=first_line(e), violation=0)
    row['seconds'] = time.perf_counter() - start
    if name == 'good':
        subject.usual = said(report)
        subject.judged = [r.name for r in report if r.status in (*DONE, *DOUBTS)]
    new = [s for s in said(report) if s not in subject.usual]
    ratio = subject.ratio(after)
    doubted = [r.name for r in report if r.status in DOUBTS]
    right = sum(subject.right(stds, n) for n in subject.judged)/max(1, len(subject.judged))
    row.update(after=after, ratio=ratio, right=right, said='; '.join(new), passes=report.n_passes,
               violation=int(not ratio <= FAR and not new), in_vain='; '.join(in_vain(subject, batches, doubted, seed)))
    if row['violation']:
        row['with_loss'] = subject.said_with_loss(batches, seed)
    return row


def in_vain(subject, batches, doubted, seed):
    "Those of the doubted layers that come out right without doubts, if that does no harm."
    if not doubted: return []
    try:
        with without_doubts():
            _,after,stds = subject.initialize(batches, seed)
    except Exception:
        return []
    return [n for n in doubted if subject.ratio(after) <= FAR and subject.right(stds, n)]


def judge_all(network, kinds, seed, device):
    "A row a kind. A network that gives no loss in some dtype has none of that kind."
    rows,subjects = [],{}
    for name in dict.fromkeys(['good', *kinds]):  # the good one tells what is usual
        dtype = KINDS[name].dtype
        try:
            if dtype not in subjects:
                subjects[dtype] = Subject(network, dtype, seed, device)
                subjects[dtype].usual,subjects[dtype].judged = subjects[None].usual,subjects[None].judged
        except Exception as e:
            print(f'{network.name}: no loss{f" in {name}" if dtype else ""}. {first_line(e)}')
            if dtype is None: return []
            continue
        row = judge(subjects[dtype], name, KINDS[name], seed, device)
        if row is not None:
            rows.append(row | dict(network=network.name))
    return rows


# --- Results

def number(v):
    return f'{v:.2f}' if v < 100 else f'{v:.1e}'


def summary(rows):
    "A row a kind."
    def row(kind):
        of = [r for r in rows if r['kind'] == kind]
        ended = [r for r in of if r['outcome'] == 'ended']
        ratios = [r['ratio'] for r in ended] or [math.nan]
        silent = [r['ratio'] for r in ended if not r['said']] or [math.nan]
        right = statistics.mean(r['right'] for r in ended) if ended else math.nan
        in_vain = [len(r['in_vain'].split('; ')) for r in ended if r['in_vain']]
        return [f'**{kind}**', len(of), len(of) - len(ended), number(max(ratios)), number(statistics.median(ratios)),
                number(max(silent)), f'{100*right:.0f} %', sum(bool(r['said']) for r in ended),
                f'{sum(in_vain)} in {len(in_vain)}' if in_vain else '-', sum(r['violation'] for r in of) or '-']
    columns = ['mini-batch', 'networks', 'refused', 'worst loss', 'median', 'worst, nothing said', 'layers right',
               'named', 'layers kept back in vain', 'violations']
    return markdown(columns, [row(k) for k in dict.fromkeys(r['kind'] for r in rows)])


def violations(rows):
    "A row a violation, the worst first."
    bad = sorted((r for r in rows if r['violation']), key=lambda r: -r['ratio'])
    if not bad: return 'None.\n'
    return markdown(['network', 'mini-batch', 'loss before', 'loss after', 'ratio', 'layers right', 'said with `loss`'],
                    [[r['network'], r['kind'], number(r['before']), number(r['after']), number(r['ratio']),
                      f"{100*r['right']:.0f} %", r['with_loss']] for r in bad])


def write_csv(rows, path):
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        w.writeheader()
        w.writerows({k: f'{v:.4g}' if isinstance(v, float) else v for k, v in r.items()} for r in rows)


INTRODUCTION = (
    '{networks} networks, {where}. Each is initialized from a mini-batch of each kind, without `loss`. Its training '
    'loss on real data follows, as a multiple of the loss before, or of that of predicting zeros if that is higher. '
    'A layer is right if its std on real data is within a factor of 2 of 1. A network is named if its report says '
    'something that it does not say of the good mini-batch. A layer is kept back in vain if its status is "alike" '
    'or "outlier", and it comes out right, without harm, if it is corrected all the same. A violation is a loss '
    'above {far:g} times that of before, or a non-finite one, with nothing said. Each is run again with the loss on '
    'real data as `loss`; the last column holds what the report says then.')


@call_parse
def main(
    only: str = '*',  # Networks, as globs separated by commas; '*' leaves the biggest out
    kinds: str = '*',  # Kinds of mini-batch, as globs separated by commas; 'good' is always among them
    threads: int = 1,  # CPU threads; 0: torch's default
    device: str = 'cpu',  # 'cpu' or 'cuda'
    seed: int = 0,  # Of the data and the orthonormal weights
    no_save: bool = False,  # Print, and write no files
):
    "The harm that a bad mini-batch does, and whether it is said."
    warnings.simplefilter('ignore')
    if threads:
        torch.set_num_threads(threads)
    dev = torch.device(device)
    globs = [g.strip() for g in kinds.split(',')]
    chosen = [k for k in KINDS if any(fnmatch(k, g) for g in globs)]
    rows = []
    for network in networks().values():
        if not any(fnmatch(network.name, g.strip()) for g in only.split(',')): continue
        if only == '*' and any(fnmatch(network.name, g) for g in LEFT_OUT): continue
        start = time.perf_counter()
        new = judge_all(network, chosen, seed, dev)
        rows += new
        worst = max(new, key=lambda r: r['ratio'] or 0, default=None)
        if worst is None: continue
        print(f"{network.name:<36} {len(new):>3} kinds {time.perf_counter() - start:>6.1f} s, "
              f"{sum(r['violation'] for r in new)} violations, worst {number(worst['ratio'])} ({worst['kind']})",
              flush=True)
    introduction = INTRODUCTION.format(networks=len({r['network'] for r in rows}), where=where(dev), far=FAR)
    text = f'{introduction}\n\n{summary(rows)}\n**Violations**\n\n{violations(rows)}'
    print('\n' + text)
    if no_save: return
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_csv(rows, RESULTS/'harm.csv')
    (RESULTS/'harm.md').write_text('<!-- written by benchmarks/harm.py -->\n' + text)
    print('Written: benchmarks/results/harm.csv, benchmarks/results/harm.md')
