"""The features of this package and its peers. Each cell of the tables is the outcome of a small program that runs here.

Initialization: each package initializes a few small networks, one for each trait, and this script judges the result.
`fastai_lsuv` and `lsuv` succeed if the output of every layer has std 1 (within 0.1), as the network trains. `anyinit`
has another aim. It succeeds if the mean square after every activation is 1 (within 0.2). Things that must not change
are compared before and after. Recording: a short training with each recorder."""
import tempfile
import warnings
from pathlib import Path

import torch
from fastai.basics import *
from fastai.callback.hook import ActivationStats
from fastcore.script import call_parse
from torch.nn.utils.parametrizations import weight_norm

from _common import CPU, PACKAGES, RESULTS, installed, label, markdown, on_device, passes_begun, where
from fastai_lsuv import ActivationStatsRecorder, LSUVReport


# --- Networks, one for each trait

def linears(*widths, wrap=noop, act=nn.ReLU):
    "Linear layers between these widths, each in `wrap`, with activations between them."
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [wrap(nn.Linear(i, o)), act()]
    return nn.Sequential(*layers[:-1])


def chain(**kwargs):
    "A plain chain of four layers."
    return linears(20, 64, 64, 64, 10, **kwargs)


class Layers(nn.Module):
    "Named layers, and an activation for each layer that needs one."
    def __init__(self, **layers):
        super().__init__()
        for name, module in layers.items():
            setattr(self, name, module)


class Backwards(Layers):
    "It registers its layers in another order than they run."
    def __init__(self):
        super().__init__(z=nn.Linear(64, 10), b=nn.Linear(64, 64), a=nn.Linear(20, 64),
                         act_a=nn.ReLU(), act_b=nn.ReLU())

    def forward(self, x):
        x = self.act_a(self.a(x))
        return self.z(self.act_b(self.b(x)))


class Repeated(Layers):
    "It calls the layer `b` twice."
    def __init__(self):
        super().__init__(a=nn.Linear(20, 64), b=nn.Linear(64, 64), z=nn.Linear(64, 10),
                         act=nn.ReLU(), act_1=nn.ReLU(), act_2=nn.ReLU())

    def forward(self, x):
        x = self.act(self.a(x))
        x = self.act_1(self.b(x))
        return self.z(self.act_2(self.b(x)))


class TwoInputs(Layers):
    "It takes two inputs by keyword."
    def __init__(self):
        super().__init__(a=nn.Linear(20, 64), b=nn.Linear(20, 64), z=nn.Linear(64, 10),
                         act_a=nn.ReLU(), act_b=nn.ReLU())

    def forward(self, left, right):
        return self.z(self.act_a(self.a(left)) + self.act_b(self.b(right)))


class Branch(Layers):
    "It has a skip past the layer `b`."
    def __init__(self):
        super().__init__(a=nn.Linear(20, 64), b=nn.Linear(64, 64), z=nn.Linear(64, 10), act=nn.ReLU())

    def forward(self, x):
        x = self.act(self.a(x))
        return self.z(x + self.b(x))


class Fails(nn.Module):
    "It raises an error from its second call on. It counts calls on the class, where no package puts the count back."
    calls = 0

    def forward(self, x):
        Fails.calls += 1
        if Fails.calls > 1: raise ValueError('for example: out of memory')
        return x


def with_batch_norm():
    first,*others = linears(20, 64, 64, 10)
    return nn.Sequential(first, nn.ReLU(), nn.BatchNorm1d(64), *others[1:])


def inputs(n=512):
    return torch.randn(n, 20)


# --- Initialization: each probe takes a package and a device

def outputs(model, batch, kinds, f):
    "`f` of the output of each call of a module of these kinds, in training mode."
    found = []

    def see(module, args, out):
        found.append(f(out.detach().float()))

    hooks = [m.register_forward_hook(see) for m in model.modules() if isinstance(m, kinds)]
    model.train()
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for h in hooks:
        h.remove()
    return found


def succeeds(package, model, batch):
    "Does every layer have the statistics that the package aims at?"
    if package == 'anyinit':
        squares = outputs(model, batch, nn.ReLU, lambda o: o.square().mean().item())
        return all(abs(v - 1) < 0.2 for v in squares)
    return all(abs(v - 1) < 0.1 for v in outputs(model, batch, nn.Linear, lambda o: o.std().item()))


def initialized(package, device, model, batch):
    "The model and the mini-batch on `device`, after the package initialized the model."
    model,batch = model.to(device),on_device(batch, device)
    PACKAGES[package](model, batch)
    return model,batch


def reaches(make, batch=inputs):
    "A probe: does the package succeed on this network?"
    def probe(package, device):
        return succeeds(package, *initialized(package, device, make(), batch()))
    return probe


def zero_mean(package, device):
    model,batch = initialized(package, device, chain(), inputs() + 1)
    return all(abs(v) < 0.01 for v in outputs(model, batch, nn.Linear, lambda o: o.mean().item()))


