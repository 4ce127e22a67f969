"""Multi-Scale Spatially-Asymmetric Recalibration (MS-SAR)

Paper: `Multi-Scale Spatially-Asymmetric Recalibration for Image Classification` (Wang et al., ECCV 2018)

Every response is multiplied by a gate between 0 and 1 that is computed from its surroundings at several scales:

    y   = mean of x over S_K(h, w), the positions around (h, w) at scale K
    z_K = σ2(Ω2 · σ1(Ω1 · y))      σ1 is BN and ReLU, σ2 is BN and sigmoid     Eq. (1)
    x̃   = x · 1/L · Σ_K z_K                                                    Eq. (2)

With the one scale {1} this is Squeeze-and-Excitation with normalisation inside the gate.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_act_layer
from timm.models import register_notrace_module
from torch import Tensor

from .regions import average, average_on_pieces, regional_means, scale_pieces, sliding_mean, spread_pieces

__all__ = ['MultiScaleRecalibration']

# These follow the size of the map, which a symbolic tracer does not know: it records a call to them instead.
for _name in ('regional_means', 'sliding_mean', 'average_on_pieces', 'spread_pieces', 'scale_pieces'):
    torch.fx.wrap(_name)


def _check_scales(scales: Sequence[int]) -> list[int]:
    """Return `scales` as a list, raise ValueError where they are not distinct positive integers."""
    valid = isinstance(scales, Sequence) and len(scales) > 0
    valid = valid and all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in scales)
    if not valid or len(set(scales)) != len(scales):
        raise ValueError(f'scales must be one or more distinct positive integers, such as (1, 2, 4), not {scales!r}.')
    return list(scales)


@torch.fx.wrap
def _check_cube(x: Tensor, channels: int, name: str) -> Tensor:
    """Return `x` if it is a floating point cube of `channels` channels, raise ValueError or TypeError if not."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f'{name} must have the shape (batch, {channels}, height, width), not {list(x.shape)}.')
    if not x.is_floating_point():
        raise TypeError(f'{name} must be a floating point tensor, not {x.dtype}: convert it, with {name}.float().')
    return x


@torch.fx.wrap
def _check_source(source: Tensor, x: Tensor) -> Tensor:
    """Return `source` if it covers the same images and positions as `x`, raise ValueError if not."""
    if source.shape[0] != x.shape[0] or source.shape[2:] != x.shape[2:]:
        raise ValueError(
            f'source must have the batch, height and width of x, {list(x.shape)}, not the shape {list(source.shape)}.'
        )
    return source


def _normalise(norm: nn.Module, y: Tensor) -> Tensor:
    """Apply `norm`; a batch norm in training that is given one value a channel uses its running statistics.

    One value has no variance, so PyTorch raises there. It happens at scale 1 with a batch of one image, which is how
    detection and segmentation networks are fine-tuned. (SyncBatchNorm sees the other processes' values.)
    """
    # Not a subclass: timm's BatchNormAct2d does more than normalise.
    single = norm.training and y.numel() == y.shape[1]
    if single and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(y)


