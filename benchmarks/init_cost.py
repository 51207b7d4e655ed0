"""The cost of initialization in forward passes of the same model and mini-batch: `lsuv_init`, its parts, and the peers.

Each contestant works on a fresh copy of the model. Forward passes are timed just before it and just after it. A ratio
is the time of the contestant over the mean time of these passes. The tables show the median of the ratios over the
rounds.

The correcting pass alone is one call of `fastai_lsuv.run.Passes`, with the hooks that it attaches and removes. It
does not include the other work of `lsuv_init`: finding the units, the copies for a rollback, the report and the
verifying pass.

Peak memory is the most memory held above the model and the mini-batch. On the CPU it is the sum of two peaks: that of
torch's allocator, counted from its own events, and that of Python and numpy. On a GPU it is `max_memory_allocated`.

On Linux, the process keeps the memory that it frees, but for pieces of more than 32 MB. Otherwise what ran before
decides whether memory has to be asked for anew: a forward pass of the 10-layer CNN then takes 150 ms or 300."""
import os

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler counts memory here; this keeps it silent

import copy
import csv
import gc
import inspect
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from torch import nn
from torch.profiler import ProfilerActivity, profile

from _common import COLORS, IMAGES, PACKAGES, RESULTS, installed, label, markdown, passes_begun, timed, where
from fastai_lsuv import lsuv_init
from fastai_lsuv.run import Kept, Options, Passes
from fastai_lsuv.units import Selection


# --- Models

def cnn(depth, width):
    "A plain CNN: 3x3 convolutions with ReLUs between them."
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 3, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def timm_model(name, **kwargs):
    import timm
    return timm.create_model(name, pretrained=False, **kwargs)


def vgg16():
    from torchvision.models import vgg16
    return vgg16()


