"The paper's table of activations against initializations, on FitNet-4 and on its residual companion."
from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from fastai.callback.channelslast import ChannelsLast
from fastcore.script import call_parse

from .data import get_images
from .networks import ACTIVATIONS, fitnet4
from .starts import STARTS, start
from .study import OUT, Runs, curves, percent, positive, save, say, seeded, table, words

NETWORKS = ('plain', 'residual')
PAPER = ('LSUV', 'orthonormal', 'Xavier', 'MSRA')


@call_parse
def activations(
    data: str = 'digits',  # 'digits', a folder of images in train/<class>/ and test/<class>/ or of IDX files, 'mnist' or 'cifar'
    download: bool = False,  # Let fastai fetch 'mnist' or 'cifar'
    n: int = 0,  # Images to train on, and a quarter as many to test; 0: all
    size: int = 16,  # Pixels a side of the images
    width: float = 0.25,  # Filters, as a share of FitNet-4's
    depth: float = 1.,  # Layers, as a share of FitNet-4's 17
    epochs: int = 6,  # Epochs to train each arm
    lr: float = 0.01,  # Learning rate of SGD (the paper's first)
    mom: float = 0.9,  # Its momentum
    wd: float = 5e-4,  # Weight decay
    bs: int = 32,  # Batch size
    acts: str = ','.join(ACTIVATIONS),  # Activations to try
    inits: str = ','.join(PAPER),  # Initializations to try; PyTorch is one more
    nets: str = ','.join(NETWORKS),  # Networks to try
    order: str = 'std',  # LSUV's loops; the paper's scale alone
    margin: float = 0.1,  # A run that ends with an accuracy within this much of chance failed to converge
    seeds: int = 2,  # Runs of each arm, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    """FitNet-4 with maxout, ReLU, very leaky ReLU, tanh and sigmoid, from LSUV, orthonormal, Xavier and MSRA: accuracy, or "failed to converge".

    The paper's scale: --data cifar --size 32 --width 1 --bs 128 --epochs 230."""
    positive(size=size, width=width, depth=depth, epochs=epochs, lr=lr, bs=bs, seeds=seeds, margin=margin)
    acts,inits,nets = words('acts', acts, ACTIVATIONS), words('inits', inits, STARTS), words('nets', nets, NETWORKS)
    images = get_images(data, n=n, size=size, download=download)
    runs = Runs(images, bs, len(acts)*len(inits)*len(nets)*seeds, epochs)
    for seed in range(1, seeds + 1):
        for net in nets:
            for act in acts:
                for init in inits:
                    seeded(seed)
                    model = fitnet4(act, n_in=images.train[0].shape[1], n_out=images.classes, width=width, depth=depth, residual=net == 'residual')
                    runs.fit(dict(network=net, activation=act, init=init), seed, model, lr, [*start(model, init, order), ChannelsLast()], mom=mom, wd=wd)
    df = runs.df()
    floor = 1/images.classes + margin

    say(f'Data: {images.name}, {size} pixels a side\n'
        f'FitNet-4 of width {width:g} and depth {depth:g}, {epochs} epochs, SGD with lr {lr:g}, momentum {mom:g}, batch {bs}')
    final = df[df.epoch == epochs]
    for net in nets:
        say(f'{net}: accuracy after {epochs} epochs, %, or failed to converge (below {100*floor:.0f} %)',
            table(final[final.network == net], 'init', 'activation', 'accuracy', lambda v: cell(v, floor)))
        say(f'{net}: accuracy after the first epoch, %', table(df[(df.network == net) & (df.epoch == 1)], 'init', 'activation', 'accuracy', percent))
    save('activations', out, _picture(df, nets, acts, inits, floor), main=df)
    return df


def cell(
    accuracies: pd.Series,  # Of one arm, one a seed
    floor: float  # Below this a run failed to converge
) -> str:
    "Accuracy of the runs that converged, and how many did not."
    good = accuracies[accuracies >= floor]
    if not len(good): return 'failed'
    return percent(good) + (f' ({len(accuracies) - len(good)} failed)' if len(good) < len(accuracies) else '')


def _picture(df: pd.DataFrame, nets: list[str], acts: list[str], inits: list[str], floor: float) -> plt.Figure:
    "Accuracy by epoch: a row a network, a column an activation."
    size = 2.9*len(acts) + .6, 2.7*len(nets) + .7
    fig,axs = plt.subplots(len(nets), len(acts), figsize=size, layout='constrained', squeeze=False, sharex=True, sharey=True)
    for row, net in zip(axs, nets):
        for ax, act in zip(row, acts):
            for i, init in enumerate(inits):
                curves(ax, df[(df.network == net) & (df.activation == act) & (df.init == init)], label=init, color=f'C{i}')
            ax.axhline(floor, color='gray', lw=.8, ls=':')
            ax.set_title(f'{act}, {net}', fontsize=10)
            ax.xaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel('accuracy')
    for ax in axs[-1]: ax.set_xlabel('epoch')
    axs[0][0].set_ylim(0, 1 if df.accuracy.max() > .8 else None)
    fig.legend(*axs[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=len(inits), frameon=False)
    return fig
