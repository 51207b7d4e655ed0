"""What was done to every layer: `LSUVReport`, a `Row` a unit, with its tables and its plot.

`NoReport` stands where there is none yet. pandas and matplotlib are imported when they are used."""
from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any, Iterator, NewType, NoReturn, overload

from .rows import DONE, STATUSES, Row, counted, number, some_names
from .tables import Table, has_baseline

if TYPE_CHECKING: from pandas import DataFrame
else: DataFrame = NewType('DataFrame', object)  # what reads annotations does not need pandas

__all__ = ['LSUVReport', 'NoReport', 'Row', 'STATUSES']

_LARGE_GAIN = 30.  # A weight that was scaled by more, or by less than its inverse, is named


class LSUVReport:
    """What `lsuv_init` did, or `layer_stats` found: a `Row` a unit, in order of execution.

    Iterate it, index it by position or by name, print it or show it in a notebook; `.pairs`, `.df()` and `.plot()` give
    it as (mean, std) tuples, a DataFrame and a picture. Mean and std are those of the unit's whole output over the
    mini-batch of the last pass, pooled over all its calls (and over the ranks of `torch.distributed`), the std unbiased
    as `Tensor.std` is. Where fresh mini-batches keep disagreeing, those of the last passes are pooled.

    What became of a unit is its `status`: "ok", "no bias" (std right, and no bias to move the mean with), "off",
    "frozen", "tied", "constant", "unresponsive", "alike", "outlier", "faint", "not called", "non-finite" or "undone";
    `STATUSES` explains them. A unit is "ok" only if its std was measured within `batch_tol` of its target and, where
    the order ends with a mean loop, its mean as close to its target as so many samples can tell."""
    def __init__(self,
        rows: list[Row],  # In order of execution
        order: str = '',  # The loops that were run; "" if none
        n_passes: int = 1,  # Full forward passes it took
        loss: tuple[float, float] | None = None,  # Training loss before and after, if it was taken
        undone: str = '',  # Why the weights were put back; "" if they were not
        loss_note: str = '',  # What is to be said of the loss, or why it was not taken
        unusual: str = ''  # What sets the last mini-batch apart from those that networks train on
    ):
        self.rows,self.order,self.n_passes = tuple(rows),order,n_passes
        self.loss,self.undone,self.loss_note,self.unusual = loss,undone,loss_note,unusual

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
        row = next((r for r in self.rows if r.name == i), None)
        if row is not None: return row
        names = ', '.join(r.name for r in self.rows[:8]) + (', ...' if len(self) > 8 else '')
        raise KeyError(f"{i!r} is no layer of this report; its layers are {names}")

    @property
    def ok(self) -> bool:
        "Whether the last pass measured every unit at its target."
        return all(r.status in DONE for r in self.rows)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        "The (mean, std) of each unit that ran, as the forum thread prints them."
        return [(r.mean, r.std) for r in self.rows if r.status != 'not called']

    @property
    def left_alone(self) -> str:
        "One sentence that names the units that are not at their target, by status; \"\" if there are none."
        if self.undone: return ''
        by_status = {s: [r.name for r in self.rows if r.status == s] for s in STATUSES if s not in DONE}
        parts = [f"{s} ({STATUSES[s]}): {some_names(names)}" for s, names in by_status.items() if names]
        n = sum(map(len, by_status.values()))
        return f"LSUV did not normalize {n} of {counted(len(self), 'layer')}. " + '; '.join(parts) if parts else ''

    @property
    def large_gains(self) -> tuple[Row, ...]:
        "The units whose weight was scaled by more than 30, or by less than 1/30."
        return tuple(r for r in self.rows if not 1/_LARGE_GAIN <= r.gain <= _LARGE_GAIN)

    @property
    def warning(self) -> str:
        "All that a user should look at, in a few sentences; \"\" if there is nothing."
        undone = large = unusual = ''
        if self.undone:
            undone = (f"LSUV put the weights back: {self.undone}. Use `modules` to leave out layers whose outputs "
                      "should not have std 1, give them another `target_std`, or keep the result with `force=True`")
        gains = [f'{r.name or "(model)"} by {r.gain:.2g}' for r in self.large_gains]
        if gains:
            large = (f"LSUV scaled some weights by a lot: {some_names(gains)}. Check that the mini-batch is "
                     "normalized as it is in training")
        if self.unusual:
            unusual = f"The mini-batch is unusual: {self.unusual}. LSUV needs one like those that the model trains on"
        return '. '.join(s for s in (undone, self.left_alone, large, unusual) if s)

    @property
    def summary(self) -> str:
        "What came of it, in one line."
        counts = Counter(r.status for r in self.rows)
        done = sum(counts[s] for s in DONE)
        rest = ', '.join(f'{counts[s]} {s}' for s in STATUSES if counts[s] and s != 'ok')
        rest = f' ({rest})' if rest else ''
        if not self.order: return f"{counted(len(self), 'layer')}, std within 0.1 of 1 in {done}{rest}"
        target = 'std' if 'std' in self.order else 'mean'
        loss = f", training loss {number(self.loss[0])} before and {number(self.loss[1])} after" if self.loss else ''
        if self.loss_note: loss += f"{'' if loss else ', training loss not taken'} ({self.loss_note})"
        return (f"LSUV {self.order!r}: {done} of {counted(len(self), 'layer')} at the target {target}{rest}, "
                f"{counted(self.n_passes, 'forward pass', 'forward passes')}{loss}")

    def df(self) -> DataFrame:  # A row a unit, in order of execution
        "A DataFrame: a row a unit, the fields of `Row` as columns, those of the baseline only if it was measured."
        import pandas as pd
        df = pd.DataFrame([asdict(r) for r in self.rows], columns=list(Row.__dataclass_fields__))
        return df if has_baseline(self.rows) else df.drop(columns=['mean_before', 'std_before'])

    def __str__(self) -> str: return f"{self.summary}\n\n{Table(self.rows, bool(self.order)).text()}"

    __repr__ = __str__

    def _repr_html_(self) -> str: return f'<p>{escape(self.summary)}</p>{Table(self.rows, bool(self.order)).html()}'

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
    """Stands for the report where LSUV has not run, and says why and what to do.

    It is false and empty. Anything that a report is asked for raises `AttributeError` with the same words."""
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
