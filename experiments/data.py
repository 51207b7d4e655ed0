"Data of the experiments, all of it in memory: scikit-learn's digits, MNIST's IDX files, folders of images."
from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import Callback, DataLoaders, default_device, progress_bar
from fastai.data.external import URLs, fastai_cfg, untar_data
from PIL import Image
from torch import Tensor

from fastai_lsuv.demo import loaders, shuffled, split_digits

__all__ = ['InputError', 'Images', 'Augment', 'shifted', 'read_idx', 'get_images']

_TRAIN,_TEST = ('train', 'training'), ('test', 'testing', 'valid')
_SUFFIXES = {'.png', '.jpg', '.jpeg'}


class InputError(ValueError):
    "An option or a file is wrong. The message says what is expected."


@dataclass(frozen=True)
class Images:
    "Images with mean 0 and std 1 in each channel (of those to train on), and their classes."
    name: str  # The data and its split, in words
    train: tuple[Tensor, Tensor]  # (N, C, H, W) float32, and (N,) int64
    valid: tuple[Tensor, Tensor]
    classes: int

    @property
    def channels(self) -> int:
        "Channels of each image."
        return self.train[0].shape[1]

    def dls(self,
        bs: int  # Batch size
    ) -> DataLoaders:
        "The images in fastai's DataLoaders, on the GPU if there is one."
        return loaders(self.train, self.valid, bs=bs, val_bs=500, device=default_device())

    def batch(self,
        bs: int,  # Images to draw, at most all
        seed: int  # Of the draw
    ) -> Tensor:
        "Images to train on, drawn at random."
        x = self.train[0]
        return x[shuffled(len(x), seed)[:bs]]


def shifted(
    x: Tensor,  # Images (N, C, H, W)
    down: Tensor,  # (N,): pixels to move each image down
    right: Tensor,  # (N,): pixels to move it to the right
    flip: Tensor  # (N,): whether to mirror it left to right first
) -> Tensor:
    "Move and mirror each image. Zeros, the mean of the images, come in at the edges."
    n,c,h,w = x.shape
    most = int(torch.cat([down, right]).abs().max())
    x = F.pad(torch.where(flip[:, None, None, None], x.flip(3), x), (most,)*4)
    rows = torch.arange(h, device=x.device) + (most - down)[:, None]
    cols = torch.arange(w, device=x.device) + (most - right)[:, None]
    at = torch.arange(n, device=x.device)[:, None, None, None], torch.arange(c, device=x.device)[None, :, None, None]
    return x[(*at, rows[:, None, :, None], cols[:, None, None, :])]


class Augment(Callback):
    "Flip each training image at random, and shift it by up to an eighth of its side."
    def before_batch(self):
        if not self.training: return
        x, = self.learn.xb
        most = x.shape[-1]//8
        down,right = torch.randint(-most, most + 1, (2, len(x)), device=x.device)
        self.learn.xb = (shifted(x, down, right, torch.rand(len(x), device=x.device) < .5),)


