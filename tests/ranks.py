"What the tests of `torch.distributed` run in each of two processes: `python ranks.py CASE RANK FOLDER`."
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from fastai.basics import set_seed
from learners import *
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastai_lsuv import LSUVCallback, lsuv_init


class Standardized(nn.Conv2d):
    "A conv that has to be run again."
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)


def model():
    first,again,last = nn.Conv2d(3, 8, 3),Standardized(8, 8, 3),nn.Conv2d(8, 6, 3)
    return nn.Sequential(first, nn.ReLU(inplace=True), again, nn.GELU(), last, nn.Flatten(), nn.Linear(6*6*6, 4))


def batch(): return torch.stack([x for x, _ in images()])*2 + 0.5


CASES = {}
def case(f):
    CASES[f.__name__] = f
    return f


@case
def pooled(rank):
    "Each rank has its own half, its own seed, and its own weights to begin with."
    set_seed(rank)
    m = model()
    lsuv_init(m, batch().chunk(2)[rank], preinit='orthogonal')
    return weights(m)


@case
def mirrored(rank):
    "Every rank mirrors the same layers, with the same random numbers."
    set_seed(rank)
    m = model()
    lsuv_init(m, batch().chunk(2)[rank], preinit='mirrored')
    return weights(m)


@case
def kept_weights(rank):
    """Without orthonormal weights, those of rank 0 are what the others start from.

    So does `DistributedDataParallel` have it."""
    set_seed(rank)
    m = model()
    lsuv_init(m, batch().chunk(2)[rank], preinit=None)
    return weights(m)


@case
def uneven(rank):
    "Halves of different sizes."
    set_seed(rank)
    m = model()
    lsuv_init(m, batch().split([48, 16])[rank])
    return weights(m)


@case
def wrapped(rank):
    set_seed(rank)
    m = DistributedDataParallel(model())
    lsuv_init(m, batch().chunk(2)[rank])
    m(batch()[:4]).sum().backward()
    return weights(m)


@case
def channels_last(rank):
    "Weights whose memory is in another order."
    set_seed(rank)
    m = model().to(memory_format=torch.channels_last)
    lsuv_init(m, batch().chunk(2)[rank].to(memory_format=torch.channels_last))
    return weights(m)


@case
def bad_batch(rank):
    "NaNs on one rank end both."
    x = batch().chunk(2)[rank]
    if rank:
        x = x*float('nan')
    m = model()
    w = weights(m)
    try:
        lsuv_init(m, x)
    except (ValueError, RuntimeError) as e: return str(e), same(w, weights(m))


class Experts(nn.Module):
    "The first rank sends its samples to experts 0 and 1, the second to 2 and 1, and none to 3."
    def __init__(self, rank):
        super().__init__()
        self.ids,self.stem,self.head = [0, 1] if rank == 0 else [2, 1],nn.Linear(108, 16),nn.Linear(16, 4)
        self.up,self.down = nn.Parameter(torch.randn(4, 16, 32)),nn.Parameter(torch.randn(4, 32, 16))
        self.bias = nn.Parameter(torch.randn(4, 32))
    def forward(self, x):
        x = self.stem(x.flatten(1))
        parts = x.chunk(2)
        ups = [torch.addmm(self.bias[i], p, self.up[i]) for i, p in zip(self.ids, parts)]
        return self.head(torch.cat([torch.relu(u) @ self.down[i] for i, u in zip(self.ids, ups)]))


@case
def experts(rank):
    set_seed(rank)
    m = Experts(rank)
    unused = m.up[3].detach().clone() if rank == 0 else None
    report = lsuv_init(m, batch()[:, :, :6, :6].chunk(2)[rank])
    kept = unused is None or torch.equal(m.up[3], unused)
    return weights(m), {r.name: r.status for r in report}, report.n_passes, kept


class Seen(Callback):
    "Notes the mini-batches that are drawn: the index in the data set rides in the first pixel."
    order,indices = 200,[]
    def before_batch(self):
        Seen.indices.append(self.x[:, 0, 0, 0].long().tolist())


def numbered():
    items = images()
    for i, (x, _) in enumerate(items):
        x[0, 0, 0] = i
    return items


@case
def callback(rank):
    "The Learner, its model wrapped by no one; the same seed on both."
    set_seed(0)
    learn = learner(loaders(numbered()), model(), cbs=[LSUVCallback(), Seen()])
    learn.lsuv_init()
    return weights(learn.model), Seen.indices, said(learn)


@case
def pytorch_loaders(rank):
    learn = learner(torch_loaders(numbered()), model(), cbs=[LSUVCallback(), Seen()])
    learn.lsuv_init()
    return weights(learn.model), Seen.indices, said(learn)


@case
def one_batch_each(rank):
    "Fewer mini-batches than ranks."
    learn = learner(loaders(images(16)), model(), cbs=LSUVCallback())
    learn.lsuv_init()
    return weights(learn.model), said(learn)


@case
def one_was_loaded(rank):
    "What one rank must not touch, none does."
    learn = learner(model=cnn(), cbs=LSUVCallback())
    if rank == 0:
        learn.model.load_state_dict(cnn().state_dict())
    w = weights(learn.model)
    learn.fit(1, cbs=Stop())
    return same(w, weights(learn.model)), said(learn)


@case
def one_fails_to_load(rank):
    items = images()
    class Data:
        def __len__(self): return 64
        def __getitem__(self, i):
            if rank and isinstance(i, int): raise OSError('no such file')
            return items[i]
    learn = learner(loaders(Data()), model(), cbs=LSUVCallback())
    w = weights(learn.model)
    try:
        learn.fit(1)
    except (OSError, RuntimeError) as e: return str(e), same(w, weights(learn.model))


@case
def distrib_ctx(rank):
    """fastai's own way, with accelerate.

    Its `DistributedDL` sends indices by way of the GPU. On the CPU they stay where they are."""
    from fastai.distributed import DistributedDL
    DistributedDL._broadcast = lambda self, t, rank: (dist.broadcast(t := torch.LongTensor(t), rank), t.tolist())[1]
    set_seed(rank)
    learn = learner(loaders(numbered()), model(), seed=rank, cbs=[LSUVCallback()])
    seen = []
    def see(learn):
        seen.append(weights(learn.model))
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(1, 1e-2, cbs=[Around(see, 10.6), Seen()])
    with learn.no_bar():
        learn.fit(1, 1e-2, cbs=Around(see, 10.6))
    return seen, Seen.indices, said(learn)


def main(name, rank, folder):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    # As torchrun and `accelerate launch` would.
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE='2',
                      MASTER_ADDR='127.0.0.1', MASTER_PORT='29511')
    meet,patience = f'file://{folder}/meet',timedelta(seconds=40)
    dist.init_process_group('gloo', rank=rank, world_size=2, init_method=meet, timeout=patience)
    names = list(CASES) if name == 'all' else name.split(',')
    for n in names:
        Seen.indices = []
        torch.save(CASES[n](rank), f'{folder}/{n}-{rank}.pt')
        dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
