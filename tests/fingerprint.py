"All that a model holds, in a form that compares bit for bit."
import random
from collections import OrderedDict, deque

import numpy as np
import torch


def contents(v):
    "A value as plain data: tensors and arrays by their bits, collections by their contents, all else as it is."
    if isinstance(v, torch.Tensor):
        dense = v if v.layout == torch.strided else v.to_dense()
        bits = dense.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if v.numel() else b''
        return type(v).__name__, v.dtype, v.shape, v.requires_grad, bits
    if isinstance(v, np.ndarray): return v.dtype, v.shape, v.tobytes()
    if isinstance(v, random.Random): return v.getstate()
    if isinstance(v, OrderedDict): return [(k, contents(o)) for k, o in v.items()]  # hooks have an order
    if isinstance(v, dict): return {k: contents(o) for k, o in v.items()}
    if isinstance(v, (list, tuple, deque)): return type(v).__name__, [contents(o) for o in v]
    return set(v) if isinstance(v, set) else v


def fingerprint(model, weights=True):
    "Every module's attributes, mode and hooks included; with `weights=False`, all but its parameters."
    def of(m): return {k: contents(v) for k, v in vars(m).items() if weights or k != '_parameters'}
    return {n: of(m) for n, m in model.named_modules()}
