"""Count the multiply-adds of a network, the "FLOPs" of the paper: those of convolutions and linear layers."""

import copy

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def multiply_adds(
    model: nn.Module, input_size: tuple[int, int, int], without: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> int:
    """Count the multiply-adds of one image in evaluation. Nothing is computed, and `model` stays as it is.

    Args:
        model: The network, on any device.
        input_size: Channels, height and width of the image.
        without: Submodules of these classes do not count.
    """
    meta = copy.deepcopy(model).to('meta').eval()
    image = torch.empty(1, *input_size, device='meta', dtype=next(meta.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(image)
    flops = counter.get_flop_counts()

    def of(name: str) -> int:
        # Other matrix products are means over regions, not layers. Two floating-point operations are one multiply-add.
        return sum(flops[name].get(operation, 0) for operation in (aten.convolution, aten.addmm)) // 2

    left_out = [name for name, module in meta.named_modules() if isinstance(module, without)]
    return of('Global') - sum(of(f'{type(meta).__name__}.{name}') for name in left_out)
