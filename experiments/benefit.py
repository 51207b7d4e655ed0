"Does it help? Networks that people train, from the start they come with and from LSUV's, a table of what came of it."
import time
import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Callable

import pandas as pd
import torch
from fastai.basics import SGD, Adam, Learner, progress_bar
from fastcore.script import call_parse
from torch import Tensor, nn

from fastai_lsuv import LSUVCallback

from . import tasks
from .data import get_images
from .ledger import Ledger
from .study import OUT, numbers, positive, save, say, seeded, word, words
from .tasks import Task
from .verdict import TRAINS, behind, compared, counts, gains, picture, rates, scores, steps
from .zoo import ZOO, Entry

BUILT,KEPT,MIRRORED = 'as built','kept','mirrored'
STARTS: dict[str, dict[str, Any] | None] = {  # Options of `LSUVCallback`
    BUILT: None,
    KEPT: dict(order='std mean'),
    'kept, std': dict(order='std'),
    'orthonormal': dict(order='std mean', preinit='orthogonal'),
    'orthonormal, std': dict(order='std', preinit='orthogonal'),
    MIRRORED: dict(order='std mean', preinit='mirrored'),
    'mirrored, std': dict(order='std', preinit='mirrored'),
}
APART = ', norms apart'  # Such a start leaves the layers alone whose scale a norm takes away
BESIDE_NORMS = [BUILT, KEPT, KEPT + APART, 'kept, std', 'kept, std' + APART, 'orthonormal', 'orthonormal' + APART]
SHARES = (.9, .75, .5, .25)  # Of the loss of a constant answer; the steps to each are counted


@dataclass(frozen=True)
class Scale:
    "How much is trained."
    n: int  # Images to train on; 0: all
    size: int  # Pixels a side of the images
    epochs: int
    networks: list[str]  # Of `ZOO`
    bs: int = 64


SCALES = {
    'ci': Scale(128, 8, 1, list(ZOO)),
    'small': Scale(0, 8, 4, [name for name, entry in ZOO.items() if entry.size == 8]),
    'medium': Scale(4000, 16, 4, [name for name, entry in ZOO.items() if entry.size == 16]),
}
KEYS = ['scale', 'data', 'network', 'optimizer', 'start', 'lr', 'seed']
RESULTS = ['score', 'loss', 'share', *(f'steps_{s:g}' for s in SHARES), 'steps', 'normalized', 'undone', 'seconds']


@call_parse
def benefit(
    data: str = 'digits',  # Images: 'digits', 'mnist', 'cifar', or a folder, as of the other experiments
    download: bool = False,  # Let fastai fetch 'mnist' or 'cifar'
    n: int = -1,  # Images to train on; 0: all; by default those of the scale
    scale: str = 'small',  # 'ci', 'small' (images of 8x8) or 'medium' (16x16)
    networks: str = '',  # Networks to train; '' takes those of the scale
    lrs: str = '0.001,0.005,0.025',  # Learning rates of Adam
    sgd_lrs: str = '0.01,0.05,0.25',  # Learning rates of SGD
    seeds: int = 3,  # Runs of each arm, from seeds 1, 2, ...
    out: str = OUT  # Folder for tables and picture; '' saves nothing
) -> pd.DataFrame:  # A row a run
    """Networks that people train, each from the start it comes with and from LSUV's, at three learning rates.

    Adam trains all of them, SGD some, by `fit_one_cycle`. A finished run is appended to `benefit_runs.csv` in the
    folder `--out`. A second start of the command goes on where the first was stopped."""
    positive(seeds=seeds)
    at = SCALES[word('scale', scale, SCALES)]
    names = words('networks', networks, ZOO) if networks else at.networks
    rates = {'Adam': numbers('lrs', lrs), 'SGD': numbers('sgd-lrs', sgd_lrs)}
    images = cache(lambda: get_images(data, n=at.n if n < 0 else n, size=at.size, download=download))
    task = cache(lambda name: _TASKS[name](images))
    ledger = Ledger(Path(out)/'benefit_runs.csv' if out else None, KEYS, RESULTS)
    jobs = [dict(scale=scale, data=data, **arm) for arm in arms(names, rates, seeds)]
    for job in progress_bar([job for job in jobs if job not in ledger], leave=False):
        ledger.add(job | run(ZOO[job['network']], task, job, at))
    df = ledger.df()
    df = df[df.scale.eq(scale) & df.data.eq(data) & df.network.isin(names)]
    _report(df, out)
    return df


