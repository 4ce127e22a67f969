"""The coordinate sets S_K of Section 3.2: from positions to the means over them, and from gates back to positions

Regional: position p of an axis is in region ⌊p·K/size⌋, a true partition (bins of adaptive pooling can overlap). With
g, the least common multiple of the scales, ⌊⌊p·g/size⌋·K/g⌋ = ⌊p·K/size⌋: at every size each region is a block of
cells of one g×g grid, so the means of all scales are one map. With R[i, p] = 1 where p is in the region of cell i,
else 0, and R̄, its rows divided by their sums, y = R̄ x R̄ᵀ for each scale. Gates at positions are Rᵀ z R with R of
cells. Sliding: R[p, q] = 1 where |p - q| ≤ √(H·W)/K, and every position is a cell.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def means(x: Tensor, scales: list[int], strategy: str) -> Tensor:
    """y of Eq. (1) for x, (B, C, H, W), as (B, L·C, rows, cols): C channels a scale, at cells, or sliding positions."""
    if x.dim() != 4:
        raise ValueError(f'MS-SAR takes a map (B, C, H, W), not a tensor of {x.dim()} dimensions.')
    height, width = x.shape[2], x.shape[3]
    if strategy == 'sliding' and isinstance(height, int) and height * width == 0:  # no window: one empty region
        scales = [1 for _ in scales]
    elif strategy == 'sliding':
        maps, area = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32)), height * width
        y = [_windows(height, area, k, maps) @ maps @ _windows(width, area, k, maps).transpose(1, 2) for k in scales]
        return torch.cat([y_k.view(x.shape) for y_k in y], 1).to(x.dtype)
    (n_rows, row_scales), (n_cols, col_scales) = _cells(height, scales), _cells(width, scales)
    on_gpu = x.is_cuda and not torch.jit.is_scripting()  # there one product is faster, forwards and backwards
    if _are_blocks(x, n_rows, n_cols) and (len(scales) == 1 or not on_gpu):
        size = [height // n_rows, width // n_cols]  # written out, and dimensions negative, for ExecuTorch's XNNPACK
        x = F.avg_pool2d(x, size, size, count_include_pad=False) if n_rows * n_cols > 1 else x.mean((-2, -1), True)
        if len(scales) == 1:
            return x
    mean = _matrix(x, n_rows, n_cols, row_scales, col_scales, True)
    y_of_cells = (mean @ x.flatten(2).transpose(1, 2)).unflatten(1, (n_rows, n_cols, len(scales)))  # (…, L, C)
    return y_of_cells.flatten(3).permute(0, 3, 1, 2)  # channels_last


def mean_of_scales(z: Tensor, scales: int, x: Tensor) -> Tensor:
    """1/L Σ_K z_K, as (B, C, rows, cols), or if x is channels_last (B, rows, cols, C): it sums faster so."""
    z, c = (z.permute(0, 2, 3, 1), 3) if _is_channels_last(x) else (z, 1)
    return z.unflatten(c, (scales, -1)).mean(c)


def spread(z: Tensor, x: Tensor, strategy: str) -> Tensor:
    """The way back: such means of gates at the positions of x, as (B, C, H, W), or blocks as (B, C, rows, h, W)."""
    last, height, width = _is_channels_last(x), x.shape[2], x.shape[3]
    axis = 1 if last else 2  # of rows
    n_rows, n_cols = z.shape[axis], z.shape[axis + 1]
    if strategy == 'regional' and n_rows * n_cols > 1:
        if _are_blocks(x, n_rows, n_cols):
            # Memory holds them once along h. Broadcasting them along both axes would be slow on a processor.
            z = z.repeat_interleave(width // n_cols, axis + 1).unsqueeze(axis + 1)
            z = z.expand([-1] * (axis + 1) + [height // n_rows] + [-1] * (3 - axis))
            return z.permute(0, 4, 1, 2, 3) if last else z
        cell = _matrix(x, n_rows, n_cols, [n_rows], [n_cols], False)
        if last:
            z = (cell.transpose(1, 2) @ z.flatten(1, 2)).view(z.shape[0], height, width, z.shape[3])
        else:
            z = (z.flatten(2) @ cell).view(z.shape[0], z.shape[1], height, width)
    return (z.permute(0, 3, 1, 2) if last else z).expand_as(x)


def shaped(t: Tensor, like: Tensor) -> Tensor:
    """A map as blocks, or back. To autograd, what comes back is no view, since residual blocks add to it in place."""
    if t.dim() == like.dim():
        return t
    return t.view(like.shape) if t.dim() == 4 else torch.ops.aten._unsafe_view(t, like.shape)


def _is_channels_last(x: Tensor) -> bool:
    # Of a single column the strides do not say it: it passes for contiguous.
    return x.stride(1) == 1 and x.stride(3) != 1 and x.stride(2) != x.stride(3)  # vmap cannot ask is_contiguous


def _cells(size: int, scales: list[int]) -> tuple[int, list[int]]:
    """g of an axis, and its regions of each scale: K, but no more than positions. A symbol stands for larger sizes."""
    if isinstance(size, int):  # counted, since the minimum of a number and a symbol is a symbol
        scales = [max(1, sum([1 if p < size else 0 for p in range(k)])) for k in scales]
    g = 1
    for k in scales:
        g = g * k // math.gcd(g, k)
    return g, scales


def _are_blocks(x: Tensor, rows: int, cols: int) -> bool:
    """Whether cells are known to be blocks of as many positions each. A symbol is not asked; it means no."""
    conditions = [x.shape[2] % rows == 0, x.shape[3] % cols == 0, x.shape[2] * x.shape[3] > 0]
    if torch.jit.is_scripting():
        return all(conditions)
    return all([isinstance(c, (bool, torch.SymBool)) and statically_known_true(c) for c in conditions])


def _windows(size: int, area: int, scale: int, x: Tensor) -> Tensor:
    """R̄ of windows along an axis of a map of H·W = `area` positions, (size, size)."""
    distance = torch.arange(size, device=x.device) - torch.arange(size, device=x.device)[:, None]
    members = (distance * distance * scale**2 <= area).to(x.dtype)  # |p - q| ≤ √(H·W)/K, in whole numbers
    return (members / members.sum(1, keepdim=True))[None]


def _matrix(x: Tensor, rows: int, cols: int, of_rows: list[int], of_cols: list[int], mean: bool, new: bool = False):
    """R ⊗ R, or with `mean` R̄ ⊗ R̄: a row for each cell and scale, a column for each position of x."""
    height, width = x.shape[2], x.shape[3]
    if not torch.jit.is_scripting() and not torch.compiler.is_dynamo_compiling() and not new:
        what: tuple = ((1, 1, height, width), rows, cols, tuple(of_rows), tuple(of_cols), mean)
        if isinstance(height, int) and isinstance(width, int) and height * width <= 16384:
            if type(x) is Tensor:
                return _kept(x.dtype, x.device, *what)
            return x.new_tensor(_kept(torch.float64, torch.device('cpu'), *what).tolist())  # exported as a constant
    first, second = _axis(height, rows, of_rows, mean, x), _axis(width, cols, of_cols, mean, x)
    return (first[:, None, :, :, None] * second[:, :, None]).to(x.dtype).flatten(3).flatten(0, 2)[None]


@lru_cache(maxsize=32)
def _kept(dtype: torch.dtype, device: torch.device, shape: tuple, *what) -> Tensor:
    """The matrix, made once, since launches are a GPU's time. In a thread of its own no mode of the caller holds."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: _matrix(torch.empty(shape, dtype=dtype, device=device), *what, True)).result()  # type: ignore


def _axis(size: int, cells: int, scales: list[int], mean: bool, x: Tensor) -> Tensor:
    """R, or with `mean` R̄, along an axis: (cells, L, size). A region without positions is 0."""
    number = torch.arange(len(scales), device=x.device)[:, None]
    scale = torch.zeros_like(number)
    for i, k in enumerate(scales):  # a compiler makes one kernel of all this, but not of a list of numbers
        scale = scale + k * (number == i)
    region = torch.arange(cells, device=x.device)[:, None, None] * scale // cells
    members = region == torch.arange(size, device=x.device) * scale // size
    members = members.to(torch.promote_types(x.dtype, torch.float32))
    ends = ((region + 1) * size + scale - 1) // scale
    return members / (ends - (region * size + scale - 1) // scale).clamp(min=1) if mean else members
