"""Whether the weights of a Learner's model are new, or were loaded, trained, pretrained or frozen.

`CallbackOnNewWeights` is a callback that asks this before it acts. Its `KnownWeights` remember the weights as they were
when it was attached, and tell which were written or replaced since. `came_trained` says why a whole model is to be
left as it is. `begins_a_fit` tells a fit from a look at the model."""
from __future__ import annotations

import sys
from copy import deepcopy
from typing import Callable, Iterator
from weakref import WeakSet, ref

import torch
from fastai.basics import Callback, L, Learner, SkipToEpoch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..lsuv import plain
from ..parallel import is_sharded, local
from ..run import learned_norm

__all__ = ['EARLIER', 'CallbackOnNewWeights', 'KnownWeights', 'parameters', 'came_trained', 'pretrained_body',
           'begins_a_fit']

EARLIER = "it was initialized before an earlier fit"
_N_SAMPLED = 32  # Numbers of a parameter that are remembered
_INITIALIZED: WeakSet[nn.Module] = WeakSet()  # Models that were initialized: the next fit may bring another callback


def parameters(model: nn.Module) -> list[nn.Parameter]:
    "The parameters that exist: those of lazy modules do not yet."
    return [p for p in model.parameters() if not is_lazy(p)]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    "Each parameter with the module that holds it and its name there."
    for m in model.modules():
        yield from ((m, k, p) for k, p in m._parameters.items() if p is not None and not is_lazy(p))


class _Seen:
    "A parameter as it was first seen, or as LSUV left it: its version, a few of its numbers, whether it was frozen."
    def __init__(self, p: nn.Parameter, frozen: bool, written: bool = False):
        # a weak reference, which `Module.to` does not allow for a sharded parameter
        self.p = (lambda: p) if is_sharded(p) else ref(p)
        self.version,self.shape,self.sample,self.frozen = -1 if written else _version(p),p.shape,_sample(p),frozen

    def written(self, p: nn.Parameter) -> bool:
        "Whether `p`, the parameter or one in its place, holds other numbers, or was written to."
        if self.p() is p and _version(p) > self.version: return True
        now = _sample(p)
        if now is None or self.sample is None: return False
        # `Module.to` may have rounded the numbers
        close = dict(rtol=2**-7, atol=1e-4*float(self.sample.abs().max()), equal_nan=True)
        return not torch.allclose(now, self.sample, **close)


def _version(p: nn.Parameter) -> int:
    "How often `p` was written to. `Module.to` makes a new wrapper of a sharded parameter, around the same memory."
    return local(p)._version


def _sample(p: nn.Parameter) -> Tensor | None:
    "A few numbers of `p`: a write through `.data` changes no version. Of a sharded parameter the version must do."
    if is_sharded(p) or p.is_meta or p.is_complex() or not p.numel(): return None
    at = torch.linspace(0, p.numel() - 1, _N_SAMPLED, dtype=torch.float64).long()
    v = p.detach()
    return (v[torch.unravel_index(at, p.shape)] if p.dim() else v.clone()).to('cpu', torch.float32)


class KnownWeights:
    """What is known of each parameter. One that was put in the place of another (`load_state_dict` does so with
    `assign=True`) is compared with it."""
    def __init__(self): self.of,self.at = {},{}

    def seen(self, m: nn.Module, k: str, p: nn.Parameter) -> _Seen | None:
        "What is known of the parameter `p`, which `m` holds as `k`, or of what was in its place."
        if (s := self.of.get(id(p))) is not None and s.p() is p: return s
        of,s = self.at.get((id(m), k), (lambda: None, None))
        return s if of() is m and s.shape == p.shape else None

    def note(self,
        model: nn.Module,
        written: set[int] | None = None  # After a run of LSUV: ids of parameters that were written before it
    ) -> None:
        "Note parameters not seen before; after a run of LSUV, what it has made of them."
        for m, k, p in _places(model):
            s = self.seen(m, k, p)
            if s is None: self._put(m, k, p, _Seen(p, not p.requires_grad))
            elif written is not None and id(p) not in written: self._put(m, k, p, _Seen(p, s.frozen))

    def _put(self, m: nn.Module, k: str, p: nn.Parameter, s: _Seen) -> None:
        self.of[id(p)],self.at[id(m), k] = s,(ref(m), s)

    def _those(self, model: nn.Module, f: Callable[[_Seen, nn.Parameter], bool]) -> set[int]:
        return {id(p) for m, k, p in _places(model) if (s := self.seen(m, k, p)) is not None and f(s, p)}

    def written(self, model: nn.Module) -> set[int]:
        "Ids of the parameters that were written, or replaced, since they were noted."
        return self._those(model, _Seen.written)

    def frozen(self, model: nn.Module) -> set[int]:
        "Ids of the parameters that were frozen when they were noted."
        return self._those(model, lambda s, p: s.frozen)

    def of_copy(self, model: nn.Module, copied: nn.Module) -> KnownWeights:
        "What is known of a copy of a model: the same as of the model."
        new,written = KnownWeights(),self.written(model)
        for (m, k, p), (n, _, q) in zip(_places(model), _places(copied)):
            if (s := self.seen(m, k, p)) is not None: new._put(n, k, q, _Seen(q, s.frozen, id(p) in written))
        return new


