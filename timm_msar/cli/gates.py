"""Draw where the gates of a network open over images, with what it predicts.

Each picture shows the image as the network sees it, after the network's own transform, and for the last layer of each
stage the gates averaged over channels, of all scales and of each, and those of the channels that vary most over space.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, is_img_extension
from tqdm import tqdm

from ..recalibration import MultiScaleRecalibration
from .checkpoint import load_network
from .data_config import data_config
from .errors import CommandError, first_line, one_sentence
from .export import compare_checksum
from .gate_pictures import Look, contact_sheet, look, picture, save
from .photo import MODES, read_photo
from .training_data import training_data
from .written_aside import written_aside

ON_SHEET = 32  # images, so that it can be looked at
SHEET = 'contact_sheet.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-msar gates`."""
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=Path, help='image, or folder with images in it')
    parser.add_argument('--model', metavar='NAME', required=True, help='name in timm, local-dir:FOLDER or hf-hub:ID')
    parser.add_argument(
        '--checkpoint',
        metavar='FILE',
        type=Path,
        help="checkpoint of train.py, or safetensors file (default: the network's pretrained weights)",
    )
    parser.add_argument(
        '--output',
        metavar='PATH',
        type=Path,
        default=Path('gates'),
        help=f'folder to make, with a picture of each image and {SHEET}, or PNG file for one image '
        '(default: %(default)s)',
    )


def main(args: argparse.Namespace) -> None:
    """Draw every image that can be read; say which cannot.

    Raises:
        CommandError: The network cannot be loaded or has no gates, the output cannot be written, or an image cannot be
            read; the other images are drawn then.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError('drawing needs matplotlib: pip install "timm-msar[demo]"') from error
    output, files = args.output, _files(args.images)
    one = output.suffix.lower() == '.png'
    with one_sentence(f'cannot write {output}'):
        if one and len(files) > 1:
            raise CommandError(f'--output {output} is for one image, and there are {len(files)}; give a folder')
        if one and output.exists() and (not output.is_file() or output.samefile(files[0])):
            raise CommandError(f'--output {output} is there already and no picture of this command; give another name')
        if not one and output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise CommandError(f'{output} exists already; delete it or give another --output')
    model, config, classes = _load(args.model, args.checkpoint)
    transform = create_transform(**config, is_training=False)
    looks: list[Look] = []
    drawn: list[str] = []
    failed = closed = 0
    with one_sentence(f'cannot write {output}'), written_aside(output) as aside:
        if not one:
            aside.mkdir()
        for path in tqdm(files, unit='image', disable=len(files) == 1 or None, leave=False):
            try:
                x = transform(read_photo(path, config['input_size'][0]))[None]
            except CommandError as error:
                if len(files) == 1:
                    raise
                tqdm.write(f'timm-msar gates: error: {error}', file=sys.stderr)
                failed += 1
                continue
            seen = look(model, x, config['mean'], config['std'], classes, path.name)
            warm = all((z == 0.5).all() for maps in seen.maps.values() for _, z in maps)
            closed += warm
            title = f'{seen.name}, {args.model}' + (': all gates are 0.5, as before training' if warm else '')
            target = aside if one else _free(aside / f'{path.stem}.png')
            save(picture(seen, title), target)
            drawn.append(f'{path}: {seen.prediction} → {output if one else output / target.name}')
            if len(looks) < ON_SHEET:
                looks.append(seen)
        if not one and looks:
            save(contact_sheet(looks, args.model), aside / SHEET)
        if failed == len(files):
            raise CommandError(f'none of the {failed} images can be read; nothing was written')
    print('\n'.join(drawn))  # now that the files are there
    if closed:
        print('all gates are 0.5: a warm start, whose gates are not trained yet')
    if not one:
        print(f'{output / SHEET} has {"the first " if len(files) - failed > len(looks) else ""}{len(looks)} images')
    if failed:
        raise CommandError(f'{failed} of {len(files)} images cannot be read; the others are drawn')


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files, and in place of a folder the images below it; each once."""
    files: list[Path] = []
    for path in paths:
        with one_sentence(f'cannot read {path}'):
            if path.is_dir():
                found = sorted(p for p in path.rglob('*') if is_img_extension(p.suffix.lower()) and p.is_file())
                if not found:
                    raise CommandError(f'there is no image in the folder {path}')
                files += found
            else:
                files.append(path)
    return list(dict.fromkeys(files))


def _free(path: Path) -> Path:
    """The name, or with a number where another image has it."""
    names = (path.with_stem(f'{path.stem}-{i}' if i > 1 else path.stem) for i in count(1))
    return next(name for name in names if not name.exists() and name.name != SHEET)


def _load(name: str, checkpoint: Path | None) -> tuple[Any, dict[str, Any], Sequence[str]]:
    """The network in evaluation mode, how images are prepared for it, and its classes' names where they are known."""
    train_args: dict[str, Any] = {}
    try:
        if checkpoint:
            model, train_args = load_network(checkpoint, name)
        else:
            if ':' not in name and timm.is_model(name.partition('.')[0]):
                cfg = timm.get_pretrained_cfg(name)
                if cfg is None or not cfg.has_weights:
                    raise CommandError(f'{name} has no pretrained weights; give its own with --checkpoint')
                _refuse_without_gates(timm.create_model(name), name)  # before a download
            if name.startswith('local-dir:'):
                compare_checksum(Path(name.removeprefix('local-dir:')))
            model = timm.create_model(name, pretrained=True).eval()
        config = data_config(train_args, model)
    except CommandError:
        raise
    except Exception as error:  # timm and the Hub have no common class for a network that cannot be had
        raise CommandError(f'{name} cannot be loaded: {first_line(error)}') from error
    _refuse_without_gates(model, name)
    if config['input_size'][0] not in MODES:
        raise CommandError(f'{name} takes images of {config["input_size"][0]} channels, which no picture file has')
    if checkpoint:
        return model, config, training_data(train_args, model.num_classes).classes
    classes = model.pretrained_cfg.get('label_names') or ()
    subset = infer_imagenet_subset(model)
    if not classes and subset:
        info = ImageNetInfo(subset)
        classes = [info.index_to_description(i) for i in range(info.num_classes())]
    return model, config, classes


def _refuse_without_gates(model: torch.nn.Module, name: str) -> None:
    if not any(isinstance(module, MultiScaleRecalibration) for module in model.modules()):
        raise CommandError(f'{name} has no MS-SAR layer, so it has no gates to draw')
