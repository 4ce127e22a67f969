"""What `predict` and `gates` are given: photos, and a network that looks at them."""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, is_img_extension
from torch import Tensor
from tqdm import tqdm

from .card_data import training_data
from .errors import CommandError
from .export import compare_checksum
from .files import regular_file
from .trained_run import MODES, data_config, load_network


class Network(NamedTuple):
    """A network in evaluation mode, how images are prepared for it, and the names of its classes, if known."""

    name: str
    model: Any  # timm's networks have attributes that nn.Module does not declare
    config: dict[str, Any]
    classes: Sequence[str]

    def class_name(self, index: int) -> str:
        """The name of a class, or its number."""
        return self.classes[index] if len(self.classes) == self.model.num_classes else f'class {index}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the images and the network."""
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=Path, help='image, or folder with images in it')
    name = 'name in timm, local-dir:FOLDER or hf-hub:ID; a checkpoint of train.py has it'
    weights = "checkpoint of train.py, or safetensors file (default: the network's pretrained weights)"
    parser.add_argument('--model', metavar='NAME', help=name)
    parser.add_argument('--checkpoint', metavar='FILE', type=Path, help=weights)


def load(name: str | None, checkpoint: Path | None) -> Network:
    """Load a network with pretrained weights, or with those of a checkpoint.

    Raises:
        CommandError: Neither is given, the weights cannot be downloaded, or they are not of this network.
    """
    if checkpoint:
        model, train_args = load_network(checkpoint, name)
        data = training_data(train_args, model.num_classes)
        return Network(train_args['model'], model, data_config(train_args, model), data.classes)
    if not name:
        raise CommandError('give --model NAME, or --checkpoint FILE of train.py')
    if name.startswith('local-dir:'):
        compare_checksum(Path(name.removeprefix('local-dir:')))
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except (OSError, RuntimeError) as error:
        reason = ' '.join(str(error).split())
        raise CommandError(f'{name} cannot be loaded ({reason}); --checkpoint FILE takes other weights') from error
    classes: Sequence[str] = model.pretrained_cfg.get('label_names') or ()
    subset = infer_imagenet_subset(model)
    if not classes and subset:
        info = ImageNetInfo(subset)
        classes = [info.index_to_description(i) for i in range(info.num_classes())]
    return Network(name, model, data_config({}, model), classes)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and in place of a folder the images below it; each once.

    Raises:
        CommandError: There is no image in a folder.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob('*') if is_img_extension(p.suffix.lower()) and p.is_file())
            if not found:
                raise CommandError(f'there is no image in the folder {path}')
        files += found
    return list(dict.fromkeys(files))


def prepared(files: Sequence[Path], network: Network) -> Iterator[tuple[Path, Tensor]]:
    """Prepare each image as the network takes it, (1, C, H, W). Print which cannot be read, and go on.

    Raises:
        CommandError: After the last image, where some cannot be read.
    """
    failed = 0
    transform = create_transform(**network.config, is_training=False)
    for path in tqdm(files, unit='image', disable=len(files) == 1 or None, leave=False):
        try:
            x = transform(read_photo(path, network.config['input_size'][0]))[None]
        except Exception as error:  # Pillow has no common class for what is wrong in a broken file
            tqdm.write(printable(f'{path} cannot be read: {error}'), file=sys.stderr)
            failed += 1
        else:
            yield path, x
    if failed:
        raise CommandError(f'{failed} of {len(files)} images cannot be read')


def read_photo(path: Path, channels: int) -> Image.Image:
    """Read an image as a person sees it: turned by its EXIF tag, over white, from 8 or 16 bits, the first of several.

    Args:
        path: The file.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.

    Raises:
        CommandError: There is no such file, or its pixels have other than 8 or 16 bits.
        Exception: One of Pillow's: it is broken, or no image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # a photo of 100 megapixels is none
        image = ImageOps.exif_transpose(Image.open(regular_file(path)))
    if image.mode[0] in 'IF':  # convert() would make white of everything above 255
        pixels = np.asarray(image)
        if image.mode == 'F' or pixels.min() < 0 or pixels.max() > 65535:
            raise CommandError('its pixels have 32 bits; save it with 8 or 16')
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if channels != 4 and ('A' in image.getbands() or 'transparency' in image.info):  # hidden pixels have any colour
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert(MODES[channels])


def printable(text: str) -> str:
    """Escape what cannot be printed, such as line breaks and bytes that are no UTF-8 in the name of a file."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)
