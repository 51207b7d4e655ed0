"`ARCHITECTURE.md` is true: what it names exists, and what it tells to do works."
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fastai_lsuv
from fastai_lsuv import lsuv_init
from fastai_lsuv.units import weights

PAGE = (Path(__file__).parent.parent/'ARCHITECTURE.md').read_text()
# What is not the package's own: others' names, and arguments of `lsuv_init`.
OTHERS = {'torch.distributed', 'torch.addmm', 'torch.mm', 'transformers', 'transformers.pytorch_utils.Conv1D', 'Conv1D',
          'c_attn.weight', 'forward', 'weight', 'bias', 'Learner', *inspect.signature(lsuv_init).parameters}


def modules_of():
    "All modules of the package, by their last name; the first of a name counts."
    found = {}
    for m in pkgutil.walk_packages(fastai_lsuv.__path__, 'fastai_lsuv.'):
        if '__main__' not in m.name and 'experiments.' not in m.name:
            found.setdefault(m.name.rpartition('.')[2], importlib.import_module(m.name))
    return found


def test_each_name_exists():
    modules = modules_of()
    held = {k for m in modules.values() for k in vars(m)}
    classes = {k: v for m in modules.values() for k, v in vars(m).items() if isinstance(v, type)}
    for name in set(re.findall(r'`([A-Za-z_][\w.]*)`', PAGE)) - OTHERS:
        first,*rest = name.split('.')
        owner = modules.get(first) or classes.get(first)
        found = hasattr(owner, rest[0]) if rest else first in modules or first in held
        assert found, f'ARCHITECTURE.md names {name}, which does not exist'


@pytest.mark.filterwarnings('ignore:LSUV did not normalize')
def test_a_target_after_an_activation():
    "A container of layer and activation is at its target, and ends as unresponsive where a norm layer hides the scale."
    normed = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    net,x = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), normed),torch.randn(256, 16)
    report = lsuv_init(net, x, modules=['0', '1'])
    assert [(r.kind, r.status) for r in report] == [('Sequential', 'no bias'), ('Sequential', 'unresponsive')]
    assert net[0](x).std().item() == pytest.approx(1, abs=1e-3) and report[0].mean > 0.5


def test_a_kind_is_one_line(monkeypatch):
    class Conv1D(nn.Module):
        "A linear layer with its weight the other way round, as GPT-2 of `transformers` has it."
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight,self.bias = nn.Parameter(torch.randn(inputs, outputs)*0.02),nn.Parameter(torch.zeros(outputs))
        def forward(self, x): return x @ self.weight + self.bias

    others = ModuleType('transformers.pytorch_utils')
    others.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, 'transformers.pytorch_utils', others)
    monkeypatch.setattr(weights, 'KINDS', [*weights.KINDS])
    net = nn.Sequential(Conv1D(16, 32), nn.GELU(), Conv1D(32, 8))
    found = lsuv_init(net, torch.randn(256, 16) + 1)
    assert [r.name for r in found] == ['0.weight', '2.weight'] and found[0].status == 'no bias'  # it is added elsewhere
    exec(re.search(r'```python\n(.*?)```', PAGE, re.S).group(1), {})
    for options in (dict(), dict(preinit=None), dict(per_channel=True)):
        report = lsuv_init(net, torch.randn(256, 16) + 1, **options)
        assert [(r.name, r.status) for r in report] == [('0', 'ok'), ('2', 'ok')] and report.n_passes == 2
        assert all(s == pytest.approx(1, abs=1e-3) and abs(m) < 1e-3 for m, s in report.pairs)


def test_the_core_needs_torch_alone():
    code = ("import sys; from fastai_lsuv import lsuv_init, layer_stats, LSUVReport; "
            "assert not {'fastai', 'fastcore', 'pandas', 'matplotlib'} & {m.split('.')[0] for m in sys.modules}, "
            "'more than torch'")
    subprocess.run([sys.executable, '-c', code], check=True)
