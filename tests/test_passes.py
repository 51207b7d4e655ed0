"Passes: how many there are, what each sees, and which units a pass reaches."
import pytest
import torch
import torch.nn.functional as F
from checked import quietly, samples
from networks import Mod, cnn, mlp
from torch import nn

from fastai_lsuv import layer_stats, lsuv_init


def counted(model):
    "`model`, and a list that grows by one at every full forward pass."
    calls = []
    model.register_forward_pre_hook(lambda m, args: calls.append(args[0]))
    return model, calls


def batches_of(*scales): return [torch.randn(32, 3, 8, 8)*s for s in scales]
def stds(calls): return [x.std().round().item() for x in calls]


@pytest.mark.parametrize('depth', [5, 100])
def test_two_forward_passes_at_any_depth(depth):
    model, calls = counted(cnn(3, *[8]*depth))
    report = lsuv_init(model, torch.randn(8, 3, 8, 8))
    assert len(calls) == report.n_passes == 2 and len(report) == depth
    assert report.ok and {r.passes for r in report} == {1} and max(abs(r.std - 1) for r in report) < 2e-3


def test_pass_k_uses_mini_batch_k_and_none_is_drawn_for_nothing():
    b,taken = batches_of(1, 1, 1, 1),[]
    def draw():
        for k, x in enumerate(b):
            taken.append(k)
            yield x
    model, calls = counted(cnn(3, 8, 8))
    report = lsuv_init(model, draw())
    assert len(calls) == report.n_passes == 2 and all(map(torch.equal, calls, b)) and taken == [0, 1]


def test_passes_go_on_until_a_fresh_mini_batch_finds_all_in_tolerance():
    b = batches_of(1, 2, 2.05, 5)
    model, calls = counted(cnn(3, 8, 8, act=nn.Identity))
    report = lsuv_init(model, b)
    assert report.n_passes == 3 and stds(calls) == [1, 2, 2] and report.ok
    assert [r.passes for r in report] == [2, 1]  # the second layer had a std of 1 in both: the first had been corrected
    assert abs(report[0].std - 1) > 1e-3  # the last mini-batch only measures
    assert lsuv_init(cnn(3, 8, 8), b[:2], batch_tol=1.5).n_passes == 2


@pytest.mark.parametrize('most', [1, 2, 4])
def test_at_most_max_iter_passes_correct_and_one_verifies(most):
    model, calls = counted(nn.Sequential(nn.Linear(8, 8)))
    weights = []
    model.register_forward_hook(lambda m, a, o: weights.append(m[0].weight.clone()))
    with pytest.warns(UserWarning, match='off'):
        report = lsuv_init(model, (torch.randn(32, 8)*2**k for k in range(20)), max_iter=most, preinit='orthogonal')
    assert len(calls) == report.n_passes == most + 1 and report[0].status == 'off' and report[0].passes == most
    assert torch.equal(weights[-1], model[0].weight) and not report.ok
    assert report[0].std == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize('give, want', [(iter, [1, 3, 3]), (list, [1, 3, 1, 3])])
def test_a_generator_that_runs_out_gives_its_last_again_and_a_list_starts_over(give, want):
    model, calls = counted(nn.Linear(8, 8))
    quietly(model, give([torch.randn(32, 8)*s for s in (1, 3)]), max_iter=3)
    assert stds(calls) == want


def test_baseline_is_the_model_as_it_was():
    model,x = cnn(3, 8, 16),torch.randn(16, 3, 8, 8)
    was = layer_stats(model, x).pairs
    model, calls = counted(model)
    report = lsuv_init(model, x, baseline=True)
    assert [(r.mean_before, r.std_before) for r in report] == was and len(calls) == report.n_passes == 3
    assert lsuv_init(model, x)[0].std_before is None


# --- what a pass reaches

def test_compiled_models_are_reached_through_the_module_they_wrap():
    x,in_place = torch.randn(16, 3, 8, 8),cnn(3, 8, 8)
    in_place.compile(backend='eager')
    for model in torch.compile(cnn(3, 8, 8), backend='eager'), in_place, nn.DataParallel(cnn(3, 8, 8)):
        report = lsuv_init(model, x)
        assert report.ok and [r.name for r in report] == ['0', '2']
    part = nn.Sequential(torch.compile(cnn(3, 8, 8), backend='eager'), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        part(x)  # compiled without hooks
    report = lsuv_init(part, x)
    assert report.ok and len(report) == 3


class Tripled(nn.Linear):
    def forward(self, x): return 3*super().forward(x)


@pytest.mark.parametrize('layer', [nn.Linear, Tripled])
def test_a_layer_whose_weight_its_parent_applies_itself(layer):
    "It keeps its row and its name, though it is not called. The operation that takes its weight is measured."
    net = Mod(lambda self, x: self.b(F.linear(x, self.a.weight)), a=layer(16, 16), b=nn.Linear(16, 16))
    x,bias = samples(),net.a.bias.detach().clone()
    report = quietly(net, x)
    assert [(r.name, r.kind, r.status) for r in report] == [('a', layer.__name__, 'ok'), ('b', 'Linear', 'ok')]
    assert torch.equal(net.a.bias, bias)
    for out in F.linear(x, net.a.weight), net(x):
        assert out.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize('seed', range(5))
def test_mini_batches_that_alternate_are_pooled(seed):
    torch.manual_seed(seed)
    x,net = samples(),nn.Linear(16, 1)
    report = quietly(net, [x, x + 2, x, x + 2])
    with torch.no_grad(): both = net(torch.cat([x, x + 2]))
    # the mean is -4.7 where each pass forgets the one before
    assert (both.mean().item(), both.std().item()) == pytest.approx((0, 1), abs=0.2)
    assert report.ok and report.n_passes < 11


def test_a_layer_behind_one_that_still_changes_is_not_pooled_with_the_past():
    def forward(self, x):
        for _ in range(4): x = x + self.again(x)
        return self.head(x)
    net,x,outs = Mod(forward, again=nn.Linear(16, 16), head=nn.Linear(16, 16)),samples(256),[]
    report = quietly(net, x)
    net.head.register_forward_hook(lambda m, args, out: outs.append(out))
    with torch.no_grad(): net(x)
    assert report['head'].std == pytest.approx(outs[0].std().item(), abs=1e-3)


@pytest.mark.parametrize('times', [1, 3])
def test_each_pass_begins_with_the_state_that_training_begins_with(times):
    def forward(self, x):
        self.h = x if self.h is None else 0.5*self.h.detach() + x
        return self.lin(self.h)
    net,x = nn.Sequential(Mod(forward, lin=nn.Linear(20, 20), h=None), nn.ReLU(), nn.Linear(20, 4)),samples(64, 20)
    report = lsuv_init(net, x, baseline=times > 1)
    for now, said in zip(layer_stats(net, x).pairs, report.pairs): assert now == pytest.approx(said, abs=1e-6)
    assert net[0].h is None


def test_a_model_may_write_to_its_input():
    def forward(self, x):
        x -= 5.
        x /= 2.
        return self.net(x)
    x,net = samples(64, 20)*2 + 5,Mod(forward, net=mlp(20, 64, 10))
    was = x.clone()
    report = lsuv_init(net, x, loss=lambda model: model(x).square().mean() + 1)
    assert report.ok and report.n_passes == 3 and torch.equal(x, was)
    assert [s for _, s in layer_stats(net, x).pairs] == pytest.approx([1, 1], abs=1e-3)
