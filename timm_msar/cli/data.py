"""Prepare CIFAR-10, CIFAR-100 or Fashion-MNIST as a folder of images that timm's train.py reads, or check a folder.

The paper trains its CIFAR networks on random 32×32 crops of images padded by 4 black pixels, flipped at random, and
tests on the image as it is. timm's train.py has no such option, but its random-resized-crop does exactly this on
training images that are *stored* padded to 40×40:

* `scale: [0.64, 0.64]`, `ratio: [1.0, 1.0]`: 0.64 · 40² = 32², so each crop is 32×32, at one of the 81 offsets with
  equal probability; resizing 32 to 32 changes no pixel, whatever the interpolation. `hflip: 0.5` flips it, and
  `color_jitter: null` leaves the colours alone, as 0.0 does, which takes a quarter of the time of loading.

Validation images are stored as they are, 32×32. The networks' own data config, 32 px and `crop_pct` 1.0, changes no
pixel of them, so validate.py needs no option. `tests/test_data.py` compares every pixel of both with the originals.

A prepared folder holds `train/CLASS/INDEX.png`, `validation/CLASS/INDEX.png` and `dataset.json`: the name of the data
set, its classes, the number of images, and N of `--per-class N`, which keeps the first N training images of each class.
Class folders sort in the order of the labels, because that is how timm numbers them. Fashion-MNIST's 28×28 images are
padded to 32×32 with zeros first; they are stored as grey images, which timm's loader turns into RGB.
"""

import argparse
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset, is_img_extension
from timm.utils import natural_key
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from tqdm import tqdm

from .errors import CommandError, whole_number
from .files import regular_file, whole

DATASETS: dict[str, Any] = {'cifar10': CIFAR10, 'cifar100': CIFAR100, 'fashion_mnist': FashionMNIST}
SPLITS = ('train', 'validation')
DEBIAN_FASHION_MNIST = Path('/usr/share/datasets/fashion-mnist')
# MD5 of what is in the .gz files. torchvision lists MD5s of the .gz files themselves, which Debian packs anew.
FASHION_MNIST_MD5 = {
    'train-images-idx3-ubyte': 'f4a8712d7a061bf5bd6d2ca38dc4d50a',
    'train-labels-idx1-ubyte': '9018921c3c673c538a1fc5bad174d6f9',
    't10k-images-idx3-ubyte': '8181f5470baa50b63fa0f6fddb340f0a',
    't10k-labels-idx1-ubyte': '15d484375f8d13e6eb1aabb0c3f46965',
}
PADDING = 4
CHECK = """Check a folder of images before training with train.py's --data-dir: timm finds a folder train and a folder
validation (or val) in it, both have the same class folders, timm can tell the classes apart when it numbers them, and
every image opens and has 8 bits a channel. It also counts the files that timm passes over without a word, in training
too: timm reads .png, .jpg and .jpeg alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per data set, and `check`."""
    commands = parser.add_subparsers(dest='dataset', required=True, metavar='{cifar10,cifar100,fashion_mnist,check}')
    files = f'the four idx .gz files (default: those in {DEBIAN_FASHION_MNIST} or, without these, download them)'
    for name, dataset in DATASETS.items():
        command = commands.add_parser(name, help=f'prepare {dataset.__name__} for train.py --data-dir ROOT')
        command.add_argument('root', metavar='ROOT', type=Path, help='folder to make')
        held = files if name == 'fashion_mnist' else f'{dataset.base_folder} (default: download it)'
        command.add_argument('--source', metavar='DIR', type=Path, help=f'folder that holds {held}')
        keep = 'keep the first N training images of each class'
        command.add_argument('--per-class', metavar='N', type=whole_number(1), help=keep)
    command = commands.add_parser('check', help='check a folder of images of your own', description=CHECK)
    command.add_argument('root', metavar='ROOT', type=Path, help='folder with a train and a validation folder')
    command.add_argument('--num-classes', metavar='N', type=whole_number(1), help="the config's num_classes")


def main(args: argparse.Namespace) -> None:
    """Prepare the data set, or check the folder."""
    if args.dataset == 'check':
        check(args.root, args.num_classes)
    else:
        prepare(args.dataset, args.root, args.source, args.per_class)


def check(root: Path, num_classes: int | None = None) -> list[int]:
    """Check that timm finds both splits with the same classes in a folder, and that every image opens; print it.

    Args:
        root: Folder given to train.py as `--data-dir`.
        num_classes: Number of classes that the folder must have.

    Returns:
        How many images there are to train and to validate on.

    Raises:
        CommandError: A split is missing, an image is broken, or the classes are not those wanted.
        RuntimeError: timm finds no image in a split.
    """
    datasets = {split: create_dataset('', root=str(root), split=split) for split in SPLITS if root.is_dir()}
    for split in SPLITS:
        if not datasets or Path(datasets[split].reader.root) == root:  # where timm finds no such folder
            raise CommandError(f'there is no folder {root / split}, where train.py looks for the {split} images')
    classes, others = (list(datasets[split].reader.class_to_idx) for split in SPLITS)
    for one, next_one in pairwise(classes):
        if natural_key(one) == natural_key(next_one):
            raise CommandError(f'timm numbers the classes {one!r} and {next_one!r} in any order; rename one')
    if odd := sorted(set(classes) ^ set(others)):
        raise CommandError(f'{odd[0]!r} and {len(odd) - 1} more classes have images in only one split of {root}')
    if num_classes not in (None, len(classes)):
        raise CommandError(f'{root} has {len(classes)} classes, not {num_classes}; give --num-classes {len(classes)}')
    lines = [f'{root} has {len(classes)} classes.']
    for split, dataset in datasets.items():
        paths = dataset.filenames(absolute=True)
        with ThreadPool() as pool:
            results = pool.imap(_why_unusable, paths, chunksize=64)
            reasons = list(tqdm(results, f'Checking {split}', len(paths), unit=' images', disable=None))
        unusable = [f'{path} ({reason})' for path, reason in zip(paths, reasons, strict=True) if reason]
        if unusable:
            raise CommandError(f'{len(unusable)} {split} images cannot be used, the first is {unusable[0]}')
        lines.append(f'{split}: {len(paths)} images, and every one opens.')
        suffixes = (path.suffix.lower() for path in Path(dataset.reader.root).rglob('*') if not path.is_dir())
        passed_over = Counter(suffix or 'without an ending' for suffix in suffixes if not is_img_extension(suffix))
        if kinds := ', '.join(f'{number} {suffix}' for suffix, number in sorted(passed_over.items())):
            lines.append(f'{split}: timm passes over other files, in training too: {kinds}.')
    print('\n'.join(lines))
    return [len(dataset) for dataset in datasets.values()]


