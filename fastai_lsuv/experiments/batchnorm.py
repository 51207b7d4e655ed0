"LSUV against batch norm: accuracy by epoch and by wall time, and what a step costs."
from __future__ import annotations

import time

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.basics import default_device, progress_bar
from fastai.callback.channelslast import ChannelsLast
from fastcore.script import call_parse
from torch import Tensor, nn

from .data import get_images
from .networks import ACTIVATIONS, fitnet4
from .starts import STARTS, start
from .study import OUT, Runs, curves, percent, pm, positive, save, say, seeded, table, word

ARMS = {'LSUV': (True, False), 'batch norm': (False, True), 'neither': (False, False)}  # Whether with LSUV, whether with batch norm


@call_parse
def batchnorm(
    data: str = 'digits',  # 'digits', a folder of images in train/<class>/ and test/<class>/ or of IDX files, 'mnist' or 'cifar'
    download: bool = False,  # Let fastai fetch 'mnist' or 'cifar'
    n: int = 0,  # Images to train on, and a quarter as many to test; 0: all
    size: int = 16,  # Pixels a side of the images
    width: float = 0.25,  # Filters, as a share of FitNet-4's
    depth: float = 1.,  # Layers, as a share of FitNet-4's 17
    act: str = 'ReLU',  # Activation
    init: str = 'Xavier',  # Standard start of the two other arms: Xavier, MSRA, orthonormal or PyTorch
    epochs: int = 10,  # Epochs to train each arm
    lr: float = 0.01,  # Learning rate of SGD
    mom: float = 0.9,  # Its momentum
    wd: float = 5e-4,  # Weight decay
    bs: int = 32,  # Batch size
    order: str = 'std',  # LSUV's loops; the paper's scale alone
    rounds: int = 30,  # Steps of each arm to time, in turns
    seeds: int = 3,  # Runs of each arm, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    """FitNet-4 with LSUV, with batch norm from a standard start, and with neither: accuracy against epochs and wall time, and the cost of a step.

    The paper's scale: --data cifar --size 32 --width 1 --bs 128 --epochs 230."""
    positive(size=size, width=width, depth=depth, epochs=epochs, lr=lr, bs=bs, seeds=seeds, rounds=rounds)
    act,init = word('act', act, ACTIVATIONS), word('init', init, [s for s in STARTS if s != 'LSUV'])
    images = get_images(data, n=n, size=size, download=download)
    def network(norm): return fitnet4(act, n_in=images.train[0].shape[1], n_out=images.classes, width=width, depth=depth, norm=norm)
    runs = Runs(images, bs, len(ARMS)*seeds, epochs)
    for seed in range(1, seeds + 1):
        for arm, (lsuv, norm) in ARMS.items():
            seeded(seed)
            model = network(norm)
            runs.fit(dict(arm=arm), seed, model, lr, [*start(model, 'LSUV' if lsuv else init, order), ChannelsLast()], mom=mom, wd=wd)
    df = runs.df()
    steps = step_cost({name: network(norm) for name, norm in (('without batch norm', False), ('with batch norm', True))},
                      images.train[0][:bs], images.train[1][:bs], rounds)

    say(f'Data: {images.name}, {size} pixels a side\nFitNet-4 of width {width:g} and depth {depth:g}, {act}; the two other arms start from {init}')
    at = sorted({1, 2, 5, 10, 20, 50, 100, epochs} & set(range(1, epochs + 1)))
    say('Accuracy after each epoch, %', table(df[df.epoch.isin(at)], 'arm', 'epoch', 'accuracy', percent))
    say('Seconds of training for all epochs, LSUV itself included', df[df.epoch == epochs].groupby('arm', sort=False).seconds.apply(lambda v: pm(v, 1)))
    took = steps.groupby('network', sort=False).seconds.median()
    say('Milliseconds a training step takes, median', took.mul(1e3).round(2))
    print(f"Batch norm adds {100*(took['with batch norm']/took['without batch norm'] - 1):.0f} % to a step (the paper: 30 %)")
    save('batchnorm', out, _picture(df, took), main=df, steps=steps)
    return df


def step_cost(
    models: dict[str, nn.Module],
    x: Tensor, y: Tensor,  # The mini-batch
    rounds: int  # Steps of each model, in turns so that the machine treats all alike
) -> pd.DataFrame:  # A row a model and a round
    "Seconds that a training step takes: forward, backward and SGD."
    device,rows = default_device(),[]
    x,y = x.to(device, memory_format=torch.channels_last),y.to(device)
    opts = {name: torch.optim.SGD(m.to(device, memory_format=torch.channels_last).train().parameters(), 1e-3, momentum=0.9) for name, m in models.items()}
    def step(name):
        F.cross_entropy(models[name](x), y).backward()
        opts[name].step()
        opts[name].zero_grad()
        if x.is_cuda: torch.cuda.synchronize()
    for k in progress_bar(range(-2, rounds), leave=False):  # two to warm up
        for name in models:
            began = time.perf_counter()
            step(name)
            if k >= 0: rows.append(dict(network=name, round=k + 1, seconds=time.perf_counter() - began))
    return pd.DataFrame(rows)


def _picture(df: pd.DataFrame, took: pd.Series) -> plt.Figure:
    "Accuracy by epoch, by wall time, and the cost of a step."
    fig,axs = plt.subplots(1, 3, figsize=(13, 4), layout='constrained', width_ratios=[1, 1, .55])
    for ax, x in zip(axs, ('epoch', 'seconds')):
        for arm, color in zip(ARMS, ('C0', 'C1', 'black')): curves(ax, df[df.arm == arm], x, label=arm, color=color)
        ax.set(title=f'accuracy by {"epoch" if x == "epoch" else "wall time"}', xlabel=x, ylim=(0, None))
    axs[0].xaxis.get_major_locator().set_params(integer=True)
    axs[0].legend(loc='lower right')
    bars = axs[2].bar(['without', 'with'], [1e3*took['without batch norm'], 1e3*took['with batch norm']], color=['C0', 'C1'], width=.6)
    axs[2].bar_label(bars, fmt='%.1f')
    axs[2].set(title='milliseconds a step', xlabel='batch norm')
    return fig
