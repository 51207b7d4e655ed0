"Reproduce the source documents: `python -m experiments NAME [options]`."
from __future__ import annotations

import sys
import warnings
from importlib import import_module

import matplotlib
import torch

from fastai_lsuv.demo import run_command

from .data import InputError

PROGRAM = 'python -m experiments'
EXPERIMENTS = {
    'thread': "lesson 11's network: (mean, std) of each layer after each order of the loops, and training from each",
    'port': "the Torch port: MNIST with LSUV and without, at three learning rates",
    'activations': "FitNet-4: five activations against four initializations, plain and residual",
    'batchnorm': "LSUV against batch norm: accuracy by epoch and by wall time, and the cost of a step",
    'batchsize': "how the scale that LSUV finds varies with the mini-batch",
    'why': "why mean 0 and std 1: products, sums and matrix products of normals",
    'depth': "how deep a plain ReLU network still trains, by its start",
    'benefit': "does it help: networks that people train, with LSUV and without",
    'signal': "why some starts fail: what is left of the samples, and the gradient, by layer",
}
LIST = '\n'.join(f'  {name:<12}{what}' for name, what in EXPERIMENTS.items())
USAGE = f'usage: {PROGRAM} NAME [options]\n\n{LIST}\n\nNAME --help lists its options.'


def main(
    argv: list[str]  # Name of an experiment and its options
) -> str | int | None:  # Exit status, or an error message
    "Run one experiment."
    if not argv or argv[0] in ('-h', '--help'):
        print(USAGE)
        return 0
    name,*options = argv
    if name not in EXPERIMENTS: return f"{name!r} is no experiment.\n{USAGE}"
    experiment = getattr(import_module(f'.{name}', __package__), name).__wrapped__  # without fastcore's own parser
    matplotlib.use('agg')
    warnings.filterwarnings('ignore', category=FutureWarning)
    torch.set_flush_denormal(True)  # numbers that fade to almost 0 are slow to compute with
    try:
        run_command(experiment, options, f'{PROGRAM} {name}')
    except InputError as e:
        return str(e)
    finally:
        torch.set_flush_denormal(False)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
