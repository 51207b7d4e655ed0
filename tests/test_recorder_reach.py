"What a recorder sees by default: norm layers, and layers inside checkpointed blocks and `torch.func` transforms."
import pytest
import torch
from fastai.basics import Callback
from fastai.vision.all import xresnet18
from functools import partial
from recording import Do, convnet, digits, fit, learner, mlp, stats64
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastai_lsuv.recorder import ActivationStatsRecorder
from fastai_lsuv.recorder.layers import label_of


def fitted(model, n=1, cbs=(), **kwargs):
    rec = ActivationStatsRecorder(**kwargs)
    fit(learner(model, cbs=[rec, *cbs]), n)
    return rec


def problems(rec): return [(f.layer, f.problem) for f in rec.diagnose()]


# ---- Norm layers

class OwnRMSNorm(nn.Module):
    "A norm layer of the user's own, as `LlamaRMSNorm` is."
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))

    def forward(self, x): return x*self.scale/x.square().mean(1, keepdim=True).add(1e-6).sqrt()


NORMS = {'BatchNorm2d': nn.BatchNorm2d, 'GroupNorm': partial(nn.GroupNorm, 2), 'InstanceNorm2d': nn.InstanceNorm2d,
         'LayerNorm': lambda n: nn.LayerNorm([n, 4, 4]), 'RMSNorm': lambda n: nn.RMSNorm([n, 4, 4])}


@pytest.mark.parametrize('kind', NORMS)
def test_norm_layers_are_recorded(kind):
    model, outs = convnet(inplace=False, norm=NORMS[kind]), []
    model[3].register_forward_hook(lambda m, a, o: outs.append(o.detach()))
    rec = fitted(model)
    assert rec.names == ['0', '2', '3', '7']
    assert rec.pairs[2] == pytest.approx(stats64(outs[5])[:2], rel=1e-5, abs=1e-6)
    assert label_of('3', model[3]).startswith(f'3 {kind}')


def test_norm_layers_of_the_user_are_recorded_and_weight_norm_is_none():
    lin = parametrizations.weight_norm(nn.Linear(64, 16))
    rec = fitted(nn.Sequential(nn.Flatten(), lin, OwnRMSNorm(16), nn.ReLU(), nn.Linear(16, 10)))
    assert rec.names == ['1', '2', '4'] and rec.df()['std'].notna().all()
    assert label_of('1', nn.BatchNorm2d(16)) == '1 BatchNorm2d 16' and label_of('', nn.LayerNorm(8)) == 'LayerNorm 8'


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, partial(nn.GroupNorm, 2)])
def test_what_is_dead_behind_its_norm_is_named_first(norm):
    model = convnet(norm=norm)
    model.append(nn.Identity())
    nn.init.constant_(model[3].bias, -90.)
    rec = fitted(model)
    assert problems(rec) == [('3', 'is mostly dead')]
    assert 'dead share up to 1' in str(rec.diagnose()[0])


class Backwards(nn.Module):
    "The layer that runs second is registered first."
    def __init__(self):
        super().__init__()
        self.mid, self.dead, self.head = nn.Linear(16, 16, bias=False), nn.Linear(64, 16), nn.Linear(16, 10)
        nn.init.constant_(self.dead.bias, -90.)

    def forward(self, x): return self.head(self.mid(self.dead(x.flatten(1)).relu()))


def test_findings_come_in_the_order_of_execution_and_zeros_are_dead():
    rec = fitted(Backwards)
    assert rec.names == ['mid', 'dead', 'head']
    assert problems(rec) == [('dead', 'is mostly dead'), ('mid', 'is mostly dead')]
    assert rec.df().query("layer == 'mid'")['std'].eq(0).all()


def test_residual_branches_whose_norm_starts_at_zero_are_healthy():
    model = xresnet18(n_out=10, c_in=1)
    zero = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()]
    rec = ActivationStatsRecorder()
    fit(learner(model, cbs=rec, dls=digits(32, shape=(1, 8, 8)), lr=1e-3), 2)
    assert len(zero) == 8 and set(zero) < set(rec.names)
    assert not {f.layer for f in rec.diagnose()} & set(zero)
    silent = mlp()
    silent.insert(2, nn.BatchNorm1d(32, affine=True))
    nn.init.zeros_(silent[2].weight)
    silent[2].requires_grad_(False)
    assert ('2', 'is mostly dead') in problems(fitted(silent))  # its weight stays 0


def test_layers_that_no_record_shows_are_named():
    class Idle(Backwards):
        def forward(self, x): return self.head(self.dead(x.flatten(1)))
    d = fitted(Idle).diagnose()
    assert d.unseen == ['mid'] and repr(d).splitlines()[-1] == 'No record shows 1 layer: mid.'
    assert fitted(mlp).diagnose().unseen == []


# ---- Checkpointed blocks

