"Experiments: their networks against the documents, and their readers against good and bad files."
import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments import data as data_module
from experiments.data import InputError, get_images
from experiments.networks import ACTIVATIONS, Maxout, Residual, deep_relu, fitnet4, torch_port


def layers(model, *kinds): return [m for m in model.modules() if isinstance(m, kinds)]


def widths(model): return [m.out_channels for m in layers(model, nn.Conv2d)]


def weights(model): return [tuple(m.weight.shape) for m in layers(model, nn.Conv2d, nn.Linear)]


def shapes(model, x):
    "The shape of the output of each conv, pooling and linear layer."
    seen = []
    for m in layers(model, nn.Conv2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Linear):
        m.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:])))
    model(x)
    return seen


def test_the_ports_network():
    model = torch_port()
    outputs = shapes(model, torch.randn(2, 1, 32, 32))
    assert outputs == [(32, 28, 28), (32, 10, 10), (64, 6, 6), (64, 3, 3), (200,), (10,)]
    assert weights(model) == [(32, 1, 5, 5), (64, 32, 5, 5), (200, 576), (10, 200)]
    assert len(layers(model, nn.ReLU)) == 3


FITNET = [32]*3 + [48]*2 + [80]*6 + [128]*6


def test_fitnet4_is_the_papers_and_scales():
    model = fitnet4()
    assert widths(model) == FITNET and len(FITNET) == 17 and model[0].in_channels == 3
    assert {m.kernel_size for m in layers(model, nn.Conv2d)} == {(3, 3)}
    assert weights(model)[17:] == [(500, 128), (10, 500)]
    by_layer = shapes(model, torch.randn(1, 3, 32, 32))
    assert by_layer[:7] == [(32, 32, 32)]*3 + [(48, 32, 32)]*2 + [(48, 16, 16), (80, 16, 16)]
    assert by_layer[12:14] == [(80, 8, 8), (128, 8, 8)] and by_layer[-3:] == [(128, 1, 1), (500,), (10,)]
    assert widths(fitnet4(width=.5, depth=.5)) == [16]*2 + [24] + [40]*3 + [64]*3
    assert widths(fitnet4(width=.01, depth=.01)) == [1]*4
    normed = fitnet4(norm=True, width=.25)
    assert len(layers(normed, nn.BatchNorm2d)) == 17 and all(m.bias is None for m in layers(normed, nn.Conv2d))


def test_maxout_takes_the_larger_of_twice_as_many():
    model = fitnet4('maxout', width=.25)
    assert widths(model) == [n//2 for n in FITNET] and layers(model, nn.Conv2d)[1].in_channels == 8
    assert weights(model)[17:] == [(250, 32), (10, 125)]
    x = torch.tensor([[1., 5., -3., -4.]])
    assert Maxout()(x).tolist() == [[1., 5.]] and Maxout(4)(x).tolist() == [[5.]]
    assert Maxout()(x[..., None, None].expand(2, 4, 3, 3)).shape == (2, 2, 3, 3)
    assert ACTIVATIONS['VLReLU']()(torch.tensor([-3., 3.])).tolist() == pytest.approx([-.999, 3.])


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_the_residual_companion_has_the_same_layers(act):
    plain,residual = (fitnet4(act, width=.25, residual=r) for r in (False, True))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in residual.parameters()]
    blocks = layers(residual, Residual)
    assert [len(layers(b, nn.Conv2d)) for b in blocks] == [2, 1, 2, 2, 1, 2, 2, 1] and not layers(plain, Residual)
    residual.load_state_dict(dict(zip(residual.state_dict(), plain.state_dict().values())))
    x,y = torch.randn(2, 3, 16, 16),torch.randn(2, 8, 4, 4)
    assert plain(x).shape == residual(x).shape == (2, 10) and not torch.allclose(plain(x), residual(x))
    assert torch.allclose(blocks[0](y), y + blocks[0].layers(y))


@pytest.mark.parametrize('depth', [1, 2, 10, 200])
def test_deep_relu_has_as_many_layers_as_asked_for(depth):
    model = deep_relu(depth, 64, 7, width=5)
    assert len(layers(model, nn.Linear)) == depth and len(layers(model, nn.ReLU)) == depth - 1
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 7)


