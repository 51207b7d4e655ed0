"Recorders and models that are exported, copied, pickled or compiled."
import copy
import pickle
import warnings

import pandas as pd
import pytest
import torch
from fastai.basics import load_learner
from recording import Do, convnet, digits, fit, hooks_on, learner
from torch import nn

from fastai_lsuv.recorder import ActivationStatsRecorder


def exported(learn, path):
    learn.export('a.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_learner(path/'a.pkl')


def test_an_exported_recorder_has_its_options_and_not_its_records(tmp_path):
    rec = ActivationStatsRecorder(hist=True, grads=True)
    learn = fit(learner(cbs=rec, path=tmp_path))
    again = exported(learn, tmp_path)
    assert len(rec.df()) == 18
    other = again.activation_stats_recorder
    assert other.names == [] and not any(other._store.rows.values())
    again.dls = digits()
    fit(again)
    assert len(other.df()) == 18
    assert list(other.df()) == list(rec.df()) and other.hist(0).shape == (80, 6)


def test_a_learner_is_exported_without_the_recorder_as_its_docs_say(tmp_path):
    learn = fit(learner(cbs=ActivationStatsRecorder(), path=tmp_path))
    learn.remove_cb(ActivationStatsRecorder)
    exported(learn, tmp_path)
    assert b'fastai_lsuv' not in (tmp_path/'a.pkl').read_bytes()


def test_copies_made_during_a_step_record_nothing():
    rec, copies = ActivationStatsRecorder(), []

    def make(learn):
        if not copies:
            copies.extend([copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))])

    def run(learn):
        for m in copies:
            m(torch.full((2, 1, 8, 8), 1e4))
    fit(learner(cbs=[rec, Do(after_pred=make, before_batch=run)]))
    assert len(copies) == 2
    assert rec.df()['mean'].abs().max() < 10


def test_a_model_can_be_pickled_while_hooks_are_on_it():
    rec, hooks = ActivationStatsRecorder(), []

    def dump(learn):
        hooks.append(hooks_on(learn.model))
        pickle.dumps(learn.model)
    learn = fit(learner(cbs=[rec, Do(order=-30, after_batch=dump)]))
    assert hooks[0] == 3
    assert len(rec.df()) == 18 and hooks_on(learn.model) == 0


# ---- Compiled models ----

def compiled(m):
    return torch.compile(m, backend='eager')


def compiled_in_place(m):
    m.compile(backend='eager')
    return m


def compiled_in_part(m):
    return nn.Sequential(compiled(m[0]), *m[1:])


def net():
    return nn.Sequential(convnet()[:5], nn.Flatten(), nn.Linear(128, 10))


def same_records(rec, plain, first_step):
    got = rec.df().query(f'step >= {first_step}').reset_index(drop=True)
    want = plain.df().query(f'step >= {first_step}').reset_index(drop=True)
    pd.testing.assert_frame_equal(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('how', [compiled, compiled_in_place, compiled_in_part])
def test_compiled_models_are_recorded(how):
    torch.compiler.reset()
    plain, rec = (ActivationStatsRecorder(hist=True, grads=True, valid=True) for _ in range(2))
    fit(learner(net, cbs=plain))
    learn = learner(net, cbs=rec)
    learn.model = how(learn.model)
    fit(learn)
    assert rec.names == plain.names == ['0.0', '0.2', '2']
    same_records(rec, plain, 0)
    assert hooks_on(learn.model) == 0


@pytest.mark.slow
def test_a_model_compiled_before_the_fit_is_compiled_again():
    torch.compiler.reset()
    plain, rec = (ActivationStatsRecorder(hist=True, grads=True, valid=True) for _ in range(2))
    fit(learner(net, cbs=plain))
    learn = learner(net, cbs=rec)
    learn.model = compiled(learn.model)
    state = copy.deepcopy(learn.model.state_dict())
    learn.model.train()(torch.randn(16, 1, 8, 8))
    learn.model.load_state_dict(state)
    with pytest.warns(UserWarning, match='compiled again'):
        fit(learn)
    same_records(rec, plain, 1)
