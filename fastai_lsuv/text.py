"How numbers and names are written: in messages, in the report and in pictures."
from __future__ import annotations

from typing import Iterable

__all__ = ['counted', 'number', 'span', 'some_names', 'shortened']


def counted(n: int, one: str, many: str = '') -> str: return f'{n} {one if n == 1 else many or one + "s"}'


def number(v: float | None, small: bool = False) -> str:
    "Four decimals, or three digits where those would not do (for numbers near zero only if `small` ones matter)."
    if v is None: return ''
    if abs(v) >= 1e4 or small and 0 < abs(v) < 1e-3: return f'{v:.2g}' if abs(v) < 1 else f'{v:.3g}'
    return f'{round(v, 4) + 0.:.4f}'


def span(vs: list[float]) -> str:
    "The least and the greatest number. NaNs do not count."
    vs = [v for v in vs if v == v]
    return f'{number(min(vs))} to {number(max(vs))}' if vs else ''


def some_names(names: Iterable[str], most: int = 5) -> str:
    "The first names, and how many more there are."
    names = list(names)
    return ', '.join(names[:most]) + f' and {len(names) - most} more'*(len(names) > most)


def shortened(name: str, most: int) -> str:
    "A name of at most so many characters. The front of a longer one is cut."
    return name if len(name) <= most else '…' + name[1 - most:]