class Attention(nn.Module):
    "Causal self-attention."
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv,self.out = nn.Linear(width, 3*width),nn.Linear(width, width)

    def forward(self, x):
        q,k,v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    "A block of GPT-2: attention and two linear layers, each after a layer norm and with a skip."
    def __init__(self, width, heads):
        super().__init__()
        self.norm1,self.attention = nn.LayerNorm(width),Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4*width), nn.GELU(), nn.Linear(4*width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    "The shape of GPT-2. The output layer shares its weight with the embedding of the tokens, as in GPT-2."
    def __init__(self, tokens=50257, length=1024, width=768, layers=12, heads=12):
        super().__init__()
        self.tokens,self.positions = nn.Embedding(tokens, width),nn.Embedding(length, width)
        self.register_buffer('places', torch.arange(length), persistent=False)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm,self.head = nn.LayerNorm(width),nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight
        for embedding in self.tokens, self.positions:
            nn.init.normal_(embedding.weight, std=0.02)  # as in GPT-2

    def forward(self, x):
        x = self.tokens(x) + self.positions(self.places[:x.shape[1]])
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class Setting:
    "The options that shape the models and the mini-batches."
    batch: int  # Images in a mini-batch
    size: int  # Height and width of the images
    width: int  # Channels of the plain CNNs

    def images(self):
        return torch.randn(self.batch, 3, self.size, self.size)


def text(setting):
    "A mini-batch of the language model: 4 texts of 128 tokens."
    return torch.randint(0, 50257, (4, 128))


@dataclass(frozen=True)
class Model:
    "A model of the benchmark."
    title: str
    make: Callable[[Setting], nn.Module]
    batch: Callable[[Setting], torch.Tensor] = Setting.images
    peers: bool = True  # Whether the peers are run on it, which make about two passes a layer


MODELS = {
    'cnn10': Model('10-layer CNN', lambda s: cnn(10, s.width)),
    'cnn30': Model('30-layer CNN', lambda s: cnn(30, s.width)),
    'cnn100': Model('100-layer CNN', lambda s: cnn(100, s.width), peers=False),  # they begin about 400 passes
    'resnet50': Model('ResNet-50', lambda s: timm_model('resnet50')),
    'vit_ti': Model('ViT-Ti/16', lambda s: timm_model('vit_tiny_patch16_224', img_size=s.size)),
    'vgg16': Model('VGG-16', lambda s: vgg16()),
    'lm125m': Model('language model, 125 M', lambda s: LanguageModel(), text, peers=False),
}


# --- Contestants

def one_pass(model, x):
    "Do the work of `lsuv_init` up to its first pass, and return a function that runs the pass."
    given = {name: p.default for name, p in inspect.signature(lsuv_init).parameters.items()}
    options = Options.of(given)

    def prepare(u): u.target = options.target(u)

    passes = Passes(model, Selection(model), prepare, Kept(model))
    model.train()
    return lambda: passes(x)


@dataclass(frozen=True)
class Contestant:
    "A way to initialize."
    title: str
    color: str
    prepare: Callable  # Takes a model and a mini-batch, and returns the function to time
    peer: str | None = None  # The package, if it is not this one

    def __str__(self):
        "The title, with the version of a peer."
        return self.title if self.peer is None else self.title.replace(self.peer, label(self.peer), 1)


def running(package, **kwargs):
    "Prepares a run of a package with these options."
    return lambda model, x: partial(PACKAGES[package], model, x, **kwargs)


CONTESTANTS = {
    'pass': Contestant('a correcting pass alone', '#8fc1e3', one_pass),
    'ours': Contestant('lsuv_init', COLORS['fastai_lsuv'], running('fastai_lsuv')),
    'ours_orthogonal': Contestant('orthogonal', '#4a90c2', running('fastai_lsuv', preinit='orthogonal')),
    'ours_mirrored': Contestant('mirrored', '#8ab6d6', running('fastai_lsuv', preinit='mirrored')),
    'lsuv': Contestant('lsuv', COLORS['lsuv'], running('lsuv'), peer='lsuv'),
    'lsuv_keep': Contestant('lsuv, do_orthonorm=False', '#e7b48a', running('lsuv', do_orthonorm=False), peer='lsuv'),
    'anyinit': Contestant('anyinit, empirical', COLORS['anyinit'], running('anyinit'), peer='anyinit'),
}
LIKE_FOR_LIKE = 'resnet50'  # Only this model times `lsuv` without its orthonormal start; more would take too long


# --- Measuring

KEEP_MEMORY = {'MALLOC_TRIM_THRESHOLD_': str(2**34), 'MALLOC_MMAP_THRESHOLD_': str(2**25)}


def keep_memory():
    "Begin anew as a process that keeps the memory that it frees: the C library reads the environment as it starts."
    if not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def peak_bytes(f, device):
    "The most memory held during `f()`, above the memory held before."
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        f()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    in_python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    events = (e for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    now = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events):
        now += size
        most = max(most, now)
    return most + in_python


class Bench:
    "Measures the contestants on one model and its mini-batch."
    def __init__(self, model, setting, device, clock):
        self.title,self.device,self.clock = model.title,device,clock
        torch.manual_seed(0)
        self.x = model.batch(setting).to(device)
        torch.manual_seed(0)
        self.model = model.make(setting).to(device).train()
        self.scratch = copy.deepcopy(self.model)  # forward passes in training mode change its buffers
        self.n_layers = len(Selection(self.model).layers)
        self.ratios,self.seconds,self.passes,self.failed = {},{},{},{}
        self.forwards,self.peaks = [],None
        for _ in range(2):
            self.forward()

    @torch.no_grad()
    def forward(self):
        self.scratch(self.x)

    def forward_seconds(self, n=3):
        took = [timed(self.forward, self.device, self.clock) for _ in range(n)]
        self.forwards += took
        return statistics.median(took)

    def measure(self, name):
        "Time one contestant once."
        model = copy.deepcopy(self.model)
        f = CONTESTANTS[name].prepare(model, self.x)
        before = self.forward_seconds()
        with passes_begun(model) as begun:
            took = timed(f, self.device, self.clock)
        forward = (before + self.forward_seconds())/2
        self.ratios.setdefault(name, []).append(took/forward)
        self.seconds.setdefault(name, []).append(took)
        self.passes[name] = begun[0]

    def warm_up(self):
        self.measure('ours')
        self.ratios.clear()
        self.seconds.clear()

    def measure_all(self, names, rounds, peer_rounds):
        "Time the contestants in turns. A peer that fails is left out."
        for k in range(max(rounds, peer_rounds)):
            for name in names:
                peer = CONTESTANTS[name].peer
                if name in self.failed or k >= (peer_rounds if peer else rounds): continue
                try:
                    self.measure(name)
                except Exception as e:
                    if not peer: raise
                    self.failed[name] = f'{type(e).__name__}: {e}'.splitlines()[0][:160]
                    print(f'{self.title}: {CONTESTANTS[name].title} fails. {self.failed[name]}', flush=True)

    def measure_memory(self):
        "The peaks of a forward pass and of `lsuv_init`, and the size of the units' weights and biases."
        weights = set(self.model.parameters())
        model = copy.deepcopy(self.model)
        self.peaks = dict(
            forward=peak_bytes(self.forward, self.device),
            weights=sum(p.numel()*p.element_size() for p in weights),
            ours=peak_bytes(partial(lsuv_init, model, self.x), self.device))

    def ratio(self, name):
        return statistics.median(self.ratios[name])


# --- Results

COLUMNS = ['model', 'layers', 'contestant', 'repeats', 'passes_begun', 'seconds', 'forward_seconds',
           'forwards', 'forwards_least', 'forwards_most']


def write_csv(benches, path):
    with open(path, 'w', newline='') as f:
        w = csv.writer(f, lineterminator='\n')
        w.writerow(COLUMNS)
        for b in benches:
            for name, ratios in b.ratios.items():
                seconds,forward = statistics.median(b.seconds[name]),statistics.median(b.forwards)
                w.writerow([b.title, b.n_layers, CONTESTANTS[name].title, len(ratios), b.passes[name],
                            f'{seconds:.4f}', f'{forward:.4f}',
                            f'{b.ratio(name):.3f}', f'{min(ratios):.3f}', f'{max(ratios):.3f}'])


def time_table(benches, names):
    "The time of each contestant in forward passes."
    def cell(b, name):
        if name in b.failed: return 'fails'
        if name not in b.ratios: return '-'
        return f'{b.ratio(name):.{0 if CONTESTANTS[name].peer else 2}f}'
    rows = [[b.title, b.n_layers, f'{1e3*statistics.median(b.forwards):.0f}', *(cell(b, n) for n in names)]
            for b in benches]
    return markdown(['', 'layers', 'a forward, ms', *(CONTESTANTS[n] for n in names)], rows)


def passes_table(benches, names):
    "The forward passes that each contestant begins."
    rows = [[b.title, *(b.passes.get(n, '-') for n in names)] for b in benches]
    return markdown(['', *(CONTESTANTS[n] for n in names)], rows)


def faster_table(benches, names):
    "How many times faster than the peers this package is."
    pairs = [('ours_orthogonal', 'lsuv'), ('ours', 'lsuv_keep'), ('ours', 'anyinit')]
    pairs = [(ours, peer) for ours, peer in pairs if ours in names and peer in names]
    if not pairs: return ''
    def cell(b, ours, peer):
        return f'{b.ratio(peer)/b.ratio(ours):.0f}x' if ours in b.ratios and peer in b.ratios else '-'
    columns = [f'{CONTESTANTS[ours]}, than {CONTESTANTS[peer]}' for ours, peer in pairs]
    return markdown(['', *columns], [[b.title, *(cell(b, *pair) for pair in pairs)] for b in benches])


def memory_table(benches):
    "The peaks of memory."
    def row(b):
        sizes = [b.peaks[k] for k in ('forward', 'weights', 'ours')]
        share = b.peaks['ours']/(b.peaks['forward'] + b.peaks['weights'])
        return [b.title, *(f'{n/2**20:.1f}' for n in sizes), f'{share:.2f}']
    columns = ['', 'a forward', "the units' weights", 'lsuv_init', 'over the sum of both']
    return markdown(columns, [row(b) for b in benches])


def tables(benches, names):
    "All tables in markdown, each under its title."
    titled = {
        '**Time, in forward passes of the same model and mini-batch**': time_table(benches, names),
        '**Forward passes begun** (anyinit breaks most of its passes off half-way)': passes_table(benches, names),
        '**Times faster**': faster_table(benches, names),
        '**Peak memory, MB, above the model and the mini-batch**': memory_table(benches),
    }
    return '\n'.join(f'{title}\n\n{table}' for title, table in titled.items() if table)


def picture(benches, names, path):
    "Horizontal bars, a group a model, on a log scale."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    names = [n for n in names if n != 'lsuv_keep']
    gap = len(names) + 0.8
    fig,ax = plt.subplots(figsize=(8.5, 1.1 + 0.19*gap*len(benches)), constrained_layout=True)
    for i, b in enumerate(benches):
        for j, name in enumerate(names):
            if name not in b.ratios: continue
            v,y = b.ratio(name),i*gap + j
            contestant = CONTESTANTS[name]
            ax.barh(y, v - 0.5, left=0.5, height=0.88, color=contestant.color, label=str(contestant))
            ax.text(v*1.04, y, f'{v:.1f}' if v < 10 else f'{v:.0f}', va='center', fontsize=8)
    middles = [i*gap + (len(names) - 1)/2 for i in range(len(benches))]
    titles = [b.title if '-layer' in b.title else f'{b.title}\n({b.n_layers} layers)' for b in benches]
    ax.set_yticks(middles, titles)
    ax.tick_params(axis='y', length=0)
    longest = max(b.ratio(name) for b in benches for name in b.ratios)
    ax.set(xscale='log', xlim=(0.5, 1.5*longest), ylim=(len(benches)*gap - 0.9, -0.9),
           xlabel='time to initialize, in forward passes of the same model and mini-batch (log scale)')
    ax.xaxis.set_major_formatter('{x:g}')
    ax.axvline(1, color='0.3', lw=0.8, ls=':')
    ax.spines[['top', 'right']].set_visible(False)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))  # one a contestant
    fig.legend(handles.values(), handles, loc='outside upper center', ncol=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def contestants_on(key, names):
    "Those among the contestants that are run on a model."
    of_peers = [n for n in names if CONTESTANTS[n].peer]
    left_out = of_peers if not MODELS[key].peers else ['lsuv_keep'] if key != LIKE_FOR_LIKE else []
    return [n for n in names if n not in left_out]


@call_parse
def main(
    models: str = ','.join(MODELS),  # Models to measure
    rounds: int = 7,  # Times that each contestant of this package is timed
    peer_rounds: int = 1,  # Times that each peer is timed; a peer makes about a hundred passes each time
    no_peers: bool = False,  # Leave the peers out
    batch: int = 32,  # Images in the mini-batch
    size: int = 64,  # Height and width of the images
    width: int = 32,  # Channels of the plain CNNs; with few channels, the work on activations weighs more
    threads: int = 0,  # CPU threads; 0: torch's default
    cpu_time: bool = False,  # Use the processor's clock; for a busy machine, with one thread
    device: str = 'cpu',  # 'cpu' or 'cuda'
    no_save: bool = False,  # Print, and write no files
):
    "The cost of `lsuv_init` in forward passes, beside the peers."
    if __name__ == '__main__': keep_memory()
    warnings.simplefilter('ignore')
    if threads:
        torch.set_num_threads(threads)
    dev = torch.device(device)
    setting = Setting(batch, size, width)
    clock = time.process_time if cpu_time else time.perf_counter
    peers = [] if no_peers else installed(['lsuv', 'anyinit'])
    names = [n for n, c in CONTESTANTS.items() if c.peer is None or c.peer in peers]
    benches = []
    for key in (k.strip() for k in models.split(',')):
        bench = Bench(MODELS[key], setting, dev, clock)
        bench.warm_up()
        bench.measure_all(contestants_on(key, names), rounds, peer_rounds)
        bench.measure_memory()
        benches.append(bench)
        ratios = ', '.join(f'{CONTESTANTS[n].title} {bench.ratio(n):.2f}' for n in bench.ratios)
        print(f'{bench.title}: {ratios}', flush=True)
        bench.model = bench.scratch = None  # makes room for the next model
    names = [n for n in names if any(n in b.ratios or n in b.failed for b in benches)]
    conditions = (f'Mini-batch of {batch} at {size}x{size} (language model: 4 texts of 128 tokens), '
                  f'plain CNNs of {width} channels, {where(dev)}; {rounds} rounds, {peer_rounds} for the peers'
                  f'{"; processor time" if cpu_time else ""}. Times vary with the machine and its load. '
                  'The ratios are what counts.')
    report = f'{conditions}\n\n{tables(benches, names)}'
    print('\n' + report)
    if no_save: return
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_csv(benches, RESULTS/'init_cost.csv')
    (RESULTS/'init_cost.md').write_text('<!-- written by benchmarks/init_cost.py -->\n' + report)
    picture(benches, names, IMAGES/'init_cost.png')
    print('Written: benchmarks/results/init_cost.csv, benchmarks/results/init_cost.md, nbs/images/init_cost.png')
