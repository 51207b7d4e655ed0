"""What this package and its peers can do, each cell the outcome of a small program that is run here and now.

Initialization: a few small networks, one trait each, initialized by each package and judged from outside. `fastai_lsuv` and `lsuv` have done
it if every layer puts out std 1 (within 0.1), as the network trains; `anyinit`, which aims at something else, if the mean square after every
activation is 1 (within 0.2). What must not change is compared before and after. Recording: a short training with each recorder."""
import tempfile, warnings
from pathlib import Path

import torch
from fastai.basics import *
from fastai.callback.hook import ActivationStats
from fastcore.script import call_parse
from torch.nn.utils.parametrizations import weight_norm

from _common import PACKAGES, RESULTS, installed, label, markdown, passes_begun
from fastai_lsuv import ActivationStatsRecorder, LSUVReport


# --- Initialization: one network a trait

def chain(act=nn.ReLU, **kwargs): return nn.Sequential(nn.Linear(20, 64), act(**kwargs), nn.Linear(64, 64), act(**kwargs), nn.Linear(64, 64), act(**kwargs), nn.Linear(64, 10))


class Layers(nn.Module):
    "Named layers, and an activation for each that needs one."
    def __init__(self, **layers):
        super().__init__()
        for n,m in layers.items(): setattr(self, n, m)


class Backwards(Layers):
    def __init__(self): super().__init__(z=nn.Linear(64, 10), b=nn.Linear(64, 64), a=nn.Linear(20, 64), act_a=nn.ReLU(), act_b=nn.ReLU())
    def forward(self, x): return self.z(self.act_b(self.b(self.act_a(self.a(x)))))

class Repeated(Layers):
    def __init__(self): super().__init__(a=nn.Linear(20, 64), b=nn.Linear(64, 64), z=nn.Linear(64, 10), act=nn.ReLU(), act_1=nn.ReLU(), act_2=nn.ReLU())
    def forward(self, x): return self.z(self.act_2(self.b(self.act_1(self.b(self.act(self.a(x)))))))

class TwoInputs(Layers):
    def __init__(self): super().__init__(a=nn.Linear(20, 64), b=nn.Linear(20, 64), z=nn.Linear(64, 10), act_a=nn.ReLU(), act_b=nn.ReLU())
    def forward(self, left, right): return self.z(self.act_a(self.a(left)) + self.act_b(self.b(right)))

class Branch(Layers):
    def __init__(self): super().__init__(a=nn.Linear(20, 64), b=nn.Linear(64, 64), z=nn.Linear(64, 10), act=nn.ReLU())
    def forward(self, x):
        x = self.act(self.a(x))
        return self.z(x + self.b(x))


def x(n=512): return torch.randn(n, 20)

def normed(): return nn.Sequential(weight_norm(nn.Linear(20, 64)), nn.ReLU(), weight_norm(nn.Linear(64, 64)), nn.ReLU(), weight_norm(nn.Linear(64, 10)))
def with_bn(): return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def outputs(model, batch, kinds, f):
    "`f` of the output of each call of a module of these kinds, in training mode."
    found = []
    hooks = [m.register_forward_hook(lambda m, i, o: found.append(f(o.detach().float()))) for m in model.modules() if isinstance(m, kinds)]
    model.train()
    with torch.no_grad(): model(**batch) if isinstance(batch, dict) else model(batch)
    for h in hooks: h.remove()
    return found


def done(package, model, batch):
    "Whether every layer is where the package means to bring it."
    if package == 'anyinit': return all(abs(v - 1) < 0.2 for v in outputs(model, batch, nn.ReLU, lambda o: o.square().mean().item()))
    return all(abs(v - 1) < 0.1 for v in outputs(model, batch, nn.Linear, lambda o: o.std().item()))


def reaches(make, batch=x):
    def probe(package):
        model,b = make(),batch()
        PACKAGES[package](model, b)
        return done(package, model, b)
    return probe


def zero_mean(package):
    model,b = chain(),x() + 1
    PACKAGES[package](model, b)
    return all(abs(v) < 0.01 for v in outputs(model, b, nn.Linear, lambda o: o.mean().item()))


def frozen(package):
    model = chain()
    model[2].requires_grad_(False)
    was = model[2].weight.clone()
    PACKAGES[package](model, x())
    return torch.equal(model[2].weight, was)


def zeros(package):
    model = Branch()
    nn.init.zeros_(model.b.weight), nn.init.zeros_(model.b.bias)
    PACKAGES[package](model, x())
    return not model.b.weight.any()


