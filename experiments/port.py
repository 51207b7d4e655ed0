"The Torch port's MNIST experiment, \"All You Need is a Good Init\" (yobibyte, 2016)."
from __future__ import annotations

from functools import partial
from itertools import product
from math import sqrt

import matplotlib.pyplot as plt
import pandas as pd
from fastcore.script import call_parse
from torch import nn

from fastai_lsuv import LSUVCallback

from .data import InputError, get_images
from .networks import torch_port
from .starts import fill
from .study import OUT, Runs, curves, numbers, percent, positive, save, say, seeded, table

WITH,WITHOUT = ARMS = 'with LSUV', 'without LSUV'
PORT = {  # Its table: accuracy by epoch, %
    (WITH, 0.1): [97.77, 98.45, 98.63, 98.74, 98.88, 98.97, 99.03, 99.01, 99.01, 98.96],
    (WITH, 0.05): [96.69, 97.94, 98.37, 98.57, 98.72, 98.75, 98.86, 98.86, 98.9, 98.91],
    (WITHOUT, 0.001): [83.39, 89.25, 91.23, 92.46, 93.23, 93.88, 94.44, 94.81, 95.03, 95.29],
    (WITH, 0.001): [78.28, 87.75, 91.19, 92.82, 93.81, 94.53, 95.06, 95.4, 95.87, 96.15],
}
TOL = 1.1**0.5 - 1  # The port's tolerance of 0.1 is for the variance; ours is for the std


@call_parse
def port(
    data: str = 'digits',  # 'digits', a folder of MNIST's IDX files, or 'mnist'
    download: bool = False,  # Let fastai fetch 'mnist'
    n: int = 0,  # Images to train on; 0: all
    epochs: int = 10,  # Epochs to train each arm
    lrs: str = '0.1,0.05,0.001',  # Learning rates of plain SGD, separated by commas
    bs: int = 100,  # Batch size, of training and of each of LSUV's mini-batches
    seeds: int = 3,  # Runs of each arm, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    """The Torch port's network on MNIST by plain SGD, with LSUV and without.

    Both start from the same orthogonal weights with ReLU gain. LSUV is Algorithm 1 as the port ran it: at most 10
    iterations, a fresh mini-batch each time, variance over the whole mini-batch, tolerance 0.1."""
    positive(epochs=epochs, bs=bs, seeds=seeds)
    images = get_images(data, n=n, size=32, download=download)
    rates = numbers('lrs', lrs)
    if images.channels != 1:
        raise InputError(f"--data: {images.name} has {images.channels} channels; the port's network takes grey images")
    jobs = list(product(range(1, seeds + 1), rates, ARMS))
    runs,took = Runs(images, bs, len(jobs), epochs),[]
    for seed, lr, arm in jobs:
        seeded(seed)
        model = torch_port(images.classes)
        # The port's `nninit` makes the weights orthogonal and leaves the biases.
        fill(model, partial(nn.init.orthogonal_, gain=sqrt(2)), zero_bias=False)
        cbs = []
        if arm == WITH:
            cbs = [LSUVCallback(order='std', preinit=None, tol=TOL, batch_tol=TOL, max_iter=10, min_samples=1)]
        learn = runs.fit(dict(arm=arm, lr=lr), seed, model, lr, cbs)
        if arm == WITH:
            took.append(learn.lsuv.report.n_passes)
    df = runs.df()
    df['document'] = [_document(r.arm, r.lr, r.epoch) for r in df.itertuples()]

    _report(df, images.name, took)
    save('port', out, _picture(df, rates), main=df)
    return df


def _report(
    df: pd.DataFrame,
    name: str,  # Of the data
    took: list[int]  # Mini-batches that each run of LSUV took
) -> None:
    "Print the tables."
    seeds = df.seed.nunique()
    say(f'Data: {name}')
    used = ' to '.join(str(n) for n in sorted({min(took), max(took)}))
    print(f'LSUV took {used} mini-batches. It stopped when every layer was within its tolerance, or at the limit.')
    ours = table(df.assign(arm=df.arm + df.lr.map(', lr {:g}'.format)), 'epoch', 'arm', 'accuracy', percent)
    say(f'Accuracy, %, mean{" and spread" if seeds > 1 else ""} over {seeds} seed{"s"*(seeds > 1)}', ours)
    theirs = {f'{arm}, lr {lr:g}': accs for (arm, lr), accs in PORT.items()}
    say("The document's accuracy with 60,000 images to train on, %",
        pd.DataFrame(theirs, index=pd.RangeIndex(1, 11, name='epoch')))
    by_arm = df.pivot_table(index=['lr', 'seed', 'epoch'], columns='arm', values='accuracy')
    ahead = 100*(by_arm[WITH] - by_arm[WITHOUT]).rename('ahead')
    ahead = ahead.reset_index().sort_values(['lr', 'epoch'], ascending=[False, True])
    say('LSUV ahead of the same start without it, points, by epoch',
        table(ahead, 'lr', 'epoch', 'ahead', lambda v: f'{v.mean():+.1f}'))


def _document(arm: str, lr: float, epoch: int) -> float:
    "The accuracy in the document, or NaN if it gives none."
    accs = PORT.get((arm, lr), ())
    return accs[epoch - 1]/100 if epoch <= len(accs) else float('nan')


def _picture(df: pd.DataFrame, rates: list[float]) -> plt.Figure:
    "Accuracy by epoch at each learning rate. The document's curves are dashed."
    fig,axs = plt.subplots(1, len(rates), figsize=(4.4*len(rates), 4), layout='constrained', squeeze=False)
    for ax, lr in zip(axs[0], rates):
        for arm, color in zip(ARMS, ('C0', 'black')):
            of = df[(df.arm == arm) & (df.lr == lr)]
            curves(ax, of, color=color, label=arm)
            if of.document.notna().any():
                ax.plot(of.groupby('epoch').document.mean(), color=color, ls='--', lw=1, label=f'{arm}, the document')
        ax.set(title=f'lr {lr:g}', xlabel='epoch', ylabel='accuracy')
        ax.xaxis.get_major_locator().set_params(integer=True)
    named = {label: handle for ax in axs[0] for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(named.values(), named, loc='outside lower center', ncols=2 if len(rates) < 3 else 4, frameon=False)
    return fig
