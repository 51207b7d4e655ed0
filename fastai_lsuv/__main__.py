"""The quick demonstration: `python -m fastai_lsuv`.

It trains a conv net on scikit-learn's digits: without LSUV, with LSUV in every order, and from mirrored weights."""
from __future__ import annotations

import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import pandas as pd
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy, progress_bar, set_seed
from torch import nn

from . import ActivationStatsRecorder, LSUVCallback, LSUVReport, layer_stats, lsuv_init
from .demo import ConvLayer, digits_dls, lesson11, pair, run_command
from .measure import ORDERS, parse_order

WITHOUT,MIRRORED = 'without LSUV','mirrored'


def show_pairs(title: str, report: LSUVReport) -> None:
    "Print (mean, std) of each layer, a layer a line."
    print(f'\n{title}')
    for mean, std in report.pairs:
        print(pair(mean, std))


def picture(
    stats: dict[str, LSUVReport],  # Of the network of each arm, before training
    acc: pd.DataFrame,  # Accuracy by epoch (rows) and arm (columns)
    path: Path  # File to write
) -> None:
    "Draw std and mean by layer and accuracy by epoch, of every arm."
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(1, 3, figsize=(13, 3.8), layout='constrained')
    colors = {arm: 'black' if arm == WITHOUT else f'C{i}' for i, arm in enumerate(stats)}
    styles = dict(zip(stats, ['-', *['-', '--', '-.', ':', (0, (5, 1, 1, 1))]*len(stats)]))
    for arm, report in stats.items():
        style = dict(color=colors[arm], ls=styles[arm], marker='o', ms=3)
        layers = range(1, len(report.pairs) + 1)
        means,stds = zip(*report.pairs)
        axs[0].plot(layers, stds, **style)
        axs[1].plot(layers, means, **style)
        axs[2].plot(acc.index, acc[arm], label=arm, **style)
    titles = 'std of each layer', 'mean of each layer', 'accuracy on unseen digits'
    for ax, title, x in zip(axs, titles, ('layer', 'layer', 'epoch')):
        ax.set(title=title, xlabel=x)
        ax.grid(alpha=.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax, target in zip(axs, (1, 0)):
        ax.axhline(target, color='gray', lw=0.8, zorder=0)
    axs[2].set_ylim(0, 1)
    fig.legend(*axs[2].get_legend_handles_labels(), loc='outside lower center', ncols=len(stats), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def make_learner(model: nn.Module, bs: int, cbs: list[Callback]) -> Learner:
    "A Learner on the digits with plain SGD. Its DataLoaders draw the order of the batches when they are made."
    return Learner(digits_dls(bs), model, CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy, cbs=cbs)


def arms_of(orders: str) -> list[str]:
    "The orders among words that are separated by commas."
    arms = [o.strip() for o in orders.split(',')]
    try:
        for arm in arms: parse_order(arm)
    except ValueError as e:
        raise SystemExit(f'--orders: {e}')
    return arms


def trained(arm: str, x: torch.Tensor, epochs: int, lr: float, bs: int, seed: int) -> tuple[LSUVReport, Learner]:
    "The layers of one arm at its start, as the mini-batch `x` shows them, and its Learner after training."
    set_seed(seed, reproducible=True)
    model = lesson11()
    # The thread measures each layer after its activation. A mirrored start needs the outputs of the convs themselves.
    options = dict(preinit='mirrored') if arm == MIRRORED else dict(order=arm, modules=ConvLayer)
    if arm == WITHOUT: report = layer_stats(model, x, modules=ConvLayer)
    else: report = lsuv_init(lesson11(), x, **options)
    set_seed(seed, reproducible=True)
    recorder = ActivationStatsRecorder(modules=ConvLayer)
    cbs = [recorder] if arm == WITHOUT else [LSUVCallback(**options), recorder]
    learn = make_learner(model, bs, cbs)
    with learn.no_logging(), learn.no_bar(): learn.fit(epochs, lr)
    return report, learn


def beside(bs: int, seed: int, lr: float) -> None:
    "Print what `LSUVCallback` says beside `lr_find` and `fine_tune`."
    set_seed(seed, reproducible=True)
    learn = make_learner(lesson11(), bs, [LSUVCallback(modules=ConvLayer)])
    with TemporaryDirectory() as folder, learn.no_bar():
        learn.path = Path(folder)  # `lr_find` saves the model there
        found = learn.lr_find(show_plot=False, num_it=50).valley
        print(f'\nlr_find initializes the network and leaves it initialized: {learn.lsuv.report.summary} '
              f'It suggests {found:.2g}.\nThen fine_tune(1, {lr:.2g}) fits twice:')
        learn.logger = lambda line: print(line) if isinstance(line, str) else None  # without the table of the epochs
        learn.fine_tune(1, lr)
    print(f'Accuracy {learn.recorder.values[-1][-1]:.3f}')


def main(
    epochs: int = 5,  # Epochs to train each arm
    lr: float = 0.1,  # Learning rate of plain SGD, as in lesson 11; it stays constant
    bs: int = 64,  # Batch size
    orders: str = ','.join(ORDERS),  # Orders to try, separated by commas
    seed: int = 1,  # Of the weights and the batches, the same for each arm
    out: str = 'lsuv_demo.png'  # Picture to write
) -> None:
    """Train the lesson-11 network on scikit-learn's digits: without LSUV, with LSUV in every order, and mirrored.

    Prints the (mean, std) pairs that each order leaves, accuracy by epoch, and what the recorder finds in the
    activations. Saves a picture of the first two."""
    if epochs < 1: raise SystemExit(f"--epochs: got {epochs}; it takes a positive whole number")
    arms = arms_of(orders)
    matplotlib.use('agg')
    warnings.filterwarnings('ignore', category=FutureWarning)
    train = digits_dls().train_ds
    x = torch.stack([train[i][0] for i in range(256)])

    stats: dict[str, LSUVReport] = {}
    accs: dict[str, list[float]] = {}
    verdicts: dict[str, str] = {}
    for arm in progress_bar([WITHOUT, *arms, MIRRORED]):
        stats[arm],learn = trained(arm, x, epochs, lr, bs, seed)
        accs[arm] = [row[-1] for row in learn.recorder.values]
        verdicts[arm] = str(learn.activation_stats_recorder.diagnose())

    for arm, report in stats.items():
        titles = {WITHOUT: f'{arm}, as PyTorch starts it', MIRRORED: 'preinit="mirrored"'}
        show_pairs(titles.get(arm, f'order="{arm}"'), report)
    acc = pd.DataFrame(accs, index=pd.RangeIndex(1, epochs + 1, name='epoch'))
    unseen = len(learn.dls.valid_ds)
    print(f'\nAccuracy on {unseen} unseen digits, by epoch\n{acc.to_string(float_format="{:.3f}".format)}')
    for arm in (WITHOUT, arms[0]):
        print(f'\nActivations in training, {arm}\n{verdicts[arm]}')
    beside(bs, seed, lr)
    path = Path(out).resolve()
    picture(stats, acc, path)
    print(f'\nPicture: {path}')


if __name__ == '__main__':
    run_command(main, sys.argv[1:], 'python -m fastai_lsuv')
