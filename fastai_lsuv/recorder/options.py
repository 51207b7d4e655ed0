"""The options of an `ActivationStatsRecorder`, checked when it is made."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ['checked']

_RANGE = -10., 10.  # With 80 bins, these are as wide as fastai's, so that the upper half is fastai's histogram


def checked(**options: Any) -> SimpleNamespace:
    "Check the options, and add the `bins` that `hist` asks for."
    o = SimpleNamespace(**options)
    for name, least, more in ('every', 1, ''), ('max_steps', 2, ''), ('sample', 1, ', or None to measure all samples'):
        v = options[name]
        if not (v is None and more) and not (isinstance(v, int) and not isinstance(v, bool) and v >= least):
            raise ValueError(f"{name}: got {v!r}; it takes an integer of at least {least}{more}")
    if not _is_number(o.near_zero): raise TypeError(f"near_zero: got {o.near_zero!r}; it takes a number, such as 0.05")
    o.bins = _bins_of(o.hist)
    return o


def _is_number(v: Any) -> bool: return isinstance(v, (int, float)) and not isinstance(v, bool)


def _bins_of(hist: Any) -> tuple[int, float, float] | None:
    "Give the number of bins, low and high end; `None` for no histograms."
    if hist is None or hist is False: return None
    if hist is True: return 80, *_RANGE
    takes = ("it takes True for (80, -10, 10), a number of bins from -10 to 10, or (bins, low, high); "
             "fastai's is (40, 0, 10)")
    bins = (hist, *_RANGE) if isinstance(hist, int) else hist
    if not isinstance(bins, (tuple, list)) or len(bins) != 3 or not all(map(_is_number, bins)):
        raise TypeError(f"hist: got {hist!r}; {takes}")
    n,low,high = bins
    if n != int(n) or n < 1 or not low < high:
        raise ValueError(f"hist: got {bins!r}; {takes}, with at least one bin and low below high")
    return int(n), float(low), float(high)
