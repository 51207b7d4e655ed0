"""A `Row` of the report, what its status means (`STATUSES`), and how numbers and names are written."""
from __future__ import annotations

from dataclasses import dataclass

__all__ = ['Row', 'STATUSES', 'DONE', 'counted', 'number', 'span', 'some_names', 'shortened']

STATUSES = {
    'ok': "the last pass measured it at its target",
    'no bias': "its std is at the target; it has no bias to move the mean",
    'off': "its mean or std was still off its target after the last pass",
    'frozen': "its weight does not require grad, or was loaded or trained before",
    'tied': "another module uses its weight too",
    'constant': "its output does not vary: it is fed zeros, or zero-initialized",
    'unresponsive': "scaling its weight does not scale its output; the weight was put back",
    'alike': "the samples hardly differ, or less than a norm layer's eps; the layer was not corrected from them",
    'outlier': "one sample alone sets its std; the layer was not corrected from it",
    'faint': "a norm layer's eps leaves next to nothing of its input; the layer was not corrected from that",
    'not called': "the model did not call it; its weight is as it was",
    'non-finite': "its output holds NaNs or infinities",
    'undone': "its old weights were put back, as the training loss came out far worse",
}
DONE = ('ok', 'no bias')


@dataclass(frozen=True)
class Row:
    "One unit, as the last pass found it."
    name: str  # As in `named_modules()`
    kind: str  # Class of the module
    shape: tuple[int, ...]  # Of its output; () if it was not called
    mean: float  # Of its output; with `per_channel`, the mean of the channels' means
    std: float  # Of its output; with `per_channel`, the root mean square of the channels' stds
    mean_before: float | None  # Before anything was done, if `baseline` or the loss was asked for
    std_before: float | None  # The same of its std
    passes: int  # Passes that changed its weight or bias, by giving it its start or by correcting it
    status: str  # A key of `STATUSES`
    gain: float = 1.  # Factor that its weight was scaled by, from the start that it was given
    mean_range: tuple[float, float] | None = None  # Where its mean counts as at the target; `None` if it had no target
    std_range: tuple[float, float] | None = None  # The same of its std


def counted(n: int, one: str, many: str = '') -> str: return f'{n} {one if n == 1 else many or one + "s"}'


def number(v: float | None, small: bool = False) -> str:
    "Four decimals, or three digits where those would not do (for numbers near zero only if `small` ones matter)."
    if v is None: return ''
    if abs(v) >= 1e4 or small and 0 < abs(v) < 1e-3: return f'{v:.2g}' if abs(v) < 1 else f'{v:.3g}'
    return f'{round(v, 4) + 0.:.4f}'


def span(vs: list[float]) -> str:
    vs = [v for v in vs if v == v]
    return f'{number(min(vs))} to {number(max(vs))}' if vs else ''


def some_names(names: list[str], most: int = 5) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def shortened(name: str, most: int) -> str:
    "A name of at most so many characters. The front of a longer one is cut."
    return name if len(name) <= most else '…' + name[1 - most:]