def test_digits_by_default():
    images = get_images()
    x,xv = images.train[0],images.valid[0]
    assert x.shape == (1437, 1, 28, 28) and xv.shape == (360, 1, 28, 28) and images.classes == 10
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-3
    assert not set(t.numpy().tobytes() for t in x) & set(t.numpy().tobytes() for t in xv)
    few,again = get_images(size=8, n=100),get_images(size=8, n=100)
    assert torch.equal(few.train[0], again.train[0]) and '100 and 25 are used' in few.name
    assert few.train[0].shape == (100, 1, 8, 8) and len(few.valid[0]) == len(few.dls(32).valid_ds) == 25
    assert torch.equal(few.batch(16, 1), few.batch(16, 1)) and not torch.equal(few.batch(16, 1), few.batch(16, 2))
    xb,yb = few.dls(32).train.one_batch()
    assert xb.shape == (32, 1, 8, 8) and yb.dtype == torch.int64


def idx(a):
    "An array as an IDX file."
    a = np.asarray(a, np.uint8)
    return bytes((0, 0, 8, a.ndim)) + b''.join(n.to_bytes(4, 'big') for n in a.shape) + a.tobytes()


def mnist(folder, prefix='t10k', n=20, gz=False, dot='-'):
    "MNIST's two files. Image k holds k everywhere but in its corner, and its label is k % 10."
    x = np.arange(n, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    x[:, 0, 0] = 255
    for what, a in ((f'images{dot}idx3', x), (f'labels{dot}idx1', np.arange(n) % 10)):
        raw = gzip.compress(idx(a)) if gz else idx(a)
        (folder/f'{prefix}-{what}-ubyte{".gz" if gz else ""}').write_bytes(raw)
    return folder


@pytest.mark.parametrize('gz,dot', [(False, '-'), (True, '-'), (False, '.')])
def test_mnists_test_images_alone_are_split(tmp_path, gz, dot):
    images = get_images(str(mnist(tmp_path, gz=gz, dot=dot)))
    assert "20 test images alone, split 16 / 4 with a fixed seed" in images.name and images.classes == 10
    assert images.train[0].shape == (16, 1, 28, 28) and images.valid[0].shape == (4, 1, 28, 28)
    x,y = (torch.cat(both) for both in zip(images.train, images.valid))
    assert torch.equal(y, x[:, 0, 5, 5].argsort().argsort() % 10)  # each image kept its label, and all are there
    assert torch.equal(get_images(str(tmp_path)).train[1], images.train[1])


def test_both_of_mnists_sets(tmp_path):
    images = get_images(str(mnist(mnist(tmp_path, 'train', n=30), gz=True)), size=32)
    assert images.name == 'MNIST (30 images to train on, 20 to test)'
    x,y = images.train
    assert x.shape == (30, 1, 32, 32) and y.tolist() == [k % 10 for k in range(30)]
    assert (x[:, :, :2] == x[0, 0, 0, 0]).all() and x[3, 0, 2, 2] == x.max()  # a black border
    assert get_images(str(tmp_path), size=14).train[0].shape == (30, 1, 14, 14)


IMAGES,LABELS = 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'
ZEROS = idx(np.zeros((20, 28, 28)))


@pytest.mark.parametrize('file,content,says', [
    (LABELS, None, rf'holds {IMAGES} but no {LABELS} \(or {LABELS}.gz\)'),
    (IMAGES, None, f'holds {LABELS} but no {IMAGES}'),
    (IMAGES, ZEROS[:-5], 'holds 15675 bytes of data where its header says 20x28x28'),
    (IMAGES, b'GIF89a',
     'begins with 47 49 46 38; an IDX file of unsigned bytes in 3 dimensions begins with 00 00 08 03'),
    (LABELS, b'', 'begins with nothing'),
    (LABELS, idx(np.zeros((20, 3))), '00 00 08 02; an IDX file of unsigned bytes in 1 dimension begins'),
    (LABELS, idx(np.zeros(19)), f'holds 20 images and {LABELS} 19 labels'),
    (IMAGES, gzip.compress(ZEROS)[:-9], 'a gzip file that cannot be unpacked'),
], ids=['no labels', 'no images', 'short', 'no IDX', 'empty', 'dimensions', 'count', 'short gzip'])
def test_bad_idx_files_are_named(tmp_path, file, content, says):
    path = mnist(tmp_path)/file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=says) as e: get_images(str(tmp_path))
    assert str(tmp_path) in str(e.value)


