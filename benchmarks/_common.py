"Helpers that the benchmarks share: the packages as functions of a model and a mini-batch, passes, times and tables."
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from fastai_lsuv import lsuv_init

ROOT = Path(__file__).parent.parent
RESULTS,IMAGES = ROOT/'benchmarks'/'results', ROOT/'nbs'/'images'
COLORS = {'fastai_lsuv': '#1b6ca8', 'lsuv': '#d1793b', 'anyinit': '#8a8f98'}
CPU = torch.device('cpu')


class _Adapted(nn.Module):
    "A model with the signature that a peer calls."
    def __init__(self, model, keys=None):
        super().__init__()
        self.model,self.keys = model,keys


class _OneInput(_Adapted):
    "Takes one argument: a tuple or dict of the model's inputs."
    def forward(self, inputs):
        return self.model(**inputs) if isinstance(inputs, dict) else self.model(*inputs)


class _Positional(_Adapted):
    "Takes positional arguments, for a model that takes keywords."
    def forward(self, *inputs):
        return self.model(**dict(zip(self.keys, inputs)))


def run_fastai_lsuv(model, batch, **kwargs):
    return lsuv_init(model, batch, **kwargs)


def run_lsuv(model, batch, **kwargs):
    "`lsuv`, silent. It calls the model with one argument, so several inputs are wrapped into one."
    # `lsuv` keeps counters in globals. After an exception they are wrong, so each run loads the module again.
    lib = importlib.reload(importlib.import_module('lsuv.lsuvinit'))
    device = next((p.device for p in model.parameters()), CPU)
    model = model if isinstance(batch, torch.Tensor) else _OneInput(model)
    lib.LSUVinit(model, batch, verbose=False, device=device, **kwargs)


def run_anyinit(model, batch, **kwargs):
    "`anyinit` in its empirical mode. It takes several inputs as a list."
    import anyinit
    if isinstance(batch, dict):
        model,batch = _Positional(model, list(batch)),list(batch.values())
    if isinstance(batch, tuple):
        batch = list(batch)
    anyinit.initialize(model, 'empirical', batch, **kwargs)


PACKAGES = {'fastai_lsuv': run_fastai_lsuv, 'lsuv': run_lsuv, 'anyinit': run_anyinit}


def installed(names):
    "Those of `names` that are installed. Prints which are not."
    found = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f'{name} is not installed: left out (pip install "fastai_lsuv[bench]")')
        else:
            found.append(name)
    return found


def label(package):
    "A package with its version."
    return f'{package} {version(package)}'


def of_the_tests(name):
    "A module of the tests."
    spec = importlib.util.spec_from_file_location(name, ROOT/'tests'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def networks():
    "The table of architectures that the tests use."
    return of_the_tests('networks').NETWORKS


def plain(model):
    "The model itself, without `torch.compile`."
    return getattr(model, '_orig_mod', model)


class Used(NamedTuple):
    "A weight that a layer or an operation takes."
    name: str  # Of the layer, or of the parameter or its slice
    weight: Any  # Identifies the parameter, or the slice of it
    elements: int
    std: float  # Of what the layer or the operation puts out


def used(model, batch):
    """The weights of two or more dimensions that layers and operations take, and the std that each of them makes.

    The judge of the tests measures it. It has hooks and a mode of its own."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    modules,slices,found = dict(model.named_modules()),{},[]
    stds = of_the_tests('judging').judge(model, batch)
    for name in stds:
        slices.setdefault(name.split('[')[0], []).append(name)
    for name, std in stds.items():
        base = name.split('[')[0]
        if base in sizes:
            found.append(Used(name, name, sizes[base]//len(slices[base]), std))
        elif base in modules:
            layer = getattr(modules[base], 'out_proj', modules[base])
            found += [Used(name, id(p), p.numel(), std) for p in layer.parameters() if p.dim() > 1]
    return found


def elements_reached(found, tol=math.inf):
    "Elements of weights whose output has a std within `tol` of 1, each counted once."
    return sum({u.weight: u.elements for u in found if abs(u.std - 1) <= tol}.values())


def first_line(e):
    "An exception as one short line."
    return f'{type(e).__name__}: {e}'.splitlines()[0][:160]


def on_device(x, device):
    "A tensor, or all tensors of a tuple or dict, on `device`."
    if isinstance(x, torch.Tensor): return x.to(device)
    if isinstance(x, dict): return {k: on_device(v, device) for k, v in x.items()}
    if isinstance(x, tuple): return tuple(on_device(v, device) for v in x)
    return x


def without_dropout(model):
    "Put the model in training mode, with all kinds of dropout off."
    model.train()
    for m in model.modules():
        if isinstance(m, _DropoutNd):
            m.p = 0.
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):
            m.dropout = 0.
        if any(s in type(m).__name__ for s in ('Drop', 'Stochastic')):
            m.training = False
        if hasattr(m, 'drop_rate'):
            m.drop_rate = 0.  # timm's models hand it to `F.dropout`


@torch.no_grad()
def forward(model, batch):
    "A plain forward pass of the model as it trains, without dropout."
    without_dropout(model)
    stance = torch.compiler.set_stance('force_eager') if hasattr(torch.compiler, 'set_stance') else nullcontext()
    with stance:
        return call(model, batch)


def call(model, batch):
    "The model's output for a mini-batch: a tensor, or a tuple or dict of inputs."
    if isinstance(batch, dict): return model(**batch)
    if isinstance(batch, tuple): return model(*batch)
    return model(batch)


@contextmanager
def passes_begun(model) -> Iterator[list[int]]:
    """Counts the forward passes that begin. `[0]` of the result is the count.

    A pass is a call of the model, or a run of the graph that anyinit traces from it."""
    n,run = [0],fx.Interpreter.run

    def add(*args):
        n[0] += 1

    def counted(self, *args, **kwargs):
        if type(self).__module__.startswith('anyinit'):  # compilers run interpreters, too
            add()
        return run(self, *args, **kwargs)

    handle = model.register_forward_pre_hook(add)
    fx.Interpreter.run = counted
    try:
        yield n
    finally:
        fx.Interpreter.run = run
        handle.remove()


def timed(f, device=CPU, clock=time.perf_counter):
    "Seconds that `f()` takes, by the wall clock or by the processor's clock (`time.process_time`)."
    def synchronize():
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
    synchronize()
    start = clock()
    f()
    synchronize()
    return clock() - start


def markdown(columns, rows):
    "A markdown table. The first column is aligned to the left, the others to the right."
    def line(cells):
        return '| ' + ' | '.join(map(str, cells)) + ' |'
    rule = '|:---' + '|---:'*(len(columns) - 1) + '|'
    return '\n'.join([line(columns), rule, *map(line, rows)]) + '\n'


def where(device=CPU):
    "The conditions of a run, in a phrase."
    if device.type == 'cuda': return f'torch {torch.__version__}, {torch.cuda.get_device_name(device)}'
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {threads} CPU thread{'s'*(threads > 1)}"
