"In which order the hooks on a unit run, beside those of others."
import pytest
import torch
from torch import nn

from fastai_lsuv.observe.hooks import hooked
from fastai_lsuv.units.units import Unit


class Noting:
    "A solver and an observer in one, which note what they are asked."
    busy = in_graph = running = False

    def __init__(self, needs_input, needs_output, changes=True):
        self.needs_input,self.needs_output,self.changes,self.said = needs_input,needs_output,changes,[]

    def keep_input(self, args, kwargs): self.said.append('keep_input')
    def keep_output(self, out): self.said.append('keep_output')
    def start(self, u): self.said.append('start')
    def observe(self, u, out): self.said.append('observe')


def order(noting, of_torch=False):
    class Layer(nn.Linear):
        def forward(self, x):
            noting.said.append('forward')
            return super().forward(x)

    def before(m, args): noting.said.append('before')
    def after(m, args, out): noting.said.append('after')

    m = Layer(4, 4)
    if of_torch: before.__module__ = after.__module__ = 'torch.distributed.fsdp'
    m.register_forward_pre_hook(before)
    m.register_forward_hook(after)
    with hooked(m, {Unit('', m): noting}, noting): m(torch.randn(2, 4))
    said = list(noting.said)
    m(torch.randn(2, 4))
    assert noting.said[len(said):] == ['before', 'forward', 'after'], "the hooks are gone"
    return said


@pytest.mark.parametrize('needs_input, needs_output, of_torch, want', [
    (True, True, False, 'start keep_input before forward keep_output after observe'),
    (True, False, False, 'start keep_input before forward after observe'),
    (False, False, False, 'start before forward after observe'),
    (False, False, True, 'before start forward observe after'),
    (True, False, True, 'keep_input before start forward after observe'),
])
def test_order_of_hooks(needs_input, needs_output, of_torch, want):
    assert order(Noting(needs_input, needs_output), of_torch) == want.split()


def test_an_observer_that_changes_nothing_only_observes():
    assert order(Noting(True, True, changes=False)) == ['before', 'forward', 'after', 'observe']
