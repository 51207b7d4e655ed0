"What the report says of each layer of every network, judged by hooks that know nothing of the package."
from __future__ import annotations

import warnings

import pytest
import torch
from networks import NETWORKS
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastai_lsuv import lsuv_init

MOST_PASSES = 5
SHARE_REACHED = 0.985


@torch.no_grad()
def judge(model, batch):
    """Std of each conv, linear, bilinear and attention layer that runs, over all its calls.

    The model trains, but without dropout."""
    model = getattr(model, '_orig_mod', model)
    model.train()
    for m in model.modules():
        if 'Drop' in type(m).__name__ or 'Stochastic' in type(m).__name__:
            m.training = False
            for p in ('p', 'drop_prob'):
                if hasattr(m, p):
                    setattr(m, p, 0.)
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):
            m.dropout = 0.
        if hasattr(m, 'drop_rate'):
            m.drop_rate = 0.  # timm's models hand it to `F.dropout`
    inside = {c for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    seen = {}
    def see(name):
        def hook(m, args, out):
            x = (out[0] if isinstance(out, tuple) else out).detach().as_subclass(torch.Tensor).double()
            n, s, q = seen.get(name, (0, 0., 0.))
            seen[name] = n + x.numel(), s + x.sum().item(), q + x.square().sum().item()
        return hook
    hooks = [m.register_forward_hook(see(n)) for n, m in model.named_modules()
             if isinstance(m, (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)) and m not in inside]
    if isinstance(batch, dict):
        model(**batch)
    else:
        model(*batch) if isinstance(batch, tuple) else model(batch)
    for h in hooks:
        h.remove()
    return {k: max(q/n - (s/n)**2, 0.)**0.5 for k, (n, s, q) in seen.items()}


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
    for r in report:
        if r.name in stds and r.status in ('ok', 'no bias'):
            assert r.std == pytest.approx(stds[r.name], abs=0.1)  # some drop at random
    assert report.n_passes <= MOST_PASSES and report.ok == (not network.statuses)
    assert sum('LSUV did not normalize' in str(w.message) for w in said) == bool(network.statuses)


def test_the_table_holds_enough():
    assert len(NETWORKS) >= 40 and {n.split('/')[0] for n in NETWORKS} == {'torchvision', 'timm', 'fastai', 'hand'}


def test_share_of_all_layers_that_are_reached():
    if len(RESULTS) < len(NETWORKS):
        pytest.skip('not every network was run here')
    stds = [s for r in RESULTS.values() for s in r.values()]
    reached = sum(abs(s - 1) <= 0.1 for s in stds)
    whole = sum(all(abs(s - 1) <= 0.1 for s in r.values()) for r in RESULTS.values())
    print(f'{reached} of {len(stds)} layers within 0.1 ({reached/len(stds):.2%})')
    print(f'{whole} of {len(RESULTS)} networks whole')
    assert reached/len(stds) >= SHARE_REACHED
