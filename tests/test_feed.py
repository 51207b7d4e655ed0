"The model's inputs: from tensors, tuples, dicts, lists, streams and DataLoaders."
import warnings
from collections import UserDict

import pytest
import torch
from checked import init, statuses
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader as FastaiDataLoader
from fingerprint import fingerprint
from networks import NETWORKS, Logged, Mod
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.run import Feed, join


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(4, 8),nn.Linear(3, 8)
    def forward(self, x, y, *, scale=1.): return {'out': (self.a(x)*scale, self.b(y))}


class Calls(nn.Sequential):
    def __call__(self, x, y): return super().__call__(x + y)


class Graph:
    "A batch of graphs as torch_geometric has them: it can be iterated, and has a `to`."
    def __init__(self, x): self.x = x
    def __iter__(self): return iter([('x', self.x), ('n', 1)])
    def to(self, device): return Graph(self.x.to(device))


def one(): return nn.Linear(4, 8)


def hooked():
    net = nn.Sequential(one())
    net.register_forward_pre_hook(lambda m, args: args[:1])
    return net


def of_graph(): return Mod(lambda self, g: self.lin(g.x), lin=one())


x,y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)),torch.randn(64, 3)
t = torch.arange(64)
rows = list(zip(x, y, range(64)))
nan = float('nan')


def loader(*tensors): return DataLoader(TensorDataset(*tensors), 32)


# --- what is taken

TAKEN = {
    'a tuple': (Two, (x, y)),
    'a dict': (Two, dict(x=x, y=y, scale=2.)),
    'a mapping': (Two, UserDict(x=x, y=y)),
    'a list of a tuple': (Two, [(x, y)]),
    'a list of a list': (Two, [[x, y]]),
    'a list of a dict': (Two, [dict(x=x, y=y)]),
    'a list of a tensor': (one, [x]),
    'a list of three': (one, [x]*3),
    'a stream': (Two, iter([(x, y)])),
    # The last thing that a DataLoader yields is the target, unless it is all.
    'pytorch, input': (one, loader(x)),
    'pytorch, input and target': (one, loader(x, t)),
    'pytorch, inputs and target': (Two, loader(x, y, t)),
    'pytorch, inputs': (Two, loader(x, y), dict(n_inp=2)),
    'fastai, input': (one, FastaiDataLoader([r[0] for r in rows], bs=32)),
    'fastai, input and target': (one, FastaiDataLoader([(r[0], r[2]) for r in rows], bs=32)),
    'fastai, inputs and target': (Two, FastaiDataLoader(rows, bs=32)),
    'TfmdDL, input and target': (one, TfmdDL([(r[0], r[2]) for r in rows], bs=32)),
    'TfmdDL, inputs and target': (Two, TfmdDL(rows, bs=32)),
    'TfmdDL, inputs': (Two, TfmdDL([r[:2] for r in rows], bs=32), dict(n_inp=2)),  # its own `n_inp` is 1
    'n_inp of a tuple': (one, (x, t), dict(n_inp=1)),
    'n_inp of a list': (one, [x, t], dict(n_inp=1)),
    'n_inp of a list of a tuple': (one, [(x, t)], dict(n_inp=1)),
    'get_input of a dict': (one, {'image': x, 't': t}, dict(get_input=lambda b: b['image'])),
    'get_input of a tuple': (one, ((x,), (x,)), dict(get_input=lambda b: b[0])),
    'get_input of a list': (one, [x, x[:32]], dict(get_input=lambda b: b)),
    'get_input of nested ones': (one, [(t, {'image': x})], dict(get_input=lambda b: b[1]['image'])),
    'get_input that gives a list': (Two, [(t, x, y)], dict(get_input=lambda b: list(b[1:]))),
    'other inputs by a hook': (hooked, (x, x)),
    'other inputs by __call__': (lambda: Calls(one()), (x, x)),
    'a graph': (of_graph, Graph(x)),
    'a list of a graph': (of_graph, [Graph(x)]),
    'a stream of a graph': (of_graph, iter([Graph(x)])),
}


@pytest.mark.parametrize('net, batches, options', [(*v, {})[:3] for v in TAKEN.values()], ids=TAKEN)
def test_what_is_taken_makes_no_noise(net, batches, options):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        report = lsuv_init(net(), batches, **options)
    assert report.ok and report[0].shape[0] in (32, 64) and report[0].shape[1:] == (8,)


def test_a_loader_is_started_once_for_each_time_it_is_gone_through():
    class Loader:
        started = 0
        def __iter__(self):
            self.started += 1
            return iter([x])
    loader = Loader()
    assert lsuv_init(one(), loader, batch_tol=1.).n_passes == 2 and loader.started == 2


def test_lazy_layers_come_to_life_first():
    model,batch = NETWORKS['hand/lazy']()
    rows = init(model.eval(), batch)
    assert statuses(rows) == {'0': 'ok', '4': 'ok'} and rows['0'].kind == 'Conv2d' and not model.training


# --- what is refused

