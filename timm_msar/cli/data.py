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
import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence, Sized
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.utils import natural_key
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from tqdm import tqdm

from .errors import CommandError, one_sentence
from .run_folder import read_text
from .training_data import equal_names
from .whole_number import whole_number
from .written_aside import written_aside

DATASETS = {'cifar10': CIFAR10, 'cifar100': CIFAR100, 'fashion_mnist': FashionMNIST}
SPLITS = ('train', 'validation')
SPLIT_FOLDERS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation')  # where timm looks for them
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
        command.add_argument(
            '--per-class', metavar='N', type=whole_number(1), help='keep the first N training images of each class'
        )
    command = commands.add_parser('check', help="check a folder of images before training with train.py's --data-dir")
    command.add_argument('root', metavar='ROOT', type=Path, help='folder with a train and a validation folder')
    command.add_argument('--num-classes', metavar='N', type=whole_number(1), help="the config's num_classes")


def main(args: argparse.Namespace) -> None:
    """Prepare the data set, or check the folder.

    Raises:
        CommandError: If the folder or the source is not what it should be.
    """
    if args.dataset == 'check':
        with one_sentence(f'cannot read {args.root}'):
            datasets = check(args.root, args.num_classes)
        num_classes = len(datasets['train'].reader.class_to_idx)
        print(f'{args.root}: {num_classes} classes, {_sizes(**datasets)}, every one opens')
    else:
        with one_sentence(f'cannot make {args.root}'):
            prepare(args.dataset, args.root, args.source, args.per_class)


def _sizes(train: Sized, validation: Sized) -> str:
    return f'{len(train)} training and {len(validation)} validation images'


def check(root: Path, num_classes: int | None = None) -> dict:
    """Check that timm finds both splits with the same classes in a folder, and that every image opens.

    Args:
        root: Folder given to train.py as `--data-dir`.
        num_classes: Number of classes that the folder must have.

    Returns:
        timm's dataset of each split.

    Raises:
        CommandError: If a split or an image is missing or broken, or the classes are not those wanted.
        OSError: If a folder cannot be read.
    """
    if not root.is_dir():
        raise CommandError(f'there is no folder {root}; make it with `timm-msar data`, or give an existing one')
    for name in SPLIT_FOLDERS:
        _refuse_loops(root / name)
    datasets = {}
    for split in SPLITS:
        try:
            datasets[split] = create_dataset('', root=str(root), split=split)
        except RuntimeError as error:  # timm found no image
            raise CommandError(f'no image in class folders of the {split} split of {root}') from error
        except ValueError as error:  # ² is a digit, but not of a number
            raise CommandError(f'timm cannot sort the names in {root} ({error}); rename the folder or image') from error
        if Path(datasets[split].reader.root) == root:
            raise CommandError(f'{root} has no folder {split}, where train.py looks for the {split} images')
    train_classes, val_classes = (list(datasets[split].reader.class_to_idx) for split in SPLITS)
    if equal := equal_names(train_classes):
        raise CommandError(
            f'{root} has the classes {equal[0]!r} and {equal[1]!r}, which are equal to timm when it sorts them, so '
            'their numbers are left to chance; rename one'
        )
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
            results = pool.imap(_why_unusable, paths, chunksize=64)
            reasons = list(tqdm(results, f'Checking {split}', len(paths), unit=' images'))
        unusable = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
        if unusable:
            path, reason = unusable[0]
            raise CommandError(
                f'{len(unusable)} of the {len(paths)} {split} images cannot be used, the first is {path} ({reason}); '
                'replace or delete them'
            )
    return datasets


def _refuse_loops(folder: Path, above: tuple[str, ...] = ()) -> None:
    """Raise CommandError where a link leads back to a folder that it lies in: timm would follow it again and again."""
    if not folder.is_dir():
        return
    real = os.path.realpath(folder)
    if real in above:
        raise CommandError(f'{folder} is a link that leads back to {real}, in which it lies; delete it')
    with os.scandir(folder) as entries:
        folders = [Path(entry.path) for entry in entries if entry.is_dir()]
    for inner in folders:
        _refuse_loops(inner, (*above, real))


def _why_unusable(path: str) -> str:
    if not os.path.isfile(path):
        return 'it is not a file'  # a fifo would be waited for
    try:
        with Image.open(path) as image:
            image.load()
            # timm converts it to RGB, which cuts off what is above 255
            return 'its values have more than 8 bits, so timm would make it white' if image.mode[0] in 'IF' else ''
    except Exception as error:  # a decoder may raise anything on a broken file
        return f'{type(error).__name__}: {error}'


