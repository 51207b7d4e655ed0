"Experiments: their networks against the documents, and their readers against good and bad files."
import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments import data as data_module
from experiments.data import InputError, get_images, read_idx
from experiments.networks import ACTIVATIONS, Maxout, Residual, deep_relu, fitnet4, torch_port


def layers(model, *kinds):
    return [m for m in model.modules() if isinstance(m, kinds)]

def shapes(model, x):
    "The shape of the output of each conv, pooling and linear layer."
    seen = []
    seeing = layers(model, nn.Conv2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Linear)
    handles = [m.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:]))) for m in seeing]
    model(x)
    for h in handles:
        h.remove()
    return seen


def test_the_ports_network():
    model = torch_port()
    outputs = shapes(model, torch.randn(2, 1, 32, 32))
    weights = [tuple(m.weight.shape) for m in layers(model, nn.Conv2d, nn.Linear)]
    assert outputs == [(32, 28, 28), (32, 10, 10), (64, 6, 6), (64, 3, 3), (200,), (10,)]
    assert weights == [(32, 1, 5, 5), (64, 32, 5, 5), (200, 576), (10, 200)]
    assert len(layers(model, nn.ReLU)) == 3


FITNET = [32]*3 + [48]*2 + [80]*6 + [128]*6

def test_fitnet4_is_the_papers():
    model = fitnet4()
    convs = layers(model, nn.Conv2d)
    assert [m.out_channels for m in convs] == FITNET and len(convs) == 17
    assert {m.kernel_size for m in convs} == {(3, 3)} and convs[0].in_channels == 3
    assert [tuple(m.weight.shape) for m in layers(model, nn.Linear)] == [(500, 128), (10, 500)]
    x = torch.randn(1, 3, 32, 32)
    by_layer = shapes(model, x)
    assert by_layer[:7] == [(32, 32, 32)]*3 + [(48, 32, 32)]*2 + [(48, 16, 16), (80, 16, 16)]
    assert by_layer[12:14] == [(80, 8, 8), (128, 8, 8)] and by_layer[-3:] == [(128, 1, 1), (500,), (10,)]
    assert model(x).shape == (1, 10)


def test_maxout_takes_the_larger_of_twice_as_many():
    model = fitnet4('maxout', width=.25)
    convs = layers(model, nn.Conv2d)
    assert [m.out_channels for m in convs] == [n//2 for n in FITNET] and convs[1].in_channels == 8
    hidden,last = layers(model, nn.Linear)
    assert hidden.out_features == 250 and last.in_features == 125 and last.out_features == 10
    x = torch.tensor([[1., 5., -3., -4.]])
    assert Maxout()(x).tolist() == [[1., 5.]] and Maxout(4)(x).tolist() == [[5.]]
    assert Maxout()(x[..., None, None].expand(2, 4, 3, 3)).shape == (2, 2, 3, 3)


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_the_residual_companion_has_the_same_layers(act):
    plain,residual = (fitnet4(act, width=.25, residual=r) for r in (False, True))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in residual.parameters()]
    blocks = layers(residual, Residual)
    assert [len(layers(b, nn.Conv2d)) for b in blocks] == [2, 1, 2, 2, 1, 2, 2, 1] and not layers(plain, Residual)
    residual.load_state_dict(dict(zip(residual.state_dict(), plain.state_dict().values())))
    x = torch.randn(2, 3, 16, 16)
    assert plain(x).shape == residual(x).shape == (2, 10) and not torch.allclose(plain(x), residual(x))
    y = torch.randn(2, 8, 4, 4)
    assert torch.allclose(blocks[0](y), y + blocks[0].layers(y))


def test_very_leaky_relu_leaks_a_third():
    assert ACTIVATIONS['VLReLU']()(torch.tensor([-3., 3.])).tolist() == pytest.approx([-.999, 3.])


def test_fitnet4_scales():
    assert [m.out_channels for m in layers(fitnet4(width=.5, depth=.5), nn.Conv2d)] == [16]*2 + [24] + [40]*3 + [64]*3
    assert [m.out_channels for m in layers(fitnet4(width=.01, depth=.01), nn.Conv2d)] == [1]*4
    normed = fitnet4(norm=True, width=.25)
    assert len(layers(normed, nn.BatchNorm2d)) == 17 and all(m.bias is None for m in layers(normed, nn.Conv2d))


