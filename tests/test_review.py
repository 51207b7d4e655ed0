"What a review of the core found. Each defect has its test here."
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from learners import learner
from networks import Mod
from torch import nn

from fastai_lsuv import LSUVCallback, layer_stats, lsuv_init
from fastai_lsuv.doubts import doubt
from fastai_lsuv.feed import Feed
from fastai_lsuv.moments import channel_moments, whole_moments
from test_harm import quietly


# --- 1. a mean that a bias can move is part of `ok`

@pytest.mark.parametrize('seed', range(5))
def test_ok_means_that_the_mean_is_right_too(seed):
    torch.manual_seed(seed)
    x = torch.randn(64, 16)
    net = nn.Linear(16, 1)
    row, = quietly(net, iter([x, x + 2]), max_iter=1)
    with torch.no_grad(): mean = net(x + 2).mean().item()
    assert row.mean == pytest.approx(mean, abs=1e-4)
    assert row.status == ('ok' if abs(mean) <= 3/8 else 'off')  # three standard errors of 64 samples


def test_an_order_without_a_std_loop_speaks_of_the_mean():
    report = lsuv_init(nn.Linear(16, 8), 20*torch.randn(64, 16), order='mean', preinit=None)
    assert report[0].std > 5 and report.summary == "LSUV: 1 of 1 layer at mean 0. Order 'mean', 2 forward passes."


def test_with_per_channel_one_channel_that_is_far_off_is_not_ok():
    x = torch.randn(256, 64)
    wide = x.clone()
    wide[:, 0] *= 5
    report = quietly(nn.Linear(64, 64), iter([x, wide]), per_channel=True, preinit=_identity, max_iter=1)
    assert report[0].status == 'off'


def _identity(layer):
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)


# --- 2. a bias that two layers share

