"What the layers and the linear operations of a model put out, measured without the package."
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

LAYERS = _ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention
# The arguments of each operation that may be its weight
OPERATIONS = {F.linear: [1], torch.conv1d: [1], torch.conv2d: [1], torch.conv_transpose1d: [1], torch.addmm: [1, 2],
              Tensor.matmul: [0, 1], torch.matmul: [0, 1], torch.mm: [0, 1], torch.bmm: [0, 1], Tensor.mm: [0, 1],
              torch.baddbmm: [1, 2], torch.einsum: [1, 2, 3], torch.tensordot: [0, 1], Tensor.bmm: [0, 1],
              torch.mv: [0]}


class Seen(dict):
    "By name: count, sum and sum of squares of all that was put out."
    def add(self, name, x):
        x = x.detach().as_subclass(Tensor).double()
        n, s, q = self.get(name, (0, 0., 0.))
        self[name] = n + x.numel(), s + x.sum().item(), q + x.square().sum().item()

    def stds(self):
        "Unbiased, as `Tensor.std` is."
        return {k: max((q - s*s/n)/max(n - 1, 1), 0.)**0.5 for k, (n, s, q) in self.items()}


class Operations(TorchFunctionMode):
    "Measures operations on parameters, under the name of the parameter, of its slice, or of the layer that holds it."
    def __init__(self, model, seen):
        super().__init__()
        self.seen,self.params,self.out_strides,self.kept = seen,{},{},[]
        self.of_layers = Seen()  # operations on the weights of layers, which may not be called as such
        layers = {id(p): n for n, m in model.named_modules() if isinstance(m, LAYERS[:3]) for p in m.parameters()}
        for n, p in model.named_parameters():
            if p.dim() > 1: self.params[p.untyped_storage().data_ptr()] = layers.get(id(p), n), p, id(p) in layers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if 'weight' in kwargs and OPERATIONS.get(func) == [1]: args = (args[0] if args else None, kwargs['weight'])
        found = [(i, f) for i in OPERATIONS.get(func, ()) if i < len(args) and (f := self.find(args[i]))]
        if len(found) == 1:
            (i, (name, p, of_layer)), = found
            if args[i].dim() == 2:  # a weight that is used in both directions has two names
                dim = 0 if func in (F.linear, torch.conv1d) or i == 0 else 1
                name += ' (2)'*(self.out_strides.setdefault(name, args[i].stride(dim)) != args[i].stride(dim))
            (self.of_layers if of_layer else self.seen).add(name, out)
        if 'grouped_mm' in getattr(func, '__name__', '') and (f := self.find(args[1])):
            ends = kwargs['offs'].tolist()
            for i, (a, b) in enumerate(zip([0, *ends], ends)):
                if b > a: self.seen.add(f'{f[0]}[{i}]', out[a:b])
        if func is Tensor.mul and (f := self.find(args[0])) and out.shape == args[0].shape:
            self.params[out.untyped_storage().data_ptr()] = f
            self.kept.append(out)  # so that nothing else gets its memory
        return out

    def find(self, t):
        if not isinstance(t, Tensor) or t.numel() == 0: return None
        name, p, of_layer = self.params.get(t.untyped_storage().data_ptr(), ('', None, False))
        if p is None: return None
        if t.numel() == p.numel() or 0 in t.stride(): return name, p, of_layer
        first, rest = divmod(t.storage_offset(), p.stride(0))
        if t.dim() == p.dim() and t.stride() == p.stride() and rest == 0:
            part = f'{first}:{first + len(t)}' if t.shape[1] == p.shape[1] else f':, 0:{t.shape[1]}'
        else: part = str(first) if t.numel() == p[0].numel() and rest == 0 else '?'
        return f'{name}[{part}]', p, of_layer


@torch.no_grad()
def judge(model, batch):
    """Std of each conv, linear, bilinear and attention layer that runs, and of each operation, over all their calls.

    The model trains, but without dropout."""
    model = getattr(model, '_orig_mod', model)
    model.train()
    for m in model.modules():
        if 'Drop' in type(m).__name__ or 'Stochastic' in type(m).__name__:
            m.training = False
            for p in ('p', 'drop_prob'):
                if hasattr(m, p): setattr(m, p, 0.)
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)): m.dropout = 0.
        if hasattr(m, 'drop_rate'): m.drop_rate = 0.  # timm's models hand it to `F.dropout`
    inside = {c for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.modules() if c is not m}
    seen = Seen()
    def see(name):
        def hook(m, args, out): seen.add(name, out[0] if isinstance(out, tuple) else out)
        return hook
    def see_attention(name):
        def hook(m, args, kwargs):
            given = dict(zip(('query', 'key', 'value'), args)) | kwargs
            for i, (letter, x) in enumerate(zip('qkv', (given['query'], given['key'], given['value']))):
                rows = slice(i*m.embed_dim, (i + 1)*m.embed_dim)
                packed = m.in_proj_weight is not None
                weight = f'in_proj_weight[{letter}]' if packed else f'{letter}_proj_weight'
                with torch._C.DisableTorchFunction():
                    w = m.in_proj_weight[rows] if packed else getattr(m, weight)
                    out = F.linear(x, w, None if m.in_proj_bias is None else m.in_proj_bias[rows])
                seen.add(f'{name}.{weight}'.lstrip('.'), out)
        return hook
    hooks = [m.register_forward_hook(see(n)) for n, m in model.named_modules()
             if isinstance(m, LAYERS) and m not in inside]
    hooks += [m.register_forward_pre_hook(see_attention(n), with_kwargs=True) for n, m in model.named_modules()
              if isinstance(m, nn.MultiheadAttention)]
    with Operations(model, seen) as operations:
        if isinstance(batch, dict): model(**batch)
        else: model(*batch) if isinstance(batch, tuple) else model(batch)
    for h in hooks: h.remove()
    # What computes a weight from another may take it in both directions.
    of_layers = {n: s for n, s in operations.of_layers.stds().items() if '(2)' not in n}
    return {**of_layers, **seen.stds()}
