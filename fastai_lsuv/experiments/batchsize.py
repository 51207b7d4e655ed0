"How the scale that LSUV finds depends on the mini-batch: its size, and which images were drawn."
from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from fastai.basics import progress_bar
from fastcore.script import call_parse
from torch import nn

from .. import layer_stats, lsuv_init
from .data import InputError, get_images
from .networks import ACTIVATIONS, fitnet4
from .study import OUT, numbers, pm, positive, save, say, seeded, word

TOL = 0.1  # The paper's Tol_var: a std this close to 1 on a fresh mini-batch counts as done


@call_parse
def batchsize(
    data: str = 'digits',  # 'digits', a folder of images in train/<class>/ and test/<class>/ or of IDX files, 'mnist' or 'cifar'
    download: bool = False,  # Let fastai fetch 'mnist' or 'cifar'
    n: int = 0,  # Images to draw from; 0: all
    size: int = 16,  # Pixels a side of the images
    width: float = 0.25,  # Filters, as a share of FitNet-4's
    depth: float = 1.,  # Layers, as a share of FitNet-4's 17
    act: str = 'ReLU',  # Activation
    sizes: str = '8,16,32,64,128,256,512',  # Mini-batch sizes to try
    draws: int = 10,  # Mini-batches of each size to draw
    order: str = 'std',  # LSUV's loops; the paper's scale alone
    seeds: int = 3,  # Networks to try, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row a network, a size, a draw and a layer
    """The scale that LSUV gives each layer of FitNet-4, from mini-batches of 8 to 512 images and several draws of each.

    A draw is one mini-batch, used alone: one correcting pass from the same orthonormal weights. What it found is then
    held against images that it did not see."""
    positive(size=size, width=width, depth=depth, draws=draws, seeds=seeds)
    act,sizes = word('act', act, ACTIVATIONS), numbers('sizes', sizes, int)
    images = get_images(data, n=n, size=size, download=download)
    if max(sizes) > len(images.train[0]): raise InputError(f"--sizes: got {max(sizes)}; {images.name} gives at most {len(images.train[0])}")
    unseen,rows = images.valid[0][:512],[]
    jobs = [(seed, bs, draw) for seed in range(1, seeds + 1) for bs in sizes for draw in range(1, draws + 1)]
    for seed, bs, draw in progress_bar(jobs, leave=False):
        seeded(seed)
        model = fitnet4(act, n_in=images.train[0].shape[1], n_out=images.classes, width=width, depth=depth)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        lsuv_init(model, images.batch(bs, 1000*draw + bs), order=order)
        # Orthonormal weights have as many unit singular values as their smaller side: what they are scaled by is in their norm.
        scales = [(m.weight.norm()/min(m.weight.flatten(1).shape)**.5).item() for m in layers]
        for k, (scale, (_, std)) in enumerate(zip(scales, layer_stats(model, unseen).pairs)):
            rows.append(dict(seed=seed, size=bs, draw=draw, layer=k + 1, scale=scale, std_unseen=std))
    df = pd.DataFrame(rows)
    by = summary(df)

    say(f'Data: {images.name}, {size} pixels a side\n'
        f'FitNet-4 of width {width:g} and depth {depth:g}, {act}, {df.layer.max()} layers; {draws} mini-batches of each size, seeds 1 to {seeds}')
    shown = by.groupby('size', sort=False)[['spread', 'worst', 'bias', 'off']].agg(lambda v: pm(v, 1, 100))
    shown['within'] = [f'{100*v:.0f}' for v in by.groupby('size', sort=False).within.mean()]
    say('By mini-batch size, in %: spread of the found scale over the draws (mean over layers, and worst layer), its distance from the largest size\'s,\n'
        f'how far the std of a layer is from 1 on {len(unseen)} unseen images (mean), and how many layers are within {TOL:g} there',
        shown.set_axis(['spread', 'worst layer', 'off the largest', '|std - 1| unseen', f'within {TOL:g}'], axis=1))
    save('batchsize', out, _picture(df, by), main=df, summary=by)
    return df


def summary(
    df: pd.DataFrame  # A row a seed, size, draw and layer
) -> pd.DataFrame:  # A row a seed and a size
    "Spread over the draws as a share of the mean, distance from the largest size, and what unseen images say."
    found = df.groupby(['seed', 'size', 'layer']).scale.agg(['mean', 'std']).reset_index()
    largest = found[found['size'] == found['size'].max()].set_index(['seed', 'layer'])['mean']
    found['spread'] = found['std']/found['mean']
    found['bias'] = (found['mean']/largest.reindex(pd.MultiIndex.from_frame(found[['seed', 'layer']])).to_numpy() - 1).abs()
    by = found.groupby(['seed', 'size']).agg(spread=('spread', 'mean'), worst=('spread', 'max'), bias=('bias', 'mean'))
    off = df.assign(off=(df.std_unseen - 1).abs())
    by = by.join(off.groupby(['seed', 'size']).agg(off=('off', 'mean'), within=('off', lambda v: (v <= TOL).mean())))
    return by.reset_index()


def _picture(df: pd.DataFrame, by: pd.DataFrame) -> plt.Figure:
    "Spread by size, std on unseen images by size, and the scales of each layer."
    fig,axs = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    for what, label in (('worst', 'worst layer'), ('spread', 'mean over layers')):
        g = by.groupby('size')[what]
        line, = axs[0].plot(g.mean(), marker='o', ms=4, label=label)
        axs[0].fill_between(g.mean().index, g.min(), g.max(), alpha=.15, color=line.get_color(), lw=0)
    axs[0].set(title='spread of the found scale over draws', ylabel='std / mean', ylim=(0, None))
    groups = [(s, o.std_unseen) for s, o in df.groupby('size')]
    axs[1].boxplot([o for _, o in groups], positions=range(len(groups)), whis=(1, 99), showfliers=False, widths=.6)
    axs[1].axhspan(1 - TOL, 1 + TOL, color='C2', alpha=.15, lw=0)
    axs[1].set(title='std of the layers on unseen images', xticks=range(len(groups)), xticklabels=[s for s, _ in groups])
    axs[0].set_xscale('log', base=2)
    axs[0].set_xticks(*[[s for s, _ in groups]]*2)
    axs[0].legend()
    first = df[df.seed == df.seed.min()]
    sizes = sorted(df['size'].unique())
    for i, s in enumerate(sizes):
        g = first[first['size'] == s].groupby('layer').scale
        at = i/len(sizes)
        axs[2].errorbar(g.mean().index + .5*(at - .5), g.mean(), g.std(), ls='', marker='.', ms=4, color=plt.get_cmap('viridis')(at), label=s)
    axs[2].set(title='scale of each layer, mean and spread', xlabel='layer', ylim=(0, None))
    axs[2].xaxis.get_major_locator().set_params(integer=True)
    axs[2].legend(title='images', fontsize=7, ncols=2)
    for ax in axs: ax.grid(alpha=.3)
    for ax in axs[:2]: ax.set_xlabel('images in the mini-batch')
    return fig
