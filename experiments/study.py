"What the experiments share: options, training an arm, mean and spread over seeds, tables, and the files under `--out`."
from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, Recorder, accuracy, progress_bar, set_seed
from torch import nn

from .checkpoints import Checkpoint
from .data import Images, InputError

__all__ = ['OUT', 'positive', 'words', 'word', 'numbers', 'seeded', 'Runs', 'pm', 'percent',
           'table', 'say', 'save', 'band', 'curves']

OUT = 'out/experiments'  # Tables and pictures go here by default


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
    unknown = next((w for w in got if w.lower() not in names), None)
    if unknown is not None or not got:
        choice = ', '.join(names.values())
        raise InputError(f"--{option}: got {unknown or given!r}; it takes any of {choice}, separated by commas")
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
    kind: type = float  # Of each number
) -> list:
    "Read a list of positive numbers."
    try:
        got = [kind(w) for w in given.split(',')]
    except ValueError:
        got = []
    if got and min(got) > 0: return got
    whole = 'whole ' if kind is int else ''
    raise InputError(f"--{option}: got {given!r}; it takes positive {whole}numbers separated by commas")


def seeded(seed: int) -> None:
    "Seed the random numbers of Python, numpy and torch."
    set_seed(seed, reproducible=True)


class _Epochs(Callback):
    "Adds a row an epoch and moves the progress bar."
    order = Recorder.order + 1

    def __init__(self,
        runs: Runs,
        arm: dict[str, Any],
        lr: float,
        checkpoint: Checkpoint | None  # Of the run
    ):
        self.runs,self.arm,self.lr = runs,arm,lr
        self.done,self.rows = (checkpoint.done, checkpoint.rows) if checkpoint else (0, [])
        self.seconds = self.rows[-1]['seconds'] if self.rows else 0.
        self.runs.rows += self.rows
        self.began = time.perf_counter()

    def before_epoch(self):
        dropped = sum(self.done + self.epoch >= d for d in self.runs.drops)
        if dropped: self.opt.set_hypers(lr=self.lr*.1**dropped)

    def after_train(self):
        self.seconds += time.perf_counter() - self.began

    def after_epoch(self):
        train_loss,valid_loss,acc = self.recorder.values[-1]
        row = self.arm | dict(epoch=self.done + self.epoch + 1, accuracy=acc, train_loss=train_loss,
                              valid_loss=valid_loss, seconds=self.seconds)
        self.rows.append(row)
        self.runs.rows.append(row)
        self.runs.bar.update(len(self.runs.rows))
        self.began = time.perf_counter()  # validation does not count


class Runs:
    """Trains arms under one progress bar. Each arm starts from the same random numbers.

    `df()` has a row an arm, a seed and an epoch."""
    def __init__(self,
        images: Images,
        bs: int,  # Batch size
        runs: int,  # Number of runs to come
        epochs: int,  # Of each
        drops: Sequence[int] = (),  # Epochs after which the learning rate falls to a tenth
        checkpoints: str = ''  # Folder of the runs' checkpoints, from which runs go on; '' keeps none
    ):
        self.rows: list[dict] = []
        self.images,self.bs,self.epochs,self.drops,self.checkpoints = images,bs,epochs,drops,checkpoints
        self.bar = progress_bar(range(runs*epochs), leave=False)
        self.bar.update(0)

    def fit(self,
        arm: dict[str, Any],  # What tells the arm apart, a column each
        seed: int,  # Of the batches
        model: nn.Module,  # With its first weights
        lr: float,
        cbs: list[Callback],  # Callbacks that complete the start
        mom: float = 0.,  # Momentum of SGD; plain SGD by default
        wd: float = 0.  # Weight decay, as L2 regularization of the weights
    ) -> Learner:
        "Train one arm from one seed by SGD."
        seeded(seed)
        dls = self.images.dls(self.bs)  # fastai's DataLoaders draw their seed when they are made
        opt_func = partial(SGD, mom=mom, decouple_wd=False)
        learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, wd=wd, cbs=cbs)
        arm,checkpoint = {**arm, 'seed': seed},None
        if self.checkpoints:
            same = dict(lr=lr, mom=mom, wd=wd, bs=self.bs, drops=list(self.drops), images=self.images.name)
            checkpoint = Checkpoint(Path(self.checkpoints), arm, same)
        epochs = _Epochs(self, arm, lr, checkpoint)
        learn.add_cb(epochs)
        if checkpoint:
            learn.add_cb(checkpoint)
            checkpoint.resume()
        with learn.no_logging(), learn.no_bar():
            if epochs.done < self.epochs: learn.fit(self.epochs - epochs.done, lr)
        return learn

    def df(self) -> pd.DataFrame:
        "All rows so far."
        return pd.DataFrame(self.rows)


