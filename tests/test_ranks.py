"Learners in two processes that talk over gloo: both compute the same weights, bit for bit."
import pytest
import ranks
from learners import same
from processes import run as run_all

slow = pytest.mark.slow  # starts two processes, which import fastai


@pytest.fixture(scope='module')
def run(tmp_path_factory): return run_all(ranks, 2, ranks.CASES, tmp_path_factory.mktemp('ranks'))


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
    (a,_,lines),(b,*_) = run('one_batch_each')
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
