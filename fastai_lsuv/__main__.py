"The quick demonstration: `python -m fastai_lsuv` trains a conv net on scikit-learn's digits, with LSUV in every order and without."
from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import pandas as pd
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoaders, Learner, accuracy, progress_bar, set_seed
from fastcore.script import call_parse

from . import ActivationStatsRecorder, LSUVCallback, LSUVReport, layer_stats, lsuv_init
from .experiments.data import digits
from .experiments.networks import ConvLayer, lesson11
from .loops import ORDERS, parse_order

WITHOUT = 'without LSUV'


def digits_dls(
    bs: int = 64,  # Batch size
    valid: int = 360  # Images to validate on
) -> DataLoaders:
    "`digits` in DataLoaders, split at random but always alike."
    x,y = digits()
    idx = torch.randperm(len(x), generator=torch.Generator().manual_seed(42))
    train,test = ([(x[i], y[i]) for i in part] for part in (idx[valid:], idx[:valid]))
    return DataLoaders.from_dsets(train, test, bs=bs, val_bs=256, num_workers=0, device='cpu')


def show_pairs(title: str, report: LSUVReport) -> None:
    "Print (mean, std) of each layer as the forum thread does."
    print(f'\n{title}')
    for pair in report.pairs: print(f'({pair[0]:.10g}, {pair[1]:.10g})')


def picture(
    stats: dict[str, LSUVReport],  # Of the network of each arm, before training
    acc: pd.DataFrame,  # Accuracy by epoch (rows) and arm (columns)
    path: Path  # File to write
) -> None:
    "Std and mean by layer, and accuracy by epoch, of every arm."
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(1, 3, figsize=(13, 3.8), layout='constrained')
    colors = {arm: 'black' if arm == WITHOUT else f'C{i}' for i, arm in enumerate(stats)}
    styles = dict(zip(stats, ['-', *['-', '--', '-.', ':', (0, (5, 1, 1, 1))]*len(stats)]))
    for arm, report in stats.items():
        layers = range(1, len(report.pairs) + 1)
        for ax, values in zip(axs, (([s for _, s in report.pairs]), [m for m, _ in report.pairs])):
            ax.plot(layers, values, color=colors[arm], ls=styles[arm], marker='o', ms=3)
        axs[2].plot(acc.index, acc[arm], color=colors[arm], ls=styles[arm], marker='o', ms=3, label=arm)
    for ax, title, at in zip(axs, ('std of each layer', 'mean of each layer', 'accuracy on unseen digits'), (1, 0, None)):
        if at is not None: ax.axhline(at, color='gray', lw=0.8, zorder=0)
        ax.set(title=title, xlabel='layer' if at is not None else 'epoch')
        ax.grid(alpha=.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axs[2].set_ylim(0, 1)
    fig.legend(*axs[2].get_legend_handles_labels(), loc='outside lower center', ncols=len(stats), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def beside(bs: int, seed: int, lr: float) -> None:
    "Print what `LSUVCallback` has to say beside `lr_find` and `fine_tune`."
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(bs), lesson11(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy, cbs=LSUVCallback(modules=ConvLayer))
    with TemporaryDirectory() as folder, learn.no_bar():
        learn.path = Path(folder)  # `lr_find` saves the model there
        found = learn.lr_find(show_plot=False, num_it=50).valley
        print(f'\nlr_find initializes the network, and leaves it so: {learn.lsuv.report.summary}. It suggests {found:.2g}.\nfine_tune(1, {lr:.2g}) then fits twice:')
        learn.logger = lambda line: print(line) if isinstance(line, str) else None  # not the table of the epochs
        learn.fine_tune(1, lr)
    print(f'Accuracy {learn.recorder.values[-1][-1]:.3f}')


@call_parse
def main(
    epochs: int = 5,  # Epochs to train each arm
    lr: float = 0.1,  # Learning rate, constant, of plain SGD as in lesson 11
    bs: int = 64,  # Batch size
    orders: str = ','.join(ORDERS),  # Orders to try, separated by commas
    seed: int = 1,  # Of the weights and the batches, the same for each arm
    out: str = 'lsuv_demo.png'  # Picture to write
):
    """Train the lesson-11 network on scikit-learn's digits, without LSUV and with it in every order.

    Prints the (mean, std) pairs that each order leaves, accuracy by epoch and what the recorder makes of the activations, and
    saves a picture of them."""
    if epochs < 1: raise SystemExit(f"--epochs: got {epochs}; it takes a positive whole number")
    arms = [o.strip() for o in orders.split(',')]
    try:
        for o in arms: parse_order(o)
    except ValueError as e: raise SystemExit(f'--orders: {e}')
    matplotlib.use('agg')
    warnings.filterwarnings('ignore', category=FutureWarning)
    train = digits_dls().train_ds
    x = torch.stack([train[i][0] for i in range(256)])

    stats: dict[str, LSUVReport] = {}
    accs: dict[str, list[float]] = {}
    verdicts: dict[str, str] = {}
    for arm in progress_bar([WITHOUT, *arms]):
        set_seed(seed, reproducible=True)
        model = lesson11()
        if arm == WITHOUT: stats[arm] = layer_stats(model, x, modules=ConvLayer)
        else: stats[arm] = lsuv_init(lesson11(), x, order=arm, modules=ConvLayer)
        set_seed(seed, reproducible=True)
        dls = digits_dls(bs)  # their order, too, is drawn when they are made
        recorder = ActivationStatsRecorder(modules=ConvLayer)
        cbs = [recorder] if arm == WITHOUT else [LSUVCallback(order=arm, modules=ConvLayer), recorder]
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy, cbs=cbs)
        with learn.no_logging(), learn.no_bar(): learn.fit(epochs, lr)
        accs[arm] = [row[-1] for row in learn.recorder.values]
        verdicts[arm] = str(recorder.diagnose())

    for arm, report in stats.items(): show_pairs(f'order="{arm}"' if arm != WITHOUT else f'{arm}, as PyTorch starts it', report)
    acc = pd.DataFrame(accs, index=pd.RangeIndex(1, epochs + 1, name='epoch'))
    print(f'\nAccuracy on {len(dls.valid_ds)} unseen digits, by epoch\n{acc.to_string(float_format="{:.3f}".format)}')
    for arm in (WITHOUT, arms[0]): print(f'\nActivations in training, {arm}\n{verdicts[arm]}')
    beside(bs, seed, lr)
    path = Path(out).resolve()
    picture(stats, acc, path)
    print(f'\nPicture: {path}')
