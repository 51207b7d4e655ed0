"A model is never left worse than it was, and the report does not say `ok` when it is."
import math
from collections import OrderedDict

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from checked import quietly
from learners import images, learner, loaders, said, same, weights
from networks import Mod
from torch import nn

from fastai_lsuv import LSUVCallback, lsuv_init


def statuses(report): return [r.status for r in report]


def normed():
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64),
                         nn.ReLU(), nn.Linear(64, 2))


def plain(): return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def data(n=256):
    x = torch.randn(n, 16)
    return x, (x[:, 0] > 0).long()


# --- attributes that refuse to be written to

class FrozenDict(OrderedDict):
    "As the models of `diffusers` hold their configuration."
    def __init__(self, *args):
        super().__init__(*args)
        self.frozen = True

    def _refuse(self, *args, **kwargs): raise RuntimeError("a FrozenDict cannot be changed")

    __delitem__ = setdefault = pop = update = clear = _refuse

    def __setitem__(self, key, value):
        if getattr(self, 'frozen', False): self._refuse()
        super().__setitem__(key, value)


def test_a_configuration_that_refuses_updates_stays_and_the_model_is_initialized():
    net = Mod(lambda self, x: self.b(self.a(x)), a=nn.Linear(16, 16), b=nn.Linear(16, 4))
    net.config = FrozenDict({f'option {i}': i for i in range(29)})
    assert statuses(lsuv_init(net, torch.randn(64, 16))) == ['ok', 'ok']
    assert dict(net.config) == {f'option {i}': i for i in range(29)}


# --- samples that are alike