def folders(folder, train='train', test='test', mode='RGB', suffix='png'):
    "Images of one colour: cats 50, dogs 200, a little brighter each."
    for part, n in ((train, 8), (test, 4)):
        for c, name in enumerate(('cat', 'dog')):
            (folder/part/name).mkdir(parents=True)
            for k in range(n):
                color = 50 + 150*c + k if mode == 'L' else (50 + 150*c + k, k, 0)
                Image.new(mode, (8, 8), color).save(folder/part/name/f'{k}.{suffix}')
    return folder


@pytest.mark.parametrize('mode,suffix,train,test', [('RGB', 'png', 'train', 'test'), ('RGB', 'jpg', 'train', 'valid'),
                                                    ('L', 'png', 'training', 'testing')])
def test_folders_of_images(tmp_path, mode, suffix, train, test):
    images,channels = get_images(str(folders(tmp_path, train, test, mode, suffix))),len(mode)
    assert images.train[0].shape == (16, channels, 8, 8) and images.valid[0].shape == (8, channels, 8, 8)
    assert images.classes == 2 and images.channels == channels
    for x, y in (images.train, images.valid): assert torch.equal((x[:, 0, 4, 4] > 0).long(), y)
    assert images.train[0].mean((0, 2, 3)).abs().max() < 1e-5
    few = get_images(str(tmp_path), n=8, size=4)
    assert few.train[0].shape == (8, channels, 4, 4) and few.valid[0].shape == (2, channels, 4, 4) and few.classes == 2


def rename_all_images(folder):
    for p in (folder/'train').rglob('*.png'): p.rename(p.with_suffix('.txt'))


def remove_all_classes(folder):
    for p in folder.rglob('*.png'): p.unlink()
    for p in folder.rglob('*/*'): p.rmdir()


@pytest.mark.parametrize('damage,says', [
    (lambda f: (f/'test').rename(f/'other'), 'holds train/ but no test/<class>/ folders beside it'),
    (lambda f: (f/'train').rename(f/'other'), 'holds test/ but no train/<class>/ folders'),
    (lambda f: (f/'test'/'cat').rename(f/'test'/'cow'),
     r"its class folders are \['cow', 'dog'\]; those of .*train are \['cat', 'dog'\]"),
    (rename_all_images, r'its class folders hold no image \(.jpeg, .jpg, .png\)'),
    (lambda f: (f/'train'/'cat'/'3.png').write_bytes(b'no image'), 'cat/3.png: cannot be read as an image'),
    (lambda f: Image.new('RGB', (9, 8)).save(f/'train'/'dog'/'1.png'), '9x8 pixels in 3 channels'),
    (remove_all_classes, 'its class folders are none'),
])
def test_bad_folders_are_named(tmp_path, damage, says):
    damage(folders(tmp_path))
    with pytest.raises(InputError, match=says): get_images(str(tmp_path))


@pytest.mark.parametrize('args, says', [
    (dict(data='/no/such'), "got '/no/such', which is no folder; it takes 'digits', a folder of MNIST's IDX files"),
    (dict(data='.'), r'holds neither MNIST.s IDX files \(train-images-idx3-ubyte, .* nor folders train/<class>/'),
    (dict(n=-1), '--n: got -1'),
    (dict(download=True), "--download: got --data 'digits'; it takes --data mnist or --data cifar"),
])
def test_what_is_no_data_says_what_would_be(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says): get_images(**args)


def test_download_is_untar_datas(tmp_path, monkeypatch):
    asked,kept = [],folders(tmp_path)
    monkeypatch.setattr(data_module, 'untar_data', lambda url: asked.append(url) or kept)
    assert get_images('CIFAR', download=True).classes == 2 and asked[0].endswith('cifar10.tgz')
    monkeypatch.setattr(data_module, 'fastai_cfg', lambda: type('C', (), {'path': lambda self, k: tmp_path})())
    with pytest.raises(InputError, match=f"got 'mnist', and it is not in {tmp_path}; add --download"):
        get_images('mnist')
    (tmp_path/'mnist_png').mkdir()
    get_images('mnist')
    assert asked[1].endswith('mnist_png.tgz')
