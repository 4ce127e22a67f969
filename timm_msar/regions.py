"""The regions of Section 3.2: means over them, and gates back from them to positions.

Along an axis of `size` positions, position p is in region ⌊p·K/size⌋ of scale K. The regions are a true partition.
(Adaptive average pooling is not: where K does not divide the size, its bins overlap.) With R[i, p] = 1 where position p
is in region i, else 0, and with R̄, the rows of R divided by their sums,

    y = R̄ x R̄ᵀ        Z = 1/L · Σ_K Rᵀ z_K R

is the definition, for every size. Here it is written with the positions of x in one row, as (R ⊗ R) x, so that one
matrix holds the regions of every scale. It also is what runs where sizes are symbols, when a network is traced or
exported for every size. Where each scale divides the next and the last divides the map, regions are blocks of memory,
made of the next scale's blocks, and need no matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx.experimental.symbolic_shapes import statically_known_true


def is_exporting() -> bool:
    """torch.compiler.is_exporting, which cannot be scripted, and until PyTorch 2.11 holds in torch.compile, too."""
    return False if torch.jit.is_scripting() else torch.compiler.is_exporting() and not is_dynamo_compiling()


def is_number(size: int) -> bool:
    """Whether a size is a plain int, not a symbol that stands for other sizes too. In an export none is."""
    return isinstance(size, int) and not is_exporting()


def is_known(condition: bool) -> bool:
    """Whether a condition on sizes holds without asking it of a symbol, which would make a graph for each answer."""
    if torch.jit.is_scripting():
        return condition
    return isinstance(condition, (bool, torch.SymBool)) and statically_known_true(condition)


def count(size: int, scale: int) -> int:
    """Regions of scale K along an axis: K, but no more than positions, where the size is a number."""
    # An empty region would count in the statistics of batch norm.
    return min(scale, size) if is_number(size) else scale


def regions(size: int, scale: int, x: Tensor) -> Tensor:
    """R of the regions along an axis, (count, size), of 0 and 1, with the type and device of x."""
    k = count(size, scale)
    if k > 0 and is_number(size) and not torch.compiler.is_compiling():
        # The same in two operators instead of six: region i begins at ⌈i·size/K⌉.
        starts = [(i * size + k - 1) // k for i in range(k + 1)]
        eye = torch.eye(k, dtype=x.dtype, device=x.device)
        return torch.cat([eye[:, i : i + 1].expand(k, starts[i + 1] - starts[i]) for i in range(k)], 1)
    region = torch.arange(size, device=x.device) * k // size
    return (region == torch.arange(k, device=x.device)[:, None]).to(x.dtype)


def mean_matrix(matrix: Tensor) -> Tensor:
    """R̄ of R: each row divided by its sum; an empty region stays 0."""
    lengths = matrix.float().sum(1, keepdim=True).clamp(min=1)  # a float16 sum over 65,504 is infinite
    return (matrix / lengths).to(matrix.dtype)


def are_blocks(x: Tensor, scales: list[int]) -> bool:
    """Whether every scale is known to divide the map and the next scale, so that regions are blocks of finer ones."""
    nested = all([scales[i] % scales[i - 1] == 0 for i in range(1, len(scales))])
    height, width, k = x.shape[2], x.shape[3], scales[-1]
    return nested and is_known(height % k == 0) and is_known(width % k == 0) and is_known(height * width > 0)


def region_matrix(x: Tensor, scales: list[int]) -> Tensor:
    """R ⊗ R of all scales for a map x, (B, C, H, W): a row for each region, a column for each of the H·W positions."""
    matrices: list[Tensor] = []
    for k in scales:
        rows = cols = regions(x.shape[2], k, x)
        if not is_known(x.shape[2] == x.shape[3]):
            cols = regions(x.shape[3], k, x)
        pairs = rows[:, None, :, None] * cols[:, None, :]  # torch.kron takes sizes for numbers
        matrices.append(pairs.flatten(2).flatten(0, 1))
    return torch.cat(matrices)


def matrix_if_needed(x: Tensor, scales: list[int]) -> Tensor | None:
    """R ⊗ R of all scales, or None where regions are blocks, whose means need no matrix."""
    return None if are_blocks(x, scales) else region_matrix(x, scales)


def regional_means(x: Tensor, scales: list[int], matrix: Tensor | None) -> list[Tensor]:
    """y of x, (B, C, H, W), over the regions of every scale K, as (B, C, K, K), or as (B, C, n, 1) of n regions."""
    if matrix is not None:
        rows = mean_matrix(matrix).expand(x.shape[0], -1, -1)
        y = torch.bmm(rows, x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return list(y.unsqueeze(3).split([count(x.shape[2], k) * count(x.shape[3], k) for k in scales], dim=2))
    means: list[Tensor] = []
    for k in scales[::-1]:  # coarse means are means of finer ones
        x = F.avg_pool2d(x, [x.shape[2] // k, x.shape[3] // k]) if k > 1 else x.mean((2, 3), keepdim=True)
        means.insert(0, x)
    return means


def recalibrate(x: Tensor, z: list[Tensor], scales: list[int], matrix: Tensor | None) -> Tensor:
    """x ⊙ Z of x, (B, C, H, W), with Z = 1/L · Σ_K z_K of the gates z_K at the regions of every scale K."""
    height, width = x.shape[2], x.shape[3]
    if is_exporting():  # the matrix is a constant there, by which other runtimes multiply faster than they broadcast
        matrix = region_matrix(x, scales) if matrix is None else matrix
        gates = torch.matmul(torch.cat([z_k.flatten(2) for z_k in z], 2) / len(scales), matrix)
        return x * gates.view(x.shape[0], gates.shape[1], height, width)
    channels_last = x.stride(1) == 1 and x.shape[1] > 1  # is_contiguous cannot be asked under vmap
    if matrix is not None:
        rows = torch.cat([z_k.flatten(2).transpose(1, 2) for z_k in z], 1)
        matrix = matrix.expand(x.shape[0], -1, -1)
        left, right = (matrix.transpose(1, 2), rows) if channels_last else (rows.transpose(1, 2), matrix)
        # Multiplied by 1/L after the sum, 0.5 is exact in TF32, too, which a warm start needs. beta=0 adds nothing.
        gates = torch.baddbmm(x.new_empty(1, 1, 1), left, right, beta=0, alpha=1 / len(scales))
        gates = gates.transpose(1, 2) if channels_last else gates
        return x * gates.view(x.shape[0], gates.shape[1], height, width)
    k, gates = scales[0], z[0]
    for finer, z_k in zip(scales[1:], z[1:]):
        inside = finer // k  # finer regions along an axis of a coarse one
        fine = z_k.unflatten(3, (k, inside)).unflatten(2, (k, inside))
        k, gates = finer, (gates[:, :, :, None, :, None] + fine).flatten(4, 5).flatten(2, 3)
    gates = gates / len(scales)
    dim = 1 if channels_last else 2
    if channels_last:
        x, gates = x.permute(0, 2, 3, 1), gates.permute(0, 2, 3, 1)
    # Spread along the width only: the product below broadcasts along the height, and would be slow along both.
    if k not in (1, width):
        gates = gates.repeat_interleave(width // k, dim + 1)
    x = (x.unflatten(dim, (k, height // k)) * gates.unsqueeze(dim + 1)).flatten(dim, dim + 1)
    x = x.permute(0, 3, 1, 2) if channels_last else x
    if torch.jit.is_scripting():
        return x
    # Residual blocks add to the result in place. Under autograd that would hide the gradient of a view from hooks on
    # it, and this view of the whole is no view to autograd.
    return torch.unsafe_chunk(x, 1, dim=1)[0] if torch.is_grad_enabled() else x
