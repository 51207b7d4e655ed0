"""The layers that each initialization reaches: this package and its peers over the networks of `tests/networks.py`.

The judge is this script alone. It looks at every conv, linear, bilinear and attention layer that runs. Its own hooks
take the sums of the outputs over all calls in one forward pass with the same mini-batch. The model is in training mode,
with dropout, DropPath and StochasticDepth off. A layer is reached if its std is within 0.1 of 1.

A model is judged in the state that the package leaves, also after an exception or the time limit. In these cases it
does not count as whole."""
import csv
import math
import signal
import time
import warnings
from contextlib import contextmanager
from fnmatch import fnmatch

import torch
from fastcore.script import call_parse
from torch import nn
from torch.nn.modules.conv import _ConvNd

from _common import COLORS, IMAGES, PACKAGES, RESULTS
from _common import elements_reached, first_line, forward, installed, label, markdown, networks, on_device
from _common import passes_begun, plain, timed, used, where

LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
COLUMNS = ['network', 'package', 'outcome', 'layers', 'reached', 'elements', 'elements_reached', 'passes_begun',
           'passes_worth', 'seconds', 'forward_seconds', 'said', 'silent', 'error']


class CutOff(BaseException):
    "The time is up. It is no `Exception`, because the timed code may catch these."


@contextmanager
def limit(seconds):
    "Raise `CutOff` after so many seconds of processor time, on platforms that have alarms."
    if not seconds or not hasattr(signal, 'setitimer'):
        yield
        return

    def stop(*args):
        raise CutOff

    was = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, was)


# --- Judging

