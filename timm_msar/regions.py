"""The coordinate sets of Section 3.2: means over them, and gates back from them to positions.

Regional: position (h, w) lies in region (⌊h·K/H⌋, ⌊w·K/W⌋) of scale K, so the K×K regions are a true partition of the
map. (Adaptive average pooling is not this: where K does not divide the size, its bins overlap.) The borders of all
scales together cut the map into pieces. Sums over the pieces take one pass over the map, sums over the regions of
every scale follow from them, and the average gate is constant on a piece, so scaling the map takes one pass too.

Sliding: a square window around each position, clipped at the border of the map.
"""

import math

import torch
from torch import Tensor


def _counted(size: int) -> int:
    """The size itself, as a constant when compiled: torch.compile unrolls the loop.

    It can neither sort borders that are symbols nor convolve a map whose size is one.
    """
    count = 0
    for _ in range(size):
        count += 1
    return count


def piece_lengths(size: int, scales: list[int]) -> list[int]:
    """Lengths of the pieces into which the region borders of `scales` cut an axis of `size` positions.

    A scale above the size counts as the size: a region is never smaller than a pixel.
    """
    size = _counted(size)
    borders: list[int] = []
    for scale in scales:
        k = min(scale, size)
        for i in range(k):
            border = (i * size + k - 1) // k  # the first position of region i
            if border not in borders:
                borders.append(border)
    borders.sort()
    borders.append(size)
    return [borders[i + 1] - borders[i] for i in range(len(borders) - 1)]


def _pieces_per_region(pieces: list[int], regions: list[int]) -> list[int]:
    """How many consecutive pieces make up each region, both given by their lengths."""
    counts: list[int] = []
    i = 0
    for length in regions:
        first = i
        while length > 0:
            length -= pieces[i]
            i += 1
        counts.append(i - first)
    return counts


def _all_equal(lengths: list[int]) -> bool:
    return min(lengths) == max(lengths)


def _sum_pieces(x: Tensor, dim: int, lengths: list[int]) -> Tensor:
    """Sum x along `dim` over pieces of the given lengths."""
    # Half precision overflows in the sum of a large region.
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    if _all_equal(lengths):
        return x.unflatten(dim, (len(lengths), lengths[0])).sum(dim + 1, dtype=dtype)
    return torch.stack([piece.sum(dim, dtype=dtype) for piece in x.split(lengths, dim)], dim)


def _mean_regions(sums: Tensor, dim: int, pieces: list[int], regions: list[int]) -> Tensor:
    """Means along `dim` over regions of the given lengths, from sums over pieces of the given lengths."""
    counts = _pieces_per_region(pieces, regions)
    if _all_equal(regions) and _all_equal(counts):
        return _sum_pieces(sums, dim, counts) / regions[0]
    means = [part.sum(dim) / length for part, length in zip(sums.split(counts, dim), regions)]
    return torch.stack(means, dim)


def _spread(z: Tensor, dim: int, lengths: list[int]) -> Tensor:
    """Repeat entry i of z along `dim` lengths[i] times."""
    if _all_equal(lengths):
        return z if lengths[0] == 1 else z.repeat_interleave(lengths[0], dim)
    shape = list(z.shape)
    spread: list[Tensor] = []
    for entry, length in zip(z.split(1, dim), lengths):
        shape[dim] = length
        spread.append(entry.expand(shape))
    return torch.cat(spread, dim)


def regional_means(x: Tensor, scales: list[int]) -> list[Tensor]:
    """Mean y of x over each region: for scale K a tensor (B, C, K, K), from one pass over x, (B, C, H, W)."""
    height, width = x.shape[2], x.shape[3]
    rows, cols = piece_lengths(height, scales), piece_lengths(width, scales)
    sums = _sum_pieces(_sum_pieces(x, 2, rows), 3, cols)
    means: list[Tensor] = []
    for k in scales:
        y = _mean_regions(sums, 2, rows, piece_lengths(height, [k]))
        y = _mean_regions(y, 3, cols, piece_lengths(width, [k]))
        means.append(y.to(x.dtype))
    return means


def sliding_mean(x: Tensor, scale: int) -> Tensor:
    """Mean y of x, (B, C, H, W), over the clipped window of half-width ⌊√(H·W)/K⌋ around each position."""
    reach = int(math.sqrt(_counted(x.shape[2]) * _counted(x.shape[3]))) // scale
    # A clipped window is a rectangle, so its mean is the mean over its rows of the means over its columns.
    return _window_weights(x, 2, reach) @ x @ _window_weights(x, 3, reach).T


def _window_weights(x: Tensor, dim: int, reach: int) -> Tensor:
    """Matrix that takes the mean over the positions within `reach` of each one along `dim` of x."""
    position = torch.arange(x.shape[dim], device=x.device)
    window = ((position[:, None] - position).abs() <= reach).to(x.dtype)
    return window / window.sum(1, keepdim=True)


def average_on_pieces(z: list[Tensor], x: Tensor, scales: list[int]) -> Tensor:
    """1/L · Σ z_K on the pieces of the map x, from the gates z_K, (B, C, K, K), of every scale K."""
    height, width = x.shape[2], x.shape[3]
    rows, cols = piece_lengths(height, scales), piece_lengths(width, scales)
    parts: list[Tensor] = []
    for k, z_k in zip(scales, z):
        z_k = _spread(z_k, 2, _pieces_per_region(rows, piece_lengths(height, [k])))
        parts.append(_spread(z_k, 3, _pieces_per_region(cols, piece_lengths(width, [k]))))
    return average(parts)


def average(z: list[Tensor]) -> Tensor:
    """1/L · Σ z_K of gates at one resolution."""
    total = z[0]
    for z_k in z[1:]:
        total = total + z_k
    return total / len(z)


def spread_pieces(z: Tensor, x: Tensor, scales: list[int]) -> Tensor:
    """Gates z on the pieces of the map x, as gates at each of its positions, (B, C, H, W)."""
    return _spread(_spread(z, 2, piece_lengths(x.shape[2], scales)), 3, piece_lengths(x.shape[3], scales))


def scale_pieces(x: Tensor, z: Tensor, scales: list[int]) -> Tensor:
    """x ⊙ Z with the gates z on the pieces of x, in one pass over x."""
    rows, cols = piece_lengths(x.shape[2], scales), piece_lengths(x.shape[3], scales)
    if _all_equal(rows) and _all_equal(cols):
        pieces = x.unflatten(3, (len(cols), cols[0])).unflatten(2, (len(rows), rows[0]))
        return (pieces * z[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)
    return x * spread_pieces(z, x, scales)
