"A model that is spread over several processes comes out as it does on one, from the pooled mini-batch."
import pytest
import shards
import torch
from processes import run
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init

slow = pytest.mark.slow  # starts several processes


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    names = sorted(shards.CASES.keys() - {'killed'})
    return run(shards, 2, [*shards.TWO, *names], tmp_path_factory.mktemp('two'))


@pytest.fixture(scope='module')
def four(tmp_path_factory): return run(shards, 4, shards.FOUR, tmp_path_factory.mktemp('four'))


def on_one_process(case):
    name,_,options = case.split(':')
    m = shards.network(name)
    torch.manual_seed(0)  # that of rank 0
    report = lsuv_init(m, shards.NETWORKS[name][1](), **shards.OPTIONS[options])
    return shards.full(m), report


def close(a, b, tol=1e-4):
    return len(a) == len(b) and all(torch.allclose(p, q, rtol=tol, atol=tol/10) for p, q in zip(a, b))


@slow
@pytest.mark.parametrize('case', [*(pytest.param(('two', c), id=f'2 ranks, {c}') for c in shards.TWO),
                                  *(pytest.param(('four', c), id=f'4 ranks, {c}') for c in shards.FOUR)])
def test_several_ranks_give_the_weights_of_one_process(case, request):
    ranks,name = case
    weights,report = on_one_process(name)
    results = request.getfixturevalue(ranks)(name)
    for got, rows, n_passes in results:
        assert shards.same(got, results[0][0]) and close(got, weights)
        assert rows == [(row.name, row.kind, row.status, row.passes) for row in report]
        assert n_passes == report.n_passes <= (5 if 'mirrored' in name else 3)


@slow
def test_an_error_on_one_rank_outside_of_all_passes_ends_both(two):
    first,second = two('outside_of_passes')
    stopped = 'LSUV stopped because another rank failed; see the error of rank 1'
    assert first == dict.fromkeys(('batches', 'bad', 'model', 'stats', 'report'), (stopped, True))
    said = {name: error for name, (error, _) in second.items()}
    assert 'batches: got int' in said['batches'] and 'meta device' in said['model'] == said['stats']
    assert 'NaN' in said['bad'] and said['report'] == 'no report' and all(kept for _, kept in second.values())


@slow
def test_a_rank_that_is_killed_ends_the_others_which_put_everything_back(tmp_path):
    run(shards, 2, ['killed'], tmp_path)
    assert torch.load(tmp_path/'killed-0.pt') is True and not (tmp_path/'killed-1.pt').exists()


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
    assert all('ranks do different things' in said and kept for said, kept in a.values())
    assert "'0.right' on rank 0" in a['alone', 'alone'][0] and "'0.left' on rank 1" in a['alone', 'alone'][0]


@slow
def test_pipeline_stages_are_refused(two):
    a,b = two('stages')
    assert a == b and 'before it is cut into pipeline stages' in a[0] and a[1]


@slow
def test_a_model_from_the_meta_device(two):
    (said,got,ok),(_,same,_) = two('meta')
    assert 'to_empty' in said and ok and shards.same(got, same)
    assert close(got, on_one_process('blocks:blocks:start')[0])


@slow
def test_shards_keep_their_digits_where_the_forward_runs_in_half_precision(two):
    (got,ok,dtypes),_ = two('half_precision')
    assert ok and set(dtypes) == {torch.float32}
    gram = got[0].double().T @ got[0].double()  # (32, 20), of orthonormal columns
    assert torch.allclose(gram, torch.eye(20, dtype=gram.dtype)*gram[0, 0], atol=1e-5)
    assert close(got, on_one_process('blocks:blocks:start')[0], tol=0.03)


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
    want = layer_stats(shards.network('blocks'), shards.sequences()).pairs
    assert torch.allclose(torch.tensor(a), torch.tensor(want), atol=1e-5)


@slow
def test_samples_that_are_alike_on_one_rank_are_not_alike(two):
    (statuses,w),(same_statuses,same_w) = two('alike_on_one')
    assert statuses == same_statuses == ['ok', 'ok'] and shards.same(w, same_w)


@slow
def test_experts_that_not_every_rank_runs(two):
    "They are corrected after a pass, by what all ranks saw of them. No rank waits for another that does not run one."
    (plain,sharded),(plain_too,sharded_too) = two('experts')
    assert shards.same(plain[0], plain_too[0]) and shards.same(sharded[0], sharded_too[0])
    assert close(plain[0], sharded[0]) and plain[1:] == plain_too[1:] == sharded[1:] == sharded_too[1:]
    _,statuses,n_passes,kept = plain
    assert {n for n, s in statuses.items() if s == 'not called'} == {'up[3]', 'down[3]'}
    assert {n for n, s in statuses.items() if s == 'ok'} >= {'stem', 'head', 'up[0]', 'up[1]', 'up[2]'}
    assert set(statuses.values()) <= {'ok', 'no bias', 'not called'} and n_passes <= 5 and kept


# ---- What is refused

def made_by(name, module, base=nn.Sequential): return type(name, (base,), {'__module__': module})


def zero3(layer):
    layer.weight.ds_id = 0  # as ZeRO-3 marks what it has partitioned
    return layer


FSDP1 = made_by('FullyShardedDataParallel', 'torch.distributed.fsdp')
REFUSED = {
    'FSDP1': (nn.Sequential(nn.Linear(4, 4), FSDP1(nn.Linear(4, 4))), ValueError,
              r"model: '1' is wrapped by FullyShardedDataParallel.*use .*fully_shard"),
    'an engine of DeepSpeed': (made_by('Engine', 'deepspeed.runtime.engine')(nn.Linear(4, 4)), ValueError,
                               r"DeepSpeed.*before `deepspeed.initialize`"),
    'ZeRO-3': (zero3(nn.Linear(4, 4)), ValueError, r"DeepSpeed.*before `deepspeed.initialize`"),
    'a stage': (made_by('PipelineStage', 'torch.distributed.pipelining.stage', object)(), TypeError,
                'before it is cut into stages')}


@pytest.mark.parametrize('kind', REFUSED)
def test_models_that_are_spread_in_other_ways_are_refused(monkeypatch, kind):
    monkeypatch.setattr('torch.distributed.fsdp.FullyShardedDataParallel', FSDP1)
    model,error,says = REFUSED[kind]
    with pytest.raises(error, match=says): lsuv_init(model, torch.randn(8, 4))
