"A run: what it leaves when it is interrupted after its last pass."
import warnings
from contextlib import contextmanager

import pytest
import torch
from fingerprint import fingerprint
from torch import nn

from fastai_lsuv import lsuv_init
from fastai_lsuv.run import run as room
from fastai_lsuv.run.run import Run


def network(): return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('where', ['the last look', 'the report'])
def test_an_error_after_the_last_pass_puts_everything_back(monkeypatch, where, error):
    net,called = network(),[]
    net[0].weight.grad = grad = torch.ones(8, 8)
    before = fingerprint(net)

    def fail(*args):
        called.append(not torch.equal(net[0].weight, start))
        raise error

    start = net[0].weight.detach().clone()
    monkeypatch.setattr(*((room, 'rows_of') if where == 'the report' else (Run, '_see_the_rest')), fail)
    with pytest.raises(error): lsuv_init(net, torch.randn(64, 8)*3 + 1)
    assert called == [True], "LSUV has written weights by then"
    assert fingerprint(net) == before and net[0].weight.grad is grad


@pytest.mark.parametrize('at', ['the end of the mini-batches', 'the gradients'])
def test_ctrl_c_at_the_very_end_puts_everything_back(monkeypatch, at):
    net = network()
    net[0].weight.grad = torch.ones(8, 8)
    before = fingerprint(net)

    @contextmanager
    def aside(params):
        yield
        raise KeyboardInterrupt

    def end(feed): raise KeyboardInterrupt

    x,random = torch.randn(64, 8),torch.get_rng_state()
    monkeypatch.setattr(*((room, 'gradients_aside', aside) if at == 'the gradients' else (room.Feed, 'end', end)))
    with pytest.raises(KeyboardInterrupt): lsuv_init(net, x, preinit='orthogonal')
    assert fingerprint(net) == before and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_report_of_a_far_worse_model_leaves_it_as_it_was(monkeypatch, error):
    net,x = network(),torch.randn(64, 8)
    before,losses = fingerprint(net),iter((1., 1., 1., 1e9))

    def fail(*args): raise error

    monkeypatch.setattr(room, 'rows_of', fail)
    with pytest.raises(error): lsuv_init(net, x, loss=lambda model: (model(x), next(losses))[1])
    assert fingerprint(net) == before and next(losses, None) is None


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

