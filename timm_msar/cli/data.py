"""Prepare CIFAR-10, CIFAR-100 or Fashion-MNIST as a folder of images that timm's train.py reads, or check a folder.

The paper trains its CIFAR networks on random 32×32 crops of images padded by 4 black pixels, flipped at random, and
tests on the image as it is. timm's train.py has no such option, but its random-resized-crop does exactly this on
images that are *stored* padded to 40×40:

* `scale: [0.64, 0.64]`, `ratio: [1.0, 1.0]`: 0.64 · 40² = 32², so each crop is 32×32, at one of the 81 offsets with
  equal probability; resizing 32 to 32 changes no pixel, whatever the interpolation. `hflip: 0.5` flips it, and
  `color_jitter: 0.0` leaves the colours alone.
* `crop_pct: 0.8` in validation: 32 / 0.8 = 40, so nothing is resized, and the central crop is the original image.

`tests/test_data.py` compares every pixel of both with the original images.

A prepared folder holds `train/CLASS/INDEX.png`, `validation/CLASS/INDEX.png` and `dataset.json`: the classes, the
number of images, and mean and standard deviation of the (not padded) training images for a config's `mean` and `std`.
Class folders sort in the order of the labels, because that is how timm numbers them. Fashion-MNIST's 28×28 images are
padded to 32×32 with zeros first; they are stored as grey images, which timm's loader turns into RGB.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.utils import natural_key
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from tqdm import tqdm

from .errors import CommandError

DATASETS = {'cifar10': CIFAR10, 'cifar100': CIFAR100, 'fashion_mnist': FashionMNIST}
SPLITS = ('train', 'validation')
DEBIAN_FASHION_MNIST = Path('/usr/share/datasets/fashion-mnist')
PADDING = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per data set, and `check`."""
    commands = parser.add_subparsers(dest='dataset', required=True, metavar='{cifar10,cifar100,fashion_mnist,check}')
    source_help = {
        'cifar10': 'folder that holds cifar-10-batches-py (default: download it)',
        'cifar100': 'folder that holds cifar-100-python (default: download it)',
        'fashion_mnist': f'folder that holds the four idx .gz files (default: {DEBIAN_FASHION_MNIST}, '
        "from Debian's dataset-fashion-mnist, if it is there, otherwise download them)",
    }
    for name, source in source_help.items():
        command = commands.add_parser(name, help=f'prepare {DATASETS[name].__name__} for train.py --data-dir ROOT')
        command.add_argument('root', metavar='ROOT', type=Path, help='folder to make')
        command.add_argument('--source', metavar='DIR', type=Path, help=source)
    command = commands.add_parser('check', help="check a folder of images before training with train.py's --data-dir")
    command.add_argument('root', metavar='ROOT', type=Path, help='folder with a train and a validation folder')
    command.add_argument('--num-classes', metavar='N', type=int, help="the config's num_classes")


def main(args: argparse.Namespace) -> None:
    """Prepare the data set, or check the folder.

    Raises:
        CommandError: If the folder or the source is not what it should be.
    """
    try:
        if args.dataset == 'check':
            datasets = check(args.root, args.num_classes)
            num_classes = len(datasets['train'].reader.class_to_idx)
            print(
                f'{args.root}: {num_classes} classes, {len(datasets["train"])} training and '
                f'{len(datasets["validation"])} validation images, every one opens'
            )
        else:
            prepare(args.dataset, args.root, args.source)
    except OSError as error:
        raise CommandError(f'cannot read or write the data: {error}') from error