def buffers(package):
    "Batch norm's running statistics, and the mode."
    model = with_bn().train()
    was = [b.clone() for b in model.buffers()]
    PACKAGES[package](model, x())
    return all(map(torch.equal, was, model.buffers())) and all(m.training for m in model.modules())


def rollback(package):
    "The model fails on the way through: does the error come out, and are the weights as they were?"
    class Fails(nn.Module):
        calls = 0
        def forward(self, x):
            self.calls += 1
            if self.calls > 1: raise ValueError('out of memory, say')
            return x
    model = nn.Sequential(*chain()[:3], Fails(), nn.Linear(64, 10))
    was = [p.detach().clone() for p in model.parameters()]
    try: PACKAGES[package](model, x())
    except ValueError: pass
    return all(map(torch.equal, was, model.parameters()))


def report(package):
    "Something is given back that has an entry for each layer."
    model,b = chain(),x()
    if package == 'lsuv':
        from lsuv import lsuv_with_singlebatch
        return lsuv_with_singlebatch(model, b, verbose=False) is not model
    if package == 'anyinit':
        import anyinit
        return len(anyinit.initialize(model, 'empirical', b).layers) == 4
    r = PACKAGES[package](model, b)
    return isinstance(r, LSUVReport) and len(r) == 4


def passes(package, depth=20):
    "Forward passes for a chain of 20 layers."
    model = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(20, 20), nn.ReLU())])
    with passes_begun(model) as n: PACKAGES[package](model, x())
    return str(n[0])


INITIALIZATION = {
    'a plain chain of layers': reaches(chain),
    'in-place activations': reaches(lambda: chain(inplace=True)),
    'layers registered in another order than they run': reaches(Backwards),
    'layers called several times': reaches(Repeated),
    'a dict of inputs': reaches(TwoInputs, lambda: dict(left=x(), right=x())),
    '`weight_norm`': reaches(normed),
    'weights in bfloat16': reaches(lambda: chain().bfloat16(), lambda: x().bfloat16()),
    'mean 0 as well as std 1': zero_mean,
    'frozen weights are left alone': frozen,
    'zero-initialized weights stay zero': zeros,
    'batch norm\'s buffers and the mode stay': buffers,
    'weights are put back if the model fails': rollback,
    'a report with an entry a layer': report,
    'forward passes, 20 layers': passes,
}


# --- Recording

class Several(nn.Module):
    "A layer called twice, and a dict as output."
    def __init__(self):
        super().__init__()
        self.a,self.twice,self.out = nn.Linear(20, 32),nn.Linear(32, 32),Named()
    def forward(self, x): return self.out(self.twice(self.twice(self.a(x).relu()).relu()))['logits']


class Named(nn.Linear):
    def __init__(self): super().__init__(32, 4)
    def forward(self, x): return dict(logits=super().forward(x))


def trained(name, folder, n=8, model=None, **kwargs):
    "The recorder after `n` steps of training and two batches of validation; of torchinstruments its table."
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    items = [(torch.randn(20), torch.tensor(i % 4)) for i in range(16*n)]
    learn = Learner(DataLoaders.from_dsets(items, items[:32], bs=16, device='cpu'), model, loss_func=CrossEntropyLossFlat(), path=folder)
    rec = None
    if name == 'fastai_lsuv': rec = ActivationStatsRecorder(**kwargs)
    if name == 'ActivationStats': rec = ActivationStats(modules=[m for m in model.modules() if isinstance(m, nn.Linear)], **kwargs)
    if name == 'torchinstruments':
        import torchinstruments as ti
        from torchinstruments.sampling import AlwaysSampler
        ti.inject_observer(model, output_dir=folder, sampler=AlwaysSampler())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01, cbs=rec)
    if rec is not None: return rec
    ti.remove_observer(model)
    return pd.concat(pd.read_parquet(p) for p in Path(folder).rglob('history.parquet'))


def histograms(name, folder):
    if name == 'torchinstruments': return len(trained(name, folder)) > 0 and any((Path(folder)/'tensorboard').rglob('events*'))
    rec = trained(name, folder, **({'hist': (40, 0, 10)} if name == 'fastai_lsuv' else {'with_hist': True}))
    return rec.hist(0).shape == (40, 8)


def gradients(name, folder):
    if name == 'fastai_lsuv': return trained(name, folder, grads=True).df().grad_std.notna().all()
    rec = trained(name, folder)
    return 'output_gradient' in set(rec.signal) if name == 'torchinstruments' else any('grad' in k for k in rec.stats[0][0])


