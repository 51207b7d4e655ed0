"""What recording activations costs: time and peak memory of training with each recorder, over those of plain training.

All contestants train the same ResNet-18 on the same random images in one process. Each trains a step in turn, in an
order that changes from round to round. "Over plain" is the median over rounds of the time of a step over that of the
plain step of the same round. "Lower quartile" compares the quartiles of the times instead, which a busy machine
disturbs least. The end of an epoch (the transfer to the host, in ours) is counted into the steps. Every contestant
records the same layers (convolutions and linear ones) at every step. Peak memory is that of a process of its own each
on the CPU, and the allocator's on a GPU.

On a machine that others use too, `--cpu-time --threads 1` counts time on the processor instead of on the clock.
Histograms are each recorder's default: 80 bins of ours, 40 of fastai's. "sample=4" measures every fourth image of large
activations. torchinstruments is given its cheapest settings; it also measures gradients and writes its own files."""
import importlib.util
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from fastai.basics import *
from fastai.callback.hook import ActivationStats
from fastcore.script import call_parse
from torchvision.models import resnet18

from fastai_lsuv.recorder import ActivationStatsRecorder

NAMES = ['plain', 'ours', 'ours, sample=4', 'fastai', 'torchinstruments', 'ours, histograms',
         'ours, histograms, sample=4', 'fastai, histograms', 'torchinstruments, histograms']
WARM_UP = 3  # Steps of each contestant that are not timed


def is_layer(m):
    return isinstance(m, (nn.Conv2d, nn.Linear))


def instruments(model, hist, folder):
    "Have torchinstruments observe the layers of a model."
    import torchinstruments as ti
    from torchinstruments.reducers import histogram, mean, std
    from torchinstruments.sampling import AlwaysSampler
    names = {n for n, m in model.named_modules() if is_layer(m)}
    bins = histogram(bins=40, value_range=(0., 10.), every_n_samples=1 if hist else 10**9)
    ti.inject_observer(model, output_dir=folder, sampler=AlwaysSampler(), selector=lambda n, m: n in names,
                       reducers=(mean(), std()), histograms=(bins,))


class Contestant:
    "A Learner with one way of recording, trained a step at a time."
    def __init__(self, name, batches, device, folder, clock=time.perf_counter):
        self.name = name
        self.clock = clock
        self.sync = torch.cuda.synchronize if device.type == 'cuda' else noop
        torch.manual_seed(0)
        model = resnet18(num_classes=10).to(device)
        dls = DataLoaders(DataLoader(batches, bs=None), DataLoader(batches[:0], bs=None), device=device)
        self.learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=folder, default_cbs=False,
                             cbs=[TrainEvalCallback, Recorder, CastToTensor])
        self.record(model, Path(folder))
        self.learn.create_opt()
        self.learn.dl, self.learn.n_iter, self.learn.n_epoch, self.learn.logger = dls.train, len(batches), 1, noop
        self.events('before_fit', 'before_epoch', 'before_train')

    def record(self, model, folder):
        "Attach the recorder that the name of the contestant tells."
        who, *options = self.name.split(', ')
        hist = 'histograms' in options
        if who == 'ours':
            sample = 4 if 'sample=4' in options else None
            self.learn.add_cb(ActivationStatsRecorder(hist=hist, sample=sample))
        if who == 'fastai':
            self.learn.add_cb(ActivationStats(with_hist=hist, modules=[m for m in model.modules() if is_layer(m)]))
        if who == 'torchinstruments':
            instruments(model, hist, folder/self.name.replace(', ', '_'))

    def timed(self, f, *args):
        self.sync()
        start = self.clock()
        f(*args)
        self.sync()
        return self.clock() - start

    def events(self, *names):
        for n in names:
            self.learn(n)

    def step(self, i, b):
        return self.timed(self.learn.one_batch, i, b)

    def finish(self):
        return self.timed(self.events, 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit')


def random_batches(batch, size, device):
    torch.manual_seed(0)
    def one():
        return torch.randn(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)
    return [one() for _ in range(10)]


# ---- Time ----

def contest(names, batches, device, folder, clock, rounds):
    "Times of the steps of each contestant, in seconds."
    each = [Contestant(n, batches, device, folder, clock) for n in names]
    for i in range(WARM_UP):
        for c in each:
            c.step(i, batches[i])
    times, rng = {n: [] for n in names}, random.Random(0)
    for i in range(rounds):
        for c in rng.sample(each, len(each)):
            times[c.name].append(c.step(i % 10, batches[i % 10]))
    for c in each:
        end = c.finish()/rounds
        times[c.name] = [t + end for t in times[c.name]]
    return times


def summary(times):
    "A row for each contestant: median time, over plain, and the same of the lower quartile."
    low = {n: statistics.quantiles(ts, n=4)[0] for n, ts in times.items()}
    rows = []
    for n, ts in times.items():
        ratios = [t/p for t, p in zip(ts, times['plain'])]
        rows.append(dict(name=n, ms=1e3*statistics.median(ts), over=100*(statistics.median(ratios)-1),
                         error=125*statistics.stdev(ratios)/len(ts)**0.5, low_ms=1e3*low[n],
                         low_over=100*(low[n]/low['plain']-1)))
    return rows


# ---- Memory ----

def peak_rss():
    "Most memory this process ever held, in MB."
    status = Path('/proc/self/status')  # `getrusage` counts what the parent held when it forked
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith('VmHWM'))/1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)


