"""Count the multiply-adds of a network, the "FLOPs" of the paper: those of convolutions and linear layers."""

import copy

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(
    model: nn.Module, input_size: tuple[int, int, int], without: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> int:
    """Count the multiply-adds of one image in evaluation; `model` stays as it is.

    Args:
        model: The network. On 'meta' nothing is computed, but a small network counts several times faster on the CPU.
        input_size: Channels, height and width of the image.
        without: Layers inside submodules of these classes do not count.
    """
    model = copy.deepcopy(model).eval()
    weight = next(model.parameters())
    image = torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    flops = counter.get_flop_counts()
    left_out = {layer for module in model.modules() if isinstance(module, without) for layer in module.modules()}
    # Matrix products outside of these modules are means over regions, which are no layers.
    counted = (
        flops.get(f'{type(model).__name__}.{name}', {})
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in left_out
    )
    return sum(sum(operations.values()) for operations in counted) // 2  # a multiplication and an addition are one