def layers(model):
    "The layers to judge, by name. An attention is one layer, because it applies its own projections."
    inside = {c for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    return {n: m for n, m in model.named_modules() if isinstance(m, LAYERS) and m not in inside}


@contextmanager
def hooks(handles):
    "Remove the hooks at the end."
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@contextmanager
def calls(model):
    "Counts the calls of layers. `[0]` of the result is the count."
    n = [0]

    def add(*args):
        n[0] += 1

    with hooks([m.register_forward_pre_hook(add) for m in layers(model).values()]):
        yield n


def stds(model, batch):
    "The std of the output of each layer that runs, pooled over its calls."
    parts = {}

    def see(name, out):
        x = (out[0] if isinstance(out, tuple) else out).detach().double()
        parts.setdefault(name, []).append((x.numel(), x.mean().item(), x.var(correction=0).item()))

    def pooled(calls):
        n = sum(size for size, _, _ in calls)
        mean = sum(size*m for size, m, _ in calls)/n
        return math.sqrt(sum(size*(var + (m - mean)**2) for size, m, var in calls)/n)

    with hooks([m.register_forward_hook(lambda m, i, o, n=n: see(n, o)) for n, m in layers(model).items()]):
        forward(model, batch)
    return {name: pooled(calls) for name, calls in parts.items()}


def matrices(model, batch, tol):
    """Elements of all parameters of two or more dimensions, and of those among them whose output is reached.

    The output is that of the layer that holds them, or of the operation that takes them or a slice of them."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1), elements_reached(used(model, batch), tol)


def judge(network, package, tol, seconds, device):
    "One package on one network, as a row."
    row = dict.fromkeys(COLUMNS, '') | dict(network=network.name, package=package, outcome='ended')
    torch.manual_seed(0)
    model,batch = network()
    spare = plain(network()[0]).to(device)  # for forward passes that must not change `model`
    model,batch = model.to(device),on_device(batch, device)
    forward(spare, batch)
    with calls(spare) as n:
        row['forward_seconds'] = timed(lambda: forward(spare, batch), device, time.process_time)
    layer_calls,report = n[0],None

    def initialize():
        nonlocal report
        try:
            with limit(seconds):
                report = PACKAGES[package](model, batch)
        except CutOff:
            row['outcome'] = 'cut off'
        except Exception as e:
            row.update(outcome='failed', error=first_line(e))

    with passes_begun(plain(model)) as begun, calls(plain(model)) as n:
        row['seconds'] = timed(initialize, device, time.process_time)
    row.update(passes_begun=begun[0], passes_worth=n[0]/max(layer_calls, 1))
    try:
        found = stds(plain(model), batch)
    except Exception as e:  # the package leaves a model that does not run
        found = dict.fromkeys(stds(spare, batch), float('nan'))
        row['error'] = row['error'] or first_line(e)
    missed = {name for name, std in found.items() if not abs(std - 1) <= tol}
    row.update(layers=len(found), reached=len(found) - len(missed))
    try:
        row.update(zip(('elements', 'elements_reached'), matrices(plain(model), batch, tol)))
    except Exception as e:
        row.update(elements=matrices(spare, batch, tol)[0], elements_reached=0, error=row['error'] or first_line(e))
    if report is not None:  # the report may name the layers that the package does not reach
        said = {r.name: r.status for r in report}
        silent = [name for name in missed if said.get(name, 'ok') in ('ok', 'no bias')]
        row.update(said=' '.join(f'{name}:{said[name]}' for name in sorted(missed) if name in said),
                   silent=' '.join(sorted(silent)))
    return row


# --- Results

def total(rows, key):
    return sum(r[key] for r in rows)


def summary(rows, packages):
    "A row a package."
    def row(package):
        of = [r for r in rows if r['package'] == package]
        ended = [r for r in of if r['outcome'] == 'ended']
        n,reached = total(of, 'layers'),total(of, 'reached')
        whole = sum(r['reached'] == r['layers'] for r in ended)
        outcomes = [r['outcome'] for r in of]
        seconds = total(of, 'seconds')
        weights = 100*total(of, 'elements_reached')/max(total(of, 'elements'), 1)
        return [f'**{label(package)}**', f'{reached} of {n} ({100*reached/max(n, 1):.1f} %)', f'{weights:.1f} %',
                f'{whole} of {len(of)}',
                outcomes.count('failed'), outcomes.count('cut off'), total(of, 'passes_begun'),
                max((r['passes_begun'] for r in ended), default='-'),
                f'{seconds:.0f} s', f"{seconds/total(of, 'forward_seconds'):.1f}"]
    columns = ['', 'layers reached', 'of all weights', 'networks whole', 'failed', 'cut off', 'passes begun', 'most',
               'time', 'in forwards of all']
    return markdown(columns, [row(p) for p in packages])


def per_network(rows, packages):
    "A row a network: the layers that each package reaches."
    by = {(r['network'], r['package']): r for r in rows}

    def cell(r):
        if r is None: return '-'
        if r['outcome'] != 'ended': return f"{r['reached']}, {r['outcome']}"
        return f"**{r['reached']}**" if r['reached'] == r['layers'] else r['reached']

    def row(network):
        cells = [by.get((network, p)) for p in packages]
        return [network, max(r['layers'] for r in cells if r is not None), *map(cell, cells)]

    names = dict.fromkeys(r['network'] for r in rows)
    return markdown(['network', 'layers', *map(label, packages)], [row(n) for n in names])


def picture(rows, packages, path):
    "A line a network: the share of its layers that each package reaches."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    names = list(dict.fromkeys(r['network'] for r in rows))
    size = 3.6 + 2.2*len(packages), 1.3 + 0.185*len(names)
    fig,axes = plt.subplots(1, len(packages), figsize=size, sharey=True, constrained_layout=True, squeeze=False)
    for ax, package in zip(axes[0], packages):
        of = [r for r in rows if r['package'] == package]
        for r in of:
            if not r['layers']: continue
            y,share = names.index(r['network']),r['reached']/r['layers']
            ended = r['outcome'] == 'ended'
            note = f"{r['reached']}/{r['layers']}" + ('' if ended else f" {r['outcome']}")
            ax.barh(y, 1, color='0.94', height=0.8)
            ax.barh(y, share, color=COLORS[package], height=0.8)
            ax.text(1.03, y, note, va='center', fontsize=7, color='0.35' if ended and share == 1 else '#b3261e')
        reached,n = total(of, 'reached'),total(of, 'layers')
        title = f'{label(package)}\n{reached} of {n} layers, {100*reached/max(n, 1):.1f} %'
        ax.set_title(title, fontsize=9, loc='left')
        ax.set(xlim=(0, 1.6), xticks=[0, 0.5, 1], ylim=(len(names) - 0.4, -0.6))
        ax.xaxis.set_major_formatter(lambda v, _: f'{100*v:.0f} %')
        ax.tick_params(labelsize=7, length=0)
        ax.spines[:].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=7)
    fig.supxlabel('share of the executed layers whose output has a std within 0.1 of 1', fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def write_csv(rows, path):
    def shown(v):
        return f'{v:.3f}' if isinstance(v, float) else v
    with open(path, 'w', newline='') as f:
        w = csv.writer(f, lineterminator='\n')
        w.writerow(COLUMNS)
        w.writerows([shown(r[k]) for k in COLUMNS] for r in rows)


INTRODUCTION = (
    '{networks} networks, {where}. A layer is reached if the std of its output is within {tol:g} of 1. The std is '
    'measured from outside, with the same mini-batch, as the network trains (training mode, dropout off). A network is '
    'whole if all its layers that run are reached. Of all weights: the share of the elements of parameters of two or '
    'more dimensions, embeddings among them, whose layer or operation is reached. `anyinit` is here for the reach and '
    'the cost of a data-driven initialization. It has another aim: a unit second moment after each activation, not '
    'std 1 of each layer. A package is cut off after {limit:g} s of processor time for a network. No package should '
    'reach some layers: '
    'frozen, tied or zero-initialized weights mean something, and `fastai_lsuv` leaves them as they are. There are '
    '{missed} layers that it does not bring to std 1. Its report names {named} of them with the reason. Times are the '
    "processor's and vary with the machine. Their ratios to forward passes are what counts.")


@call_parse
def main(
    only: str = '*',  # Networks to judge, as globs separated by commas
    packages: str = ','.join(PACKAGES),  # Packages to judge
    limit_s: float = 300.,  # Seconds of processor time for a package and a network; 0: no limit
    tol: float = 0.1,  # A layer is reached if its std is this close to 1
    threads: int = 1,  # CPU threads; 0: torch's default. With one, the times compare well on a busy machine
    device: str = 'cpu',  # 'cpu' or 'cuda'
    no_save: bool = False,  # Print, and write no files
):
    "The layers that this package and its peers reach over many architectures."
    warnings.simplefilter('ignore')
    if threads:
        torch.set_num_threads(threads)
    dev = torch.device(device)
    names = installed([p.strip() for p in packages.split(',')])
    chosen = [n for n in networks().values() if any(fnmatch(n.name, g.strip()) for g in only.split(','))]
    rows = []
    for network in chosen:
        for package in names:
            r = judge(network, package, tol, limit_s, dev)
            rows.append(r)
            print(f"{r['network']:<36} {package:<12} {r['reached']:>4} of {r['layers']:<4} {r['outcome']:<8} "
                  f"{r['passes_begun']:>4} passes {r['seconds']:>7.1f} s  {r['error']}", flush=True)
    ours = [r for r in rows if r['package'] == 'fastai_lsuv']
    missed = total(ours, 'layers') - total(ours, 'reached')
    silent = sum(len(r['silent'].split()) for r in ours)
    introduction = INTRODUCTION.format(networks=len(chosen), where=where(dev), tol=tol, limit=limit_s,
                                       missed=missed, named=missed - silent)
    text = (f'{introduction}\n\n{summary(rows, names)}\n'
            f'**Layers reached, by network** (bold: all)\n\n{per_network(rows, names)}')
    print('\n' + text)
    if no_save: return
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_csv(rows, RESULTS/'reach.csv')
    (RESULTS/'reach.md').write_text('<!-- written by benchmarks/reach.py -->\n' + text)
    picture(rows, names, IMAGES/'reach.png')
    print('Written: benchmarks/results/reach.csv, benchmarks/results/reach.md, nbs/images/reach.png')