def pm(values: pd.Series, digits: int = 3, scale: float = 1.) -> str:
    "The mean, and the spread over the seeds if there are several."
    mean = f'{scale*values.mean():.{digits}f}'
    return f'{mean} ± {scale*values.std():.{digits}f}' if len(values) > 1 else mean


def percent(values: pd.Series) -> str:
    "Mean and spread in percent."
    return pm(values, 1, 100)


def table(
    df: pd.DataFrame,  # Tidy: a row an observation
    rows: str | list[str],  # Columns that become rows
    columns: str,  # Column whose values become columns
    values: str,  # Column to sum up
    cell: Callable = percent  # Makes the text of a cell from its values
) -> pd.DataFrame:
    "Sum up a tidy table. Rows and columns keep the order in which they first appear."
    keys = [rows] if isinstance(rows, str) else rows
    out = df.groupby([*keys, columns], sort=False)[values].apply(cell).unstack(columns)
    out = out.reindex(columns=df[columns].unique())
    return out.reindex(df[keys].drop_duplicates().set_index(keys).index).fillna('')


def say(title: str, what: Any = '') -> None:
    "Print a table under its title."
    if isinstance(what, pd.Series):
        what = what.to_frame()
    if isinstance(what, pd.DataFrame):  # the corner holds the names of rows and columns, which saves a line
        corner = ' / '.join(str(name) for name in (what.index.name, what.columns.name) if name)
        what = what.rename_axis(index=None, columns=corner or None).to_string()
    print(f'\n{title}\n{what}' if len(what) else f'\n{title}')


def save(
    name: str,  # Of the experiment
    out: str,  # Folder; '' saves nothing
    fig: plt.Figure,
    **tables: pd.DataFrame  # The file of `main` has the name of the experiment alone
) -> None:
    "Write the picture and the tables, and print where they are."
    if not out: return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder/f'{name}.png']
    fig.savefig(files[0], dpi=110)
    for part, df in tables.items():
        files.append(folder/(f'{name}.csv' if part == 'main' else f'{name}_{part}.csv'))
        df.to_csv(files[-1], index=False, float_format='%.6g')
    say('Saved: ' + ', '.join(map(str, files)))


def band(
    ax: plt.Axes,
    groups: Any,  # A grouped column: a group a point
    at: pd.Series | None = None,  # Positions of the points; the keys of the groups by default
    alpha: float = .15,  # Of the band
    **kwargs  # Of `plot`
) -> None:
    "The means of the groups as a line, and a band from the least to the most of each."
    mean = groups.mean()
    at = mean.index if at is None else at
    line, = ax.plot(at, mean, **{'marker': 'o', 'ms': 3, **kwargs})
    ax.fill_between(at, groups.min(), groups.max(), color=line.get_color(), alpha=alpha, lw=0)


def curves(
    ax: plt.Axes,
    df: pd.DataFrame,  # Of one arm
    x: str = 'epoch',  # Or 'seconds'
    **kwargs  # Of `plot`
) -> None:
    "Accuracy by epoch: the mean over the seeds as a line, and a band from least to most."
    by = df.groupby('epoch')
    band(ax, by.accuracy, at=None if x == 'epoch' else by[x].mean(), **kwargs)
    ax.grid(alpha=.3)
