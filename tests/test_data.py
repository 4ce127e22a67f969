"""The prepared folders: what timm reads from them, the paper's augmentation pixel by pixel, interruption, bad input."""

import gzip
import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from test_inference import odd_images
from timm.data import create_dataset, create_loader
from torchvision.datasets import CIFAR10

from timm_msar.cli import data
from timm_msar_command import main

RECIPES = Path(__file__).parents[1] / 'train_configs'


def run(*words):
    return main(['data', *map(str, words)])


def refused(capsys, *words):
    """The sentence with which `timm-msar data WORDS` refuses."""
    assert run(*words) == 1
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix('timm-msar data: error: ')


def noise(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_cifar(folder, monkeypatch):
    """Write noise in the layout of the Python version of CIFAR-10, and make torchvision expect these files' MD5."""
    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(filename, content):
        packed = pickle.dumps(content)
        (base / filename).write_bytes(packed)
        return hashlib.md5(packed).hexdigest()

    lists, images = {'train_list': [], 'test_list': []}, {'train_list': [], 'test_list': []}
    for attribute, parts in lists.items():
        for filename, _ in getattr(CIFAR10, attribute):
            seed = len(images['train_list']) + len(images['test_list'])
            pixels = noise(20, 3, 32, 32, seed=seed)
            content = {'data': pixels.reshape(20, -1), 'labels': [*range(10)] * 2}
            parts.append([filename, write(filename, content)])
            images[attribute].append(pixels.transpose(0, 2, 3, 1))
        monkeypatch.setattr(CIFAR10, attribute, parts)
    md5 = write(CIFAR10.meta['filename'], {CIFAR10.meta['key']: CIFAR10_NAMES})
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | {'md5': md5})
    return np.concatenate(images['train_list']), np.concatenate(images['test_list'])


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A folder of noise in the format of Fashion-MNIST's four files, label = index modulo 10, with its checksums."""
    source, images, md5 = tmp_path / 'source', [], {}
    source.mkdir()
    for name, count in (('train', 40), ('t10k', 20)):
        images.append(noise(count, 28, 28, seed=count))
        labels = bytes(index % 10 for index in range(count))
        for kind, header, content in (
            ('images-idx3', struct.pack('>IIII', 0x803, count, 28, 28), images[-1].tobytes()),
            ('labels-idx1', struct.pack('>II', 0x801, count), labels),
        ):
            (source / f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(header + content))
            md5[f'{name}-{kind}-ubyte'] = hashlib.md5(header + content).hexdigest()
    monkeypatch.setattr(data, 'FASHION_MNIST_MD5', md5)
    return source, tmp_path / 'root', images


CIFAR10_NAMES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def checked_classes(root, train, validation):
    """Check that every 32×32 image is there as timm reads it, padded to 40×40 for training; return the classes."""
    for split, images, width in (('train', train, 4), ('validation', validation, 0)):
        dataset = create_dataset('', root=str(root), split=split)
        assert len(dataset) == len(images)
        for path, (image, label) in zip(dataset.filenames(basename=True), dataset, strict=True):
            index = int(path.removesuffix('.png'))
            assert label == index % 10
            assert np.array_equal(np.asarray(image), np.pad(images[index], [(width, width)] * 2 + [(0, 0)]))
    return list(dataset.reader.class_to_idx)


def test_cifar_folder_holds_every_image_under_its_label(tmp_path, monkeypatch, capsys):
    train, test = write_cifar(tmp_path / 'source', monkeypatch)
    run('cifar10', tmp_path / 'root', '--source', tmp_path / 'source')
    assert checked_classes(tmp_path / 'root', train, test) == CIFAR10_NAMES
    assert json.loads((tmp_path / 'root' / 'dataset.json').read_text())['classes'] == CIFAR10_NAMES
    assert f'{len(train)} training, {len(test)} validation images' in capsys.readouterr().out


