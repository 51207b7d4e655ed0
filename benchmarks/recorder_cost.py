"""What recording activations costs: time and peak memory of training with each recorder, over those of plain training.

All contestants train the same ResNet-18 on the same random images in one process, one step each in turn, in an order that
changes from round to round. "Over plain" is the median over rounds of the time of a step over that of the plain step of
the same round; "lower quartile" compares the quartiles of the times instead, which a busy machine disturbs least. The end
of an epoch (the transfer to the host, in ours) is counted into the steps. Every contestant records the same layers
(convolutions and linear ones) at every step. Peak memory is that of a process of its own each on the CPU, and the
allocator's on a GPU.

On a machine that others use too, `--cpu-time --threads 1` counts the time on the processor instead of that on the clock.
torchinstruments is given its cheapest settings (mean and std); it also measures gradients and writes its own files."""
import json, random, resource, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import torch
from fastai.basics import *
from fastai.callback.hook import ActivationStats
from fastcore.script import call_parse
from torchvision.models import resnet18

from fastai_lsuv.recorder import ActivationStatsRecorder

NAMES = ['plain', 'ours', 'fastai', 'torchinstruments', 'ours, histograms', 'fastai, histograms', 'torchinstruments, histograms']


def is_layer(m): return isinstance(m, (nn.Conv2d, nn.Linear))

def instruments(model, hist, folder):
    import torchinstruments as ti
    from torchinstruments.reducers import histogram, mean, std
    from torchinstruments.sampling import AlwaysSampler
    names = {n for n,m in model.named_modules() if is_layer(m)}
    ti.inject_observer(model, output_dir=folder, sampler=AlwaysSampler(), selector=lambda n, m: n in names, reducers=(mean(), std()),
                       histograms=(histogram(bins=40, value_range=(0., 10.), every_n_samples=1 if hist else 10**9),))


class Contestant:
    "A Learner with one way of recording, trained a step at a time."
    def __init__(self, name, batches, device, folder, clock=time.perf_counter):
        self.name,self.clock = name,clock
        torch.manual_seed(0)
        model = resnet18(num_classes=10).to(device)
        dls = DataLoaders(DataLoader(batches, bs=None), DataLoader(batches[:0], bs=None), device=device)
        self.learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=folder, default_cbs=False, cbs=[TrainEvalCallback, Recorder, CastToTensor])
        self.sync = torch.cuda.synchronize if device.type == 'cuda' else noop
        hist = name.endswith('histograms')
        if name.startswith('ours'): self.learn.add_cb(ActivationStatsRecorder(hist=hist))
        if name.startswith('fastai'): self.learn.add_cb(ActivationStats(with_hist=hist, modules=[m for m in model.modules() if is_layer(m)]))
        if name.startswith('torchinstruments'): instruments(model, hist, Path(folder)/name.replace(', ', '_'))
        self.learn.create_opt()
        self.learn.dl,self.learn.n_iter,self.learn.n_epoch,self.learn.logger = dls.train,len(batches),1,noop
        self.events('before_fit', 'before_epoch', 'before_train')

    def timed(self, f, *args):
        self.sync()
        start = self.clock()
        f(*args)
        self.sync()
        return self.clock() - start

    def events(self, *names):
        for n in names: self.learn(n)

    def step(self, i, b): return self.timed(self.learn.one_batch, i, b)
    def finish(self): return self.timed(self.events, 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit')


def peak_rss():
    "Most memory this process ever held, in MB."
    status = Path('/proc/self/status')  # `getrusage` counts what the parent held when it forked
    if status.exists(): return next(int(l.split()[1]) for l in status.read_text().splitlines() if l.startswith('VmHWM'))/1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)


def peak(name, batches, device, folder):
    "Peak memory of an epoch, in MB."
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    c = Contestant(name, batches, device, folder)
    for i,b in enumerate(batches): c.step(i, b)
    c.finish()
    return torch.cuda.max_memory_allocated()/2**20 if device.type == 'cuda' else peak_rss()


@call_parse
def main(
    rounds:int=100, # Steps that each contestant trains
    batch:int=32, # Images a batch
    size:int=64, # Height and width of the images
    cpu_time:bool=False, # Count time on the processor instead of on the clock
    threads:int=0, # CPU threads; 0: torch's default
    device:str='', # 'cuda' or 'cpu'; default: CUDA where there is one
    only:str='', # Contestants, separated by ';'; default: all whose package is installed
    no_memory:bool=False, # Skip the peak memory, which on the CPU takes a process a contestant
    as_json:bool=False, # Print JSON instead of a table
    peak_of:str='', # (Used internally) print the peak memory of this contestant
):
    "Time and peak memory of recording activations, over plain training."
    warnings.simplefilter('ignore')
    if threads: torch.set_num_threads(threads)
    dev,clock = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu')),time.process_time if cpu_time else time.perf_counter
    torch.manual_seed(0)
    batches = [(torch.randn(batch, 3, size, size, device=dev), torch.randint(0, 10, (batch,), device=dev)) for _ in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        if peak_of: return print(json.dumps(peak(peak_of, batches, dev, folder)))
        names = [n.strip() for n in only.split(';')] if only else NAMES
        if 'plain' not in names: names = ['plain'] + names
        try: import torchinstruments  # noqa: F401
        except ImportError: names = [n for n in names if not n.startswith('torchinstruments')]
        each = [Contestant(n, batches, dev, folder, clock) for n in names]
        for i in range(3): [c.step(i, batches[i]) for c in each]  # warm up
        times,rng = {n:[] for n in names},random.Random(0)
        for i in range(rounds):
            for c in rng.sample(each, len(each)): times[c.name].append(c.step(i % 10, batches[i % 10]))
        ends = {c.name:c.finish()/rounds for c in each}
        times = {n:[t + ends[n] for t in ts] for n,ts in times.items()}
        low,rows = {n:statistics.quantiles(ts, n=4)[0] for n,ts in times.items()},[]
        for n in names:
            ratios = [t/p for t,p in zip(times[n], times['plain'])]
            rows.append(dict(name=n, ms=1e3*statistics.median(times[n]), over=100*(statistics.median(ratios)-1), error=125*statistics.stdev(ratios)/rounds**0.5,
                             low_ms=1e3*low[n], low_over=100*(low[n]/low['plain']-1)))
        each.clear()
        for r in rows if not no_memory else ():
            if dev.type == 'cuda': r['peak_mb'] = peak(r['name'], batches, dev, f"{folder}/{r['name']}")
            else:
                cmd = [sys.executable, '-W', 'ignore', __file__, '--peak-of', r['name'], '--batch', str(batch), '--size', str(size), '--device', 'cpu']
                r['peak_mb'] = json.loads(subprocess.run(cmd, capture_output=True, text=True, check=True).stdout)
    setting = dict(device=str(dev), torch=torch.__version__, threads=torch.get_num_threads(), clock='processor' if cpu_time else 'wall', rounds=rounds, batch=batch, size=size)
    if as_json: return print(json.dumps(dict(**setting, rows=rows), indent=1))
    print('ResNet-18; ' + ', '.join(f'{k} {v}' for k,v in setting.items()))
    print(f"{'':<30} {'ms/step':>8} {'over plain':>20} {'lower quartile':>21} {'peak MB':>8}")
    for r in rows:
        over,lower = f"{r['over']:+.1f} % (± {r['error']:.1f})",f"{r['low_ms']:.1f} ({r['low_over']:+.1f} %)"
        print(f"{r['name']:<30} {r['ms']:>8.1f} {over:>20} {lower:>21} {r.get('peak_mb', float('nan')):>8.0f}")
