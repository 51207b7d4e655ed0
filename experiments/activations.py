"The paper's table of activations against initializations, on FitNet-4 and on its residual companion."
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
from fastcore.meta import delegates
from fastcore.script import call_parse

from .networks import ACTIVATIONS
from .options import FitNetOptions
from .starts import STARTS
from .study import Runs, curves, percent, positive, save, say, seeded, table, words

NETWORKS = ('plain', 'residual')
PAPER = ('LSUV', 'orthonormal', 'Xavier', 'MSRA')


@call_parse
@delegates(FitNetOptions)
def activations(
    acts: str = ','.join(ACTIVATIONS),  # Activations to try
    inits: str = ','.join(PAPER),  # Initializations to try; PyTorch is one more
    nets: str = ','.join(NETWORKS),  # Networks to try
    margin: float = 0.1,  # A run fails to converge if its last accuracy is within this much of chance
    epochs: int = 6,  # Epochs to train each arm
    seeds: int = 2,  # Runs of each arm, from seeds 1, 2, ...
    **kwargs
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    """FitNet-4 with five activations, from each of four initializations: accuracy, or "failed to converge".

    The activations are maxout, ReLU, very leaky ReLU, tanh and sigmoid. The initializations are LSUV, orthonormal,
    Xavier and MSRA. The paper's scale: --data cifar --size 32 --width 1 --bs 128 --epochs 230."""
    options = FitNetOptions(**kwargs)
    positive(epochs=epochs, seeds=seeds, margin=margin)
    acts = words('acts', acts, ACTIVATIONS)
    inits = words('inits', inits, STARTS)
    nets = words('nets', nets, NETWORKS)
    images = options.images()
    arms = list(product(range(1, seeds + 1), nets, acts, inits))
    runs = Runs(images, options.bs, len(arms), epochs)
    for seed, net, act, init in arms:
        seeded(seed)
        model = options.network(images, act, residual=net == 'residual')
        options.train(runs, dict(network=net, activation=act, init=init), seed, model, init)
    df = runs.df()
    floor = 1/images.classes + margin

    say(f'Data: {images.name}, {options.size} pixels a side\n'
        f'FitNet-4 of width {options.width:g} and depth {options.depth:g}, {epochs} epochs, '
        f'SGD with lr {options.lr:g}, momentum {options.mom:g}, batch {options.bs}')
    by_init = partial(table, rows='init', columns='activation', values='accuracy')
    for net in nets:
        of = df[df.network == net]
        say(f'{net}: accuracy after {epochs} epochs, %, or failed to converge (below {100*floor:.0f} %)',
            by_init(of[of.epoch == epochs], cell=partial(cell, floor=floor)))
        say(f'{net}: accuracy after the first epoch, %', by_init(of[of.epoch == 1], cell=percent))
    save('activations', options.out, _picture(df, nets, acts, inits, floor), main=df)
    return df


def cell(
    accuracies: pd.Series,  # Of one arm, one a seed
    floor: float  # A run with less accuracy failed to converge
) -> str:
    "The accuracy of the runs that converged, and the number of those that did not."
    good = accuracies[accuracies >= floor]
    failed = len(accuracies) - len(good)
    if not len(good): return 'failed'
    if not failed: return percent(good)
    return f'{percent(good)} ({failed} failed)'


def _picture(df: pd.DataFrame, nets: list[str], acts: list[str], inits: list[str], floor: float) -> plt.Figure:
    "Accuracy by epoch: a row a network, a column an activation."
    size = 2.9*len(acts) + .6, 2.7*len(nets) + .7
    fig,axs = plt.subplots(len(nets), len(acts), figsize=size, layout='constrained',
                           squeeze=False, sharex=True, sharey=True)
    for row, net in zip(axs, nets):
        for ax, act in zip(row, acts):
            of = df[(df.network == net) & (df.activation == act)]
            for i, init in enumerate(inits):
                curves(ax, of[of.init == init], label=init, color=f'C{i}')
            ax.axhline(floor, color='gray', lw=.8, ls=':')
            ax.set_title(f'{act}, {net}', fontsize=10)
            ax.xaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel('accuracy')
    for ax in axs[-1]:
        ax.set_xlabel('epoch')
    axs[0][0].set_ylim(0, 1 if df.accuracy.max() > .8 else None)
    fig.legend(*axs[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=len(inits), frameon=False)
    return fig