def frozen(package, device):
    model = chain().to(device)
    model[2].requires_grad_(False)
    was = model[2].weight.clone()
    initialized(package, device, model, inputs())
    return torch.equal(model[2].weight, was)


def zeros(package, device):
    model = Branch()
    nn.init.zeros_(model.b.weight)
    nn.init.zeros_(model.b.bias)
    initialized(package, device, model, inputs())
    return not model.b.weight.any()


def buffers(package, device):
    "Do batch norm's running statistics and the mode stay?"
    model = with_batch_norm().to(device).train()
    was = [b.clone() for b in model.buffers()]
    initialized(package, device, model, inputs())
    return all(map(torch.equal, was, model.buffers())) and all(m.training for m in model.modules())


def rollback(package, device):
    "The model fails in the middle. Does the error come out, and are the weights as before?"
    Fails.calls = 0
    model = nn.Sequential(*chain()[:3], Fails(), nn.Linear(64, 10)).to(device)
    was = [p.detach().clone() for p in model.parameters()]
    try:
        initialized(package, device, model, inputs())
    except ValueError:
        pass
    return all(map(torch.equal, was, model.parameters()))


def report(package, device):
    "Does the package return something with an entry for each layer?"
    model,batch = chain().to(device),inputs().to(device)
    if package == 'lsuv':
        from lsuv import lsuv_with_singlebatch
        return lsuv_with_singlebatch(model, batch, verbose=False) is not model
    if package == 'anyinit':
        import anyinit
        return len(anyinit.initialize(model, 'empirical', batch).layers) == 4
    r = PACKAGES[package](model, batch)
    return isinstance(r, LSUVReport) and len(r) == 4


def passes(package, device, depth=20):
    "The forward passes for a chain of 20 layers."
    model = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(20, 20), nn.ReLU())])
    with passes_begun(model) as n:
        initialized(package, device, model, inputs())
    return str(n[0])


INITIALIZATION = {
    'a plain chain of layers': reaches(chain),
    'in-place activations': reaches(lambda: chain(act=partial(nn.ReLU, inplace=True))),
    'layers registered in another order than they run': reaches(Backwards),
    'layers called several times': reaches(Repeated),
    'a dict of inputs': reaches(TwoInputs, lambda: dict(left=inputs(), right=inputs())),
    '`weight_norm`': reaches(lambda: linears(20, 64, 64, 10, wrap=weight_norm)),
    'weights in bfloat16': reaches(lambda: chain().bfloat16(), lambda: inputs().bfloat16()),
    'mean 0 as well as std 1': zero_mean,
    'frozen weights are left alone': frozen,
    'zero-initialized weights stay zero': zeros,
    "batch norm's buffers and the mode stay": buffers,
    'weights are put back if the model fails': rollback,
    'a report with an entry a layer': report,
    'forward passes, 20 layers': passes,
}


# --- Recording: each probe takes a recorder, a folder and a device

class Named(nn.Linear):
    "Its output is a dict."
    def __init__(self):
        super().__init__(32, 4)

    def forward(self, x):
        return dict(logits=super().forward(x))


class Several(nn.Module):
    "It calls a layer twice, and its last layer puts out a dict."
    def __init__(self):
        super().__init__()
        self.a,self.twice,self.out = nn.Linear(20, 32),nn.Linear(32, 32),Named()

    def hidden(self, x):
        x = self.a(x).relu()
        x = self.twice(x).relu()
        return self.twice(x).relu()

    def forward(self, x):
        return self.out(self.hidden(x))['logits']


class Twice(Several):
    "It calls a layer twice, and all outputs are tensors."
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(32, 4)

    def forward(self, x):
        return self.out(self.hidden(x))


def small():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))


def trained(name, folder, device, n=8, model=None, **kwargs):
    """Train for `n` steps with a recorder, then validate on two batches. Returns the recorder.

    For torchinstruments it returns the table that this package writes."""
    torch.manual_seed(0)
    model = model or small()
    items = [(torch.randn(20), torch.tensor(i % 4)) for i in range(16*n)]
    dls = DataLoaders.from_dsets(items, items[:32], bs=16, device=device)
    learn = Learner(dls, model.to(device), loss_func=CrossEntropyLossFlat(), path=folder)
    rec = None
    if name == 'fastai_lsuv':
        rec = ActivationStatsRecorder(**kwargs)
    if name == 'ActivationStats':
        rec = ActivationStats(modules=[m for m in model.modules() if isinstance(m, nn.Linear)], **kwargs)
    if name == 'torchinstruments':
        import torchinstruments as ti
        from torchinstruments.sampling import AlwaysSampler
        ti.inject_observer(model, output_dir=folder, sampler=AlwaysSampler())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01, cbs=rec)
    if rec is not None: return rec
    ti.remove_observer(model)
    return pd.concat(pd.read_parquet(p) for p in Path(folder).rglob('history.parquet'))


