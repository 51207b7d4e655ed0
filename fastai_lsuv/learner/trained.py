"""Whether the weights of a Learner's model are new, or were loaded, trained, pretrained or frozen.

`CallbackOnNewWeights` is a callback that asks this before it acts. Its `KnownWeights` remember the weights as they were
when it was attached, and tell which were written since. `came_trained` says why a whole model is to be left as it is.
`begins_a_fit` tells a fit from a look at the model."""
from __future__ import annotations

import sys
from copy import deepcopy
from typing import Callable, Iterable
from weakref import WeakSet, ref

from fastai.basics import Callback, L, Learner, SkipToEpoch
from torch import nn
from torch.nn.parameter import is_lazy

from ..lsuv import plain
from ..parallel.sharded import is_sharded, local
from ..units.units import Unit

__all__ = ['EARLIER', 'CallbackOnNewWeights', 'KnownWeights', 'parameters', 'came_trained', 'pretrained_body',
           'begins_a_fit']

EARLIER = "it was initialized before an earlier fit"
_INITIALIZED: WeakSet[nn.Module] = WeakSet()  # Models that were initialized: the next fit may bring another callback


def parameters(model: nn.Module) -> list[nn.Parameter]:
    "The parameters that exist: those of lazy modules do not yet."
    return [p for p in model.parameters() if not is_lazy(p)]


def _ref(p: nn.Parameter) -> Callable[[], nn.Parameter | None]:
    "A reference to `p`: a weak one, which `Module.to` does not allow for a sharded parameter."
    return (lambda: p) if is_sharded(p) else ref(p)


def _version(p: nn.Parameter) -> int:
    "How often `p` was written to. `Module.to` makes a new wrapper of a sharded parameter, around the same memory."
    return local(p)._version


class KnownWeights:
    """What is known of each parameter: the version it had, and whether it was frozen, when it was first seen.

    A tensor's version counts the times it was written to."""
    def __init__(self): self.of = {}

    def knows(self, p: nn.Parameter) -> bool: return id(p) in self.of and self.of[id(p)][0]() is p

    def note(self,
        params: Iterable[nn.Parameter],
        written: set[int] | None = None  # After a run of LSUV: ids of those that were written before it
    ) -> None:
        "Note parameters not seen before; after a run of LSUV, the versions that it has made."
        for p in params:
            if not self.knows(p): self.of[id(p)] = _ref(p),_version(p),not p.requires_grad
            elif written is not None and id(p) not in written: self.of[id(p)] = _ref(p),_version(p),self.of[id(p)][2]

    def written(self, params: Iterable[nn.Parameter]) -> set[int]:
        "Ids of the parameters that were written since they were noted."
        return {id(p) for p in params if self.knows(p) and _version(p) > self.of[id(p)][1]}

    def was_frozen(self, p: nn.Parameter) -> bool: return self.knows(p) and self.of[id(p)][2]

    def of_copy(self, params: Iterable[nn.Parameter], copies: Iterable[nn.Parameter]) -> KnownWeights:
        "What is known of copies of these parameters: the same as of the parameters."
        params,new = list(params),KnownWeights()
        written = self.written(params)
        for p, q in zip(params, copies):
            if self.knows(p): new.of[id(q)] = _ref(q),-1 if id(p) in written else _version(q),self.of[id(p)][2]
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
        if name == 'learn' and value is not None: self.known.note(parameters(value.model))

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

    def _holds_meaning(self) -> Callable[[Unit], bool]:
        "Which units hold weights that were loaded, were frozen, or belong to the body of a pretrained Learner."
        params = parameters(self.learn.model)
        frozen = {id(p) for p in params if self.known.was_frozen(p)}
        keep = self.known.written(params) | frozen | pretrained_body(self.learn)
        return lambda u: any(id(w.value) in keep for w in u.weights)

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
        vars(new)['known'] = self.known.of_copy(parameters(model), parameters(copied))
        return new


def came_trained(learn: Learner, known: KnownWeights) -> str:
    "Why no weight of the model is to be touched, or \"\"."
    start = next((cb for cb in learn.cbs if isinstance(cb, SkipToEpoch)), None)
    if start is not None: return f"training starts at epoch {start._skip_to}"
    if _was_trained(learn): return "it has been trained"
    params = parameters(learn.model)
    if params and len(known.written(params)) == len(params): return "its weights were loaded"
    # Where some are or were frozen, or the Learner knows of a pretrained body, the rest may well be a new head.
    if vars(learn).get('pretrained') or any(not p.requires_grad or known.was_frozen(p) for p in params): return ''
    learned = _learned_norm(learn.model)
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


def _learned_norm(model: nn.Module) -> str:
    "Name of a norm layer that has learned, or \"\": nobody starts both its weight and its bias with several values."
    def varies(p): return p is not None and not is_lazy(p) and bool((local(p) != local(p)[:1]).any())

    for n, m in model.named_modules():
        w,b = m._parameters.get('weight'),m._parameters.get('bias')
        is_norm = 'Norm' in type(m).__name__ and getattr(w, 'ndim', 0) == 1
        if is_norm and varies(w) and (b is None or varies(b)): return n
    return ''


def begins_a_fit() -> bool:
    """Whether a fit has sent the event that is being handled.

    `validate`, `get_preds`, `summary` and `tta` send `before_fit` too, in one list with `before_epoch`."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not Learner.__call__.__code__: frame = frame.f_back
    return frame is None or isinstance(frame.f_locals['event_name'], str)