def peak(name, batches, device, folder):
    "Peak memory of an epoch, in MB."
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    c = Contestant(name, batches, device, folder)
    for i, b in enumerate(batches):
        c.step(i, b)
    c.finish()
    return torch.cuda.max_memory_allocated()/2**20 if device.type == 'cuda' else peak_rss()


def peak_of_own_process(name, batch, size):
    command = [sys.executable, '-W', 'ignore', __file__, '--peak-of', name, '--batch', str(batch), '--size', str(size)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# ---- The command ----

def show(setting, rows):
    print('ResNet-18; ' + ', '.join(f'{k} {v}' for k, v in setting.items()))
    print(f"{'':<30} {'ms/step':>8} {'over plain':>20} {'lower quartile':>21} {'peak MB':>8}")
    for r in rows:
        over, lower = f"{r['over']:+.1f} % (± {r['error']:.1f})", f"{r['low_ms']:.1f} ({r['low_over']:+.1f} %)"
        print(f"{r['name']:<30} {r['ms']:>8.1f} {over:>20} {lower:>21} {r.get('peak_mb', float('nan')):>8.0f}")


def contestants(only):
    "The contestants that are asked for; without torchinstruments where it is not installed."
    names = [n.strip() for n in only.split(';')] if only else NAMES
    if importlib.util.find_spec('torchinstruments') is None:
        names = [n for n in names if not n.startswith('torchinstruments')]
    return names if 'plain' in names else ['plain'] + names


@call_parse
def main(
    rounds:int=100, # Steps that each contestant trains
    batch:int=32, # Images a batch
    size:int=64, # Height and width of the images
    cpu_time:bool=False, # Count time on the processor instead of on the clock
    threads:int=0, # CPU threads; 0: torch's default
    device:str='cpu', # 'cpu' or 'cuda'
    only:str='', # Contestants, separated by ';'; default: all whose package is installed
    no_memory:bool=False, # Skip the peak memory, which on the CPU takes a process a contestant
    as_json:bool=False, # Print JSON instead of a table
    peak_of:str='', # (Used internally) print the peak memory of this contestant
):
    "Time and peak memory of recording activations, over plain training."
    warnings.simplefilter('ignore')
    if threads:
        torch.set_num_threads(threads)
    dev, clock = torch.device(device), time.process_time if cpu_time else time.perf_counter
    batches = random_batches(batch, size, dev)
    with tempfile.TemporaryDirectory() as folder:
        if peak_of: return print(json.dumps(peak(peak_of, batches, dev, folder)))
        rows = summary(contest(contestants(only), batches, dev, folder, clock, rounds))
        for r in rows if not no_memory else ():
            on_gpu = dev.type == 'cuda'
            r['peak_mb'] = (peak(r['name'], batches, dev, f"{folder}/{r['name']}") if on_gpu
                            else peak_of_own_process(r['name'], batch, size))
    setting = dict(device=device, torch=torch.__version__, threads=torch.get_num_threads(),
                   clock='processor' if cpu_time else 'wall', rounds=rounds, batch=batch, size=size)
    if as_json: return print(json.dumps(dict(**setting, rows=rows), indent=1))
    show(setting, rows)
