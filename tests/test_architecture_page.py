"`ARCHITECTURE.md` is true: what it names exists, and what it tells to do works."
import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastai_lsuv
from fastai_lsuv import lsuv_init

ROOT = Path(fastai_lsuv.__file__).parent
PAGE = (Path(__file__).parent.parent/'ARCHITECTURE.md').read_text()
ROOMS = [n for cell in re.findall(r'^\|(.*?)\|', PAGE, re.M) for n in re.findall(r'`(\w+)`', cell)]  # from above
PUBLIC = {'lsuv_init', 'layer_stats', 'LSUVCallback', 'ActivationStatsRecorder'}  # Their arguments are a line each
# What is not the package's own: others' names, and arguments of `lsuv_init`.
OTHERS = {'torch.distributed', 'torch.special_linear', '__init__', 'experiments', 'Learner',
          *inspect.signature(lsuv_init).parameters}


def test_each_name_exists():
    modules = {}  # By their last name; the first of a name counts
    for m in pkgutil.walk_packages(fastai_lsuv.__path__, 'fastai_lsuv.'):
        if '__main__' not in m.name: modules.setdefault(m.name.rpartition('.')[2], importlib.import_module(m.name))
    held = {k: v for m in modules.values() for k, v in vars(m).items()}
    for name in set(re.findall(r'`([A-Za-z_][\w.]*)`', PAGE)) - OTHERS:
        first,*rest = name.split('.')
        found = first in modules or first in held
        if rest: found = hasattr(modules.get(first, held.get(first)), rest[0])
        assert found, f'ARCHITECTURE.md names {name}, which does not exist'


def test_each_room_is_on_the_page():
    there = {f.stem for f in ROOT.iterdir() if f.suffix == '.py' or (f/'__init__.py').exists()}
    assert there - {'__init__', '__main__'} == set(ROOMS)


def test_a_room_has_one_door_and_imports_point_one_way():
    for f in ROOT.rglob('*.py'):
        room = f.relative_to(ROOT).parts[0].removesuffix('.py')
        if room in ('__init__', '__main__'): continue
        dots = '.' if f.parent == ROOT else '..'
        for imported in re.findall(rf'^from {re.escape(dots)}(\w[\w.]*) import', f.read_text(), re.M):
            assert '.' not in imported, f'{f} goes past the door of a room: {imported}'
            assert ROOMS.index(imported) < ROOMS.index(room), f'{f} imports {imported}, which stands below {room}'


def test_files_and_classes_are_short():
    for f in ROOT.rglob('*.py'):
        text = f.read_text()
        assert len(text.splitlines()) <= 300, f
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name in PUBLIC: continue
            size,most = node.end_lineno - node.lineno + 1,120 if isinstance(node, ast.ClassDef) else 40
            assert size <= most, f'{f}: {node.name} has {size} lines'


@pytest.mark.filterwarnings('ignore:LSUV did not normalize')
def test_a_target_after_an_activation():
    "A container of layer and activation is at its target, and ends as unresponsive where a norm layer hides the scale."
    normed = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    net,x = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), normed),torch.randn(256, 16)
    report = lsuv_init(net, x, modules=['0', '1'])
    assert [(r.kind, r.status) for r in report] == [('Sequential', 'no bias'), ('Sequential', 'unresponsive')]
    assert net[0](x).std().item() == pytest.approx(1, abs=1e-3) and report[0].mean > 0.5


def test_the_core_needs_torch_alone():
    code = ("import sys; from fastai_lsuv import lsuv_init, layer_stats, LSUVReport; "
            "assert not {'fastai', 'fastcore', 'pandas', 'matplotlib'} & {m.split('.')[0] for m in sys.modules}, "
            "'more than torch'")
    subprocess.run([sys.executable, '-c', code], check=True)
