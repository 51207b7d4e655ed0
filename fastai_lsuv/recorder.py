"Statistics of every layer's activations while a `Learner` trains: fastai's `ActivationStats`, exact, nearly free and bounded."
from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from fastcore.foundation import L
from fastai.callback.core import Callback
from fastai.torch_core import get_model, rank_distrib

from .recorder_plots import Pairs, StatsPlots, limits_of
from .taps import Gauge, Record, Taps
from .units import select_modules

__all__ = ['ActivationStatsRecorder']


class ActivationStatsRecorder(StatsPlots, Callback):
    """Record mean, std and share near zero of every layer's output while a `Learner` trains.

    A superset of fastai's `ActivationStats`, with the same numbers, that can stay on for a whole run: it changes no loss
    by a bit, waits for the device once an epoch, and keeps at most `max_steps` records. Statistics are taken when a
    layer has computed its output, before an in-place activation overwrites it; of several calls in a step, together;
    of a tuple or dict, of its first floating-point tensor; in float32 at least. Only what the model computes for the
    batches of a fit is recorded: not what other callbacks run before, after or between them, `lr_find` or `get_preds`.

    Like `Recorder`, it starts anew with every fit unless `append`. Between fits nothing is left on the model, unless an
    exception ended one: the hooks then stay, idle, until the next fit. `torch.compile`d models leave their graph at each
    recorded layer, so compile without `fullgraph=True`. Under `torch.distributed` each rank records its own batches,
    and only the first writes.

    It is `learn.activation_stats_recorder`. Raises `ValueError` or `TypeError` for an argument that it does not take, naming
    it, and `ImportError` for a `.parquet` file without pyarrow; its methods raise `ValueError` before anything is recorded."""
    order,remove_on_fetch,feeds_nothing = -20,True,True  # the last: LSUV need not run it to see what the model is fed
    _stateattrs = ('_taps','_names','_rows','_phase','_strides','_seen','_limits','_fresh','_on','_base','_done','_tail')

    def __init__(self,
        modules: Any = None,  # Types, a predicate, names or globs, modules, or a list of these; default: conv, linear, attention and recurrent layers
        every: int = 1,  # Record every so many training steps
        hist: bool | tuple[int, float, float] | None = None,  # Histograms too: True for (40, 0, 10) as fastai, or (bins, low, high)
        grads: bool = False,  # Also mean, std and share of exact zeros of the gradients of the layers' outputs
        valid: bool = False,  # Also record validation: one record per epoch, of all its batches together
        near_zero: float = 0.05,  # Count as near zero what is at or below this, negative numbers included, as fastai does
        max_steps: int = 5000,  # Beyond this many records, drop every second one and record half as often
        fname: str | Path | None = None,  # Write finished epochs to this file in `learn.path`: `.parquet`, or else CSV
        append: bool = False,  # Go on after the records (and the file) of earlier fits instead of starting anew
    ):
        super().__init__()
        if not isinstance(every, int) or isinstance(every, bool) or every < 1: raise ValueError(f"every: got {every!r}; it takes an integer of at least 1")
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 2: raise ValueError(f"max_steps: got {max_steps!r}; it takes an integer of at least 2")
        if not isinstance(near_zero, (int, float)) or isinstance(near_zero, bool): raise TypeError(f"near_zero: got {near_zero!r}; it takes a number")
        self._modules,self._every,self._bins,self._grads,self._valid = modules,every,_parse_hist(hist),grads,valid
        self._near_zero,self._max_steps,self._append = near_zero,max_steps,append
        self._fname = None if fname is None else Path(fname)
        if self._parquet: _import_pyarrow()
        self._init_state()

    def _init_state(self):
        "Forget everything that was recorded; also run when unpickled."
        super()._init_state()
        self._taps,self._names,self._phase,self._fresh,self._on,self._tail = None,[],None,False,False,[]
        self._limits,self._base,self._done = [],(0, 0),[0, 0]  # epochs and steps before this fit, and so far
        self._rows,self._strides,self._seen = {'train':[], 'valid':[]},{'train':1, 'valid':1},{'train':0, 'valid':0}

    # -- events --

    def before_fit(self):
        "Drop hooks that an exception left, and start anew when training starts."
        self._detach()
        self._fresh,self._on = True,False

    def before_train(self):
        "Put the hooks in place."
        if hasattr(self.learn, 'lr_finder') or hasattr(self.learn, 'gather_preds'): return
        if self._fresh: self._begin()
        self._enter('train')

    def before_validate(self):
        "Put the hooks in place if validation is recorded."
        # Validation outside a fit has started nothing to add to, and that of `get_preds` inside one is no validation.
        if self._valid and self._on and not hasattr(self.learn, 'gather_preds'): self._enter('valid')

    def before_batch(self):
        "Start measuring if this step is due."
        if self._phase is None: return
        due = True
        if self._phase == 'train':
            self._done[:] = self.epoch + self._base[0] + 1, self.train_iter + self._base[1] + 1
            if (due := self.train_iter % self._every == 0):
                due = self._seen['train'] % self._strides['train'] == 0
                self._seen['train'] += 1
        self._taps.start(due)

    def after_pred(self):
        "Stop measuring: what runs the model from here to the next batch is not its forward pass."
        if self._phase is not None: self._taps.stop()

    def after_backward(self):
        "Note by how much mixed precision scaled the loss, and with it the gradients of this step."
        scaler = getattr(self.learn, 'scaler', None)
        if self._phase is None or not self._grads or scaler is None or not scaler.is_enabled(): return
        self._taps.loss_scale = scaler.scale(torch.ones_like(self.loss_grad.detach()))

    def after_batch(self):
        "Keep what was measured, on the device."
        if self._phase is None: return
        row = self._taps.row()
        self._see_through_compile()
        if row is None: return
        if self._phase == 'train': self._add(row)
        else:
            self._tail.append(row)
            if len(self._tail) == 64: self._tail = [Record.merge(self._tail)]

    def after_train(self):
        "Remove the hooks."
        self._detach()

    def after_validate(self):
        "Make one record of the validation, and remove the hooks."
        if self._phase == 'valid' and self._tail:
            if self._seen['valid'] % self._strides['valid'] == 0: self._add(Record.merge(self._tail))
            self._seen['valid'] += 1
        self._detach()

    def after_epoch(self):
        "Bring the epoch's records to the host, at once, and write them where asked."
        self._detach()
        self._fetch()
        if self._on and rank_distrib() == 0: self._write()

    def after_fit(self):
        "As after an epoch, if `CancelFitException` ended one early."
        self.after_epoch()
        self._on = False

    # -- recording --

    def _begin(self):
        "Find the layers, and forget earlier fits unless `append`."
        model = get_model(self.model)
        model = getattr(model, '_orig_mod', model)
        named = _select(model, self._modules)
        names = [n.replace('_orig_mod.', '') for n,_ in named]
        if not self._append or names != self._names:
            if self._append and self._names: warnings.warn("ActivationStatsRecorder(append=True): the layers changed since the last fit, so recording starts anew")
            self._init_state()
            if self._fname and rank_distrib() == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if not self._append: self._path.unlink(missing_ok=True)
        self._base,self._names,self._fresh,self._on = tuple(self._done),names,False,True
        self._limits = limits_of(model, [m for _,m in named])
        self._taps = Taps([m for _,m in named], Gauge(self._near_zero, self._bins), self._grads)

    def _see_through_compile(self):
        "Code compiled before there were hooks does not call them: have it compiled again, once a fit."
        if not self._taps.due or self._taps.checked: return
        self._taps.checked = True
        if all(self._taps.calls) or not _is_compiled(self.model): return
        warnings.warn("ActivationStatsRecorder: the model was compiled before there was anything to record, so some layers were missed; "
                      "it is compiled again for the next step")
        torch.compiler.reset()

    def _enter(self, phase: str):
        self._detach()
        self._phase,self._tail = phase,[]
        self._taps.attach()

    def _detach(self):
        self._phase = None
        if self._taps: self._taps.detach()

    def _add(self, row: Record):
        "Append a record; where there are too many, keep every second one and record half as often from now on."
        row.phase,row.epoch,row.step = self._phase,self.epoch + self._base[0],self.train_iter + self._base[1]
        rows = self._rows[row.phase]
        rows.append(row)
        if len(rows) > self._max_steps:
            self._rows[row.phase] = rows[::2]
            self._strides[row.phase] *= 2

    def _fetch(self):
        "Bring records to the host, in one transfer."
        rows = [r for rs in self._rows.values() for r in rs if not r.fetched]
        if not rows: return
        values = torch.stack([r.values for r in rows]).cpu().numpy()
        for r,v in zip(rows, values):
            r.values,r.fetched = v.copy(),True
            for k,n in enumerate(r.ns.T): r.values[:, 3*k+2] /= np.where(n > 0, n, np.nan)

    def _records(self, phase: str | None = None) -> list[Record]:
        "Records on the host, in order of time."
        if phase not in (None, 'train', 'valid'): raise ValueError(f"phase: got {phase!r}; it takes 'train' or 'valid'")
        self._fetch()
        rows = [r for p,rs in self._rows.items() for r in rs if phase in (None, p)]
        if not rows: raise ValueError(f"no {phase or 'step'} has been recorded yet: fit with this callback attached"
                                      + (" and `valid=True`" if phase == 'valid' and not self._valid else ''))
        return sorted(rows, key=lambda r: (r.epoch, r.step))  # stable: training comes before validation of the same step

    # -- writing --

    @property
    def _parquet(self) -> bool: return self._fname is not None and self._fname.suffix == '.parquet'

    @property
    def _path(self) -> Path: return Path(self.path)/self._fname

    def _write(self):
        "Append records not yet written to the file, and to TensorBoard and Weights & Biases where their callbacks are attached."
        rows = [r for rs in self._rows.values() for r in rs if not r.written]
        if not rows: return
        if self._fname: (_append_parquet if self._parquet else _append_csv)(self._frame(rows), self._path)
        for cb in self.learn.cbs:
            kind = {c.__name__ for c in type(cb).__mro__}
            if not cb.run: continue
            if 'TensorBoardCallback' in kind:
                for r in rows:
                    for name,v in self._scalars(r): cb.writer.add_scalar(name, v, r.step)
            if 'WandbCallback' in kind:  # takes no steps before its latest, so one point an epoch
                import wandb
                wandb.log({k:v for p in ('train', 'valid') for r in [r for r in rows if r.phase == p][-1:] for k,v in self._scalars(r)}, step=cb._wandb_step)
        for r in rows: r.written = True

    def _scalars(self, r: Record) -> list[tuple[str, float]]:
        return [(f'activations/{r.phase}/{name}/{c}', float(r.values[i, j])) for i,name in enumerate(self._names) for j,c in enumerate(self._columns)]

    @property
    def _columns(self) -> list[str]:
        return ['mean', 'std', 'near_zero'] + (['grad_mean', 'grad_std', 'grad_zero'] if self._grads else [])

    def _frame(self, rows: list[Record]) -> pd.DataFrame:
        n,names = len(self._names),np.array(self._names, dtype=object)
        cols = {k:np.repeat(np.array([getattr(r, k) for r in rows]), n) for k in ('epoch', 'step', 'phase')}
        cols['layer'] = np.tile(names, len(rows))
        values = np.concatenate([r.values[:, :len(self._columns)] for r in rows])
        return pd.DataFrame({**cols, **{c:values[:, j] for j,c in enumerate(self._columns)}})

    # -- reading --

    @property
    def names(self) -> list[str]:
        "Names of the recorded layers, as in `named_modules()`."
        return list(self._names)

    def df(self) -> pd.DataFrame:  # A row per record and layer, in order of time
        "What was recorded, a row per step and layer: epoch, step, phase, layer, mean, std, near_zero (grad_mean, grad_std, grad_zero)."
        return self._frame(self._records())

    @property
    def pairs(self) -> Pairs:
        "(mean, std) of every layer in the latest training step recorded; prints as a table."
        r = self._records('train')[-1]
        return Pairs(self._names, [tuple(float(v) for v in row[:2]) for row in r.values], r.epoch, r.step)

    def layer_stats(self,
        i: int | str,  # Layer, by its place in `names` or by name
        phase: str = 'train'  # 'train' or 'valid'
    ) -> L:  # Means, stds and shares near zero, each a list with a number per record
        "Statistics of one layer over time, as fastai's `ActivationStats.layer_stats`."
        rows,i = self._records(phase),self._index(i)
        return L(L(float(r.values[i, j]) for r in rows) for j in range(3))

    def hist(self,
        i: int | str,  # Layer, by its place in `names` or by name
        phase: str = 'train'  # 'train' or 'valid'
    ) -> Tensor:  # (bins, records): log(1 + elements in the bin)
        "Histograms of one layer over time, as fastai's `ActivationStats.hist`."
        rows,i = self._records(phase),self._index(i)
        if self._bins is None: raise ValueError("hist: no histograms were recorded; pass `hist=True` to ActivationStatsRecorder")
        return torch.stack([torch.from_numpy(r.values[i, len(self._columns):]) for r in rows]).t().log1p()

    def _index(self, i: int | str) -> int:
        n = len(self._names)
        if isinstance(i, str) and i in self._names: return self._names.index(i)
        if isinstance(i, (int, np.integer)) and -n <= i < n: return int(i) % n
        raise ValueError(f"i: got {i!r}; it takes a number below {n}, or the name of a recorded layer: {', '.join(self._names[:8])}" + (', ...' if n > 8 else ''))


