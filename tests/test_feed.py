"The model's inputs: from tensors, tuples, dicts, lists, streams and DataLoaders."
import warnings
from collections import UserDict

import pytest
import torch
from checked import init, quietly, statuses
from fingerprint import fingerprint
from networks import NETWORKS, Logged, Mod
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.run.feed import Feed, join


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(4, 8),nn.Linear(3, 8)
    def forward(self, x, y, *, scale=1.): return {'out': (self.a(x)*scale, self.b(y))}


def test_tuples_and_dicts_are_the_models_inputs():
    x, y = torch.randn(64, 4), torch.randn(64, 3)
    for batch in ((x, y), dict(x=x, y=y, scale=2.), [(x, y)], iter([(x, y)]), [dict(x=x, y=y)], [[x, y]]):
        assert lsuv_init(Two(), batch).ok


def test_a_mapping_that_is_no_dict():
    assert lsuv_init(Two(), UserDict(x=torch.randn(64, 4), y=torch.randn(64, 3))).ok
    with pytest.raises(ValueError, match='batches: .*NaN'):
        lsuv_init(Two(), UserDict(x=torch.randn(64, 4), y=torch.full((64, 3), float('nan'))))


def test_the_last_thing_a_dataloader_yields_is_the_target():
    t = torch.arange(64)
    assert lsuv_init(nn.Linear(4, 8), DataLoader(TensorDataset(torch.randn(64, 4), t), 32)).n_passes == 2
    assert lsuv_init(Two(), DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 3), t), 32)).ok
    assert lsuv_init(Two(), DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 3)), 32), n_inp=2).ok
    assert lsuv_init(nn.Linear(4, 8), DataLoader(TensorDataset(torch.randn(64, 4)), 32)).ok  # nothing but an input


def test_fastai_dataloaders():
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.data.load import DataLoader as FastaiDataLoader
    rows = [(torch.randn(4), torch.randn(3), i) for i in range(64)]
    assert lsuv_init(Two(), TfmdDL(rows, bs=32)).ok  # all but the last
    assert lsuv_init(Two(), TfmdDL([r[:2] for r in rows], bs=32), n_inp=2).ok  # its own `n_inp` is 1
    assert lsuv_init(nn.Linear(4, 8), TfmdDL([(r[0], r[2]) for r in rows], bs=32)).ok
    assert lsuv_init(nn.Linear(4, 8), FastaiDataLoader([r[0] for r in rows], bs=32)).ok
    assert lsuv_init(nn.Linear(4, 8), FastaiDataLoader([(r[0], r[2]) for r in rows], bs=32)).ok
    assert lsuv_init(Two(), FastaiDataLoader(rows, bs=32)).ok
    with pytest.raises(TypeError, match='batches: got DataLoaders; .* such as its `train`'):
        lsuv_init(nn.Linear(4, 8), DataLoaders(FastaiDataLoader(rows)))


@pytest.mark.parametrize('f', [lsuv_init, layer_stats])
def test_the_warning_of_two_mini_batches_points_at_the_caller(f):
    with pytest.warns(UserWarning, match='a list of 2 tensors is 2 mini-batches') as said:
        f(nn.Linear(4, 8), list(torch.randn(2, 64, 4)))
    assert [w.filename for w in said] == [__file__]


def test_n_inp_and_get_input():
    x, y = torch.randn(64, 4), torch.zeros(64)
    m = lambda: nn.Linear(4, 8)
    assert lsuv_init(m(), [(x, y)], n_inp=1).ok and lsuv_init(m(), (x, y), n_inp=1).ok
    assert lsuv_init(m(), [(y, {'image': x})], get_input=lambda b: b[1]['image']).ok
    assert lsuv_init(m(), {'image': x, 'y': y}, get_input=lambda b: b['image']).ok
    assert lsuv_init(Two(), [(y, x, torch.randn(64, 3))], get_input=lambda b: list(b[1:])).ok
    # All are the model's inputs unless told otherwise.
    says = r'batches: mini-batch 1 holds 2 inputs, but Linear.forward takes \(input.*pass `n_inp`'
    with pytest.raises(TypeError, match=says):
        lsuv_init(m(), [(x, y)])
    with pytest.raises(TypeError, match=r'batches: mini-batch 1 holds 2 inputs, but .*pass `n_inp`'):
        layer_stats(m(), (x, y))
    with pytest.raises(TypeError, match=r"batches: mini-batch 1 holds the inputs 'image', 'y', but .*`get_input`"):
        lsuv_init(m(), {'image': x, 'y': y})
    with pytest.raises(TypeError, match=r"batches: mini-batch 1 holds 1 input, but Two.forward"):
        lsuv_init(Two(), x)


def test_inputs_that_the_model_makes_others_of():
    x = torch.randn(64, 4)
    hooked = nn.Sequential(nn.Linear(4, 8))
    hooked.register_forward_pre_hook(lambda m, args: args[:1])
    assert lsuv_init(hooked, (x, x)).ok
    class Calls(nn.Sequential):
        def __call__(self, x, y): return super().__call__(x + y)
    assert lsuv_init(Calls(nn.Linear(4, 8)), (x, x)).ok


