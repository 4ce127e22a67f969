"""How train.py prepared the images that a network was validated on."""

from typing import Any

import numpy as np
from timm.data import resolve_data_config
from torch import nn


def data_config(args: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return what timm's `create_transform` needs, with one mean and one std for each channel.

    Where their number differs from the channels', as when a network of grey images has ImageNet's three means, timm's
    loader takes their average, and so does this.

    Args:
        args: Arguments of train.py, which come before the network's own; {} for those alone.
        model: The network.
    """
    config = resolve_data_config(args, model=model)
    channels = config['input_size'][0]
    for name in ('mean', 'std'):
        if len(config[name]) != channels:
            config[name] = (np.mean(config[name]).item(),) * channels
    return config
