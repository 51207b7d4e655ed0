"""Which layers each initialization reaches: this package and the peers over the networks of `tests/networks.py`.

Every conv, linear, bilinear and attention layer that runs is judged from outside: hooks of this script's own take the sums
of its output, within the hook, over all its calls in a forward pass with the same mini-batch, in training mode with dropout,
DropPath and StochasticDepth off. It is reached if its std is within 0.1 of 1. A model is judged as it was left, also where the
initialization raised an exception or was cut off by the time limit, but then it does not count as whole."""
import csv, importlib.util, math, signal, time, warnings
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch

import torch
from fastcore.script import call_parse
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from _common import COLORS, IMAGES, PACKAGES, RESULTS, ROOT, installed, label, markdown, passes_begun, timed, where

LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
COLUMNS = ['network', 'package', 'outcome', 'layers', 'reached', 'passes_begun', 'passes_worth', 'seconds', 'forward_seconds', 'said', 'silent', 'error']


def networks():
    "The table of architectures that the tests use."
    spec = importlib.util.spec_from_file_location('networks', ROOT/'tests'/'networks.py')
    module = importlib.util.module_from_spec(spec)
    importlib.sys.modules['networks'] = module
    spec.loader.exec_module(module)
    return module.NETWORKS


class CutOff(BaseException): "The time is up. No `Exception`, which the code that is timed might catch."

@contextmanager
def limit(seconds):
    "Raise `CutOff` after so many seconds of processor time, where the platform has alarms."
    if not seconds or not hasattr(signal, 'setitimer'):
        yield
        return
    def stop(*args): raise CutOff
    was = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, was)


def layers(model):
    "Those to judge, by name; an attention counts as one layer, which applies its own projections."
    inside = {c for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    return {n: m for n, m in model.named_modules() if isinstance(m, LAYERS) and m not in inside}

@contextmanager
def calls(model):
    "Counts the calls of layers."
    n = [0]
    def add(*args): n[0] += 1
    handles = [m.register_forward_pre_hook(add) for m in layers(model).values()]
    try: yield n
    finally:
        for h in handles: h.remove()


def forward(model, batch):
    "A plain forward pass of the model as it trains, without dropout."
    model.train()
    for m in model.modules():
        if isinstance(m, _DropoutNd): m.p = 0.
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)): m.dropout = 0.
        if any(s in type(m).__name__ for s in ('Drop', 'Stochastic')): m.training = False
    stance = torch.compiler.set_stance('force_eager') if hasattr(torch.compiler, 'set_stance') else nullcontext()
    with torch.no_grad(), stance: return model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)


def stds(model, batch):
    "The std of the output of each layer that runs, pooled over its calls."
    sums = {}
    def see(name, out):
        x = (out[0] if isinstance(out, tuple) else out).detach().double()
        n,mean,square = x.numel(), x.mean().item(), x.var(correction=0).item()
        sums.setdefault(name, []).append((n, mean, square))
    handles = [m.register_forward_hook(lambda m, i, o, n=n: see(n, o)) for n, m in layers(model).items()]
    try: forward(model, batch)
    finally:
        for h in handles: h.remove()
    def pooled(parts):
        n = sum(p[0] for p in parts)
        mean = sum(p[0]*p[1] for p in parts)/n
        return math.sqrt(sum(p[0]*(p[2] + (p[1] - mean)**2) for p in parts)/n)
    return {k: pooled(v) for k, v in sums.items()}


def judge(network, package, tol, seconds):
    "One package on one network, as a row."
    row = dict.fromkeys(COLUMNS, '') | dict(network=network.name, package=package, outcome='ended')
    torch.manual_seed(0)
    model,batch = network()
    plain = getattr(model, '_orig_mod', model)  # of a compiled model
    spare,_ = network()  # for forward passes that are to leave no trace
    spare = getattr(spare, '_orig_mod', spare)
    forward(spare, batch)
    with calls(spare) as n: row['forward_seconds'] = timed(lambda: forward(spare, batch), clock=time.process_time)
    layer_calls,report = n[0],None
    def initialize():
        nonlocal report
        try:
            with limit(seconds): report = PACKAGES[package](model, batch)
        except CutOff: row['outcome'] = 'cut off'
        except Exception as e: row.update(outcome='failed', error=f'{type(e).__name__}: {e}'.splitlines()[0][:160])
    with passes_begun(plain) as begun, calls(plain) as n: row['seconds'] = timed(initialize, clock=time.process_time)
    row.update(passes_begun=begun[0], passes_worth=n[0]/max(layer_calls, 1))
    try: found = stds(plain, batch)
    except Exception as e:  # it was left in a state in which it does not run
        found = dict.fromkeys(stds(spare, batch), float('nan'))
        row['error'] = row['error'] or f'{type(e).__name__}: {e}'.splitlines()[0][:160]
    off = {k for k, v in found.items() if not abs(v - 1) <= tol}
    row.update(layers=len(found), reached=len(found) - len(off))
    if report is not None:  # what it says of the layers that it did not reach
        said = {r.name: r.status for r in report}
        silent = [k for k in off if said.get(k, 'ok') in ('ok', 'no bias')]
        row.update(said=' '.join(f'{k}:{said[k]}' for k in sorted(off) if k in said), silent=' '.join(sorted(silent)))
    return row


