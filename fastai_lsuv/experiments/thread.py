"The forum thread \"LSUV Improvement?\": what each order of the loops leaves, and how each trains."
from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from fastcore.script import call_parse

from .. import layer_stats, lsuv_init
from ..loops import ORDERS
from .data import get_images
from .networks import ConvLayer, lesson11
from .starts import STARTS, fill
from .study import OUT, Runs, curves, percent, positive, save, say, seeded, table

THREAD = {  # The (mean, std) pairs that its posts report
    'mean std': [(0.3387000262737274, 0.9999998807907104), (0.0426153801381588, 1.0), (0.18416695296764374, 1.0),
                 (0.17540690302848816, 0.9999998807907104), (0.313778281211853, 1.0)],
    'mean+std': [(9.123160005231057e-10, 1.0), (9.647741450180547e-08, 1.0000001192092896), (1.3737007975578308e-08, 1.0),
                 (7.55535438656807e-08, 1.0), (-1.862645149230957e-08, 1.0)],
    'mean std mean std': [(3.679674520640219e-08, 1.0), (3.466800535534276e-08, 1.0000001192092896), (1.7229467630386353e-08, 1.0),
                          (3.818422555923462e-08, 0.9999999403953552), (-8.195638656616211e-08, 1.0)],
    'std mean': [(-1.9462740752373975e-08, 0.9999998807907104), (-5.321842966310442e-10, 0.9999999403953552), (6.05359673500061e-09, 1.0),
                 (-6.28642737865448e-09, 1.0), (-2.421438694000244e-08, 0.9999998807907104)],
}
BEFORE = 'before LSUV'


@call_parse
def thread(
    data: str = 'digits',  # 'digits', a folder of MNIST's IDX files, or 'mnist'
    download: bool = False,  # Let fastai fetch 'mnist'
    n: int = 0,  # Images to train on; 0: all
    epochs: int = 2,  # Epochs to train from each order
    lr: float = 0.2,  # Learning rate of plain SGD (the notebook: 0.6 with batches of 512)
    bs: int = 64,  # Batch size in training
    lsuv_bs: int = 512,  # Images in the mini-batch that LSUV uses
    seeds: int = 3,  # Runs of each order, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row an order, a seed and a layer
    """The lesson-11 network: (mean, std) of each layer before LSUV and after each order, beside the thread's own numbers.

    Then it is trained from each, as the notebook does. As in the notebook the activation is a plain ReLU, and the start Kaiming's with zero biases."""
    positive(epochs=epochs, lr=lr, bs=bs, lsuv_bs=lsuv_bs, seeds=seeds)
    images = get_images(data, n=n, size=28, download=download)
    arms = [BEFORE, *ORDERS]
    pairs,runs = [],Runs(images, bs, len(arms)*seeds, epochs)
    for seed in range(1, seeds + 1):
        for arm in arms:
            seeded(seed)
            model = lesson11(images.train[0].shape[1], images.classes, leak=0., sub=0.)
            fill(model, STARTS['MSRA'])
            x = images.batch(lsuv_bs, seed)
            if arm != BEFORE: lsuv_init(model, x, order=arm, preinit=None, modules=ConvLayer)
            for k, (mean, std) in enumerate(layer_stats(model, x, modules=ConvLayer).pairs):
                theirs = THREAD.get(arm, [(float('nan'),)*2]*5)[k]
                pairs.append(dict(order=arm, seed=seed, layer=k + 1, mean=mean, std=std, thread_mean=theirs[0], thread_std=theirs[1]))
            runs.fit(dict(order=arm), seed, model, lr, [])
    pairs,trained = pd.DataFrame(pairs),runs.df()

    say(f'Data: {images.name}')
    for arm in arms:
        of = pairs[(pairs.order == arm) & (pairs.seed == 1)]
        def pair(mean, std): return '' if mean != mean else f'({mean:.10g}, {std:.10g})'
        lines = [pair(r.mean, r.std).ljust(40) + pair(r.thread_mean, r.thread_std) for r in of.itertuples(index=False)]
        title = arm if arm == BEFORE else f'order="{arm}"'.ljust(40) + "the thread's" if arm in THREAD else f'order="{arm}" (not in the thread)'
        say(title, '\n'.join(line.rstrip() for line in lines))
    off = pairs.assign(**{'|mean|': pairs['mean'].abs(), '|std - 1|': (pairs['std'] - 1).abs(), "thread's |mean|": pairs.thread_mean.abs()})
    largest = off.groupby('order', sort=False)[['|mean|', '|std - 1|', "thread's |mean|"]].max()
    say(f'Largest over the layers and {seeds} seed{"s"*(seeds > 1)}', largest.map(lambda v: '' if v != v else f'{v:.1e}'))
    say(f'Accuracy after each epoch, %: lr {lr:g}, batch {bs}', table(trained, 'order', 'epoch', 'accuracy', percent))
    save('thread', out, _picture(pairs, trained, arms), main=pairs, training=trained)
    return pairs


def _picture(pairs: pd.DataFrame, trained: pd.DataFrame, arms: list[str]) -> plt.Figure:
    "Mean and std by layer beside the thread's, and accuracy."
    fig,axs = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    styles = dict(zip(arms, ['-', '-', '-', '--', '-.', ':']))
    for i, arm in enumerate(arms):
        kwargs = dict(color='black' if arm == BEFORE else f'C{i - 1}', ls=styles[arm], label=arm)
        by = pairs[pairs.order == arm].groupby('layer')
        for ax, what in zip(axs, ('mean', 'std')):
            ax.plot(by[what].mean(), marker='o', ms=3, **kwargs)
            ax.fill_between(by[what].mean().index, by[what].min(), by[what].max(), color=kwargs['color'], alpha=.12, lw=0)
        curves(axs[2], trained[trained.order == arm], **kwargs)
    for arm in THREAD:
        axs[0].plot(range(1, 6), [m for m, _ in THREAD[arm]], ls='', marker='x', color=f'C{arms.index(arm) - 1}')
    for ax, title in zip(axs, ('mean of each layer (x: the thread)', 'std of each layer', 'accuracy')):
        ax.set(title=title, xlabel='epoch' if ax is axs[2] else 'layer')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=.3)
    axs[2].set_ylim(None, 1)
    fig.legend(*axs[2].get_legend_handles_labels(), loc='outside lower center', ncols=len(arms), frameon=False)
    return fig