def test_cifar_with_a_wrong_checksum_is_not_unpickled(tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path / 'source', monkeypatch)
    ran = tmp_path / 'ran'
    code = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    (tmp_path / 'source' / CIFAR10.base_folder / 'data_batch_3').write_bytes(code)
    error = refused(capsys, 'cifar10', tmp_path / 'root', '--source', tmp_path / 'source')
    assert f'{tmp_path / "source"} does not give cifar10 as it was published: ' in error
    assert [path.name for path in tmp_path.iterdir()] == ['source']


def test_fashion_mnist_is_padded_to_32_and_for_training_to_40(fashion):
    source, root, images = fashion
    run('fashion_mnist', root, '--source', source)
    assert sorted(path.name for path in root.iterdir()) == ['dataset.json', 'train', 'validation']
    rgb = [np.stack([np.pad(x, [(0, 0), (2, 2), (2, 2)])] * 3, axis=3) for x in images]
    assert checked_classes(root, *rgb)[::9] == ['0_t-shirt_top', '9_ankle_boot']


def test_the_first_images_of_each_class(fashion, capsys):
    source, root, _ = fashion
    run('fashion_mnist', root, '--source', source, '--per-class', 3)
    names = [path.name for path in sorted(root.glob('train/*/*'))]
    assert names == [f'{label + 10 * i:05d}.png' for label in range(10) for i in range(3)]
    assert len(list(root.glob('validation/*/*'))) == 20
    error = refused(capsys, 'fashion_mnist', root.with_name('other'), '--source', source, '--per-class', 5)
    assert error == '--per-class 5 is more than the 4 training images of a class'


@pytest.mark.slow
@pytest.mark.skipif(not data.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_real_fashion_mnist(tmp_path, capsys):
    run('fashion_mnist', tmp_path / 'root', '--per-class', 1)
    assert '10 training, 10000 validation images' in capsys.readouterr().out


def loaded(dataset, **kwargs):
    """The bytes of each image as timm's loader gives it."""
    no_change = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0), 'device': torch.device('cpu')}
    workers = {'batch_size': 20, 'num_workers': 0, 'persistent_workers': False}
    for batch, _ in create_loader(dataset, (3, 32, 32), **no_change, **workers, **kwargs):
        pixels = (batch * 255).round().to(torch.uint8)
        assert torch.allclose(pixels / 255, batch, atol=1e-6)  # nothing between two grey values: no interpolation
        yield from pixels.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def one_cifar_image(tmp_path, monkeypatch):
    """A folder from `timm-msar data cifar10` of which only one training image is left, and this image."""
    train, test = write_cifar(tmp_path / 'source', monkeypatch)
    run('cifar10', tmp_path / 'root', '--source', tmp_path / 'source')
    for path in (tmp_path / 'root' / 'train').glob('*/*.png'):
        if path.name != '00007.png':
            path.unlink()
    return tmp_path / 'root', train[7], test


@pytest.mark.parametrize(('name', 'prefetcher'), [('cifar_resnet', True), ('cifar_densenet', False)])
def test_training_images_are_the_81_crops_and_their_mirrors(one_cifar_image, name, prefetcher):
    root, original, _ = one_cifar_image
    recipe = yaml.safe_load((RECIPES / f'{name}.yaml').read_text(encoding='utf-8'))
    draws = 2000
    dataset = create_dataset('', root=str(root), split='train', is_training=True)
    dataset.reader.samples = dataset.reader.samples * draws  # the same image again and again
    padded = np.pad(original, [(4, 4), (4, 4), (0, 0)])
    wanted = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 32, left : left + 32]
            wanted[crop.tobytes()] = (top, left, False)
            wanted[crop[:, ::-1].tobytes()] = (top, left, True)
    assert len(wanted) == 162

    random.seed(0)
    torch.manual_seed(0)
    seen = dict.fromkeys(wanted.values(), 0)
    options = {key: recipe[key] for key in ('scale', 'ratio', 'hflip', 'color_jitter')}
    options |= {'interpolation': recipe['train_interpolation'], 'use_prefetcher': prefetcher}
    for image in loaded(dataset, is_training=True, **options):
        seen[wanted[image.tobytes()]] += 1  # a KeyError is an image that is none of the 162
    assert sum(seen.values()) == draws
    assert min(seen.values()) > 0
    chi_square = sum((count - draws / 162) ** 2 for count in seen.values()) / (draws / 162)
    assert chi_square < 220  # 161 degrees of freedom: above 220 in 0.1 % of the cases


