"""What the tests of sharded models run in each of several processes. A case gives what the rank has seen.

It takes no part in fastai, so that it starts quickly."""
import os
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from fingerprint import fingerprint
from networks import Mod
from processes import serve
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (ColwiseParallel, RowwiseParallel, SequenceParallel,
                                               parallelize_module)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.run import run as run_room


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.norm,self.up,self.act,self.down = nn.LayerNorm(d),nn.Linear(d, h),nn.GELU(),nn.Linear(h, d)

    def forward(self, x): return x + self.down(self.act(self.up(self.norm(x))))


class Standardized(nn.Conv2d):
    "A conv that has to be run again."
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def blocks(d=32, h=132): return nn.Sequential(nn.Linear(20, d), Block(d, h), Block(d, h), nn.Linear(d, 10))
def convs():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
                         Standardized(8, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.Flatten(), nn.Linear(4*12*12, 5))
def tied():
    m = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    m[2].weight = m[0].weight
    return m
def twice():
    "The first layer runs twice."
    def forward(self, x): return self.last(self.first(torch.relu(self.first(x))))
    return Mod(forward, first=nn.Linear(20, 20), last=nn.Linear(20, 4))
def attention():
    def forward(self, x): return self.last(self.attention(x, x, x)[0])
    return Mod(forward, attention=nn.MultiheadAttention(20, 4, batch_first=True), last=nn.Linear(20, 4))
def normed(): return nn.Sequential(weight_norm(nn.Linear(20, 33)), nn.ReLU(), weight_norm(nn.Linear(33, 9)))
def large():
    "Matrices that are drawn by Fourier transforms: tall, square and wide."
    return nn.Sequential(nn.Linear(20, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 1100))


def sequences(n=64): return torch.randn(n, 8, 20, generator=torch.Generator().manual_seed(3))*2 + 0.5
def images(n=32): return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(3))*2 + 0.5


NETWORKS = dict(blocks=(blocks, sequences), convs=(convs, images), twice=(twice, sequences), tied=(tied, sequences),
                attention=(attention, sequences), normed=(normed, sequences), large=(large, sequences))
OPTIONS = dict(start=dict(preinit='orthogonal'), kept={}, mirrored=dict(preinit='mirrored'),
               channels=dict(per_channel=True, preinit='orthogonal'),
               function=dict(preinit=lambda layer: nn.init.kaiming_normal_(layer.weight)))


def network(name, seed=0):
    torch.manual_seed(seed)
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


def both(m, each=False):
    over = init_device_mesh('cpu', (2, 2), mesh_dim_names=('dp', 'tp'))
    return sharded(tensor_parallel(m, over['tp']), over['dp'], each)


def replicated(m): return sharded(m, init_device_mesh('cpu', (2, 2), mesh_dim_names=('replica', 'shard')))
def column_sharded(m): return sharded(m, shard_placement_fn=lambda p: Shard(p.dim() - 1))


# Of these, each rank has other weights to begin with
WHOLE = dict(alone=lambda m: m, uneven=lambda m: m, wrapped=DistributedDataParallel,
             channels_last=lambda m: m.to(memory_format=torch.channels_last))
WAYS = dict(**WHOLE, blocks=sharded, each=partial(sharded, each=True), column=column_sharded,
            gathered=partial(sharded, each=True, reshard_after_forward=False),
            tp=tensor_parallel, sp=sequence_parallel, both=both, both_each=partial(both, each=True),
            replicated=replicated)