def _why_unusable(path: str) -> str:
    try:
        with Image.open(regular_file(Path(path))) as image:
            image.load()
            # timm converts it to RGB, which cuts off what is above 255
            return 'its values have more than 8 bits, so timm would make it white' if image.mode[0] in 'IF' else ''
    except Exception as error:  # a decoder may raise anything on a broken file
        return f'{type(error).__name__}: {error}'


def prepare(name: str, root: Path, source: Path | None = None, per_class: int | None = None) -> None:
    """Make the folder of images, unless it is there already.

    Args:
        name: Key of `DATASETS`.
        root: Folder to make.
        source: Folder with the data set's own files; where there is none they are downloaded.
        per_class: Training images of each class, the first ones; all where it is None.

    Raises:
        CommandError: `root` holds something else, or the source is missing or not what was published.
    """
    facts: dict[str, Any] = {'dataset': name, 'per_class': per_class}
    if (root / 'dataset.json').is_file():
        there = json.loads((root / 'dataset.json').read_text(encoding='utf-8'))
        if facts.items() <= there.items() and check(root) == [there[split] for split in SPLITS]:
            return
    with whole(root, folder=True) as aside:
        classes, splits = _load(name, source, aside.parent)
        if per_class is not None:
            splits['train'] = _first(per_class, *splits['train'])
        for split, (images, labels, indices) in splits.items():
            for folder in classes:
                (aside / split / folder).mkdir(parents=True)
            padding = [(PADDING, PADDING)] * 2 if split == 'train' else [(0, 0)] * 2
            progress = tqdm(images, f'Writing {split}', unit=' images', disable=None)
            for image, label, index in zip(progress, labels, indices):
                padded = np.pad(image, padding + [(0, 0)] * (image.ndim - 2))
                Image.fromarray(padded).save(aside / split / classes[label] / f'{index:05d}.png')
        facts |= {'classes': classes, **{split: len(labels) for split, (_, labels, _) in splits.items()}}
        (aside / 'dataset.json').write_text(json.dumps(facts, indent=2) + '\n')
    print(f'{root} is ready for train.py: {facts["train"]} training, {facts["validation"]} validation images')


def _load(name: str, source: Path | None, download: Path) -> tuple[list[str], dict]:
    """Read the images as (N, 32, 32) or (N, 32, 32, 3) bytes, their labels and numbers, and names for the folders."""
    dataset, fashion = DATASETS[name], name == 'fashion_mnist'
    if fashion and source is None and DEBIAN_FASHION_MNIST.is_dir():
        source = DEBIAN_FASHION_MNIST
    try:
        if fashion and source is not None:
            source = _unpacked(source, download)
        # torchvision compares checksums before it reads CIFAR's files, which are pickles.
        made = [dataset(str(source or download), train=train, download=source is None) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, zlib.error) as error:
        reason = ' '.join(str(error).split())
        urls = [f'{dataset.mirrors[0]}{file}' for file, _ in dataset.resources] if fashion else [dataset.url]
        what = 'the four files' if fashion else 'and unpack'
        raise CommandError(
            f'{source or "the download"} does not give {name} as it was published: {reason}. '
            f'Fetch {what} {", ".join(urls)} and give their folder by --source'
        ) from error
    splits = {}
    for split, data in zip(SPLITS, made):
        images, labels = np.asarray(data.data), np.asarray(data.targets)
        splits[split] = np.pad(images, [(0, 0), (2, 2), (2, 2)]) if fashion else images, labels, np.arange(len(labels))
    return _class_folders(made[0].classes), splits


def _unpacked(source: Path, download: Path) -> Path:
    """Unpack Fashion-MNIST's files for torchvision, which finds them in the folder that is returned."""
    raw = download / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, md5 in FASHION_MNIST_MD5.items():
        content = gzip.decompress(regular_file(source / f'{name}.gz').read_bytes())
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise RuntimeError(f'{source / name}.gz has another checksum')
        (raw / name).write_bytes(content)
    return download


def _first(count: int, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, ...]:
    """Keep the first `count` images of each class, in their order."""
    by_class = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    if (fewest := min(map(len, by_class))) < count:
        raise CommandError(f'--per-class {count} is more than the {fewest} training images of a class')
    chosen = np.sort(np.concatenate(by_class))
    return images[chosen], labels[chosen], indices[chosen]


def _class_folders(classes: Sequence[str]) -> list[str]:
    folders = [re.sub(r'\W+', lambda match: '-' if match[0] == '-' else '_', name.lower()) for name in classes]
    if sorted(folders, key=natural_key) == folders:  # timm numbers the classes in this order
        return folders
    width = len(str(len(folders) - 1))
    return [f'{index:0{width}d}_{folder}' for index, folder in enumerate(folders)]
