"Tasks of the study `benefit`, all of them in memory: images, segments, tables and text."
from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pydoc_data.topics import topics  # the documentation of Python that comes with Python
from typing import Any, Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, default_device
from fastai.tabular.core import Categorify, CategoryBlock, FillMissing, Normalize, TabularPandas
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor

from fastai_lsuv.demo import loaders

from .data import Images

__all__ = ['Task', 'classify', 'segment', 'diabetes', 'tumours', 'pages', 'characters']

_HELD_OUT = 5  # One in so many samples is to test


@dataclass(frozen=True)
class Task:
    "Data, the loss to train by, and what a constant answer scores."
    name: str  # The data, in words
    loss: Callable[[Tensor, Tensor], Tensor]  # Of predictions and targets
    score: Callable[[Tensor, Tensor], Tensor]  # The share that is right, or that is explained; more is better
    constant: float  # Loss of the best constant answer
    dls: Callable[[int], DataLoaders]  # For a batch size
    n_in: int = 0  # Channels, columns or words that come in
    n_out: int = 0  # Classes or numbers that go out


def accuracy(pred: Tensor, y: Tensor) -> Tensor:
    "Share of the right answers. The classes are the second dimension of `pred`."
    return (pred.argmax(1) == y).float().mean()


def explained(pred: Tensor, y: Tensor) -> Tensor:
    "Share of the variance that is explained. The targets have mean 0 and std 1."
    return 1 - F.mse_loss(pred, y)


def cross_entropy(pred: Tensor, y: Tensor) -> Tensor: return F.cross_entropy(pred, y)
def squares(pred: Tensor, y: Tensor) -> Tensor: return F.mse_loss(pred, y)


def entropy(y: Tensor) -> float:
    "The cross-entropy of the best constant answer to classes `y`."
    share = torch.bincount(y.flatten()).double()/y.numel()
    return -(share*share.clamp(min=1e-30).log()).sum().item()


def _task(name: str, train: tuple, valid: tuple, **kwargs: Any) -> Task:
    "A task on tensors."
    def dls(bs): return loaders(train, valid, bs=bs, val_bs=256, device=default_device())
    if train[1].dtype == torch.int64:
        kwargs = dict(loss=cross_entropy, score=accuracy, constant=entropy(train[1])) | kwargs
    return Task(name, dls=dls, **kwargs)


def classify(images: Images) -> Task:
    "Classify images."
    return _task(images.name, images.train, images.valid, n_in=images.channels, n_out=images.classes)


def segment(images: Images) -> Task:
    "Find the bright pixels of images and tell of which class they are. All other pixels are class 0."
    def masked(x, y): return x, torch.where(x.mean(1) > .5, y[:, None, None] + 1, 0)
    train,valid = masked(*images.train),masked(*images.valid)
    kwargs = dict(score=_foreground, n_in=images.channels, n_out=images.classes + 1)
    return _task(f'{images.name}, to segment', train, valid, **kwargs)


def _foreground(pred: Tensor, y: Tensor) -> Tensor:
    "Share of the pixels of a class other than 0 that are told right."
    return (pred.argmax(1) == y)[y > 0].float().mean()


def diabetes() -> Task:
    "Predict how diabetes progresses from ten numbers: scikit-learn's 442 patients."
    x,y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    x,y = (x - x.mean(0))/x.std(0),((y - y.mean())/y.std())[:, None]
    parts = [(x[i], y[i]) for i in _split(len(x))]
    return _task("scikit-learn's diabetes", *parts, loss=squares, score=explained, constant=1., n_in=10, n_out=1)


def tumours() -> Task:
    "Tell malignant tumours from benign ones: scikit-learn's breast cancer, in fastai's tabular DataLoaders."
    x,y = load_breast_cancer(return_X_y=True, as_frame=True)
    x['size'] = pd.qcut(x['mean area'], 8).cat.codes.astype(str)  # one column is categorical
    numbers = [c for c in x if c != 'size']
    train,valid = (i.tolist() for i in _split(len(x)))
    tables = TabularPandas(x.assign(y=y), [Categorify, FillMissing, Normalize], ['size'], numbers, 'y',
                           CategoryBlock(), splits=(train, valid))
    def dls(bs): return tables.dataloaders(bs=bs, val_bs=256, device=default_device())
    def loss(pred, y): return F.cross_entropy(pred, y.flatten().long())
    def score(pred, y): return accuracy(pred, y.flatten())
    return Task("scikit-learn's breast cancer", loss, score, entropy(torch.tensor(y.to_numpy())), dls, n_out=2)


def pages(
    classes: int = 6,  # The longest pages
    length: int = 30,  # Words of each sample
    vocab: int = 600  # Words that are told apart
) -> Task:
    "Tell from which page of Python's documentation some words are."
    words = {name: re.findall(r'[a-z]+|[^\sa-z]', text.lower()) for name, text in topics.items()}
    longest = sorted(words.values(), key=len)[-classes:]
    common = Counter(w for page in longest for w in page).most_common(vocab - 2)
    number = {w: i + 2 for i, (w, _) in enumerate(common)}  # 0 is an unknown word, 1 is padding
    x = [torch.tensor([number.get(w, 0) for w in page]) for page in longest]
    x = [_windows(page, length) for page in x]
    y = torch.cat([torch.full((len(w),), c) for c, w in enumerate(x)])
    x = torch.cat(x)
    parts = [(x[i], y[i]) for i in _split(len(x))]
    return _task("pages of Python's documentation", *parts, n_in=vocab, n_out=classes)


def characters(
    length: int = 32,  # Characters of each sample
    n: int = 1500  # Samples to train on
) -> Task:
    "Predict the next character of Python's documentation."
    text = ''.join(topics[name] for name in sorted(topics))
    known = sorted({c for c in text if c.isascii()})
    number = {c: i for i, c in enumerate(known)}
    x = _windows(torch.tensor([number[c] for c in text if c in number]), length + 1)
    parts = [(x[i][:, :-1], x[i][:, 1:].contiguous()) for i in _split(len(x))]
    train,valid = ((x[:most], y[:most]) for (x, y), most in zip(parts, (n, n//4)))
    return _task("characters of Python's documentation", train, valid, n_in=len(known), n_out=len(known))


def _windows(x: Tensor, length: int) -> Tensor: return x[:len(x)//length*length].view(-1, length)


def _split(n: int) -> tuple[Tensor, Tensor]:
    "The numbers below `n` that are to train on, and those that are to test, always the same."
    at = torch.from_numpy(np.random.RandomState(42).permutation(n))
    return at[n//_HELD_OUT:],at[:n//_HELD_OUT]
