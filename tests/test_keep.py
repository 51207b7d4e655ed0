"What is remembered is put back: all that objects hold, and weights; whatever fails, and whoever interrupts."
import random
import signal
import threading
from collections import OrderedDict, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorBase
from fingerprint import fingerprint
from torch import nn

from fastai_lsuv.keep import Generators, Snapshot, Weights, memory, uninterrupted


def module(**attributes):
    m = nn.Module()
    vars(m).update(attributes)
    return m


def shown(v):
    "A thing in words that tell all of it."
    if isinstance(v, torch.Generator): return v.get_state().tolist()
    if isinstance(v, np.random.Generator): return repr(v.bit_generator.state)
    if isinstance(v, np.random.RandomState): return repr(v.get_state())
    if isinstance(v, random.Random): return v.getstate()
    if not isinstance(v, torch.Tensor): return repr(v)
    return repr((v.dtype, v.shape, v.detach().to_dense().tolist()))


def made_in_inference_mode():
    with torch.inference_mode(): return torch.ones(3)


def give_other_memory(t): t.data = torch.zeros(5, dtype=torch.float64)


HELD = {  # What makes it, and what changes it
    'dict': (lambda: {'a': 1, 'b': 2}, lambda d: (d.pop('a'), d.update(c=3))),
    'empty dict': (dict, lambda d: d.update(a=1)),
    'order of a dict': (lambda: {'a': 1, 'b': 2}, lambda d: d.update(a=d.pop('a'))),
    'ordered dict': (lambda: OrderedDict(a=1, b=2), lambda d: d.move_to_end('a')),
    'list': (lambda: [1, 2, 3], lambda v: (v.pop(), v.append(7), v.append(8))),
    'empty list': (list, lambda v: v.append(1)),
    'list of tensors': (lambda: [torch.ones(3)], lambda v: v.__setitem__(0, torch.zeros(3))),
    'set': (lambda: {1, 2}, lambda v: v.add(3)),
    'empty set': (set, lambda v: v.add(1)),
    'defaultdict': (lambda: defaultdict(list, a=[1]), lambda d: (d['a'].append(2), d['b'])),
    'nested': (lambda: [{'b': torch.zeros(1)}], lambda v: (v[0]['b'].add_(1), v[0].update(c=1))),
    'array': (lambda: np.array([np.nan, 1.]), lambda a: a.fill(0)),
    'array, 0-d': (lambda: np.array(1.5), lambda a: a.fill(0)),
    'generator of torch': (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(1, generator=g)),
    'generator of python': (lambda: random.Random(3), lambda g: g.random()),
    'old generator of numpy': (lambda: np.random.RandomState(3), lambda g: g.rand()),
    'generator of numpy': (lambda: np.random.default_rng(3), lambda g: g.random())}
TENSORS = {
    'nan': (lambda: torch.full((3,), float('nan')), lambda t: t.fill_(0)),
    'minus zero': (lambda: torch.zeros(3), lambda t: t.neg_()),
    'bool': (lambda: torch.ones(3) > 0, lambda t: t.logical_not_()),
    'complex': (lambda: torch.ones(3, dtype=torch.complex128), lambda t: t.mul_(2j)),
    'bf16': (lambda: torch.ones(3).bfloat16(), lambda t: t.mul_(2)),
    'float64, transposed': (lambda: torch.rand(3, 4).double().t(), lambda t: t.mul_(2)),
    'channels last': (lambda: torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last), lambda t: t.mul_(2)),
    'empty': (lambda: torch.ones(0, 3), lambda t: t.resize_(1, 3)),
    'gaps': (lambda: torch.ones(4, 4)[::2, ::2], lambda t: t.mul_(2)),
    'expanded': (lambda: torch.ones(2, 1).expand(2, 3), lambda t: t[:, :1].mul_(2)),
    'other memory': (lambda: torch.ones(3), give_other_memory),
    'coo': (lambda: torch.eye(3).to_sparse(), lambda t: t.add_(torch.ones(3, 3).to_sparse())),
    'csr': (lambda: torch.eye(4).to_sparse_csr(), lambda t: t.values().mul_(2)),
    'inference': (made_in_inference_mode, lambda t: t.data.mul_(2)),
    'of a graph': (lambda: torch.ones(3, requires_grad=True)*2, lambda t: t.data.mul_(2)),
    'of fastai': (lambda: TensorBase(torch.ones(3)), lambda t: t.mul_(2))}


def check(kind, remember):
    "What `remember` gives for a thing puts it back."
    make,change = kind
    held = make()
    was,put_back = shown(held),remember(held)
    for _ in range(2):
        change(held)
        assert shown(held) != was
        put_back()
        assert shown(held) == was


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('wrap', [lambda v: v, lambda v: (v,)], ids=['attribute', 'in a tuple'])
@pytest.mark.parametrize('kind', HELD | TENSORS)
def test_all_that_is_held_is_put_back(kind, wrap):
    check((HELD | TENSORS)[kind], lambda v: Snapshot([module(held=wrap(v))]).restore)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', TENSORS)