@pytest.mark.parametrize('noise', [0., 1e-7, 1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize('preinit', ['orthogonal', None])
def test_what_a_batch_norm_leaves_of_samples_that_are_alike_is_not_scaled_up(noise, preinit):
    x,y = data()
    for seed in range(3):
        torch.manual_seed(seed)
        net = normed()
        before = F.cross_entropy(net(x), y).item()
        report = quietly(net, x[:1] + noise*torch.randn(64, 16), preinit=preinit)
        assert F.cross_entropy(net(x), y).item() < 2*before  # 53,510 where the noise is scaled to std 1
        assert report['0'].status == 'ok' and report['3'].status == 'alike' and report['3'].gain == 1


def test_alike_samples_are_named_in_the_warning():
    says = r'did not normalize 2 of 3 layers:\n- alike: 3, 6. The samples hardly differ'
    with pytest.warns(UserWarning, match=says):
        lsuv_init(normed(), torch.randn(1, 16).repeat(64, 1))


def test_samples_that_differ_a_little_are_no_reason_to_stop():
    assert statuses(lsuv_init(normed(), torch.randn(1, 16) + 1e-2*torch.randn(64, 16))) == ['ok']*3


def test_small_activations_that_differ_are_no_reason_to_stop():
    net = nn.Sequential(nn.Linear(16, 64), Mod(lambda self, x: x*1e-3), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    assert statuses(lsuv_init(net, data()[0])) == ['ok', 'ok']


def test_without_a_norm_layer_alike_samples_are_measured_where_there_are_features_enough():
    report = quietly(plain(), torch.randn(1, 16) + 1e-3*torch.randn(64, 16))
    assert statuses(report)[:2] == ['ok', 'ok']
    # the std of two numbers is chance
    assert report[2].status == 'alike' if report[2].gain == 1 else report[2].gain <= 2


def test_a_constant_image_behind_an_instance_norm():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8),
                        nn.ReLU(), nn.Conv2d(8, 4, 3))
    report = quietly(net, torch.randn(8, 3, 1, 1).expand(8, 3, 16, 16), preinit='orthogonal')
    assert [r.gain for r in report][1:] == [1, 1] and report['3'].status == 'alike'


def test_further_mini_batches_are_joined_where_the_samples_of_one_are_alike():
    a,b = torch.randn(2, 1, 16)
    report = lsuv_init(normed(), [a.repeat(32, 1), b.repeat(32, 1), torch.randn(64, 16)], preinit='orthogonal')
    assert report.ok and 1 < report['3'].gain < 2
    alone = quietly(normed(), [a.repeat(32, 1)]*3)
    assert statuses(alone) == ['ok', 'alike', 'alike']


def test_short_texts_in_a_text_classifier():
    from fastai.text.all import AWD_LSTM, TextDataLoaders, text_classifier_learner
    rows = [('the film good', 'yes') if i % 2 else ('the plot bad', 'no') for i in range(80)]
    df = pd.DataFrame(rows, columns=['text', 'label'])
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', bs=32, valid_pct=0.2, seed=1, num_workers=0)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, cbs=LSUVCallback())
    with learn.no_logging(): report = learn.lsuv_init()
    before,after = report.loss
    assert after < 2*before and report['1.layers.0.2'].status == 'alike'


# --- one sample that carries the statistic

@pytest.mark.parametrize('make', [plain, normed])
@pytest.mark.parametrize('size', [1e2, 1e4])
def test_one_outlier_in_the_mini_batch_is_named_and_changes_no_scale(make, size):
    x,y = data(64)
    x[3] = size
    report = quietly(make(), x, preinit='orthogonal')
    assert statuses(report)[:2] == ['outlier']*2 and [r.gain for r in report][:2] == [1, 1] and report[2].gain < 2


def test_an_outlier_is_left_behind_where_a_fresh_mini_batch_has_none():
    x = torch.randn(64, 16)
    x[3] = 1e4
    report = lsuv_init(plain(), iter([x, torch.randn(64, 16), torch.randn(64, 16)]))
    assert report.ok and all(abs(s - 1) < 0.1 for _, s in report.pairs)


def test_an_outlier_that_comes_back_later_moves_nothing():
    x,ordinary = torch.randn(64, 16),torch.randn(3, 64, 16)
    x[3] = 1e4
    net = plain()
    quietly(net, [x, *ordinary, x])
    with torch.no_grad(): assert all(0.8 < net[:i](ordinary.flatten(0, 1)).std() < 1.2 for i in (1, 3, 5))


@pytest.mark.parametrize('shape', [(64, 16), (16, 16), (4, 16), (2, 16), (1, 16), (8, 5, 16)])
def test_ordinary_samples_are_no_outliers(shape):
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
        assert 'outlier' not in statuses(quietly(net, torch.randn(shape)))


# --- dropout

@pytest.mark.parametrize('drop', [F.dropout, lambda x, p, training: F.dropout(x, p=p, training=training),
                                  lambda x, p, training: torch.dropout(x, p, training)])
def test_functional_dropout_does_not_drop(drop):
    def forward(self, x):
        for layer in self.children(): x = drop(F.relu(layer(x)), 0.5, self.training)
        return x

    net = Mod(forward, a=nn.Linear(16, 256), b=nn.Linear(256, 256), c=nn.Linear(256, 256))
    report = lsuv_init(net, torch.randn(256, 16))
    assert report.n_passes == 2 and [s for _, s in report.pairs] == pytest.approx([1.]*3, abs=1e-3)


# --- gains

def test_gains_are_told_and_large_ones_flagged():
    net = plain()
    with pytest.warns(UserWarning, match=r'LSUV scaled some weights by a lot: 0 by 2.*e\+0[45]. Check') as warned:
        report = lsuv_init(net, 1e-4*torch.randn(256, 16), preinit='orthogonal')
    assert len(warned) == 1 and [r.name for r in report.large_gains] == ['0'] and report.ok
    w = net[0].weight
    assert report[0].gain == pytest.approx((torch.linalg.matrix_norm(w, 2)).item(), rel=1e-4)  # it started orthonormal
    assert 'gain' in report.df() and ' gain ' in str(report)


def test_a_gain_is_relative_to_the_weights_that_were_kept():
    net = plain()
    was = [l.weight.detach().clone() for l in net if isinstance(l, nn.Linear)]
    report = lsuv_init(net, torch.randn(256, 16), preinit=None)
    for r, w in zip(report, was): torch.testing.assert_close(net[int(r.name)].weight.detach(), w*r.gain)


# --- the loss before and after

def test_the_loss_before_and_after_is_that_of_training_with_dropout_on():
    x,y = data()
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 2)).eval()
    modes = []

    def loss(model):
        modes.append([m.training for m in net.modules()])
        return F.cross_entropy(model(x), y)

    torch.manual_seed(5)
    with torch.no_grad(): want = F.cross_entropy(net.train()(x), y).item()
    net.eval()
    torch.manual_seed(5)
    report = lsuv_init(net, x, loss=loss, preinit=None)
    assert report.loss[0] == pytest.approx(want) and set(map(tuple, modes)) == {(True,)*5} and not net.training
    torch.manual_seed(5)
    with torch.no_grad(): assert report.loss[1] == pytest.approx(F.cross_entropy(net.train()(x), y).item(), rel=1e-4)
    assert report[0].std_before is not None and report.n_passes == 4
    assert f'Loss {report.loss[0]:.2f} -> {report.loss[1]:.2f}.' in report.summary


