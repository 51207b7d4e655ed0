"What a recorder writes: CSV and Parquet files, TensorBoard, Weights & Biases; and what an interrupted run leaves."
import importlib.util
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fastai.basics import Callback, CancelFitException
from recording import Do, convnet, fit, hooks_on, learner, recorded

from fastai_lsuv.recorder import ActivationStatsRecorder, callback


class Boom(Exception): pass


@pytest.mark.parametrize('error', [KeyboardInterrupt, Boom, CancelFitException])
@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_finished_epochs_are_on_disk_when_a_run_is_interrupted(error, suffix, tmp_path):
    if suffix == '.parquet': pytest.importorskip('pyarrow')
    read = pd.read_parquet if suffix == '.parquet' else partial(pd.read_csv, dtype={'layer': str})
    rec,path = ActivationStatsRecorder(fname=f'sub/a{suffix}', valid=True),tmp_path/f'sub/a{suffix}'
    model,sizes,cancelled = convnet(),[],error is CancelFitException

    def boom(m, a, o):
        if learn.epoch == 2 and m.training and learn.iter == 3: raise error('now')
    measure = Do(order=100, after_epoch=lambda l: sizes.append(len(read(path))))
    learn = learner(model, cbs=[rec, measure], path=tmp_path)
    hook = model[7].register_forward_hook(boom)
    with nullcontext() if cancelled else pytest.raises(error): fit(learn, 4)
    assert sizes == [21, 42]
    df = read(path)
    assert len(df) == (42+9 if cancelled else 42) and list(df.epoch.unique())[:2] == [0, 1]
    assert len(rec.df()) == 42+9  # what was in memory can still be read
    pd.testing.assert_frame_equal(df, rec.df()[:len(df)], check_dtype=False, rtol=1e-6)
    # And the next fit is a clean one.
    hook.remove()
    fit(learn)
    assert len(rec.df()) == len(read(path)) == 21 and hooks_on(learn.model) == 0


def test_parquet_without_pyarrow_says_so(monkeypatch):
    for name in ('pyarrow', 'pyarrow.parquet'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match='fname.*pyarrow'): ActivationStatsRecorder(fname='a.parquet')


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(callback, 'rank_distrib', lambda: 1)
    rec = recorded(fname=tmp_path/'a.csv')
    assert not (tmp_path/'a.csv').exists() and len(rec.df()) == 18


def test_scalars_go_to_tensorboard_and_wandb(monkeypatch):
    logged,written = [],[]
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(log=lambda d, step: logged.append((d, step))))

    class TensorBoardCallback(Callback):
        order,writer = 51,SimpleNamespace(add_scalar=lambda *args: written.append(args))

    class WandbCallback(Callback): order,_wandb_step = 51,41

    class SwitchedOff(TensorBoardCallback):
        def before_fit(self): self.run = False
    rec = recorded(n=2, cbs=[TensorBoardCallback(), WandbCallback(), SwitchedOff()], valid=True, every=2)
    assert len(written) == 2*(3+1)*3*4
    assert len(logged) == 2 and len(logged[0][0]) == 2*3*4
    want = rec.df().query("layer == '2' and phase == 'train'")
    got = [(step, v) for name, v, step in written if name == 'activations/train/2/std']
    assert got == list(zip(want.step, want['std']))
    assert logged[-1][1] == 41 and logged[-1][0]['activations/train/2/std'] == want['std'].iloc[-1]
    assert 'activations/valid/7/near_zero' in logged[-1][0]


@pytest.mark.skipif(importlib.util.find_spec('tensorboard') is None, reason='tensorboard is not installed')
@pytest.mark.slow
def test_the_tensorboard_callback_of_fastai(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    rec = recorded(cbs=[TensorBoardCallback(log_dir=tmp_path, trace_model=False, log_preds=False)])
    events = EventAccumulator(str(tmp_path)).Reload().Scalars('activations/train/0/std')
    np.testing.assert_allclose([e.value for e in events], rec.layer_stats(0)[1])


def test_importing_the_recorder_imports_nothing_that_it_may_not_need():
    code = """
import sys
from fastai.basics import *
before = set(sys.modules)
import fastai_lsuv.recorder
new = set(sys.modules) - before
optional = 'tensorboard', 'wandb', 'matplotlib', 'pyarrow'
found = [m for m in new if m.split('.')[0] in optional or m == 'torch._dynamo']
assert not found, found"""
    root = Path(callback.__file__).parents[2]
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, cwd=root)