@pytest.mark.parametrize('preinit', ['orthogonal', None])
def test_a_shared_bias_belongs_to_the_first_layer_that_runs(preinit):
    net = Mod(lambda self, x: self.b(F.relu(self.a(x))), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    net.b.bias = net.a.bias
    x = torch.randn(256, 16) + 1
    report = lsuv_init(net, x, preinit=preinit)
    with torch.no_grad(): a = net.a(x)
    assert (a.mean().item(), a.std().item()) == pytest.approx((0, 1), abs=1e-2) and report['a'].status == 'ok'
    b = report['b']
    assert b.std == pytest.approx(1, abs=0.1) and b.status == ('no bias' if abs(b.mean) > 0.1 else 'ok')


# --- 3. attributes that are arrays

@pytest.mark.parametrize('array', [np.array(3.), np.arange(3.)], ids=['0-d', 'read-only'])
def test_arrays_that_cannot_be_written_are_no_obstacle(array):
    array.flags.writeable = False
    net = nn.Sequential(nn.Linear(16, 8))
    net.scale = array
    assert lsuv_init(net, torch.randn(64, 16)).ok and net.scale is array


# --- 4. a class whose name begins with Drop

def test_a_model_called_droplet_net_trains_while_it_is_measured():
    class DropletNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.head,self.aux = nn.Linear(16, 16),nn.Linear(16, 4),nn.Linear(16, 4)
        def forward(self, x):
            x = F.relu(self.body(x))
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    class DropPathNet(DropletNet): pass

    for make in (DropletNet, DropPathNet):
        assert [r.status for r in lsuv_init(make(), torch.randn(64, 16))] == ['ok']*3


# --- 5. mini-batches that keep disagreeing

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


# --- 6. numbers of numpy

def test_numbers_of_numpy_are_numbers():
    options = dict(target_std=np.float32(2), max_iter=np.int64(3), tol=np.float64(1e-3), target_mean=np.float32(1))
    row, = lsuv_init(nn.Linear(16, 8), torch.randn(64, 16), **options)
    assert (row.mean, row.std) == pytest.approx((1, 2), abs=1e-3)
    assert lsuv_init(nn.Linear(16, 8), [(torch.randn(64, 16), 0)], n_inp=np.int64(1)).ok


# --- 7. what the core imports

def test_the_core_needs_torch_alone():
    code = ("import sys; from fastai_lsuv import lsuv_init, layer_stats, LSUVReport; "
            "assert not {'fastai', 'fastcore', 'pandas', 'matplotlib'} & {m.split('.')[0] for m in sys.modules}, "
            "'more than torch'")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_lsuv_init_of_a_learner_is_at_hand_for_whoever_has_loaded_fastai():
    code = "from fastai.learner import Learner; import fastai_lsuv; assert hasattr(Learner, 'lsuv_init')"
    subprocess.run([sys.executable, '-c', code], check=True)


# --- 8. smaller ones

def test_options_given_to_learn_lsuv_init_reach_the_attached_callback():
    learn = learner(cbs=LSUVCallback())
    learn.lsuv_init(every_fit=True)
    assert learn.lsuv.every_fit is True
    learn.fit(1)
    assert sum("at std 1" in l for l in learn.lines if isinstance(l, str)) == 2


def test_a_loader_is_started_once_for_each_time_it_is_gone_through():
    class Loader:
        started = 0
        def __iter__(self):
            self.started += 1
            return iter([torch.randn(64, 16)])

    loader = Loader()
    assert lsuv_init(nn.Linear(16, 8), loader, batch_tol=1.).n_passes == 2 and loader.started == 2


def test_a_start_counts_as_a_pass_that_changed_the_layer():
    net = nn.Linear(16, 16)
    report = lsuv_init(net, torch.linalg.qr(torch.randn(256, 16))[0]*16, order='std', tol=0.5)
    assert report[0].gain == 1 and report[0].passes == 1 and report.ok


def test_tied_is_said_whatever_the_std():
    net = Mod(lambda self, x: self.b(self.a(x)), a=nn.Linear(16, 16, bias=False), b=nn.Linear(16, 16, bias=False))
    net.b.weight = net.a.weight
    report = quietly(net, torch.randn(256, 16))
    assert abs(report['b'].std - 1) < 0.1 and [r.status for r in report] == ['ok', 'tied']


def test_a_large_parameter_that_the_forward_writes_is_named():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table,self.lin = nn.Parameter(torch.zeros(300, 300)),nn.Linear(16, 8)
        def forward(self, x):
            with torch.no_grad(): self.table.add_(1)
            return self.lin(x)

    with pytest.warns(UserWarning, match='The model wrote to parameters that LSUV cannot put back: table'):
        lsuv_init(Writes(), torch.randn(64, 16))


def test_state_in_a_plain_object_is_put_back():
    class Tracker: count = 0

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.tracker,self.lin = Tracker(),nn.Linear(16, 8)
            self.tracker.count = 7
        def forward(self, x):
            self.tracker.count += 1
            return self.lin(x)

    net = Counts()
    assert lsuv_init(net, torch.randn(64, 16)).ok and net.tracker.count == 7


# --- a PyTorch mini-batch is a list

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


# --- found as the tests of the new core were written

@pytest.mark.parametrize('mean', [0., 0.5, 2., 20., 1000.])
@pytest.mark.parametrize('moments', [whole_moments, channel_moments])
@pytest.mark.parametrize('samples', [8, 64])
def test_a_mean_hides_no_outlier(mean, moments, samples):
    x = .1*torch.randn(samples, 32, dtype=torch.float64)
    x[3] *= 40
    assert doubt(moments(x + mean), 1.) == 'outlier'
    assert doubt(moments(torch.randn(samples, 32) + mean), 1.) == ''


def test_joining_more_doubles_the_mini_batch_and_moving_on_begins_anew():
    batches = [torch.full((1, 4), float(i)) for i in range(20)]
    with Feed(nn.Linear(4, 2), iter(batches), None, None) as feed:
        sizes = [len(feed.batch) for _ in range(3) if feed.join_more()]
        feed.next()
        feed.join_more()
        assert sizes == [2, 4, 8] and feed.batch[:, 0].tolist() == [8., 9.]


@pytest.mark.parametrize('drop', [torch.alpha_dropout, torch.feature_alpha_dropout, torch.alpha_dropout_,
                                  torch.feature_dropout_, torch.feature_alpha_dropout_], ids=lambda f: f.__name__)
def test_no_builtin_dropout_drops(drop):
    seen = []

    def forward(self, x):
        seen.append(drop(x.clone(), 0.5, self.training))
        return self.lin(seen[-1])

    net,x = Mod(forward, lin=nn.Linear(16, 8)),torch.randn(64, 16)
    lsuv_init(net, x)
    assert all(torch.equal(s, x) for s in seen)


def test_the_warning_of_an_unused_target_points_at_the_caller():
    with pytest.warns(UserWarning, match='target_mean') as said:
        lsuv_init(nn.Linear(16, 8), torch.randn(64, 16), order='std', target_mean=1.)
        LSUVCallback(order='std', target_mean=1.)
    assert [w.filename for w in said] == [__file__]*2


# --- found by a first reader of the new core

def test_the_only_mini_batch_of_a_list_is_not_taken_for_a_fresh_one():
    x = torch.randn(8, 16)
    with Feed(nn.Linear(16, 2), [x], None, None) as feed:
        assert not feed.next() and not feed.join_more() and feed.batch is x


def test_a_loss_that_cannot_be_taken_any_more_puts_the_weights_back():
    net,x = nn.Linear(16, 8),torch.randn(64, 16)
    was = net.weight.detach().clone()

    def loss(model):
        out = model(x)
        if out.std() > 0.9: raise ArithmeticError('the loss is undefined')
        return out.square().mean()

    assert quietly(net, x, loss=loss)[0].status == 'undone' and torch.equal(net.weight, was)


def test_a_bias_that_does_not_move_the_mean_is_tried_once():
    net = Mod(lambda self, x: self.head(self.block(x)), block=nn.Sequential(nn.Linear(16, 32), nn.ReLU()),
              head=nn.Linear(32, 8))
    runs = []
    net.block[1].register_forward_hook(lambda *_: runs.append(1))
    report = quietly(net, (torch.randn(64, 16) for _ in range(20)), modules=['block', 'head'], batch_tol=0.02)
    assert report['block'].status in ('no bias', 'off') and report.n_passes > 2
    assert len(runs)/report.n_passes < 8  # 10 and more where each pass tries the bias again


# --- found by a reviewer of the new core

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
    assert report.ok and report.n_passes == 4 and torch.equal(x, was)
    assert [s for _, s in layer_stats(net, x).pairs] == pytest.approx([1, 1], abs=1e-3)


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


def test_a_frozen_weight_that_the_forward_moves_is_put_back():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.q,self.k = nn.Linear(20, 64),nn.Linear(20, 64).requires_grad_(False)
        def forward(self, x):
            q = self.q(x)
            with torch.no_grad():
                for a, b in zip(self.q.parameters(), self.k.parameters()): b.data = b.data*.9 + a.data*.1
                return q @ self.k(x).T

    net = Momentum()
    was = [p.clone() for p in net.k.parameters()]
    assert quietly(net, torch.randn(64, 20))['k'].status == 'frozen'
    assert all(map(torch.equal, net.k.parameters(), was))


@pytest.mark.parametrize('norm', [nn.LayerNorm(16), nn.GroupNorm(2, 16)])
def test_a_norm_layer_inside_a_transform_of_torch_func(norm):
    def forward(self, x): return torch.func.vmap(lambda row: self.norm(row[None])[0])(self.lin(x))

    assert lsuv_init(Mod(forward, lin=nn.Linear(20, 16), norm=norm), torch.randn(64, 20)).ok


def test_zeros_may_be_the_best_prediction():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(16, 64),nn.Linear(64, 10)
        def forward(self, x): return self.b(F.relu(self.a(x)))**6*100

    net,x = Grows(),torch.randn(64, 16)
    report = quietly(net, x, loss=lambda model: model(x).square().mean())
    assert {r.status for r in report} == {'undone'}
    kept = quietly(net, x, loss=lambda model: model(x).square().mean(), force=True)
    assert 'after (far worse, and kept with `force=True`).' in kept.summary and kept.ok


def test_a_layer_that_puts_out_the_same_for_each_sample_is_not_scaled_up():
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    nn.init.zeros_(net[0].weight)
    report = quietly(net, torch.randn(64, 16))
    assert {r.status for r in report} == {'alike'} and {r.gain for r in report} == {1.}


def test_the_first_tensor_tells_the_samples():
    def forward(self, x, table): return self.b(F.relu(self.a(x))) + table[:10]

    net = Mod(forward, a=nn.Linear(16, 100), b=nn.Linear(100, 10))
    assert lsuv_init(net, (torch.randn(64, 16)*.01, torch.zeros(100))).ok


def test_what_ran_before_its_input_changed_is_not_called_ok():
    class Routes(nn.Module):
        def __init__(self):
            super().__init__()
            self.t,self.b,self.c = nn.Linear(16, 64),nn.Linear(64, 64),nn.Linear(64, 8)
        def forward(self, x, flag):
            h = self.t(x)
            if flag: self.b(h)
            return self.c(F.relu(h))

    batches = [(torch.randn(64, 16), 1), *[(torch.randn(64, 16)*3, 0) for _ in range(5)]]
    assert [(r.name, r.status) for r in quietly(Routes(), batches)] == [('t', 'ok'), ('b', 'off'), ('c', 'ok')]


def test_inputs_without_samples_are_not_joined():
    def forward(self, x, pos): return self.lin(x) + pos

    net,pos = Mod(forward, lin=nn.Linear(16, 10)),torch.randn(10)
    alike = [(torch.randn(1, 16).repeat(8, 1), pos) for _ in range(3)]
    assert [r.shape for r in quietly(net, alike)] == [(8, 10)]


def test_layer_stats_of_a_model_that_samples_leaves_the_generator_alone():
    net = Mod(lambda self, x: self.lin(x + torch.randn_like(x)), lin=nn.Linear(16, 8))
    was = torch.get_rng_state()
    layer_stats(net, torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), was)