def prepare(name: str, root: Path, source: Path | None = None, per_class: int | None = None) -> None:
    """Make the folder of images, or check the one that is there.

    Args:
        name: Key of `DATASETS`.
        root: Folder to make.
        source: Folder with the data set's own files; where there is none they are downloaded.
        per_class: Training images of each class, the first ones; all where it is None.

    Raises:
        CommandError: If `root` holds something else, or the source is missing or broken.
        OSError: If the folder cannot be written.
    """
    if not root.name:  # `.` would be replaced under the feet of who is in it
        raise CommandError(f'{root} cannot be ROOT: give the name of a new folder')
    if os.path.lexists(root) and not (root.is_dir() and not any(root.iterdir())):
        print(f'{root} is complete: {_sizes(**_check_complete(name, root, per_class))}')
        return
    with written_aside(root) as aside:
        classes, splits = _load(name, source, aside / 'download')
        if per_class is not None:
            splits['train'] = _first(per_class, *splits['train'])
        for split, (images, labels, indices) in splits.items():
            for folder in classes:
                (aside / split / folder).mkdir(parents=True)
            padding = [(PADDING, PADDING)] * 2 if split == 'train' else [(0, 0)] * 2
            for image, label, index in zip(tqdm(images, f'Writing {split}', unit=' images'), labels, indices):
                padded = np.pad(image, padding + [(0, 0)] * (image.ndim - 2))
                Image.fromarray(padded).save(aside / split / classes[label] / f'{index:05d}.png')
        labels_of = {split: labels for split, (_, labels, _) in splits.items()}
        facts = {'dataset': name, 'classes': classes, 'per_class': per_class}
        facts |= {split: len(labels) for split, labels in labels_of.items()}
        (aside / 'dataset.json').write_text(json.dumps(facts, indent=2) + '\n')
        shutil.rmtree(aside / 'download', ignore_errors=True)
    print(f'{root} is ready for train.py --data-dir: {_sizes(**labels_of)}')


def _check_complete(name: str, root: Path, per_class: int | None) -> dict:
    """Check a folder that an earlier call made; return timm's dataset of each split."""
    facts = None
    with suppress(OSError, ValueError, RecursionError):
        facts = json.loads(read_text(root / 'dataset.json'))
    wanted = {'dataset': name, 'per_class': per_class}
    if not isinstance(facts, dict) or any(facts.get(key, ...) != value for key, value in wanted.items()):
        raise CommandError(f'{root} exists and is not what this makes; delete it or give another ROOT')
    datasets = check(root)
    for split, dataset in datasets.items():
        if len(dataset) != facts.get(split) or list(dataset.reader.class_to_idx) != facts.get('classes'):
            raise CommandError(f'{root} has lost or gained {split} images; delete it or give another ROOT')
    return datasets


def _load(name: str, source: Path | None, download: Path) -> tuple[list[str], dict]:
    """Read the images as (N, 32, 32) or (N, 32, 32, 3) bytes, their labels and numbers, and names for the folders."""
    if source is not None and not source.is_dir():
        raise CommandError(f'there is no folder {source} to take {name} from')
    if name == 'fashion_mnist' and source is None and DEBIAN_FASHION_MNIST.is_dir():
        source = DEBIAN_FASHION_MNIST
    failure = f'cannot read {name} from {source}' if source else f'cannot download {name}'
    advice = 'check or replace its files' if source else 'run again, or give its files by --source'
    torchvision_raises = EOFError, RuntimeError, TypeError, KeyError, AssertionError, zlib.error
    with one_sentence(failure, *torchvision_raises, advice=advice):
        if name == 'fashion_mnist' and source is not None:
            _unpack_fashion_mnist(source, download)
            source = download
        train, test = (
            DATASETS[name](str(source or download), train=train, download=source is None) for train in (True, False)
        )
    splits = {}
    for split, dataset in zip(SPLITS, (train, test), strict=True):
        images, labels = np.asarray(dataset.data), np.asarray(dataset.targets)
        if name == 'fashion_mnist':
            if images.shape[1:] != (28, 28):
                raise CommandError(f'{failure}: the {split} images are {images.shape[1:]}, not (28, 28); {advice}')
            images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
        if not len(labels) or len(images) != len(labels) or labels.max() >= len(dataset.classes):
            raise CommandError(f'{failure}: the {split} labels do not belong to the images; {advice}')
        splits[split] = images, labels, np.arange(len(labels))
    return _class_folders(train.classes), splits


def _unpack_fashion_mnist(source: Path, download: Path) -> None:
    missing = [filename for filename, _ in FashionMNIST.resources if not (source / filename).is_file()]
    if missing:
        raise CommandError(f'{source} has no {missing[0]}; --source must be the folder of the four idx .gz files')
    raw = download / FashionMNIST.__name__ / 'raw'  # where torchvision looks for the unpacked files
    for filename, _ in FashionMNIST.resources:
        unpacked = gzip.decompress((source / filename).read_bytes())
        with one_sentence(f'cannot write {download}'):
            raw.mkdir(parents=True, exist_ok=True)
            (raw / Path(filename).stem).write_bytes(unpacked)


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
