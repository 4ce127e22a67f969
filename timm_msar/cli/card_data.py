"""What a model card tells of the data set that train.py was given: its name, its id on the Hub and its classes."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import ImageNetInfo, is_img_extension
from timm.utils import natural_key

from .errors import CommandError
from .files import regular_file

HUB_DATASETS = {
    'cifar10': ('CIFAR-10', 'uoft-cs/cifar10', 'test'),
    'cifar100': ('CIFAR-100', 'uoft-cs/cifar100', 'test'),
    'fashion_mnist': ('Fashion-MNIST', 'zalando-datasets/fashion_mnist', 'test'),
    'imagenet': ('ImageNet-1k', 'ILSVRC/imagenet-1k', 'validation'),
}
IMAGENET_IMAGES = 1_281_167  # for training


class TrainingData(NamedTuple):
    """A data set."""

    name: str
    hub_id: str | None  # where it is known
    split: str  # of the results
    classes: tuple[str, ...] = ()  # in the order of the labels; empty where they are not known
    per_class: int | None = None  # training images of each class, where `timm-msar data` kept only the first ones


def training_data(args: dict[str, Any], num_classes: int) -> TrainingData:
    """Find out from train.py's arguments what it trained on, with names for all the network's classes or for none.

    What is in a folder decides which data set it is, not the folder's name.
    """
    kind, _, name = (args.get('dataset') or '').partition('/')
    split = args.get('val_split') or 'validation'
    root = Path(args.get('data_dir') or args.get('data') or '')
    if kind in ('torch', 'tfds') and name in HUB_DATASETS:
        return TrainingData(*HUB_DATASETS[name])
    if kind or not root.name:
        return TrainingData(name or kind or 'unknown', name if kind in ('hfds', 'hfids') else None, split)
    known, classes, per_class = None, [], None
    if facts := _prepared(root):
        known, classes, per_class = HUB_DATASETS[facts['dataset']], facts['classes'], facts['per_class']
    elif not args.get('class_map'):  # a class map numbers the classes in another order
        images = _images(root / (args.get('train_split') or 'train'), root / 'train', root / 'training', root)
        classes = sorted(images, key=natural_key)  # as timm does
        if len({str(natural_key(name)) for name in classes}) < len(classes):  # 'Cat' and 'cat': in any order
            classes = []
        if sum(images.values()) == IMAGENET_IMAGES and set(classes) == set(ImageNetInfo().label_names()):
            known = HUB_DATASETS['imagenet']
    name, hub_id, split = known or (root.name, None, split)
    return TrainingData(name, hub_id, split, tuple(classes) if len(classes) == num_classes else (), per_class)


def _prepared(root: Path) -> dict[str, Any] | None:
    """What `timm-msar data` wrote down about the folder, if the images are still as many."""
    try:
        facts = json.loads(regular_file(root / 'dataset.json').read_text(encoding='utf-8'))
        complete = all(sum(_images(root / split).values()) == facts[split] for split in ('train', 'validation'))
        return facts if complete and facts['dataset'] in HUB_DATASETS else None
    except (CommandError, OSError, ValueError, TypeError, KeyError):  # other programs write files of this name, too
        return None


def _images(*folders: Path) -> dict[str, int]:
    """How many images each class folder of the first folder that is there holds."""
    folder = next((path for path in folders if path.is_dir()), None)
    classes = [path for path in folder.iterdir() if path.is_dir()] if folder else []
    counts = {c.name: sum(is_img_extension(os.path.splitext(n.lower())[1]) for n in os.listdir(c)) for c in classes}
    return {name: count for name, count in counts.items() if count}
