"""What initialization costs, in forward passes of the same model and mini-batch: `lsuv_init`, its parts, and the peers.

Each contestant works on a fresh copy of the model, with forward passes timed just before and just after it; a ratio is its
time over the mean of theirs, and the figure shown is the median of the ratios over the rounds. The correcting pass alone is
one call of `fastai_lsuv.passes.Passes`, with the hooks that it attaches and removes; what `lsuv_init` does around it (finding
the units, copies to roll back to, the report) and the verifying pass are left out.

Peak memory is what is held at most above the model and the mini-batch themselves: on the CPU what torch's allocator holds,
counted from its own events, and what Python and numpy hold, the two peaks added up; on a GPU `max_memory_allocated`."""
import os
os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler, which counts memory here, is talkative

import copy, csv, gc, statistics, time, tracemalloc, warnings
from functools import partial

import torch
from fastcore.script import call_parse
from torch import nn
from torch.profiler import ProfilerActivity, profile

from _common import COLORS, IMAGES, PACKAGES, RESULTS, installed, label, markdown, passes_begun, timed, where
from fastai_lsuv import lsuv_init
from fastai_lsuv.loops import parse_order
from fastai_lsuv.passes import Goal, Passes
from fastai_lsuv.state import train_without_dropout
from fastai_lsuv.units import find_units


