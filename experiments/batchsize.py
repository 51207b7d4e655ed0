"How the scale that LSUV finds depends on the mini-batch: on its size, and on the images drawn."
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
from fastai.basics import progress_bar
from fastcore.meta import delegates
from fastcore.script import call_parse
from torch import Tensor, nn

from fastai_lsuv import layer_stats, lsuv_init

from .data import InputError
from .networks import ACTIVATIONS
from .options import FitNetOptions
from .study import band, numbers, pm, positive, save, say, seeded, word

TOL = 0.1  # The paper's Tol_var: on a fresh mini-batch, a std this close to 1 is close enough


@call_parse
@delegates(FitNetOptions, but='n,bs,mom,lr,wd')
def batchsize(
    n: int = 0,  # Images to draw from; 0: all
    act: str = 'ReLU',  # Activation
    sizes: str = '8,16,32,64,128,256,512',  # Mini-batch sizes to try
    draws: int = 10,  # Mini-batches of each size to draw
    seeds: int = 3,  # Networks to try, from seeds 1, 2, ...
    **kwargs
) -> pd.DataFrame:  # A row a network, a size, a draw and a layer
    """The scale that LSUV gives each layer of FitNet-4, from mini-batches of 8 to 512 images.

    Each size is drawn several times. A draw is one mini-batch, used alone: one correcting pass from the same
    orthonormal weights. Images that LSUV did not see then judge the scale."""
    options = FitNetOptions(n=n, **kwargs)
    positive(draws=draws, seeds=seeds)
    act,sizes = word('act', act, ACTIVATIONS), numbers('sizes', sizes, int)
    images = options.images()
    most = len(images.train[0])
    if max(sizes) > most: raise InputError(f"--sizes: got {max(sizes)}; {images.name} gives at most {most}")
    unseen,rows = images.valid[0][:512],[]
    jobs = list(product(range(1, seeds + 1), sizes, range(1, draws + 1)))
    for seed, bs, draw in progress_bar(jobs, leave=False):
        seeded(seed)
        model = options.network(images, act)
        found = scales(model, images.batch(bs, 1000*draw + bs), options.order)
        for k, (scale, (_, std)) in enumerate(zip(found, layer_stats(model, unseen).pairs)):
            rows.append(dict(seed=seed, size=bs, draw=draw, layer=k + 1, scale=scale, std_unseen=std))
    df = pd.DataFrame(rows)
    by = summary(df)

    say(f'Data: {images.name}, {options.size} pixels a side\n'
        f'FitNet-4 of width {options.width:g} and depth {options.depth:g}, {act}, {df.layer.max()} layers; '
        f'{draws} mini-batches of each size, seeds 1 to {seeds}')
    say('By mini-batch size, in %:\n'
        'the spread of the scale over the draws (mean over layers, and worst layer),\n'
        'the distance of the scale from that of the largest size,\n'
        f'the distance of the std of a layer from 1 on {len(unseen)} unseen images (mean),\n'
        f'and the share of the layers within {TOL:g} there',
        _table(by))
    save('batchsize', options.out, _picture(df, by), main=df, summary=by)
    return df


def scales(
    model: nn.Module,
    x: Tensor,  # The mini-batch
    order: str  # Of LSUV's loops
) -> list[float]:  # One a layer
    "Run LSUV and give the factor by which it scales the orthonormal weight of each layer."
    lsuv_init(model, x, order=order)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    # An orthonormal weight has as many singular values of 1 as its smaller side. So its norm gives its scale.
    return [(w.norm()/min(w.flatten(1).shape)**.5).item() for w in weights]


def summary(
    df: pd.DataFrame  # A row a seed, size, draw and layer
) -> pd.DataFrame:  # A row a seed and a size
    """The spread over the draws, the distance from the largest size, and the std on unseen images.

    The spread is a share of the mean."""
    found = df.groupby(['seed', 'size', 'layer']).scale.agg(['mean', 'std']).reset_index()
    largest = found[found['size'] == found['size'].max()].set_index(['seed', 'layer'])['mean']
    reference = largest.reindex(pd.MultiIndex.from_frame(found[['seed', 'layer']])).to_numpy()
    found['spread'] = found['std']/found['mean']
    found['bias'] = (found['mean']/reference - 1).abs()
    by = found.groupby(['seed', 'size']).agg(spread=('spread', 'mean'), worst=('spread', 'max'), bias=('bias', 'mean'))
    off = df.assign(off=(df.std_unseen - 1).abs()).groupby(['seed', 'size'])
    by = by.join(off.agg(off=('off', 'mean'), within=('off', lambda v: (v <= TOL).mean())))
    return by.reset_index()


def _table(by: pd.DataFrame) -> pd.DataFrame:
    "The summary in percent, a row a size."
    by_size = by.groupby('size', sort=False)
    shown = by_size[['spread', 'worst', 'bias', 'off']].agg(lambda v: pm(v, 1, 100))
    shown['within'] = [f'{100*v:.0f}' for v in by_size.within.mean()]
    return shown.set_axis(['spread', 'worst layer', 'off the largest', '|std - 1| unseen', f'within {TOL:g}'], axis=1)


def _picture(df: pd.DataFrame, by: pd.DataFrame) -> plt.Figure:
    "Spread by size, std on unseen images by size, and the scales of each layer."
    fig,axs = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    sizes = sorted(df['size'].unique())
    for what, label in (('worst', 'worst layer'), ('spread', 'mean over layers')):
        band(axs[0], by.groupby('size')[what], alpha=.15, label=label, ms=4)
    axs[0].set(title='spread of the found scale over draws', ylabel='std / mean', ylim=(0, None))
    axs[0].set_xscale('log', base=2)
    axs[0].set_xticks(sizes, sizes)
    axs[0].legend()

    at = range(len(sizes))
    unseen = [df[df['size'] == s].std_unseen for s in sizes]
    axs[1].boxplot(unseen, positions=at, whis=(1, 99), showfliers=False, widths=.6)
    axs[1].axhspan(1 - TOL, 1 + TOL, color='C2', alpha=.15, lw=0)
    axs[1].set(title='std of the layers on unseen images', xticks=at, xticklabels=sizes)

    first = df[df.seed == df.seed.min()]
    for i, s in enumerate(sizes):
        share = i/len(sizes)
        of = first[first['size'] == s].groupby('layer').scale
        axs[2].errorbar(of.mean().index + .5*(share - .5), of.mean(), of.std(), ls='', marker='.', ms=4,
                        color=plt.get_cmap('viridis')(share), label=s)
    axs[2].set(title='scale of each layer, mean and spread', xlabel='layer', ylim=(0, None))
    axs[2].xaxis.get_major_locator().set_params(integer=True)
    axs[2].legend(title='images', fontsize=7, ncols=2)
    for ax in axs:
        ax.grid(alpha=.3)
    for ax in axs[:2]:
        ax.set_xlabel('images in the mini-batch')
    return fig
