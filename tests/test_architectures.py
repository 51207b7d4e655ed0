"What the report says of each layer of every network, judged by hooks that know nothing of the package."
from __future__ import annotations

import warnings
from collections import Counter

import pytest
from judging import judge
from networks import NETWORKS

from fastai_lsuv import lsuv_init
from fastai_lsuv.report.rows import OUTSIDE

MOST_PASSES = 5
MORE_PASSES = {'hand/recurrent_residual': 8}  # Two layers in one loop, each called four times
SHARE_REACHED = 0.985


RESULTS = {}  # Of each network: the std of each layer as judged, and how many of them are in tolerance


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.filterwarnings('ignore')
def test_what_the_report_says(name):
    network = NETWORKS[name]
    model, batch = network()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        report = lsuv_init(model, batch)
    stds = RESULTS[name] = judge(model, batch)
    status = {r.name: r.status for r in report}
    assert not stds.keys() - status.keys(), 'missed silently'
    assert {n: s for n, s in status.items() if s not in ('ok', 'no bias')} == network.statuses
    far = {n: (round(s, 3), status[n]) for n, s in stds.items() if not abs(s - 1) <= 0.1}
    off = {n: f for n, f in far.items() if f[1] in ('ok', 'no bias', 'not called')}
    assert not off, 'said to be done, and is not'
    assert {n for n, s in status.items() if s == 'not called'} == status.keys() - stds.keys()
    check_coverage(model, report)
    for r in report:
        if r.name in stds and r.status in ('ok', 'no bias'):
            assert r.std == pytest.approx(stds[r.name], abs=0.1)  # some drop at random
    assert report.n_passes <= MORE_PASSES.get(name, MOST_PASSES) and report.ok == (not network.statuses)
    assert sum('LSUV did not normalize' in str(w.message) for w in said) == bool(network.statuses)


def check_coverage(model, report):
    "Each parameter of two or more dimensions is in a row or outside, and coverage is the share of those in rows."
    sizes = {n: p.numel() for n, p in getattr(model, '_orig_mod', model).named_parameters() if p.dim() > 1}
    in_rows = {n for r in report for n in r.weights if n in sizes}
    assert in_rows | report.outside.keys() == sizes.keys() and not in_rows & report.outside.keys()
    assert set(report.outside.values()) <= OUTSIDE.keys()
    assert report.coverage == pytest.approx(sum(sizes[n] for n in in_rows)/sum(sizes.values()))
    assert (report.coverage < 0.99) == ('% of the weights' in report.summary)


def test_the_table_holds_enough():
    of = Counter(n.split('/')[0] for n in NETWORKS)
    assert of.keys() == {'torchvision', 'timm', 'fastai', 'hand', 'transformers', 'torch_geometric'}
    assert len(NETWORKS) >= 115 and of['transformers'] >= 20 and of['torch_geometric'] >= 8


def test_share_of_all_layers_that_are_reached():
    if len(RESULTS) < len(NETWORKS):
        pytest.skip('not every network was run here')
    stds = [s for r in RESULTS.values() for s in r.values()]
    reached = sum(abs(s - 1) <= 0.1 for s in stds)
    whole = sum(all(abs(s - 1) <= 0.1 for s in r.values()) for r in RESULTS.values())
    print(f'{reached} of {len(stds)} layers within 0.1 ({reached/len(stds):.2%})')
    print(f'{whole} of {len(RESULTS)} networks whole')
    assert reached/len(stds) >= SHARE_REACHED
