"Reproduce the source documents: `python -m fastai_lsuv.experiments NAME [options]`."
from __future__ import annotations

import sys
import warnings
from importlib import import_module

import matplotlib
import torch
from fastcore.script import anno_parser

from .data import InputError

EXPERIMENTS = {
    'thread': "lesson 11's network: (mean, std) of each layer after each order of the loops, and training from each",
    'port': "the Torch port: MNIST with LSUV and without, at three learning rates",
    'activations': "FitNet-4: five activations against four initializations, plain and residual",
    'batchnorm': "LSUV against batch norm: accuracy by epoch and by wall time, and the cost of a step",
    'batchsize': "how the scale that LSUV finds varies with the mini-batch",
    'why': "why mean 0 and std 1: products, sums and matrix products of normals",
    'depth': "how deep a plain ReLU network still trains, by its start",
}
LIST = '\n'.join(f'  {name:<12}{what}' for name, what in EXPERIMENTS.items())
USAGE = f'usage: python -m fastai_lsuv.experiments NAME [options]\n\n{LIST}\n\nNAME --help lists its options.'


def main(
    argv: list[str]  # Name of an experiment and its options
) -> str | int | None:  # What to exit with
    "Run one experiment."
    if not argv or argv[0] in ('-h', '--help'):
        print(USAGE)
        return 0
    name,*rest = argv
    if name not in EXPERIMENTS: return f"{name!r} is no experiment.\n{USAGE}"
    experiment = getattr(import_module(f'.{name}', __package__), name).__wrapped__
    options = vars(anno_parser(experiment, prog=f'fastai_lsuv.experiments {name}').parse_args(rest))
    matplotlib.use('agg')
    warnings.filterwarnings('ignore', category=FutureWarning)
    torch.set_flush_denormal(True)  # networks that fade away would otherwise slow the processor down
    try: experiment(**{k: v for k, v in options.items() if k not in ('pdb', 'xtra')})
    except InputError as e: return str(e)
    finally: torch.set_flush_denormal(False)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
