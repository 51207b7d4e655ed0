"""LSUV on models that are spread over several processes: two and four of the CPU.

A network of four transformer-like blocks is built on the meta device, spread, and given memory, so that no process ever
holds all of it. It runs one plain forward pass, then LSUV. For each kind of parallelism the table has:

- the largest difference of a weight from those that one process gives from the pooled mini-batch, as a share of the
  largest weight of its matrix
- the peak memory of a process, for the plain forward and for LSUV, less what it took before the model was made
- the forward passes that LSUV takes"""
import csv
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from fastcore.script import call_parse
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastai_lsuv import lsuv_init
from _common import RESULTS, forward, markdown, passes_begun, where

COLUMNS = ['kind', 'ranks', 'difference', 'forward_mib', 'lsuv_mib', 'ratio', 'passes']
TARGETS = dict(difference=1e-4, ratio=1.3, passes=3)


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.norm,self.up,self.act,self.down = nn.LayerNorm(d),nn.Linear(d, h),nn.GELU(),nn.Linear(h, d)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


def network(width=512, blocks=4):
    return nn.Sequential(nn.Linear(64, width), *(Block(width, 4*width) for _ in range(blocks)), nn.Linear(width, 16))


def data(samples=128):
    return torch.randn(samples, 64, 64, generator=torch.Generator().manual_seed(1))*2 + 0.5


# --- Kinds of parallelism

def shard(m, mesh):
    for c in m.children():
        if isinstance(c, Block):
            fully_shard(c, mesh=mesh)
    return fully_shard(m, mesh=mesh)


def inner(m):
    return [n for n, c in m.named_children() if isinstance(c, Block)]


def tensor_parallel(m, mesh):
    plan = {f'{n}.up': ColwiseParallel() for n in inner(m)} | {f'{n}.down': RowwiseParallel() for n in inner(m)}
    return parallelize_module(m, mesh, plan)


def sequence_parallel(m, mesh):
    last = len(m) - 1
    plan = {'0': ColwiseParallel(output_layouts=Shard(1)),
            f'{last}': ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}
    for n in inner(m):
        plan |= {f'{n}.norm': SequenceParallel(), f'{n}.up': ColwiseParallel(input_layouts=Shard(1)),
                 f'{n}.down': RowwiseParallel(output_layouts=Shard(1))}
    return parallelize_module(m, mesh, plan)


def flat(spread, m):
    return spread(m, init_device_mesh('cpu', (dist.get_world_size(),)))


def both(m):
    mesh = init_device_mesh('cpu', (2, 2), mesh_dim_names=('data', 'tensor'))
    return shard(tensor_parallel(m, mesh['tensor']), mesh['data'])


def hybrid(m):
    return shard(m, init_device_mesh('cpu', (2, 2), mesh_dim_names=('replica', 'shard')))


# The kind: how a model is spread, and how many processes share a mini-batch
KINDS = {
    'DistributedDataParallel': (lambda m: m, lambda n: 1),
    'fully_shard': (partial(flat, shard), lambda n: 1),
    'fully_shard with replicas': (hybrid, lambda n: 1),
    'tensor parallel': (partial(flat, tensor_parallel), lambda n: n),
    'tensor and sequence parallel': (partial(flat, sequence_parallel), lambda n: n),
    'fully_shard and tensor parallel': (both, lambda n: 2),
}
RUNS = [(kind, n) for kind in KINDS for n in (2, 4) if n == 4 or kind not in
        ('fully_shard with replicas', 'fully_shard and tensor parallel')]


# --- A process

def memory(key):
    "Memory of this process, in MiB: what it takes now (`VmRSS`), or the most since `reset_peak` (`VmHWM`)."
    line = next(s for s in Path('/proc/self/status').read_text().splitlines() if s.startswith(key))
    return int(line.split()[1])/1024


def reset_peak():
    Path('/proc/self/clear_refs').write_text('5')


def build(kind):
    "The model of this process, with memory."
    with torch.device('meta'):
        m = network()
    m = KINDS[kind][0](m).to_empty(device='cpu')
    for c in m.modules():
        if hasattr(c, 'reset_parameters'):
            c.reset_parameters()
    return DistributedDataParallel(m) if kind == 'DistributedDataParallel' else m