def test_a_nan_in_a_later_mini_batch_puts_everything_back():
    model = Logged()
    was = fingerprint(model)
    with pytest.raises(ValueError, match='batches: mini-batch 2 holds NaNs'):
        lsuv_init(model, iter([torch.randn(32, 4), torch.full((32, 4), float('nan'))]))
    assert fingerprint(model) == was


def test_lazy_layers_come_to_life_first():
    model, batch = NETWORKS['hand/lazy']()
    model.eval()
    rows = init(model, batch)
    assert statuses(rows) == {'0': 'ok', '4': 'ok'} and rows['0'].kind == 'Conv2d' and not model.eval().training


# --- a list of tensors

@pytest.mark.parametrize('batches, held', [
    ([torch.randn(8, 4), torch.arange(8)], 'float32 (8, 4), int64 (8,)'),
    ([torch.randn(8, 4), torch.randn(8)], 'float32 (8, 4), float32 (8,)'),
    ([torch.randn(8, 4), torch.randn(8, 4).double()], 'float32 (8, 4), float64 (8, 4)'),
])
def test_a_list_of_tensors_of_several_kinds_is_refused(batches, held):
    model = nn.Linear(4, 8)
    with pytest.raises(ValueError) as e:
        lsuv_init(model, batches)
    assert str(e.value).startswith(f'batches: got a list of tensors of several kinds ({held})')
    assert '`n_inp`' in str(e.value)
    assert lsuv_init(model, batches, n_inp=1, tol=1e-6).n_passes == 2


def test_a_list_of_two_tensors_is_two_mini_batches_and_this_is_said():
    with pytest.warns(UserWarning, match='a list of 2 tensors is 2 mini-batches; .* pass `n_inp`') as said:
        assert lsuv_init(nn.Linear(4, 8), [torch.randn(64, 4), torch.randn(64, 4)]).n_passes == 2
    assert len(said) == 1


@pytest.mark.parametrize('batches, options', [
    ([torch.randn(64, 4)], {}),
    ([torch.randn(64, 4)]*3, {}),
    ([torch.randn(64, 4), torch.zeros(64, 1)], dict(n_inp=1)),
    ([torch.randn(64, 4), torch.randn(32, 4)], dict(get_input=lambda b: b)),
    (((torch.randn(64, 4),), (torch.randn(64, 4),)), dict(get_input=lambda b: b[0])),
])
def test_what_is_said_to_be_what_it_is_makes_no_noise(batches, options):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert lsuv_init(nn.Linear(4, 8), batches, **options).ok


# --- mini-batches joined

@pytest.mark.parametrize('parts, joined', [
    ([torch.ones(2, 3)], torch.ones(2, 3)),
    ([torch.zeros(2, 3), torch.ones(1, 3)], torch.tensor([[0., 0, 0], [0, 0, 0], [1, 1, 1]])),
    ([torch.arange(2), torch.arange(3)], torch.tensor([0, 1, 0, 1, 2])),
])
def test_joined_tensors(parts, joined):
    assert torch.equal(join(parts), joined)


def test_joined_collections():
    def batch(n): return {'x': torch.full((n, 2), float(n)), 'more': (torch.full((n,), n), [torch.zeros(n, 1)])}
    got = join([batch(2), batch(3)])
    assert got['x'].tolist() == [[2., 2.]]*2 + [[3., 3.]]*3 and got['more'][0].tolist() == [2, 2, 3, 3, 3]
    assert type(got['more']) is tuple and type(got['more'][1]) is list and got['more'][1][0].shape == (5, 1)


@pytest.mark.parametrize('parts', [
    [torch.ones(2, 3), torch.ones(2, 4)],
    [torch.ones(2, 3), torch.ones(2)],
    [torch.tensor(1.), torch.tensor(2.)],
    [(torch.ones(2, 3), 5), (torch.ones(2, 3), 5)],
    [(torch.ones(2, 3),), torch.ones(2, 3)],
    [(torch.ones(2, 3),), (torch.ones(2, 3), torch.ones(2, 3))],
    [{'a': torch.ones(2)}, {'b': torch.ones(2)}],
    [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4)],
])
def test_shapes_that_cannot_be_joined(parts):
    assert join(parts) is None


def numbered(*sizes): return [torch.full((n, 4), float(k)) for k, n in enumerate(sizes)]


def firsts(feed): return feed.batch[:, 0].tolist()


def test_join_more_doubles_the_mini_batch_each_time():
    with Feed(nn.Linear(4, 2), iter(numbered(2, 1, 1, 1, 3)), None, None) as feed:
        assert firsts(feed) == [0, 0] and feed.joined == 1
        assert feed.join_more() and firsts(feed) == [0, 0, 1] and feed.joined == 2
        assert feed.join_more() and firsts(feed) == [0, 0, 1, 2, 3]
        assert feed.join_more() and firsts(feed) == [0, 0, 1, 2, 3, 4, 4, 4]  # the stream has ended
        assert not feed.join_more() and len(feed.batch) == 8 and not feed.next()


