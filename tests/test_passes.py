"Passes: how many there are, what each sees, and which units a pass reaches."
import warnings

import pytest
import torch
import torch.nn.functional as F
from checked import init, quietly, samples, statuses
from networks import NETWORKS, Mod, cnn
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init
from fastai_lsuv.measure import Target
from fastai_lsuv.run import Kept, Passes
from fastai_lsuv.units import Selection


def counted(model):
    "`model`, and a list that grows by one at every full forward pass."
    calls = []
    model.register_forward_pre_hook(lambda m, args: calls.append(args[0]))
    return model, calls


@pytest.mark.parametrize('depth', [5, 100])
def test_two_forward_passes_at_any_depth(depth):
    model, calls = counted(cnn(3, *[8]*depth))
    report = lsuv_init(model, torch.randn(8, 3, 8, 8))
    assert len(calls) == report.n_passes == 2 and len(report) == depth
    assert report.ok and {r.passes for r in report} == {1} and max(abs(r.std - 1) for r in report) < 2e-3


def batches_of(*scales): return [torch.randn(32, 3, 8, 8)*s for s in scales]


def test_pass_k_uses_mini_batch_k():
    b = batches_of(1, 1, 1, 1)
    taken = []
    def draw():
        for k, x in enumerate(b):
            taken.append(k)
            yield x
    model, calls = counted(cnn(3, 8, 8))
    report = lsuv_init(model, draw())
    assert len(calls) == report.n_passes == 2 and all(map(torch.equal, calls, b))
    assert taken == [0, 1]  # none is drawn for nothing


def test_passes_go_on_until_a_fresh_mini_batch_finds_all_in_tolerance():
    b = batches_of(1, 2, 2.05, 5)
    model, calls = counted(cnn(3, 8, 8, act=nn.Identity))
    report = lsuv_init(model, b)
    assert report.n_passes == 3 and [x.std().round().item() for x in calls] == [1, 2, 2] and report.ok
    assert [r.passes for r in report] == [2, 1]  # the second layer had a std of 1 in both: the first had been corrected
    assert all(abs(r.std - 1) > 1e-3 for r in report[:1])  # the last mini-batch only measures
    assert lsuv_init(cnn(3, 8, 8), b[:2], batch_tol=1.5).n_passes == 2


def test_at_most_max_iter_passes_correct_and_one_verifies():
    for most in (1, 2, 4):
        model, calls = counted(nn.Sequential(nn.Linear(8, 8)))
        weights = []
        model.register_forward_hook(lambda m, a, o: weights.append(m[0].weight.clone()))
        with pytest.warns(UserWarning, match='off'):
            report = lsuv_init(model, (torch.randn(32, 8)*2**k for k in range(20)), max_iter=most, preinit='orthogonal')
        assert len(calls) == report.n_passes == most + 1 and report[0].status == 'off' and report[0].passes == most
        assert torch.equal(weights[-1], model[0].weight) and not report.ok
        assert report[0].std == pytest.approx(2, rel=0.3)


def test_a_generator_that_runs_out_gives_its_last_again_and_a_list_starts_over():
    b = [torch.randn(32, 8)*s for s in (1, 3)]
    for batches, want in ((iter(b), [1, 3, 3]), (b, [1, 3, 1, 3])):
        model, calls = counted(nn.Sequential(nn.Linear(8, 8)))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            lsuv_init(model, batches, max_iter=3)
        assert [x.std().round().item() for x in calls] == want


def test_baseline_is_the_model_as_it_was():
    model = cnn(3, 8, 16)
    x = torch.randn(16, 3, 8, 8)
    was = layer_stats(model, x).pairs
    model, calls = counted(model)
    report = lsuv_init(model, x, baseline=True)
    assert [(r.mean_before, r.std_before) for r in report] == was and len(calls) == report.n_passes == 3
    assert lsuv_init(model, x)[0].std_before is None


# --- what a pass reaches

