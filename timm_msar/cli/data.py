"""Prepare CIFAR-10, CIFAR-100 or Fashion-MNIST as a folder of images that timm's train.py reads, or check a folder.

The paper trains its CIFAR networks on random 32×32 crops of images padded by 4 black pixels, flipped at random, and
tests on the image as it is. timm's train.py has no such option, but its random-resized-crop does exactly this on
training images that are *stored* padded to 40×40. With `scale: [0.64, 0.64]` and `ratio: [1.0, 1.0]` each crop is 32×32
(0.64 · 40² = 32²), at one of the 81 offsets with equal probability, and resizing 32 to 32 changes no pixel.

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
import os
import re
import zlib
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from timm.data import create_dataset, is_img_extension
from timm.utils import natural_key
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from tqdm import tqdm

from .errors import CommandError, positive, say
from .files import open_image, regular_file, written_whole

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per data set, and `check`."""
    commands = parser.add_subparsers(dest='dataset', required=True, metavar='{cifar10,cifar100,fashion_mnist,check}')
    for name, dataset in DATASETS.items():
        command = commands.add_parser(name, help=f'prepare {dataset.__name__} for train.py --data-dir ROOT')
        command.add_argument('root', metavar='ROOT', type=Path, help='folder to make')
        source = f'folder with {getattr(dataset, "base_folder", "the four .gz files")} in it (default: download)'
        command.add_argument('--source', metavar='DIR', type=Path, help=source)
        keep = 'keep the first N training images of each class'
        command.add_argument('--per-class', metavar='N', type=positive, help=keep)
    command = commands.add_parser('check', help='check a folder of images of your own before training')
    command.add_argument('root', metavar='ROOT', type=Path, help='folder with a train and a validation folder')


def main(args: argparse.Namespace) -> None:
    """Prepare the data set, or check the folder."""
    if args.dataset == 'check':
        check(args.root)
    else:
        prepare(args.dataset, args.root, args.source, args.per_class)


