"Two processes talk over gloo. Statistics are pooled, and both compute the same weights, bit for bit."
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastai.basics import set_seed
from fingerprint import fingerprint
from learners import same, weights
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.run import run as run_room
from fastai_lsuv.measure import channel_moments, pool_ranks, whole_moments

slow = pytest.mark.slow  # starts two processes, which import fastai


# --- moments

def test_one_process_pools_nothing():
    m = channel_moments(torch.randn(4, 3))
    assert pool_ranks(m) is m


def _rank(rank, port, results):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    x = torch.arange(60.).view(10, 3, 2)
    pooled = [pool_ranks(f(x[:4] if rank == 0 else x[4:])) for f in (channel_moments, whole_moments)]
    results.put((rank, *((m.count, m.mean.tolist(), m.var.tolist()) for m in pooled)))
    dist.destroy_process_group()


def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _spawned(f):
    "What a function of the rank, a port and a queue puts into the queue in two processes, by rank."
    results = mp.get_context('spawn').SimpleQueue()
    mp.spawn(f, args=(_free_port(), results), nprocs=2)
    return sorted([results.get(), results.get()], key=lambda r: r[0])


@slow
def test_ranks_pool_to_the_same_bits():
    (_, *a), (_, *b) = _spawned(_rank)
    assert a == b
    for got, f in zip(a, (channel_moments, whole_moments)):
        want = f(torch.arange(60.).view(10, 3, 2))
        assert got[0] == want.count
        np.testing.assert_allclose(got[1], want.mean, rtol=1e-6)
        np.testing.assert_allclose(got[2], want.var, rtol=1e-6)


# --- an error before the first pass or after the last

def _model(rank):
    "That of rank 1 has no memory."
    return nn.Linear(4, 4, device='meta' if rank else 'cpu')


def _fails_to_report(rank):
    m = nn.Linear(4, 4)
    was = m.weight.detach().clone()

    def fail(*args): raise RuntimeError('no report')

    if rank: run_room.rows_of = fail
    try: lsuv_init(m, torch.randn(8, 4))
    finally: assert torch.equal(m.weight, was)


OUTSIDE_OF_PASSES = {
    'batches': lambda rank: lsuv_init(nn.Linear(4, 4), torch.randn(8, 4) if rank == 0 else 3),
    'model': lambda rank: lsuv_init(_model(rank), torch.randn(8, 4)),
    'stats': lambda rank: layer_stats(_model(rank), torch.randn(8, 4)),
    'report': _fails_to_report,
}


def _fail_in_turn(rank, port, results):
    meet = f'tcp://127.0.0.1:{port}'
    dist.init_process_group('gloo', init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=8))
    said = {}
    for name, f in OUTSIDE_OF_PASSES.items():
        try: f(rank)
        except Exception as e: said[name] = str(e)
    results.put((rank, said))
    dist.destroy_process_group()


@slow
def test_an_error_on_one_rank_outside_of_all_passes_ends_both():
    (_, first), (_, second) = _spawned(_fail_in_turn)
    stopped = 'LSUV stopped because another rank failed; see the error of rank 1'
    assert first == dict.fromkeys(OUTSIDE_OF_PASSES, stopped)
    assert 'batches: got int' in second['batches'] and 'meta device' in second['model'] == second['stats']
    assert second['report'] == 'no report'


