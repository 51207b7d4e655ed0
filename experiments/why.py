"\"Why 0 mean and 1 std?\": products and sums of normals, six matrix products, and the same products as a network."
from __future__ import annotations

from math import sqrt

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from fastai.basics import progress_bar
from fastcore.script import call_parse
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init

from .study import OUT, band, positive, save, say, seeded

LAYERS = 6
DOCUMENT = {  # (mean, std) that the post reports
    'N(0,1) * N(0,1)': (-0.006755, 0.995809),
    'N(0,1) + N(0,1)': (-0.003384, 1.408405),
    'N(0,1/√2) + N(0,1/√2)': (0.011278, 1.001778),
    'one product, std 1/√n': (0.007975, 1.023256),
    'six products, std 1/√n': (0.008841, 1.039414),
    'six products, std 2': (243008.276950, 60611755.826758),
    'six products, mean 1': (-2637638925.689581, 95386006060.297302),
}
WEIGHTS = {  # Mean and std of the weights of a layer with n inputs
    'std 1/√n': lambda n: (0., 1/sqrt(n)),
    'std 2': lambda n: (0., 2.),
    'mean 1': lambda n: (1., 1/sqrt(n)),
}


@call_parse
def why(
    nums: int = 10000,  # Numbers in the products and sums
    width: int = 100,  # Rows and columns of the matrices
    seeds: int = 10,  # Runs of each, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row a case and a seed
    """Products, sums and six matrix products of normals: the mean and std of each, beside those of the post.

    Then the same six products as a network, before and after LSUV."""
    positive(nums=nums, width=width, seeds=seeds)
    cases,layers = [],[]
    for seed in progress_bar(range(1, seeds + 1), leave=False):
        for case, y in normals(nums, width, seed).items():
            cases.append(dict(case=case, seed=seed, mean=y.mean(), std=y.std()))
        for name, weights in WEIGHTS.items():
            rows = as_network(*weights(width), width, seed)
            layers += [dict(weights=name, seed=seed, **row) for row in rows]
    df,layers = pd.DataFrame(cases),pd.DataFrame(layers)
    df[['document_mean', 'document_std']] = [DOCUMENT[c] for c in df.case]

    by = df.groupby('case', sort=False)
    small = '{:.6g}'.format
    say(f"Mean and std, seed 1 and over {seeds} seeds, beside the document's", pd.DataFrame({
        'mean': by['mean'].first().map(small), 'std': by['std'].first().map(small),
        'std, seeds': [f'{least:.3g} to {most:.3g}' for least, most in zip(by['std'].min(), by['std'].max())],
        "document's mean": by.document_mean.first().map(small), "document's std": by.document_std.first().map(small)}))
    for name, of in layers[layers.seed == 1].groupby('weights', sort=False):
        wide = of.pivot(index='layer', columns='when', values=['mean', 'std'])
        wide = wide.map(lambda v: f'{v:.4g}' if abs(v) > 1e-4 else '0.0000')
        columns = {f'{what} {when}': wide[what, when] for when in ('before', 'after') for what in ('mean', 'std')}
        say(f'Six linear layers, weights of {name}, as a network', pd.DataFrame(columns))
    save('why', out, _picture(layers), main=df, network=layers)
    return df


def normals(
    nums: int,  # Numbers in a product or sum
    n: int,  # Rows and columns of a matrix
    seed: int
) -> dict[str, np.ndarray]:  # The result of each case of `DOCUMENT`
    "The arithmetic of the post."
    normal = np.random.default_rng(seed).normal

    def products(k: int, mean: float, std: float) -> np.ndarray:
        y = normal(size=(n, n))
        for _ in range(k):
            y = y @ normal(mean, std, (n, n))
        return y

    half = 1/sqrt(2)
    results = [
        normal(size=nums)*normal(size=nums),
        normal(size=nums) + normal(size=nums),
        normal(0, half, nums) + normal(0, half, nums),
        products(1, 0, 1/sqrt(n)),
        *(products(LAYERS, *weights(n)) for weights in WEIGHTS.values()),
    ]
    return dict(zip(DOCUMENT, results))


def as_network(
    mean: float, std: float,  # Of the weights
    n: int,  # Units of each layer
    seed: int
) -> list[dict]:  # A row a layer, before and after
    "The six matrix products as linear layers: their means and stds, before and after LSUV."
    seeded(seed)
    model = nn.Sequential(*[nn.Linear(n, n) for _ in range(LAYERS)]).double()
    for m in model:
        nn.init.normal_(m.weight, mean, std)
        nn.init.zeros_(m.bias)
    x = torch.randn(n, n, dtype=torch.float64)
    rows = []
    for when in ('before', 'after'):
        if when == 'after':
            lsuv_init(model, x, preinit=None)
        for k, (m, s) in enumerate(layer_stats(model, x).pairs):
            rows.append(dict(layer=k + 1, when=when, mean=m, std=s))
    return rows


def _picture(layers: pd.DataFrame) -> plt.Figure:
    "Std and |mean| of each layer, before and after."
    fig,axs = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    layers = layers.assign(**{'|mean|': layers['mean'].abs()})
    for ax, what in zip(axs, ('std', '|mean|')):
        for i, name in enumerate(WEIGHTS):
            for when, ls in (('before', '-'), ('after', '--')):
                of = layers[(layers.weights == name) & (layers.when == when)]
                label = f'weights of {name}, {when} LSUV'
                band(ax, of.groupby('layer')[what], alpha=.12, color=f'C{i}', ls=ls, label=label)
        ax.set(title=f'{what} of each layer', xlabel='layer')
        ax.grid(alpha=.3)
    axs[0].set_yscale('log')
    axs[1].set_yscale('symlog', linthresh=.01)
    fig.legend(*axs[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    return fig