def cnn(depth, width):
    "A plain CNN: convolutions 3x3 with ReLUs between."
    layers = []
    for i in range(depth): layers += [nn.Conv2d(width if i else 3, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

def timm_model(name, **kwargs):
    import timm
    return timm.create_model(name, pretrained=False, **kwargs)

MODELS = {
    'cnn10': ('10-layer CNN', partial(cnn, 10)),
    'cnn30': ('30-layer CNN', partial(cnn, 30)),
    'cnn100': ('100-layer CNN', partial(cnn, 100)),
    'resnet50': ('ResNet-50', partial(timm_model, 'resnet50')),
    'vit_ti': ('ViT-Ti/16', partial(timm_model, 'vit_tiny_patch16_224')),  # for the size of the images: see `main`
}


def one_pass(model, x):
    "What `lsuv_init` has in hand when it starts its first pass, as a function that runs it."
    units = find_units(model)
    passes = Passes(model, units, Goal(parse_order('std mean'), 0., {u: 1. for u in units}, 1e-3, 0.1, False))
    train_without_dropout(model)
    return lambda: passes(x)

CONTESTANTS = {  # name -> (label, colour, a function of model and mini-batch that makes what is timed)
    'pass': ('a correcting pass alone', '#8fc1e3', one_pass),
    'ours_keep': ('lsuv_init, preinit=None', '#4a90c2', lambda m, x: partial(lsuv_init, m, x, preinit=None)),
    'ours': ('lsuv_init', COLORS['fastai_lsuv'], lambda m, x: partial(lsuv_init, m, x)),
    'lsuv': ('lsuv', COLORS['lsuv'], lambda m, x: partial(PACKAGES['lsuv'], m, x)),
    'lsuv_keep': ('lsuv, do_orthonorm=False', '#e7b48a', lambda m, x: partial(PACKAGES['lsuv'], m, x, do_orthonorm=False)),
    'anyinit': ('anyinit, empirical', COLORS['anyinit'], lambda m, x: partial(PACKAGES['anyinit'], m, x)),
}
PEERS = {'lsuv': 'lsuv', 'lsuv_keep': 'lsuv', 'anyinit': 'anyinit'}  # contestant -> package
LIKE_FOR_LIKE = 'resnet50'  # where `lsuv` is timed without its orthonormal start, too; one such network is time enough


def peak_bytes(f, device):
    "Most memory that is held during `f()`, above what was held before."
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    in_python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [n for _, n in sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]')]
    now = most = 0
    for n in sizes:
        now += n
        most = max(most, now)
    return most + in_python


class Bench:
    "One model and its mini-batch."
    def __init__(self, make, x, clock):
        torch.manual_seed(0)
        self.x,self.device,self.clock = x,x.device,clock
        self.model = make().to(self.device).train()
        self.scratch = copy.deepcopy(self.model)  # forward passes in training mode move its buffers
        self.units = find_units(self.model)
        self.ratios,self.seconds,self.passes,self.forwards = {},{},{},[]
        for _ in range(2): self.forward()

    @torch.no_grad()
    def forward(self): self.scratch(self.x)

    def forward_seconds(self, n=3):
        took = [timed(self.forward, self.device, self.clock) for _ in range(n)]
        self.forwards += took
        return statistics.median(took)

    def measure(self, name):
        model = copy.deepcopy(self.model)
        f = CONTESTANTS[name][2](model, self.x)
        before = self.forward_seconds()
        with passes_begun(model) as n: took = timed(f, self.device, self.clock)
        forward = (before + self.forward_seconds())/2
        self.ratios.setdefault(name, []).append(took/forward)
        self.seconds.setdefault(name, []).append(took)
        self.passes[name] = n[0]

    def memory(self):
        "Peaks of a forward pass and of `lsuv_init`, and the size of the units' weights and biases."
        weights = {p for u in self.units for p in u.layer.parameters()}
        return dict(forward=peak_bytes(self.forward, self.device), weights=sum(p.numel()*p.element_size() for p in weights),
                    ours=peak_bytes(partial(lsuv_init, copy.deepcopy(self.model), self.x), self.device))


def called(name):
    "A contestant's label, with the version of a peer."
    title,peer = CONTESTANTS[name][0],PEERS.get(name)
    return title if peer is None else title.replace(peer, label(peer), 1)


def write_csv(benches, path):
    with open(path, 'w', newline='') as f:
        w = csv.writer(f, lineterminator='\n')
        w.writerow(['model', 'layers', 'contestant', 'repeats', 'passes_begun', 'seconds', 'forward_seconds', 'forwards', 'forwards_least', 'forwards_most'])
        for b in benches:
            for k, r in b.ratios.items():
                w.writerow([b.label, len(b.units), CONTESTANTS[k][0], len(r), b.passes[k], f'{statistics.median(b.seconds[k]):.4f}',
                            f'{statistics.median(b.forwards):.4f}', f'{statistics.median(r):.3f}', f'{min(r):.3f}', f'{max(r):.3f}'])


def tables(benches, names):
    "The tables in markdown."
    ratio = lambda b, k: f'{statistics.median(b.ratios[k]):.{2 if k not in PEERS else 0}f}' if k in b.ratios else '-'
    out = ['**Time, in forward passes of the same model and mini-batch**\n',
           markdown(['', 'layers', 'a forward, ms', *map(called, names)],
                    [[b.label, len(b.units), f'{1e3*statistics.median(b.forwards):.0f}', *(ratio(b, k) for k in names)] for b in benches])]
    out += ['**Forward passes begun** (anyinit breaks most of its own off half-way)\n',
            markdown(['', *map(called, names)], [[b.label, *(b.passes.get(k, '-') for k in names)] for b in benches])]
    pairs = [(a, p) for a, p in [('ours', 'lsuv'), ('ours_keep', 'lsuv_keep'), ('ours', 'anyinit')] if a in names and p in names]
    if pairs:
        faster = lambda b, a, p: f'{statistics.median(b.ratios[p])/statistics.median(b.ratios[a]):.0f}x' if a in b.ratios and p in b.ratios else '-'
        out += ['**Times faster**\n', markdown(['', *(f'{CONTESTANTS[a][0]}, than {called(p)}' for a, p in pairs)],
                                               [[b.label, *(faster(b, a, p) for a, p in pairs)] for b in benches])]
    mb = lambda n: f'{n/2**20:.1f}'
    if any(b.peaks for b in benches):
        out += ["**Peak memory, MB, above the model and the mini-batch themselves**\n",
                markdown(['', 'a forward', "the units' weights", 'lsuv_init', 'over the sum of both'],
                         [[b.label, *(mb(b.peaks[k]) for k in ('forward', 'weights', 'ours')), f"{b.peaks['ours']/(b.peaks['forward'] + b.peaks['weights']):.2f}"]
                          for b in benches if b.peaks])]
    return '\n'.join(out)


def picture(benches, names, path):
    "Horizontal bars, a group a model, on a log scale."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    names = [k for k in names if k != 'lsuv_keep']
    gap = len(names) + 0.8
    fig,ax = plt.subplots(figsize=(8.5, 1.1 + 0.19*gap*len(benches)), constrained_layout=True)
    for i, b in enumerate(benches):
        for j, k in enumerate(names):
            v,y = statistics.median(b.ratios[k]), i*gap + j
            ax.barh(y, v - 0.5, left=0.5, height=0.88, color=CONTESTANTS[k][1], label=called(k) if i == 0 else None)
            ax.text(v*1.04, y, f'{v:.1f}' if v < 10 else f'{v:.0f}', va='center', fontsize=8)
    ax.set_yticks([i*gap + (len(names) - 1)/2 for i in range(len(benches))], [f'{b.label}\n({len(b.units)} layers)' if '-layer' not in b.label else b.label for b in benches])
    ax.tick_params(axis='y', length=0)
    ax.set(xscale='log', xlim=(0.5, 1.5*max(statistics.median(r) for b in benches for r in b.ratios.values())), ylim=(len(benches)*gap - 0.9, -0.9),
           xlabel='time to initialize, in forward passes of the same model and mini-batch (log scale)')
    ax.xaxis.set_major_formatter('{x:g}')
    ax.axvline(1, color='0.3', lw=0.8, ls=':')
    ax.spines[['top', 'right']].set_visible(False)
    fig.legend(loc='outside upper center', ncol=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


@call_parse
def main(
    models:str=','.join(MODELS),  # Models to measure
    rounds:int=7,  # Times that each of this package's contestants is timed
    peer_rounds:int=1,  # Times that each peer is; they make a hundred passes each time
    no_peers:bool=False,  # Leave the peers out
    batch:int=32,  # Images in the mini-batch
    size:int=64,  # Height and width of the images
    width:int=32,  # Channels of the plain CNNs; the fewer, the more weighs what is done to activations beside the convolutions
    threads:int=0,  # CPU threads; 0: torch's default
    cpu_time:bool=False,  # Take the processor's time, not the wall clock's: for a machine that is busy with other things, with one thread
    device:str='',  # 'cuda' or 'cpu'; default: CUDA where there is one
    no_save:bool=False,  # Print, and write no files
):
    "What `lsuv_init` costs, in forward passes, beside the peers."
    warnings.simplefilter('ignore')
    if threads: torch.set_num_threads(threads)
    dev = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size, device=dev)
    there = [] if no_peers else installed(['lsuv', 'anyinit'])
    names = [k for k in CONTESTANTS if PEERS.get(k) in (None, *there)]
    benches = []
    for k in (k.strip() for k in models.split(',')):
        title,make = MODELS[k]
        b = Bench(partial(make, **{'img_size': size} if k == 'vit_ti' else {'width': width} if 'cnn' in k else {}), x, time.process_time if cpu_time else time.perf_counter)
        b.label = title
        b.measure('ours')  # to warm up
        b.ratios.clear(); b.seconds.clear()
        here = [n for n in names if n != 'lsuv_keep' or k == LIKE_FOR_LIKE]
        for r in range(max(rounds, peer_rounds)):
            for n in here:
                if r < (peer_rounds if n in PEERS else rounds): b.measure(n)
        b.peaks = b.memory()
        benches.append(b)
        print(f'{title}: ' + ', '.join(f'{CONTESTANTS[n][0]} {statistics.median(b.ratios[n]):.2f}' for n in here), flush=True)
    names = [n for n in names if any(n in b.ratios for b in benches)]
    text = (f'Mini-batch of {batch} at {size}x{size}, plain CNNs of {width} channels, {where(dev)}; {rounds} rounds, {peer_rounds} for the peers{"; processor time" if cpu_time else ""}. Times vary with the machine and with what '
            'else it does; the ratios are what counts.\n\n' + tables(benches, names))
    print('\n' + text)
    if no_save: return
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_csv(benches, RESULTS/'init_cost.csv')
    (RESULTS/'init_cost.md').write_text('<!-- written by benchmarks/init_cost.py -->\n' + text)
    picture(benches, names, IMAGES/'init_cost.png')
    print('Written: benchmarks/results/init_cost.csv, benchmarks/results/init_cost.md, nbs/images/init_cost.png')
