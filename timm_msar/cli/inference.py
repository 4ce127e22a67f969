"""What `predict` and `gates` are given: images, and a network in evaluation mode."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, is_img_extension
from torch import Tensor
from tqdm import tqdm

from .card_data import training_data
from .errors import CommandError, printable
from .export import compare_checksum
from .files import open_image
from .trained_run import MODES, data_config, load_trained


class Network(NamedTuple):
    """A network in evaluation mode, how images are prepared for it, and the names of its classes, or numbers."""

    name: str
    model: Any  # timm's networks have attributes that nn.Module does not declare
    config: dict[str, Any]
    classes: Sequence[str]
    mode: str = 'RGB'  # Pillow's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the images and the network."""
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=Path, help='image, or folder with images in it')
    network = parser.add_mutually_exclusive_group(required=True)
    name = 'network with pretrained weights: its name in timm, local-dir:FOLDER or hf-hub:ID'
    network.add_argument('--model', metavar='NAME', help=name)
    network.add_argument('--checkpoint', metavar='FILE', type=Path, help='checkpoint of train.py')


def load(name: str, checkpoint: Path | None) -> Network:
    """Load a network with its pretrained weights, or a checkpoint of train.py instead."""
    classes: Sequence[str]
    if checkpoint:
        model, train_args, _ = load_trained(checkpoint)
        name, classes = train_args['model'], training_data(train_args, model.num_classes).classes
    else:
        if name.startswith('local-dir:'):
            compare_checksum(Path(name.removeprefix('local-dir:')))
        try:
            model, train_args = timm.create_model(name, pretrained=True).eval(), {}
        except Exception as error:  # timm and the Hub have no common class for a network that cannot be had
            raise CommandError(f'{name}: {error}; without the Hub, --checkpoint FILE takes weights of yours') from error
        classes = model.pretrained_cfg.get('label_names') or ()
        if not classes and (subset := infer_imagenet_subset(model)):
            info = ImageNetInfo(subset)
            classes = [info.index_to_description(i) for i in range(info.num_classes())]
    if len(classes) != model.num_classes:
        classes = [f'class {i}' for i in range(model.num_classes)]
    config = data_config(train_args, model)
    mode = train_args.get('input_img_mode') or MODES[config['input_size'][0]]
    return Network(name, model, config, classes, mode)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and in place of a folder the images below it; each once."""
    files: dict[Path, None] = {}
    for path in paths:
        found = [p for p in path.rglob('*') if is_img_extension(p.suffix.lower())] if path.is_dir() else [path]
        if not found:
            raise CommandError(f'there is no image in the folder {path}')
        files |= dict.fromkeys(sorted(found))
    return list(files)


def prepared(files: Sequence[Path], network: Network) -> Iterator[tuple[Path, Tensor]]:
    """Prepare each image as timm's datasets do, (1, C, H, W). Print which cannot be read, and go on.

    So it is the first of several, not turned by its EXIF tag, and transparent pixels have the colours that are stored.
    """
    transform = create_transform(**network.config, is_training=False)
    for path in tqdm(files, unit='image', disable=len(files) == 1 or None, leave=False):
        try:
            x = transform(open_image(path).convert(network.mode))[None]
        except Exception as error:  # Pillow has no common class for what is wrong in a broken file
            tqdm.write(printable(f'{path} cannot be read: {error}'), file=sys.stderr)
        else:
            yield path, x
