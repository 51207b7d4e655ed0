"""The oracle: LSUV as the thread writes it, with `while` loops around full forward passes.

    while mdl(xb) is not None and abs(h.mean)  > 1e-3: m.bias -= h.mean
    while mdl(xb) is not None and abs(h.std-1) > 1e-3: m.weight.data /= h.std

It shares no code with the package, goes through the layers in the order in which they run, and takes one mini-batch."""
from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

MOST_STEPS = 200  # A loop that takes longer has no end


class NoEnd(Exception): "A loop that would run forever."


class Stats:
    "The notebook's hook: mean and std of what a module puts out, of the whole or of each channel."
    def __init__(self, m, per_channel):
        self.m,self.per_channel = m,per_channel
        self.hook = m.register_forward_hook(self)
    def __call__(self, m, args, out):
        out = out.detach()
        if not self.per_channel:
            self.mean,self.std = out.mean(),out.std()
        else:
            dim = out.dim() - 1 if not isinstance(m, _ConvNd) else 1
            rest = [d for d in range(out.dim()) if d != dim]
            self.mean,self.std = out.mean(rest),out.std(rest)
    def remove(self):
        self.hook.remove()


def execution_order(model, batch, modules):
    "The modules of these types, in the order in which they first run."
    ran = []
    def note(m, args, out): ran.append(m)
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, modules)]
    model(*batch)
    for h in hooks:
        h.remove()
    return list(dict.fromkeys(ran))


def per_weight(by, m):
    """One number a channel, in the shape of the weight.

    Output channels come first. In a transposed conv they come second, within each group."""
    if by.dim() == 0: return by
    if isinstance(m, _ConvTransposeNd):
        rows = m.weight.shape[0]//m.groups
        by_group = torch.cat([part.expand(rows, -1) for part in by.view(m.groups, -1).split(1)])
        return by_group.view(*m.weight.shape[:2], *[1]*(m.weight.dim() - 2))
    return by.view(-1, *[1]*(m.weight.dim() - 1))


@torch.no_grad()
def reference_init(model, *batch, order='std mean', modules=(_ConvNd, nn.Linear, nn.Bilinear), mean=0., std=1.,
                   tol=1e-3, per_channel=False):
    """Initialize `model` and return the (mean, std) pairs that its layers then have.

    `std` may be a function of a module."""
    layers = execution_order(model, batch, modules)
    for m in layers:
        h = Stats(m, per_channel)
        target = std(m) if callable(std) else std
        near = tol*min(1., target)  # a small target asks for more
        for loop in order.split():
            words = [w for w in loop.split('+') if w == 'std' or m.bias is not None]
            for _ in range(MOST_STEPS):
                model(*batch)
                off_mean = 'mean' in words and (h.mean - mean).abs() > near
                off_std = 'std' in words and (h.std - target).abs() > near
                if not (torch.as_tensor(off_mean).any() or torch.as_tensor(off_std).any()): break
                if 'std' in words and not (h.std > 0).all():
                    raise NoEnd(f'{type(m).__name__}: its output does not vary')
                # Both were measured before either is corrected, and one that is within tolerance is left alone.
                if torch.as_tensor(off_mean).any():
                    m.bias -= torch.where(off_mean, h.mean - mean, 0.)
                if torch.as_tensor(off_std).any():
                    m.weight.data /= per_weight(torch.where(off_std, h.std/target, 1.), m)
            else:
                raise NoEnd(f'{type(m).__name__}: the {loop} loop does not end')
        h.remove()
    pairs = {}
    hooks = [Stats(m, False) for m in layers]
    model(*batch)
    for h in hooks:
        pairs[h.m] = h.mean.item(), h.std.item()
        h.remove()
    return list(pairs.values())
