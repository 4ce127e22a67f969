"""Which data set a network was trained on, and the names of its classes, from the arguments of train.py."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import ImageNetInfo
from timm.utils import natural_key

HUB_DATASETS = {
    'cifar10': ('CIFAR-10', 'uoft-cs/cifar10', 'test'),
    'cifar100': ('CIFAR-100', 'uoft-cs/cifar100', 'test'),
    'fashion_mnist': ('Fashion-MNIST', 'zalando-datasets/fashion_mnist', 'test'),
    'imagenet': ('ImageNet-1k', 'ILSVRC/imagenet-1k', 'validation'),
}


class TrainingData(NamedTuple):
    """A data set: the name for people, the id on the Hub where it is known, the split of the results, the classes."""

    name: str
    hub_id: str | None
    split: str
    classes: tuple[str, ...] = ()  # in the order of the labels; empty where the images are not here


def training_data(args: dict[str, Any], num_classes: int) -> TrainingData:
    """Find out what train.py trained on; the folder of images need not be there any more.

    A folder is taken for a known data set because of what is in it, not because of its name.

    Args:
        args: Arguments of train.py.
        num_classes: Classes of the network; other than so many class names are not its own.
    """
    kind, _, name = (args.get('dataset') or '').rpartition('/')
    split = args.get('val_split') or 'validation'
    if kind.startswith(('hfds', 'hfids')):
        hub_id = (args['dataset']).split('/', 1)[1]
        return TrainingData(hub_id, hub_id, split)
    if name in HUB_DATASETS:
        return TrainingData(*HUB_DATASETS[name])
    root = Path(args.get('data_dir') or args.get('data') or '')
    if name or not root.name:
        return TrainingData(name or 'unknown', None, split)
    try:
        facts = json.loads((root / 'dataset.json').read_text(encoding='utf-8'))  # written by `timm-msar data`
        known, classes = HUB_DATASETS.get(facts['dataset']), tuple(facts['classes'])
    except (OSError, ValueError, KeyError, TypeError):
        known, classes = None, ()
        if not args.get('class_map'):  # a class map numbers the classes in another order
            classes = _class_folders(root, args.get('train_split') or 'train')
            if set(classes) == set(ImageNetInfo().label_names()):
                known = HUB_DATASETS['imagenet']
    name, hub_id, split = known or (root.name, None, split)
    return TrainingData(name, hub_id, split, classes if len(classes) == num_classes else ())


def _class_folders(root: Path, split: str) -> tuple[str, ...]:
    """Names of the folders that hold files, in the order in which timm numbers them."""
    folder = next((path for path in (root / split, root / 'train', root / 'training') if path.is_dir()), root)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and _holds_a_file(entry.path)]
    except OSError:
        return ()
    return tuple(sorted(names, key=natural_key))


def _holds_a_file(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_file() for entry in entries)
