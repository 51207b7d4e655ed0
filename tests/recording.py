"""What the tests of the recorder share: small networks, real digits, a Learner without a progress bar, and fits of it.

Every fit starts from the same random numbers."""
import torch
import torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, set_seed
from sklearn.datasets import load_digits
from torch import nn

from fastai_lsuv.recorder import ActivationStatsRecorder


class Items(list):
    "Data that `learn.export` can leave out."
    def new_empty(self): return Items()


def digits(n=96, valid=40, bs=16, shape=(1, 8, 8), shuffle=True, tfm=lambda x: x):
    "DataLoaders of `n` training and `valid` validation images, each of `shape` and passed through `tfm`."
    set_seed(0)  # a DataLoader draws its generator's seed when it is made
    d = load_digits()
    x = torch.tensor(d.images[:n+valid], dtype=torch.float32).div(8).sub(1).view(-1, *shape)
    data = [(tfm(a), b) for a, b in zip(x, torch.tensor(d.target[:n+valid]))]
    train,test = DataLoader(Items(data[:n]), bs=bs, shuffle=shuffle),DataLoader(Items(data[n:]), bs=bs)
    return DataLoaders(train, test, device='cpu')


# ---- Networks

def convnet(inplace=True, nf=8, norm=nn.Identity):
    "Three recorded layers: '0', '2' and '7'; and '3' if that is a norm layer."
    return nn.Sequential(nn.Conv2d(1, nf, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(nf, nf, 3, stride=2, padding=1),
                         norm(nf), nn.ReLU(inplace), nn.Dropout(0.3), nn.Flatten(), nn.Linear(nf*16, 10))


def mlp(act=nn.ReLU):
    "Three recorded layers: '1', '3' and '5'."
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 10))


def deep(n):
    "`n` linear layers, at least one."
    if n == 1: return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    body = [m for _ in range(n-2) for m in (nn.ReLU(), nn.Linear(16, 16))]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *body, nn.Linear(16, 10))


def param(*shape): return nn.Parameter(torch.randn(*shape)*0.2)


class Transposed(nn.Module):
    "GPT-2's `Conv1D`."
    def __init__(self, i, o):
        super().__init__()
        self.weight,self.bias = param(i, o),nn.Parameter(torch.zeros(o))

    def forward(self, x): return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    "Slices of one parameter. Samples go to one of the first three by their number, and to the last never."
    def __init__(self, width):
        super().__init__()
        self.up,self.act = param(4, width, width),nn.ReLU()

    def forward(self, x):
        return torch.cat([self.act(part @ self.up[i]) for i, part in enumerate(x.split((len(x) + 2)//3))])


class Net(nn.Module):
    "A linear layer, a layer of its own kind, experts, attention, dropout, and a weight of its own."
    def __init__(self):
        super().__init__()
        self.own,self.pos_embed = param(16, 10),param(8, 8)
        self.stem,self.conv1d,self.experts = nn.Linear(8, 16),Transposed(16, 16),Experts(16)
        self.attn,self.drop = nn.MultiheadAttention(16, 2, batch_first=True),nn.Dropout(0.2)

    def forward(self, x):
        x = self.stem(x[:, 0] + self.pos_embed)
        x = x + self.attn(x, x, x)[0]
        x = self.drop(self.conv1d(x.flatten(0, 1)).relu_())
        return F.linear(self.experts(x).view(-1, 8, 16).mean(1), self.own.t())


OPERATIONS = ['own', 'conv1d.weight', 'experts.up[0]', 'experts.up[1]', 'experts.up[2]', 'experts.up[3]']
EVERY = ['own', 'stem', *OPERATIONS[1:], 'attn']  # what is recorded of a `Net` by default


class Made(nn.Module):
    "A model of these parts, with this forward."
    def __init__(self, forward, **parts):
        super().__init__()
        self.of = forward
        for name, part in parts.items(): setattr(self, name, part)

    def forward(self, x): return self.of(self, x)


# ---- Fits

class Do(Callback):
    "Run functions of the Learner at events."
    def __init__(self, order=0, **events):
        super().__init__()
        self.order = order
        for name, f in events.items(): setattr(self, name, lambda f=f: f(self.learn))


def learner(model=None, cbs=None, dls=None, path='.', lr=0.01, **kwargs):
    "A Learner of a model, or of what a function without parameters makes."
    set_seed(0)
    model = convnet() if model is None else model if isinstance(model, nn.Module) else model()
    learn = Learner(dls or digits(), model, loss_func=nn.CrossEntropyLoss(), cbs=cbs, lr=lr, path=path, **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    return learn


def fit(learn, n=1, **kwargs):
    set_seed(1)
    with learn.no_logging(): learn.fit(n, **kwargs)
    return learn


def recorded(model=None, n=1, cbs=(), dls=None, lr=0.01, **options):
    "A recorder with these options, after a fit of `n` epochs."
    rec = ActivationStatsRecorder(**options)
    fit(learner(model, [rec, *cbs], dls, lr=lr), n)
    return rec


def trained(model, *cbs, how=lambda m: m, n=2):
    "Losses, weights and random numbers of a fit."
    learn,losses = learner(model, cbs=list(cbs)),[]
    learn.model = how(learn.model)
    learn.add_cb(Do(after_loss=lambda l: losses.append(l.loss.item())))
    fit(learn, n)
    return losses, torch.cat([p.detach().flatten() for p in learn.model.parameters()]), torch.get_rng_state()


def same(a, b): return len(a[0]) > 0 and a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def layers(model): return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def hooks_on(model): return sum(len(m._forward_hooks) for m in model.modules())


def keep_outputs(module, training=True):
    "A list that gets every output of a module in training, or else in validation."
    kept = []

    def keep(m, args, out):
        if m.training == training: kept.append((out[0] if isinstance(out, tuple) else out).detach().clone())
    module.register_forward_hook(keep)
    return kept


def stats64(x):
    "Mean, std and share near zero, in double precision."
    x,threshold = x.double(),torch.tensor(0.05).double()
    std = x.std().item() if x.numel() > 1 else float('nan')
    return x.mean().item(), std, (x <= threshold).double().mean().item()


def at_step(rec, step): return rec.df().query(f'step == {step}').set_index('layer')
