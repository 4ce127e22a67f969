"""Draw where the gates of a network open over images, with what it predicts.

A picture shows the image as the network sees it and, for the last layer of each stage, the gates: their mean over
channels and scales, their mean over channels at each scale, and the channels that vary most over the image.
"""

import argparse
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..gate_maps import gates
from . import photo
from .errors import CommandError
from .files import whole

CHANNELS = 3  # to show of each layer
ON_SHEET = 32  # images, so that it can be looked at
SHEET = 'contact_sheet.png'
HOW_CHOSEN = 'Shown are the channels whose gates vary most over the image.'


Maps = list[tuple[str, np.ndarray]]  # gates, (height, width), with titles
Row = tuple[np.ndarray, str, Maps]  # of a picture: an image with its title, and gates


class Look(NamedTuple):
    """What a network sees, (H, W) or (H, W, 3) from 0 to 1, what it predicts, and its gates by the layer's name."""

    image: np.ndarray
    prediction: str
    maps: dict[str, Maps]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-msar gates`."""
    photo.add_arguments(parser)
    parser.add_argument(
        '--output',
        metavar='PATH',
        type=Path,
        default=Path('gates'),
        help=f'folder to make, with a picture of each image and {SHEET}, or PNG file for one image '
        '(default: %(default)s)',
    )


def main(args: argparse.Namespace) -> None:
    """Draw every image that can be read.

    Raises:
        CommandError: The output is no name for what there is to draw, or images cannot be read.
    """
    output, files = args.output, photo.image_files(args.images)
    one = output.suffix.lower() == '.png'
    if not one and output.suffix.lower() in Image.registered_extensions():
        raise CommandError(f'pictures are PNG, so --output must be a folder or end in .png, not {output}')
    if one and (len(files) > 1 or output.resolve() == files[0].resolve()):
        raise CommandError(f'--output {output} is one of the images, or one name for several; give another')
    sheet: list[Row] = []
    lines: list[str] = []
    drawn = 0
    with whole(output, folder=not one) as aside:
        network = photo.load(args.model, args.checkpoint)
        for path, x in photo.prepared(files, network):
            seen = look(network, x)
            target = aside if one else _free(aside / f'{path.stem}.png')
            rows = [(seen.image, f'{seen.prediction}\n{layer}', maps) for layer, maps in seen.maps.items()]
            draw(rows, f'{path.name}, {network.name}', target)
            drawn += 1
            if drawn <= ON_SHEET:
                sheet.append(short_row(seen, path.name))
            lines.append(f'{path}: {seen.prediction} → {output if one else output / target.name}')
            if all((abs(z - 0.5) < 5e-4).all() for maps in seen.maps.values() for _, z in maps):
                lines.append('    all gates are 0.500 to three digits')
        if not drawn:
            raise CommandError('no image can be read, so nothing is drawn')
        if not one:
            draw(sheet, network.name, aside / SHEET)
            lines.append(f'{output / SHEET} has the first {len(sheet)} images')
    print('\n'.join(map(photo.printable, lines)))  # now that the files are there
    if failed := len(files) - drawn:
        raise CommandError(f'{failed} of {len(files)} images cannot be read; the others are drawn')


def _free(path: Path) -> Path:
    """The name, or with a number where another image has it."""
    names = (path.with_stem(f'{path.stem}-{i}' if i > 1 else path.stem) for i in count(1))
    return next(name for name in names if not name.exists() and name.name != SHEET)


@torch.no_grad()
def look(network: photo.Network, x: Tensor) -> Look:
    """Look at one prepared image, (1, C, H, W)."""
    prediction = ''
    if network.model.num_classes:
        probability, index = network.model(x).softmax(1).max(1)
        prediction = f'{network.class_name(index.item())} ({probability.item():.0%})'
    layers = gates(network.model, x, per_scale=True)
    # A layer is named stages.0.2.se or layer1.2.se: its stage is what stands up to the first number.
    last = {re.match(r'\D*\d*', layer)[0]: layer for layer in layers}  # type: ignore[index]
    maps = {}
    for layer in last.values():
        scales = {k: z[0].float() for k, z in layers[layer].items()}
        z = torch.stack(list(scales.values())).mean(0)
        channels = z.flatten(1).var(1, correction=0).topk(min(CHANNELS, len(z))).indices.tolist()
        maps[layer] = [(f'channel {c}', z[c].numpy()) for c in channels]
        maps[layer] += [('mean of channels', z.mean(0).numpy())]
        maps[layer] += [(f'mean, K = {k}', z_k.mean(0).numpy()) for k, z_k in scales.items()]
    mean, std = (torch.tensor(network.config[key][:3]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = (x[0, :3] * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(2)
    return Look(pixels.numpy(), prediction, maps)


def short_row(seen: Look, name: str = '') -> Row:
    """One row for an image: of each stage the two channels that vary most."""
    short = [(f'{layer}\n{title}', z) for layer, maps in seen.maps.items() for title, z in maps[:2]]
    return seen.image, f'{seen.prediction}\n{name}', short


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write a PNG file: in each row an image, its title, and maps with the edges of the image over them.

    The colours of all maps are on one scale. It reaches from 0.5 to both sides as far as the gates do.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    reach = max(0.001, *(abs(z - 0.5).max() for _, _, maps in rows for _, z in maps))
    colors = ScalarMappable(Normalize(0.5 - reach, 0.5 + reach), 'RdBu_r')
    columns = 1 + max(len(maps) for _, _, maps in rows)
    figure = Figure(figsize=(1.6 * columns + 1.2, 1.85 * len(rows) + 0.8), layout='constrained')
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (image, name, maps), (first, *others) in zip(rows, axes):
        first.imshow(image, cmap='gray', vmin=0, vmax=1)
        first.set_title(photo.printable(name, '\n'), fontsize=8, wrap=True, parse_math=False)
        grey = image if image.ndim == 2 else image.mean(2)
        edges = np.hypot(*np.gradient(grey))
        shade = 0.4 * np.clip(edges / max(np.quantile(edges, 0.98), 1e-3), 0, 1)
        black = np.stack([*np.zeros((3, *grey.shape)), shade], axis=2)
        extent = (0, grey.shape[1], grey.shape[0], 0)
        for axis, (map_title, z) in zip(others, maps):
            axis.imshow(z, cmap=colors.cmap, norm=colors.norm, extent=extent, interpolation='nearest')
            axis.imshow(black, extent=extent)
            axis.set_title(map_title, fontsize=8)
            axis.set_xlabel(f'{z.min():.2f} to {z.max():.2f}', fontsize=7, labelpad=2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(colors, ax=axes, aspect=40, label='gate: 0 closed, 1 open')
    figure.suptitle(f'{photo.printable(title)}\n{HOW_CHOSEN}', fontsize=9, parse_math=False)
    figure.savefig(path, format='png', dpi=100)
