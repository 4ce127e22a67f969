"""The gates of a network for a batch of images, and how far they differ from place to place, unlike those of SE."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from .recalibration import MultiScaleRecalibration

__all__ = ['asymmetry', 'gates']


def gates(model: nn.Module, images: Tensor, per_scale: bool = False) -> dict[str, Any]:
    """The gates of every MS-SAR layer in one forward pass in evaluation mode, without gradients.

    The model does not change, and another thread may use it at the same time.

    Args:
        model: A network with MultiScaleRecalibration layers, of this package or timm's with the layer in `block_args`.
        images: What the network takes, (B, C, H, W).
        per_scale: Return the gates z_K of each scale, not only their mean Z of Eq. (2).

    Returns:
        The gates of each layer, from 0, closed, to 1, open, by its name in `timm.utils.unwrap_model(model)` and in the
        order of the forward pass: (B, channels, height, width), or with `per_scale` a dict of such a tensor for each K.

    Raises:
        ValueError: The model has no MultiScaleRecalibration layer.
    """
    return _of_each_layer(model, images, dict if per_scale else _mean)


def asymmetry(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The share of the gates' variance that is over space, for every MS-SAR layer: 0 is nothing but SE.

    With the gates Z[b, c, p] of image b, channel c and position p, and population variances,

        share = Σ_c mean_b Var_p Z[b, c, p] / Σ_c Var_(b, p) Z[b, c, p]

    The denominator is the numerator plus the variance between images of an image's mean gate, which is all that SE has.
    So the share is 0 for `scales=(1,)`, 1 where every image has the same mean gates, and by definition 0 where nothing
    varies, as in a warm start. That channels have different means counts in neither: this does not depend on the image,
    so the weights beside the gate could do the same.

    Args:
        model: A network as for `gates`.
        images: At least two images, (B, C, H, W). Few give too high a share: of B images the variance between images
            is on average 1 - 1/B of that of many.

    Returns:
        The share of each layer, from 0 to 1, by its name.

    Raises:
        ValueError: The model has no MultiScaleRecalibration layer, or there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError('asymmetry compares images, so it needs at least two of them.')
    return _of_each_layer(model, images, lambda z: _share_over_space(_mean(z)))


def _of_each_layer(model: nn.Module, images: Tensor, result: Callable[[dict[int, Tensor]], Any]) -> dict[str, Any]:
    """`result` of the gates of each scale, for every layer that a forward pass in evaluation mode runs."""
    # A copy with the same tensors: its hooks and its mode are this call's own, and nothing has compiled it.
    model = unwrap_model(model)
    shared = [t for m in model.modules() for t in (*vars(m).values(), *m.parameters(False), *m.buffers(False))]
    model = copy.deepcopy(model, {id(t): t for t in shared if isinstance(t, Tensor)}).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MultiScaleRecalibration)}
    if not layers:
        raise ValueError(f'{type(model).__name__} has no MultiScaleRecalibration layer, so it has no gates.')
    found: dict[str, Any] = {}

    def keep(name: str, layer: MultiScaleRecalibration, args: tuple, kwargs: dict[str, Any]) -> None:
        found[name] = result(layer.gates(*args, **kwargs))

    for name, layer in layers.items():
        layer.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
    with torch.no_grad():
        model(images)
    return found


def _mean(z: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(z.values())).mean(0)


def _share_over_space(z: Tensor) -> float:
    z = z.cpu().double().flatten(2)
    # A variance does not change by what is subtracted. Equal gates are exactly 0 then, and so is their variance.
    over_space = (z - z[:, :, :1]).var(2, correction=0).mean(0).sum()
    total = (z - z[:1, :, :1]).var((0, 2), correction=0).sum()
    return 0.0 if total == 0 else (over_space / total).item()
