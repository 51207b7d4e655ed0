"""What became of a layer, in a word: the one table of statuses. And why a weight is in no row: `OUTSIDE`.

A new status is one entry of `Status`, and the code that decides it. Words, advice, marks and colours come from here."""
from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ['Status', 'Words', 'STATUSES', 'ADVICE', 'DONE', 'DOUBTS', 'OUTSIDE', 'MARKS', 'words_for']

# The mark of each tone, beside its colour.
MARKS = {'done': '✓', 'left': '–', 'doubt': '!', 'bad': '✗'}
# A look calls a std that is not near 1 a problem only if it is beyond these.
_TINY,_HUGE = 1e-3,1e3


class Words(NamedTuple):
    "How a report shows a status."
    word: str
    tone: str  # A key of `MARKS`
    note: str  # What stands below the table; "" if nothing


class Status(str, Enum):
    """What became of a layer.

    An entry is its word, its tone, its meaning, advice, and what it says in a look (`layer_stats`), where that is
    something else: another note, or `Words`."""
    tone: str
    meaning: str
    advice: str
    look: Words

    def __new__(cls, word: str, tone: str, meaning: str, advice: str = '', look: str | Words = '') -> Status:
        self = str.__new__(cls, word)
        self._value_,self.tone,self.meaning,self.advice = word,tone,meaning,advice
        self.look = look if isinstance(look, Words) else Words(word, tone, f'{look or meaning}.')
        return self

    __str__ = str.__str__
    __format__ = str.__format__

    OK = ('ok', 'done', "the last pass measured it at its target", '', Words('near 1', 'done', ''))
    NO_BIAS = (
        'no bias', 'done', "its std is at its target; it has no bias to shift its mean",
        "This is normal before a norm layer.")
    OFF = (
        'off', 'doubt', "its mean or std is still off target after the last pass",
        "Pass larger mini-batches, or raise `max_iter`.", Words('not near 1', 'left', ''))
    FROZEN = (
        'frozen', 'left', "its weight is or was frozen, or was loaded or trained before; left as it was",
        "Unfreeze it to initialize it. In a Learner, `learn.lsuv_init()` initializes weights that were loaded.",
        "its weight does not require grad")
    TIED = (
        'tied', 'left', "it shares its weight with another module, so it was not scaled on its own",
        "This is normal for a decoder that shares the weight of an embedding.",
        "it shares its weight with another module")
    CONSTANT = (
        'constant', 'doubt', "its output does not vary (a zero weight, say), so it was not scaled",
        "This is normal for zero-initialized layers, such as the last one of a residual branch.",
        "its output does not vary (a zero weight, say)")
    NO_SIGNAL = (
        'no signal', 'bad', "its input does not vary: something before it is dead",
        "Look for the first layer with a constant output, and check the mini-batch.")
    UNRESPONSIVE = (
        'unresponsive', 'doubt',
        "scaling its weight does not bring its std to the target (a norm inside the layer?); left as it was",
        "Leave it out with `exclude`.")
    ALIKE = (
        'alike', 'doubt', "the samples hardly differ here, so its std cannot be trusted",
        "Pass a mini-batch whose samples differ.")
    OUTLIER = (
        'outlier', 'doubt', "a single sample sets its std, so its std cannot be trusted",
        "Look at that sample, or pass a larger mini-batch.")
    FAINT = (
        'faint', 'doubt', "the signal is weaker than the eps of the norm layer before it, so its std cannot be trusted",
        "Look at the layers before it, or leave it out with `exclude`.")
    NOT_CALLED = (
        'not called', 'left', "not used in this forward pass; left as it was",
        "This is normal if training does not use it either.", "not used in this forward pass")
    NON_FINITE = (
        'non-finite', 'bad', "its output contains NaNs or infinities",
        "Start with the first layer that has this status, and check its input.")
    UNDONE = (
        'undone', 'bad', "the loss came out far worse, so its old weight was put back",
        "Leave layers out with `exclude`, or give them another `target_std`.")


STATUSES = {s.value: s.meaning for s in Status}
ADVICE = {s.value: s.advice for s in Status if s.advice}
DONE = tuple(s.value for s in Status if s.tone == 'done')
# Reasons not to trust a statistic: the samples are alike, one of them sets the std, or next to nothing arrives behind
# a norm layer.
DOUBTS = frozenset({Status.ALIKE, Status.OUTLIER, Status.FAINT})
# Why a weight is in no row
OUTSIDE = {
    'embedding': "it is looked up or added; no input is multiplied by it",
    'recurrent': "a recurrent layer applies it internally",
    'not selected': "`modules` or `exclude` leaves it out",
    'not called': "not used in this forward pass",
    'in transform': "a transform of `torch.func` uses it, inside of which no value can be read",
    'vector': "it has one number per channel",
    'not linear': "no linear operation uses it directly: it is first changed, multiplied or gathered, say",
}

_TOO_SMALL = Words('vanishing', 'doubt', f"its std is below {_TINY:g}.")
_TOO_LARGE = Words('exploding', 'doubt', f"its std is above {_HUGE:g}.")


def words_for(
    status: str,  # A key of `STATUSES`
    corrected: bool,  # Whether LSUV has run, or only looked
    std: float = 1.  # Of the layer
) -> Words:
    "How a report shows a layer's status. A look judges no std, unless it is extreme."
    s = Status(status)
    if corrected: return Words(s.value, s.tone, f'{s.meaning}. {s.advice}'.rstrip() if s is not Status.OK else '')
    if s is Status.OFF and not _TINY <= std <= _HUGE: return _TOO_SMALL if std < 1 else _TOO_LARGE
    return s.look
