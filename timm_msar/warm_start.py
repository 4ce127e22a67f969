"""Start an MS-SAR network from the weights of its plain network, computing the same function to the last bit

A checkpoint without gate weights is completed as it is loaded. The last BN of each gate starts with weight and bias 0,
so every gate is sigmoid(0) = 0.5, where its gradient is largest, and the weights before the gate are doubled in turn.
A factor of two changes no bit of a mantissa, and ReLU and pooling between the two keep it: logits are equal, not close.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .recalibration import MultiScaleRecalibration


def complete_gates(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Complete a state dict of the plain network; for `register_load_state_dict_pre_hook` of a network.

    Args:
        model: The network that loads.
        state_dict: What it loads; gate weights are added to it and weights before the gates replaced.
        prefix: The network's name in `state_dict`.

    Raises:
        RuntimeError: Some gate weights are there and some are not.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MultiScaleRecalibration)}
    gates = {
        f'{prefix}{name}.{key}': value for name, layer in layers.items() for key, value in layer.state_dict().items()
    }
    # Checkpoints of PyTorch before 0.4 have no counters, and PyTorch does not ask for them.
    missing = [key for key in gates if key not in state_dict and not key.endswith('num_batches_tracked')]
    if missing and any(key in state_dict for key in gates):
        raise RuntimeError(
            f'{len(missing)} of {len(gates)} gate weights are missing from the checkpoint, the first is {missing[0]}: '
            'load one that has all of them, or one of the plain network, which has none.'
        )
    before = [f'{prefix}{key}' for name in layers for key in _weights_before(model, name.rpartition('.')[0])]
    if not missing or not all(key in state_dict for key in before):
        return
    for key in before:
        state_dict[key] = 2 * state_dict[key]
    for key, value in gates.items():
        closed = key.endswith(('bn2.weight', 'bn2.bias'))
        state_dict[key] = torch.zeros_like(value) if closed else value


def _weights_before(model: nn.Module, block: str) -> list[str]:
    """Names of the weights that scale what the gate of a block recalibrates: a BN's, or a dense layer's convolution."""
    names = ('bn2.weight', 'bn2.bias') if hasattr(model.get_submodule(block), 'bn2') else ('conv2.weight',)
    return [f'{block}.{name}' for name in names]
