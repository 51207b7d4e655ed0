"How deep a plain ReLU network without normalization still trains."
from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from fastcore.script import call_parse

from ..loops import ORDERS
from .data import get_images
from .networks import deep_relu
from .starts import STARTS, start
from .study import OUT, Runs, numbers, percent, positive, save, say, seeded, table, words


@call_parse
def depth(
    data: str = 'digits',  # 'digits', a folder of images in train/<class>/ and test/<class>/ or of IDX files, 'mnist' or 'cifar'
    download: bool = False,  # Let fastai fetch 'mnist' or 'cifar'
    n: int = 0,  # Images to train on, and a quarter as many to test; 0: all
    size: int = 8,  # Pixels a side of the images
    width: int = 64,  # Units of each hidden layer
    depths: str = '10,20,50,100,200',  # Linear layers to try
    inits: str = 'PyTorch,MSRA,orthonormal,LSUV',  # Starts to try; Xavier is one more
    lrs: str = '0.01,0.001',  # Learning rates of SGD to try: each start and depth is judged by its best
    mom: float = 0.9,  # Momentum
    epochs: int = 10,  # Epochs to train each arm
    bs: int = 64,  # Batch size
    orders: str = 'std,std mean',  # LSUV's loops, each order an arm
    seeds: int = 2,  # Runs of each arm, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    "Plain ReLU networks of 10 to 200 layers from PyTorch's default start, MSRA, orthonormal and LSUV, each at the best of several learning rates."
    positive(size=size, width=width, epochs=epochs, bs=bs, seeds=seeds)
    deep,inits,rates = numbers('depths', depths, int), words('inits', inits, STARTS), numbers('lrs', lrs)
    arms = {init: (init,) for init in inits if init != 'LSUV'}  # What `start` takes after the model
    if 'LSUV' in inits: arms |= {f'LSUV "{order}"': ('LSUV', order) for order in words('orders', orders, ORDERS)}
    images = get_images(data, n=n, size=size, download=download)
    runs = Runs(images, bs, len(deep)*len(arms)*len(rates)*seeds, epochs)
    for seed in range(1, seeds + 1):
        for d in deep:
            for arm, first in arms.items():
                for lr in rates:
                    seeded(seed)
                    model = deep_relu(d, images.train[0][0].numel(), images.classes, width)
                    runs.fit(dict(init=arm, depth=d, lr=lr), seed, model, lr, start(model, *first), mom=mom)
    df = runs.df()
    final = best(df[df.epoch == epochs])

    say(f'Data: {images.name}, {size} pixels a side; {width} units a layer, {epochs} epochs, chance is {100/images.classes:.0f} %')
    say(f'Accuracy after {epochs} epochs at the best of {len(rates)} learning rates, %, by depth', table(final, 'init', 'depth', 'accuracy', percent))
    say('That learning rate', table(final, 'init', 'depth', 'lr', lambda v: f'{v.iloc[0]:g}'))
    save('depth', out, _picture(final, images.classes), main=df)
    return df


def best(
    final: pd.DataFrame  # A row a start, a depth, a learning rate and a seed
) -> pd.DataFrame:
    "The rows of each start and depth at the learning rate that is best on the mean over the seeds."
    mean = final.groupby(['init', 'depth', 'lr'], sort=False).accuracy.mean()
    which = mean.groupby(['init', 'depth'], sort=False).idxmax()
    return final[pd.MultiIndex.from_frame(final[['init', 'depth', 'lr']]).isin(which)]


def _picture(final: pd.DataFrame, classes: int) -> plt.Figure:
    "Accuracy by depth."
    fig,ax = plt.subplots(figsize=(7, 4.2), layout='constrained')
    for i, (init, of) in enumerate(final.groupby('init', sort=False)):
        by = of.groupby('depth').accuracy
        ax.plot(by.mean(), marker='o', ms=4, color=f'C{i}', label=init)
        ax.fill_between(by.mean().index, by.min(), by.max(), color=f'C{i}', alpha=.15, lw=0)
    ax.axhline(1/classes, color='gray', lw=.8, ls=':')
    at = sorted(final.depth.unique())
    ax.set(xscale='log', xlabel='layers', ylabel='accuracy', ylim=(0, 1), title='plain ReLU networks, best learning rate of each')
    ax.set_xticks(at, at)
    ax.minorticks_off()
    ax.grid(alpha=.3)
    ax.legend()
    return fig
