"""What the tests of sharded models run in each of several processes: `python shards.py CASES RANK RANKS FOLDER`.

A case gives what the rank has seen. It takes no part in fastai, so that it starts quickly."""
import os
import sys
import warnings
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (ColwiseParallel, RowwiseParallel, SequenceParallel,
                                               parallelize_module)
from torch.nn.utils.parametrizations import weight_norm

from fastai_lsuv import layer_stats, lsuv_init


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.norm,self.up,self.act,self.down = nn.LayerNorm(d),nn.Linear(d, h),nn.GELU(),nn.Linear(h, d)

    def forward(self, x): return x + self.down(self.act(self.up(self.norm(x))))


class Standardized(nn.Conv2d):
    "A conv that has to be run again."
    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, w - w.mean((1, 2, 3), keepdim=True), self.bias)


class Twice(nn.Module):
    "The first layer runs twice."
    def __init__(self):
        super().__init__()
        self.first,self.last = nn.Linear(20, 20),nn.Linear(20, 4)

    def forward(self, x): return self.last(self.first(F.relu(self.first(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention,self.last = nn.MultiheadAttention(20, 4, batch_first=True),nn.Linear(20, 4)

    def forward(self, x): return self.last(self.attention(x, x, x)[0])


def blocks(d=32, h=132): return nn.Sequential(nn.Linear(20, d), Block(d, h), Block(d, h), nn.Linear(d, 10))
def convs():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
                         Standardized(8, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.Flatten(), nn.Linear(4*12*12, 5))
def tied():
    m = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    m[2].weight = m[0].weight
    return m
def normed(): return nn.Sequential(weight_norm(nn.Linear(20, 33)), nn.ReLU(), weight_norm(nn.Linear(33, 9)))
def large():
    "Matrices that are drawn by Fourier transforms: tall, square and wide."
    return nn.Sequential(nn.Linear(20, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 1100))


def sequences(n=64): return torch.randn(n, 8, 20, generator=torch.Generator().manual_seed(3))*2 + 0.5
def images(n=32): return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(3))*2 + 0.5


NETWORKS = dict(blocks=(blocks, sequences), convs=(convs, images), twice=(Twice, sequences), tied=(tied, sequences),
                attention=(Attention, sequences), normed=(normed, sequences), large=(large, sequences))
OPTIONS = dict(start=dict(preinit='orthogonal'), kept={}, channels=dict(per_channel=True, preinit='orthogonal'),
               function=dict(preinit=lambda layer: nn.init.kaiming_normal_(layer.weight)))


def network(name):
    torch.manual_seed(0)
    return NETWORKS[name][0]()


# ---- Ways to spread a model

def mesh(): return init_device_mesh('cpu', (dist.get_world_size(),))


def sharded(m, over=None, each=False, **kwargs):
    "`fully_shard` blocks, or each layer, and the root."
    over = over or mesh()
    for c in list(m.modules()):
        leaf = not list(c.children()) and list(c.parameters(False)) and 'Quantizable' not in type(c).__name__
        if isinstance(c, Block) and not each or each and leaf: fully_shard(c, mesh=over, **kwargs)
    return fully_shard(m, mesh=over, **kwargs)


def column_sharded(m): return sharded(m, shard_placement_fn=lambda p: Shard(p.dim() - 1))


def tensor_parallel(m, over=None):
    "Blocks by columns, then rows."
    plan = {f'{i}.up': ColwiseParallel() for i in (1, 2)} | {f'{i}.down': RowwiseParallel() for i in (1, 2)}
    return parallelize_module(m, over or mesh(), plan)


def sequence_parallel(m):
    "Between blocks, each rank holds a part of the sequence."
    plan = {'0': ColwiseParallel(output_layouts=Shard(1)),
            '3': ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}
    for i in (1, 2):
        plan |= {f'{i}.norm': SequenceParallel(), f'{i}.up': ColwiseParallel(input_layouts=Shard(1)),
                 f'{i}.down': RowwiseParallel(output_layouts=Shard(1))}
    return parallelize_module(m, mesh(), plan)


def both(m):
    over = init_device_mesh('cpu', (2, 2), mesh_dim_names=('dp', 'tp'))
    return sharded(tensor_parallel(m, over['tp']), over['dp'])


def both_each(m):
    over = init_device_mesh('cpu', (2, 2), mesh_dim_names=('dp', 'tp'))
    return sharded(tensor_parallel(m, over['tp']), over['dp'], each=True)


def replicated(m): return sharded(m, init_device_mesh('cpu', (2, 2), mesh_dim_names=('replica', 'shard')))


WAYS = dict(blocks=sharded, each=partial(sharded, each=True), column=column_sharded,
            gathered=partial(sharded, each=True, reshard_after_forward=False),
            tp=tensor_parallel, sp=sequence_parallel, both=both, both_each=both_each, replicated=replicated)


def mine(x, way):
    "This rank's mini-batch."
    if way in ('tp', 'sp'): return x
    if way.startswith('both'): return x.chunk(2)[dist.get_rank()//2]
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def full(m):
    "All numbers, on every rank."
    return [(v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for v in m.state_dict().values()]


def held(m):
    "What this rank holds of each parameter."
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in m.parameters()]


def same(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))


def initialized(rank, name, way, options):
    "The weights, and the statuses of the report. Each rank has another seed."
    m = WAYS[way](network(name))
    kinds = [type(p) for p in m.parameters()]
    x = mine(NETWORKS[name][1](), way)
    torch.manual_seed(rank)
    state = torch.get_rng_state()
    r = lsuv_init(m, x, **OPTIONS[options])
    assert [type(p) for p in m.parameters()] == kinds
    assert rank == 0 or torch.equal(state, torch.get_rng_state())
    m(x).sum().backward()  # goes on as it would have
    return full(m), [(row.name, row.kind, row.status, row.passes) for row in r], r.n_passes


# ---- Cases with a name of their own

CASES = {}
def case(f):
    CASES[f.__name__] = f
    return f


class Breaks(nn.Module):
    "Fails on rank 1, in its second call."
    calls = 0

    def forward(self, x):
        Breaks.calls += 1
        if dist.get_rank() == 1 and Breaks.calls == 2: raise OSError('out of coffee')
        return x


@case
def failures(rank):
    "A model that fails on one rank, in the first pass and in the second; then it does not."
    seen = {}
    ways = dict(alone=lambda m: m, blocks=sharded, each=WAYS['each'], tp=lambda m: parallelize_module(
        m, mesh(), {'0': ColwiseParallel(), '4': RowwiseParallel()}))
    for way, spread in ways.items():
        for at in (1, 0):  # calls before the first pass
            torch.manual_seed(0)
            Breaks.calls = at
            middle = Block(32, 40) if way != 'tp' else nn.ReLU()
            m = spread(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), middle, Breaks(), nn.Linear(32, 10)))
            was,x = held(m),mine(sequences(), way)
            try: lsuv_init(m, x)
            except (OSError, RuntimeError) as e: said = str(e)
            kept = same(was, held(m))
            seen[way, at] = said,kept,lsuv_init(m, x).ok
    return seen


class Wanders(nn.Module):
    "Rank 1 takes another way."
    def __init__(self):
        super().__init__()
        self.left,self.right = nn.Linear(20, 20),nn.Linear(20, 20)

    def forward(self, x): return (self.left if dist.get_rank() else self.right)(x)


class Skips(Wanders):
    "Rank 1 takes another way, to the end."
    def forward(self, x): return self.left(x) if dist.get_rank() else self.right(self.left(x))


@case
def other_ways(rank):
    "Ranks that run different layers."
    seen = {}
    for make in (Wanders, Skips):
        for way in ('alone', 'each'):
            m = nn.Sequential(make(), nn.Linear(20, 3))
            if way == 'each': m = WAYS[way](m)
            was = held(m)
            try: lsuv_init(m, mine(sequences(), way))
            except RuntimeError as e: seen[make.__name__, way] = str(e),same(was, held(m))
    return seen


@case
def stages(rank):
    "Each rank has another model."
    try: lsuv_init(blocks()[2*rank:2*rank + 2], torch.randn(8, 20 if rank == 0 else 32))
    except RuntimeError as e: return str(e)


@case
def meta(rank):
    "A model that gets its memory when it is sharded."
    torch.manual_seed(0)
    with torch.device('meta'): m = blocks()
    m = sharded(m)
    try: lsuv_init(m, mine(sequences(), 'blocks'))
    except ValueError as e: said = str(e)
    m.to_empty(device='cpu')
    for c in m.modules():
        if hasattr(c, 'reset_parameters'): c.reset_parameters()
    torch.manual_seed(rank)
    report = lsuv_init(m, mine(sequences(), 'blocks'), preinit='orthogonal')
    return said, full(m), report.ok


@case
def half_precision(rank):
    "The shards are float32, and the forward runs in bfloat16."
    m = sharded(network('blocks'), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    torch.manual_seed(rank)
    report = lsuv_init(m, mine(sequences(), 'blocks'), preinit='orthogonal')
    return full(m), report.ok, [p.dtype for p in m.parameters()]


@case
def losses(rank):
    "A loss that LSUV makes far worse: all is put back."
    m = sharded(network('blocks'))
    x,was = mine(sequences(), 'blocks'),held(m)
    worse = lsuv_init(m, x, loss=lambda model: model(x).square().mean()**9*(1 + rank))
    put_back = same(was, held(m))
    report = lsuv_init(m, x, loss=lambda model: 1 + model(x).mean()*0)
    return worse.undone, put_back, worse.loss, report.undone, report.loss


@case
def stats(rank):
    "The table of a model as it is."
    m = sharded(network('blocks'))
    was = held(m)
    report = layer_stats(m, mine(sequences(), 'blocks'))
    try: layer_stats(m, mine(sequences(), 'blocks'), loss=lambda model: model(sequences()).mean())
    except ValueError as e: said = str(e)
    return report.pairs, same(was, held(m)), said


@case
def alike_on_one(rank):
    "Samples that are all the same on one rank are no reason on any."
    m = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    x = sequences(32) if rank else sequences(1).repeat(32, 1, 1)*0.01
    return [row.status for row in lsuv_init(sharded(m), x*0.1, preinit=None)], full(m)


class Experts(nn.Module):
    "Each sample goes to one of four experts, which lie in one parameter. Rank 1 uses the last two alone."
    def __init__(self):
        super().__init__()
        self.first,self.experts = nn.Linear(20, 20),nn.Parameter(torch.randn(4, 20, 20)*0.1)

    def forward(self, x):
        x = self.first(x)
        some = range(2, 4) if dist.get_rank() else range(4)
        return torch.stack([x @ self.experts[i] for i in some]).sum(0)


@case
def experts(rank):
    "Experts that not every rank runs, of a model that each rank holds, and of one that is sharded."
    seen = []
    for spread in (lambda m: m, sharded):
        torch.manual_seed(0)
        m = spread(Experts())
        torch.manual_seed(rank)
        report = lsuv_init(m, mine(sequences(), 'blocks'))
        seen.append((full(m), [(row.name, row.status, row.passes) for row in report]))
    return seen


def main(names, rank, ranks, folder):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group('gloo', rank=rank, world_size=ranks, init_method=f'file://{folder}/meet',
                            timeout=timedelta(seconds=30))
    for name in names.split(','):
        run = CASES.get(name) or partial(initialized, **dict(zip(('name', 'way', 'options'), name.split(':'))))
        torch.save(run(rank), f'{folder}/{name}-{rank}.pt')
        dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
