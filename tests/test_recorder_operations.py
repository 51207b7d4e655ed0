"The recorder sees weights that no layer applies, under the names that LSUV gives them."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from recording import (EVERY, OPERATIONS, Do, Experts, Made, Net, Transposed, at_step, convnet, digits, fit, hooks_on,
                       learner, param, recorded, stats64)
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from fastai_lsuv import layer_stats
from fastai_lsuv.recorder import ActivationStatsRecorder

PROJECTIONS = [f'attn.in_proj_weight[{c}]' for c in 'qkv']


@pytest.mark.parametrize('model, modules, names', [
    (convnet, nn.Conv2d, ['0', '2']),
    (convnet, '7', ['7']),
    (convnet, ['2', nn.Linear], ['2', '7']),
    (convnet, lambda m: isinstance(m, nn.ReLU), ['1', '4']),
    (Net, None, EVERY),
    (Net, 'own', ['own']),
    (Net, 'experts.up', OPERATIONS[2:]),
    (Net, 'experts.up[1]', ['experts.up[1]']),
    (Net, 'experts.up*', OPERATIONS[2:]),
    (Net, Transposed, ['conv1d.weight']),
    (Net, lambda m: isinstance(m, Transposed), ['conv1d.weight']),
    (Net, 'conv1d', ['conv1d.weight']),
    (Net, Experts, ['experts', *OPERATIONS[2:]]),  # its output is another than that of its operations
    (Net, nn.Linear, ['stem', 'attn']),  # whoever selects the projection of an attention means the attention
    (Net, nn.MultiheadAttention, ['attn']),
    (Net, '*in_proj_weight*', PROJECTIONS),
    (Net, 'attn.in_proj_weight[k]', PROJECTIONS[1:2]),
    (Net, [nn.Linear, 'own'], ['own', 'stem', 'attn']),
])
def test_modules_selects_layers_and_operations(model, modules, names):
    rec = recorded(model, modules=modules)
    assert rec.names == names
    assert list(rec.df().layer.unique()) == names and len(rec.df()) == 6*len(names)
    idle = rec.df().set_index('layer')['std'].isna().groupby(level=0).all()
    assert set(idle[idle].index) == {'experts.up[3]'} & set(names)


def test_the_numbers_are_those_of_layer_stats():
    seen,model = [],Net()
    model.drop.p = 0.

    def look(learn):
        if learn.training and not seen: seen.append(layer_stats(copy.deepcopy(learn.model), learn.xb[0]))
    modules = [nn.Linear, Transposed, Experts, nn.MultiheadAttention, 'own', 'attn.*']
    rec = recorded(model, cbs=[Do(order=-40, before_batch=look)], modules=modules, hist=True, grads=True)
    first,rows = at_step(rec, 0),[r for r in seen[0] if r.status != 'not called']
    assert {r.name for r in rows} == {*PROJECTIONS, *OPERATIONS[:5], 'stem', 'attn'}
    for r in rows:
        assert (first['mean'][r.name], first['std'][r.name]) == pytest.approx((r.mean, r.std), rel=1e-4, abs=1e-6)
        assert rec.hist(r.name)[:, 0].expm1().sum() == pytest.approx(np.prod(r.shape), rel=1e-3)
    assert first['near_zero']['own'] > 0.3 and first['grad_std']['own'] > 0
    assert first['grad_std'][PROJECTIONS].isna().all()  # they are computed beside the model


class Outer(nn.Module):
    "A network that sees one mini-batch, whatever the Learner feeds."
    def __init__(self, m, batch):
        super().__init__()
        self.m,self.one = m,nn.Parameter(torch.ones(1))
        self.kwargs = batch if isinstance(batch, dict) else {}
        self.args = () if self.kwargs else batch if isinstance(batch, tuple) else (batch,)

    def forward(self, x):
        out = self.m(*self.args, **self.kwargs)
        out = out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else out['logits']
        return (out.double().mean()*self.one).float().expand(len(x), 10)