def test_compiled_models_are_reached_through_the_module_they_wrap():
    plain = cnn(3, 8, 8)
    x = torch.randn(16, 3, 8, 8)
    assert [r.name for r in lsuv_init(torch.compile(plain, backend='eager'), x)] == ['0', '2']
    in_place = cnn(3, 8, 8)
    in_place.compile(backend='eager')
    assert lsuv_init(in_place, x).ok
    part = nn.Sequential(torch.compile(cnn(3, 8, 8), backend='eager'), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        part(x)  # compiled without hooks
    assert lsuv_init(part, x).ok and len(lsuv_init(part, x)) == 3
    assert lsuv_init(nn.DataParallel(cnn(3, 8, 8)), x)[0].name == '0'


def test_a_layer_whose_weight_its_parent_applies_itself():
    "It keeps its row and its name, though it is not called. The operation that takes its weight is measured."
    net = Mod(lambda self, x: self.b(F.linear(x, self.a.weight)), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    x,bias = samples(),net.a.bias.detach().clone()
    rows = init(net, x)
    assert statuses(rows) == {'a': 'ok', 'b': 'ok'} and rows['a'].kind == 'Linear' and torch.equal(net.a.bias, bias)
    assert F.linear(x, net.a.weight).std().item() == pytest.approx(1, abs=1e-3)
    assert net(x).std().item() == pytest.approx(1, abs=1e-3)


def test_data_dependent_control_flow():
    model, batch = NETWORKS['hand/control_flow']()
    assert statuses(init(model, batch)) == {'a': 'ok', 'b': 'ok', 'never': 'not called'}


def test_a_look_notes_the_parameters_that_functions_take():
    model,x = Mod(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(8, 8))),torch.randn(4, 8)
    def prepare(u): u.target = Target((('std',),), 0., 1., 1e-3, 0.1, False)

    passes = Passes(model, Selection(model), prepare, Kept(model))
    for _ in range(2):
        passes.look(lambda: model(x))
        assert passes.discovery.taken == {id(model.w)} and [u.name for u in passes.order] == ['w']


@pytest.mark.parametrize('seed', range(5))
def test_mini_batches_that_alternate_are_pooled(seed):
    torch.manual_seed(seed)
    x = torch.randn(64, 16)
    net = nn.Linear(16, 1)
    report = quietly(net, [x, x + 2, x, x + 2])
    with torch.no_grad(): both = net(torch.cat([x, x + 2]))
    # the mean is -4.7 where each pass forgets the one before
    assert (both.mean().item(), both.std().item()) == pytest.approx((0, 1), abs=0.2)
    assert report.ok and report.n_passes < 11


def test_a_layer_behind_one_that_still_changes_is_not_pooled_with_the_past():
    torch.manual_seed(0)
    def forward(self, x):
        for _ in range(4): x = x + self.again(x)
        return self.head(x)

    net,x = Mod(forward, again=nn.Linear(16, 16), head=nn.Linear(16, 16)),torch.randn(256, 16)
    report = quietly(net, x)
    outs = []
    net.head.register_forward_hook(lambda m, args, out: outs.append(out))
    with torch.no_grad(): net(x)
    assert report['head'].std == pytest.approx(outs[0].std().item(), abs=1e-3)


@pytest.mark.parametrize('times', [1, 3])
def test_each_pass_begins_with_the_state_that_training_begins_with(times):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin,self.h = nn.Linear(20, 20),None
        def forward(self, x):
            self.h = x if self.h is None else 0.5*self.h.detach() + x
            return self.lin(self.h)

    net,x = nn.Sequential(Remembers(), nn.ReLU(), nn.Linear(20, 4)),torch.randn(64, 20)
    report = lsuv_init(net, x, baseline=times > 1)
    for now, said in zip(layer_stats(net, x).pairs, report.pairs): assert now == pytest.approx(said, abs=1e-6)
    assert net[0].h is None


def test_a_model_may_write_to_its_input():
    class Normalizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
        def forward(self, x):
            x -= 5.
            x /= 2.
            return self.net(x)

    x,net = torch.randn(64, 20)*2 + 5,Normalizes()
    was = x.clone()
    report = lsuv_init(net, x, loss=lambda model: model(x).square().mean() + 1)
    assert report.ok and report.n_passes == 3 and torch.equal(x, was)
    assert [s for _, s in layer_stats(net, x).pairs] == pytest.approx([1, 1], abs=1e-3)
