"A model that is spread over several processes comes out as it does on one, from the pooled mini-batch."
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import shards
import torch
from torch import nn

from fastai_lsuv import lsuv_init

slow = pytest.mark.slow  # starts several processes

TWO = [*(f'blocks:{way}:{options}' for way, options in product(
           ('blocks', 'each', 'column', 'gathered', 'tp', 'sp'), ('start', 'kept', 'channels'))),
       *(f'{name}:{way}:start' for name, way in product(
           ('convs', 'twice', 'attention', 'normed', 'large'), ('blocks', 'each', 'gathered'))),
       'blocks:blocks:function', 'convs:each:function', 'tied:blocks:start', 'large:column:start']
FOUR = [f'blocks:{way}:{options}' for way, options in product(
            ('both', 'both_each', 'replicated', 'each', 'tp'), ('start', 'kept', 'channels'))]


def run(tmp_path_factory, ranks, names):
    "What each case gave on each rank. All of them run in one go."
    folder = tmp_path_factory.mktemp('shards')
    command = [sys.executable, '-W', 'ignore', str(Path(shards.__file__)), ','.join(names)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(shards.__file__).parent)
    processes = [subprocess.Popen([*command, str(r), str(ranks), str(folder)], **options) for r in range(ranks)]
    try:
        said = [p.communicate(timeout=400)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    def results(name):
        files = [folder/f'{name}-{r}.pt' for r in range(ranks)]
        assert all(f.exists() for f in files), '\n'.join(said)
        return [torch.load(f, weights_only=False) for f in files]
    return results


@pytest.fixture(scope='module')
def two(tmp_path_factory): return run(tmp_path_factory, 2, [*TWO, *shards.CASES])


@pytest.fixture(scope='module')
def four(tmp_path_factory): return run(tmp_path_factory, 4, FOUR)


def on_one_process(case):
    name,_,options = case.split(':')
    m = shards.network(name)
    torch.manual_seed(0)  # that of rank 0
    report = lsuv_init(m, shards.NETWORKS[name][1](), **shards.OPTIONS[options])
    return shards.full(m), report


def check(case, results):
    weights,report = on_one_process(case)
    for got,rows,n_passes in results:
        assert shards.same(got, results[0][0])
        assert rows == [(row.name, row.kind, row.status, row.passes) for row in report]
        assert n_passes == report.n_passes <= 3
        for p, q in zip(got, weights):
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)


@slow
@pytest.mark.parametrize('case', TWO)
def test_two_ranks_give_the_weights_of_one_process(two, case): check(case, two(case))


@slow
@pytest.mark.parametrize('case', FOUR)
def test_four_ranks_give_the_weights_of_one_process(four, case): check(case, four(case))


@slow
def test_a_failure_on_one_rank_ends_all_and_all_is_put_back(two):
    a,b = two('failures')
    assert len(a) == 8
    for key in a:
        assert 'another rank failed' in a[key][0] and 'rank 1' in a[key][0] and 'out of coffee' in b[key][0]
        assert a[key][1:] == b[key][1:] == (True, True)


@slow
def test_ranks_that_run_different_layers_are_told_so(two):
    a,b = two('other_ways')
    assert a == b and len(a) == 4
    for said,kept in a.values():
        assert 'ranks do different things' in said and kept
    assert "'0.right' on rank 0" in a['Wanders', 'alone'][0] and "'0.left' on rank 1" in a['Wanders', 'alone'][0]


@slow
def test_pipeline_stages_are_refused(two):
    a,b = two('stages')
    assert a == b and 'before it is cut into pipeline stages' in a


@slow
def test_a_model_from_the_meta_device(two):
    (said,got,ok),(_,same,_) = two('meta')
    assert 'to_empty' in said and ok and shards.same(got, same)
    for p, q in zip(got, on_one_process('blocks:blocks:start')[0]):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)


@slow
def test_shards_keep_their_digits_where_the_forward_runs_in_half_precision(two):
    (got,ok,dtypes),_ = two('half_precision')
    assert ok and set(dtypes) == {torch.float32}
    w = got[0].double()  # (32, 20), of orthonormal columns
    gram = w.T @ w
    assert torch.allclose(gram, torch.eye(20, dtype=gram.dtype)*gram[0, 0], atol=1e-5)
    for p, q in zip(got, on_one_process('blocks:blocks:start')[0]):
        assert torch.allclose(p, q, rtol=0.03, atol=0.03)


@slow
def test_the_loss_is_that_of_all_ranks(two):
    a,b = two('losses')
    assert a == b
    undone,put_back,loss,kept,loss_kept = a
    assert undone and put_back and loss[1] > 5*loss[0] and not kept and loss_kept == (1, 1)


@slow
def test_layer_stats_are_pooled(two):
    (a,kept,said),(b,kept_too,_) = two('stats')
    assert a == b and kept and kept_too and 'sharded model' in said
    from fastai_lsuv import layer_stats
    want = layer_stats(shards.network('blocks'), shards.sequences()).pairs
    assert torch.allclose(torch.tensor(a), torch.tensor(want), atol=1e-5)


@slow
def test_samples_that_are_alike_on_one_rank_are_not_alike(two):
    (statuses,w),(same_statuses,same_w) = two('alike_on_one')
    assert statuses == same_statuses == ['ok', 'ok'] and shards.same(w, same_w)


@slow
def test_experts_that_not_every_rank_runs(two):
    (plain,sharded),(plain_too,sharded_too) = two('experts')
    assert shards.same(plain[0], plain_too[0]) and shards.same(sharded[0], sharded_too[0])
    assert plain[1] == sharded[1] == sharded_too[1] and {s for _, s, _ in plain[1]} <= {'ok', 'no bias'}
    for p, q in zip(plain[0], sharded[0]):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)


# ---- What is refused

def test_fsdp1_is_refused(monkeypatch):
    class FullyShardedDataParallel(nn.Sequential): pass
    monkeypatch.setattr('torch.distributed.fsdp.FullyShardedDataParallel', FullyShardedDataParallel)
    m = nn.Sequential(nn.Linear(4, 4), FullyShardedDataParallel(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"model: '1' is wrapped by FullyShardedDataParallel.*use .*fully_shard"):
        lsuv_init(m, torch.randn(8, 4))


def test_deepspeed_is_refused():
    class Engine(nn.Sequential): pass
    Engine.__module__ = 'deepspeed.runtime.engine'
    with pytest.raises(ValueError, match=r"DeepSpeed.*before `deepspeed.initialize`"):
        lsuv_init(Engine(nn.Linear(4, 4)), torch.randn(8, 4))
    m = nn.Linear(4, 4)
    m.weight.ds_id = 0  # as ZeRO-3 marks what it has partitioned
    with pytest.raises(ValueError, match='DeepSpeed'):
        lsuv_init(m, torch.randn(8, 4))


def test_a_pipeline_stage_is_refused():
    class PipelineStage: pass
    PipelineStage.__module__ = 'torch.distributed.pipelining.stage'
    with pytest.raises(TypeError, match='before it is cut into stages'):
        lsuv_init(PipelineStage(), torch.randn(8, 4))
