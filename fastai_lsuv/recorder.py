"Statistics of every layer's activations while a `Learner` trains: fastai's `ActivationStats`, exact, nearly free and bounded."
from __future__ import annotations

import os, sys, warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from fastcore.foundation import L
from fastai.callback.core import Callback
from fastai.torch_core import get_model, rank_distrib

from .moments import first_tensor
from .recorder_plots import Pairs, StatsPlots, limits_of
from .units import select_modules

__all__ = ['ActivationStatsRecorder']

_NAN = float('nan')
_CHUNK = 2**17  # Elements measured at a time on the CPU: with the scratch they need, they stay in a core's cache
_CENTRE_ABOVE = 16.  # Where mean**2 exceeds this many variances, `E[x**2] - mean**2` loses digits


# ---- Measuring one activation ----

class _Measure(NamedTuple):
    "What is known of one activation: Python numbers on the CPU, 0-dim tensors (which nobody waits for) on other devices."
    n: int
    mean: float | Tensor
    std: float | Tensor
    zeros: int | Tensor  # Elements at or below the threshold; of a gradient, elements that are exactly 0
    hist: Tensor | None  # Elements in each bin


def _pool(calls: list[_Measure]) -> _Measure:
    "Statistics of the elements of several calls together."
    if len(calls) == 1: return calls[0]
    n = sum(c.n for c in calls)
    mean = sum(c.mean*(c.n/n) for c in calls)
    within = sum(c.std**2*(c.n-1) for c in calls if c.n > 1)
    var = (within + sum((c.mean-mean)**2*c.n for c in calls))/max(n-1, 1)
    hist = None if calls[0].hist is None else torch.stack([c.hist for c in calls]).sum(0)
    return _Measure(n, mean, var**0.5, sum(c.zeros for c in calls), hist)


class _Meter:
    "Measures tensors, with one read of each where it can, and without waiting for the device."
    def __init__(self,
        near_zero: float,  # Count elements at or below this
        bins: tuple[int, float, float] | None  # Number of bins, low and high end; `None`: no histogram
    ):
        self.near_zero,self.bins,self.scratch = near_zero,bins,None

    def __call__(self, x: Tensor, grad: bool = False) -> _Measure:
        x = x.detach()
        if type(x) is not Tensor: x = x.as_subclass(Tensor)
        if x.dtype not in (torch.float32, torch.float64): x = x.float()
        if x.device.type == 'cpu' and x.dtype == torch.float32: return self._cpu(x, grad)
        if x.numel() == 1: mean,std = x.reshape(()),torch.full((), _NAN, device=x.device)
        else: std,mean = torch.std_mean(x)  # Welford's method: exact wherever the mean is, in one read on a GPU
        zeros = ((x == 0) if grad else (x <= self.near_zero)).sum(dtype=torch.float32)
        return _Measure(x.numel(), mean, std, zeros, None if grad or self.bins is None else torch.histc(x, *self.bins))

    def _cpu(self, x: Tensor, grad: bool) -> _Measure:
        """On the CPU a number may be looked at as soon as it is there, but `std_mean` takes ten reads' time.

        So take sums, chunk by chunk while it is in the cache, and `std` (two reads) where they cannot be trusted.
        numpy's comparisons write a byte where torch's fast ones write four."""
        x = _flat(x)
        a,n,s,q,zeros = x.numpy(),x.numel(),0.,0.,0
        if self.scratch is None: self.scratch = np.empty(_CHUNK, dtype=bool)
        compare,to = (np.equal,np.float32(0)) if grad else (np.less_equal,np.float32(self.near_zero))
        for i in range(0, n, _CHUNK):
            c,m = (x if n <= _CHUNK else x[i:i+_CHUNK]),self.scratch[:min(_CHUNK, n-i)]
            s += float(c.sum().numpy())
            q += float(torch.dot(c, c).numpy())
            zeros += np.count_nonzero(compare(a[i:i+_CHUNK], to, out=m))
        mean = s/n
        var = (q - s*mean)/(n-1) if n > 1 else _NAN
        if _CENTRE_ABOVE*var > mean**2 and 1e-30 < q < 1e38: std = var**0.5
        else: std = float(x.std().numpy()) if n > 1 else _NAN  # also where squares under- or overflow
        hist = None
        if self.bins is not None and not grad: hist = self._hist(x) if np.isfinite(mean) else torch.histc(x, *self.bins)
        return _Measure(n, mean, std, zeros, hist)

    def _hist(self, x: Tensor) -> Tensor:
        """`histc` of finite numbers, at a quarter of the time: scale, floor, and count *pairs* of elements.

        One integer stands for two bin numbers (-1 below the range, `bins` above it), so half as many are counted."""
        bins,lo,hi = self.bins
        w = bins+2
        if w*w > 2**15: return torch.histc(x, bins, lo, hi)  # pairs no longer fit 16 bits
        pairs = torch.zeros(w*w, dtype=torch.int64)
        odd = []
        for c in x.split(_CHUNK):
            c = torch.clamp(c, lo - 0.5*(hi-lo)/bins, hi)
            if lo: c.sub_(lo)
            c.mul_(bins/(hi-lo)).floor_()
            half = len(c)//2
            pairs += torch.bincount(c[:half].add_(c[half:2*half], alpha=w).to(torch.int16).add_(w+1), minlength=w*w)
            if len(c) % 2: odd.append(int(c.numpy()[-1])+1)
        counts = pairs.view(w, w).sum(0) + pairs.view(w, w).sum(1)
        for i in odd: counts[i] += 1
        above = counts.numpy()[-1]
        # As in `histc`, the last bin holds its upper end. Looked for only where something is at it or above.
        if above: counts[-2] += above - np.count_nonzero(x.numpy() > np.float32(hi))
        return counts[1:-1]