def test_join_more_moves_on_where_shapes_differ():
    batches = [torch.zeros(2, 4, 3), torch.ones(2, 5, 3), torch.full((2, 5, 3), 2.)]
    with Feed(nn.Linear(3, 2), iter(batches), None, None) as feed:
        assert feed.join_more() and torch.equal(feed.batch, batches[1]) and feed.joined == 1
        assert feed.join_more() and torch.equal(feed.batch, torch.cat(batches[1:])) and feed.joined == 2


def test_join_more_has_nothing_to_add_to_a_single_mini_batch():
    x = torch.randn(2, 4)
    with Feed(nn.Linear(4, 2), x, None, None) as feed:
        assert not feed.join_more() and feed.batch is x and feed.joined == 1


def test_join_more_goes_round_a_list_again():
    with Feed(nn.Linear(4, 2), numbered(1, 1, 1), None, None) as feed:
        assert feed.join_more() and firsts(feed) == [0, 1]
        assert feed.join_more() and firsts(feed) == [0, 1, 2, 0]


def test_next_moves_on_from_a_joined_mini_batch():
    with Feed(nn.Linear(4, 2), iter(numbered(1, 1, 1, 1)), None, None) as feed:
        feed.join_more()
        assert feed.next() and firsts(feed) == [2]


def test_a_loader_is_started_once_for_each_time_it_is_gone_through():
    class Loader:
        started = 0
        def __iter__(self):
            self.started += 1
            return iter([torch.randn(64, 16)])

    loader = Loader()
    assert lsuv_init(nn.Linear(16, 8), loader, batch_tol=1.).n_passes == 2 and loader.started == 2


def test_a_list_with_n_inp_is_one_mini_batch():
    x,y = torch.randn(64, 16),torch.randint(0, 4, (64,))
    report = lsuv_init(nn.Linear(16, 4), [x, y], n_inp=1)
    assert report.ok and report.n_passes == 2 and report[0].shape == (64, 4)


def test_a_list_of_unlike_tensors_says_what_is_meant():
    net = nn.Linear(16, 4)
    was = fingerprint(net)
    says = r'batches: got a list of tensors of several kinds \(float32 \(64, 16\), int64 \(64,\)\).*`n_inp`'
    with pytest.raises(ValueError, match=says):
        lsuv_init(net, [torch.randn(64, 16), torch.randint(0, 4, (64,))])
    assert fingerprint(net) == was


def test_two_tensors_alike_are_two_mini_batches_and_a_warning_says_so():
    with pytest.warns(UserWarning, match='a list of 2 tensors is 2 mini-batches; .* pass `n_inp`'):
        lsuv_init(nn.Linear(16, 4), list(torch.randn(2, 64, 16)))


def test_joining_more_doubles_the_mini_batch_and_moving_on_begins_anew():
    batches = [torch.full((1, 4), float(i)) for i in range(20)]
    with Feed(nn.Linear(4, 2), iter(batches), None, None) as feed:
        sizes = [len(feed.batch) for _ in range(3) if feed.join_more()]
        feed.next()
        feed.join_more()
        assert sizes == [2, 4, 8] and feed.batch[:, 0].tolist() == [8., 9.]


def test_the_only_mini_batch_of_a_list_is_not_taken_for_a_fresh_one():
    x = torch.randn(8, 16)
    with Feed(nn.Linear(16, 2), [x], None, None) as feed:
        assert not feed.next() and not feed.join_more() and feed.batch is x


def test_inputs_without_samples_are_not_joined():
    def forward(self, x, pos): return self.lin(x) + pos

    net,pos = Mod(forward, lin=nn.Linear(16, 10)),torch.randn(10)
    alike = [(torch.randn(1, 16).repeat(8, 1), pos) for _ in range(3)]
    assert [r.shape for r in quietly(net, alike)] == [(8, 10)]


# --- graphs, and too few samples

class Graph:
    "A batch of graphs as torch_geometric has them: it can be iterated, and has a `to`."
    def __init__(self, x): self.x = x
    def __iter__(self): return iter([('x', self.x), ('n', 1)])
    def to(self, device): return Graph(self.x.to(device))


@pytest.mark.parametrize('batches', [lambda g: g, lambda g: [g], lambda g: iter([g])])
def test_a_graph_is_one_input(batches):
    net = Mod(lambda self, g: self.lin(g.x), lin=nn.Linear(16, 8))
    report = lsuv_init(net, batches(Graph(torch.randn(64, 16))))
    assert report.ok and report[0].shape == (64, 8)


@pytest.mark.parametrize('net, x, n', [
    (nn.Linear(16, 32), torch.randn(16), 1),
    (nn.Linear(16, 32), torch.randn(2, 16), 2),
    (nn.Conv2d(3, 8, 3), torch.randn(3, 12, 12), 3),
])
def test_too_few_samples_are_mentioned(net, x, n):
    with pytest.warns(UserWarning, match=rf'a tensor of shape .* is taken for {n} sample.*`x\[None\]`') as said:
        lsuv_init(net, x)
    assert said[0].filename == __file__