def test_a_model_that_comes_out_far_worse_is_put_back():
    x,y = data()
    net = plain()
    was = weights(net)
    with pytest.warns(UserWarning, match='LSUV put the weights back: the training loss is .*force=True'):
        report = lsuv_init(net, x, loss=lambda model: (model(x) - 0.01*y[:, None]).square().mean())
    assert same(weights(net), was) and set(statuses(report)) == {'undone'} and not report.ok
    assert report.loss[1] > 5*report.loss[0]
    assert report.pairs == [(r.mean_before, r.std_before) for r in report]
    kept = quietly(net, x, loss=lambda model: (model(x) - 0.01*y[:, None]).square().mean(), force=True)
    assert not same(weights(net), was) and kept.ok and kept.loss[1] > 5*kept.loss[0]


def test_a_loss_that_comes_out_non_finite_puts_the_model_back():
    net,x = plain(), torch.randn(64, 16)
    was,calls = weights(net),[]

    def loss(model):
        calls.append(model(x))
        return torch.tensor(1. if len(calls) < 3 else math.nan)

    assert set(statuses(quietly(net, x, loss=loss))) == {'undone'} and same(weights(net), was)


def test_the_callback_proves_the_loss_on_a_mini_batch_it_does_not_begin_with():
    learn = learner(cbs=LSUVCallback())
    learn.fit(1)
    before,after = learn.lsuv.report.loss
    assert 1 < before < 2 and 1 < after < 5
    assert f'Loss {before:.2f} -> {after:.2f}.' in said(learn)[0]
    assert all(r.std_before is not None for r in learn.lsuv.report)


@pytest.mark.parametrize('force', [False, True])
def test_the_callback_puts_a_worse_model_back_in_one_line(force):
    small = [(x, 0.01*torch.randn(4)) for x, _ in images()]
    learn = learner(loaders(small), loss_func=nn.MSELoss(), cbs=LSUVCallback(force=force))
    was = weights(learn.model)
    report = learn.lsuv_init()
    assert same(weights(learn.model), was) == (not force) and len(said(learn)) == 1
    assert ('LSUV put the weights back: the training loss is' in said(learn)[0]) == (not force)
    assert {r.status for r in report} == ({'ok'} if force else {'undone'})


def test_a_loss_that_cannot_be_taken_does_not_stop_the_run():
    def loss_func(pred, y): raise TypeError("it needs more than that")

    learn = learner(loss_func=loss_func, cbs=LSUVCallback())
    report = learn.lsuv_init()
    assert report.ok and report.loss is None and 'it needs more than that' in said(learn)[0]


# --- next to nothing behind a norm layer

def swallowed(scale=1e-6):
    "A network whose head sees a token that the eps of a layer norm swallows."
    return Mod(lambda self, x: self.head(self.norm(scale*self.body(x))), body=nn.Linear(16, 32), norm=nn.LayerNorm(32),
               head=nn.Linear(32, 4))


def test_a_head_behind_a_swallowed_token_keeps_its_start():
    report = quietly(swallowed(), torch.randn(64, 16))
    assert statuses(report) == ['ok', 'faint'] and report['head'].gain == 1


def test_a_small_weight_behind_a_norm_layer_is_scaled_up():
    def small(layer): nn.init.normal_(layer.weight, std=1e-5)

    assert statuses(quietly(swallowed(1.), torch.randn(64, 16), preinit=small)) == ['ok', 'ok']


def test_the_mean_over_space_of_copies_behind_a_batch_norm_is_noise():
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.GELU(), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(32, 4))
    for noise in (0., 1e-4, 1e-3, 1e-2):
        report = quietly(net, torch.randn(1, 3, 12, 12) + noise*torch.randn(32, 3, 12, 12))
        assert report['5'].status == 'alike' and report['5'].gain == 1


# --- weights that a callback writes

def test_what_a_callback_does_to_the_weights_before_a_batch_is_undone_while_lsuv_runs():
    from fastai.basics import Callback

    class Clip(Callback):
        def before_batch(self):
            for p in self.model.parameters(): p.data.clamp_(-0.01, 0.01)

    learn = learner(cbs=[LSUVCallback(), Clip()])
    report = learn.lsuv_init()
    assert report.ok and report.n_passes == 4 and max(w.abs().max() for w in weights(learn.model)) > 0.1


# --- losses without a floor

def test_a_loss_that_is_a_difference_is_not_judged():
    x = torch.randn(64, 16)
    net = plain()
    report = quietly(net, x, loss=lambda model: (model(x[:32]) - model(x[32:])).mean().abs()*1e-3,
                     preinit='orthogonal')
    assert report.ok and report.loss is not None


def test_predicting_zeros_is_named_where_it_is_much_better():
    x = torch.randn(256, 16)
    report = quietly(plain(), x, loss=lambda model: (model(x) - 1e-3).square().mean(), force=True)
    assert 'predicting zeros gives 1e-06' in report.summary
