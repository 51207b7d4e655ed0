"LSUV against batch norm: accuracy by epoch and by wall time, and the cost of a step."
import time

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.basics import default_device, progress_bar
from fastcore.meta import delegates
from fastcore.script import call_parse
from torch import Tensor, nn

from .networks import ACTIVATIONS
from .options import FitNetOptions
from .starts import STARTS
from .study import Runs, curves, numbers, percent, pm, positive, save, say, seeded, table, word, words

MIRRORED = 'LSUV mirrored'  # From `mirrored` weights, which suit ReLU
ARMS = {'LSUV': False, 'batch norm': True, 'neither': False, MIRRORED: False}  # With batch norm?
USUAL = 'LSUV,batch norm,neither'
EPOCHS = dict(small=10, quarter=60, paper=230)  # By scale
DROPS = dict(quarter='26,39,52', paper='100,150,200')  # The paper's, at the same shares of the epochs
# Options that a scale sets
SCALES = dict(small={}, quarter=dict(size=32, width=.25, bs=128, augment=True), paper=dict(size=32, width=1., bs=128))
SHOWN = {1, 2, 5, 10, 20, 50, 100}  # Epochs in the printed table, beside the last
WITH,WITHOUT = 'with batch norm', 'without batch norm'


@call_parse
@delegates(FitNetOptions)
def batchnorm(
    act: str = 'ReLU',  # Activation
    init: str = 'Xavier',  # Standard start of the arms without LSUV: Xavier, MSRA, orthonormal or PyTorch
    rounds: int = 30,  # Steps of each arm to time, in turns
    epochs: int = 0,  # Epochs to train each arm; 0: those of the scale, 10, 60 or 230
    seeds: int = 3,  # Runs of each arm, from seeds 1, 2, ...
    arms: str = USUAL,  # Arms to train; one more is 'LSUV mirrored'
    scale: str = 'small',  # 'paper' sets size, width, bs and drops; 'quarter' does for a quarter of the filters
    drops: str = '',  # Epochs after which the learning rate falls to a tenth, separated by commas
    checkpoints: str = '',  # Folder of checkpoints, one an arm and seed: a second start goes on from them; '': none
    **kwargs
) -> pd.DataFrame:  # A row an arm, a seed and an epoch
    """FitNet-4 with LSUV, with batch norm, and with neither: accuracy by epoch and wall time, and the cost of a step.

    The arms without LSUV begin from a standard start. The paper's run, which can be stopped and started again:
    --scale paper --data cifar --checkpoints FOLDER. With --epochs it stops early on the same schedule. `--scale
    quarter` has a quarter of the filters, 60 epochs, and flips and shifts the images."""
    scale = word('scale', scale, EPOCHS)
    kwargs |= SCALES[scale]
    drops = DROPS.get(scale, drops)
    options = FitNetOptions(**kwargs)
    epochs = epochs or EPOCHS[scale]
    positive(epochs=epochs, seeds=seeds, rounds=rounds)
    chosen = {arm: ARMS[arm] for arm in words('arms', arms, ARMS)}
    falls = numbers('drops', drops, int) if drops else []
    act = word('act', act, ACTIVATIONS)
    init = word('init', init, [s for s in STARTS if s != 'LSUV'])
    images = options.images()
    runs = Runs(images, options.bs, len(chosen)*seeds, epochs, falls, checkpoints)
    for seed in range(1, seeds + 1):
        for arm, norm in chosen.items():
            seeded(seed)
            model = options.network(images, act, norm=norm)
            first = 'LSUV' if arm.startswith('LSUV') else init
            options.train(runs, dict(arm=arm), seed, model, first, pairs=arm == MIRRORED)
    df = runs.df()
    models = {name: options.network(images, act, norm=norm) for name, norm in ((WITHOUT, False), (WITH, True))}
    x,y = images.train
    steps = step_cost(models, x[:options.bs], y[:options.bs], rounds)

    say(f'Data: {images.name}, {options.size} pixels a side\n'
        f'FitNet-4 of width {options.width:g} and depth {options.depth:g}, {act}; '
        f'arms without LSUV start from {init}')
    took = _report(df, steps, epochs)
    save('batchnorm', options.out, _picture(df, took), main=df, steps=steps)
    return df


