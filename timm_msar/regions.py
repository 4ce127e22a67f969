"""The coordinate sets S_K of Section 3.2: from positions to the means over them, and from gates back to positions

Regional: position p of an axis is in region ⌊p·K/size⌋, a true partition. (Adaptive pooling has bins that overlap where
K does not divide the size.) With g, the least common multiple of the scales, ⌊⌊p·g/size⌋·K/g⌋ = ⌊p·K/size⌋: each region
is a block of cells of one g×g grid, at every size. So the means of all scales are one map of cells. With R[i, p] = 1
where p is in the region of cell i, else 0, and with R̄, its rows divided by their sums, y = R̄ x R̄ᵀ for each scale. Gates
at positions are Rᵀ z R with R of cells. Sliding: R[p, q] = 1 where |p - q| ≤ √(H·W)/K, and every position is a cell.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def means(x: Tensor, scales: list[int], strategy: str) -> Tensor:
    """y of Eq. (1): (B, C, H, W) to (B, L·C, rows, cols), a group of C channels for each scale. Rows and columns are of
    cells, of which all in a region have its mean, or sliding of positions.
    """
    if x.dim() != 4:
        raise ValueError(f'MS-SAR takes a map (B, C, H, W), not a tensor of {x.dim()} dimensions.')
    height, width = x.shape[2], x.shape[3]
    if strategy == 'sliding' and not (isinstance(height, int) and height * width == 0):  # no window on an empty map
        maps = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
        y: list[Tensor] = []
        for k in scales:
            rows, cols = _windows(height, height * width, k, maps), _windows(width, height * width, k, maps)
            y.append((rows @ maps @ cols.transpose(1, 2)).view(x.shape))
        return torch.cat(y, 1).to(x.dtype)
    (n_rows, row_scales), (n_cols, col_scales) = _cells(height, scales), _cells(width, scales)
    if _are_blocks(x, n_rows, n_cols):
        x = F.avg_pool2d(x, [height // n_rows, width // n_cols]) if n_rows * n_cols > 1 else x.mean((2, 3), True)
    mean = _matrix(x, n_rows, n_cols, row_scales, col_scales, True)
    y_of_cells = (mean @ x.flatten(2).transpose(1, 2)).unflatten(1, (n_rows, n_cols, len(scales)))  # (…, L, C)
    return y_of_cells.flatten(3).permute(0, 3, 1, 2)  # channels_last


def spread(z: Tensor, x: Tensor, strategy: str) -> Tensor:
    """The way back: gates z, (B, C, rows, cols), at the positions of x, (B, C, H, W), as (B, C, 1, H, W). Blocks need
    (B, C, rows, 1, W) only: a product can broadcast along the height, but along both axes it is slow on a processor.
    """
    if strategy == 'sliding':
        return z.unsqueeze(2)
    n_rows, n_cols, height, width = z.shape[2], z.shape[3], x.shape[2], x.shape[3]
    channels_last = x.stride(1) == 1 and x.shape[1] > 1  # vmap cannot ask is_contiguous
    if _are_blocks(x, n_rows, n_cols):
        if channels_last:
            z = z.permute(0, 2, 3, 1).unsqueeze(3).expand(-1, -1, -1, width // n_cols, -1)
            return z.flatten(2, 3).permute(0, 3, 1, 2).unsqueeze(3)
        z = z.unsqueeze(4).expand(-1, -1, -1, -1, width // n_cols)
        return z.reshape(z.shape[0], z.shape[1], n_rows, 1, width)
    cell, z = _matrix(x, n_rows, n_cols, [n_rows], [n_cols], False), z.flatten(2)
    z = (cell.transpose(1, 2) @ z.transpose(1, 2)).transpose(1, 2) if channels_last else z @ cell
    return z.view(z.shape[0], z.shape[1], 1, height, width)


def join(x: Tensor) -> Tensor:
    """(B, C, rows, h, W) as a map (B, C, H, W). To autograd it is no view, since residual blocks add to it in place."""
    if isinstance(x.shape[2], int):
        return torch.ops.aten._unsafe_view(x, [x.shape[0], x.shape[1], x.shape[2] * x.shape[3], x.shape[4]])
    return x.flatten(2, 3)


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
    if not torch.jit.is_scripting() and not new:
        known = isinstance(height, int) and isinstance(width, int) and not torch.compiler.is_dynamo_compiling()
        if known and height * width <= 4096:  # it pays for small maps
            what: tuple = (height, width, rows, cols, tuple(of_rows), tuple(of_cols), mean)
            if type(x) is Tensor:
                return _kept(x.dtype, x.device, *what)
            return x.new_tensor(_kept(torch.float64, torch.device('cpu'), *what).tolist())  # exported as a constant
    first, second = _axis(height, rows, of_rows, mean, x), _axis(width, cols, of_cols, mean, x)
    pairs = first[:, None, :, :, None] * second[:, :, None]  # (rows, cols, L, H, W)
    return pairs.flatten(3).flatten(0, 2)[None].to(x.dtype)


@lru_cache(maxsize=256)
def _kept(dtype: torch.dtype, device: torch.device, height: int, width: int, *what) -> Tensor:
    """The matrix, made once, since launches are a GPU's time. In a thread of its own no mode of the caller holds."""
    with ThreadPoolExecutor(1) as thread:
        x = thread.submit(torch.empty, (1, 1, height, width), dtype=dtype, device=device).result()
        return thread.submit(lambda: _matrix(x, *what, True)).result()  # type: ignore[call-arg]


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
