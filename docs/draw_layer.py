"""Draw docs/layer.png: the layer at work on one channel of the weights in this package, over docs/sneaker.png.

python docs/draw_layer.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

import timm_msar  # noqa: F401  registers the networks

DOCS = Path(__file__).parent
INK, GREY = '#1f2933', '#9aa5b1'

model = timm.create_model('cifar_resnet20_msar', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
seen = {}
layer = model.stages[0][2].se
layer.register_forward_hook(lambda layer, inputs, output: seen.update(x=inputs[0].clone(), out=output.clone()))
with torch.no_grad():
    model(transform(Image.open(DOCS / 'sneaker.png').convert('RGB'))[None])
    gates = layer.gates(seen['x'])
total = sum(gates.values()) / len(gates)
channel = int(total.var((0, 2, 3)).argmax())
x, out, total = (t[0, channel] for t in (seen['x'], seen['out'], total))

figure = plt.figure(figsize=(11, 3.6), facecolor='white')
canvas = figure.add_axes((0, 0, 1, 1))
canvas.set(xlim=(0, 11), ylim=(0, 3.6))
canvas.axis('off')
means = {k: F.adaptive_avg_pool2d(x[None], k)[0] for k in gates}
gates = {k: F.adaptive_avg_pool2d(z[0, channel][None], k)[0] for k, z in gates.items()}  # a pixel for each region
every_gate = torch.cat([z.flatten() for z in gates.values()])
darkest, brightest = float(every_gate.min()), float(every_gate.max())
gate_colours = {'cmap': 'viridis', 'vmin': darkest, 'vmax': brightest}


def around_zero(*values):
    """Colours from purple, the largest negative value, over white, 0, to orange."""
    bound = float(max(value.abs().max() for value in values))
    return {'cmap': 'PuOr_r', 'vmin': -bound, 'vmax': bound}


def draw(values, left, bottom, size, title, **colours):
    """A map with its title above it."""
    axes = figure.add_axes((left / 11, bottom / 3.6, size / 11, size / 3.6))
    axes.imshow(values, **colours)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=INK, linewidth=0.8)
    canvas.text(left + size / 2, bottom + size + 0.06, title, ha='center', va='bottom', color=INK, fontsize=9)


def arrow(start, end):
    """An arrow between two points."""
    canvas.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=10, color=GREY, linewidth=1.2))


def box(left, bottom, width, height, text):
    """A box with a text in it."""
    style = {'boxstyle': 'round,pad=0.04', 'facecolor': '#eef2f7', 'edgecolor': INK, 'linewidth': 0.8}
    canvas.add_patch(FancyBboxPatch((left, bottom), width, height, **style))
    canvas.text(left + width / 2, bottom + height / 2, text, ha='center', va='center', color=INK, fontsize=9)


draw(x, 0.2, 1.1, 1.4, 'x, one channel', **around_zero(x))
for k, bottom in ((1, 2.5), (2, 1.4), (4, 0.3)):
    draw(means[k], 2.2, bottom, 0.8, f'means, {k}×{k}', **around_zero(*means.values()))
    draw(gates[k], 5.5, bottom, 0.8, f'gates, {k}×{k}', **gate_colours)
    arrow((1.7, 1.8), (2.1, bottom + 0.4))
    arrow((3.1, bottom + 0.4), (3.5, bottom + 0.4))
    arrow((5.0, bottom + 0.4), (5.4, bottom + 0.4))
    arrow((6.4, bottom + 0.4), (6.95, 1.8))
box(3.6, 0.3, 1.3, 3.0, 'one gate,\na group of\nchannels\nfor each scale\n\n1×1 conv\nBN, ReLU\n1×1 conv\nBN, sigmoid')
draw(total, 7.0, 1.3, 1.0, 'Z, their mean', **gate_colours)
arrow((8.1, 1.8), (8.5, 1.8))
canvas.text(8.72, 1.8, '⊙', ha='center', va='center', color=INK, fontsize=18)
canvas.plot([0.9, 0.9, 8.72, 8.72], [1.0, 0.1, 0.1, 1.5], color=GREY, linewidth=1.2)
arrow((8.95, 1.8), (9.3, 1.8))
draw(out, 9.4, 1.1, 1.4, 'x ⊙ Z', **around_zero(x))
canvas.text(
    7.5, 0.75, f'gates from {darkest:.2f} (dark)\nto {brightest:.2f} (bright)', ha='center', color=INK, fontsize=8
)
figure.savefig(DOCS / 'layer.png', dpi=130, metadata={'Software': None})
