"""The loop orders: `parse_order` reads `"std mean"`, `run_loops` runs the loops on whatever can be measured and moved.

The loops see a unit through a `Meter`, which measures, scales and shifts. `AffineMeter` does so by arithmetic on
moments, for a unit whose output is affine in its weight and bias. `AgainMeter` runs any other unit again."""
from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, Protocol

import numpy as np

from .moments import Moments, unbias

__all__ = ['ORDERS', 'Loops', 'parse_order', 'run_loops', 'Meter', 'AffineMeter']

WORDS = ('mean', 'std')

ORDERS = {
    'std mean': "std loop, then mean loop: the thread's last post (the default)",
    'mean std': "mean loop, then std loop: the lesson-11 notebook; leaves means off zero",
    'mean+std': "one joint loop: the thread's first post",
    'mean std mean std': "the two loops run twice: the thread's second post",
    'std': "variance only: Mishkin & Matas 2016, Algorithm 1, and the Torch port",
}

Loops = tuple[tuple[str, ...], ...]  # The words of each loop, in the order they run

# A step that asks the std to change by this much (in logarithms) tells how the unit responds. Rounding drowns a smaller
# one.
_TELLING = 0.02
# A unit whose std follows by less than this share of the step is unresponsive.
_MIN_RESPONSE = 0.1
# A weight that is small beside the biases responds little at first, and more with each step that makes it larger.
_MIN_RESPONSE_GROWING = 1e-3
# A mean loop that costs more than half of the std kills activations, and does not centre them.
_MIN_STD_KEPT = 0.5


def parse_order(
    order: str  # Loops in the order they run, separated by spaces; `+` joins words into one loop
) -> Loops:
    "Read an order such as 'std mean' or 'mean+std'. Raises `TypeError` or `ValueError` with the words it takes."
    if not isinstance(order, str):
        raise TypeError(f"order: got {order!r} of type {type(order).__name__}; {_takes(order)}")
    loops = tuple(tuple(loop.split('+')) for loop in order.split())
    if not loops: raise ValueError(f"order: got {order!r}, which holds no loop; {_takes(order)}")
    for loop in loops:
        for word in loop:
            if word not in WORDS: raise ValueError(f"order: unknown word {word!r} in {order!r}; {_takes(order)}")
        if len(set(loop)) < len(loop):
            raise ValueError(f"order: {'+'.join(loop)!r} in {order!r} names a word twice; {_takes(order)}")
    return loops


def _takes(order: Any) -> str:
    "What an order may be, after the one that is meant, if that can be told."
    meant,examples = _meant(order),', '.join(map(repr, ORDERS))
    start = f"did you mean order={meant!r}? It" if meant else "it"
    return f"{start} takes the words 'mean' and 'std', separated by spaces or joined by '+', such as {examples}"


def _meant(order: Any) -> str:
    "The known order that one in other words looks like: 'std mean' for 'Std, variance'; \"\" if there is none."
    words = ' '.join(map(str, order)) if isinstance(order, (list, tuple)) else str(order)
    words = re.sub(r'\s*[+&]\s*', '+', words.lower())
    near = [_nearest(w) if w.isalpha() else w for w in re.findall(r'[a-z]+|\+', words)]
    read = ' '.join(near).replace(' + ', '+')
    return read if read in (*ORDERS, *WORDS, 'std+mean') and read != order else ''


def _nearest(word: str) -> str:
    "\"mean\" or \"std\" for a word that is near one or means the same."
    if word in ('var', 'variance', 'stdev', 'deviation', 'scale'): return 'std'
    if word in ('average', 'avg', 'bias', 'shift'): return 'mean'
    return next(iter(get_close_matches(word, WORDS, 1, 0.74)), word)


class Meter(Protocol):
    "What the loops need of a unit: to measure its output, to scale its weight and to shift its bias."
    can_shift: bool  # Whether there is a bias to move the mean with
    affine: bool  # Whether the output is known to be affine in weight and bias
    def stats(self) -> tuple[np.ndarray, np.ndarray]:
        "Mean and std in float64: two numbers, or (C,) each where each channel is normalized."
    def shift(self, by: np.ndarray) -> None:
        "Add `by` to the bias."
    def scale(self, by: np.ndarray) -> None:
        "Multiply the weight by `by`."


# Most statistics are one number, and numpy's functions on one number are slow.

def _any(yes: np.ndarray) -> bool: return yes.any() if yes.ndim else bool(yes)


def _where(yes: np.ndarray, a: np.ndarray, b: float) -> np.ndarray:
    if yes.ndim: return np.where(yes, a, b)
    return a if yes else np.float64(b)


