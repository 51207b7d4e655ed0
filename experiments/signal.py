"Why some starts fail although each layer has std 1: what is left of the samples, and the gradient, by layer."
from functools import partial
from itertools import product
from typing import Callable

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from fastcore.meta import delegates
from fastcore.script import call_parse
from torch import Tensor, nn

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.measure import between_samples

from .networks import deep_relu, fitnet4
from .options import ImageOptions
from .starts import fill, mirrored
from .study import Runs, band, numbers, percent, positive, save, say, seeded, table, words

MIRRORED = 'LSUV "std", mirrored'
STARTS = {  # Options of `lsuv_init`, and the std of the last layer; of the orthonormal start none
    'orthonormal': None,
    'LSUV "std"': dict(order='std'),
    'LSUV "std mean"': dict(order='std mean'),
    'LSUV per channel': dict(order='std mean', per_channel=True),
    'LSUV "std mean", last 0.1': dict(order='std mean', last=.1),
    MIRRORED: dict(order='std', first=mirrored),
}


@call_parse
@delegates(ImageOptions)
def signal(
    networks: str = 'maxout,ReLU',  # 'maxout', FitNet-4 with it; 'ReLU', plain linear layers with it; or both
    depth: int = 50,  # Linear layers of the plain ReLU network
    width: float = 0.25,  # Filters of FitNet-4 with maxout, as a share of the original's
    lrs: str = '0.01,0.001,0.0001',  # Learning rates of SGD
    size: int = 8,  # Pixels a side of the images
    bs: int = 64,  # Batch size
    epochs: int = 10,  # Epochs to train each arm
    seeds: int = 2,  # Runs of each arm, from seeds 1, 2, ...
    draws: int = 6,  # Networks whose start is looked at, from seeds 1, 2, ...
    **kwargs
) -> pd.DataFrame:  # A row a network, a start, a seed and a layer
    """FitNet-4 with maxout, and a deep plain ReLU network, from several starts: how they begin, and what they learn.

    By layer: the share of the output's variance that lies between samples, the std of the gradient at the output, and
    the norm of the weight's gradient relative to the weight's."""
    options = ImageOptions(size=size, bs=bs, **kwargs)
    positive(depth=depth, width=width, epochs=epochs, seeds=seeds, draws=draws)
    rates,images = numbers('lrs', lrs), options.images()
    pixels = images.train[0][0].numel()
    build = {
        'maxout': lambda: fitnet4('maxout', n_in=images.channels, n_out=images.classes, width=width),
        'ReLU': lambda: deep_relu(depth, pixels, images.classes),
    }
    x,y = (t[:256] for t in images.train)
    build = {name: build[name] for name in words('networks', networks, build)}
    layers = starts(build, draws, x, y)
    jobs = [job for job in product(range(1, seeds + 1), build, STARTS, rates) if fits(*job[1:3])]
    runs = Runs(images, bs, len(jobs), epochs)
    for seed, network, start, lr in jobs:
        seeded(seed)
        model = begun(build[network](), STARTS[start], x)
        runs.fit(dict(network=network, start=start, lr=lr), seed, model, lr, [], mom=options.mom)
    df = runs.df()
    final = df[df.epoch == epochs]

    say(f'Data: {images.name}, {size} pixels a side')
    for network, of in layers.groupby('network', sort=False):
        say(f'{network}: at the start', summary(of))
        say(f'{network}: accuracy after {epochs} epochs, %, by learning rate',
            table(final[final.network == network], 'start', 'lr', 'accuracy', percent))
    save('signal', options.out, _picture(layers), main=layers, training=final)
    return layers


def starts(
    build: dict[str, Callable[[], nn.Module]],  # By network
    draws: int,
    x: Tensor, y: Tensor  # The mini-batch
) -> pd.DataFrame:  # A row a network, a start, a draw and a layer
    "How each network is at its start."
    rows = []
    for name, start, seed in product(build, STARTS, range(1, draws + 1)):
        if not fits(name, start): continue
        seeded(seed)
        model = begun(build[name](), STARTS[start], x)
        rows += [dict(network=name, start=start, seed=seed, **row) for row in by_layer(model, x, y)]
    return pd.DataFrame(rows)


def fits(network: str, start: str) -> bool:
    "Whether a start makes sense. Of a mirrored pair maxout takes the absolute value."
    return network != 'maxout' or start != MIRRORED


def summary(
    of: pd.DataFrame  # The layers of one network
) -> pd.DataFrame:  # A row a start
    "What tells the starts apart."
    by = of.groupby('start', sort=False)
    first,last = (of[of.layer == n].groupby('start', sort=False) for n in (1, of.layer.max()))
    least,most = (100*share for share in (last.between.min(), last.between.max()))
    return pd.DataFrame({
        'variance between samples, last layer, %': [f'{a:.1f} to {b:.1f}' for a, b in zip(least, most)],
        'gradient std, first over last': (first.grad_std.mean()/last.grad_std.mean()).map('{:.2g}'.format),
        'gradient over weight, median': by.weight_grad.median().map('{:.2g}'.format)}, index=least.index)


def begun(
    model: nn.Module,
    lsuv: dict | None,  # Options of `lsuv_init`, `last`, the std of the last layer, and `first`, what gives the weights
    x: Tensor  # The mini-batch
) -> nn.Module:
    "The model with orthonormal weights, and LSUV after them if it has options."
    options = dict(lsuv or {})
    options.pop('first', partial(fill, weight_=nn.init.orthogonal_))(model)
    if lsuv is None: return model
    *_,last = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    stds = {last: options.pop('last', 1.)}
    lsuv_init(model, x, preinit=None, target_std=lambda name, module: stds.get(name, 1.), **options)
    return model


def by_layer(
    model: nn.Module,
    x: Tensor, y: Tensor  # The mini-batch
) -> list[dict]:  # A row a layer
    "What is left of the samples at each layer, and what arrives there of the gradient."
    stats = layer_stats(model, x, loss=lambda model: F.cross_entropy(model(x), y))
    shares: dict[str, float] = {}

    def between(name):
        def hook(module, args, out): shares[name] = between_samples(out)
        return hook

    modules = dict(model.named_modules())
    hooks = [modules[r.name].register_forward_hook(between(r.name)) for r in stats]
    with torch.no_grad(): model(x)
    for h in hooks: h.remove()
    return [dict(layer=i + 1, between=shares[r.name], std=r.std, grad_std=r.grad_std, weight_grad=r.weight_grad)
            for i, r in enumerate(stats)]


def _picture(layers: pd.DataFrame) -> plt.Figure:
    "The three quantities by layer, a row of panels a network."
    names = list(layers.network.unique())
    what = {'between': 'share of variance between samples', 'grad_std': "gradient's std at the output",
            'weight_grad': "weight's gradient over the weight"}
    fig,axs = plt.subplots(len(names), len(what), figsize=(12, 3.4*len(names)), layout='constrained', squeeze=False)
    for row, name in zip(axs, names):
        for ax, (column, title) in zip(row, what.items()):
            for i, start in enumerate(s for s in STARTS if fits(name, s)):
                of = layers[(layers.network == name) & (layers.start == start)]
                band(ax, of.groupby('layer')[column], color='black' if i == 0 else f'C{i - 1}', label=start, ms=0)
            ax.set(yscale='log', title=title, xlabel='layer', ylabel=name if ax is row[0] else '')
            ax.grid(alpha=.3)
    fig.legend(*axs[-1][0].get_legend_handles_labels(), loc='outside lower center', ncols=len(STARTS), frameon=False)
    return fig