def process(kind, rank, ranks, folder):
    "Measure one process, and write what it found."
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group('gloo', rank=rank, world_size=ranks, init_method=f'file://{folder}/meet',
                            timeout=timedelta(minutes=5))
    share = KINDS[kind][1](ranks)
    dist.barrier()
    before = memory('VmRSS')
    m,x = build(kind),data().chunk(ranks//share)[rank//share].clone()
    reset_peak()
    forward(m, x)
    plain = memory('VmHWM') - before
    torch.manual_seed(rank)
    reset_peak()
    with passes_begun(getattr(m, 'module', m)) as passes:
        lsuv_init(m, x)
    ours = memory('VmHWM') - before
    weights = {n.removeprefix('module.'): p.full_tensor() if isinstance(p, DTensor) else p.detach()
               for n, p in m.named_parameters()}
    torch.save(dict(plain=plain, ours=ours, passes=passes[0], weights=weights), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


# --- All of them

def on_one_process():
    m = network()
    torch.manual_seed(0)
    lsuv_init(m, data())
    return {n: p.detach() for n, p in m.named_parameters()}


def measured(kind, ranks, reference):
    "The row of one kind, the worst of its processes."
    with tempfile.TemporaryDirectory() as folder:
        # Memory goes back to the system as soon as a tensor is freed.
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536'}
        commands = [[sys.executable, '-W', 'ignore', __file__, '--kind', kind, '--rank', str(r), '--ranks', str(ranks),
                     '--folder', folder] for r in range(ranks)]
        running = [subprocess.Popen(c, env=env) for c in commands]
        try:
            codes = [p.wait(timeout=900) for p in running]
        finally:
            for p in running:
                p.kill()
        if any(codes):
            raise RuntimeError(f'{kind} on {ranks} processes failed')
        found = [torch.load(f'{folder}/{r}.pt', weights_only=True) for r in range(ranks)]
    for f in found[1:]:
        assert all(torch.equal(f['weights'][n], w) for n, w in found[0]['weights'].items()), 'the ranks differ'
    far = [((w - reference[n]).abs().max()/reference[n].abs().max().clamp_min(1e-3)).item()
           for n, w in found[0]['weights'].items()]
    worst = max(found, key=lambda f: f['ours']/f['plain'])
    return dict(kind=kind, ranks=ranks, difference=max(far), forward_mib=worst['plain'], lsuv_mib=worst['ours'],
                ratio=worst['ours']/worst['plain'], passes=found[0]['passes'])


def table(rows):
    cells = [[r['kind'], r['ranks'], f"{r['difference']:.1g}", f"{r['forward_mib']:.0f}", f"{r['lsuv_mib']:.0f}",
              f"{r['ratio']:.2f}", r['passes']] for r in rows]
    titles = ['kind', 'processes', 'difference from one process', 'MiB, plain forward', 'MiB, LSUV', 'ratio', 'passes']
    return markdown(titles, cells)


@call_parse
def main(
    kind: str = '',  # Measure one process of this kind (the benchmark calls itself)
    rank: int = 0,  # Its number
    ranks: int = 0,  # How many there are
    folder: str = ''  # Where they meet
):
    "Measure LSUV on models that are spread over two and four processes."
    if kind:
        return process(kind, rank, ranks, folder)
    torch.set_num_threads(1)
    reference,rows = on_one_process(),[]
    for kind, ranks in RUNS:
        rows.append(measured(kind, ranks, reference))
        print(*(f'{v:.3g}' if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    with open(RESULTS/'sharded.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    worst = {k: max(r[k] for r in rows) for k in TARGETS}
    met = [f"{k} {worst[k]:.3g} of at most {most:g}" for k, most in TARGETS.items()]
    text = (f"# Models spread over several processes\n\n{__doc__.split(chr(10), 2)[2].strip()}\n\n"
            f"{table(rows)}\nThe worst: {', '.join(met)}. Each weight has the same bits on all processes.\n"
            f"Measured with {where()} a process. Command: `python benchmarks/sharded.py`\n")
    (RESULTS/'sharded.md').write_text(text)