class Block(nn.Module):
    "A weight that no layer applies and a learnable temperature, some of it in a checkpointed block."
    options = dict(use_reentrant=False)

    def __init__(self):
        super().__init__()
        self.w, self.lin, self.norm = nn.Parameter(torch.randn(64, 16)*.1), nn.Linear(16, 10), nn.BatchNorm1d(16)
        self.t, self.m = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(16, 16)*.1)

    def block(self, x): return self.lin(self.norm(x) @ (self.m*self.t) / self.t)/self.t

    def forward(self, x): return checkpoint(self.block, x.flatten(1) @ self.w, **self.options)


def policy(ctx, op, *args, **kwargs):
    aten = torch.ops.aten
    saved = aten.mm.default, aten.addmm.default, aten.sum.default, aten.dot.default, aten.std_mean.correction
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


class Selective(Block):
    options = dict(use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))


class Reentrant(Block):
    options = dict(use_reentrant=True)


def trained(model, *cbs):
    losses, learn = [], learner(model, cbs=list(cbs))
    learn.add_cb(Do(after_loss=lambda l: losses.append(l.loss.item())))
    fit(learn, 2)
    return losses, torch.cat([p.detach().flatten() for p in learn.model.parameters()]), torch.get_rng_state()


@pytest.mark.parametrize('kw', [{}, dict(hist=True, grads=True)], ids=['default', 'everything'])
@pytest.mark.parametrize('model', [Block, Selective, Reentrant])
def test_checkpointed_models_train_the_same_to_the_bit(model, kw):
    rec = ActivationStatsRecorder(**kw)
    (losses, weights, state), (again, weights_again, state_again) = trained(model), trained(model, rec)
    assert losses == again and torch.equal(weights, weights_again) and torch.equal(state, state_again)
    assert {'w', 'lin', 'norm'} <= set(rec.names) and rec.df()['std'].notna().all()


# ---- Transforms

class Transformed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.head, self.how = nn.Linear(64, 16), nn.Linear(16, 1), nn.Linear(64, 10), how

    def net(self, x):
        return self.b(self.a(x).tanh()).sum()

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x) + self.how(self.net, x)


HOW = {'vmap': lambda net, x: torch.func.vmap(net)(x)[:, None],
       'grad': lambda net, x: torch.func.grad(net)(x)[:, :10],
       'jvp': lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
       'vmap of grad': lambda net, x: torch.func.vmap(torch.func.grad(net))(x)[:, :10]}


@pytest.mark.parametrize('how', HOW)
def test_layers_inside_transforms_are_measured(how):
    inputs = []
    plain, alone = trained(partial(Transformed, HOW[how])), None
    rec = ActivationStatsRecorder(hist=True, grads=True)

    class Keep(Callback):
        def before_batch(self): inputs.append((self.x.flatten(1), self.learn.model.a.weight.detach().clone(),
                                               self.learn.model.a.bias.detach().clone()))
    alone = trained(partial(Transformed, HOW[how]), rec, Keep())
    assert plain[0] == alone[0] and torch.equal(plain[1], alone[1])
    x, w, b = inputs[0]
    first = rec.df().query('step == 0').set_index('layer')
    assert (first['mean']['a'], first['std']['a']) == pytest.approx(stats64(x @ w.T + b)[:2], rel=1e-4, abs=1e-6)
    assert rec.hist('a')[:, 0].expm1().sum() == pytest.approx(16*16) and first['grad_std'].notna()['head']


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.ms = nn.ModuleList(nn.Linear(64, 10) for _ in range(3))

    def forward(self, x):
        params, buffers = torch.func.stack_module_state(list(self.ms))
        def one(p, b, x): return torch.func.functional_call(self.ms[0], (p, b), (x,))
        return torch.func.vmap(one, in_dims=(0, 0, None))(params, buffers, x.flatten(1)).mean(0)


def test_layers_that_one_stands_for_are_named():
    rec = fitted(Ensemble)
    assert rec.df().set_index('layer')['std'].notna().groupby(level=0).all().to_dict() == {
        'ms.0': True, 'ms.1': False, 'ms.2': False}
    assert rec.diagnose().unseen == ['ms.1', 'ms.2']


# ---- Keywords

@pytest.mark.parametrize('wrong,meant', [('with_hist', 'hist'), ('grad', 'grads'), ('max_step', 'max_steps')])
def test_a_wrong_keyword_is_answered_with_the_nearest(wrong, meant):
    says = f"{wrong}: ActivationStatsRecorder has no such argument; did you mean '{meant}'"
    with pytest.raises(TypeError, match=says):
        ActivationStatsRecorder(**{wrong: True})


def test_a_keyword_like_no_other_is_refused():
    with pytest.raises(TypeError, match="xyzzy: ActivationStatsRecorder has no such argument; it takes modules"):
        ActivationStatsRecorder(xyzzy=1)