@pytest.mark.parametrize('depth', [1, 2, 10, 200])
def test_deep_relu_has_as_many_layers_as_asked_for(depth):
    model = deep_relu(depth, 64, 7, width=5)
    linear = layers(model, nn.Linear)
    assert len(linear) == depth and len(layers(model, nn.ReLU)) == depth - 1
    assert linear[0].in_features == 64 and linear[-1].out_features == 7
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 7)


# --- data

def test_digits_by_default():
    images = get_images()
    x,xv = images.train[0],images.valid[0]
    assert x.shape == (1437, 1, 28, 28) and xv.shape == (360, 1, 28, 28) and images.classes == 10
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-3
    assert torch.equal(get_images(size=8, n=100).train[0], get_images(size=8, n=100).train[0])
    few = get_images(size=8, n=100)
    assert few.train[0].shape == (100, 1, 8, 8) and len(few.valid[0]) == 25 and '100 and 25 are used' in few.name
    b,other = few.batch(16, 1),few.batch(16, 2)
    assert torch.equal(b, few.batch(16, 1)) and not torch.equal(b, other)
    dls = few.dls(32)
    xb,yb = dls.train.one_batch()
    assert xb.shape == (32, 1, 8, 8) and yb.dtype == torch.int64 and len(dls.valid_ds) == 25
    assert not set(map(lambda t: t.numpy().tobytes(), x)) & set(map(lambda t: t.numpy().tobytes(), xv))


def idx(a):
    "An array as an IDX file."
    a = np.asarray(a, np.uint8)
    return bytes((0, 0, 8, a.ndim)) + b''.join(n.to_bytes(4, 'big') for n in a.shape) + a.tobytes()

