"The recorder sees weights that no layer applies, under the names that LSUV gives them, and leaves training alone."
import copy
import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fastai.basics import SGD, TrainEvalCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from networks import NETWORKS
from recording import Do, digits, fit, learner, stats64
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from fastai_lsuv import layer_stats
from fastai_lsuv.recorder import ActivationStatsRecorder

still = dict(opt_func=partial(SGD, lr=0.))  # a Learner whose weights stay


def param(*shape): return nn.Parameter(torch.randn(*shape)*0.2)


class Transposed(nn.Module):
    "GPT-2's `Conv1D`."
    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = param(i, o), nn.Parameter(torch.zeros(o))

    def forward(self, x): return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    "Slices of one parameter. Samples go to one of the first three by their number, and to the last never."
    def __init__(self, width):
        super().__init__()
        self.up, self.act = param(4, width, width), nn.ReLU()

    def forward(self, x):
        parts = [self.act(part @ self.up[i]) for i, part in enumerate(x.split((len(x) + 2)//3))]
        return torch.cat(parts)


class Net(nn.Module):
    "A linear layer, a layer of its own kind, experts, attention, dropout, and a weight of its own."
    def __init__(self):
        super().__init__()
        self.own = param(16, 10)
        self.pos_embed = param(8, 8)
        self.stem, self.conv1d, self.experts = nn.Linear(8, 16), Transposed(16, 16), Experts(16)
        self.attn, self.drop = nn.MultiheadAttention(16, 2, batch_first=True), nn.Dropout(0.2)

    def forward(self, x):
        x = self.stem(x[:, 0] + self.pos_embed)
        x = x + self.attn(x, x, x)[0]
        x = self.drop(self.conv1d(x.flatten(0, 1)).relu_())
        return F.linear(self.experts(x).view(-1, 8, 16).mean(1), self.own.t())


OPERATIONS = ['own', 'conv1d.weight', 'experts.up[0]', 'experts.up[1]', 'experts.up[2]', 'experts.up[3]']
EVERY = ['own', 'stem', 'conv1d.weight', *OPERATIONS[2:], 'attn']
PROJECTIONS = [f'attn.in_proj_weight[{c}]' for c in 'qkv']


def fitted(rec, model=Net, n=1, cbs=(), **kwargs): return fit(learner(model, cbs=[rec, *cbs], **kwargs), n)


def modes(): return len(_get_current_function_mode_stack())


# ---- What is recorded

@pytest.mark.parametrize('modules, names', [
    (None, EVERY),
    ('own', ['own']),
    ('experts.up', OPERATIONS[2:]),
    ('experts.up[1]', ['experts.up[1]']),
    ('experts.up*', OPERATIONS[2:]),
    (Transposed, ['conv1d.weight']),
    (lambda m: isinstance(m, Transposed), ['conv1d.weight']),
    ('conv1d', ['conv1d.weight']),
    (Experts, ['experts', *OPERATIONS[2:]]),  # its output is another than that of its operations
    (nn.Linear, ['stem', 'attn.out_proj']),
    (nn.MultiheadAttention, ['attn']),
    ('*in_proj_weight*', PROJECTIONS),
    ('attn.in_proj_weight[k]', PROJECTIONS[1:2]),
    ([nn.Linear, 'own'], ['own', 'stem', 'attn.out_proj']),
])
def test_modules_selects_operations(modules, names):
    if modules is nn.Linear or isinstance(modules, list):
        names = [n if n != 'attn.out_proj' else 'attn' for n in names]  # whoever selects it means the attention
    rec = ActivationStatsRecorder(modules)
    fitted(rec)
    assert rec.names == names
    assert list(rec.df().layer.unique()) == names and len(rec.df()) == 6*len(names)
    idle = rec.df().set_index('layer')['std'].isna().groupby(level=0).all()
    assert set(idle[idle].index) == {'experts.up[3]'} & set(names)


def test_the_numbers_are_those_of_layer_stats():
    rec = ActivationStatsRecorder([nn.Linear, Transposed, Experts, nn.MultiheadAttention, 'own', 'attn.*'], hist=True,
                                  grads=True)
    seen, model = [], Net()
    model.drop.p = 0.

    def look(learn):
        if learn.training and not seen: seen.append(layer_stats(copy.deepcopy(learn.model), learn.xb[0]))
    fitted(rec, model, cbs=[Do(order=-40, before_batch=look)])
    first = rec.df().query('step == 0').set_index('layer')
    names = [r.name for r in seen[0] if r.status != 'not called']
    assert {*PROJECTIONS, *OPERATIONS[:5], 'stem', 'attn'} == set(names)
    for name in names:
        row = seen[0][name]
        assert (first['mean'][name], first['std'][name]) == pytest.approx((row.mean, row.std), rel=1e-4, abs=1e-6)
        assert rec.hist(name).shape == (80, 6) and rec.hist(name)[:, 0].expm1().sum() == pytest.approx(
            np.prod(row.shape), rel=1e-3)
    assert first['near_zero']['own'] > 0.3 and first['grad_std']['own'] > 0
    assert first['grad_std'][PROJECTIONS].isna().all()  # they are computed beside the model


@pytest.mark.parametrize('name', ['transformers/gpt2', 'transformers/mixtral', 'transformers/mixtral_eager',
                                  'transformers/gpt_oss', 'torch_geometric/gat', 'torchvision/swin',
                                  'timm/beit_base_patch16_224', 'hand/one_weight_twice', 'hand/tied_pair',
                                  'hand/experts'])
def test_every_layer_of_the_report_is_recorded_under_its_name(name):
    pytest.importorskip(name.split('/')[0].replace('hand', 'torch'))
    model, batch = NETWORKS[name]()
    report = layer_stats(copy.deepcopy(model), batch)
    inputs = list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, tuple) else [batch]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.m, self.one = model, nn.Parameter(torch.ones(1))

        def forward(self, x):
            out = self.m(**batch) if isinstance(batch, dict) else self.m(*inputs)
            out = out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else out['logits']
            return (out.double().mean()*self.one).float().expand(len(x), 10)
    rec = ActivationStatsRecorder()
    for m in model.modules():
        if hasattr(m, 'p'): m.p = 0.
    fit(learner(Outer(), cbs=rec, dls=digits(48), **still))
    stats = rec.df().query('step == 2').set_index('layer')
    wanted = {f'm.{r.name}': r for r in report if 'in_proj_weight' not in r.name}
    assert set(rec.names) >= set(wanted)
    for n, r in wanted.items():
        if r.status == 'not called': assert np.isnan(stats['std'][n])
        else: assert stats['std'][n] == pytest.approx(r.std, rel=0.02), n


def test_a_weight_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = param(64, 64)

        def forward(self, x):
            outs.append(F.linear(x.flatten(1), self.w))
            outs.append(outs[-1].detach().requires_grad_() @ self.w.t())
            if self.training: outs[-2].retain_grad(), outs[-1].retain_grad()
            return (outs[-2] + 2*outs[-1])[:, :10]
    outs = []
    rec = ActivationStatsRecorder('w', grads=True)
    learn = fitted(rec, Twice, dls=digits(16), **still)
    both = torch.cat([o.detach().flatten() for o in outs[:2]])
    assert rec.names == ['w'] and rec.pairs[0] == pytest.approx(stats64(both)[:2], rel=1e-4)
    grads = torch.cat([o.grad.flatten() for o in outs[:2]])
    assert rec.df()['grad_std'][0] == pytest.approx(grads.std().item(), rel=1e-4) and learn.model.w.grad is not None


def test_validation_is_recorded_too():
    rec = ActivationStatsRecorder(valid=True)
    outs = []

    def keep(m, args, out): outs.append(out.detach().clone()) if not m.training else None
    model = Net()
    model.conv1d.register_forward_hook(keep)
    fitted(rec, model)
    (mean,), (std,), _ = rec.layer_stats('conv1d.weight', 'valid')
    assert (mean, std) == pytest.approx(stats64(torch.cat(outs))[:2], rel=1e-4)
    valid = rec.df().query("phase == 'valid'")
    assert list(valid.layer) == EVERY and valid.set_index('layer')['std'].drop('experts.up[3]').notna().all()


# ---- Errors

@pytest.mark.parametrize('modules, match', [
    ('experts.down', "modules: no module of Net matches 'experts.down'; .*weights that no layer applies: 'own'"),
    ('experts.up[7]', r"modules: no linear operation of the first step took 'experts.up\[7\]'; .*'experts.up\[0\]'"),
    (['own', 'pos_embed'], "modules: no linear operation of the first step took 'pos_embed'; .*'own'"),
])
def test_a_name_that_matches_nothing(modules, match):
    learn = learner(Net, cbs=ActivationStatsRecorder(modules))
    with pytest.raises(ValueError, match=match): fit(learn)
    assert modes() == 0 and 'forward' not in vars(learn.model)
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_a_model_that_applies_no_weight():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(100, 10)

        def forward(self, x): return self.emb(x.flatten(1).abs().long()).mean(1)
    with pytest.raises(ValueError, match='has no conv, linear, attention or recurrent layer, and applies no weight'):
        fitted(ActivationStatsRecorder(), Looks)


# ---- Training is left alone

def trained(*cbs, how=lambda m: m, n=2, model=Net):
    "Losses, weights and random numbers of a fit."
    learn, losses = learner(model, cbs=list(cbs)), []
    learn.model = how(learn.model)
    learn.add_cb(Do(after_loss=lambda l: losses.append(l.loss.item())))
    fit(learn, n)
    return losses, torch.cat([p.detach().flatten() for p in learn.model.parameters()]), torch.get_rng_state()


def same(a, b):
    assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


class Half(MixedPrecision):
    "Mixed precision on the CPU, where no loss needs to be scaled."
    def before_fit(self): self.scaler, self.autocast = torch.amp.GradScaler('cpu', enabled=False), None
    def before_batch(self):
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.autocast.__exit__(None, None, None)
    def after_fit(self): pass
    def before_step(self): pass
    def after_step(self): pass
    def before_backward(self): pass


class Checkpointed(Net):
    def forward(self, x):
        x = x[:, 0] + self.pos_embed
        def inner(x): return self.conv1d(self.attn(*[self.stem(x)]*3)[0].flatten(0, 1)).relu()
        x = checkpoint(inner, x.requires_grad_() if x.is_leaf else x, use_reentrant=self.reentrant)
        return self.experts(self.drop(x)).view(-1, 8, 16).mean(1) @ self.own
    reentrant = False


class Reentrant(Checkpointed):
    reentrant = True


every = dict(modules=[nn.Linear, 'own', Transposed, Experts, 'attn.*'], hist=True, grads=True)


@pytest.mark.parametrize('kw', [{}, every, dict(every, every=2, sample=2)], ids=['default', 'everything', 'sparse'])
@pytest.mark.parametrize('model', [Net, Checkpointed, Reentrant])
def test_losses_weights_and_random_numbers_are_the_same_to_the_bit(kw, model):
    same(trained(model=model), trained(ActivationStatsRecorder(**kw), model=model))


@pytest.mark.parametrize('cbs', [lambda: [Half()], lambda: [GradientAccumulation(32)],
                                 lambda: [Half(), GradientAccumulation(32)]])
@pytest.mark.parametrize('kw', [{}, every], ids=['default', 'everything'])
def test_mixed_precision_and_accumulated_gradients(kw, cbs):
    same(trained(*cbs()), trained(ActivationStatsRecorder(**kw), *cbs()))


@pytest.mark.parametrize('model', [Checkpointed, Reentrant])
def test_a_forward_that_backward_runs_again_is_not_recorded(model):
    plain, again = ActivationStatsRecorder(hist=True), ActivationStatsRecorder(hist=True)

    class Plain(model):
        def forward(self, x):
            with pytest.MonkeyPatch.context() as m:
                m.setitem(globals(), 'checkpoint', lambda f, x, use_reentrant: f(x))
                return super().forward(x)
    fitted(plain, Plain), fitted(again, model)
    pd.testing.assert_frame_equal(plain.df(), again.df())
    assert torch.equal(plain.hist('conv1d.weight'), again.hist('conv1d.weight'))


def compiled(m): return torch.compile(m, backend='eager')


def compiled_in_place(m):
    m.compile(backend='eager')
    return m


def compiled_in_part(m):
    m.experts, m.conv1d = compiled(m.experts), compiled(m.conv1d)
    return m


@pytest.mark.parametrize('how', [compiled, compiled_in_place, compiled_in_part])
def test_compiled_models(how):
    torch.compiler.reset()
    plain, rec = (ActivationStatsRecorder(hist=True, grads=True, valid=True) for _ in range(2))
    a, b = trained(plain, n=1), trained(rec, how=how, n=1)
    assert a[0] == b[0] and torch.equal(a[1].sort()[0], b[1].sort()[0])
    assert rec.names == plain.names == EVERY
    got, want = (r.df().query('step >= 1').reset_index(drop=True) for r in (rec, plain))
    pd.testing.assert_frame_equal(got, want, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path/'store'), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('kw', [{}, every], ids=['default', 'everything'])
def test_distributed_data_parallel(one_rank, kw):
    rec = ActivationStatsRecorder(**kw)
    alone = ActivationStatsRecorder(**kw)
    same(trained(how=nn.parallel.DistributedDataParallel), trained(rec, how=nn.parallel.DistributedDataParallel))
    trained(alone)
    pd.testing.assert_frame_equal(rec.df(), alone.df())


# ---- What is left behind

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_exception_in_the_model(error):
    class Fails(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            out = super().forward(x)
            if self.calls == 3: raise error('now')
            return out
    rec = ActivationStatsRecorder()
    learn = learner(Fails, cbs=rec)
    with pytest.raises(error, match='now'): fit(learn)
    assert modes() == 0 and 'forward' not in vars(learn.model)
    recording = rec._recording
    n = len(recording.hooks.calls['own'])
    learn.model(torch.randn(4, 1, 8, 8))
    assert len(recording.hooks.calls['own']) == n
    fit(learn)
    assert rec.names == EVERY and len(rec.df()) == 6*len(EVERY)


def test_copies_made_during_a_forward_record_nothing_and_run():
    copies = []

    class Copies(Net):
        def forward(self, x):
            if not copies: copies.extend([copy.deepcopy(self), pickle.loads(pickle.dumps(self))])
            return super().forward(x)
    globals()['Copies'], Copies.__qualname__ = Copies, 'Copies'
    rec = ActivationStatsRecorder()
    learn = fitted(rec, Copies)
    for c in copies:
        c.own.data.zero_()
        assert (c.eval()(torch.randn(3, 1, 8, 8)) == 0).all() and (learn.model.own != 0).any()


def test_a_model_without_such_weights_is_not_watched():
    watched = []
    fit(learner(cbs=[ActivationStatsRecorder(), Do(before_batch=lambda l: watched.append('forward' in vars(l.model)))]))
    assert watched and not any(watched)

    class Embeds(nn.Module):  # a weight that no operation takes is looked for in the first step alone
        def __init__(self):
            super().__init__()
            self.pos_embed, self.lin = param(1, 64), nn.Linear(64, 10)

        def forward(self, x):
            watched.append(modes())
            return self.lin(x.flatten(1) + self.pos_embed)
    watched.clear()
    fit(learner(Embeds, cbs=[ActivationStatsRecorder(), TrainEvalCallback()], default_cbs=False))
    assert watched == [1, *[0]*(len(watched) - 1)]


# ---- Several fits

def test_layers_that_their_parent_applies_are_recorded_from_the_second_step_on():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x): return self.b(F.linear(x.flatten(1), self.a.weight, self.a.bias).relu())
    rec = ActivationStatsRecorder(hist=(8, -1., 1.))
    fitted(rec, Parent)
    table = rec.df().pivot(index='step', columns='layer', values='std').notna()
    assert rec.names == ['a', 'b'] and table.sum().tolist() == [5, 6] and not table['a'][0]
