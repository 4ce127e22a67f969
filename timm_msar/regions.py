"""The coordinate sets S_K of Section 3.2: means over them, and gates back from them to positions.

Along an axis of `size` positions, position p is in region ⌊p·K/size⌋ of scale K. The regions are a true partition.
(Adaptive average pooling is not: where K does not divide the size, its bins overlap.) With R[i, p] = 1 where position p
is in region i, else 0, and with R̄, the rows of R divided by their sums,

    y = R̄ x R̄ᵀ        Z = 1/L · Σ_K Rᵀ z_K R

is the definition, for every size. Here it is written with the positions of x in one row, as (R ⊗ R) x, so that one
matrix holds the regions of every scale. It also is what runs where sizes are symbols, when a network is traced or
exported. Where every scale divides the map, regions are blocks of memory, and views of them are faster.

A sliding window has another R, with a row for each position: R[p, q] = 1 where |p - q| ≤ √(H·W)/K.
"""

import math

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def count(size: int, scale: int) -> int:
    """Regions of scale K along an axis: K, but where the size is a number no more than that."""
    # An empty region would count in the statistics of batch norm. A symbol cannot be compared.
    if torch.jit.is_scripting():
        return min(scale, size)
    return min(scale, size) if isinstance(size, int) and not torch.compiler.is_exporting() else scale


def regions(size: int, scale: int, device: torch.device) -> Tensor:
    """R of the regions along an axis, (count, size), of truth values."""
    k = count(size, scale)
    region = torch.arange(size, device=device) * k // size
    return region == torch.arange(k, device=device)[:, None]