def run_loops(
    loops: Loops,  # From `parse_order`
    meter: Meter,  # What to measure and move
    target_mean: float,
    target_std: float,
    tol: float,  # A statistic this close to its target is left alone
    max_steps: int,  # Steps that one loop may take
) -> str:  # "", or why the loops fail: "unresponsive" (to the weight), "immovable" (by the bias), "non-finite"
    """Run each loop until its statistics are within `tol`: `bias -= mean`, `weight /= std`, as the thread writes them.

    A joint loop takes both statistics before it corrects either, and leaves one within `tol` alone."""
    with np.errstate(all='ignore'):
        for words in loops:
            why = _run_loop(words, meter, target_mean, target_std, tol, max_steps)
            if why: return why
    return ''


def _run_loop(
    words: tuple[str, ...], meter: Meter, target_mean: float, target_std: float, tol: float, max_steps: int
) -> str:
    "Run one loop; as `run_loops`."
    mean,std = meter.stats()
    std_at_start,shifts,scales = std,'mean' in words and meter.can_shift,'std' in words
    for _ in range(max_steps):
        to_shift = (abs(mean - target_mean) > tol) & shifts
        to_scale = (abs(std - target_std) > tol) & (std > 0) & scales  # a channel that does not vary cannot be scaled
        shift,scale = _any(to_shift),_any(to_scale)
        if not (shift or scale): break
        factor = _where(to_scale, target_std/std, 1.)
        if shift: meter.shift(_where(to_shift, target_mean - mean, 0.))
        if scale: meter.scale(factor)
        was,(mean,std) = std,meter.stats()
        if _any(~np.isfinite(mean + std)): return 'non-finite'
        if not (meter.affine or shift or _responds(factor, std/was)): return 'unresponsive'
    else:
        # The biases of an affine unit may differ by more than the target std. No scale of its weight changes that.
        std_is_off = (abs(np.log(std/target_std)) > _MIN_RESPONSE) & (std > 0)
        if meter.affine and scales and _any(std_is_off): return 'unresponsive'
        if not meter.affine and shifts and _any(abs(mean - target_mean) > tol): return 'immovable'
    kills = shifts and not scales and _any(std < _MIN_STD_KEPT*std_at_start)
    return 'immovable' if kills else ''


def _responds(factor: np.ndarray, change: np.ndarray) -> bool:
    "Whether the std changes as its weight is scaled by `factor`."
    asked,got = np.log(factor),np.log(change)
    telling = abs(asked) > _TELLING
    if not _any(telling): return True
    response,grows = np.median((got/asked)[telling]),np.median(asked[telling]) > 0
    return response >= (_MIN_RESPONSE_GROWING if grows else _MIN_RESPONSE)


class AffineMeter:
    """Runs the loops on the moments of a unit's output, which is `z + bias` with `z` linear in the weight.

    With the weight scaled by `a` and the bias at `b`, and equal counts per channel,
    `mean(o) = mean_c(a m_c + b_c)` and `var(o) = mean_c(a**2 v_c) + var_c(a m_c + b_c)`.
    Nothing is changed until the caller applies `weight_scale` and `bias_shift`."""
    affine = True

    def __init__(self,
        z: Moments,  # Of the output without its bias: by channel, or of the whole where all biases are the same
        bias: np.ndarray,  # (C,) float64, or one number for all
        can_shift: bool,  # Whether the bias may be moved
        per_channel: bool  # Normalize each channel, or the whole output
    ):
        self.z,self.bias,self.can_shift,self.per_channel = z,bias,can_shift,per_channel
        self.weight_scale = np.ones_like(z.mean) if per_channel else np.float64(1)
        self.bias_shift = np.zeros_like(z.mean) if per_channel else np.float64(0)
        if not per_channel: self._prepare_whole()

    def _prepare_whole(self) -> None:
        "The whole depends on a few numbers: the means of z and of the bias, and the parts of var(a z + b)."
        z,bias,c = self.z,self.bias,self.z.mean.size
        self.unbias = unbias(z.count*c)
        self.mean_z,self.var_z,self.mean_b,self.cov,self.var_b = z.mean,z.var,bias,0.,0.
        if not z.mean.ndim: return
        self.mean_z,self.mean_b = z.mean.sum()/c,bias.sum()/bias.size
        m,b = z.mean - self.mean_z,bias - self.mean_b
        self.var_z = z.var.sum()/z.var.size + m @ m/c
        self.cov,self.var_b = 2*(m*b).sum()/c,(b*b).sum()/b.size

    def stats(self) -> tuple[np.ndarray, np.ndarray]:
        if self.per_channel: return self.z.affine(self.weight_scale, self.bias + self.bias_shift).stats(True)
        a = self.weight_scale
        var = (a*a*self.var_z + a*self.cov + self.var_b)*self.unbias
        return a*self.mean_z + self.mean_b + self.bias_shift, np.sqrt(np.maximum(var, 0.))

    def shift(self, by: np.ndarray) -> None: self.bias_shift = self.bias_shift + by

    def scale(self, by: np.ndarray) -> None: self.weight_scale = self.weight_scale*by