def histograms(name, folder, device):
    if name == 'torchinstruments':
        rec = trained(name, folder, device)
        return len(rec) > 0 and any((Path(folder)/'tensorboard').rglob('events*'))
    option = {'hist': (40, 0, 10)} if name == 'fastai_lsuv' else {'with_hist': True}
    return trained(name, folder, device, **option).hist(0).shape == (40, 8)


def gradients(name, folder, device):
    if name == 'fastai_lsuv': return trained(name, folder, device, grads=True).df().grad_std.notna().all()
    rec = trained(name, folder, device)
    if name == 'torchinstruments': return 'output_gradient' in set(rec.signal)
    return any('grad' in k for k in rec.stats[0][0])


def validation(name, folder, device):
    if name == 'fastai_lsuv': return 'valid' in set(trained(name, folder, device, valid=True).df().phase)
    rec = trained(name, folder, device)
    return 'eval' in set(rec['mode']) if name == 'torchinstruments' else len(rec.stats) > 8


def dicts(name, folder, device):
    rec = trained(name, folder, device, model=Several())
    if name == 'torchinstruments': return 'mean' in set(rec.query("layer == 'out'").metric)
    if name == 'fastai_lsuv': return rec.df().query("layer == 'out'")['std'].notna().all()
    return 'mean' in rec.stats[0][2]


def calls(name, folder, device):
    "Does the recorder see both calls of a layer that runs twice a step: their mean, or each of them?"
    model,means = nn.Sequential(Twice()),[]
    model[0].twice.register_forward_hook(lambda m, i, o: means.append(o.mean().item()))
    rec = trained(name, folder, device, model=model)
    if name == 'torchinstruments': return set(rec.query("layer == '0.twice'").call_index) == {0, 1}
    if name == 'fastai_lsuv':
        mean = rec.df().query("layer == '0.twice'")['mean'].iloc[0]
    else:
        mean = rec.stats[0][1]['mean']
    return abs(mean - (means[0] + means[1])/2) < 1e-5


def bounded(name, folder, device):
    "Does the recorder keep at most 8 records of a layer in 64 steps? It is asked to, if it has an option for that."
    if name == 'fastai_lsuv':
        records = trained(name, folder, device, n=64, max_steps=8).layer_stats(0)[0]
    elif name == 'ActivationStats':
        records = trained(name, folder, device, n=64).stats
    else:
        of = "layer == '0' and metric == 'mean' and mode == 'train' and signal == 'output'"
        records = trained(name, folder, device, n=64).query(of)
    return len(records) <= 8


def files(name, folder, device):
    kwargs = {'fname': 'stats.csv'} if name == 'fastai_lsuv' else {}
    trained(name, folder, device, **kwargs)
    return any(p.suffix in ('.csv', '.parquet') for p in Path(folder).rglob('*'))


def words(name, folder, device):
    "Does the recorder say that the layers of an almost dead network are dead?"
    model = small()
    nn.init.constant_(model[0].bias, -100.)
    rec = trained(name, folder, device, model=model)
    said = ''
    if name == 'fastai_lsuv':
        said = str(rec.diagnose())
    if name == 'torchinstruments':
        said = ' '.join(p.read_text() for p in Path(folder).rglob('*.md'))
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


# --- The tables

def outcome(probe, *args):
    "The outcome of a probe: `yes`, `no`, or its text. An error counts as `no`."
    torch.manual_seed(0)
    try:
        result = probe(*args)
    except Exception as e:
        return f'no ({type(e).__name__})'
    if isinstance(result, str): return result
    return 'yes' if result else 'no'


def recording(name, probe, device):
    "The outcome of a probe of a recorder, in a folder of its own."
    with tempfile.TemporaryDirectory() as folder:
        return outcome(probe, name, folder, device)


def initialization_table(device):
    packages = installed(list(PACKAGES))
    rows = [[trait, *(outcome(probe, p, device) for p in packages)] for trait, probe in INITIALIZATION.items()]
    return markdown(['initialization', *map(label, packages)], rows)


def recording_table(device):
    recorders = {'fastai_lsuv': label('fastai_lsuv'), 'ActivationStats': label('fastai') + ' `ActivationStats`'}
    recorders |= {name: label(name) for name in installed(['torchinstruments'])}
    rows = [[trait, *(recording(r, probe, device) for r in recorders)] for trait, probe in RECORDING.items()]
    return markdown(['recording', *recorders.values()], rows)


@call_parse
def main(
    out: str = str(RESULTS/'features.md'),  # Table to write
    device: str = 'cpu',  # 'cpu' or 'cuda'
):
    "Run every program with every package and write the tables."
    warnings.filterwarnings('ignore')
    dev = torch.device(device)
    conditions = f'torch {torch.__version__}' if dev == CPU else where(dev)
    text = ('<!-- written by benchmarks/features.py -->\n'
            f'Each cell is the outcome of a program in `benchmarks/features.py`, {conditions}. '
            'The judge of `anyinit` uses its own aim: a mean square of 1 after every activation.\n\n'
            f'{initialization_table(dev)}\n{recording_table(dev)}')
    Path(out).write_text(text)
    print(text)
