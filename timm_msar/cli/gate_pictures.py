"""Pictures of a network's gates over an image, on one colour scale: blue is closed, white 0.5, red open.

The scale is the same in every picture, from 0 to 1, and stretched around 0.5, where a warm start begins and means over
channels remain: a colour is as strong as the square root of the distance from 0.5. The edges of the image are drawn
over the colours.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..gate_maps import gates

CHANNELS = 3  # to show of each layer


class Look(NamedTuple):
    """The name of an image, what a network sees, (H, W) or (H, W, 3) from 0 to 1, what it predicts, and its gates.

    Of the last layer of each stage, `maps` has the gates averaged over channels and scales, then averaged over channels
    of each scale, then of the channels that vary most over space, each (height, width) with a title.
    """

    name: str
    image: np.ndarray
    prediction: str
    maps: dict[str, list[tuple[str, np.ndarray]]]


@torch.no_grad()
def look(
    model: Any, x: Tensor, mean: Sequence[float], std: Sequence[float], classes: Sequence[str] = (), name: str = ''
) -> Look:
    """Look at one image, (1, C, H, W), normalised by `mean` and `std`, with the names of the classes if known."""
    prediction = ''
    if model.num_classes:
        probability, index = model(x).softmax(1).max(1)
        label = classes[index] if len(classes) == model.num_classes else f'class {index.item()}'
        prediction = f'{label} ({probability.item():.0%})'
    layers = gates(model, x, per_scale=True)
    # A layer is named stages.0.2.se or layer1.2.se: its stage is what stands up to the first number.
    last = {re.match(r'\D*\d*', name)[0]: name for name in layers}  # type: ignore[index]
    maps = {}
    for layer in last.values():
        scales = {k: z[0].float() for k, z in layers[layer].items()}
        z = torch.stack(list(scales.values())).mean(0)
        channels = z.flatten(1).var(1, correction=0).topk(min(CHANNELS, len(z))).indices.tolist()
        maps[layer] = [('mean of channels', z.mean(0).numpy())]
        maps[layer] += [(f'K = {k}, mean', z_k.mean(0).numpy()) for k, z_k in scales.items()]
        maps[layer] += [(f'channel {c}', z[c].numpy()) for c in channels]
    pixels = x[0, :3] * torch.tensor(std[:3]).view(-1, 1, 1) + torch.tensor(mean[:3]).view(-1, 1, 1)
    return Look(name, pixels.clamp(0, 1).permute(1, 2, 0).squeeze(2).numpy(), prediction, maps)


def picture(seen: Look, title: str) -> Any:
    """A figure of one image: a row for each stage, with every map."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in seen.maps.values())
    figure = Figure(figsize=(1.5 * (columns + 2.6), 1.75 * len(seen.maps) + 0.7), layout='constrained')
    grid = figure.add_gridspec(len(seen.maps), columns + 2)
    _show_image(figure.add_subplot(grid[:, :2]), seen)
    for row, (layer, maps) in enumerate(seen.maps.items()):
        for column, (map_title, z) in enumerate(maps, start=2):
            axis = figure.add_subplot(grid[row, column])
            _show_gates(axis, z, seen.image)
            axis.set_title(map_title, fontsize=8)
            if column == 2:
                axis.set_ylabel(f'{layer}\n{z.shape[0]}×{z.shape[1]}', fontsize=8)
    return _finish(figure, title)


def contact_sheet(looks: Sequence[Look], title: str) -> Any:
    """A figure with a row for each image: of each stage the mean over channels and the channel that varies most."""
    from matplotlib.figure import Figure

    stages = list(looks[0].maps)
    figure = Figure(figsize=(1.5 * (2 * len(stages) + 1.8), 1.6 * len(looks) + 0.7), layout='constrained')
    axes = figure.subplots(len(looks), 1 + 2 * len(stages), squeeze=False)
    for number, (row, seen) in enumerate(zip(axes, looks, strict=True)):
        _show_image(row[0], seen)
        row[0].set_xlabel(seen.name, fontsize=7, parse_math=False)
        for i, layer in enumerate(stages):
            maps = seen.maps[layer]
            varies_most = next(m for m in maps if m[0].startswith('channel'))
            for axis, (map_title, z) in zip(row[1 + 2 * i :], (maps[0], varies_most)):
                _show_gates(axis, z, seen.image)
                axis.set_title(f'{layer}\n{map_title}' if number == 0 else map_title, fontsize=8)
    return _finish(figure, title)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format='png', dpi=100)


def _norm() -> Any:
    from matplotlib.colors import FuncNorm

    def stretched(z):
        return np.sign(z - 0.5) * np.sqrt(np.abs(z - 0.5))

    def back(t):
        return 0.5 + np.sign(t) * t**2

    return FuncNorm((stretched, back), vmin=0, vmax=1)


def _show_image(axis: Any, seen: Look) -> None:
    axis.imshow(seen.image, cmap='gray', vmin=0, vmax=1)
    axis.set_title(seen.prediction, fontsize=9, wrap=True, parse_math=False)
    axis.set_xticks([])
    axis.set_yticks([])


def _show_gates(axis: Any, z: np.ndarray, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    axis.imshow(z, cmap='RdBu_r', norm=_norm(), extent=extent, interpolation='nearest')
    grey = image if image.ndim == 2 else image.mean(2)
    edges = np.hypot(*np.gradient(grey))
    black = np.zeros((height, width, 4))
    black[..., 3] = 0.55 * np.clip(edges / max(np.quantile(edges, 0.98), 1e-3), 0, 1)
    axis.imshow(black, extent=extent)
    axis.set_xlabel(f'{z.min():.2f} to {z.max():.2f}', fontsize=7, labelpad=2)
    axis.set_xticks([])
    axis.set_yticks([])


def _finish(figure: Any, title: str) -> Any:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(_norm(), 'RdBu_r'), ax=figure.axes, ticks=[0, 0.1, 0.3, 0.45, 0.5, 0.55, 0.7, 0.9, 1], aspect=40
    )
    bar.set_label('gate: 0 closed, 1 open')
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
