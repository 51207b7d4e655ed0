"What the runs of `benefit` say: the score at the best learning rate, and which start is ahead of which."
from __future__ import annotations

from typing import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .study import percent, table

__all__ = ['TRAINS', 'at_best_rate', 'scores', 'rates', 'steps', 'compared', 'counts', 'behind', 'gains',
           'picture']

TRAINS = .9  # A run has trained if its loss on unseen data is below this share of the loss of a constant answer
_ARM = ['network', 'optimizer', 'start']
_LEVEL = .01  # Means that are no farther apart are level


def at_best_rate(
    df: pd.DataFrame  # A row a run
) -> pd.DataFrame:
    "The runs of each arm at its best learning rate. The mean score over the seeds decides."
    mean = df.groupby([*_ARM, 'lr'], sort=False).score.mean()
    which = mean.groupby(_ARM, sort=False).idxmax()
    return df[pd.MultiIndex.from_frame(df[[*_ARM, 'lr']]).isin(which)]


def _table(df: pd.DataFrame, values: str, cell: Callable) -> pd.DataFrame:
    "A row a network, a column a start. Another optimizer than the first has rows of its own."
    first = df.optimizer.eq(df.optimizer.iloc[0])
    name = df.network.where(first, df.network + ', ' + df.optimizer)
    return table(df.assign(network=name), 'network', 'start', values, cell)


def scores(df: pd.DataFrame) -> pd.DataFrame:
    "Score at the best learning rate, in percent, with its spread over the seeds."
    return _table(at_best_rate(df), 'score', percent)


def rates(df: pd.DataFrame) -> pd.DataFrame:
    "At how many of the learning rates the loss gets below `TRAINS` of that of a constant answer, with every seed."
    trained = df.assign(trained=df.share.lt(TRAINS)).groupby([*_ARM, 'lr'], sort=False).trained.all().reset_index()
    return _table(trained, 'trained', lambda v: f'{v.sum()} of {len(v)}')


def steps(
    df: pd.DataFrame,
    share: float = .5  # Of the loss of a constant answer
) -> pd.DataFrame:
    "Steps until the training loss is below a share of that of a constant answer, at the rate that gets there first."
    count = df[f'steps_{share:g}'].fillna(np.inf)
    mean = df.assign(count=count).groupby([*_ARM, 'lr'], sort=False)['count'].mean().reset_index()
    least = mean.groupby(_ARM, sort=False)['count'].min().reset_index()
    return _table(least, 'count', lambda v: '-' if np.isinf(v.iloc[0]) else f'{v.iloc[0]:.0f}')


def compared(
    df: pd.DataFrame,
    base: str  # The start that the others are compared with
) -> pd.DataFrame:  # A row a network and a start
    """How far each start is ahead of `base`, both at their best learning rate, and a verdict on it.

    They are level if the means are within a point, or within twice the standard error of their difference."""
    best = at_best_rate(df).groupby(_ARM, sort=False).score.agg(['mean', 'std', 'count']).reset_index()
    of = best.merge(best[best.start == base].drop(columns='start'), on=['network', 'optimizer'], suffixes=('', '_base'))
    of = of[of.start != base]
    error = (of['std'].fillna(0)**2/of['count'] + of['std_base'].fillna(0)**2/of['count_base'])**.5
    ahead = of['mean'] - of['mean_base']
    level = ahead.abs() <= np.maximum(_LEVEL, 2*error)
    verdict = np.where(level, 'level', np.where(ahead > 0, 'ahead', 'behind'))
    return of[_ARM].assign(ahead=ahead, verdict=verdict).reset_index(drop=True)


def counts(
    versus: pd.DataFrame  # As of `compared`
) -> pd.DataFrame:  # A row a start
    "On how many networks each start is ahead, level or behind."
    return pd.crosstab(versus.start, versus.verdict).reindex(
        index=versus.start.unique(), columns=['ahead', 'level', 'behind'], fill_value=0)


def behind(
    df: pd.DataFrame,
    starts: list[str]  # Those that are compared
) -> pd.DataFrame:  # A row a start
    "How far each start is behind the best of them: on the mean over the networks, at most, and where that is."
    best = at_best_rate(df[df.start.isin(starts)]).groupby(_ARM, sort=False).score.mean().unstack('start')
    best = best[[s for s in starts if s in best]].dropna()
    loss = -best.sub(best.max(axis=1), axis=0)
    worst = loss.idxmax()
    return pd.DataFrame({
        'mean': (100*loss.mean()).round(1), 'most': (100*loss.max()).round(1),
        'on': [', '.join(at) for at in worst], 'best or within a point': loss.le(_LEVEL).sum()})


def gains(
    df: pd.DataFrame,
    starts: list[str],  # Those that are compared
    base: str  # With this one
) -> pd.DataFrame:  # A row a start
    """Points that each start gains over `base`, as a mean over the networks, and the standard error of that.

    A network counts once: of several optimizers the mean is taken."""
    score = at_best_rate(df).groupby(_ARM, sort=False).score.mean().unstack('start')[starts]
    gain = 100*score.sub(score[base], axis=0).dropna().groupby('network').mean()
    return pd.DataFrame({'gain': gain.mean().round(1), 'error': gain.sem().round(1)}).drop(index=base)


def picture(
    df: pd.DataFrame,
    starts: list[str]  # Those that are shown
) -> plt.Figure:
    "Score at the best learning rate, and the mean over all of them, by network: a dot a start, a line its spread."
    df = df[df.start.isin(starts) & df.optimizer.eq(df.optimizer.iloc[0])]
    names = list(df.network.unique())
    kinds = list(dict.fromkeys(s.partition(', ')[0] for s in starts))
    fig,axs = plt.subplots(1, 2, figsize=(11, .46*len(names) + 1.4), layout='constrained', sharey=True)
    per_seed = df.groupby([*_ARM, 'seed'], sort=False).score.mean().reset_index()
    for ax, of in zip(axs, (at_best_rate(df), per_seed)):
        for k, start in enumerate(starts):
            by = of[of.start == start].groupby('network').score
            at = np.array([names.index(n) for n in by.groups]) + .14*(k - (len(starts) - 1)/2)
            kind = start.partition(', ')[0]  # with the order "std", the dot is hollow
            color = ['black', 'C0', 'C1', 'C2'][kinds.index(kind)]
            ax.hlines(at, 100*by.min(), 100*by.max(), color=color, lw=1.5, alpha=.5)
            ax.plot(100*by.mean(), at, 'o', ms=5, color=color, mfc=color if start == kind else 'white', label=start)
        ax.grid(alpha=.3)
        ax.set(xlabel='%')
    axs[0].set_yticks(range(len(names)), names)
    axs[0].invert_yaxis()
    axs[0].set_title('at the best learning rate')
    axs[1].set_title(f'mean over {df.lr.nunique()} learning rates')
    fig.legend(*axs[0].get_legend_handles_labels(), loc='outside lower center', ncols=len(starts), frameon=False)
    return fig
