"""Train a model that `fully_shard` has spread over several processes, with fastai, and initialize it by LSUV first.

    torchrun --nproc_per_node 2 examples/fully_shard.py

Each process holds a half of every weight, and sees a half of the data. It runs on the CPU. On GPUs, `nccl` and
`cuda` take the place of `gloo` and `cpu`."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, accuracy
from fastai.optimizer import OptimWrapper
from functools import partial
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastai_lsuv import LSUVCallback, lsuv_init


def block(n_in, n_out):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.ReLU())


def network():
    return nn.Sequential(block(1, 32), block(32, 64), block(64, 128), nn.Flatten(), nn.Linear(128, 10))


def sharded(model):
    "Each block is gathered when it runs, and let go after it."
    for m in model[:3]:
        fully_shard(m)
    return fully_shard(model)


def loaders():
    "Digits of 8x8 pixels. Each process trains on its own half; all of them validate on the same."
    digits = load_digits()
    x = torch.tensor(digits.images[:, None]/16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    train,valid = TensorDataset(x[:1500], y[:1500]),TensorDataset(x[1500:], y[1500:])
    return DataLoaders(DataLoader(train, 64, sampler=DistributedSampler(train)), DataLoader(valid, 256))


def main():
    dist.init_process_group('gloo')
    torch.manual_seed(dist.get_rank())
    first = dist.get_rank() == 0

    # A model that is too large for one process begins without memory. It gets some when it is sharded.
    with torch.device('meta'):
        model = network()
    model = sharded(model).to_empty(device='cpu')
    for m in model.modules():
        if hasattr(m, 'reset_parameters'):
            m.reset_parameters()

    # Without a Learner: `lsuv_init`, with this process's own mini-batch
    dls = loaders()
    x,y = next(iter(dls.train))
    report = lsuv_init(model, x, loss=lambda model: F.cross_entropy(model(x), y))
    if first:
        print(report)

    # With a Learner: `LSUVCallback`, which runs before the first fit
    torch.manual_seed(0)
    learn = Learner(dls, sharded(network()), loss_func=F.cross_entropy, metrics=accuracy, cbs=LSUVCallback(),
                    opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    if not first:
        learn.logger = lambda line: None
    with learn.no_bar():
        learn.fit(3, 1e-3)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
