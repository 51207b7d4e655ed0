"Data of the experiments, all of it in memory: scikit-learn's digits, MNIST's IDX files, folders of images."
from __future__ import annotations

import gzip, zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, default_device, progress_bar
from fastai.data.external import URLs, fastai_cfg, untar_data
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ['InputError', 'Images', 'digits', 'read_idx', 'get_images']

_SEED = 42  # Of every split and every choice of images, so that they are always alike
_TRAIN,_TEST = ('train', 'training'), ('test', 'testing', 'valid')
_SUFFIXES = {'.png', '.jpg', '.jpeg'}


class InputError(ValueError): "What was asked for cannot be had; the message says what can."


@dataclass(frozen=True)
class Images:
    "Images with mean 0 and std 1 in each channel (of those to train on), and their classes."
    name: str  # What they are and how they are split, in words
    train: tuple[Tensor, Tensor]  # (N, C, H, W) float32, and (N,) int64
    valid: tuple[Tensor, Tensor]
    classes: int

    def dls(self,
        bs: int  # Batch size
    ) -> DataLoaders:
        "In fastai's DataLoaders, on the GPU if there is one."
        return DataLoaders.from_dsets(*(list(zip(*part)) for part in (self.train, self.valid)), bs=bs, val_bs=500, num_workers=0, device=default_device())

    def batch(self,
        bs: int,  # Images to draw, at most all
        seed: int  # Of the draw
    ) -> Tensor:
        "Images to train on, drawn at random."
        return self.train[0][torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(seed))[:bs]]


def digits(
    size: int = 28  # Pixels a side that the 8x8 images are enlarged to
) -> tuple[Tensor, Tensor]:  # Images (1797, 1, size, size) with mean 0 and std 1, and their classes
    "scikit-learn's digits, which come with it."
    images,classes = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8), size, mode='bilinear')
    return (x - x.mean())/x.std(), torch.tensor(classes)


def read_idx(
    path: Path,  # A file of unsigned bytes in MNIST's IDX format, gzipped or not
    dims: int  # Dimensions it is to have: 3 for images, 1 for labels
) -> Tensor:  # uint8
    "What an IDX file holds."
    raw = path.read_bytes()
    if raw[:2] == b'\x1f\x8b':
        try: raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as e: raise InputError(f"{path}: a gzip file that cannot be unpacked ({e}); get it again") from None
    head = 4 + 4*dims
    if raw[:4] != bytes((0, 0, 8, dims)) or len(raw) < head:
        raise InputError(f"{path}: begins with {raw[:4].hex(' ') or 'nothing'}; "
                         f"an IDX file of unsigned bytes in {dims} dimension{'s'*(dims > 1)} begins with 00 00 08 {dims:02d}")
    shape = np.frombuffer(raw, '>u4', dims, 4).tolist()
    if len(raw) - head != np.prod(shape):
        raise InputError(f"{path}: holds {len(raw) - head} bytes of data where its header says {'x'.join(map(str, shape))}; get it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())


def _idx_set(folder: Path, prefix: str) -> tuple[Tensor, Tensor] | None:
    "Images (N, 1, H, W) and classes of MNIST's `train` or `t10k` files, or `None` if neither is there."
    def find(what): return next((p for dot in '-.' for gz in ('', '.gz') if (p := folder/f'{prefix}-{what[0]}{dot}{what[1]}-ubyte{gz}').is_file()), None)
    files = find(('images', 'idx3')), find(('labels', 'idx1'))
    if files == (None, None): return None
    if None in files:
        missing = f"{prefix}-{('images-idx3', 'labels-idx1')[files.index(None)]}-ubyte"
        raise InputError(f"{folder}: holds {next(filter(None, files)).name} but no {missing} (or {missing}.gz)")
    x,y = read_idx(files[0], 3),read_idx(files[1], 1)
    if len(x) != len(y): raise InputError(f"{folder}: {files[0].name} holds {len(x)} images and {files[1].name} {len(y)} labels; they belong to different sets")
    return x[:, None], y.long()


def _classes(*parts: tuple[Tensor, Tensor]) -> int: return max(int(y.max()) for _, y in parts) + 1


def _from_idx(folder: Path) -> tuple | None:
    "MNIST: its 60,000 and 10,000 images, or the 10,000 alone, split 8,000 / 2,000."
    train,test = _idx_set(folder, 'train'),_idx_set(folder, 't10k')
    if train is None and test is None: return None
    if train and test: return train, test, _classes(train, test), f'MNIST ({len(train[0])} images to train on, {len(test[0])} to test)'
    which = 'test' if train is None else 'training'
    x,y = test or train
    idx = _shuffled(len(x))
    cut = len(x)*4//5
    parts = [(x[i], y[i]) for i in (idx[:cut], idx[cut:])]
    return *parts, _classes(*parts), f"MNIST's {len(x)} {which} images alone, split {cut} / {len(x) - cut} with a fixed seed"


def _from_folders(folder: Path, n: int) -> tuple | None:
    "Images in `train/<class>/` and `test/<class>/`; no more of them are read than are asked for."
    parts = [next((folder/name for name in names if (folder/name).is_dir()), None) for names in (_TRAIN, _TEST)]
    if parts == [None, None]: return None
    if None in parts:
        missing = ('train', 'test')[parts.index(None)]
        raise InputError(f"{folder}: holds {next(filter(None, parts)).name}/ but no {missing}/<class>/ folders beside it")
    classes = sorted(p.name for p in parts[0].iterdir() if p.is_dir())
    found = []
    for part, most in zip(parts, (n, _to_test(n))):
        here = sorted(p.name for p in part.iterdir() if p.is_dir())
        if here != classes or not classes: raise InputError(f"{part}: its class folders are {here or 'none'}; those of {parts[0]} are {classes or 'none'}")
        files = [(p, c) for c, name in enumerate(classes) for p in sorted((part/name).iterdir()) if p.suffix.lower() in _SUFFIXES]
        if not files: raise InputError(f"{part}: its class folders hold no image ({', '.join(sorted(_SUFFIXES))})")
        files = [files[i] for i in _shuffled(len(files)).tolist()[:most or None]]
        x = [_pixels(p) for p, _ in progress_bar(files, leave=False)]
        odd = next((i for i, o in enumerate(x) if o.shape != x[0].shape), None)
        if odd is not None: raise InputError(f"{files[odd][0]}: {_shape(x[odd])}, where {files[0][0]} has {_shape(x[0])}; all images are to be alike")
        found.append((torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2), torch.tensor([c for _, c in files])))
    return *found, len(classes), f'{folder.name}: {len(found[0][0])} images to train on, {len(found[1][0])} to test'


