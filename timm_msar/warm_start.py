"""Start an MS-SAR network from the weights of its plain network, computing the same function to the last bit

The last BN of each gate starts with weight and bias 0, so every gate is sigmoid(0) = 0.5, its gradient is largest, and
one weight next to the gate is doubled in turn: one that is linear in the gated tensor, with no activation between.
A factor of two changes no bit of a mantissa, so logits are equal, not close. (1/L may round with six scales or more.)
The price: under SGD the doubled weight moves by a quarter, relative to its size, of what it would move in the plain
network.

The networks of this package complete a plain checkpoint by themselves when it is loaded. `start_from_plain` does it for
timm's own ResNets that were given the layer by `block_args=dict(attn_layer=MultiScaleRecalibration)`.
"""

import logging
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .recalibration import MultiScaleRecalibration

_logger = logging.getLogger(__name__)

# What is doubled next to a block's layer; the module of a network adds its own block. timm's blocks have the layer
# behind these norms, and add the shortcut to its output.
DOUBLED: dict[type[nn.Module], tuple[str, ...]] = {
    BasicBlock: ('bn2.weight', 'bn2.bias'),
    Bottleneck: ('bn3.weight', 'bn3.bias'),
}


def start_from_plain(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load weights of the plain network, or of its SE network without the SE layers, into a network with MS-SAR.

    With plain weights the network computes what the plain one computes, to the last bit. With SE weights it does not,
    since their gates are gone, and a warning says so.

    Args:
        model: A network of this package, or a ResNet of timm's with the layer in its blocks.
        state_dict: Weights of the network without MS-SAR, with as many classes.

    Raises:
        ValueError: The model has no MS-SAR layer, or one in a block of which it is not known what follows the layer.
        RuntimeError: PyTorch's error where a key is missing or unexpected, or a shape differs.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no MultiScaleRecalibration layer to start.')
    for name in layers:
        if not _doubled(model, name):
            block = type(model.get_submodule(name.rpartition('.')[0])).__name__
            raise ValueError(
                f'{name} is in a block {block}, of which it is not known which weight follows the layer: start it from '
                'plain weights in a BasicBlock or Bottleneck of timm.models.resnet, or in a network of timm_msar.'
            )
    own = model.state_dict().keys()
    of_se = [key for key in state_dict if key not in own and key.startswith(tuple(f'{name}.' for name in layers))]
    if of_se:
        _logger.warning(
            f'{len(of_se)} tensors of SE layers, the first {of_se[0]}, have no place beside MS-SAR and are dropped: '
            'the network does not compute what it computed with them.'
        )
    completed = {key: value for key, value in state_dict.items() if key not in of_se}
    complete_gates(model, completed, '', trained_too=True)
    model.load_state_dict(completed)


def complete_gates(
    model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any, trained_too: bool = False
) -> None:
    """Complete a state dict of the plain network; for `register_load_state_dict_pre_hook` of a network.

    A state dict with some of the gates, or without what stands next to all of them, is for PyTorch to judge. So is one
    for a network whose gates are trained: neither as the constructor made them nor closed. And one for a network on the
    meta device, whose gates have no weights yet. Some loaders, such as PyTorch's `set_model_state_dict`, put the
    network's own tensors where keys are missing: these gates count as missing.

    Args:
        model: The network that loads.
        state_dict: What it loads; gate weights are added to it, and the weights next to the gates replaced.
        prefix: The network's name in `state_dict`.
        trained_too: Close gates that are trained, too.
    """
    layers, own = _layers(model), {f'{prefix}{key}': value for key, value in model.state_dict().items()}
    gates = {f'{prefix}{name}.{key}': name for name, layer in layers.items() for key in layer.state_dict()}
    doubled = {name: [f'{prefix}{key}' for key in _doubled(model, name)] for name in layers}

    def is_missing(key: str) -> bool:
        return key not in state_dict or _place(state_dict[key]) == _place(own[key])

    beside = [key for keys in doubled.values() for key in keys]
    if not all(doubled.values()) or not own.keys() >= {*gates, *beside}:  # a wrapper or pruning names weights anew
        return
    if any(own[key].is_meta or not is_missing(key) for key in gates) or any(map(is_missing, beside)):
        return
    if not trained_too and any(map(_is_trained, layers.values())):
        return
    for key in beside:
        state_dict[key] = 2 * state_dict[key]
    for key, name in gates.items():
        owner, like = key.rpartition('.')[0], state_dict[doubled[name][0]]
        folded = owner.endswith('.fc2') and f'{owner}.bias' in gates  # bn2 is in fc2
        closed = folded or key.endswith(('bn2.weight', 'bn2.bias'))
        value = torch.zeros_like(own[key]) if closed else own[key]
        # With assign=True these very tensors become the network's.
        state_dict[key] = value.to(like.device, like.dtype if value.is_floating_point() else None)


def _place(x: Tensor) -> tuple[Any, Any]:
    """Where a tensor lies. An address would not tell: those of empty shards are all 0."""
    x = x.to_local() if hasattr(x, 'to_local') else x  # of a DTensor, its own shard
    return x.untyped_storage()._cdata, x.storage_offset()


def _is_trained(layer: MultiScaleRecalibration) -> bool:
    """Whether the norms, or the biases they are folded into, are neither as they were made nor closed in the end.

    Frozen norms stay as they were made while the convolutions train, so they say nothing.
    """
    gate: Any = layer.gate[0]
    norms = {key: value for key, value in gate.state_dict().items() if key.startswith('bn') or key.endswith('bias')}
    is_new = all((value == key.endswith(('weight', 'running_var'))).all() for key, value in norms.items())
    trains = {name: parameter.requires_grad for name, parameter in gate.named_parameters()}
    is_frozen = 'bn1.weight' in norms and trains.get('fc1.weight', True) and not trains.get('bn1.weight')
    last = gate.bn2.state_dict() or gate.fc2.state_dict()
    return (is_frozen or not is_new) and any(last[key].any() for key in ('weight', 'bias'))


def _layers(model: nn.Module) -> dict[str, MultiScaleRecalibration]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MultiScaleRecalibration)}


def _doubled(model: nn.Module, layer: str) -> list[str]:
    """Names of the weights to double for a layer; none where it is not known."""
    name = layer.rpartition('.')[0]
    block = type(model.get_submodule(name))
    # A subclass with the same forward is the same: fully_shard makes one of each block.
    known = [weights for cls, weights in DOUBLED.items() if issubclass(block, cls) and block.forward is cls.forward]
    return [f'{name}.{weight}' for weight in known[0]] if known else []
