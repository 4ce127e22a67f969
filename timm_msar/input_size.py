"""The check that an image is not smaller than a network's stride."""

from torch import Tensor


def check_input_size(x: Tensor, stride: int) -> Tensor:
    """Return the images x, (B, C, H, W), raise ValueError where H or W is below `stride` or x is not 4-dimensional."""
    if x.dim() != 4 or min(x.shape[2], x.shape[3]) < stride:
        raise ValueError(
            f'x must be images of the shape (batch, channels, height, width) of at least {stride}×{stride} pixels, '
            f'the stride of this network, not {list(x.shape)}.'
        )
    return x