class CallbackOnNewWeights(Callback):
    "A callback that acts on a model once, and only on weights that are new."
    def __init__(self):
        super().__init__()
        self.anyway,self.from_file,self.known = False,False,KnownWeights()

    def __setattr__(self, name, value):
        if name == 'learn' and value is not None:
            other = next((cb for cb in value.cbs if type(cb) is type(self) and cb is not self), None)
            if other is not None:
                raise ValueError(f"cbs: got a second {type(self).__name__}; the Learner has {other!r} already. Keep "
                                 f"one: `learn.remove_cb(learn.{self.name})` removes the first")
        super().__setattr__(name, value)
        if name == 'learn' and value is not None: self.known.note(value.model)

    def reset(self) -> None:
        "Forget what was done: the next fit initializes the model, even if it has been trained."
        self.anyway = True

    def _done(self) -> None:
        "Remember that the model has been initialized."
        self.anyway = False
        _INITIALIZED.add(plain(self.learn.model))

    def _why_not(self,
        force: bool  # Whether weights that were loaded, trained or pretrained are no reason
    ) -> str:
        "Why no weight of the model is to be touched, or \"\"."
        if self.anyway: return ''
        if plain(self.learn.model) in _INITIALIZED: return EARLIER
        if force: return ''
        return "it was loaded from a file" if self.from_file else came_trained(self.learn, self.known)

    def _held(self) -> set[int]:
        "Ids of the parameters that were loaded, were frozen, or belong to the body of a pretrained Learner."
        model = self.learn.model
        return self.known.written(model) | self.known.frozen(model) | pretrained_body(self.learn)

    def __getstate__(self): return {k: v for k, v in super().__getstate__().items() if k != 'known'}

    def __setstate__(self, state):
        self.known = KnownWeights()
        super().__setstate__(state)
        self.from_file = True

    def __deepcopy__(self, memo):
        "A copy in memory comes from no file, and knows of its Learner's copy what this one knows of this."
        new = memo[id(self)] = type(self).__new__(type(self))
        held = {k: v for k, v in vars(self).items() if k != 'known'}
        vars(new).update(deepcopy(held, memo), known=KnownWeights())
        if self.learn is None: return new
        model,copied = self.learn.model,deepcopy(self.learn.model, memo)
        if plain(model) in _INITIALIZED: _INITIALIZED.add(plain(copied))
        vars(new)['known'] = self.known.of_copy(model, copied)
        return new


def came_trained(learn: Learner, known: KnownWeights) -> str:
    "Why no weight of the model is to be touched, or \"\"."
    start = next((cb for cb in learn.cbs if isinstance(cb, SkipToEpoch)), None)
    if start is not None: return f"training starts at epoch {start._skip_to}"
    if _was_trained(learn): return "it has been trained"
    params = parameters(learn.model)
    # A bias or the weight of a norm layer may have been loaded with the numbers that it had.
    ids = {id(p) for p in params if p.dim() > 1}
    if ids and known.written(learn.model) >= ids: return "its weights were loaded"
    # Where some are or were frozen, or the Learner knows of a pretrained body, the rest may well be a new head.
    if vars(learn).get('pretrained') or known.frozen(learn.model) or any(not p.requires_grad for p in params): return ''
    learned = learned_norm(learn.model)
    return f"its norm layer {learned!r} has been trained" if learned else ''


def pretrained_body(learn: Learner) -> set[int]:
    "Ids of the parameters of a pretrained Learner's body: all but the last group of its splitter."
    if not vars(learn).get('pretrained'): return set()
    groups = learn.splitter(learn.model)
    divided = isinstance(groups[0], (list, tuple, L)) and len(groups) > 1
    head = {id(p) for p in groups[-1]} if divided else set()
    return {id(p) for p in parameters(learn.model)} - head


def _was_trained(learn: Learner) -> bool:
    """Whether an optimizer has taken a step. What `lr_find` did, it undid.

    Three signs tell, in this order: the optimizer has state; all gradients are zero, as fastai's optimizers leave
    them; the Recorder has losses. The last is for plain SGD of torch, which leaves no other sign."""
    opt,params,recorder = learn.opt,parameters(learn.model),vars(learn).get('recorder')
    optimizers = [o for o in (opt, vars(opt).get('opt')) if o is not None]  # an OptimWrapper's state is in `opt.opt`
    states = [o.state[p] for o in optimizers for p in params if p in o.state]
    if any(set(s) - {'do_wd', 'force_train'} for s in states): return True
    if _found_lr(recorder): return False
    grads = [p.grad for p in params if p.grad is not None]
    if grads and not any(local(g).any() for g in grads): return True
    remembers = any(opt.hypers[0].get(h) for h in ('mom', 'sqr_mom'))
    return not remembers and len(getattr(recorder, 'losses', ())) > 0


def _found_lr(recorder: Callback | None) -> bool:
    "Whether the last fit was that of `lr_find`: its learning rates grow by the same factor each step."
    lrs = getattr(recorder, 'lrs', ())
    factors = [b/a for a, b in zip(lrs, lrs[1:]) if a > 0]
    return len(factors) > 1 and min(factors) > 1 and max(factors) < 1.001*min(factors)


def begins_a_fit() -> bool:
    """Whether a fit has sent the event that is being handled.

    `validate`, `get_preds`, `summary` and `tta` send `before_fit` too, in one list with `before_epoch`."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not Learner.__call__.__code__: frame = frame.f_back
    return frame is None or isinstance(frame.f_locals['event_name'], str)
