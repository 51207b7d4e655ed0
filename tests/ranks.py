"What the tests of `torch.distributed` run in each of two processes. A case gives what the rank has seen."
import torch
import torch.distributed as dist
from fastai.basics import set_seed
from learners import *
from processes import serve
from shards import error_of

from fastai_lsuv import LSUVCallback

CASES = {}
def case(f):
    CASES[f.__name__] = f
    return f


class Seen(Callback):
    "Notes the mini-batches that are drawn: the index in the data set rides in the first pixel."
    order,indices = 200,[]
    def before_batch(self): Seen.indices.append(self.x[:, 0, 0, 0].long().tolist())


def numbered():
    items = images()
    for i, (x, _) in enumerate(items): x[0, 0, 0] = i
    return items


def drawn(dls, m):
    Seen.indices = []
    learn = learner(dls, m, cbs=[LSUVCallback(), Seen()])
    learn.lsuv_init()
    return weights(learn.model), Seen.indices, said(learn)


@case
def callback(rank):
    "The Learner, its model wrapped by no one; the same seed on both."
    set_seed(0)
    return drawn(loaders(numbered()), cnn())


@case
def pytorch_loaders(rank): return drawn(torch_loaders(numbered()), cnn())


@case
def one_batch_each(rank):
    "Fewer mini-batches than ranks."
    return drawn(loaders(images(16)), cnn())


@case
def one_was_loaded(rank):
    "What one rank must not touch, none does."
    learn = learner(model=cnn(), cbs=LSUVCallback())
    if rank == 0: learn.model.load_state_dict(cnn().state_dict())
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
    learn = learner(loaders(Data()), cnn(), cbs=LSUVCallback())
    return error_of(lambda: learn.fit(1), learn.model)


@case
def distrib_ctx(rank):
    """fastai's own way, with accelerate.

    Its `DistributedDL` sends indices by way of the GPU. On the CPU they stay where they are."""
    from fastai.distributed import DistributedDL
    DistributedDL._broadcast = lambda self, t, rank: (dist.broadcast(t := torch.LongTensor(t), rank), t.tolist())[1]
    set_seed(rank)
    learn = learner(loaders(numbered()), cnn(), seed=rank, cbs=[LSUVCallback()])
    seen,Seen.indices = [],[]
    def see(learn): seen.append(weights(learn.model))
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(1, 1e-2, cbs=[Around(see, 10.6), Seen()])
    with learn.no_bar():
        learn.fit(1, 1e-2, cbs=Around(see, 10.6))
    return seen, Seen.indices, said(learn)


if __name__ == '__main__': serve(CASES)
