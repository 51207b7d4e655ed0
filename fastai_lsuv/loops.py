"The loop orders: reading `\"std mean\"`, and running the loops on whatever can be measured, shifted and scaled."
from __future__ import annotations

from typing import Protocol

import numpy as np

from .moments import Moments, unbias

__all__ = ['ORDERS', 'parse_order', 'run_loops', 'Meter', 'AffineMeter']

WORDS = ('mean', 'std')

ORDERS = {
    'std mean': "std loop, then mean loop: the thread's last post (the default)",
    'mean std': "mean loop, then std loop: the lesson-11 notebook; leaves means off zero",
    'mean+std': "one joint loop: the thread's first post",
    'mean std mean std': "the two loops run twice: the thread's second post",
    'std': "variance only: Mishkin & Matas 2016, Algorithm 1, and the Torch port",
}

# A step that should scale the output and moves its std by less than this share (in logarithms) was to no effect.
_MIN_RESPONSE, _TELLING = 0.1, 0.02
# A weight that is small beside the biases answers little at first and more with each step that makes it larger.
_STIRS = 1e-3
# A mean loop that costs more than half of the std is killing activations, not centring them.
_MIN_STD_KEPT = 0.5


def parse_order(
    order: str  # Loops in the order they run, separated by spaces; `+` joins words into one loop
) -> tuple[tuple[str, ...], ...]:  # One tuple of words a loop
    "Read an order such as `\"std mean\"` or `\"mean+std\"`. Raises `TypeError` or `ValueError` with the words it takes."
    takes = "it takes the words 'mean' and 'std', separated by spaces or joined by '+', such as " + ', '.join(map(repr, ORDERS))
    if not isinstance(order, str): raise TypeError(f"order: got {order!r} of type {type(order).__name__}; {takes}")
    loops = tuple(tuple(loop.split('+')) for loop in order.split())
    if not loops: raise ValueError(f"order: got {order!r}, which holds no loop; {takes}")
    for loop in loops:
        for word in loop:
            if word not in WORDS: raise ValueError(f"order: unknown word {word!r} in {order!r}; {takes}")
        if len(set(loop)) < len(loop): raise ValueError(f"order: {'+'.join(loop)!r} in {order!r} names a word twice; {takes}")
    return loops


class Meter(Protocol):
    "What the loops need of a unit: to measure its output, and to move what it is made of."
    can_shift: bool  # Whether there is a bias to move the mean with
    affine: bool  # Whether the output is known to be affine in weight and bias, and answers as such
    def stats(self) -> tuple[np.ndarray, np.ndarray]: "Mean and std, float64: two numbers, or (C,) each when each channel is normalized."
    def shift(self, by: np.ndarray) -> None: "Add `by` to the bias."
    def scale(self, by: np.ndarray) -> None: "Multiply the weight by `by`."


def _off(stat: np.ndarray, target: float, tol: float) -> np.ndarray: return abs(stat - target) > tol

def _any(yes: np.ndarray) -> bool: return yes.any() if yes.ndim else bool(yes)  # most have one number to look at, and numpy is slow at that

def _where(yes: np.ndarray, a: np.ndarray, b: float) -> np.ndarray: return np.where(yes, a, b) if yes.ndim else a if yes else np.float64(b)


def run_loops(
    loops: tuple[tuple[str, ...], ...],  # From `parse_order`
    meter: Meter,  # What to measure and move
    target_mean: float,
    target_std: float,
    tol: float,  # A statistic this close to its target is left alone
    max_steps: int,  # Steps that one loop may take
) -> str:  # "" or why the loops were of no use: "unresponsive" (to the weight), "immovable" (by the bias), "non-finite"
    """Run each loop until its statistics are within `tol`: `bias -= mean`, `weight /= std`, as the thread writes them.

    Both statistics of a joint loop are taken before either is corrected, and one within `tol` is left alone."""
    with np.errstate(all='ignore'):
        mean,std = meter.stats()
        for words in loops:
            shifts,scales = 'mean' in words and meter.can_shift, 'std' in words
            std_at_start = std
            for _ in range(max_steps):
                to_shift = _off(mean, target_mean, tol) & shifts
                to_scale = _off(std, target_std, tol) & (std > 0) & scales  # a channel that does not vary cannot be scaled; it is left as it is
                shift,scale = _any(to_shift),_any(to_scale)
                if not (shift or scale): break
                factor = _where(to_scale, target_std/std, 1.)
                if shift: meter.shift(_where(to_shift, target_mean - mean, 0.))
                if scale: meter.scale(factor)
                was,(mean,std) = std,meter.stats()
                if _any(~np.isfinite(mean + std)): return 'non-finite'
                if meter.affine or shift: continue
                asked,got = np.log(factor),np.log(std/was)
                telling = abs(asked) > _TELLING  # by less, rounding drowns the response
                if not _any(telling): continue
                response,grows = np.median((got/asked)[telling]),np.median(asked[telling]) > 0
                if response < (_STIRS if grows else _MIN_RESPONSE): return 'unresponsive'
            else:
                # The biases of an affine unit may differ by more than the target std, and no scale of its weight changes that.
                if meter.affine and scales and (abs(np.log(std/target_std)) > _MIN_RESPONSE)[std > 0].any(): return 'unresponsive'
                if not meter.affine and shifts and _any(_off(mean, target_mean, tol)): return 'immovable'
            if shifts and not scales and _any(std < _MIN_STD_KEPT*std_at_start): return 'immovable'
    return ''


class AffineMeter:
    """A unit whose output is `z + bias`, with `z` linear in the weight: the loops run on the moments of `z` alone.

    With the weight scaled by `a` and the bias at `b`, and equal counts per channel,
    `mean(o) = mean_c(a m_c + b_c)` and `var(o) = mean_c(a**2 v_c) + var_c(a m_c + b_c)`.
    Nothing is touched until the caller applies `weight_scale` and `bias_shift`."""
    affine = True
    def __init__(self,
        z: Moments,  # Moments of the output without its bias, by channel unless all biases are the same and the whole is normalized
        bias: np.ndarray,  # (C,) float64, or one number for all
        can_shift: bool,  # Whether the bias may be moved
        per_channel: bool  # Normalize each channel, or the whole output
    ):
        self.z,self.bias,self.can_shift,self.per_channel = z,bias,can_shift,per_channel
        self.weight_scale,self.bias_shift = (np.ones_like(z.mean),np.zeros_like(z.mean)) if per_channel else (np.float64(1),np.float64(0))
        if per_channel: return
        # The whole depends on a few numbers: the means of z and of the bias, and the parts of var(a z + b).
        c = z.mean.size
        self.unbias = unbias(z.count*c)
        self.mean_z,self.var_z,self.mean_b,self.cov,self.var_b = z.mean,z.var,bias,0.,0.
        if z.mean.ndim:
            self.mean_z,self.mean_b = z.mean.sum()/c, bias.sum()/bias.size
            m,b = z.mean - self.mean_z, bias - self.mean_b
            self.var_z,self.cov,self.var_b = z.var.sum()/z.var.size + m @ m/c, 2*(m*b).sum()/c, (b*b).sum()/b.size

    def stats(self):
        if self.per_channel: return self.z.affine(self.weight_scale, self.bias + self.bias_shift).stats(True)
        a = self.weight_scale
        var = (a*a*self.var_z + a*self.cov + self.var_b)*self.unbias
        return a*self.mean_z + self.mean_b + self.bias_shift, np.sqrt(np.maximum(var, 0.))

    def shift(self, by): self.bias_shift = self.bias_shift + by
    def scale(self, by): self.weight_scale = self.weight_scale*by
