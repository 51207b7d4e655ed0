"What the benchmarks share: this package and its peers as functions of a model and a mini-batch, and the passes they make."
import importlib, time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import fx, nn

from fastai_lsuv import lsuv_init

ROOT = Path(__file__).parent.parent
RESULTS,IMAGES = ROOT/'benchmarks'/'results', ROOT/'nbs'/'images'
COLORS = {'fastai_lsuv': '#1b6ca8', 'lsuv': '#d1793b', 'anyinit': '#8a8f98'}


class _Adapted(nn.Module):
    "A model under the signature that a peer calls it with."
    def __init__(self, model, keys=None):
        super().__init__()
        self.model,self.keys = model,keys


class _OneInput(_Adapted):
    "Of one argument, a tuple or dict of the model's inputs."
    def forward(self, inputs): return self.model(**inputs) if isinstance(inputs, dict) else self.model(*inputs)


class _Positional(_Adapted):
    "Of positional arguments, for a model that takes keywords."
    def forward(self, *inputs): return self.model(**dict(zip(self.keys, inputs)))


def run_fastai_lsuv(model, batch, **kwargs): return lsuv_init(model, batch, **kwargs)

def run_lsuv(model, batch, **kwargs):
    "`lsuv`, told to be silent. It calls the model with one argument, so one of several inputs is wrapped for it."
    lib = importlib.reload(importlib.import_module('lsuv.lsuvinit'))  # it counts in globals, which an exception leaves half-way
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    lib.LSUVinit(model if isinstance(batch, torch.Tensor) else _OneInput(model), batch, verbose=False, device=device, **kwargs)

def run_anyinit(model, batch, **kwargs):
    "`anyinit` in its empirical mode. It takes several inputs as a list."
    import anyinit
    if isinstance(batch, dict): model,batch = _Positional(model, list(batch)),list(batch.values())
    if isinstance(batch, tuple): batch = list(batch)
    anyinit.initialize(model, 'empirical', batch, **kwargs)

PACKAGES = {'fastai_lsuv': run_fastai_lsuv, 'lsuv': run_lsuv, 'anyinit': run_anyinit}


def installed(names):
    "Those of `names` that are installed; says which are not."
    found = []
    for n in names:
        try: importlib.import_module(n)
        except ImportError: print(f'{n} is not installed: left out (pip install "fastai_lsuv[bench]")')
        else: found.append(n)
    return found


def label(package): return f'{package} {version(package)}'


@contextmanager
def passes_begun(model):
    "Counts forward passes begun: calls of the model, and anyinit's runs of the graph traced from it. The count is `[0]` of what it yields."
    n,run = [0],fx.Interpreter.run
    def add(*args): n[0] += 1
    def counted(self, *args, **kwargs):
        if type(self).__module__.startswith('anyinit'): add()  # compilers run interpreters, too
        return run(self, *args, **kwargs)
    handle = model.register_forward_pre_hook(add)
    fx.Interpreter.run = counted
    try: yield n
    finally:
        fx.Interpreter.run = run
        handle.remove()


def timed(f, device=torch.device('cpu'), clock=time.perf_counter):
    "Seconds that `f()` takes, by the wall clock or by that of the processor (`time.process_time`)."
    sync = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    sync()
    start = clock()
    f()
    sync()
    return clock() - start


def markdown(columns, rows):
    "A markdown table: the first column to the left, the others to the right."
    lines = ['| ' + ' | '.join(columns) + ' |', '|:---' + '|---:'*(len(columns) - 1) + '|']
    return '\n'.join(lines + ['| ' + ' | '.join(map(str, r)) + ' |' for r in rows]) + '\n'


def where(device=torch.device('cpu')):
    "The conditions of a run, in a phrase."
    on = torch.cuda.get_device_name(device) if device.type == 'cuda' else f"{(n := torch.get_num_threads())} CPU thread{'s'*(n > 1)}"
    return f'torch {torch.__version__}, {on}'