def _report(df: pd.DataFrame, out: str) -> None:
    "Print the tables, and save them and the picture."
    most = df.groupby(['network', 'optimizer', 'start']).lr.nunique().max()
    say(f'Score at the best of {most} learning rates, %: accuracy, or for the MLP the variance explained', scores(df))
    say(f"Learning rates at which the loss gets below {TRAINS:g} of a constant answer's, with every seed", rates(df))
    say("Steps until the training loss is 0.75 of a constant answer's, at the rate that gets there first",
        steps(df, .75))
    every = [start for start in STARTS if start in set(df.start)]
    versus = compared(df, BUILT)
    say(f'Networks on which a start is ahead of {BUILT!r}, level with it, or behind',
        counts(versus))
    say('Points behind the best of these starts', behind(df, every))
    say(f'Points gained over {KEPT!r}, mean over the networks and its standard error', gains(df, every, KEPT))
    save('benefit', out, picture(df, every), compared=versus)


_TASKS: dict[str, Callable[[Callable], Task]] = {
    'classify': lambda images: tasks.classify(images()),
    'segment': lambda images: tasks.segment(images()),
    'diabetes': lambda images: tasks.diabetes(),
    'tumours': lambda images: tasks.tumours(),
    'pages': lambda images: tasks.pages(),
    'characters': lambda images: tasks.characters(),
}


def arms(
    names: list[str],  # Of `ZOO`
    rates: dict[str, list[float]],  # Learning rates of each optimizer
    seeds: int
) -> list[dict[str, Any]]:  # What tells the runs apart
    "The runs to come. Those of the first seed come first, so that what is done early is a table already."
    def starts(name, opt):
        if opt == 'SGD' and not ZOO[name].sgd: return []
        return BESIDE_NORMS if ZOO[name].normed else list(STARTS)
    return [dict(network=name, optimizer=opt, start=start, lr=lr, seed=seed)
            for seed, opt in product(range(1, seeds + 1), rates) for name in names
            for start in starts(name, opt) for lr in rates[opt]]


def before_norms(
    model: nn.Module,
    x: Tensor  # Inputs
) -> list[str]:  # Their names
    "Find the conv and linear layers whose output may be four times as large, and the model puts out the same."
    model = deepcopy(model).train()
    def scaled(name):
        hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: 4*out)
        out = model(x)
        hook.remove()
        return out
    with torch.no_grad():
        out = model(x)
        layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        return [name for name in layers if torch.allclose(scaled(name), out, rtol=.01, atol=.01*out.std().item())]


def run(
    entry: Entry,
    task: Callable[[str], Task],  # Gives the task of a name
    job: dict[str, Any],  # What tells the run apart
    at: Scale
) -> dict[str, Any]:  # What came of it
    "Train one network by `fit_one_cycle`."
    of,began = task(entry.task),time.process_time()
    seeded(job['seed'])
    dls = of.dls(at.bs)
    model = entry.build(of)
    options = STARTS[job['start'].removesuffix(APART)]
    if job['start'].endswith(APART): options = options | dict(exclude=before_norms(model, dls.one_batch()[0]))
    lsuv = [] if options is None else [LSUVCallback(**options)]
    opt_func = {'Adam': Adam, 'SGD': partial(SGD, mom=.9)}[job['optimizer']]
    learn = Learner(dls, model, of.loss, opt_func=opt_func, metrics=of.score, cbs=[*entry.cbs(), *lsuv])
    with learn.no_logging(), learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # which layers LSUV leaves alone is in the table
        learn.fit_one_cycle(at.epochs*entry.longer, job['lr'])
    _,loss,score = learn.recorder.values[-1]
    steps = steps_to([float(v) for v in learn.recorder.losses], of.constant)
    rows = list(lsuv[0].report) if lsuv else []
    done = sum(r.status in ('ok', 'no bias') for r in rows)
    return dict(score=f'{score:.5g}', loss=f'{loss:.5g}', share=f'{loss/of.constant:.5g}', **steps,
                steps=len(learn.recorder.losses), normalized=f'{done} of {len(rows)}' if lsuv else '',
                undone=bool(lsuv and lsuv[0].report.undone), seconds=f'{time.process_time() - began:.2f}')


def steps_to(
    losses: list[float],  # Smoothed training loss after each step
    constant: float  # Loss of the best constant answer
) -> dict[str, Any]:
    "Steps after which the loss is below each of `SHARES` of the loss of a constant answer; '' if it never is."
    return {f'steps_{s:g}': next((i + 1 for i, v in enumerate(losses) if v < s*constant), '') for s in SHARES}