def check(root: Path, num_classes: int | None = None) -> dict:
    """Check that timm finds both splits with the same classes in a folder, and that every image opens.

    Args:
        root: Folder given to train.py as `--data-dir`.
        num_classes: Number of classes that the folder must have.

    Returns:
        timm's dataset of each split.

    Raises:
        CommandError: If a split or an image is missing or broken, or the classes are not those wanted.
    """
    if not root.is_dir():
        raise CommandError(f'there is no folder {root}; make it with `timm-msar data`, or give an existing one')
    datasets = {}
    for split in SPLITS:
        try:
            datasets[split] = create_dataset('', root=str(root), split=split)
        except RuntimeError as error:  # timm found no image
            raise CommandError(f'no image in class folders of the {split} split of {root}') from error
        if Path(datasets[split].reader.root) == root:
            raise CommandError(f'{root} has no folder {split}, where train.py looks for the {split} images')
    train_classes, val_classes = (list(datasets[split].reader.class_to_idx) for split in SPLITS)
    if train_classes != val_classes:
        odd = sorted(set(train_classes) ^ set(val_classes))
        raise CommandError(
            f'{root} has other classes in train ({len(train_classes)}) than in validation ({len(val_classes)}), '
            f'for example {odd[0]!r}, so their labels would differ; both need the same class folders with images'
        )
    if num_classes is not None and len(train_classes) != num_classes:
        raise CommandError(
            f'{root} has {len(train_classes)} classes, not {num_classes}; '
            f'set num_classes to {len(train_classes)} or give another folder'
        )
    for split, dataset in datasets.items():
        paths = dataset.filenames(absolute=True)
        with ThreadPool() as pool:
            results = pool.imap(_why_broken, paths, chunksize=64)
            reasons = list(tqdm(results, f'Checking {split}', len(paths), unit=' images'))
        broken = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
        if broken:
            path, reason = broken[0]
            raise CommandError(
                f'{len(broken)} of the {len(paths)} {split} images do not open, the first is {path} ({reason}); '
                'replace or delete them'
            )
    return datasets


def _why_broken(path: str) -> str:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # a decoder may raise anything on a broken file
        return f'{type(error).__name__}: {error}'
    return ''


def prepare(name: str, root: Path, source: Path | None = None) -> None:
    """Make the folder of images, or go on where an interrupted call stopped.

    The work is done in a folder beside `root` whose name ends in `.partial`; it gets its final name when every image
    was written and opens.

    Args:
        name: Key of `DATASETS`.
        root: Folder to make.
        source: Folder with the data set's own files; where there is none they are downloaded.

    Raises:
        CommandError: If `root` holds something else, or the source is missing or broken.
    """
    if not root.name:
        raise CommandError(f'{root} cannot be ROOT: give the name of a new folder')
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        print(f'{root} is complete\n{_describe(_read_complete(name, root))}')
        return
    partial = root.with_name(f'{root.name}.{name}.partial')
    download = partial / 'download'
    classes, splits = _load(name, source, download)

    for split, (images, labels) in splits.items():
        for folder in classes:
            (partial / split / folder).mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(tqdm(images, f'Writing {split}', unit=' images')):
            label = labels[index]
            path = partial / split / classes[label] / f'{index:05d}.png'
            if not path.exists():
                padding = [(PADDING, PADDING)] * 2 + [(0, 0)] * (image.ndim - 2)
                aside = path.with_suffix('.tmp')
                Image.fromarray(np.pad(image, padding)).save(aside, 'PNG')
                aside.replace(path)

    datasets = check(partial, len(classes))
    for split, (_, labels) in splits.items():
        wanted = {os.path.join(classes[label], f'{index:05d}.png') for index, label in enumerate(labels)}
        if set(datasets[split].filenames()) != wanted:
            raise CommandError(f'{partial} holds images of another data set; delete it and run again')
    mean, std = _mean_and_std(splits['train'][0])
    facts = {
        'dataset': name,
        'classes': classes,
        **{split: len(labels) for split, (_, labels) in splits.items()},
        'mean': mean,
        'std': std,
    }
    (partial / 'dataset.json').write_text(json.dumps(facts, indent=2) + '\n')
    if download.exists():
        shutil.rmtree(download)
    partial.rename(root)
    print(f'{root} is ready for train.py --data-dir\n{_describe(facts)}')