def test_validation_images_are_the_originals(one_cifar_image):
    root, _, originals = one_cifar_image
    dataset = create_dataset('', root=str(root), split='validation')
    own = timm.data.resolve_model_data_config(timm.create_model('cifar_resnet20_msar', device='meta'))
    options = {key: own[key] for key in ('crop_pct', 'crop_mode', 'interpolation')}
    outputs = np.stack([*loaded(dataset, use_prefetcher=True, **options)])
    order = [int(path.removesuffix('.png')) for path in dataset.filenames(basename=True)]
    assert sorted(order) == list(range(len(originals)))
    assert np.array_equal(outputs, originals[order])


def test_a_source_that_was_not_published(fashion, capsys):
    """Among them MNIST's files, which have the same names and another content."""
    source, root, _ = fashion
    images = source / 'train-images-idx3-ubyte.gz'
    whole = images.read_bytes()
    other = gzip.compress(gzip.decompress(whole)[:-1] + b'x')
    for broken in (whole[: len(whole) // 2], b'<html>', other):
        images.write_bytes(broken)
        assert 'as it was published' in refused(capsys, 'fashion_mnist', root, '--source', source)
    assert [path.name for path in root.parent.iterdir()] == ['source']


@pytest.fixture
def folder(tmp_path):
    for split in ('train', 'val'):  # timm reads val as validation
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(noise(1, 8, 8, 3)[0]).save(tmp_path / split / name / '1.png')
    return tmp_path


def test_check_counts_what_timm_passes_over(folder, capsys):
    for name in ('train/cat/2.webp', 'train/dog/deep/2.TIF', 'train/3.tif', 'val/dog/README', 'val/cat/2.JPEG'):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(1, 8, 8, 3)[0]).save(folder / name, 'png')
    odd_images(folder / 'val' / 'odd' / 'dog')
    assert run('check', folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        f'{folder} has 2 classes.',
        'train: 2 images, and every one opens.',
        'train: timm passes over other files, in training too: 2 .tif, 1 .webp.',
        'validation: 16 images, and every one opens.',
        'validation: timm ignores that images are transparent or turned, in training too: '
        '5 transparent, 2 turned by EXIF.',
        'validation: timm passes over other files, in training too: 1 without an ending.',
    ]


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda folder: shutil.rmtree(folder), 'there is no folder'),
        (lambda folder: (folder / 'train').rename(folder / 'trains'), 'there is no folder'),
        (lambda folder: [path.unlink() for path in folder.glob('val/*/*')], 'RuntimeError: Found 0 images in subfold'),
        (lambda folder: (folder / 'val/cat/1.png').unlink(), '1 of the classes have images in only one'),
        (lambda folder: os.truncate(folder / 'train/dog/1.png', 60), '1 train images cannot be used, the first is'),
        (lambda folder: shutil.copytree(folder / 'train/dog', folder / 'train/Dog'), 'timm numbers the classes '),
        (lambda folder: Image.new('I;16', (8, 8)).save(folder / 'train/dog/1.png'), 'more than 8 bits'),
        (lambda folder: os.mkfifo(folder / 'train/dog/2.png'), 'is not a file'),
        (
            lambda folder: (folder / 'train/dog/a').symlink_to('..') or (folder / 'train/b').symlink_to('.'),
            'without end',
        ),
    ],
)
def test_check_says_what_is_wrong(folder, spoil, message, capsys):
    spoil(folder)
    assert message in refused(capsys, 'check', folder)