def mnist(folder, prefix='t10k', n=20, gz=False, dot='-'):
    "MNIST's two files. Image k holds k everywhere but in its corner, and its label is k % 10."
    x = np.arange(n, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    x[:, 0, 0] = 255
    for what, a in ((f'images{dot}idx3', x), (f'labels{dot}idx1', np.arange(n) % 10)):
        raw = idx(a)
        (folder/f'{prefix}-{what}-ubyte{".gz" if gz else ""}').write_bytes(gzip.compress(raw) if gz else raw)
    return folder


@pytest.mark.parametrize('gz,dot', [(False, '-'), (True, '-'), (False, '.')])
def test_mnists_test_images_alone_are_split(tmp_path, gz, dot):
    images = get_images(str(mnist(tmp_path, gz=gz, dot=dot)))
    assert "20 test images alone, split 16 / 4 with a fixed seed" in images.name and images.classes == 10
    assert images.train[0].shape == (16, 1, 28, 28) and images.valid[0].shape == (4, 1, 28, 28)
    x = torch.cat([images.train[0], images.valid[0]])[:, 0, 5, 5]
    y = torch.cat([images.train[1], images.valid[1]])
    assert torch.equal(y, x.argsort().argsort() % 10)  # each image kept its label, and all are there
    assert torch.equal(get_images(str(tmp_path)).train[1], images.train[1])


def test_both_of_mnists_sets(tmp_path):
    mnist(mnist(tmp_path, 'train', n=30), gz=True)
    images = get_images(str(tmp_path), size=32)
    assert images.name == 'MNIST (30 images to train on, 20 to test)'
    assert images.train[1].tolist() == [k % 10 for k in range(30)]
    x = images.train[0]
    assert x.shape == (30, 1, 32, 32)
    assert (x[:, :, :2] == x[0, 0, 0, 0]).all() and x[3, 0, 2, 2] == x.max()  # a black border
    assert get_images(str(tmp_path), size=14).train[0].shape == (30, 1, 14, 14)


IMAGES,LABELS = 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'
SHORT_GZIP = gzip.compress(idx(np.zeros((20, 28, 28))))[:-9]

@pytest.mark.parametrize('file,content,says', [
    (LABELS, None, rf'holds {IMAGES} but no {LABELS} \(or {LABELS}.gz\)'),
    (IMAGES, None, f'holds {LABELS} but no {IMAGES}'),
    (IMAGES, idx(np.zeros((20, 28, 28)))[:-5], 'holds 15675 bytes of data where its header says 20x28x28'),
    (IMAGES, b'GIF89a',
     'begins with 47 49 46 38; an IDX file of unsigned bytes in 3 dimensions begins with 00 00 08 03'),
    (LABELS, b'', 'begins with nothing'),
    (LABELS, idx(np.zeros((20, 3))), '00 00 08 02; an IDX file of unsigned bytes in 1 dimension begins'),
    (LABELS, idx(np.zeros(19)), f'holds 20 images and {LABELS} 19 labels'),
    (IMAGES, SHORT_GZIP, 'a gzip file that cannot be unpacked'),
], ids=['no labels', 'no images', 'short', 'no IDX', 'empty', 'dimensions', 'count', 'short gzip'])
def test_bad_idx_files_are_named(tmp_path, file, content, says):
    mnist(tmp_path)
    if content is None:
        (tmp_path/file).unlink()
    else:
        (tmp_path/file).write_bytes(content)
    with pytest.raises(InputError, match=says) as e:
        get_images(str(tmp_path))
    assert str(tmp_path) in str(e.value)


def test_read_idx_gives_what_was_written(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (3, 4, 5))
    (tmp_path/'a').write_bytes(idx(a))
    assert read_idx(tmp_path/'a', 3).tolist() == a.tolist()


def folders(folder, train='train', test='test', mode='RGB', suffix='png', size=8, classes=('cat', 'dog')):
    "Images of one colour: cats 50, dogs 200, a little brighter each."
    for part, n in ((train, 8), (test, 4)):
        for c, name in enumerate(classes):
            (folder/part/name).mkdir(parents=True)
            for k in range(n):
                color = 50 + 150*c + k if mode == 'L' else (50 + 150*c + k, k, 0)
                Image.new(mode, (size, size), color).save(folder/part/name/f'{k}.{suffix}')
    return folder


@pytest.mark.parametrize('mode,suffix,train,test', [
    ('RGB', 'png', 'train', 'test'),
    ('L', 'png', 'training', 'testing'),
    ('RGB', 'jpg', 'train', 'valid'),
])
def test_folders_of_images(tmp_path, mode, suffix, train, test):
    images = get_images(str(folders(tmp_path, train, test, mode, suffix)))
    channels = 3 if mode == 'RGB' else 1
    assert images.train[0].shape == (16, channels, 8, 8) and images.valid[0].shape == (8, channels, 8, 8)
    assert images.classes == 2 and images.channels == channels
    for x, y in (images.train, images.valid):
        assert torch.equal((x[:, 0, 4, 4] > 0).long(), y)
    assert images.train[0].mean((0, 2, 3)).abs().max() < 1e-5
    few = get_images(str(tmp_path), n=8, size=4)
    assert few.train[0].shape == (8, channels, 4, 4) and few.valid[0].shape == (2, channels, 4, 4) and few.classes == 2


def rename_all_images(folder):
    for p in (folder/'train').rglob('*.png'):
        p.rename(p.with_suffix('.txt'))


def remove_all_classes(folder):
    for p in folder.rglob('*.png'):
        p.unlink()
    for p in folder.rglob('*/*'):
        p.rmdir()


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
    with pytest.raises(InputError, match=says):
        get_images(str(tmp_path))


def test_what_is_no_data_says_what_would_be(tmp_path):
    said = "--data: got '/no/such', which is no folder; it takes 'digits', a folder of MNIST's IDX files"
    with pytest.raises(InputError, match=said):
        get_images('/no/such')
    said = r'holds neither MNIST.s IDX files \(train-images-idx3-ubyte, .* nor folders train/<class>/'
    with pytest.raises(InputError, match=said):
        get_images(str(tmp_path))
    with pytest.raises(InputError, match='--n: got -1'):
        get_images(n=-1)
    with pytest.raises(InputError, match="--download: got --data 'digits'; it takes --data mnist or --data cifar"):
        get_images(download=True)


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
