"""The weights that are right on data that the initialization has not seen, over the networks of `tests/networks.py`.

`lsuv_init` gets one mini-batch. Then a fresh one of the same kind runs through the network. Hooks and a mode of the
tests, which know nothing of the package, measure what each weight of two or more dimensions puts out: that of a layer,
and that which a linear operation takes. A weight is right if this has a std within 0.1 of 1. Weights count by their
elements. Those that are to stay as they are (tied, frozen, zero) count as well."""
import csv
import math
import warnings
from fnmatch import fnmatch

import torch
from fastcore.script import call_parse

from _common import RESULTS, elements_reached, markdown, networks, on_device, plain, run_fastai_lsuv, used, where

COLUMNS = ['network', 'elements_used', 'elements_right', 'elements_left', 'missed']


def fresh_batch(network, seed):
    "Another mini-batch of the kind that the network is initialized with."
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return network.make()[1]


def judge(network, tol, seed, device):
    "One network, as a row."
    model,batch = network()
    report = run_fastai_lsuv(model.to(device), on_device(batch, device))
    found = used(plain(model), on_device(fresh_batch(network, seed), device))
    said = {r.name: r.status for r in report}
    missed = [u for u in found if not abs(u.std - 1) <= tol]
    left = [u for u in missed if said[u.name] not in ('ok', 'no bias')]
    shown = dict.fromkeys(f'{u.name}:{u.std:.2f}:{said[u.name]}' for u in missed)
    elements = elements_reached(found), elements_reached(found, tol), elements_reached(left)
    return dict(zip(COLUMNS, (network.name, *elements, '; '.join(shown))))


def share(rows):
    "The share of elements that are right, in percent, and not rounded up."
    n = sum(r['elements_used'] for r in rows)
    return math.floor(1e4*sum(r['elements_right'] for r in rows)/max(n, 1))/100


def summary(rows):
    "A row a library."
    libraries = dict.fromkeys(r['network'].split('/')[0] for r in rows)
    by = {library: [r for r in rows if r['network'].split('/')[0] == library] for library in libraries}
    by['**all**'] = rows

    def row(library):
        of = by[library]
        n,right,left = (sum(r[k] for r in of) for k in COLUMNS[1:4])
        return [library, len(of), f'{n:,}', f'{right:,}', f'{share(of):.2f} %', f'{left:,}', f'{n - right - left:,}']

    return markdown(['', 'networks', 'elements that operations take', 'right', 'share',
                     'left alone, as the report says', 'others'],
                    [row(b) for b in by])


def per_network(rows):
    "A row a network with weights that are not right: their std, and what the report says of them."
    def some(missed):
        parts = [m.rsplit(':', 2) for m in missed.split('; ')]
        shown = ', '.join(f'`{name}` {std} ({status})' for name, std, status in parts[:6])
        return shown + f' and {len(parts) - 6} more'*(len(parts) > 6)
    return markdown(['network', 'share', 'not right: std, and status in the report'],
                    [[r['network'], f'{share([r]):.2f} %', some(r['missed'])] for r in rows if r['missed']])


INTRODUCTION = (
    '{networks} networks, {where}. `lsuv_init` gets one mini-batch. The std of what each weight puts out is then '
    'measured from outside on a fresh mini-batch, as the network trains (training mode, dropout off). A weight is '
    'right if it is within {tol:g} of 1. **{share:.2f} % of the elements of weight matrices that layers and linear '
    'operations take are right.** Weights that are to stay as they are (tied, frozen, zero) count as not right. A '
    'layer that is `ok` and not right was within the tolerance on its own mini-batch: mini-batches are small here, and '
    'the std of few samples varies.')


@call_parse
def main(
    only: str = '*',  # Networks to judge, as globs separated by commas
    tol: float = 0.1,  # A weight is right if its output has a std this close to 1
    seed: int = 1,  # Of the fresh mini-batch
    device: str = 'cpu',  # 'cpu' or 'cuda'
    threads: int = 1,  # CPU threads; 0: torch's default
    no_save: bool = False,  # Print, and write no files
):
    "The weights that are right on a fresh mini-batch, over many architectures."
    warnings.simplefilter('ignore')
    if threads:
        torch.set_num_threads(threads)
    dev,rows = torch.device(device),[]
    for network in networks().values():
        if not any(fnmatch(network.name, g.strip()) for g in only.split(',')): continue
        rows.append(judge(network, tol, seed, dev))
        print(f"{network.name:<40} {share(rows[-1:]):>6.2f} %  {rows[-1]['missed'][:120]}", flush=True)
    introduction = INTRODUCTION.format(networks=len(rows), where=where(dev), tol=tol, share=share(rows))
    text = (f'{introduction}\n\n{summary(rows)}\n**Networks with weights that are not right**\n\n{per_network(rows)}')
    print('\n' + text)
    if no_save: return
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS/'fresh.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        w.writeheader()
        w.writerows(rows)
    (RESULTS/'fresh.md').write_text('<!-- written by benchmarks/fresh.py -->\n' + text)
    print('Written: benchmarks/results/fresh.csv, benchmarks/results/fresh.md')