def test_weights_of_any_kind_are_put_back(kind):
    weights = Weights()
    check(TENSORS[kind], lambda v: weights.keep([v]) or weights.put_back)


def draw(): return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()


def test_the_generators_of_all_draw_the_same_again_and_go_on_after_it():
    draw()  # a normal number is drawn ahead
    g = Generators()
    first,second = draw(),draw()
    with pytest.raises(KeyboardInterrupt), g.again():
        assert draw() == first
        with g.again(): assert [draw(), draw()] == [first, second]
        assert draw() == second
        third = draw()
        raise KeyboardInterrupt
    assert draw() == third
    for _ in range(2):
        g.restore()
        assert [draw(), draw(), draw()] == [first, second, third]


def test_hooks_parameters_buffers_modules_and_attributes():
    m = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    m.gone,inside = 2,SimpleNamespace(n=0)
    m[0].inside = inside
    m[0].register_forward_hook(lambda *args: None)
    was,weight,s = fingerprint(m),m[0].weight,Snapshot(m.modules())
    for k in [k for k in vars(m[0]) if 'hooks' in k and vars(m[0])[k] is not None]: vars(m[0])[k][99] = print
    handle = m[0].register_forward_pre_hook(print)
    m[1].running_mean = torch.ones(2)
    m[1].register_buffer('late', torch.ones(1))
    m[0].weight = nn.Parameter(torch.ones(2, 2))
    m.add_module('more', nn.ReLU())
    m.eval()
    m.new = inside.n = 1
    del m.gone
    s.restore()
    handle.remove()
    assert fingerprint(m) == was and m[0].weight is weight
    assert inside.n == 1, "plain objects are not looked into"


def test_a_model_that_hooks_itself_is_undone_together_with_its_note():
    class Net(nn.Linear):
        hooked,got = False,()
        def forward(self, x):
            if not self.hooked: self.handle = self.register_forward_hook(lambda m, *_: vars(m).update(got=m.got + (1,)))
            self.hooked = True
            return super().forward(x)
    m = Net(2, 2)
    s = Snapshot([m])
    for _ in range(2):
        m(m(m(torch.ones(1, 2))))
        assert m.got == (1, 1)
        s.restore()
        assert not m.hooked and not m._forward_hooks and m.got == () and not hasattr(m, 'handle')


def test_buffers_of_a_scripted_module():
    try: scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
    except Exception: pytest.skip('torch.jit is gone')
    s = Snapshot(scripted.modules())
    scripted(torch.randn(8, 3) + 5)
    s.restore()
    assert not scripted[0].running_mean.any() and scripted[0].num_batches_tracked == 0


def test_autograd_sees_no_write():
    same,changed,p = torch.full((3,), float('nan')),torch.ones(3),torch.ones(3, requires_grad=True)
    loss,s = (p*changed).sum(),Snapshot([module(same=same, changed=changed)])
    changed.data += 1
    s.restore()
    assert changed.sum() == 3 and same._version == changed._version == 0
    loss.backward()


def test_numbers_that_are_left_alone(tmp_path):
    "Those of parameters, and of files that lie in memory."
    p,mapped = nn.Parameter(torch.zeros(2)),np.memmap(tmp_path/'m', 'f4', 'w+', shape=(4,))
    m = module(view=p.data[1:], array=p.detach().numpy(), params=[p], mapped=mapped, log=[])
    s = Snapshot([m], but={memory(p)})
    p.data += 1
    mapped += 1
    m.log.append(1)
    s.restore()
    assert m.log == [] and p.sum() == 2 and mapped.sum() == 4


def test_weights_that_share_memory_are_put_back_to_the_first():
    root,w = torch.zeros(4),Weights()
    for part in (root[:3], root[1:]):
        w.keep([p := nn.Parameter(part)])
        p.data += 1
    w.put_back()
    assert not root.any()


def test_what_cannot_be_put_back_stops_no_others():
    m = module(array=np.zeros(2), system=random.SystemRandom(), log=[], n=0, tensor=torch.zeros(2))
    s = Snapshot([m])
    m.array += 1
    m.array.flags.writeable = False
    m.log.append(1)
    m.n = m.extra = 1
    m.tensor += 1
    with pytest.raises(ValueError, match='read-only'): s.restore()
    assert m.log == [] and m.n == 0 and not hasattr(m, 'extra') and not m.tensor.any()


def test_ctrl_c_waits_for_the_end_and_finds_its_handler_there():
    done,before = [],signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1, 2]
    for handler in (signal.SIG_IGN, before, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)
        with uninterrupted(): pass
        assert signal.getsignal(signal.SIGINT) is handler


def test_what_is_held_is_put_back_in_any_thread():
    m = module(log=[])
    s = Snapshot([m])
    m.log.append(1)
    thread = threading.Thread(target=s.restore)
    thread.start()
    thread.join()
    assert m.log == []
