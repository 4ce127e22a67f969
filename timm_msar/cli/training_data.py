"""Which data set a network was trained on, and the names of its classes, from the arguments of train.py."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import ImageNetInfo, is_img_extension
from timm.utils import natural_key

from .errors import CommandError
from .run_folder import read_text

HUB_DATASETS = {
    'cifar10': ('CIFAR-10', 'uoft-cs/cifar10', 'test'),
    'cifar100': ('CIFAR-100', 'uoft-cs/cifar100', 'test'),
    'fashion_mnist': ('Fashion-MNIST', 'zalando-datasets/fashion_mnist', 'test'),
    'imagenet': ('ImageNet-1k', 'ILSVRC/imagenet-1k', 'validation'),
}
IMAGENET_IMAGES = 1_281_167  # for training


class TrainingData(NamedTuple):
    """A data set: the name for people, the id on the Hub where it is known, the split of the results, the classes."""

    name: str
    hub_id: str | None
    split: str
    classes: tuple[str, ...] = ()  # in the order of the labels; empty where the images are not here
    per_class: int | None = None  # training images of each class, where `timm-msar data` kept only the first ones


def training_data(args: dict[str, Any], num_classes: int) -> TrainingData:
    """Find out what train.py trained on; the folder of images need not be there any more.

    A folder is taken for a known data set because of what is in it, not because of its name.

    Args:
        args: Arguments of train.py.
        num_classes: Classes of the network; other than so many class names are not its own.

    Raises:
        CommandError: timm gives two classes of the folder the same place in their order.
    """
    kind, _, name = (args.get('dataset') or '').partition('/')
    split = args.get('val_split') or 'validation'
    if kind in ('hfds', 'hfids'):
        return TrainingData(name, name if re.fullmatch(r'[\w.-]+/[\w.-]+', name) else None, split)
    if kind in ('torch', 'tfds') and name in HUB_DATASETS:
        return TrainingData(*HUB_DATASETS[name])
    root = Path(args.get('data_dir') or args.get('data') or '')
    if kind or not root.name:
        return TrainingData(name or kind or 'unknown', None, split)
    facts = _facts(root)
    if facts:
        known, classes, per_class = HUB_DATASETS.get(facts['dataset']), tuple(facts['classes']), facts.get('per_class')
    else:
        known, classes, per_class = None, (), None
        if not args.get('class_map'):  # a class map numbers the classes in another order
            images = _images(root / (args.get('train_split') or 'train'), root / 'train', root / 'training', root)
            classes = _in_order_of_timm(images, root)
            if sum(images.values()) == IMAGENET_IMAGES and set(classes) == set(ImageNetInfo().label_names()):
                known = HUB_DATASETS['imagenet']
    name, hub_id, split = known or (root.name, None, split)
    return TrainingData(name, hub_id, split, classes if len(classes) == num_classes else (), per_class)


def _facts(root: Path) -> dict[str, Any] | None:
    """What `timm-msar data` wrote down about the folder, if it made it and the images are still as many."""
    try:
        facts = json.loads(read_text(root / 'dataset.json'))
        name, classes, per_class = facts['dataset'], facts['classes'], facts.get('per_class')
        counts = {split: facts[split] for split in ('train', 'validation')}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    whole = isinstance(name, str) and isinstance(classes, list) and all(isinstance(c, str) for c in classes)
    whole = whole and type(per_class) in (int, type(None))
    return facts if whole and all(sum(_images(root / split).values()) == counts[split] for split in counts) else None


def _images(*folders: Path) -> dict[str, int]:
    """How many images each class folder of the first folder that is there holds; none where they cannot be read."""
    try:
        folder = next((path for path in folders if path.is_dir()), folders[-1])
        with os.scandir(folder) as entries:
            counts = {entry.name: sum(_is_image(entry.path)) for entry in entries if entry.is_dir()}
    except OSError:
        return {}
    return {name: count for name, count in counts.items() if count}


def _is_image(folder: str) -> Iterator[bool]:
    with os.scandir(folder) as entries:
        yield from (is_img_extension(os.path.splitext(entry.name)[1].lower()) for entry in entries)


def equal_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that timm holds equal when it sorts them, such as '1' and '01', or 'Cat' and 'cat', if there are two.

    Raises:
        ValueError: timm cannot sort a name, such as '²'.
    """
    ordered = sorted(names, key=natural_key)
    return next((pair for pair in pairwise(ordered) if natural_key(pair[0]) == natural_key(pair[1])), None)


def _in_order_of_timm(names: Any, root: Path) -> tuple[str, ...]:
    """Sort as timm does, which leaves the order of equal names to chance."""
    try:
        equal = equal_names(names)
    except ValueError as error:  # of a name like '²', which timm cannot sort either
        raise CommandError(f'timm cannot number the classes in {root}: {error}; rename their folders') from error
    if equal:
        raise CommandError(
            f'{root} has the classes {equal[0]!r} and {equal[1]!r}, which timm numbers in an order left to chance, so '
            'the names of the classes are not known; rename a folder and train again'
        )
    return tuple(sorted(names, key=natural_key))
