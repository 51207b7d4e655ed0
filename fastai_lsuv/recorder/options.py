"""The options of an `ActivationStatsRecorder`, checked when it is made.

`RecorderOptions` raises an error that names the argument, what was given and what is accepted."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ['RecorderOptions', 'DEFAULT_BINS']

DEFAULT_BINS = 80, -10., 10.  # Bins are as wide as fastai's, so that the upper half is fastai's histogram


@dataclass(frozen=True)
class RecorderOptions:
    "The options of an `ActivationStatsRecorder`, which says what each means. `bins` is what `hist` asks for."
    modules: Any = None
    every: int = 1
    hist: bool | int | tuple[int, float, float] | None = None
    grads: bool = False
    valid: bool = False
    near_zero: float = 0.05
    max_steps: int = 5000
    append: bool = False
    sample: int | None = None

    def __post_init__(self):
        _need_integer('every', self.every, 1)
        _need_integer('max_steps', self.max_steps, 2)
        if self.sample is not None:
            _need_integer('sample', self.sample, 1, ', or None to measure all samples')
        if not _is_number(self.near_zero):
            raise TypeError(f"near_zero: got {self.near_zero!r}; it takes a number, such as 0.05")
        object.__setattr__(self, 'bins', _bins_of(self.hist))


def _is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool)


def _need_integer(name: str, v: Any, least: int, more: str = ''):
    if isinstance(v, int) and not isinstance(v, bool) and v >= least: return
    raise ValueError(f"{name}: got {v!r}; it takes an integer of at least {least}{more}")


def _bins_of(hist: Any) -> tuple[int, float, float] | None:
    "Number of bins, low and high end; `None` for no histograms."
    n, low, high = DEFAULT_BINS
    takes = (f"it takes True for {(n, int(low), int(high))}, a number of bins from {low:g} to {high:g}, "
             "or (bins, low, high); fastai's is (40, 0, 10)")
    if hist is None or hist is False: return None
    if hist is True: return DEFAULT_BINS
    if isinstance(hist, int):
        hist = hist, low, high
    if not isinstance(hist, (tuple, list)) or len(hist) != 3 or not all(_is_number(v) for v in hist):
        raise TypeError(f"hist: got {hist!r}; {takes}")
    n, low, high = hist
    if n != int(n) or n < 1 or not low < high:
        raise ValueError(f"hist: got {hist!r}; {takes}, with at least one bin and low below high")
    return int(n), float(low), float(high)
