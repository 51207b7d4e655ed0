"A run: what it leaves when it is interrupted after its last pass."
import warnings
from contextlib import contextmanager

import pytest
import torch
from fingerprint import fingerprint
from torch import nn

from fastai_lsuv import lsuv_init
from fastai_lsuv.run import run as room


def network(): return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize('worse', [False, True], ids=['', 'of a far worse model'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('where', ['Run._see_the_rest', 'rows_of', 'Feed.end', 'gradients_aside'])
def test_an_error_after_the_last_pass_puts_everything_back(monkeypatch, where, error, worse):
    net,x,written = network(),torch.randn(64, 8)*3 + 1,[]
    net[0].weight.grad = grad = torch.ones(8, 8)
    start,before,random = net[0].weight.detach().clone(),fingerprint(net),torch.get_rng_state()
    losses = iter((1., 1., 1., 1., 1e9))

    def fail(*args):
        written.append(not torch.equal(net[0].weight, start))
        raise error

    @contextmanager
    def aside(params):
        yield
        fail()

    monkeypatch.setattr(f'{room.__name__}.{where}', aside if where == 'gradients_aside' else fail)
    loss = (lambda model: (model(x), next(losses))[1]) if worse else None
    with pytest.raises(error): lsuv_init(net, x, preinit='orthogonal', loss=loss)
    assert written[0] == (not worse or where in ('Run._see_the_rest', 'Feed.end'))
    assert fingerprint(net) == before and net[0].weight.grad is grad and torch.equal(torch.get_rng_state(), random)


def test_a_warning_that_is_an_error_puts_everything_back():
    net,x = network(),torch.randn(64, 8)
    net[4].weight.requires_grad_(False).mul_(3)
    before = fingerprint(net)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserWarning, match='LSUV did not normalize 1 of 2 layers'): lsuv_init(net, x)
    assert fingerprint(net) == before
    with pytest.warns(UserWarning, match='LSUV did not normalize 1 of 2 layers') as said: lsuv_init(net, x)
    assert [w.filename for w in said] == [__file__] and fingerprint(net) != before
