"What became of a unit, in a word. `rows.STATUSES` says each word in a sentence."
from __future__ import annotations

from enum import Enum

__all__ = ['Status', 'DOUBTS']


class Status(str, Enum):
    "What became of a unit."
    OK = 'ok'
    NO_BIAS = 'no bias'
    OFF = 'off'
    FROZEN = 'frozen'
    TIED = 'tied'
    CONSTANT = 'constant'
    UNRESPONSIVE = 'unresponsive'
    ALIKE = 'alike'
    OUTLIER = 'outlier'
    FAINT = 'faint'
    NOT_CALLED = 'not called'
    NON_FINITE = 'non-finite'
    UNDONE = 'undone'


# Why a statistic is no ground to correct from: the samples are alike, one of them carries the std, or next to nothing
# arrives behind a norm layer.
DOUBTS = frozenset({Status.ALIKE, Status.OUTLIER, Status.FAINT})
