"""The coordinate sets S_K of Section 3.2: from positions to the means over them, and from gates back to positions

A strategy is a class, and `STRATEGIES` names it. R and R̄ are constants of the sizes of a map. NumPy makes them: it
knows no mode of PyTorch's (inference_mode, functorch, fake tensors) and no default of the user's.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true


class Regional(nn.Module):
    """Position p of an axis is in region ⌊p·K/size⌋, a true partition (bins of adaptive pooling can overlap).

    With g, the least common multiple of the scales, ⌊⌊p·g/size⌋·K/g⌋ = ⌊p·K/size⌋. So at every size each region is a
    block of cells of one g×g grid, and the means of all scales are one map. R[i, p] is 1 where p is in the region of
    cell i, else 0. R̄ has its rows divided by their sums. For each scale y = R̄ x R̄ᵀ. Gates at positions are Rᵀ z R,
    where R is that of the cells.
    """

    def __init__(self, scales: list[int]):
        super().__init__()
        if (g := math.lcm(*scales)) > 4 * max(scales):
            raise ValueError(f'scales {scales!r} need {g}×{g} cells, too many: their least common multiple is {g}.')
        self.scales, self.at_cells = scales, True

    def forward(self, x: Tensor) -> Tensor:
        """y of Eq. (1) for x, (B, C, H, W), as (B, L·C, rows, cols): C channels a scale, at cells."""
        return means_of_regions(x, self.scales, self.training)


class Sliding(nn.Module):
    """R[p, q] = 1 where |p - q| ≤ √(H·W)/K, on each axis. Every position is a cell."""

    def __init__(self, scales: list[int]):
        super().__init__()
        self.scales, self.at_cells = scales, False

    def forward(self, x: Tensor) -> Tensor:
        """y of Eq. (1) for x, (B, C, H, W), as (B, L·C, H, W): C channels a scale."""
        return means_of_windows(x, self.scales)


STRATEGIES: dict[str, type[Regional] | type[Sliding]] = {'regional': Regional, 'sliding': Sliding}
_kept: dict[tuple, Tensor] = {}  # constants, which belong to no mode
torch.fx.wrap('means_of_regions')  # a symbolic tracer does not know the size of a map: it records a call
torch.fx.wrap('means_of_windows')


def means_of_regions(x: Tensor, scales: list[int], training: bool) -> Tensor:
    batch, channels, height, width = x.shape
    of_rows, of_cols = _at_most(height, scales, training), _at_most(width, scales, training)
    rows, cols = _lcm(of_rows), _lcm(of_cols)
    on_gpu = x.is_cuda and not torch.jit.is_scripting()  # there one product is faster, forwards and backwards
    if _are_blocks(x, rows, cols) and (len(scales) == 1 or not on_gpu):
        size = [height // rows, width // cols]  # as the stride, too, and dimensions negative: for XNNPACK
        x = F.avg_pool2d(x, size, size, count_include_pad=False) if rows * cols > 1 else x.mean((-2, -1), True)
        if len(scales) == 1:
            return x
    y = _matrix(x, of_rows, of_cols, True) @ x.flatten(2).transpose(1, 2)  # (B, rows·cols·L, C)
    return y.reshape(batch, rows, cols, len(scales) * channels).permute(0, 3, 1, 2)  # channels_last


def means_of_windows(x: Tensor, scales: list[int]) -> Tensor:
    _, _, height, width = x.shape
    maps, area, y = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32)), height * width, []
    for k in scales:
        y_k = _windows(height, area, k, maps) @ maps @ _windows(width, area, k, maps).transpose(1, 2)
        y.append(y_k.view(x.shape))
    return torch.cat(y, 1).to(x.dtype)


def spread(z: Tensor, x: Tensor, scales: int, at_cells: bool) -> Tensor:
    """Z = 1/L Σ_K z_K, of z, (B, L·C, rows, cols), at the positions of x, (B, C, H, W), or of its blocks of positions,
    (B, C, rows, h, W). Without `at_cells` z is at positions. Sums follow the order of memory, as their gradients do.
    """
    batch, _, height, width = x.shape
    rows, cols = (z.shape[2], z.shape[3]) if at_cells else (height, width)
    # Whether x is channels_last, by strides: vmap cannot ask is_contiguous. A single column passes for contiguous.
    last, channels = x.stride(1) == 1 and x.stride(3) != 1 and x.stride(2) != x.stride(3), z.shape[1] // scales
    if last:
        z = z.permute(0, 2, 3, 1).reshape(batch, rows, cols, scales, channels).mean(3)
    else:
        z = z.reshape(batch, scales, channels, rows, cols).mean(1)
    if at_cells and rows * cols > 1:
        r = 1 if last else 2  # the dimension of rows
        if _are_blocks(x, rows, cols):
            # Memory holds them once along h. Broadcasting them along both axes would be slow on a processor.
            z = z.repeat_interleave(width // cols, r + 1).unsqueeze(r + 1)
            z = z.expand([-1] * (r + 1) + [height // rows] + [-1] * (3 - r))
            return z.permute(0, 4, 1, 2, 3) if last else z
        cell = _matrix(x, [rows], [cols], False)
        if last:
            z = (cell.transpose(1, 2) @ z.flatten(1, 2)).view(batch, height, width, channels)
        else:
            z = (z.flatten(2) @ cell).view(x.shape)
    return (z.permute(0, 3, 1, 2) if last else z).expand_as(x)


def times(x: Tensor, gates: Tensor) -> Tensor:
    """x ⊙ Z of Eq. (2). To autograd the product is no view, since residual blocks add to it in place."""
    if gates.dim() == 4:  # a plain product where it will do: torch.jit.trace cannot record _unsafe_view
        return x * gates
    return torch.ops.aten._unsafe_view(x.view(gates.shape) * gates, x.shape)


def _at_most(size: int, scales: list[int], training: bool) -> list[int]:
    """Regions of an axis at each scale: K, but no more than positions. A symbol stands for larger sizes."""
    if isinstance(size, int):  # counted, since the minimum of a number and a symbol is a symbol
        return [sum([1 if p < size else 0 for p in range(k)]) for k in scales]
    if training and not torch.jit.is_scripting() and isinstance(size, torch.SymInt):
        torch._check(size >= max(scales))  # the exported graph refuses less: regions without positions enter the norms
    return scales


def _lcm(scales: list[int]) -> int:
    g = 1
    for k in scales:
        g = g * k // math.gcd(g, k)
    return g


def _are_blocks(x: Tensor, rows: int, cols: int) -> bool:
    """Whether cells are known to be blocks of as many positions each. A symbol is not asked; it means no."""
    # coremltools 9.0 has no bitwise `and`, so these stay apart.
    conditions = [x.shape[2] % rows == 0, x.shape[3] % cols == 0]
    if torch.jit.is_scripting():
        return all(conditions)
    # Asked by a plain `if`, a compiler makes a graph for each of several sizes.
    return all([isinstance(c, (bool, torch.SymBool)) and statically_known_true(c) for c in conditions])


def _windows(size: int, area: int, scale: int, x: Tensor) -> Tensor:
    """R̄ of windows along an axis of a map of H·W = `area` positions, (1, size, size)."""
    distance = torch.arange(size, device=x.device) - torch.arange(size, device=x.device)[:, None]
    members = (distance * distance * scale**2 <= area).to(x.dtype)  # |p - q| ≤ √(H·W)/K, in whole numbers
    return (members / members.sum(1, keepdim=True))[None]


def _matrix(x: Tensor, of_rows: list[int], of_cols: list[int], mean: bool) -> Tensor:
    """R ⊗ R, or with `mean` R̄ ⊗ R̄: (1, cells·L, H·W), a row for each cell and scale."""
    height, width = x.shape[2], x.shape[3]
    if not torch.jit.is_scripting() and not torch.compiler.is_dynamo_compiling():  # a compiler fuses the computation
        elements = _lcm(of_rows) * _lcm(of_cols) * len(of_rows) * height * width
        if isinstance(elements, int) and elements <= 2**19:  # no symbol, and small enough to keep
            return _constant(x, height, width, tuple(of_rows), tuple(of_cols), mean)
    rows, cols = _axis(height, of_rows, mean, x), _axis(width, of_cols, mean, x)
    return (rows[:, None, :, :, None] * cols[:, :, None]).to(x.dtype).flatten(3).flatten(0, 2)[None]


def _axis(size: int, scales: list[int], mean: bool, x: Tensor) -> Tensor:
    """R, or with `mean` R̄, along an axis: (cells, L, size). A region without positions is 0."""
    cells, number = _lcm(scales), torch.arange(len(scales), device=x.device)[:, None]
    scale = torch.zeros_like(number)
    for i, k in enumerate(scales):  # a compiler makes one kernel of all this, but not of a list of numbers
        scale = scale + k * (number == i)
    region = torch.arange(cells, device=x.device)[:, None, None] * scale // cells
    members = region == torch.arange(size, device=x.device) * scale // size
    members = members.to(torch.promote_types(x.dtype, torch.float32))
    ends = ((region + 1) * size + scale - 1) // scale  # a sum of members would be a kernel more
    return members / (ends - (region * size + scale - 1) // scale).clamp(min=1) if mean else members


def _constant(x: Tensor, height: int, width: int, of_rows: tuple, of_cols: tuple, mean: bool) -> Tensor:
    """What `_matrix` returns, by NumPy. 128 MB of constants are kept, since launches and copies are time."""
    key = (x.dtype, x.device, height, width, of_rows, of_cols, mean)
    if type(x) is Tensor and key in _kept:
        return _kept[key]
    axes = []
    for size, scales in ((height, of_rows), (width, of_cols)):
        cells, scale = math.lcm(*scales), np.array(scales)[:, None]
        members = np.arange(cells)[:, None, None] * scale // cells == np.arange(size) * scale // size
        axes.append(members / np.add.reduce(members, 2, keepdims=True) if mean else members)  # sum imports when called
    product = (axes[0][:, None, :, :, None] * axes[1][:, :, None]).reshape(1, -1, height * width)
    array = product.astype(np.float64 if x.dtype == torch.float64 else np.float32)
    if type(x) is not Tensor:  # a fake one, say, which is exported. By from_numpy ONNX would have eight nodes more.
        return x.new_tensor(array.tolist())
    with torch.inference_mode(False):
        matrix = torch.from_numpy(array).to(x.device, x.dtype)  # waits: every stream finds it whole
    matrix = torch.func.debug_unwrap(matrix)  # a transformation of torch.func wraps it, while it lasts
    # A list, since another thread may add to it meanwhile.
    if type(matrix) is Tensor and matrix.nbytes + sum([m.nbytes for m in list(_kept.values())]) <= 2**27:
        _kept[key] = matrix  # for good: what is freed, another stream could still be reading
    return matrix
