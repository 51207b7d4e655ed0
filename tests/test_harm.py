"A model is never left worse than it was, and the report does not say `ok` when it is."
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from checked import quietly, samples
from fastai.basics import Callback
from learners import images, learner, loaders, said, same, weights
from networks import Mod
from torch import nn

from fastai_lsuv import LSUVCallback, lsuv_init


def statuses(report): return [r.status for r in report]
def gains(report): return [r.gain for r in report]


def plain(): return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def normed():
    first,act,second,_,last = plain()
    return nn.Sequential(first, nn.BatchNorm1d(64), act, second, nn.BatchNorm1d(64), nn.ReLU(), last)


def data(n=256):
    x = torch.randn(n, 16)
    return x, (x[:, 0] > 0).long()


def copies(noise, *shape): return torch.randn(1, *shape) + noise*torch.randn(64, *shape)


def swallowed(scale=1e-6):
    "A network whose head sees a token that the eps of a layer norm swallows."
    return Mod(lambda self, x: self.head(self.norm(scale*self.body(x))), body=nn.Linear(16, 32), norm=nn.LayerNorm(32),
               head=nn.Linear(32, 4))


def shrunk(): return nn.Sequential(nn.Linear(16, 64), Mod(lambda self, x: x*1e-3), *normed()[1:3], nn.Linear(64, 2))


def instance_normed():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8),
                         nn.ReLU(), nn.Conv2d(8, 4, 3))


def pooled():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.GELU(), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(32, 4))


def small(layer): nn.init.normal_(layer.weight, std=1e-5)


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


@pytest.mark.parametrize('make, x, options, want', [
    pytest.param(normed, lambda: copies(1e-2, 16), {}, ['ok']*3, id='samples that differ a little'),
    pytest.param(shrunk, samples, {}, ['ok']*2, id='small activations that differ'),
    pytest.param(swallowed, samples, {}, ['ok', 'faint'], id='a head behind a swallowed token'),
    pytest.param(lambda: swallowed(1.), samples, dict(preinit=small), ['ok']*2, id='a small weight behind a norm'),
    *(pytest.param(pooled, lambda e=e: copies(e, 3, 12, 12), {}, ['ok', 'alike'], id=f'mean over space of copies, {e}')
      for e in (0., 1e-4, 1e-3, 1e-2)),
    pytest.param(instance_normed, lambda: copies(0, 3, 1, 1).expand(64, 3, 16, 16), dict(preinit='orthogonal'),
                 ['ok', 'alike', 'alike'], id='constant images behind an instance norm')])
def test_only_what_is_alike_or_faint_is_kept_back(make, x, options, want):
    report = quietly(make(), x(), **options)
    assert statuses(report) == want and all(r.gain == 1 for r in report if r.status != 'ok')


def test_without_a_norm_layer_alike_samples_are_measured_where_there_are_features_enough():
    report = quietly(plain(), copies(1e-3, 16))
    assert statuses(report)[:2] == ['ok', 'ok']
    # the std of two numbers is chance
    assert report[2].status == 'alike' if report[2].gain == 1 else report[2].gain <= 2


def test_further_mini_batches_are_joined_where_the_samples_of_one_are_alike():
    a,b = copies(0, 16),copies(0, 16)
    report = quietly(normed(), [a, b, samples()], preinit='orthogonal')
    assert report.ok and 1 < report['3'].gain < 2
    assert statuses(quietly(normed(), [a]*3)) == ['ok', 'alike', 'alike']


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

def with_outlier(size=1e4):
    x = samples()
    x[3] = size
    return x


@pytest.mark.parametrize('make', [plain, normed])
@pytest.mark.parametrize('size', [1e2, 1e4])
def test_one_outlier_in_the_mini_batch_is_named_and_changes_no_scale(make, size):
    report = quietly(make(), with_outlier(size), preinit='orthogonal')
    assert statuses(report)[:2] == ['outlier']*2 and gains(report)[:2] == [1, 1] and report[2].gain < 2


def test_an_outlier_is_left_behind_where_a_fresh_mini_batch_has_none():
    report = lsuv_init(plain(), iter([with_outlier(), samples(), samples()]))
    assert report.ok and all(abs(s - 1) < 0.1 for _, s in report.pairs)


def test_an_outlier_that_comes_back_later_moves_nothing():
    x,ordinary,net = with_outlier(),torch.randn(3, 64, 16),plain()
    quietly(net, [x, *ordinary, x])
    with torch.no_grad(): assert all(0.8 < net[:i](ordinary.flatten(0, 1)).std() < 1.2 for i in (1, 3, 5))


@pytest.mark.parametrize('shape', [(64, 16), (16, 16), (4, 16), (2, 16), (1, 16), (8, 5, 16)])
def test_ordinary_samples_are_no_outliers(shape):
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
        assert 'outlier' not in statuses(quietly(net, torch.randn(shape)))


