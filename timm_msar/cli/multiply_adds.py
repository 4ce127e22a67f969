"""Count the multiply-adds of a network, the paper's "FLOPs": those of convolutions and linear layers."""

import copy
from typing import Any

import torch
from torch import nn

from ..recalibration import MultiScaleRecalibration


def multiply_adds(
    model: nn.Module, input_size: tuple[int, int, int], without: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> int:
    """Count the multiply-adds of one image (channels, height, width) in evaluation.

    `model` stays as it is, and may be on 'meta'. Layers inside modules of the classes `without` do not count.
    """
    model = copy.deepcopy(model).eval()
    total = 0

    def count(module: Any, _, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, MultiScaleRecalibration):
            total += _of_the_gates(module, output[:1, :1])
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


def _of_the_gates(layer: MultiScaleRecalibration, x: torch.Tensor) -> int:
    """The count of Section 3.5 for a map of the size of x: each weight once for each region of its scale.

    Of several scales the layer repeats the regions of some. Of one it computes each region once, so these are counted.
    """
    weights = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Conv2d))
    return weights // len(layer.scales) * sum(type(layer.regions)([k])(x).numel() for k in layer.scales)