class Gate(nn.Module):
    """The recalibration function of one scale, Eq. (1): two 1×1 convolutions, normalised, with ReLU and sigmoid."""

    def __init__(
        self,
        source_channels: int,
        rd_channels: int,
        channels: int,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        gate_layer: str | type[nn.Module] = 'sigmoid',
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Conv2d(source_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.bn1 = norm_layer(rd_channels, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.bn2 = norm_layer(channels, **dd)
        self.gate = create_act_layer(gate_layer)

    def forward(self, y: Tensor) -> Tensor:
        """Map means y, (B, source_channels, h, w), to gates z, (B, channels, h, w)."""
        if torch.jit.is_scripting():  # TorchScript cannot pass a module to a function
            y = self.act(self.bn1(self.fc1(y)))
            return self.gate(self.bn2(self.fc2(y)))
        y = self.act(_normalise(self.bn1, self.fc1(y)))
        return self.gate(_normalise(self.bn2, self.fc2(y)))


@register_notrace_module
class MultiScaleRecalibration(nn.Module):
    """Multiplies each response by gates computed from the regions around it, at several scales (Sections 3.2, 3.3).

    A checkpoint holds, for a scale K, `scale.K.fc1` (Ω1), `scale.K.bn1`, `scale.K.fc2` (Ω2) and `scale.K.bn2`.

    Args:
        channels: Channels D of the tensor to recalibrate.
        scales: The scales L. Scale K divides the map into K×K regions, or slides a window of about 2/K its size.
        rd_ratio: Width of the gates' hidden layer, D' = int(rd_ratio · D / L), at least 1. With 1, the paper's D/L,
            the number of weights does not depend on how many scales there are.
        rd_channels: D' itself, in place of `rd_ratio`.
        strategy: 'regional' (a partition into K×K regions) or 'sliding' (a square window of half-width
            ⌊√(H·W)/K⌋ around each position, clipped at the border).
        source_channels: Channels of the tensor that the gates are computed from, if that is not the one recalibrated.
        act_layer: Activation σ1.
        norm_layer: Normalisation before both activations.
        gate_layer: Activation σ2.

    Raises:
        ValueError: `scales`, `rd_ratio`, `rd_channels` or `strategy` is not one of the values allowed.
    """

    def __init__(
        self,
        channels: int,
        scales: Sequence[int] = (1, 2, 4),
        rd_ratio: float = 1.0,
        rd_channels: int | None = None,
        strategy: str = 'regional',
        source_channels: int | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        gate_layer: str | type[nn.Module] = 'sigmoid',
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.scales = _check_scales(scales)
        if not rd_ratio > 0:
            raise ValueError(f'rd_ratio must be a positive number, not {rd_ratio!r}.')
        if rd_channels is not None and rd_channels < 1:
            raise ValueError(f'rd_channels must be a positive integer, or None to use rd_ratio, not {rd_channels!r}.')
        if strategy not in ('regional', 'sliding'):
            raise ValueError(f"strategy must be 'regional' or 'sliding', not {strategy!r}.")
        self.channels = channels
        self.source_channels = source_channels or channels
        self.strategy = strategy
        rd_channels = rd_channels or max(1, int(rd_ratio * channels / len(self.scales)))
        self.scale = nn.ModuleDict(
            {
                str(k): Gate(
                    self.source_channels,
                    rd_channels,
                    channels,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    gate_layer=gate_layer,
                    device=device,
                    dtype=dtype,
                )
                for k in self.scales
            }
        )

    def extra_repr(self) -> str:
        """The arguments that the sub-modules do not show."""
        return f'{self.channels}, scales={self.scales}, strategy={self.strategy}'

    def _checked_source(self, x: Tensor, source: Tensor | None) -> Tensor:
        """The tensor that the gates are computed from, checked together with x."""
        x = _check_cube(x, self.channels, 'x')
        if source is None:
            if self.source_channels != self.channels:
                raise ValueError(f'source must be given: the gates are computed from {self.source_channels} channels.')
            return x
        return _check_source(_check_cube(source, self.source_channels, 'source'), x)

    def _z(self, source: Tensor) -> list[Tensor]:
        """z_K of every scale, Eq. (1): on its K×K regions, or at every position when sliding."""
        if self.strategy == 'regional':
            y = regional_means(source, self.scales)
        else:
            y = [sliding_mean(source, k) for k in self.scales]
        return [gate(y[i]) for i, gate in enumerate(self.scale.values())]

    def gates(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Z of Eq. (2) at full resolution.

        Args:
            x: The tensor to recalibrate, (B, channels, H, W).
            source: The tensor that the gates are computed from, (B, source_channels, H, W); by default x itself.

        Returns:
            Gates of the shape of x.

        Raises:
            ValueError: A shape is not the one above.
            TypeError: A tensor is not floating point.
        """
        z = self._z(self._checked_source(x, source))
        if self.strategy == 'regional':
            return spread_pieces(average_on_pieces(z, x, self.scales), x, self.scales)
        return average(z)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """x ⊙ Z, Eq. (2); arguments and errors are those of `gates`."""
        z = self._z(self._checked_source(x, source))
        if self.strategy == 'regional':
            return scale_pieces(x, average_on_pieces(z, x, self.scales), self.scales)
        return x * average(z)
