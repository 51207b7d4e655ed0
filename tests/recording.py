"""What the tests of the recorder share: small networks, real digits, and a Learner without a progress bar.

A test makes a recorder, hands it to `learner` and calls `fit`. Every call starts from the same random numbers."""
import copy

import torch
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, set_seed
from sklearn.datasets import load_digits
from torch import nn


class Items(list):
    "Data that `learn.export` can leave out."
    def new_empty(self):
        return Items()


def digits(n=96, valid=40, bs=16, shape=(1, 8, 8), shuffle=True, tfm=lambda x: x):
    "DataLoaders of `n` training and `valid` validation images, each of `shape` and passed through `tfm`."
    set_seed(0)  # a DataLoader draws its generator's seed when it is made
    d = load_digits()
    x = torch.tensor(d.images[:n+valid], dtype=torch.float32).div(8).sub(1).view(-1, *shape)
    data = [(tfm(a), b) for a, b in zip(x, torch.tensor(d.target[:n+valid]))]
    train, test = DataLoader(Items(data[:n]), bs=bs, shuffle=shuffle), DataLoader(Items(data[n:]), bs=bs)
    return DataLoaders(train, test, device='cpu')


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


class Odd(nn.Module):
    "Layers whose outputs are tuples, dicts, integers and complex, one called three times and one never."
    def __init__(self):
        super().__init__()
        self.tup, self.dic, self.int, self.cplx = InTuple(64, 64), InDict(64, 64), Integers(64, 64), Complex(64, 64)
        self.shared, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        x = self.dic(self.tup(x)[1][0])['out'] + self.int(x).float()*0 + self.cplx(x).real*0
        x = torch.cat([self.shared(x), self.shared(x[:3]*2), self.shared(x[:1]+3)])
        return self.head(x)[:-4]


class InTuple(nn.Linear):
    def forward(self, x):
        return x.argmax(1), [super().forward(x), x]


class InDict(nn.Linear):
    def forward(self, x):
        return {'ids': x.argmax(1), 'out': super().forward(x)}


class Integers(nn.Linear):
    def forward(self, x):
        return x.long()


class Complex(nn.Linear):
    def forward(self, x):
        return torch.complex(x, x)


class Do(Callback):
    "Run functions of the Learner at events."
    def __init__(self, order=0, **events):
        super().__init__()
        self.order = order
        for name, f in events.items():
            setattr(self, name, lambda f=f: f(self.learn))


def learner(model=None, cbs=None, dls=None, seed=0, path='.', lr=0.01, **kwargs):
    "A Learner of a model, or of what a function without parameters makes."
    set_seed(seed)
    model = convnet() if model is None else model if isinstance(model, nn.Module) else model()
    learn = Learner(dls or digits(), model, loss_func=nn.CrossEntropyLoss(), cbs=cbs, lr=lr, path=path, **kwargs)
    if hasattr(learn, 'progress'):
        learn.remove_cb(learn.progress)
    return learn


def fit(learn, n=1, **kwargs):
    set_seed(1)
    with learn.no_logging():
        learn.fit(n, **kwargs)
    return learn


def layers(model):
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def hooks_on(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def keep_outputs(module, clone=True):
    "A list that gets every output of a module."
    kept = []
    module.register_forward_hook(lambda m, a, o: kept.append(o.detach().clone() if clone else o.detach()))
    return kept


def stats64(x, near_zero=0.05):
    "Mean, std and share near zero, in double precision."
    x = x.double()
    threshold = torch.tensor(near_zero).float().double()
    return x.mean().item(), x.std().item(), (x <= threshold).double().mean().item()


def twin_of(model):
    "A copy of a model without in-place activations."
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    return twin