def _flat(x: Tensor) -> Tensor:
    "The elements of `x` in the order they lie in memory: a view unless `x` has gaps or repeats."
    if x.is_contiguous(): return x.view(-1)
    return x.permute(sorted(range(x.dim()), key=lambda d: -x.stride(d))).reshape(-1)


# ---- The hooks ----

class _Hook:
    "Forward hook of layer `i`. A copied or pickled model carries hooks that do nothing."
    def __init__(self, taps: _Taps | None = None, i: int = 0):
        self.take = taps and taps.take
        # Compiled models: leave the graph for the hook, so that it sees numbers. `torch.compile` has imported dynamo.
        if taps and 'torch._dynamo' in sys.modules: self.take = torch.compiler.disable(self.take)
        self.i = i
    def __call__(self, module, args, out):
        if self.take is not None: self.take(self.i, out)
    def __reduce__(self): return _Hook, ()


class _Taps:
    "Hooks on layers, which measure what passes between `start` and `stop`, and the gradients of that."
    def __init__(self, modules: list[nn.Module], meter: _Meter, grads: bool):
        self.modules,self.meter,self.grads,self.handles,self.loss_scale,self.checked = modules,meter,grads,[],None,False
        self.start(False)

    def attach(self): self.handles = [m.register_forward_hook(_Hook(self, i)) for i,m in enumerate(self.modules)]
    def detach(self):
        for h in self.handles: h.remove()
        self.handles,self.recording = [],False

    def start(self, recording: bool = True):
        self.recording = self.due = recording
        self.calls,self.grad_calls = [[[] for _ in self.modules] for _ in range(2)]

    def stop(self): self.recording = False

    def take(self, i: int, out: Any):
        if not self.recording: return
        x = first_tensor(out)
        if x is None or x.is_complex() or x.numel() == 0 or x.layout != torch.strided or x.is_nested: return
        self.calls[i].append(self.meter(x))
        if self.grads and x.requires_grad:
            to = self.grad_calls[i]
            # A tensor of a subclass is a view of the layer's own, and would lose its hook to an in-place activation.
            if type(x) is not Tensor and x._is_view() and x._base.numel() == x.numel(): x = x._base
            x.register_hook(lambda g: to.append(self.meter(g, grad=True)))

    def row(self) -> _Row | None:
        "What was measured since `start`, still on the device; `None` if no layer was called."
        if not any(self.calls): return None
        kinds = [self.calls, self.grad_calls] if self.grads else [self.calls]
        pooled = [[_pool(c) if c else None for c in kind] for kind in kinds]
        ns = np.array([[m.n if m else 0 for m in kind] for kind in pooled]).T
        device = next((m.mean.device for m in pooled[0] if m and isinstance(m.mean, Tensor)), None)
        columns = [_column([m and m[j] for m in kind], device) for kind in pooled for j in (1, 2, 3)]
        if self.grads and self.loss_scale is not None:
            for c in columns[3:5]: c.div_(self.loss_scale.to(c.device))
        columns = [torch.stack(columns, 1)]
        if self.meter.bins: columns.append(_column([m and m.hist for m in pooled[0]], device, self.meter.bins[0]))
        return _Row(ns, torch.cat(columns, 1))


