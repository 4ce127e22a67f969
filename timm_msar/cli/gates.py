"""Draw where the gates of a network open over images, with what it predicts.

The picture shows an image as the network sees it and, of the last layer of each stage, the gates: the channels that
vary most over the image, the mean over channels and scales, and the mean over channels at each scale. Of several images
it has a row for each, with two channels of each stage.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..gate_maps import gates
from . import inference
from .errors import CommandError, printable, say
from .files import written_whole

MOST = 32  # images in a picture that a person can read


class Inspection(NamedTuple):
    """What a network sees, what it predicts, and its gates: titles and (height, width) arrays by the layer's name."""

    image: np.ndarray  # (H, W) or (H, W, 3), from 0 to 1
    prediction: str
    maps: dict[str, list[tuple[str, np.ndarray]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inference.add_arguments(parser)
    default = Path('gates.png')
    parser.add_argument('--output', metavar='PNG', type=Path, default=default, help='picture to write (%(default)s)')


def main(args: argparse.Namespace) -> None:
    """Draw every image that can be read."""
    output, files = args.output, inference.image_files(args.images)
    if output.suffix.lower() != '.png' or os.path.realpath(output) in map(os.path.realpath, files):
        raise CommandError(f'--output must end in .png and be none of the images, not {output}')
    if len(files) > MOST:
        raise CommandError(f'{len(files)} images are too many for one picture; give at most {MOST}')
    network = inference.load(args.model, args.checkpoint)
    inspected = {path: inspect(network, x) for path, x in inference.prepared(files, network)}
    if inspected:
        with written_whole(output) as aside:
            draw(list(inspected.values()), f'{", ".join(path.name for path in inspected)}: {network.name}', aside)
        for path, seen in inspected.items():  # now that the picture is there
            say(f'{path}: {seen.prediction}')
        say(f'drawn in {output}')
    if len(inspected) < len(files):
        raise CommandError(f'{len(files) - len(inspected)} of {len(files)} images cannot be read')


@torch.no_grad()
def inspect(network: inference.Network, x: Tensor) -> Inspection:
    """Predict one prepared image, (1, C, H, W), and find its gates."""
    prediction = ''
    if network.model.num_classes:
        probability, index = network.model(x).softmax(1).max(1)
        prediction = f'{network.classes[index]} ({probability.item():.3%})'
    layers = gates(network.model, x, per_scale=True)
    # A layer is named stages.0.2.se or layer1.2.se: its stage is what stands up to the first number.
    last = {re.match(r'\D*\d*', layer)[0]: layer for layer in layers}  # type: ignore[index]
    maps = {}
    for layer in last.values():
        scales = {k: z[0].float() for k, z in layers[layer].items()}
        z = torch.stack(list(scales.values())).mean(0)
        channels = z.flatten(1).var(1, correction=0).topk(min(3, len(z))).indices.tolist()
        maps[layer] = [(f'channel {c}', z[c].numpy()) for c in channels]
        maps[layer] += [('mean of channels', z.mean(0).numpy())]
        maps[layer] += [(f'mean, K = {k}', z_k.mean(0).numpy()) for k, z_k in scales.items()]
    mean, std = (torch.tensor(network.config[key][:3]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = (x[0, :3] * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(2)
    return Inspection(pixels.numpy(), printable(prediction), maps)


def draw(inspected: Sequence[Inspection], title: str, path: Path) -> None:
    """Write a PNG file: one image with a row for each stage, or a row for each image.

    The colours of all gates are on one scale. It reaches from 0.5 to both sides as far as they do.
    """
    from matplotlib.figure import Figure

    if len(inspected) > 1:
        rows = [
            (seen, '', [(f'{layer}\n{name}', z) for layer, maps in seen.maps.items() for name, z in maps[:2]])
            for seen in inspected
        ]
    else:
        rows = [(seen, layer, maps) for seen in inspected for layer, maps in seen.maps.items()]
    reaches = [abs(z - 0.5).max() for _, _, maps in rows for _, z in maps]
    reach = max(0.001, *reaches)
    columns = 1 + max(len(maps) for _, _, maps in rows)
    figure = Figure(figsize=(1.6 * columns + 1.2, 1.95 * len(rows) + 0.8))
    figure.set_layout_engine('constrained', h_pad=0.08)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (seen, layer, maps), (first, *others) in zip(rows, axes):
        first.imshow(seen.image, cmap='gray', vmin=0, vmax=1)
        first.set_title(f'{seen.prediction}\n{layer}'.strip(), fontsize=8, wrap=True, parse_math=False)
        for axis, (map_title, z) in zip(others, maps):
            colors = axis.imshow(z, cmap='RdBu_r', vmin=0.5 - reach, vmax=0.5 + reach, interpolation='nearest')
            axis.set_title(map_title, fontsize=8)
            digits = 2 - int(np.floor(np.log10(max(1e-4, np.ptp(z)))))  # three of the difference
            ends = sorted({f'{value:.{digits}f}' for value in (z.min(), z.max())})
            axis.set_xlabel(' to '.join(ends), fontsize=7, labelpad=2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(colors, ax=axes, aspect=40, label='gate: 0 closed, 1 open')
    title = f'{printable(title)[:150]}\nShown are the channels whose gates vary most over the image.'
    if np.max(reaches) < 0.01:  # and no gate is nan
        title += f' No gate shown is further than {max(reaches):.2g} from 0.5, where a warm start begins.'
    figure.suptitle(title, fontsize=9, parse_math=False)
    figure.savefig(path, format='png', dpi=100)