def window_matrix(size: int, area: int, scale: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """R of the windows along an axis of a map of H·W = `area` positions, (size, size)."""
    position = torch.arange(size, device=device)
    distance = position - position[:, None]
    return (distance * distance * scale**2 <= area).to(dtype)  # |p - q| ≤ √(H·W)/K, in whole numbers


def mean_matrix(matrix: Tensor) -> Tensor:
    """R̄ of R: each row divided by its sum; an empty region stays 0."""
    return matrix / matrix.sum(1, keepdim=True).clamp(min=1)


def sliding_means(x: Tensor, scales: list[int]) -> list[Tensor]:
    """y of x, (B, C, H, W), over the window around each position, as (B, H·W, C), for every scale."""
    means: list[Tensor] = []
    height, width = x.shape[2], x.shape[3]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cube = wide.flatten(0, 1)
    for scale in scales:
        rows = mean_matrix(window_matrix(height, height * width, scale, x.device, wide.dtype))
        cols = mean_matrix(window_matrix(width, height * width, scale, x.device, wide.dtype))
        y = torch.bmm(rows.expand(cube.shape[0], -1, -1), cube)
        y = torch.bmm(y, cols.T.expand(cube.shape[0], -1, -1))
        means.append(y.unflatten(0, x.shape[:2]).flatten(2).transpose(1, 2).to(x.dtype))
    return means


def region_matrix(x: Tensor, scales: list[int]) -> Tensor | None:
    """R ⊗ R of all scales for a map x, (B, C, H, W): a row for each region, a column for each of the H·W positions.

    None where the regions are equal blocks, which need no matrix.
    """
    if are_blocks(x, scales):
        return None
    matrices: list[Tensor] = []
    for k in scales:
        rows = cols = regions(x.shape[2], k, x.device)
        if not is_known(x.shape[2] == x.shape[3]):
            cols = regions(x.shape[3], k, x.device)
        cube = torch.logical_and(rows[:, None, :, None], cols[:, None, :])  # torch.kron takes sizes for numbers
        matrices.append(cube.flatten(2).flatten(0, 1))
    return torch.cat(matrices).to(x.dtype)


def are_blocks(x: Tensor, scales: list[int]) -> bool:
    """Whether every scale is known to divide the map into equal regions."""
    return is_known(x.shape[2] % finest(scales) == 0) and is_known(x.shape[3] % finest(scales) == 0)


def is_known(condition: bool) -> bool:
    """Whether a condition on sizes holds without asking it of a symbol, which would make a graph for each answer."""
    if torch.jit.is_scripting():
        return condition
    return isinstance(condition, bool | torch.SymBool) and statically_known_true(condition)


def finest(scales: list[int]) -> int:
    """The least common multiple of the scales: each of its blocks lies in one region of every scale."""
    multiple = 1
    for k in scales:
        multiple = multiple * k // math.gcd(multiple, k)
    return multiple


def regional_means(x: Tensor, scales: list[int], matrix: Tensor | None) -> list[Tensor]:
    """y of x, (B, C, H, W), over the regions of every scale K, as (B, n, C) for its n = K² regions or fewer."""
    means: list[Tensor] = []
    if matrix is not None:
        rows = mean_matrix(matrix).expand(x.shape[0], -1, -1)
        y = torch.bmm(rows, x.flatten(2).transpose(1, 2))
        for part in y.split([count(x.shape[2], k) * count(x.shape[3], k) for k in scales], dim=1):
            means.append(part)
        return means
    # Reductions are fast in the order in which the map lies in memory. Half precision would overflow in large regions.
    # Other types are not named: LiteRT's converter takes a mean without one only.
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    if channels_last:
        blocks = block_means(x.permute(0, 2, 3, 1), 1, finest(scales), wide)
    else:
        blocks = block_means(x, 2, finest(scales), wide).permute(0, 2, 3, 1)
    for k in scales:
        means.append(block_means(blocks, 1, k, wide).to(x.dtype).flatten(1, 2))
    return means


def block_means(x: Tensor, dim: int, k: int, dtype: torch.dtype | None) -> Tensor:
    """Means over k×k equal blocks along `dim` and the next axis."""
    if k == x.shape[dim] and k == x.shape[dim + 1]:
        return x
    if k == 1:
        return x.mean((dim, dim + 1), keepdim=True, dtype=dtype)
    x = x.unflatten(dim, (k, x.shape[dim] // k)).mean(dim + 1, dtype=dtype)
    return x.unflatten(dim + 1, (k, x.shape[dim + 1] // k)).mean(dim + 2)


def repeat(z: Tensor, dim: int, size: int) -> Tensor:
    """Repeat each of the blocks along `dim`, so that there are `size` entries. One block is broadcast."""
    k = z.shape[dim]
    return z if k in (1, size) else z.repeat_interleave(size // k, dim)


def average(z: list[Tensor]) -> Tensor:
    """1/L · Σ_K z_K of tensors that can be added by broadcasting."""
    total = z[0]
    for z_k in z[1:]:
        total = total + z_k
    return total / len(z)


def recalibrate(x: Tensor, z: list[Tensor], scales: list[int], matrix: Tensor | None) -> Tensor:
    """x ⊙ Z of x, (B, C, H, W), with Z = 1/L · Σ_K z_K of the gates z_K at the regions of every scale K, (B, K², C)."""
    height, width = x.shape[2], x.shape[3]
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if matrix is not None:
        rows = torch.cat(z, 1) / len(scales)
        if channels_last:
            gates = torch.bmm(matrix.T.expand(x.shape[0], -1, -1), rows)
            return x * gates.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        gates = torch.bmm(rows.transpose(1, 2), matrix.expand(x.shape[0], -1, -1))
        return x * gates.view(x.shape[0], gates.shape[1], height, width)
    k = finest(scales)
    grids = [repeat(repeat(z_k.unflatten(1, (scale, scale)), 1, k), 2, k) for scale, z_k in zip(scales, z)]
    gates, dim = average(grids), 1  # the rows' axis; the columns' is the next
    if not channels_last:
        gates, dim = gates.permute(0, 3, 1, 2).contiguous(), 2
    gates = repeat(gates, dim + 1, width)
    cube = x.permute(0, 2, 3, 1) if channels_last else x
    cube = (cube.unflatten(dim, (k, height // k)) * gates.unsqueeze(dim + 1)).flatten(dim, dim + 1)
    cube = cube.permute(0, 3, 1, 2) if channels_last else cube
    if torch.jit.is_scripting():
        return cube
    # Blocks add to the result in place. Under autograd that would hide the gradient of a view from hooks on it, and
    # this view of the whole is no view to autograd. A program that was exported has no hooks.
    hooked = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return torch.unsafe_chunk(cube, 1, dim=1)[0] if hooked else cube