def summary(rows, packages):
    "A row a package."
    out = []
    for p in packages:
        of = [r for r in rows if r['package'] == p]
        n,reached = sum(r['layers'] for r in of), sum(r['reached'] for r in of)
        ended = [r for r in of if r['outcome'] == 'ended']
        took,forwards = (sum(r[k] for r in of) for k in ('seconds', 'forward_seconds'))
        out.append([f'**{label(p)}**', f'{reached} of {n} ({100*reached/max(n, 1):.1f} %)', f"{sum(r['reached'] == r['layers'] for r in ended)} of {len(of)}",
                    sum(r['outcome'] == 'failed' for r in of), sum(r['outcome'] == 'cut off' for r in of), sum(r['passes_begun'] for r in of),
                    max((r['passes_begun'] for r in ended), default='-'), f'{took:.0f} s', f'{took/forwards:.1f}'])
    return markdown(['', 'layers reached', 'networks whole', 'failed', 'cut off', 'passes begun', 'most', 'time', 'in forwards of all'], out)


def per_network(rows, packages):
    "A row a network: layers reached by each package."
    of = {(r['network'], r['package']): r for r in rows}
    def cell(r):
        if r is None: return '-'
        note = '' if r['outcome'] == 'ended' else f", {r['outcome']}"
        return ('**{}**' if r['reached'] == r['layers'] and not note else '{}').format(r['reached']) + note
    names = list(dict.fromkeys(r['network'] for r in rows))
    return markdown(['network', 'layers', *map(label, packages)],
                    [[n, max(of[n, p]['layers'] for p in packages if (n, p) in of), *(cell(of.get((n, p))) for p in packages)] for n in names])


def picture(rows, packages, path):
    "A line a network: the share of its layers that each package reaches."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    of = {(r['network'], r['package']): r for r in rows}
    names = list(dict.fromkeys(r['network'] for r in rows))
    fig,axes = plt.subplots(1, len(packages), figsize=(3.6 + 2.2*len(packages), 1.3 + 0.185*len(names)), sharey=True, constrained_layout=True, squeeze=False)
    for ax, p in zip(axes[0], packages):
        for y, n in enumerate(names):
            r = of.get((n, p))
            if r is None or not r['layers']: continue
            share = r['reached']/r['layers']
            ax.barh(y, 1, color='0.94', height=0.8)
            ax.barh(y, share, color=COLORS[p], height=0.8)
            note = '' if r['outcome'] == 'ended' else f" {r['outcome']}"
            ax.text(1.03, y, f"{r['reached']}/{r['layers']}{note}", va='center', fontsize=7, color='0.35' if share == 1 and not note else '#b3261e')
        reached,n = (sum(r[k] for r in rows if r['package'] == p) for k in ('reached', 'layers'))
        ax.set_title(f'{label(p)}\n{reached} of {n} layers, {100*reached/max(n, 1):.1f} %', fontsize=9, loc='left')
        ax.set(xlim=(0, 1.6), xticks=[0, 0.5, 1], ylim=(len(names) - 0.4, -0.6))
        ax.xaxis.set_major_formatter(lambda v, _: f'{100*v:.0f} %')
        ax.tick_params(labelsize=7, length=0)
        ax.spines[:].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=7)
    fig.supxlabel('share of the executed layers whose output has a std within 0.1 of 1', fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)


def shown(v): return f'{v:.3f}' if isinstance(v, float) else v


@call_parse
def main(
    only:str='*',  # Networks to judge, as globs separated by commas
    packages:str=','.join(PACKAGES),  # Packages to judge
    limit_s:float=300.,  # Seconds of processor time that a package may take for a network; 0: as long as it takes
    tol:float=0.1,  # How far from 1 the std of a layer that is reached may be
    threads:int=1,  # CPU threads; 0: torch's default. One keeps the times, which are the processor's, comparable on a busy machine
    no_save:bool=False,  # Print, and write no files
):
    "Layers that this package and its peers reach over many architectures."
    warnings.simplefilter('ignore')
    if threads: torch.set_num_threads(threads)
    names = installed([p.strip() for p in packages.split(',')])
    rows = []
    for network in networks().values():
        if not any(fnmatch(network.name, g.strip()) for g in only.split(',')): continue
        for p in names:
            rows.append(r := judge(network, p, tol, limit_s))
            print(f"{r['network']:<36} {p:<12} {r['reached']:>4} of {r['layers']:<4} {r['outcome']:<8} {r['passes_begun']:>4} passes {r['seconds']:>7.1f} s  {r['error']}", flush=True)
    ours = [r for r in rows if r['package'] == 'fastai_lsuv']
    off,silent = sum(r['layers'] - r['reached'] for r in ours), sum(len(r['silent'].split()) for r in ours)
    text = (f"{len({r['network'] for r in rows})} networks, {where()}. A layer is reached if the std of its output is within {tol:g} of 1, measured from outside, with the same mini-batch, as the "
            f'network trains (training mode, dropout off); a network is whole if all its layers that run are. `anyinit` is there for its reach and cost as a '
            f'data-driven initialization: its aim is a unit second moment after each activation, not std 1 of each layer. A package is cut off after {limit_s:g} s of processor time for a network. '
            f'Some layers are no one\'s to reach: frozen, tied or zero-initialized weights mean something, and `fastai_lsuv` leaves them as they are; of the {off} '
            f'layers that it did not bring to std 1 its report names {off - silent} with the reason. '
            f'Times are the processor\'s and vary with the machine; their ratios to forward passes are what counts.\n\n{summary(rows, names)}\n**Layers reached, by network** (bold: all)\n\n{per_network(rows, names)}')
    print('\n' + text)
    if no_save: return
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS/'reach.csv', 'w', newline='') as f:
        w = csv.writer(f, lineterminator='\n')
        w.writerow(COLUMNS)
        w.writerows([shown(r[k]) for k in COLUMNS] for r in rows)
    (RESULTS/'reach.md').write_text('<!-- written by benchmarks/reach.py -->\n' + text)
    picture(rows, names, IMAGES/'reach.png')
    print('Written: benchmarks/results/reach.csv, benchmarks/results/reach.md, nbs/images/reach.png')