def read_idx(
    path: Path,  # A file of unsigned bytes in MNIST's IDX format, gzipped or not
    dims: int  # Dimensions that it must have: 3 for images, 1 for labels
) -> Tensor:  # uint8
    "Read an IDX file."
    raw = path.read_bytes()
    if raw[:2] == b'\x1f\x8b':
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{path}: a gzip file that cannot be unpacked ({e}); get it again") from None
    head = 4 + 4*dims
    if raw[:4] != bytes((0, 0, 8, dims)) or len(raw) < head:
        raise InputError(f"{path}: begins with {raw[:4].hex(' ') or 'nothing'}; an IDX file of unsigned bytes "
                         f"in {dims} dimension{'s'*(dims > 1)} begins with 00 00 08 {dims:02d}")
    shape = np.frombuffer(raw, '>u4', dims, 4).tolist()
    if len(raw) - head != np.prod(shape):
        said = 'x'.join(map(str, shape))
        raise InputError(f"{path}: holds {len(raw) - head} bytes of data where its header says {said}; get it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())


def _idx_set(folder: Path, prefix: str) -> tuple[Tensor, Tensor] | None:
    "Images (N, 1, H, W) and classes of MNIST's `train` or `t10k` files, or `None` if neither file is there."
    def find(what: str, kind: str) -> Path | None:
        names = (f'{prefix}-{what}{dot}{kind}-ubyte{gz}' for dot in '-.' for gz in ('', '.gz'))
        return next((folder/name for name in names if (folder/name).is_file()), None)
    images,labels = find('images', 'idx3'),find('labels', 'idx1')
    if images is None and labels is None: return None
    if images is None or labels is None:
        missing = f"{prefix}-{'images-idx3' if images is None else 'labels-idx1'}-ubyte"
        raise InputError(f"{folder}: holds {(images or labels).name} but no {missing} (or {missing}.gz)")
    x,y = read_idx(images, 3),read_idx(labels, 1)
    if len(x) != len(y):
        raise InputError(f"{folder}: {images.name} holds {len(x)} images and {labels.name} {len(y)} labels; "
                         "they belong to different sets")
    return x[:, None], y.long()


def _classes(*parts: tuple[Tensor, Tensor]) -> int:
    return max(int(y.max()) for _, y in parts) + 1


def _from_idx(folder: Path) -> tuple | None:
    "MNIST: its 60,000 and 10,000 images, or the 10,000 alone, split 8,000 / 2,000."
    train,test = _idx_set(folder, 'train'),_idx_set(folder, 't10k')
    if train is None and test is None: return None
    if train and test:
        name = f'MNIST ({len(train[0])} images to train on, {len(test[0])} to test)'
        return train, test, _classes(train, test), name
    which = 'test' if train is None else 'training'
    x,y = test or train
    idx = shuffled(len(x))
    cut = len(x)*4//5
    parts = [(x[i], y[i]) for i in (idx[:cut], idx[cut:])]
    name = f"MNIST's {len(x)} {which} images alone, split {cut} / {len(x) - cut} with a fixed seed"
    return *parts, _classes(*parts), name


def _from_folders(folder: Path, n: int) -> tuple | None:
    "Images in `train/<class>/` and `test/<class>/`. It reads only `n` images, and a quarter as many to test."
    def find(names: tuple[str, ...]) -> Path | None:
        return next((folder/name for name in names if (folder/name).is_dir()), None)
    train,test = find(_TRAIN),find(_TEST)
    if train is None and test is None: return None
    if train is None or test is None:
        missing = 'train' if train is None else 'test'
        raise InputError(f"{folder}: holds {(train or test).name}/ but no {missing}/<class>/ folders beside it")
    classes = _subfolders(train)
    for part in train, test:
        here = _subfolders(part)
        if here != classes or not classes:
            raise InputError(f"{part}: its class folders are {here or 'none'}; "
                             f"those of {train} are {classes or 'none'}")
    parts = _read(train, classes, n),_read(test, classes, _to_test(n))
    name = f'{folder.name}: {len(parts[0][0])} images to train on, {len(parts[1][0])} to test'
    return *parts, len(classes), name


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def _read(
    part: Path,  # It holds a folder a class
    classes: list[str],
    most: int  # Images to read, chosen at random; 0: all
) -> tuple[Tensor, Tensor]:
    "Images (N, C, H, W) and their classes."
    files = [(p, c) for c, name in enumerate(classes) for p in sorted((part/name).iterdir())]
    files = [(p, c) for p, c in files if p.suffix.lower() in _SUFFIXES]
    if not files: raise InputError(f"{part}: its class folders hold no image ({', '.join(sorted(_SUFFIXES))})")
    files = [files[i] for i in shuffled(len(files)).tolist()[:most or None]]
    images = [_pixels(p) for p, _ in progress_bar(files, leave=False)]
    for (path, _), image in zip(files, images):
        if image.shape != images[0].shape:
            raise InputError(f"{path}: {_shape(image)}, where {files[0][0]} has {_shape(images[0])}; "
                             "all images must have one shape")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor([c for _, c in files])


def _to_test(n: int) -> int:
    "Images to test, for `n` to train on."
    return max(n//4, 1) if n else 0


def _shape(x: np.ndarray) -> str:
    height,width,channels = x.shape
    return f'{width}x{height} pixels in {channels} channel{"s"*(channels > 1)}'


def _pixels(path: Path) -> np.ndarray:
    "An image as (H, W, C) bytes: grey if it is grey, else RGB."
    try:
        with Image.open(path) as im:
            x = np.asarray(im if im.mode == 'L' else im.convert('RGB'))
    except OSError as e: raise InputError(f"{path}: cannot be read as an image ({e})") from None
    return x[..., None] if x.ndim == 2 else x


def _sized(x: Tensor, size: int | None) -> Tensor:
    """Bytes as float32 with `size` pixels a side.

    A black border makes 32 of 28, as in the Torch port. Interpolation makes all other sizes."""
    x = x.float()
    if size is None or x.shape[-2:] == (size, size): return x
    if x.shape[-2:] == (28, 28) and size == 32: return F.pad(x, (2,)*4)
    return F.interpolate(x, size, mode='bilinear', antialias=size < x.shape[-1])


def _folder(data: str, download: bool) -> Path:
    "The folder of the data that `--data` names."
    url = {'mnist': URLs.MNIST, 'cifar': URLs.CIFAR}.get(data.lower())
    if url is None:
        if download: raise InputError(f"--download: got --data {data!r}; it takes --data mnist or --data cifar")
        if not Path(data).is_dir():
            raise InputError(f"--data: got {data!r}, which is no folder; it takes 'digits', "
                             "a folder of MNIST's IDX files or of train/<class>/ and test/<class>/ images, "
                             "or 'mnist' or 'cifar' as fastai keeps them")
        return Path(data)
    kept = fastai_cfg().path('data')/Path(url).stem
    if not download and not kept.is_dir():
        raise InputError(f"--data: got {data!r}, and it is not in {kept.parent}; "
                         "add --download, or name a folder of your own")
    return untar_data(url)


def get_images(
    data: str = 'digits',  # 'digits', a folder, or 'mnist' or 'cifar' as fastai keeps them
    *,
    size: int | None = None,  # Pixels a side; by default 28 for digits, and the size in the files for all else
    n: int = 0,  # Images to train on, and a quarter as many to test; 0: all
    download: bool = False  # Let fastai's `untar_data` fetch 'mnist' or 'cifar'
) -> Images:
    "Images to train on and to test, with mean 0 and std 1. Raises `InputError`, which says what is expected."
    if n < 0: raise InputError(f"--n: got {n}; it takes 0 (all) or a positive number of images")
    if data == 'digits' and not download:
        train,valid = split_digits(size or 28)
        classes,name = 10,f"scikit-learn's digits ({len(train[0])} images to train on, {len(valid[0])} to test)"
    else:
        folder = _folder(data, download)
        found = _from_idx(folder) or _from_folders(folder, n)
        if found is None:
            raise InputError(f"{folder}: holds neither MNIST's IDX files (train-images-idx3-ubyte, "
                             "train-labels-idx1-ubyte, t10k-..., each with or without .gz) "
                             "nor folders train/<class>/ and test/<class>/")
        *parts,classes,name = found
        train,valid = ((_sized(x, size), y) for x, y in parts)
    if n and n < len(train[0]):
        train,valid = (tuple(t[:most] for t in part) for part, most in ((train, n), (valid, _to_test(n))))
        name += f', of which {n} and {len(valid[0])} are used'
    mean,std = train[0].mean((0, 2, 3), keepdim=True),train[0].std((0, 2, 3), keepdim=True)
    train,valid = (((x - mean)/std.clamp(min=1e-6), y) for x, y in (train, valid))
    return Images(name, train, valid, classes)