def validation(name, folder):
    if name == 'fastai_lsuv': return 'valid' in set(trained(name, folder, valid=True).df().phase)
    rec = trained(name, folder)
    return 'eval' in set(rec['mode']) if name == 'torchinstruments' else len(rec.stats) > 8


def dicts(name, folder):
    rec = trained(name, folder, model=Several())
    if name == 'torchinstruments': return 'mean' in set(rec.query("layer == 'out'").metric)
    return rec.df().query("layer == 'out'")['std'].notna().all() if name == 'fastai_lsuv' else 'mean' in rec.stats[0][2]


def calls(name, folder):
    "Of a layer that is called twice a step, the mean over both calls, or each of them."
    model,means = nn.Sequential(Several()),[]
    model[0].out = nn.Linear(32, 4)
    model[0].forward = lambda x, s=model[0]: s.out(s.twice(s.twice(s.a(x).relu()).relu()))
    model[0].twice.register_forward_hook(lambda m, i, o: means.append(o.mean().item()))
    rec = trained(name, folder, model=model)
    if name == 'torchinstruments': return set(rec.query("layer == '0.twice'").call_index) == {0, 1}
    mean = rec.df().query("layer == '0.twice'")['mean'].iloc[0] if name == 'fastai_lsuv' else rec.stats[0][1]['mean']
    return abs(mean - (means[0] + means[1])/2) < 1e-5


def bounded(name, folder):
    "64 steps, and at most 8 records of a layer kept where so few are asked for, or can be."
    if name == 'fastai_lsuv': return len(trained(name, folder, n=64, max_steps=8).layer_stats(0)[0]) <= 8
    rec = trained(name, folder, n=64)
    return (len(rec.stats) if name == 'ActivationStats' else rec.query("layer == '0' and metric == 'mean' and mode == 'train' and signal == 'output'").shape[0]) <= 8


def files(name, folder):
    trained(name, folder, **({'fname': 'stats.csv'} if name == 'fastai_lsuv' else {}))
    return any(p.suffix in ('.csv', '.parquet') for p in Path(folder).rglob('*'))


def words(name, folder):
    "Says of a network whose layers are all but dead that they are."
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    nn.init.constant_(model[0].bias, -100.)
    rec = trained(name, folder, model=model)
    said = str(rec.diagnose()) if name == 'fastai_lsuv' else ' '.join(p.read_text() for p in Path(folder).rglob('*.md')) if name == 'torchinstruments' else ''
    return ' dead ' in said


RECORDING = {
    'histograms': histograms,
    'gradients of the outputs': gradients,
    'validation': validation,
    'outputs that are dicts': dicts,
    'all calls of a layer that is called several times': calls,
    'memory and records stay bounded': bounded,
    'a file to read later': files,
    'says in words which layers are dead': words,
}
RECORDERS = ['fastai_lsuv', 'ActivationStats', 'torchinstruments']


def outcome(probe, *args):
    "`yes`, `no`, or what the probe gives; an error is a no."
    torch.manual_seed(0)
    try: got = probe(*args)
    except Exception as e: return f'no ({type(e).__name__})'
    return got if isinstance(got, str) else 'yes' if got else 'no'


@call_parse
def main(
    out: str = str(RESULTS/'features.md') # Table to write
):
    "Run every program with every package and write the tables."
    warnings.filterwarnings('ignore')
    packages,recorders = installed(list(PACKAGES)),installed(['torchinstruments'])
    tables = markdown(['initialization', *map(label, packages)], [[trait, *(outcome(probe, p) for p in packages)] for trait,probe in INITIALIZATION.items()])
    names = [r for r in RECORDERS if r in recorders or r != 'torchinstruments']
    def titled(r): return label('fastai') + ' `ActivationStats`' if r == 'ActivationStats' else label(r)
    rows = []
    for trait,probe in RECORDING.items():
        cells = []
        for r in names:
            with tempfile.TemporaryDirectory() as folder: cells.append(outcome(probe, r, folder))
        rows.append([trait, *cells])
    tables += '\n' + markdown(['recording', *map(titled, names)], rows)
    text = f'<!-- written by benchmarks/features.py -->\nEach cell is the outcome of a program in `benchmarks/features.py`, torch {torch.__version__}. `anyinit` is judged by its own aim, a mean square of 1 after every activation.\n\n{tables}'
    Path(out).write_text(text)
    print(text)
