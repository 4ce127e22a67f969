"""The prepared folders: what timm reads from them, the paper's augmentation pixel by pixel, interruption, bad input."""

import argparse
import gzip
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torchvision.datasets import CIFAR10, CIFAR100

from timm_msar.cli import data
from timm_msar.cli.errors import CommandError

FASHION_FILES = {
    'train': ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
    'validation': ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
}


def run(*words):
    """What `timm-msar data WORDS` does."""
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    data.main(parser.parse_args([str(word) for word in words]))


def noise(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_cifar(folder, cls, monkeypatch, names):
    """Write noise in the layout of the Python version of CIFAR, and make torchvision expect these files' MD5."""
    base = folder / cls.base_folder
    base.mkdir(parents=True)

    def write(filename, content):
        packed = pickle.dumps(content)
        (base / filename).write_bytes(packed)
        return hashlib.md5(packed).hexdigest()

    key = 'labels' if cls is CIFAR10 else 'fine_labels'
    lists, images = {'train_list': [], 'test_list': []}, {'train_list': [], 'test_list': []}
    for attribute, parts in lists.items():
        for filename, _ in getattr(cls, attribute):
            seed = len(images['train_list']) + len(images['test_list'])
            pixels = noise(2 * len(names), 3, 32, 32, seed=seed)
            content = {'data': pixels.reshape(len(pixels), -1), key: [*range(len(names))] * 2}
            parts.append([filename, write(filename, content)])
            images[attribute].append(pixels.transpose(0, 2, 3, 1))
        monkeypatch.setattr(cls, attribute, parts)
    monkeypatch.setattr(cls, 'meta', cls.meta | {'md5': write(cls.meta['filename'], {cls.meta['key']: names})})
    return np.concatenate(images['train_list']), np.concatenate(images['test_list'])


def write_fashion(folder, train=40, validation=20):
    """Write noise in the format of Fashion-MNIST's four files; label = index modulo 10."""
    folder.mkdir()
    images = {}
    for split, count in {'train': train, 'validation': validation}.items():
        images[split] = noise(count, 28, 28, seed=count)
        labels = bytes(index % 10 for index in range(count))
        image_file, label_file = FASHION_FILES[split]
        header = struct.pack('>IIII', 0x803, count, 28, 28)
        (folder / image_file).write_bytes(gzip.compress(header + images[split].tobytes()))
        (folder / label_file).write_bytes(gzip.compress(struct.pack('>II', 0x801, count) + labels))
    return images


@pytest.fixture
def fashion(tmp_path):
    images = write_fashion(tmp_path / 'source')
    return tmp_path / 'source', tmp_path / 'root', images


CIFAR10_NAMES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


@pytest.mark.parametrize('cls, names', [(CIFAR10, CIFAR10_NAMES), (CIFAR100, [f'{i:02d}_x' for i in range(100)])])
def test_cifar_folder_holds_every_image_under_its_label(cls, names, tmp_path, monkeypatch, capsys):
    train, test = write_cifar(tmp_path / 'source', cls, monkeypatch, names)
    run(cls.__name__.lower(), tmp_path / 'root', '--source', tmp_path / 'source')
    for split, images in {'train': train, 'validation': test}.items():
        dataset = create_dataset('', root=str(tmp_path / 'root'), split=split)
        assert list(dataset.reader.class_to_idx) == names
        assert len(dataset) == len(images)
        for path, (image, label) in zip(dataset.filenames(basename=True), dataset, strict=True):
            index = int(path.removesuffix('.png'))
            assert label == index % len(names)
            wanted = images[index]
            if split == 'train':
                wanted = np.zeros((40, 40, 3), np.uint8)
                wanted[4:36, 4:36] = images[index]
            assert np.array_equal(np.asarray(image), wanted)
    facts = json.loads((tmp_path / 'root' / 'dataset.json').read_text())
    assert (facts['dataset'], facts['classes']) == (cls.__name__.lower(), names)
    assert f'{len(train)} training and {len(test)} validation images' in capsys.readouterr().out


def test_cifar_with_a_wrong_checksum_is_not_read(tmp_path, monkeypatch):
    write_cifar(tmp_path / 'source', CIFAR10, monkeypatch, CIFAR10_NAMES)
    (tmp_path / 'source' / CIFAR10.base_folder / 'data_batch_3').write_bytes(b'not what was published')
    with pytest.raises(CommandError, match='not found or corrupted'):
        run('cifar10', tmp_path / 'root', '--source', tmp_path / 'source')
    assert not list(tmp_path.glob('root*'))
    assert not (tmp_path / 'root').exists()


def test_fashion_mnist_is_padded_to_32_and_for_training_to_40(fashion):
    source, root, images = fashion
    run('fashion_mnist', root, '--source', source)
    assert sorted(path.name for path in root.parent.iterdir()) == ['root', 'source']
    assert sorted(path.name for path in root.iterdir()) == ['dataset.json', 'train', 'validation']
    for split in data.SPLITS:
        dataset = create_dataset('', root=str(root), split=split)
        folders = list(dataset.reader.class_to_idx)
        assert (folders[0], folders[9]) == ('0_t-shirt_top', '9_ankle_boot')
        for path, (image, label) in zip(dataset.filenames(basename=True), dataset, strict=True):
            index = int(path.removesuffix('.png'))
            assert label == index % 10
            grey = np.pad(images[split][index], 6 if split == 'train' else 2)
            assert np.array_equal(np.asarray(image), np.stack([grey] * 3, axis=2))


def test_the_first_images_of_each_class(fashion):
    source, root, images = fashion
    run('fashion_mnist', root, '--source', source, '--per-class', 3)
    names = {path.parent.name: [] for path in sorted(root.glob('train/*/*'))}
    for path in sorted(root.glob('train/*/*')):
        names[path.parent.name].append(path.name)
        assert np.array_equal(np.asarray(Image.open(path)), np.pad(images['train'][int(path.stem)], 6))
    wanted = [[f'{label + 10 * i:05d}.png' for i in range(3)] for label in range(10)]
    assert [names[folder] for folder in sorted(names)] == wanted
    assert len(list(root.glob('validation/*/*'))) == 20
    with pytest.raises(CommandError, match='is not what this makes'):
        run('fashion_mnist', root, '--source', source)
    with pytest.raises(CommandError, match='--per-class 5 is more than the 4 training images of a class'):
        run('fashion_mnist', root.with_name('other'), '--source', source, '--per-class', 5)


@pytest.mark.skipif(not data.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_real_fashion_mnist(tmp_path):
    classes, splits = data._load('fashion_mnist', None, tmp_path)
    assert (len(classes), len(splits['train'][1]), len(splits['validation'][1])) == (10, 60000, 10000)
    images, labels, indices = data._first(600, *splits['train'])
    assert np.bincount(labels).tolist() == [600] * 10
    assert images.shape == (6000, 32, 32) and (splits['train'][1][indices] == labels).all()


def as_bytes(batch):
    pixels = (batch * 255).round().to(torch.uint8)
    assert torch.allclose(pixels / 255, batch, atol=1e-6)  # nothing between two grey values: no interpolation
    return pixels.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def one_cifar_image(tmp_path, monkeypatch):
    """A folder from `timm-msar data cifar10` of which only one training image is left, and this image."""
    train, test = write_cifar(tmp_path / 'source', CIFAR10, monkeypatch, CIFAR10_NAMES)
    run('cifar10', tmp_path / 'root', '--source', tmp_path / 'source')
    for path in (tmp_path / 'root' / 'train').glob('*/*.png'):
        if path.name != '00007.png':
            path.unlink()
    return tmp_path / 'root', train[7], test


@pytest.mark.parametrize('interpolation, prefetcher', [('random', True), ('bicubic', False)])
def test_training_images_are_the_81_crops_and_their_mirrors(one_cifar_image, interpolation, prefetcher):
    root, original, _ = one_cifar_image
    draws = 2000
    dataset = create_dataset('', root=str(root), split='train', is_training=True)
    dataset.reader.samples = dataset.reader.samples * draws  # the same image again and again
    loader = create_loader(
        dataset,
        input_size=(3, 32, 32),
        batch_size=100,
        is_training=True,
        scale=(0.64, 0.64),
        ratio=(1.0, 1.0),
        hflip=0.5,
        color_jitter=0.0,
        interpolation=interpolation,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        num_workers=0,
        persistent_workers=False,
        device=torch.device('cpu'),
        use_prefetcher=prefetcher,
    )
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
    for batch, _ in loader:
        for image in as_bytes(batch):
            seen[wanted[image.tobytes()]] += 1  # a KeyError is an image that is none of the 162
    assert sum(seen.values()) == draws
    assert min(seen.values()) > 0
    chi_square = sum((count - draws / 162) ** 2 for count in seen.values()) / (draws / 162)
    assert chi_square < 220  # 161 degrees of freedom: above 220 in 0.1 % of the cases


@pytest.mark.parametrize('interpolation, prefetcher', [('bilinear', True), ('bicubic', False)])
def test_validation_images_are_the_originals(one_cifar_image, interpolation, prefetcher):
    root, _, originals = one_cifar_image
    dataset = create_dataset('', root=str(root), split='validation')
    loader = create_loader(
        dataset,
        input_size=(3, 32, 32),
        batch_size=8,
        crop_pct=1.0,
        interpolation=interpolation,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        num_workers=0,
        persistent_workers=False,
        device=torch.device('cpu'),
        use_prefetcher=prefetcher,
    )
    outputs = np.concatenate([as_bytes(batch) for batch, _ in loader])
    order = [int(path.removesuffix('.png')) for path in dataset.filenames(basename=True)]
    assert sorted(order) == list(range(len(originals)))
    assert np.array_equal(outputs, originals[order])


def test_an_interrupted_run_leaves_nothing_and_the_next_one_takes_its_own_source(fashion, monkeypatch, capsys):
    source, root, _ = fashion
    save, saved = Image.Image.save, []

    def save_and_stop_at_25(image, path, *args):
        if len(saved) == 25:
            path.write_bytes(b'half of an image')
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', save_and_stop_at_25)
        with pytest.raises(KeyboardInterrupt):
            run('fashion_mnist', root, '--source', source)
    assert [path.name for path in root.parent.iterdir()] == ['source']

    other = write_fashion(root.with_name('other'), train=30)
    run('fashion_mnist', root, '--source', root.with_name('other'))
    paths = sorted(root.glob('train/*/*'))
    assert len(paths) == 30
    for path in paths:
        assert np.array_equal(np.asarray(Image.open(path)), np.pad(other['train'][int(path.stem)], 6))

    capsys.readouterr()
    run('fashion_mnist', root, '--source', source)
    assert 'is complete: 30 training and 20 validation images' in capsys.readouterr().out
    whole = paths[0].read_bytes()
    paths[0].write_bytes(b'')
    with pytest.raises(CommandError, match=r'1 of the 30 train images cannot be used'):
        run('fashion_mnist', root, '--source', source)
    paths[0].unlink()
    with pytest.raises(CommandError, match='has lost or gained train images'):
        run('fashion_mnist', root, '--source', source)
    paths[0].write_bytes(whole)
    run('fashion_mnist', root)


def test_a_file_that_cannot_be_written_is_not_told_as_one_that_cannot_be_read(tmp_path):
    write_fashion(tmp_path / 'source')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # what a full disk does; the images are 31,376 bytes
    try:
        with pytest.raises(CommandError, match=r'cannot write .*: File too large'):
            run('fashion_mnist', tmp_path / 'root', '--source', tmp_path / 'source')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ['source']


def test_other_content_is_left_alone(fashion):
    source, root, _ = fashion
    root.mkdir()
    (root / 'thesis.txt').write_text('years of work')
    with pytest.raises(CommandError, match='exists and is not what this makes'):
        run('fashion_mnist', root, '--source', source)
    assert [path.name for path in root.iterdir()] == ['thesis.txt']


def test_the_folder_one_is_in_cannot_be_renamed(fashion, tmp_path, monkeypatch):
    here = tmp_path / 'here'
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(CommandError, match='cannot be ROOT: give the name of a new folder'):
        run('fashion_mnist', '.', '--source', fashion[0])
    assert list(here.iterdir()) == []


def test_broken_sources_are_told(fashion, tmp_path):
    source, root, _ = fashion
    with pytest.raises(CommandError, match='there is no folder'):
        run('fashion_mnist', root, '--source', tmp_path / 'nowhere')
    images = source / 'train-images-idx3-ubyte.gz'
    whole = images.read_bytes()
    wrong_type = gzip.compress(b'\0\0\x07' + gzip.decompress(whole)[3:])
    for broken in (whole[: len(whole) // 2], b'<html>', gzip.compress(gzip.decompress(whole)[:-100]), wrong_type):
        images.write_bytes(broken)
        with pytest.raises(CommandError, match='cannot read fashion_mnist from'):
            run('fashion_mnist', root, '--source', source)
    images.unlink()
    elsewhere = tmp_path / 'elsewhere'
    with pytest.raises(CommandError, match=r'has no train-images-idx3-ubyte\.gz; --source must be'):
        run('fashion_mnist', elsewhere, '--source', source)
    assert not list(tmp_path.glob('elsewhere*'))
    images.write_bytes(gzip.compress(struct.pack('>IIII', 0x803, 5, 28, 28) + bytes(5 * 28 * 28)))
    with pytest.raises(CommandError, match='do not belong to the images'):
        run('fashion_mnist', root, '--source', source)
    assert not root.exists()


@pytest.fixture
def folder(tmp_path):
    for split in ('train', 'val'):  # timm reads val as validation
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(noise(1, 8, 8, 3)[0]).save(tmp_path / split / name / '1.png')
    return tmp_path


def test_check_accepts_a_good_folder(folder, capsys):
    run('check', folder, '--num-classes', 2)
    assert '2 classes, 2 training and 2 validation images' in capsys.readouterr().out


def copy_class(folder, old, new):
    for split in ('train', 'val'):
        shutil.copytree(folder / split / old, folder / split / new)


def grey_of_16_bits(folder):
    path = folder / 'train' / 'dog' / '1.png'
    Image.fromarray(np.full((8, 8), 20_000, np.uint16)).save(path)
    dataset = create_dataset('', root=str(folder), split='train')
    assert np.asarray(dataset[1][0]).min() == 255  # 20,000 of 65,535 is a dark grey, and timm reads white


def two_loops(folder):
    for name in 'ab':
        (folder / 'train' / 'cat' / name).symlink_to(folder / 'train' / 'cat')


def spoil_image(folder):
    path = folder / 'train' / 'dog' / '1.png'
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda folder: (folder / 'train').rename(folder / 'trains'), 'has no folder train'),
        (lambda folder: [path.unlink() for path in folder.glob('val/*/*')], 'no image in class folders'),
        (lambda folder: (folder / 'val' / 'cat' / '1.png').unlink(), r"other classes in train \(2\).*'cat'"),
        (spoil_image, r'1 of the 2 train images cannot be used, .*1\.png'),
        (
            lambda folder: copy_class(folder, 'dog', 'Dog'),
            "classes '(dog|Dog)' and '(dog|Dog)', which are equal to timm",
        ),
        (lambda folder: [copy_class(folder, 'dog', name) for name in ('1', '01')], "'0?1' and '0?1', which are equal"),
        (lambda folder: copy_class(folder, 'dog', '²'), 'timm cannot sort the names in'),
        (grey_of_16_bits, r'1 of the 2 train images cannot be used.*dog/1\.png \(its values have more than 8 bits'),
        (lambda folder: os.mkfifo(folder / 'train' / 'dog' / '2.png'), r'dog/2\.png \(it is not a file\)'),
        (lambda folder: two_loops(folder), r'train/cat/\w is a link that leads back to .*train/cat, in which it lies'),
    ],
)
def test_check_tells_what_is_wrong(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CommandError, match=message):
        run('check', folder)


def test_check_tells_a_missing_folder_and_the_wrong_number_of_classes(folder):
    with pytest.raises(CommandError, match='there is no folder'):
        run('check', folder / 'nowhere')
    with pytest.raises(CommandError, match='has 2 classes, not 1000; set num_classes to 2'):
        run('check', folder, '--num-classes', 1000)
