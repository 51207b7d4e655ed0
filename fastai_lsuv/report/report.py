"What was done to every layer: `LSUVReport`, and `NoReport` where there is none. It imports pandas only when asked."
from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any, Iterator, NewType, NoReturn, overload

from ..statuses import DONE, STATUSES
from . import sentences
from .markup import report_html
from .rows import Row
from .tables import COLUMNS, Table

if TYPE_CHECKING: from pandas import DataFrame
else: DataFrame = NewType('DataFrame', object)  # what reads annotations does not need pandas

__all__ = ['LSUVReport', 'NoReport', 'Row', 'STATUSES']


class LSUVReport:
    """What `lsuv_init` did, or `layer_stats` found: a `Row` a unit, in order of execution.

    Iterate it, index it by position or by name, print it or show it in a notebook; `.pairs`, `.df()` and `.plot()` give
    it as (mean, std) tuples, a DataFrame and a picture. Mean and std are those of the unit's whole output over the
    mini-batch of the last pass, pooled over all its calls (and over the ranks of `torch.distributed`), the std unbiased
    as `Tensor.std` is. Where fresh mini-batches keep disagreeing, those of the last passes are pooled.

    What became of a unit is its `status`, a word that `STATUSES` explains. A unit is "ok" only if its std was measured
    within `batch_tol` of its target. Where the order ends with a mean loop, its mean is at its target as well, within
    max(`batch_tol`, 3/sqrt(samples)) stds: a fresh mini-batch of 64 samples may find it 0.375 stds off.

    A row's `weights` names the parameters that it speaks for. Each other parameter of two or more dimensions is in
    `outside`, with a word why. `coverage` is the share of their elements that are in rows."""
    def __init__(self,
        rows: list[Row],  # In order of execution
        order: str = '',  # The loops that were run; "" if none
        n_passes: int = 1,  # Full forward passes it took
        loss: tuple[float, float] | None = None,  # Training loss before and after, if it was taken
        undone: str = '',  # Why the weights were put back; "" if they were not
        loss_note: str = '',  # What is to be said of the loss, or why it was not taken
        unusual: str = '',  # What sets the last mini-batch apart from those that networks train on
        outside: dict[str, str] | None = None,  # Parameters of two or more dimensions in no row, each with a word why
        coverage: float = 1.,  # Share of the elements of parameters of two or more dimensions that are in rows
        not_mirrored: str = '',  # Why no layer starts mirrored, with `preinit="mirrored"`
        advice: str = ''  # What may serve the model better, in a sentence
    ):
        self.rows,self.order,self.n_passes = tuple(rows),order,n_passes
        self.loss,self.undone,self.loss_note,self.unusual = loss,undone,loss_note,unusual
        self.outside,self.coverage = dict(outside or {}),coverage
        self.not_mirrored,self.advice = not_mirrored,advice

    def __len__(self) -> int: return len(self.rows)
    def __iter__(self) -> Iterator[Row]: return iter(self.rows)
    @overload
    def __getitem__(self, i: int | str) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Row, ...]: ...
    def __getitem__(self,
        i: int | slice | str  # Position in order of execution (or a slice), or a unit's name as in `named_modules()`
    ) -> Row | tuple[Row, ...]:  # Its row; of a slice, a tuple of rows
        "The row of a position or of a unit's name. Raises `KeyError`, with the names there are, or `IndexError`."
        if not isinstance(i, str): return self.rows[i]
        for row in self.rows:
            if row.name == i: return row
        names = ', '.join(r.name for r in self.rows[:8]) + (', ...' if len(self) > 8 else '')
        raise KeyError(f"{i!r} is not a layer of this report; its layers are {names}")

    @property
    def ok(self) -> bool:
        "Whether every unit is at its target."
        return all(r.status in DONE for r in self.rows)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        "The (mean, std) of each unit that ran, as the forum thread prints them."
        return [(r.mean, r.std) for r in self.rows if r.status != 'not called']

    @property
    def left_alone(self) -> str:
        "The units that are not at their target, a line for each status; \"\" if there are none."
        return '' if self.undone else sentences.left_alone(self)

    @property
    def large_gains(self) -> tuple[Row, ...]:
        "The units whose weight was scaled by more than 30, or by less than 1/30."
        return tuple(r for r in self.rows if not 1/30 <= r.gain <= 30)

    @property
    def remarks(self) -> list[str]:
        "What else a user should look at: undone weights, large gains, an unusual mini-batch, no loss taken."
        return sentences.remarks(self)

    @property
    def warning(self) -> str:
        "All that a user should look at, in lines; \"\" if there is nothing."
        return '\n'.join(filter(None, [self.left_alone, *self.remarks]))

    @property
    def summary(self) -> str:
        "What came of it, in one line."
        return sentences.headline(self) + sentences.covered(self)

    def df(self) -> DataFrame:  # A row a unit, in order of execution
        "A DataFrame: a row a unit, the fields of `Row` as columns; baseline and gradients only if they were asked for."
        import pandas as pd
        df = pd.DataFrame([asdict(r) for r in self.rows], columns=list(Row.__dataclass_fields__))
        return df.drop(columns=[c.field for c in COLUMNS if self.rows and not c.given(self.rows)])

    def __str__(self) -> str:
        table = Table(self.rows, bool(self.order))
        notes = [*(f'{words.word}: {words.note}' for words in table.notes), *self.remarks, sentences.left_out(self)]
        return '\n'.join([sentences.headline(self), '', table.text(), '', *filter(None, notes)]).rstrip()

    __repr__ = __str__
    def _repr_html_(self) -> str: return report_html(self)

    def plot(self,
        axs: Any = None,  # Two matplotlib axes, for std and mean; new ones by default
        figsize: tuple[float, float] | None = None  # Of the new figure, in inches; default: by the number of layers
    ) -> Any:  # The two axes
        """Plot std and mean of each layer that ran, after and (with `baseline`) before, with their targets.

        Layers are rows, the first on top. A green band shows what counts as at the target. A layer that was not
        normalized has a cross, and its status beside it. Of more than 50 layers, some are named."""
        from .plots import plot_rows
        return plot_rows(self.rows, bool(self.order), axs, figsize)


class NoReport:
    "Stands for the report where LSUV has not run: false, empty, and any attribute raises an error that says why."
    def __init__(self,
        why: str  # In sentences
    ):
        self.why = why

    def __bool__(self) -> bool: return False
    def __len__(self) -> int: return 0
    def __iter__(self) -> Iterator[Row]: return iter(())
    def __repr__(self) -> str: return self.why
    def _repr_html_(self) -> str: return f'<p>{escape(self.why)}</p>'
    def __getitem__(self, i: Any) -> NoReturn: raise KeyError(self.why)

    def __getattr__(self, name: str) -> NoReturn:
        why = '' if name.startswith('_') or name == 'why' else f". {self.why}"
        raise AttributeError(f"there is no report yet, and no {name!r}{why}", name=name, obj=self)