# --- gains

def test_gains_are_told_and_large_ones_flagged():
    net = plain()
    with pytest.warns(UserWarning, match=r'LSUV scaled some weights by a lot: 0 by 2.*e\+0[45]. Check') as warned:
        report = lsuv_init(net, 1e-4*samples(256), preinit='orthogonal')
    assert len(warned) == 1 and [r.name for r in report.large_gains] == ['0'] and report.ok
    w = net[0].weight
    assert report[0].gain == pytest.approx((torch.linalg.matrix_norm(w, 2)).item(), rel=1e-4)  # it started orthonormal
    assert 'gain' in report.df() and ' gain ' in str(report)


def test_a_gain_is_relative_to_the_weights_that_were_kept():
    net = plain()
    was = weights(net)[::2]
    report = lsuv_init(net, samples(256), preinit=None)
    for now, w, gain in zip(weights(net)[::2], was, gains(report)): torch.testing.assert_close(now, w*gain)


# --- the loss before and after

def test_the_loss_before_and_after_is_that_of_training_with_dropout_on():
    x,y = data()
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 2))
    @torch.no_grad()
    def in_training():
        torch.manual_seed(5)
        return F.cross_entropy(net.train()(x), y).item()
    was = in_training()
    torch.manual_seed(5)
    report = lsuv_init(net.eval(), x, loss=lambda model: F.cross_entropy(model(x), y), preinit=None)
    assert not net.training and report.loss == pytest.approx((was, in_training()), rel=1e-4)
    assert report[0].std_before is not None and report.n_passes == 4
    assert f'Loss {report.loss[0]:.2f} -> {report.loss[1]:.2f}.' in report.summary


def test_a_model_that_comes_out_far_worse_is_put_back():
    x,y = data()
    net = plain()
    def loss(model): return (model(x) - 0.01*y[:, None]).square().mean()
    was = weights(net)
    with pytest.warns(UserWarning, match='LSUV put the weights back: the training loss is .*force=True'):
        report = lsuv_init(net, x, loss=loss)
    assert same(weights(net), was) and set(statuses(report)) == {'undone'} and not report.ok
    assert report.loss[1] > 5*report.loss[0]
    assert report.pairs == [(r.mean_before, r.std_before) for r in report]
    kept = quietly(net, x, loss=loss, force=True)
    assert not same(weights(net), was) and kept.ok and kept.loss[1] > 5*kept.loss[0]


def test_the_callback_proves_the_loss_on_a_mini_batch_it_does_not_begin_with():
    learn = learner(cbs=LSUVCallback())
    learn.fit(1)
    before,after = learn.lsuv.report.loss
    assert 1 < before < 2 and 1 < after < 5
    assert f'Loss {before:.2f} -> {after:.2f}.' in said(learn)[0]
    assert all(r.std_before is not None for r in learn.lsuv.report)


@pytest.mark.parametrize('force', [False, True])
def test_the_callback_puts_a_worse_model_back_in_one_line(force):
    dls = loaders([(x, 0.01*torch.randn(4)) for x, _ in images()])
    learn = learner(dls, loss_func=nn.MSELoss(), cbs=LSUVCallback(force=force))
    was = weights(learn.model)
    report = learn.lsuv_init()
    assert same(weights(learn.model), was) == (not force) and len(said(learn)) == 1
    assert ('LSUV put the weights back: the training loss is' in said(learn)[0]) == (not force)
    assert set(statuses(report)) == ({'ok'} if force else {'undone'})


def test_a_loss_that_cannot_be_taken_does_not_stop_the_run():
    def loss_func(pred, y): raise TypeError("it needs more than that")
    learn = learner(loss_func=loss_func, cbs=LSUVCallback())
    report = learn.lsuv_init()
    assert report.ok and report.loss is None and 'it needs more than that' in said(learn)[0]


def test_a_loss_that_is_a_difference_has_no_floor_and_is_not_judged():
    x = samples()
    report = quietly(plain(), x, loss=lambda model: (model(x[:32]) - model(x[32:])).mean().abs()*1e-3,
                     preinit='orthogonal')
    assert report.ok and report.loss is not None


# --- weights that a callback writes

def test_what_a_callback_does_to_the_weights_before_a_batch_is_undone_while_lsuv_runs():
    class Clip(Callback):
        def before_batch(self):
            for p in self.model.parameters(): p.data.clamp_(-0.01, 0.01)

    learn = learner(cbs=[LSUVCallback(), Clip()])
    report = learn.lsuv_init()
    assert report.ok and report.n_passes == 4 and max(w.abs().max() for w in weights(learn.model)) > 0.1
