"""Count the multiply-adds of a network, the paper's "FLOPs": those of convolutions and linear layers."""

import copy
from typing import Any

import torch
from torch import nn

from ..recalibration import MultiScaleRecalibration


def multiply_adds(
    model: nn.Module, input_size: tuple[int, int, int], without: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> int:
    """Count the multiply-adds of one image in evaluation. `model` stays as it is, and may be on 'meta'.

    Args:
        model: The network.
        input_size: Channels, height and width of the image.
        without: Layers inside modules of these classes do not count.
    """
    model = copy.deepcopy(model).eval()
    total = 0

    def count(module: Any, _, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, MultiScaleRecalibration):
            total += _of_the_gates(module, *output.shape[2:])
        else:
            total += output[0].numel() * module.weight[0].numel()

    left_out = [module for module in model.modules() if isinstance(module, (MultiScaleRecalibration, without))]
    hidden = {layer for module in left_out for layer in module.modules()}
    for module in model.modules():
        counted = isinstance(module, (nn.Conv2d, nn.Linear)) and module not in hidden
        if counted or isinstance(module, MultiScaleRecalibration):
            module.register_forward_hook(count)
    weight = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype))
    return total


def _of_the_gates(layer: MultiScaleRecalibration, height: int, width: int) -> int:
    """The count of Section 3.5, with one gate for each distinct region. The layer computes one for each cell."""
    fc1 = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
    regions = [height * width if layer.strategy == 'sliding' else min(k, height) * min(k, width) for k in layer.scales]
    return fc1.out_channels // fc1.groups * (layer.source_channels + layer.channels) * sum(regions)