KINDS = 'got a list of tensors of several kinds'
REFUSED = {
    'two inputs': (one, [(x, t)], TypeError, r'mini-batch 1 holds 2 inputs, but Linear.forward takes \(.*pass `n_inp`'),
    'other names': (one, {'image': x, 't': t}, TypeError, "mini-batch 1 holds the inputs 'image', 't', .*`get_input`"),
    'one input': (Two, x, TypeError, 'mini-batch 1 holds 1 input, but Two.forward'),
    'DataLoaders': (one, DataLoaders(FastaiDataLoader(rows)), TypeError, 'got DataLoaders; .* such as its `train`'),
    'NaNs': (Two, UserDict(x=x, y=y*nan), ValueError, '.*NaN'),
    'NaNs later': (Logged, [x, x*nan, x], ValueError, 'mini-batch 2 holds NaNs'),
    'input and target': (one, [x, t], ValueError, fr'{KINDS} \(float32 \(64, 4\), int64 \(64,\)\).*`n_inp`'),
    'two shapes': (one, [x, x[:, 0]], ValueError, fr'{KINDS} \(float32 \(64, 4\), float32 \(64,\)\).*`n_inp`'),
    'two types': (one, [x, x.double()], ValueError, fr'{KINDS} \(float32 \(64, 4\), float64 \(64, 4\)\).*`n_inp`'),
}


@pytest.mark.parametrize('net, batches, error, says', REFUSED.values(), ids=REFUSED)
def test_what_is_refused_changes_nothing(net, batches, error, says):
    model = net()
    was = fingerprint(model)
    with pytest.raises(error, match=f'^batches: {says}'): lsuv_init(model, batches)
    assert fingerprint(model) == was
    if 'NaN' not in says:
        with pytest.raises(error, match=f'^batches: {says}'): layer_stats(model, batches)


@pytest.mark.parametrize('f', [lsuv_init, layer_stats])
@pytest.mark.parametrize('net, batches, says', [
    (one, [x, x], 'a list of 2 tensors is 2 mini-batches; .* pass `n_inp`'),
    (lambda: nn.Linear(16, 32), torch.randn(16), r'a tensor of shape .* is taken for 1 sample.*`x\[None\]`'),
    (lambda: nn.Linear(16, 32), torch.randn(2, 16), r'a tensor of shape .* is taken for 2 sample.*`x\[None\]`'),
    (lambda: nn.Conv2d(3, 8, 3), torch.randn(3, 12, 12), r'a tensor of shape .* is taken for 3 sample.*`x\[None\]`'),
], ids=['a list of two', 'one number each', 'two samples', 'one image'])
def test_what_may_be_a_mistake_is_said_once_to_the_caller(f, net, batches, says):
    with pytest.warns(UserWarning, match=says) as said: f(net(), batches)
    assert [w.filename for w in said if str(w.message).startswith('batches')] == [__file__]


# --- mini-batches joined

def test_mini_batches_of_any_kind_are_joined():
    def batch(n): return {'x': torch.full((n, 2), float(n)), 'more': (torch.full((n,), n), [torch.zeros(n, 1)])}
    got = join([batch(2), batch(3)])
    assert got['x'].tolist() == [[2., 2.]]*2 + [[3., 3.]]*3 and got['more'][0].tolist() == [2, 2, 3, 3, 3]
    assert type(got['more']) is tuple and type(got['more'][1]) is list and got['more'][1][0].shape == (5, 1)


def test_mini_batches_that_cannot_be_joined():
    a,wide = torch.ones(2, 3),torch.ones(2, 4)
    kinds,names,lengths,others = [(a,), a],[{'a': a}, {'b': a}],[(a,), (a, a)],[(a, 5), (a, 5)]
    no_samples = [(wide, a[0]), (wide, a[0])]
    for parts in [a, wide], [a, a, wide], [a, a[:, 0]], [a.sum()]*2, kinds, names, lengths, others, no_samples:
        assert join(parts) is None


def numbered(*sizes, width=4): return [torch.full((n, width), float(k)) for k, n in enumerate(sizes)]


@pytest.mark.filterwarnings('ignore:batches')
@pytest.mark.parametrize('batches, steps', [
    pytest.param(iter(numbered(2, 1, 1, 1, 3)), [
        ('join_more', True, [0, 0, 1]),
        ('join_more', True, [0, 0, 1, 2, 3]),
        ('join_more', True, [0, 0, 1, 2, 3, 4, 4, 4]),  # the stream has ended
        ('join_more', False, [0, 0, 1, 2, 3, 4, 4, 4]),
        ('next', False, [0, 0, 1, 2, 3, 4, 4, 4]),
    ], id='a stream'),
    pytest.param(iter(numbered(*[1]*9)), [
        ('join_more', True, [0, 1]),
        ('join_more', True, [0, 1, 2, 3]),
        ('next', True, [4]),
        ('join_more', True, [4, 5]),
    ], id='moving on begins anew'),
    pytest.param(numbered(1, 1, 1), [
        ('join_more', True, [0, 1]),
        ('join_more', True, [0, 1, 2, 0]),
    ], id='a list goes round again'),
    pytest.param(iter([torch.zeros(2, 3, 4), torch.ones(2, 4), torch.full((2, 4), 2.)]), [
        ('join_more', True, [1, 1]),
        ('join_more', True, [1, 1, 2, 2]),
    ], id='shapes differ'),
    pytest.param(torch.zeros(2, 4), [('next', False, [0, 0]), ('join_more', False, [0, 0])], id='a single one'),
    pytest.param(numbered(2), [('next', False, [0, 0]), ('join_more', False, [0, 0])], id='one in a list'),
])
def test_each_join_doubles_the_mini_batch(batches, steps):
    with Feed(one(), batches, None, None) as feed:
        for step, fresh, firsts in steps:
            assert getattr(feed, step)() == fresh and feed.batch[:, 0].tolist() == firsts