def _select(model: nn.Module, modules: Any) -> list[tuple[str, nn.Module]]:
    "As `select_modules`, but recurrent layers are among the default ones."
    if modules is not None: return select_modules(model, modules)
    recurrent = {id(m) for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))}
    try: layers = {id(m) for _,m in select_modules(model)}
    except ValueError:
        if not recurrent: raise
        layers = set()
    return [(n, m) for n,m in model.named_modules() if id(m) in layers | recurrent]


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, '_orig_mod') or getattr(m, '_compiled_call_impl', None) is not None for m in model.modules())


def _parse_hist(hist: Any) -> tuple[int, float, float] | None:
    if hist is None or hist is False: return None
    if hist is True: return 40, 0., 10.
    takes = "it takes True for (40, 0, 10), or (bins, low, high)"
    if not isinstance(hist, (tuple, list)) or len(hist) != 3 or not all(isinstance(o, (int, float)) for o in hist): raise TypeError(f"hist: got {hist!r}; {takes}")
    bins,lo,hi = hist
    if bins != int(bins) or bins < 1 or not lo < hi: raise ValueError(f"hist: got {hist!r}; {takes}, with at least one bin and low below high")
    return int(bins), float(lo), float(hi)


def _import_pyarrow():
    try: import pyarrow.parquet
    except ImportError as e: raise ImportError("fname: a .parquet file needs pyarrow (`pip install pyarrow`); name a .csv file to do without") from e
    return pyarrow


def _append_csv(df: Any, path: Path):
    "Append to the file and make sure that it is on disk."
    with path.open('a') as f:
        df.to_csv(f, index=False, header=f.tell() == 0)
        f.flush()
        os.fsync(f.fileno())


def _append_parquet(df: Any, path: Path):
    "Rewrite the file with `df` at its end (a Parquet file cannot grow), and only then replace it."
    pa = _import_pyarrow()
    table = pa.Table.from_pandas(df, preserve_index=False)
    if path.exists(): table = pa.concat_tables([pa.parquet.read_table(path), table])
    part = path.with_suffix('.parquet.part')
    pa.parquet.write_table(table, part)
    os.replace(part, path)
