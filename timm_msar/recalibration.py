"""Multi-Scale Spatially-Asymmetric Recalibration (MS-SAR)

Paper: `Multi-Scale Spatially-Asymmetric Recalibration for Image Classification` (Wang et al., ECCV 2018)

Every response is multiplied by a gate between 0 and 1 that is computed from its surroundings at several scales:

    y   = mean of x over S_K(h, w), the positions around (h, w) at scale K
    z_K = σ2(Ω2 · σ1(Ω1 · y))      σ1 is BN and ReLU, σ2 is BN and sigmoid     Eq. (1)
    x̃   = x · 1/L · Σ_K z_K                                                    Eq. (2)

With the one scale {1} this is Squeeze-and-Excitation with normalisation inside the gate.
"""

import math
from collections.abc import Sequence
from typing import SupportsFloat, SupportsIndex

import torch
from timm.layers import get_act_layer
from torch import Tensor, nn

from .gate import Gate
from .regions import matrix_if_needed, recalibrate, region_matrix, regional_means
from .windows import sliding_means

__all__ = ['MultiScaleRecalibration']

# These follow the size of the map, which a symbolic tracer does not know: it records a call to them instead.
torch.fx.wrap('matrix_if_needed')
torch.fx.wrap('regional_means')
torch.fx.wrap('sliding_means')
torch.fx.wrap('recalibrate')


def _check_scales(scales: Sequence[int]) -> list[int]:
    """Return `scales` in ascending order, raise ValueError where they are not distinct positive integers."""
    valid = isinstance(scales, Sequence) and len(scales) > 0
    valid = valid and all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in scales)
    if not valid or len(set(scales)) != len(scales):
        raise ValueError(f'scales must be one or more distinct positive integers, such as (1, 2, 4), not {scales!r}.')
    return sorted(scales)


class MultiScaleRecalibration(nn.Module):
    """Multiplies each response by gates computed from the regions around it, at several scales (Sections 3.2, 3.3).

    A checkpoint holds, for a scale K, `scale.K.fc1` (Ω1), `scale.K.bn1`, `scale.K.fc2` (Ω2) and `scale.K.bn2`.

    Args:
        channels: Channels D of the tensor to recalibrate.
        scales: The scales L, in any order. K divides the map into K×K regions or slides a window of about 2/K its size.
        rd_ratio: Width of the gates' hidden layer, D' = int(rd_ratio · D / L), at least 1. With 1, the paper's D/L,
            the number of weights does not depend on how many scales there are.
        rd_channels: D' itself, in place of `rd_ratio`.
        strategy: 'regional' (a partition into K×K regions) or 'sliding' (a square window of half-width
            ⌊√(H·W)/K⌋ around each position, clipped at the border).
        source_channels: Channels of the tensor that the gates are computed from, if that is not the one recalibrated.
        act_layer: Activation σ1, of each value by itself.
        gate_layer: Activation σ2, of each value by itself.

    Raises:
        ValueError: `channels`, `scales`, `rd_ratio`, `rd_channels`, `strategy` or `source_channels` is not one of the
            values allowed.
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
        gate_layer: str | type[nn.Module] = 'sigmoid',
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.scales = _check_scales(scales)
        for name, value in (
            ('channels', channels),
            ('source_channels', source_channels),
            ('rd_channels', rd_channels),
        ):
            if value is not None and not (isinstance(value, SupportsIndex) and value > 0):
                raise ValueError(f'{name} must be a positive integer, not {value!r}.')
        if not (isinstance(rd_ratio, SupportsFloat) and 0 < rd_ratio < math.inf):
            raise ValueError(f'rd_ratio must be a positive number, not {rd_ratio!r}.')
        for name, act in (('act_layer', act_layer), ('gate_layer', gate_layer)):
            try:
                known = get_act_layer(act)
            except KeyError:
                known = None
            if known is None:
                raise ValueError(f"{name} must be a module or timm's name of one, such as 'relu', not {act!r}.")
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

    def gates(self, x: Tensor, source: Tensor | None = None) -> dict[int, Tensor]:
        """The gates of each scale at every position; their mean is Z of Eq. (2).

        Args:
            x: The tensor to recalibrate, (B, channels, H, W).
            source: The tensor that the gates are computed from, (B, source_channels, H, W); by default x itself.

        Returns:
            For each scale K gates of the shape of x.
        """
        source = x if source is None else source
        if self.strategy == 'sliding':
            return dict(zip(self.scales, self.z(sliding_means(source, self.scales))))
        z = self.z(regional_means(source, self.scales, matrix_if_needed(x, self.scales)))
        ones = torch.ones_like(x)
        return {k: recalibrate(ones, [z_k], [k], region_matrix(x, [k])) for k, z_k in zip(self.scales, z)}

    def z(self, y: list[Tensor]) -> list[Tensor]:
        """z_K of every scale, Eq. (1), from its y, (B, source_channels, h, w), as (B, channels, h, w)."""
        return [gate(y[i]) for i, gate in enumerate(self.scale.values())]

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """x ⊙ Z, Eq. (2). In training, x and source must not be changed in place before the backward pass.

        Args:
            x: The tensor to recalibrate, (B, channels, H, W).
            source: The tensor that the gates are computed from, (B, source_channels, H, W); by default x itself.

        Returns:
            A tensor of the shape of x.
        """
        source = x if source is None else source
        if self.strategy == 'sliding':
            z = self.z(sliding_means(source, self.scales))
            return x * torch.stack(z).mean(0)
        matrix = matrix_if_needed(x, self.scales)
        z = self.z(regional_means(source, self.scales, matrix))
        return recalibrate(x, z, self.scales, matrix)
