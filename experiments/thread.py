"The forum thread \"LSUV Improvement?\": the statistics that each order of the loops leaves, and training from each."
from __future__ import annotations

from math import isnan

import matplotlib.pyplot as plt
import pandas as pd
from fastcore.script import call_parse

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.demo import ConvLayer, lesson11, pair
from fastai_lsuv.measure.loops import ORDERS

from .data import get_images
from .starts import STARTS, fill
from .study import OUT, Runs, band, curves, percent, positive, save, say, seeded, table

THREAD = {  # The (mean, std) pairs that its posts report
    'mean std': [(0.3387000262737274, 0.9999998807907104), (0.0426153801381588, 1.0), (0.18416695296764374, 1.0),
                 (0.17540690302848816, 0.9999998807907104), (0.313778281211853, 1.0)],
    'mean+std': [(9.123160005231057e-10, 1.0), (9.647741450180547e-08, 1.0000001192092896),
                 (1.3737007975578308e-08, 1.0), (7.55535438656807e-08, 1.0), (-1.862645149230957e-08, 1.0)],
    'mean std mean std': [(3.679674520640219e-08, 1.0), (3.466800535534276e-08, 1.0000001192092896),
                          (1.7229467630386353e-08, 1.0), (3.818422555923462e-08, 0.9999999403953552),
                          (-8.195638656616211e-08, 1.0)],
    'std mean': [(-1.9462740752373975e-08, 0.9999998807907104), (-5.321842966310442e-10, 0.9999999403953552),
                 (6.05359673500061e-09, 1.0), (-6.28642737865448e-09, 1.0),
                 (-2.421438694000244e-08, 0.9999998807907104)],
}
BEFORE = 'before LSUV'
WIDE = 34  # Characters of the printed column of our own pairs


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
    """The lesson-11 network: (mean, std) of each layer before LSUV and after each order, beside the thread's numbers.

    Then the network trains from each, as in the notebook. The activation is a plain ReLU. The start is Kaiming's with
    zero biases."""
    positive(epochs=epochs, lr=lr, bs=bs, lsuv_bs=lsuv_bs, seeds=seeds)
    images = get_images(data, n=n, size=28, download=download)
    arms = [BEFORE, *ORDERS]
    runs = Runs(images, bs, len(arms)*seeds, epochs)
    rows = []
    for seed in range(1, seeds + 1):
        for arm in arms:
            seeded(seed)
            model = lesson11(images.channels, images.classes, leak=0., sub=0.)
            fill(model, STARTS['MSRA'])
            x = images.batch(lsuv_bs, seed)
            if arm != BEFORE:
                lsuv_init(model, x, order=arm, preinit=None, modules=ConvLayer)
            rows += _rows(arm, seed, layer_stats(model, x, modules=ConvLayer).pairs)
            runs.fit(dict(order=arm), seed, model, lr, [])
    pairs,trained = pd.DataFrame(rows),runs.df()

    say(f'Data: {images.name}')
    for arm in arms:
        say(*_beside_the_thread(arm, pairs[(pairs.order == arm) & (pairs.seed == 1)]))
    distances = pd.DataFrame({
        'order': pairs.order, '|mean|': pairs['mean'].abs(), '|std - 1|': (pairs['std'] - 1).abs(),
        "thread's |mean|": pairs.thread_mean.abs()})
    largest = distances.groupby('order', sort=False).max()
    say(f'Largest over the layers and {seeds} seed{"s"*(seeds > 1)}',
        largest.map(lambda v: '' if isnan(v) else f'{v:.1e}'))
    say(f'Accuracy after each epoch, %: lr {lr:g}, batch {bs}', table(trained, 'order', 'epoch', 'accuracy', percent))
    save('thread', out, _picture(pairs, trained, arms), main=pairs, training=trained)
    return pairs


def _rows(arm: str, seed: int, pairs: list[tuple[float, float]]) -> list[dict]:
    "A row a layer, with its pair and that of the thread."
    theirs = THREAD.get(arm, [(float('nan'),)*2]*len(pairs))
    return [dict(order=arm, seed=seed, layer=k + 1, mean=mean, std=std, thread_mean=thread_mean, thread_std=thread_std)
            for k, ((mean, std), (thread_mean, thread_std)) in enumerate(zip(pairs, theirs))]


def _beside_the_thread(arm: str, pairs: pd.DataFrame) -> tuple[str, str]:
    "A title, and the pairs of one arm and seed beside those of the thread."
    ours = [pair(r.mean, r.std) for r in pairs.itertuples()]
    if arm == BEFORE: return arm, '\n'.join(ours)
    if arm not in THREAD: return f'order="{arm}" (not in the thread)', '\n'.join(ours)
    lines = [our.ljust(WIDE) + pair(*their) for our, their in zip(ours, THREAD[arm])]
    return f'order="{arm}"'.ljust(WIDE) + "the thread's", '\n'.join(lines)


def _picture(pairs: pd.DataFrame, trained: pd.DataFrame, arms: list[str]) -> plt.Figure:
    "Mean and std by layer beside those of the thread, and accuracy."
    fig,axs = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    styles = dict(zip(arms, ['-', '-', '-', '--', '-.', ':']))
    for i, arm in enumerate(arms):
        kwargs = dict(color='black' if arm == BEFORE else f'C{i - 1}', ls=styles[arm], label=arm)
        by = pairs[pairs.order == arm].groupby('layer')
        for ax, what in zip(axs, ('mean', 'std')):
            band(ax, by[what], alpha=.12, **kwargs)
        curves(axs[2], trained[trained.order == arm], **kwargs)
    for arm, theirs in THREAD.items():
        axs[0].plot(range(1, 6), [mean for mean, _ in theirs], ls='', marker='x', color=f'C{arms.index(arm) - 1}')
    for ax, title in zip(axs, ('mean of each layer (x: the thread)', 'std of each layer', 'accuracy')):
        ax.set(title=title, xlabel='epoch' if ax is axs[2] else 'layer')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=.3)
    axs[2].set_ylim(None, 1)
    fig.legend(*axs[2].get_legend_handles_labels(), loc='outside lower center', ncols=len(arms), frameon=False)
    return fig
