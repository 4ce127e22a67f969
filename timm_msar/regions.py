"""The coordinate sets S_K of Section 3.2: means over them, and gates back from them to positions.

Along an axis of `size` positions the regions of scale K are told by one line: position p is in region ⌊p·K/size⌋. They
are a true partition. (Adaptive average pooling is not: where K does not divide the size, its bins overlap.) With the
matrix R of a scale, R[i, p] = 1 where position p is in region i, and R̄, its rows divided by their sums,

    y = R̄ x R̄ᵀ        Z = 1/L · Σ Rᵀ z R

is the definition, for every size. It is what runs where sizes are symbols, when a network is traced or exported.
Where they are numbers it is faster to read x once, at the finest scale: a region of a scale that divides it is a whole
number of its regions, so means and gates of the others are brought there and back on a small grid. Between the map and
that grid stands a view where the regions are equal. Elsewhere it is one product with R ⊗ R, since R x Rᵀ is (R ⊗ R) x
with the positions of x in one row.

Sliding windows have another R, with a row for each position: R[p, q] = 1 where |p - q| ≤ √(H·W)/K.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def region_matrix(size: int, scale: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """R of the regions along an axis, (K, size); where K exceeds a size that is a number, (size, size)."""
    # No empty region: it would count in the statistics of batch norm.
    if torch.jit.is_scripting():
        k = min(scale, size)
    else:  # a symbol cannot be compared
        k = min(scale, size) if isinstance(size, int) and not torch.compiler.is_exporting() else scale
    region = torch.arange(size, device=device) * k // size
    return (region == torch.arange(k, device=device)[:, None]).to(dtype)


def window_matrix(size: int, area: int, scale: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """R of the windows along an axis of a map of H·W = `area` positions, (size, size)."""
    position = torch.arange(size, device=device)
    distance = position - position[:, None]
    return (distance * distance * scale**2 <= area).to(dtype)  # |p - q| ≤ √(H·W)/K, in whole numbers


def mean_matrix(matrix: Tensor) -> Tensor:
    """R̄ of R: each row divided by its sum; an empty region stays 0."""
    return matrix / matrix.sum(1, keepdim=True).clamp(min=1)


def product(rows: Tensor, x: Tensor, cols: Tensor) -> Tensor:
    """rows · x · colsᵀ over the last two axes of x, (B, C, H, W)."""
    # One matrix product for each channel: to fold channels and height together, an exporter would ask what height is.
    cube = x.reshape(-1, x.shape[2], x.shape[3])
    cube = torch.bmm(rows.expand(cube.shape[0], -1, -1), cube)
    cube = torch.bmm(cube, cols.T.expand(cube.shape[0], -1, -1))
    return cube.view(x.shape[0], x.shape[1], rows.shape[0], cols.shape[0])


def means_by_definition(x: Tensor, scales: list[int]) -> list[Tensor]:
    """y = R̄ x R̄ᵀ of x, (B, C, H, W), as (B, K, K, C), for every scale K."""
    means: list[Tensor] = []
    for scale in scales:
        rows = mean_matrix(region_matrix(x.shape[2], scale, x.device, x.dtype))
        cols = mean_matrix(region_matrix(x.shape[3], scale, x.device, x.dtype))
        means.append(product(rows, x, cols).permute(0, 2, 3, 1))
    return means


def average_by_definition(z: list[Tensor], x: Tensor, scales: list[int]) -> Tensor:
    """Z = 1/L · Σ Rᵀ z R at the positions of x, (B, C, H, W), from the gates z of every scale K, (B, K, K, C)."""
    total = torch.zeros([1], device=x.device, dtype=z[0].dtype)
    for scale, z_k in zip(scales, z):
        rows = region_matrix(x.shape[2], scale, x.device, z_k.dtype)
        cols = region_matrix(x.shape[3], scale, x.device, z_k.dtype)
        total = total + product(rows.T, z_k.permute(0, 3, 1, 2), cols.T)
    return total / len(scales)


def sliding_means(x: Tensor, scales: list[int]) -> list[Tensor]:
    """y = R̄ x R̄ᵀ of x, (B, C, H, W), over the window around each position, as (B, H, W, C), for every scale."""
    means: list[Tensor] = []
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    height, width = x.shape[2], x.shape[3]
    for scale in scales:
        rows = mean_matrix(window_matrix(height, height * width, scale, x.device, wide.dtype))
        cols = mean_matrix(window_matrix(width, height * width, scale, x.device, wide.dtype))
        means.append(product(rows, wide, cols).to(x.dtype).permute(0, 2, 3, 1))
    return means


def regional_means(x: Tensor, scales: list[int]) -> list[Tensor]:
    """y of x, (B, C, H, W), over the regions of every scale K, as (B, K, K, C), or fewer where the map has fewer."""
    height, width = x.shape[2], x.shape[3]
    if not are_known(height, width, scales):
        return means_by_definition(x, scales)
    wide = torch.promote_types(x.dtype, torch.float32)  # half precision overflows in the sum of a large region
    # Reductions and products are fast along the axes as they lie in memory.
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    cube, dim = (x.permute(0, 2, 3, 1), 1) if channels_last else (x, 2)
    means: dict[int, Tensor] = {}
    for finest in finest_scales(scales):
        area: Tensor | None = None
        if height % finest == 0 and width % finest == 0:
            y = blocks(cube, dim, finest, wide)
            y = y if channels_last else y.permute(0, 2, 3, 1)
        else:
            matrix = map_matrix(x, finest, wide)
            area = matrix.sum(1, keepdim=True)
            matrix = (matrix / area).to(x.dtype)
            rows = matrix @ cube.flatten(1, 2) if channels_last else (cube.flatten(2) @ matrix.T).transpose(1, 2)
            y, area = rows.unflatten(1, (finest, finest)), area.view(1, finest, finest, 1)
        for k in scales:
            if k == finest:
                means[k] = y
            elif finest % k == 0 and k not in means:
                means[k] = (
                    blocks(y, 1, k, wide) if area is None else blocks(y * area, 1, k, wide) / blocks(area, 1, k, wide)
                )
    return [means[k].to(x.dtype) for k in scales]


def recalibrate(x: Tensor, z: list[Tensor], scales: list[int]) -> Tensor:
    """x ⊙ Z of x, (B, C, H, W), with Z = 1/L · Σ z of the gates z of every scale K, (B, K, K, C)."""
    height, width = x.shape[2], x.shape[3]
    if not are_known(height, width, scales):
        return x * average_by_definition(z, x, scales)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    dim = 1 if channels_last else 2
    finest = finest_scales(scales)
    total = x
    for i, fine in enumerate(finest):
        gates = z[scales.index(fine)]
        for k, z_k in zip(scales, z):
            # A scale that divides several of the finest counts with the first.
            if k != fine and multiples(k, finest)[0] == fine:
                gates = gates + repeat(repeat(z_k, 1, fine), 2, fine)
        gates = gates / len(scales)
        if height % fine == 0 and width % fine == 0:
            gates = repeat(gates, 2, width)
            gates = gates if channels_last else gates.permute(0, 3, 1, 2).contiguous()
            if len(finest) == 1 and not torch.is_grad_enabled():
                # This saves a pass, but the result is a view. Under autograd that would hide the gradient from hooks
                # on it where a block adds to it in place, as timm's do.
                cube = x.permute(0, 2, 3, 1) if channels_last else x
                out = (cube.unflatten(dim, (fine, height // fine)) * gates.unsqueeze(dim + 1)).flatten(dim, dim + 1)
                return out.permute(0, 3, 1, 2) if channels_last else out
            gates = repeat(gates, dim, height)
        else:
            matrix = map_matrix(x, fine, gates.dtype)
            rows = gates.flatten(1, 2)
            rows = matrix.T @ rows if channels_last else rows.transpose(1, 2) @ matrix
            gates = rows.unflatten(dim, (height, width))
        gates = gates.permute(0, 3, 1, 2) if channels_last else gates
        total = gates if i == 0 else total + gates
    return x * total


def are_known(height: int, width: int, scales: list[int]) -> bool:
    """Whether sizes are numbers, not symbols of a tracer, and no smaller than the scales."""
    if not torch.jit.is_scripting():
        if not isinstance(height, int) or not isinstance(width, int):
            return False
        # torch.compile shows its symbols as int: asking one whether it is divisible would make a graph for each answer.
        if torch.compiler.is_compiling():
            for size in (height, width):
                if not statically_known_true(size >= max(scales)):
                    return False
                for k in scales:
                    if not statically_known_true(size % k == 0) and not statically_known_true(size % k != 0):
                        return False
            return True
    return max(scales) <= min(height, width)


def finest_scales(scales: list[int]) -> list[int]:
    """The scales that divide no other: of 1, 2 and 4 it is 4, of 3 and 4 both."""
    finest: list[int] = []
    for k in scales:
        if len(multiples(k, scales)) == 1:
            finest.append(k)
    return finest


def multiples(k: int, scales: list[int]) -> list[int]:
    """Those of the scales that k divides."""
    found: list[int] = []
    for scale in scales:
        if scale % k == 0:
            found.append(scale)
    return found


def map_matrix(x: Tensor, scale: int, dtype: torch.dtype) -> Tensor:
    """R ⊗ R of the map x, (K², H·W): a row for each region, a column for each position."""
    rows = region_matrix(x.shape[2], scale, x.device, dtype)
    cols = rows if x.shape[2] == x.shape[3] else region_matrix(x.shape[3], scale, x.device, dtype)
    return torch.kron(rows, cols)


def blocks(x: Tensor, dim: int, k: int, dtype: torch.dtype) -> Tensor:
    """Means over k×k equal blocks along `dim` and the next axis, with sums in `dtype`."""
    if k == 1:
        return x.mean((dim, dim + 1), keepdim=True, dtype=dtype)
    x = x.unflatten(dim, (k, x.shape[dim] // k)).mean(dim + 1, dtype=dtype)
    return x.unflatten(dim + 1, (k, x.shape[dim + 1] // k)).mean(dim + 2)


def repeat(z: Tensor, dim: int, size: int) -> Tensor:
    """Bring each entry along `dim` to the positions of its region, of which there are `size`. One is broadcast."""
    k = z.shape[dim]
    return z if k in (1, size) else z.repeat_interleave(size // k, dim)