@pytest.mark.parametrize('name', ['transformers/gpt2', 'transformers/mixtral', 'transformers/mixtral_eager',
                                  'transformers/gpt_oss', 'torch_geometric/gat', 'torchvision/swin',
                                  'timm/beit_base_patch16_224', 'hand/one_weight_twice', 'hand/tied_pair',
                                  'hand/experts'])
def test_every_layer_of_the_report_is_recorded_under_its_name(name):
    pytest.importorskip(name.split('/')[0].replace('hand', 'torch'))
    model,batch = NETWORKS[name]()
    report = layer_stats(copy.deepcopy(model), batch)
    for m in model.modules():
        if hasattr(m, 'p'): m.p = 0.
    rec = recorded(Outer(model, batch), dls=digits(48), lr=0.)
    stats,wanted = at_step(rec, 2)['std'],{f'm.{r.name}': r for r in report if 'in_proj_weight' not in r.name}
    assert set(rec.names) >= set(wanted)
    for n, r in wanted.items():
        if r.status == 'not called': assert np.isnan(stats[n])
        else: assert stats[n] == pytest.approx(r.std, rel=0.02), n


def test_the_uses_of_a_weight_are_pooled_and_so_are_their_gradients():
    outs = []

    def twice(m, x):
        outs.append(F.linear(x.flatten(1), m.w))
        outs.append(outs[-1].detach().requires_grad_() @ m.w.t())
        if m.training: outs[-2].retain_grad(), outs[-1].retain_grad()
        return (outs[-2] + 2*outs[-1])[:, :10]
    rec = recorded(Made(twice, w=param(64, 64)), dls=digits(16), lr=0., modules='w', grads=True)
    both,grads = (torch.cat([t.detach().flatten() for t in ts]) for ts in (outs[:2], [o.grad for o in outs[:2]]))
    assert rec.names == ['w'] and rec.pairs[0] == pytest.approx(stats64(both)[:2], rel=1e-4)
    assert rec.df()['grad_std'][0] == pytest.approx(grads.std().item(), rel=1e-4)


def test_layers_that_their_parent_applies_are_recorded_from_the_second_step_on():
    model = Made(lambda m, x: m.b(F.linear(x.flatten(1), m.a.weight, m.a.bias).relu()), a=nn.Linear(64, 32),
                 b=nn.Linear(32, 10))
    rec = recorded(model, hist=(8, -1., 1.))
    table = rec.df().pivot(index='step', columns='layer', values='std').notna()
    assert rec.names == ['a', 'b'] and table.sum().tolist() == [5, 6] and not table['a'][0]


def modes(): return len(_get_current_function_mode_stack())


LOOKS_UP = Made(lambda m, x: m.emb(x.flatten(1).abs().long()).mean(1), emb=nn.Embedding(100, 10))


@pytest.mark.parametrize('model, modules, match', [
    (LOOKS_UP, None, 'has no conv, linear, attention or recurrent layer, and applies no weight'),
    (Net, 'experts.down', "modules: no module of Net matches 'experts.down'; .*weights that no layer applies: 'own'"),
    (Net, 'experts.up[7]', r"modules: no linear operation of the first step took 'experts.up\[7\]'; .*up\[0\]"),
    (Net, ['own', 'pos_embed'], "modules: no linear operation of the first step took 'pos_embed'; .*'own'"),
])
def test_a_model_or_a_name_without_operations(model, modules, match):
    learn = learner(model, cbs=ActivationStatsRecorder(modules))
    with pytest.raises(ValueError, match=match): fit(learn)
    assert modes() == hooks_on(learn.model) == 0 and 'forward' not in vars(learn.model)


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
    before = rec.df()
    learn.model(torch.full((4, 1, 8, 8), 1e4))
    assert rec.df().equals(before)
    fit(learn)
    assert rec.names == EVERY and len(rec.df()) == 6*len(EVERY)
