"How deep a plain ReLU network without normalization still trains."
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
from fastcore.meta import delegates
from fastcore.script import call_parse

from fastai_lsuv.measure.loops import ORDERS

from .networks import deep_relu
from .options import ImageOptions
from .starts import STARTS, start
from .study import Runs, band, numbers, percent, positive, save, say, seeded, table, words


@call_parse
@delegates(ImageOptions)
def depth(
    depths: str = '10,20,50,100,200',  # Linear layers to try
    width: int = 64,  # Units of each hidden layer
    inits: str = 'PyTorch,MSRA,orthonormal,LSUV',  # Starts to try; Xavier is one more
    orders: str = 'std,std mean',  # LSUV's loops, each order an arm
    lrs: str = '0.01,0.001',  # Learning rates of SGD to try; the best one counts for each start and depth
    size: int = 8,  # Pixels a side of the images
    bs: int = 64,  # Batch size
    epochs: int = 10,  # Epochs to train each arm
    seeds: int = 2,  # Runs of each arm, from seeds 1, 2, ...
    **kwargs
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    """Plain ReLU networks of 10 to 200 layers from several starts, each at its best learning rate.

    The starts are PyTorch's default, MSRA, orthonormal, LSUV, and LSUV from weights in pairs (`mirrored`)."""
    options = ImageOptions(size=size, bs=bs, **kwargs)
    positive(width=width, epochs=epochs, seeds=seeds)
    deep,inits,rates = numbers('depths', depths, int), words('inits', inits, STARTS), numbers('lrs', lrs)
    arms = {init: (init,) for init in inits if init != 'LSUV'}  # What `start` takes after the model
    if 'LSUV' in inits:
        arms |= {f'LSUV "{order}"': ('LSUV', order) for order in words('orders', orders, ORDERS)}
        arms['LSUV "std", mirrored'] = ('LSUV', 'std', True)
    images = options.images()
    jobs = list(product(range(1, seeds + 1), deep, arms, rates))
    runs = Runs(images, bs, len(jobs), epochs)
    for seed, layers, arm, lr in jobs:
        seeded(seed)
        model = deep_relu(layers, images.train[0][0].numel(), images.classes, width)
        cbs = start(model, *arms[arm])
        runs.fit(dict(init=arm, depth=layers, lr=lr), seed, model, lr, cbs, mom=options.mom)
    df = runs.df()
    final = best(df[df.epoch == epochs])

    say(f'Data: {images.name}, {size} pixels a side; {width} units a layer, {epochs} epochs, '
        f'chance is {100/images.classes:.0f} %')
    say(f'Accuracy after {epochs} epochs at the best of {len(rates)} learning rates, %, by depth',
        table(final, 'init', 'depth', 'accuracy', percent))
    say('That learning rate', table(final, 'init', 'depth', 'lr', lambda v: f'{v.iloc[0]:g}'))
    save('depth', options.out, _picture(final, images.classes), main=df)
    return df


def best(
    final: pd.DataFrame  # A row a start, a depth, a learning rate and a seed
) -> pd.DataFrame:
    "The rows of each start and depth at its best learning rate. The mean over the seeds decides."
    mean = final.groupby(['init', 'depth', 'lr'], sort=False).accuracy.mean()
    which = mean.groupby(['init', 'depth'], sort=False).idxmax()
    return final[pd.MultiIndex.from_frame(final[['init', 'depth', 'lr']]).isin(which)]


def _picture(final: pd.DataFrame, classes: int) -> plt.Figure:
    "Accuracy by depth."
    fig,ax = plt.subplots(figsize=(8.6, 4.2), layout='constrained')
    for i, (init, of) in enumerate(final.groupby('init', sort=False)):
        band(ax, of.groupby('depth').accuracy, alpha=.15, color=f'C{i}', label=init, ms=4)
    ax.axhline(1/classes, color='gray', lw=.8, ls=':')
    at = sorted(final.depth.unique())
    ax.set(xscale='log', xlabel='layers', ylabel='accuracy', ylim=(0, 1),
           title='plain ReLU networks, best learning rate of each')
    ax.set_xticks(at, at)
    ax.minorticks_off()
    ax.grid(alpha=.3)
    fig.legend(loc='outside right center', frameon=False)
    return fig
