"A forward pass writes no weight. They change between passes, in `Passes.apply`, alone."
from __future__ import annotations

import warnings

import pytest
import torch
from networks import NETWORKS
from torch.overrides import TorchFunctionMode

from fastai_lsuv import lsuv_init
from fastai_lsuv.run.passes import Passes

NOT_FOR_US = 'hand/lazy', 'hand/compiled', 'hand/plain_100_layers'  # no weights yet, functions out of sight, slow
NAMES = [*(n for n in NETWORKS if n.startswith('hand/') and n not in NOT_FOR_US), 'torchvision/squeezenet1_1',
         'timm/nfnet_skipinit', 'fastai/tabular', 'transformers/clip', 'torch_geometric/rgcn']


class Guard(TorchFunctionMode):
    "Looks at a parameter after each function of a forward, one after the other, and at all around it and its modules."
    def __init__(self, model):
        super().__init__()
        held = (p for m in model.modules() for p in m._parameters.values() if p is not None)
        self.params = list({id(p): p for p in held}.values())
        self.was,self.looks = None,0  # Copies, while a forward runs
        for m in model.modules():
            m.register_forward_pre_hook(lambda m, args: self.look(m.parameters(False)))
            m.register_forward_hook(lambda m, args, out: self.look(m.parameters(False)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.was is not None: self.look([self.params[self.looks % len(self.params)]])
        return out

    def look(self, params):
        if self.was is None: return
        self.looks += 1
        with torch._C.DisableTorchFunction():
            for p in params:
                was = self.was.get(id(p))  # A block runs with other parameters in their places
                assert was is None or torch.equal(p.detach(), was), 'a weight was written in a forward'


def copies(params): return {id(p): p.detach().clone() for p in params}


@pytest.mark.parametrize('preinit', [None, 'orthogonal'])
@pytest.mark.parametrize('name', NAMES)
def test_no_forward_writes_a_weight(monkeypatch, name, preinit):
    model,batch = NETWORKS[name]()
    guard,call,passes = Guard(model),Passes.__call__,[]
    start = copies(guard.params)

    def guarded(self, *args, **kwargs):
        guard.was = copies(guard.params)
        passes.append(guard.looks)
        with guard: planned = call(self, *args, **kwargs)
        guard.look(guard.params)
        guard.was = None
        return planned

    monkeypatch.setattr(Passes, '__call__', guarded)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        report = lsuv_init(model, batch, preinit=preinit)
    assert len(passes) == report.n_passes and guard.looks > 4*len(passes)
    changed = any(not torch.equal(p, start[id(p)]) for p in guard.params)
    assert changed or not any(r.passes for r in report)
