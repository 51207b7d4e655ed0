"A forward pass writes no weight. They change between passes alone."
from __future__ import annotations

import pytest
import torch
from checked import quietly
from networks import NETWORKS
from torch.overrides import TorchFunctionMode

NOT_FOR_US = 'hand/lazy', 'hand/compiled', 'hand/plain_100_layers'  # no weights yet, functions out of sight, slow
NAMES = [*(n for n in NETWORKS if n.startswith('hand/') and n not in NOT_FOR_US), 'torchvision/squeezenet1_1',
         'timm/nfnet_skipinit', 'fastai/tabular', 'transformers/clip', 'torch_geometric/rgcn']


class Guard(TorchFunctionMode):
    "Looks at a parameter after each function of a forward, one after the other, and at all at its end."
    def __init__(self, model):
        super().__init__()
        self.params = list(model.parameters())
        self.looks,self.forwards = 0,[]  # The weights that each forward begins with
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end)

    def begin(self, *args):
        self.forwards.append([p.detach().clone() for p in self.params])
        self.__enter__()

    def end(self, *args):
        self.__exit__(None, None, None)
        for i, _ in enumerate(self.params): self.look(i)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.look(self.looks % len(self.params))
        return out

    def look(self, i):
        self.looks += 1
        with torch._C.DisableTorchFunction():
            assert torch.equal(self.params[i].detach(), self.forwards[-1][i]), 'a weight was written in a forward'


@pytest.mark.parametrize('preinit', [None, 'orthogonal'])
@pytest.mark.parametrize('name', NAMES)
def test_no_forward_writes_a_weight(name, preinit):
    model,batch = NETWORKS[name]()
    guard = Guard(model)
    report = quietly(model, batch, preinit=preinit)
    assert len(guard.forwards) >= report.n_passes and guard.looks > 3*len(guard.forwards)
    changed = any(not torch.equal(p, q) for p, q in zip(guard.params, guard.forwards[0]))
    assert changed or not any(r.passes for r in report)
