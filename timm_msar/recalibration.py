"""Multi-Scale Spatially-Asymmetric Recalibration (MS-SAR)

Paper: `Multi-Scale Spatially-Asymmetric Recalibration for Image Classification` (Wang et al., ECCV 2018)

Every response is multiplied by a gate between 0 and 1 that is computed from its surroundings at several scales:

    y   = mean of x over S_K(h, w), the positions around (h, w) at scale K
    z_K = σ2(Ω2 · σ1(Ω1 · y))      σ1 is BN and ReLU, σ2 is BN and sigmoid     Eq. (1)
    x̃   = x · 1/L · Σ_K z_K                                                    Eq. (2)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .gate import Gate
from .regions import STRATEGIES, spread, times

torch.fx.wrap('spread')
torch.fx.wrap('times')


class MultiScaleRecalibration(nn.Module):
    """Multiplies each response by gates computed from the regions around it, at several scales (Sections 3.2, 3.3).

    Args:
        channels: Channels D of the tensor to recalibrate.
        scales: The scales L, in any order. K divides the map into K×K regions or slides a window of about 2/K its size.
        rd_ratio: Width of the gates' hidden layer, D' = int(rd_ratio · D / L), at least 1.
        strategy: 'regional', or 'sliding': a square window of half-width ⌊√(H·W)/K⌋, clipped at the border.
        source_channels: Channels of the tensor that the gates are computed from, if that is not the one recalibrated.
        act_layer, gate_layer: Activations in σ1 and σ2, of each value by itself.

    Raises:
        ValueError: `scales` or `strategy` is not one of the values allowed.
    """

    def __init__(
        self,
        channels: int,
        scales: Sequence[int] = (1, 2, 4),
        rd_ratio: float = 1.0,
        strategy: str = 'regional',
        source_channels: int | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        gate_layer: str | type[nn.Module] = 'sigmoid',
        device=None,
        dtype=None,
    ):
        super().__init__()
        distinct = isinstance(scales, (list, tuple)) and len(set(scales)) == len(scales) > 0
        if not distinct or not all(type(k) is int and k > 0 for k in scales):
            raise ValueError(f'scales must be distinct positive integers, such as (1, 2, 4), not {scales!r}.')
        if strategy not in list(STRATEGIES):  # which asks for no hash
            raise ValueError(f'strategy must be {" or ".join(map(repr, STRATEGIES))}, not {strategy!r}.')
        self.channels, self.source_channels = channels, source_channels or channels
        self.scales, self.strategy = sorted(scales), strategy
        self.regions = STRATEGIES[strategy](self.scales)
        widths = self.source_channels, max(1, int(rd_ratio * channels / len(self.scales))), channels
        gate = Gate(*widths, len(self.scales), act_layer, gate_layer, device=device, dtype=dtype)
        self.gate = nn.Sequential()
        self.gate.add_module('_'.join(map(str, self.scales)), gate)  # this name keeps weights of other scales out

    def extra_repr(self) -> str:
        return f'{self.channels}, scales={self.scales}, strategy={self.strategy}'

    def gates(self, x: Tensor, source: Tensor | None = None) -> dict[int, Tensor]:
        """z_K at every position for each scale K, of the shape of x, from what `forward` takes. Their mean is Z."""
        y = self.regions(x if source is None else source)
        z = self.gate(y).unflatten(1, (len(self.scales), -1)).unbind(1)
        return {k: spread(z_k, x, 1, self.regions.at_cells).reshape(x.shape) for k, z_k in zip(self.scales, z)}

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """x ⊙ Z, Eq. (2), of x, (B, channels, H, W), with Z of `source`, (B, source_channels, H, W), or of x."""
        y = self.regions(x if source is None else source)
        return times(x, spread(self.gate(y), x, len(self.scales), self.regions.at_cells))