def mine(x, way):
    "This rank's mini-batch."
    if way in ('tp', 'sp'): return x
    if way.startswith('both'): return x.chunk(2)[dist.get_rank()//2]
    if way == 'uneven': return x.tensor_split([3*len(x)//4])[dist.get_rank()]
    if way == 'channels_last': x = x.to(memory_format=torch.channels_last)
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
    m = WAYS[way](network(name, rank if way in WHOLE else 0))
    kinds = [type(p) for p in m.parameters()]
    x = mine(NETWORKS[name][1](), way)
    torch.manual_seed(rank)
    state = torch.get_rng_state()
    r = lsuv_init(m, x, **OPTIONS[options])
    assert [type(p) for p in m.parameters()] == kinds
    assert rank == 0 or torch.equal(state, torch.get_rng_state())
    m(x).sum().backward()  # goes on as it would have
    return full(m), [(row.name, row.kind, row.status, row.passes) for row in r], r.n_passes


# The network, how it is spread, and the options
TWO = [*(f'blocks:{way}:{options}' for way, options in product(
           ('blocks', 'each', 'column', 'gathered', 'tp', 'sp'), ('start', 'kept', 'channels'))),
       *(f'{name}:{way}:start' for name, way in product(
           ('convs', 'twice', 'attention', 'normed', 'large'), ('blocks', 'each', 'gathered'))),
       *(f'convs:{way}:start' for way in WHOLE), 'convs:alone:kept', 'convs:alone:mirrored',
       'blocks:blocks:function', 'convs:each:function', 'tied:blocks:start', 'large:column:start']
FOUR = [f'blocks:{way}:{options}' for way, options in product(
            ('both', 'both_each', 'replicated', 'each', 'tp'), ('start', 'kept', 'channels'))]


# ---- Cases with a name of their own

CASES = {}
def case(f):
    CASES[f.__name__] = f
    return f


def error_of(run, m):
    "What `run` raises, and whether it leaves the weights of `m` as they were."
    was = held(m)
    try: run()
    except Exception as e: return str(e), same(was, held(m))


@case
def outside_of_passes(rank):
    "Errors before the first pass, where a model has no memory, say, and after the last; and a bad mini-batch."
    m,x,rows_of = nn.Linear(4, 4),torch.randn(8, 4),run_room.rows_of
    without = nn.Linear(4, 4, device='meta' if rank else 'cpu')
    said = dict(batches=error_of(lambda: lsuv_init(m, 3 if rank else x), m),
                bad=error_of(lambda: lsuv_init(m, x*float('nan') if rank else x), m),
                model=error_of(lambda: lsuv_init(without, x), m),
                stats=error_of(lambda: layer_stats(without, x), m))
    def fail(*args): raise RuntimeError('no report')
    if rank: run_room.rows_of = fail
    said['report'] = error_of(lambda: lsuv_init(m, x), m)
    run_room.rows_of = rows_of
    return said


@case
def killed(rank):
    "Whether the rank that lives on has put everything back."
    m = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    if rank: m[2].register_forward_hook(lambda *args: os._exit(1))
    was = fingerprint(m)
    try: lsuv_init(m, torch.randn(8, 4))
    except RuntimeError: return fingerprint(m) == was


@case
def failures(rank):
    "A model that fails on rank 1, in the first pass and in the second; then it does not."
    seen,calls = {},[]
    def forward(self, x):
        calls.append(1)
        if rank == 1 and len(calls) == 2: raise OSError('out of coffee')
        return x
    plan = {'0': ColwiseParallel(), '4': RowwiseParallel()}
    ways = {way: WAYS[way] for way in ('alone', 'blocks', 'each')}
    for way, spread in {**ways, 'tp': lambda m: parallelize_module(m, mesh(), plan)}.items():
        for at in (1, 0):  # calls before the first pass
            torch.manual_seed(0)
            calls[:] = [1]*at
            middle = Block(32, 40) if way != 'tp' else nn.ReLU()
            m = spread(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), middle, Mod(forward), nn.Linear(32, 10)))
            x = mine(sequences(), way)
            seen[way, at] = *error_of(lambda: lsuv_init(m, x), m), lsuv_init(m, x).ok
    return seen


WANDERS = dict(alone=lambda self, x: (self.left if dist.get_rank() else self.right)(x),
               to_the_end=lambda self, x: self.left(x) if dist.get_rank() else self.right(self.left(x)))


@case
def other_ways(rank):
    "Ranks that run different layers."
    seen = {}
    for (name, forward), way in product(WANDERS.items(), ('alone', 'each')):
        m = WAYS[way](nn.Sequential(Mod(forward, left=nn.Linear(20, 20), right=nn.Linear(20, 20)), nn.Linear(20, 3)))
        seen[name, way] = error_of(lambda: lsuv_init(m, mine(sequences(), way)), m)
    return seen


@case
def stages(rank):
    "Each rank has another model."
    m = blocks()[2*rank:2*rank + 2]
    return error_of(lambda: lsuv_init(m, torch.randn(8, 20 if rank == 0 else 32)), m)


@case
def meta(rank):
    "A model that gets its memory when it is sharded."
    torch.manual_seed(0)
    with torch.device('meta'): m = blocks()
    m,x = sharded(m),mine(sequences(), 'blocks')
    try: lsuv_init(m, x)
    except ValueError as e: said = str(e)
    m.to_empty(device='cpu')
    for c in m.modules():
        if hasattr(c, 'reset_parameters'): c.reset_parameters()
    torch.manual_seed(rank)
    report = lsuv_init(m, x, preinit='orthogonal')
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
    m,x = sharded(network('blocks')),mine(sequences(), 'blocks')
    was = held(m)
    pairs = layer_stats(m, x).pairs
    kept = same(was, held(m))
    return pairs, kept, error_of(lambda: layer_stats(m, x, loss=lambda model: model(sequences()).mean()), m)[0]


@case
def alike_on_one(rank):
    "Samples that are all the same on one rank are no reason on any."
    m = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    x = sequences(32) if rank else sequences(1).repeat(32, 1, 1)*0.01
    return [row.status for row in lsuv_init(sharded(m), x*0.1, preinit=None)], full(m)


class Experts(nn.Module):
    "The first rank sends its samples to experts 0 and 1, the second to 2 and 1, and none to 3."
    def __init__(self):
        super().__init__()
        self.ids,self.stem,self.head = [2*dist.get_rank(), 1],nn.Linear(20, 16),nn.Linear(16, 4)
        self.up,self.down = nn.Parameter(torch.randn(4, 16, 32)),nn.Parameter(torch.randn(4, 32, 16))
        self.bias = nn.Parameter(torch.randn(4, 32)/2)

    def forward(self, x):
        parts = self.stem(x).chunk(2)
        ups = [torch.addmm(self.bias[i], p, self.up[i]) for i, p in zip(self.ids, parts)]
        return self.head(torch.cat([torch.relu(u) @ self.down[i] for i, u in zip(self.ids, ups)]))


@case
def experts(rank):
    "Experts that not every rank runs, of a model that each rank holds, and of one that is sharded."
    seen = []
    for way in ('alone', 'blocks'):
        torch.manual_seed(0)
        m = WAYS[way](Experts())
        up,*_ = full(m)
        torch.manual_seed(rank)
        report = lsuv_init(m, mine(sequences()[:, 0], 'blocks'))
        kept = torch.equal(full(m)[0][3], up[3])  # no rank runs it
        seen.append((full(m), {row.name: row.status for row in report}, report.n_passes, kept))
    return seen


class All(dict):
    def __missing__(self, name): return partial(initialized, **dict(zip(('name', 'way', 'options'), name.split(':'))))


if __name__ == '__main__': serve(All(CASES))