def _column(values: list, device: torch.device | None, width: int = 0) -> Tensor:
    "One number (or `width` of them) per layer as a float32 tensor; NaN for layers that were not called."
    if device is None and not width: return torch.tensor([_NAN if v is None else v for v in values], dtype=torch.float32)
    none = torch.full((width,) if width else (), _NAN, device=device)
    return torch.stack([none if v is None else v.to(none) if isinstance(v, Tensor) else torch.full_like(none, v) for v in values])


@dataclass
class _Row:
    "One recorded step: columns mean, std, elements near zero; the same of gradients; histogram bins."
    ns: np.ndarray  # (layers, 1), or (layers, 2) with gradients: how many elements were measured
    values: Tensor | np.ndarray  # (layers, columns): on the device until fetched
    epoch: int = 0
    step: int = 0
    phase: str = 'train'
    fetched: bool = False
    written: bool = False

    @staticmethod
    def merge(rows: list[_Row]) -> _Row:
        "Statistics of the elements of several rows together."
        if len(rows) == 1: return rows[0]
        v,ns = torch.stack([r.values for r in rows]),np.stack([r.ns for r in rows])
        counts,columns = torch.from_numpy(ns).to(v.device, v.dtype, non_blocking=True).unbind(-1),[]
        def called(j, k, n): return torch.where(n[..., None] > 0, v[..., j:k], 0.)
        for k,n in enumerate(counts):
            (mean,std,zeros),total = called(3*k, 3*k+3, n).unbind(-1),n.sum(0)
            m = (mean*n).sum(0)/total
            within = torch.where(n > 1, std.square()*(n-1), 0.).sum(0)
            columns += [m, ((within + ((mean-m).square()*n).sum(0))/(total-1).clamp(min=1)).sqrt(), zeros.sum(0)]
        return _Row(ns.sum(0), torch.cat([torch.stack(columns, 1), called(len(columns), None, counts[0]).sum(0)], 1))


# ---- The callback ----

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
    and only the first writes."""
    order,remove_on_fetch = -20,True
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
            if len(self._tail) == 64: self._tail = [_Row.merge(self._tail)]

    def after_train(self):
        "Remove the hooks."
        self._detach()

    def after_validate(self):
        "Make one record of the validation, and remove the hooks."
        if self._phase == 'valid' and self._tail:
            if self._seen['valid'] % self._strides['valid'] == 0: self._add(_Row.merge(self._tail))
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
        self._taps = _Taps([m for _,m in named], _Meter(self._near_zero, self._bins), self._grads)

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

    def _add(self, row: _Row):
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

    def _records(self, phase: str | None = None) -> list[_Row]:
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

    def _scalars(self, r: _Row) -> list[tuple[str, float]]:
        return [(f'activations/{r.phase}/{name}/{c}', float(r.values[i, j])) for i,name in enumerate(self._names) for j,c in enumerate(self._columns)]

    @property
    def _columns(self) -> list[str]:
        return ['mean', 'std', 'near_zero'] + (['grad_mean', 'grad_std', 'grad_zero'] if self._grads else [])

    def _frame(self, rows: list[_Row]) -> Any:
        import pandas as pd
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

    def df(self) -> Any:
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