def check(root: Path) -> None:
    """Check that timm finds both splits with the same classes in a folder, and that every image opens; print it.

    It also counts what timm passes over without a word, in training too: files other than .png, .jpg and .jpeg, the tag
    of a camera by which other programs turn an image, and transparency.
    """
    for part in root.iterdir() if root.is_dir() else ():
        seen: set[str] = set()
        for folder, _, _ in os.walk(part, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                raise CommandError(f'{folder} is {real} again, by a link, which timm may follow without end')
            seen.add(real)
    datasets = {split: create_dataset('', root=str(root), split=split) for split in SPLITS if root.is_dir()}
    for split in SPLITS:
        if not datasets or Path(datasets[split].reader.root) == root:  # where timm finds no such folder
            raise CommandError(f'there is no folder {root / split}, where train.py looks for the {split} split')
    classes, others = (list(datasets[split].reader.class_to_idx) for split in SPLITS)
    for one, next_one in pairwise(classes):
        if natural_key(one) == natural_key(next_one):
            raise CommandError(f'timm numbers the classes {one!r} and {next_one!r} in any order; rename one')
    if odd := sorted(set(classes) ^ set(others)):
        raise CommandError(f'{len(odd)} of the classes have images in only one split of {root}, such as {odd[0]!r}')
    say(f'{root} has {len(classes)} classes.')
    for split, dataset in datasets.items():
        paths = dataset.filenames(absolute=True)
        with ThreadPool() as pool:
            results = pool.imap(_examined, paths, chunksize=64)
            examined = list(tqdm(results, f'Checking {split}', len(paths), unit=' images', disable=None))
        if unusable := [f'{path} ({reason})' for path, (reason, _) in zip(paths, examined) if reason]:
            raise CommandError(f'{len(unusable)} {split} images cannot be used, the first is {unusable[0]}')
        say(f'{split}: {len(paths)} images, and every one opens.')
        ignored = Counter(kind for _, kinds in examined for kind in kinds)
        if kinds := ', '.join(f'{number} {kind}' for kind, number in sorted(ignored.items())):
            say(f'{split}: timm ignores that images are transparent or turned, in training too: {kinds}.')
        suffixes = (path.suffix.lower() for path in Path(dataset.reader.root).rglob('*') if not path.is_dir())
        passed_over = Counter(suffix or 'without an ending' for suffix in suffixes if not is_img_extension(suffix))
        if kinds := ', '.join(f'{number} {suffix}' for suffix, number in sorted(passed_over.items())):
            say(f'{split}: timm passes over other files, in training too: {kinds}.')


def _examined(path: str) -> tuple[str, list[str]]:
    """Why timm cannot use an image, or nothing, and what it ignores of it."""
    ignored = []
    try:
        with open_image(Path(path)) as image:
            image.load()
            if image.has_transparency_data and image.convert('RGBA').getextrema()[3][0] < 255:
                ignored.append('transparent')
            with suppress(Exception):  # timm does not read the tag, so it may be broken
                if 2 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8:
                    ignored.append('turned by EXIF')
    except Exception as error:  # a decoder may raise anything on a broken file
        return f'{type(error).__name__}: {error}', []
    return '', ignored


def prepare(name: str, root: Path, source: Path | None = None, per_class: int | None = None) -> None:
    """Make the folder `root` of all images, or of the first `per_class` training images of each class.

    The data set's own files are in `source`, or are downloaded.
    """
    with written_whole(root, folder=True) as aside:
        classes, splits = _load(name, source, aside.parent)
        counts = {}
        for split, (images, labels) in splits.items():
            for folder in classes:
                (aside / split / folder).mkdir(parents=True)
            chosen = _first(per_class, labels) if per_class and split == 'train' else np.arange(len(labels))
            counts[split], edge = len(chosen), 4 if split == 'train' else 0
            for index in tqdm(chosen, f'Writing {split}', unit=' images', disable=None):
                padded = np.pad(images[index], [(edge, edge), (edge, edge), (0, 0)][: images.ndim - 1])
                Image.fromarray(padded).save(aside / split / classes[labels[index]] / f'{index:05d}.png')
        facts = {'dataset': name, 'per_class': per_class, 'classes': classes, **counts}
        (aside / 'dataset.json').write_text(json.dumps(facts, indent=2) + '\n')
    say(f'{root} is ready for train.py: {counts["train"]} training, {counts["validation"]} validation images')


def _load(name: str, source: Path | None, download: Path) -> tuple[list[str], dict]:
    """Read the images as (N, 32, 32) or (N, 32, 32, 3) bytes, their labels, and names for the folders."""
    dataset, fashion = DATASETS[name], name == 'fashion_mnist'
    if fashion and source is None and DEBIAN_FASHION_MNIST.is_dir():
        source = DEBIAN_FASHION_MNIST
    try:
        if fashion and source is not None:
            source = _unpacked(source, download)
        elif source and (source / dataset.base_folder).is_dir():
            [regular_file(path) for path in (source / dataset.base_folder).iterdir()]
        # torchvision compares checksums before it reads CIFAR's files, which are pickles.
        made = [dataset(str(source or download), train=train, download=source is None) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, zlib.error) as error:
        urls = [f'{dataset.mirrors[0]}{file}.gz' for file in FASHION_MNIST_MD5] if fashion else [dataset.url]
        where = 'to FOLDER' if fashion else f'and unpack it to FOLDER/{dataset.base_folder}'
        problem = f'{source} does not give {name} as it was published' if source else f'{name} cannot be downloaded'
        raise CommandError(f'{problem}: {error}. Fetch {", ".join(urls)} {where}, and add --source FOLDER') from error
    splits = {}
    for split, data in zip(SPLITS, made):
        images = np.asarray(data.data)
        splits[split] = np.pad(images, [(0, 0), (2, 2), (2, 2)]) if fashion else images, np.asarray(data.targets)
    classes = made[0].classes  # CIFAR's are in the order of their names already
    return [f'{i}_{re.sub("[ /]", "_", c.lower())}' for i, c in enumerate(classes)] if fashion else classes, splits


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


def _first(count: int, labels: np.ndarray) -> np.ndarray:
    """The numbers of the first `count` images of each class."""
    by_class = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    if (fewest := min(map(len, by_class))) < count:
        raise CommandError(f'--per-class {count} is more than the {fewest} training images of a class')
    return np.sort(np.concatenate(by_class))