def _killed(rank, port, results):
    meet = f'tcp://127.0.0.1:{port}'
    dist.init_process_group('gloo', init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    m = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    if rank: m[2].register_forward_hook(lambda *args: os._exit(1))
    was = fingerprint(m)
    try: lsuv_init(m, torch.randn(8, 4))
    except RuntimeError: results.put(fingerprint(m) == was)
    os._exit(0)  # torch may abort as it takes down a group whose other rank is gone


@slow
def test_a_rank_that_is_killed_ends_the_others_which_put_everything_back():
    spawned,port = mp.get_context('spawn'),_free_port()
    results = spawned.SimpleQueue()
    processes = [spawned.Process(target=_killed, args=(rank, port, results)) for rank in range(2)]
    for p in processes: p.start()
    for p in processes: p.join(120)
    assert [p.exitcode for p in processes] == [0, 1] and not results.empty() and results.get()


# --- initialization

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "What each case gave on rank 0 and on rank 1. All of them run in one go."
    folder = tmp_path_factory.mktemp('ranks')
    command = [sys.executable, '-W', 'ignore', str(Path(ranks.__file__)), 'all']
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(ranks.__file__).parent)
    processes = [subprocess.Popen([*command, str(rank), str(folder)], **options) for rank in range(2)]
    try:
        said = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    def results(name):
        assert all((folder/f'{name}-{rank}.pt').exists() for rank in range(2)), '\n'.join(said)
        return [torch.load(folder/f'{name}-{rank}.pt', weights_only=False) for rank in range(2)]
    return results


def on_one_process(xb, **kwargs):
    set_seed(0)  # that of rank 0
    m = ranks.model()
    lsuv_init(m, xb, **kwargs)
    return weights(m)


@slow
@pytest.mark.parametrize('case, options', [
    ('pooled', dict(preinit='orthogonal')),
    ('kept_weights', dict(preinit=None)),
    ('mirrored', dict(preinit='mirrored')),
    ('uneven', {}),
    ('wrapped', {}),
    ('channels_last', {}),
])
def test_as_of_the_pooled_mini_batch_on_one_process(run, case, options):
    a,b = run(case)
    assert same(a, b)
    for p, q in zip(a, on_one_process(ranks.batch(), **options)):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)


@slow
def test_a_bad_batch_on_one_rank_ends_both(run):
    (first,kept),(second,kept_too) = run('bad_batch')
    assert 'another rank failed' in first and 'NaN' in second and kept and kept_too


@slow
def test_a_loader_that_fails_on_one_rank_ends_both(run):
    (first,kept),(second,kept_too) = run('one_fails_to_load')
    assert 'another rank failed' in first and 'no such file' in second and kept and kept_too


@slow
@pytest.mark.parametrize('case', ['callback', 'pytorch_loaders'])
def test_ranks_draw_different_batches(run, case):
    (a,drawn_a,lines_a),(b,drawn_b,lines_b) = run(case)
    assert same(a, b) and len(lines_a) == 1 and lines_b == []
    assert len(drawn_a) == len(drawn_b) >= 2
    for x, y in zip(drawn_a, drawn_b):
        assert len(x) == 16 and not set(x) & set(y)  # of the same epoch


@slow
def test_fewer_batches_than_ranks(run):
    (a,lines),(b,_) = run('one_batch_each')
    assert same(a, b) and 'at std 1' in lines[0]


@slow
def test_what_one_rank_must_not_touch_none_does(run):
    (kept,lines),(kept_too,_) = run('one_was_loaded')
    assert kept and kept_too and 'its weights were loaded' in lines[0]


@slow
def test_fastais_distrib_ctx(run):
    (seen_a,drawn_a,lines_a),(seen_b,drawn_b,lines_b) = run('distrib_ctx')
    assert same(seen_a[0], seen_b[0]), "after LSUV"
    assert same(seen_a[1], seen_b[1]) and not same(seen_a[0], seen_a[1]), "after training"
    assert [' at std 1' in line for line in lines_a] == [True, False] and 'initialized before' in lines_a[1]
    assert lines_b == []
    assert drawn_a[0] != drawn_b[0]


@slow
def test_experts_that_not_every_rank_runs(run):
    "They are corrected after a pass, by what all ranks saw of them. No rank waits for another that does not run one."
    (a,statuses,n_passes,kept),(b,statuses_too,_,_) = run('experts')
    assert same(a, b) and statuses == statuses_too and kept and n_passes <= 5
    assert {n for n, s in statuses.items() if s == 'not called'} == {'up[3]', 'down[3]'}
    assert {n for n, s in statuses.items() if s == 'ok'} >= {'stem', 'head', 'up[0]', 'up[1]', 'up[2]'}
    assert all(s in ('ok', 'no bias', 'not called') for s in statuses.values())