def _read_complete(name: str, root: Path) -> dict:
    try:
        facts = json.loads((root / 'dataset.json').read_text())
        complete = facts['dataset'] == name and all(
            sum(1 for _ in (root / split).glob('*/*.png')) == facts[split] for split in SPLITS
        )
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise CommandError(f'{root} exists and is not a complete {name} folder; delete it or give another ROOT')
    return facts


def _describe(facts: dict) -> str:
    return (
        f'{len(facts["classes"])} classes, {facts["train"]} training and {facts["validation"]} validation images\n'
        f'mean: {facts["mean"]}\nstd: {facts["std"]}'
    )


def _load(name: str, source: Path | None, download: Path) -> tuple[list[str], dict]:
    """Read the images as (N, 32, 32) or (N, 32, 32, 3) bytes, with labels and the names of the class folders."""
    if source is not None and not source.is_dir():
        raise CommandError(f'there is no folder {source} to take {name} from')
    if name == 'fashion_mnist' and source is None and DEBIAN_FASHION_MNIST.is_dir():
        source = DEBIAN_FASHION_MNIST
    root, where = source or download, source or 'the download'
    try:
        if name == 'fashion_mnist' and source is not None:
            root = download
            _unpack_fashion_mnist(source, root)
        train, test = (DATASETS[name](str(root), train=train, download=source is None) for train in (True, False))
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, AssertionError, zlib.error) as error:
        reason = str(error) or type(error).__name__
        if source is None:
            raise CommandError(
                f'cannot download {name} ({reason}); run again, or give its files by --source'
            ) from error
        raise CommandError(f'cannot read {name} from {source} ({reason}); check or replace its files') from error

    splits = {}
    for split, dataset in zip(SPLITS, (train, test), strict=True):
        images, labels = np.asarray(dataset.data), [int(label) for label in dataset.targets]
        if name == 'fashion_mnist':
            if images.shape[1:] != (28, 28):
                raise CommandError(f'the {split} images in {where} are {images.shape[1:]}, not (28, 28)')
            images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
        if not labels or len(images) != len(labels) or max(labels) >= len(dataset.classes):
            raise CommandError(f'the {split} labels in {where} do not belong to the images')
        splits[split] = images, labels
    return _class_folders(train.classes), splits


def _unpack_fashion_mnist(source: Path, download: Path) -> None:
    missing = [filename for filename, _ in FashionMNIST.resources if not (source / filename).is_file()]
    if missing:
        raise CommandError(f'{source} has no {missing[0]}; --source must be the folder of the four idx .gz files')
    raw = download / FashionMNIST.__name__ / 'raw'  # where torchvision looks for the unpacked files
    raw.mkdir(parents=True, exist_ok=True)
    for filename, _ in FashionMNIST.resources:
        with gzip.open(source / filename) as packed, open(raw / Path(filename).stem, 'wb') as unpacked:
            shutil.copyfileobj(packed, unpacked)


def _class_folders(classes: Sequence[str]) -> list[str]:
    folders = [re.sub(r'\W+', lambda match: '-' if match[0] == '-' else '_', name.lower()) for name in classes]
    if sorted(folders, key=natural_key) == folders:  # timm numbers the classes in this order
        return folders
    width = len(str(len(folders) - 1))
    return [f'{index:0{width}d}_{folder}' for index, folder in enumerate(folders)]


def _mean_and_std(images: np.ndarray) -> tuple[list[float], list[float]]:
    pixels = images.reshape(-1, images.shape[3] if images.ndim == 4 else 1)
    # the counts of the 256 values give both exactly, without a copy of all pixels in float
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])
    mean = counts @ values / len(pixels)
    std = np.sqrt(counts @ values**2 / len(pixels) - mean**2)
    repeat = 3 // len(mean)  # a grey image becomes three equal channels
    return [round(float(m), 4) for m in mean] * repeat, [round(float(s), 4) for s in std] * repeat
