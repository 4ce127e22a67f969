"""The sliding windows of Section 3.2: means over the square around each position, clipped at the border.

With R[p, q] = 1 where |p - q| ≤ √(H·W)/K, else 0, and with R̄, the rows of R divided by their sums, y = R̄ x R̄ᵀ.
"""

import torch
from torch import Tensor

from .regions import mean_matrix


def windows(size: int, area: int, scale: int, x: Tensor) -> Tensor:
    """R of the windows along an axis of a map of H·W = `area` positions, (size, size), of 0 and 1."""
    position = torch.arange(size, device=x.device)
    distance = position - position[:, None]
    return (distance * distance * scale**2 <= area).to(x.dtype)  # |p - q| ≤ √(H·W)/K, in whole numbers


def sliding_means(x: Tensor, scales: list[int]) -> list[Tensor]:
    """y of x, (B, C, H, W), over the window around each position, for every scale: (B, C, H, W), too."""
    means: list[Tensor] = []
    height, width = x.shape[2], x.shape[3]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    maps = wide.flatten(0, 1)
    for scale in scales:
        rows = mean_matrix(windows(height, height * width, scale, wide))
        cols = mean_matrix(windows(width, height * width, scale, wide))
        y = torch.bmm(rows.expand(maps.shape[0], -1, -1), maps)
        y = torch.bmm(y, cols.T.expand(maps.shape[0], -1, -1))
        means.append(y.view(x.shape).to(x.dtype))
    return means