def _report(df: pd.DataFrame, steps: pd.DataFrame, epochs: int) -> pd.Series:  # Seconds of a step, by network
    "Print the tables."
    shown = df[df.epoch.isin({*SHOWN, epochs})]
    say('Accuracy after each epoch, %', table(shown, 'arm', 'epoch', 'accuracy', percent))
    total = df[df.epoch == epochs].groupby('arm', sort=False).seconds
    say('Seconds of training for all epochs, LSUV itself included', total.apply(lambda v: pm(v, 1)))
    took = steps.groupby('network', sort=False).seconds.median()
    say('Milliseconds a training step takes, median', took.mul(1e3).round(2))
    print(f'Batch norm adds {100*(took[WITH]/took[WITHOUT] - 1):.0f} % to a step (the paper: 30 %)')
    return took


def how_far(
    df: pd.DataFrame,  # As of `batchnorm`, or of `epochs_so_far`
    epochs: int = EPOCHS['paper']  # Of the whole run
) -> str:
    "How far all arms are, and their accuracies there."
    n = df.groupby(['arm', 'seed']).epoch.max().min()
    at = df[df.epoch == n].groupby('arm', sort=False).accuracy.apply(percent)
    seeds = df.seed.nunique()
    went = f'all {n} epochs' if n == epochs else f'the first {n} of {epochs} epochs'
    return f"{went}, {seeds} seed{'s'*(seeds > 1)}: " + ', '.join(f'{arm} {v} %' for arm, v in at.items())


def step_cost(
    models: dict[str, nn.Module],
    x: Tensor, y: Tensor,  # The mini-batch
    rounds: int  # Steps of each model; the models take turns, so that the machine treats all alike
) -> pd.DataFrame:  # A row a model and a round
    "Seconds that a training step takes: forward, backward and SGD."
    device = default_device()
    x,y = x.to(device, memory_format=torch.channels_last),y.to(device)
    opts = {}
    for name, model in models.items():
        model.to(device, memory_format=torch.channels_last).train()
        opts[name] = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step(name: str) -> None:
        F.cross_entropy(models[name](x), y).backward()
        opts[name].step()
        opts[name].zero_grad()
        if x.is_cuda:
            torch.cuda.synchronize()

    rows = []
    for k in progress_bar(range(-2, rounds), leave=False):  # rounds -2 and -1 warm up and do not count
        for name in models:
            began = time.perf_counter()
            step(name)
            if k >= 0:
                rows.append(dict(network=name, round=k + 1, seconds=time.perf_counter() - began))
    return pd.DataFrame(rows)


def _picture(df: pd.DataFrame, took: pd.Series) -> plt.Figure:
    "Accuracy by epoch, accuracy by wall time, and the cost of a step."
    fig,axs = plt.subplots(1, 3, figsize=(13, 4), layout='constrained', width_ratios=[1, 1, .55])
    for ax, x, title in zip(axs, ('epoch', 'seconds'), ('epoch', 'wall time')):
        for arm, color in zip(ARMS, ('C0', 'C1', 'black', 'C2')):
            if (df.arm == arm).any(): curves(ax, df[df.arm == arm], x, label=arm, color=color)
        ax.set(title=f'accuracy by {title}', xlabel=x, ylim=(0, None))
    axs[0].xaxis.get_major_locator().set_params(integer=True)
    axs[0].legend(loc='lower right')
    bars = axs[2].bar(['without', 'with'], [1e3*took[WITHOUT], 1e3*took[WITH]], color=['C0', 'C1'], width=.6)
    axs[2].bar_label(bars, fmt='%.1f')
    axs[2].set(title='milliseconds a step', xlabel='batch norm')
    return fig
