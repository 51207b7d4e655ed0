"What the experiments share: training an arm, mean and spread over seeds, tables, and what is saved under `--out`."
from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Iterable

import matplotlib.pyplot as plt
import pandas as pd
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, Recorder, accuracy, progress_bar, set_seed
from torch import nn

from .data import Images, InputError

__all__ = ['OUT', 'positive', 'words', 'word', 'numbers', 'seeded', 'Runs', 'pm', 'percent', 'table', 'say', 'save', 'curves']

OUT = 'out/experiments'  # Where tables and pictures go by default


def positive(**options: float) -> None:
    "Raise `InputError` for the first option that is not above zero."
    for name, v in options.items():
        if not v > 0: raise InputError(f"--{name.replace('_', '-')}: got {v}; it takes a positive number")


def words(
    option: str,  # Name of the option
    given: str,  # Words separated by commas
    known: Iterable[str]  # Words that it takes, in any case
) -> list[str]:
    "Read a list of words."
    names = {k.lower(): k for k in known}
    got = [w.strip() for w in given.split(',') if w.strip()]
    odd = next((w for w in got if w.lower() not in names), None)
    if odd is not None or not got: raise InputError(f"--{option}: got {odd or given!r}; it takes any of {', '.join(names.values())}, separated by commas")
    return [names[w.lower()] for w in got]


def word(
    option: str,  # Name of the option
    given: str,  # One word
    known: Iterable[str]  # Words that it takes, in any case
) -> str:
    "Read one word."
    got = words(option, given, known)
    if len(got) > 1: raise InputError(f"--{option}: got {given!r}; it takes one of {', '.join(known)}")
    return got[0]


def numbers(
    option: str,  # Name of the option
    given: str,  # Numbers separated by commas
    kind: type = float  # What they are to be
) -> list:
    "Read a list of positive numbers."
    try:
        got = [kind(w) for w in given.split(',')]
        if min(got) > 0: return got
    except ValueError: pass
    raise InputError(f"--{option}: got {given!r}; it takes positive {'whole ' if kind is int else ''}numbers separated by commas")


def seeded(seed: int) -> None:
    "Begin Python's, numpy's and torch's random numbers anew."
    set_seed(seed, reproducible=True)


class _Epochs(Callback):
    "A row an epoch; the bar moves on."
    order = Recorder.order + 1
    def __init__(self, runs: Runs, arm: dict):
        self.runs,self.arm,self.seconds = runs,arm,0.
        self.began = time.perf_counter()
    def after_train(self): self.seconds += time.perf_counter() - self.began
    def after_epoch(self):
        train_loss,valid_loss,acc = self.recorder.values[-1]
        seen = dict(epoch=self.epoch + 1, accuracy=acc, train_loss=train_loss, valid_loss=valid_loss, seconds=self.seconds)
        self.runs.rows.append(self.arm | seen)
        self.runs.bar.update(len(self.runs.rows))
        self.began = time.perf_counter()  # validation does not count


class Runs:
    "Trains arms, each from the same random numbers, under one progress bar; `df()` has a row an arm, a seed and an epoch."
    def __init__(self,
        images: Images,
        bs: int,  # Batch size
        runs: int,  # How many there will be
        epochs: int  # Of each
    ):
        self.rows: list[dict] = []
        self.images,self.bs,self.epochs,self.bar = images,bs,epochs,progress_bar(range(runs*epochs), leave=False)
        self.bar.update(0)

    def fit(self,
        arm: dict[str, Any],  # What tells it apart, a column each
        seed: int,  # Of the batches
        model: nn.Module,  # With its first weights
        lr: float,
        cbs: list[Callback],  # What completes its start
        mom: float = 0.,  # Momentum of SGD, plain by default
        wd: float = 0.  # Weight decay, as L2 regularization of the weights
    ) -> Learner:
        "Train one arm from one seed by SGD."
        seeded(seed)
        dls = self.images.dls(self.bs)  # fastai's DataLoaders draw their own seed when they are made
        opt_func = partial(SGD, mom=mom, decouple_wd=False)
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, wd=wd, cbs=cbs)
        learn.add_cb(_Epochs(self, {**arm, 'seed': seed}))
        with learn.no_logging(), learn.no_bar(): learn.fit(self.epochs, lr)
        return learn

    def df(self) -> pd.DataFrame: return pd.DataFrame(self.rows)


def pm(values: pd.Series, digits: int = 3, scale: float = 1.) -> str:
    "Mean, and spread over the seeds where there are several."
    mean = f'{scale*values.mean():.{digits}f}'
    return f'{mean} ± {scale*values.std():.{digits}f}' if len(values) > 1 else mean


def percent(values: pd.Series) -> str: return pm(values, 1, 100)


def table(
    df: pd.DataFrame,  # Tidy: a row an observation
    rows: str | list[str],  # Columns that become rows
    columns: str,  # Column whose values become columns
    values: str,  # Column to sum up
    cell=percent  # What becomes of the values of one cell
) -> pd.DataFrame:
    "Sum up a tidy table, in the order in which things appear in it."
    keys = [rows] if isinstance(rows, str) else rows
    out = df.groupby([*keys, columns], sort=False)[values].apply(cell).unstack(columns)
    out = out.reindex(columns=df[columns].unique())
    return out.reindex(df[keys].drop_duplicates().set_index(keys).index).fillna('')


def say(title: str, what: Any = '') -> None:
    "Print a table under its title."
    if isinstance(what, pd.Series): what = what.to_frame()
    if isinstance(what, pd.DataFrame):  # the names of rows and columns in the corner, not in a line of their own
        corner = ' / '.join(str(name) for name in (what.index.name, what.columns.name) if name)
        what = what.rename_axis(index=None, columns=corner or None).to_string()
    print(f'\n{title}\n{what}' if len(what) else f'\n{title}')


def save(
    name: str,  # Of the experiment
    out: str,  # Folder; '' saves nothing
    fig: plt.Figure,
    **tables: pd.DataFrame  # '' names the main one
) -> None:
    "Write the picture and the tables, and say where they are."
    if not out: return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder/f'{name}.png']
    fig.savefig(files[0], dpi=110)
    for part, df in tables.items():
        files.append(folder/(f'{name}.csv' if part == 'main' else f'{name}_{part}.csv'))
        df.to_csv(files[-1], index=False, float_format='%.6g')
    say('Saved: ' + ', '.join(map(str, files)))


def curves(
    ax: plt.Axes,
    df: pd.DataFrame,  # Of one arm
    x: str = 'epoch',
    y: str = 'accuracy',
    **kwargs  # Of `plot`
) -> None:
    "Mean over the seeds as a line, from least to most as a band."
    by = df.groupby('epoch')
    at,mean = (by.mean(numeric_only=True).index if x == 'epoch' else by[x].mean()),by[y].mean()
    line, = ax.plot(at, mean, **{'marker': 'o', 'ms': 3, **kwargs})
    ax.fill_between(at, by[y].min(), by[y].max(), color=line.get_color(), alpha=.15, lw=0)
    ax.grid(alpha=.3)