def _to_test(n: int) -> int: return max(n//4, 1) if n else 0
def _shuffled(n: int) -> Tensor: return torch.randperm(n, generator=torch.Generator().manual_seed(_SEED))
def _shape(x: np.ndarray) -> str: return f'{x.shape[1]}x{x.shape[0]} pixels in {x.shape[2]} channel{"s"*(x.shape[2] > 1)}'


def _pixels(path: Path) -> np.ndarray:
    "An image as (H, W, C) bytes: grey if it is grey, else RGB."
    try:
        with Image.open(path) as im: x = np.asarray(im if im.mode == 'L' else im.convert('RGB'))
    except OSError as e: raise InputError(f"{path}: cannot be read as an image ({e})") from None
    return x[..., None] if x.ndim == 2 else x


def _sized(x: Tensor, size: int | None) -> Tensor:
    "Bytes as float32 with `size` pixels a side: 28 become 32 by a black border, as in the Torch port, all else by interpolation."
    x = x.float()
    if size is None or x.shape[-2:] == (size, size): return x
    if x.shape[-2:] == (28, 28) and size == 32: return F.pad(x, (2,)*4)
    return F.interpolate(x, size, mode='bilinear', antialias=size < x.shape[-1])


def _folder(data: str, download: bool) -> Path:
    "Where the data is that `--data` names."
    url = {'mnist': URLs.MNIST, 'cifar': URLs.CIFAR}.get(data.lower())
    if url is None:
        if download: raise InputError(f"--download: got --data {data!r}; it takes --data mnist or --data cifar")
        if not Path(data).is_dir():
            raise InputError(f"--data: got {data!r}, which is no folder; it takes 'digits', a folder of MNIST's IDX files or of "
                             "train/<class>/ and test/<class>/ images, or 'mnist' or 'cifar' as fastai keeps them")
        return Path(data)
    kept = fastai_cfg().path('data')/Path(url).stem
    if not download and not kept.is_dir():
        raise InputError(f"--data: got {data!r}, and it is not in {kept.parent}; add --download, or name a folder of your own")
    return untar_data(url)


def get_images(
    data: str = 'digits',  # 'digits', a folder, or 'mnist' or 'cifar' as fastai keeps them
    *,
    size: int | None = None,  # Pixels a side; as they come by default (28 for digits)
    n: int = 0,  # Images to train on, and a quarter as many to test; 0: all
    download: bool = False  # Let fastai's `untar_data` fetch 'mnist' or 'cifar'
) -> Images:
    "Images to train on and to test, with mean 0 and std 1. Raises `InputError`, naming what was expected."
    if n < 0: raise InputError(f"--n: got {n}; it takes 0 (all) or a positive number of images")
    if data == 'digits' and not download:
        x,y = digits(size or 28)
        idx = _shuffled(len(x))
        train,valid = ((x[i], y[i]) for i in (idx[360:], idx[:360]))
        classes,name = 10,f"scikit-learn's digits ({len(x) - 360} images to train on, 360 to test)"
    else:
        folder = _folder(data, download)
        found = _from_idx(folder) or _from_folders(folder, n)
        if found is None:
            raise InputError(f"{folder}: holds neither MNIST's IDX files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., each with or without "
                             ".gz) nor folders train/<class>/ and test/<class>/")
        *parts,classes,name = found
        train,valid = ((_sized(x, size), y) for x, y in parts)
    if n and n < len(train[0]):
        train,valid = ((x[:m], y[:m]) for (x, y), m in ((train, n), (valid, _to_test(n))))
        name += f', of which {n} and {len(valid[0])} are used'
    mean,std = (getattr(train[0], stat)((0, 2, 3), keepdim=True) for stat in ('mean', 'std'))
    train,valid = (((x - mean)/std.clamp(min=1e-6), y) for x, y in (train, valid))
    return Images(name, train, valid, classes)
