"""The recalibration function of Eq. (1): from the means of a region to its gates."""

import torch
import torch.nn.functional as F
from timm.layers import create_act_layer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .regions import is_exporting


@torch.fx.wrap
def _batch_norm(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm of a map y, (B, C, h, w), by running statistics in evaluation, or where there is just one position.

    One position has no variance, so PyTorch raises in training. It happens at scale 1 with a batch of one image, which
    is how detection and segmentation networks are fine-tuned.
    """
    if running_mean is None:
        training = True
    elif training and y.numel() < 2 * y.shape[1]:
        training = False
    return F.batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps)


class GateConv(nn.Conv2d):
    """A 1×1 convolution of a grid of a few regions, Ω1 or Ω2, for which PyTorch is several times faster as a product.

    Other runtimes are not, so programs exported for inference have the convolution.
    """

    def forward(self, y: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h, w)."""
        if is_exporting() and not self.training:
            return F.conv2d(y, self.weight, self.bias)
        rows = F.linear(y.permute(0, 2, 3, 1).flatten(0, 2), self.weight.flatten(1), self.bias)
        return rows.view(y.shape[0], y.shape[2], y.shape[3], rows.shape[1]).permute(0, 3, 1, 2)


class GateNorm(nn.BatchNorm2d):
    """The BN in σ1 and σ2. In training, a single position is normalised by the running statistics."""

    def forward(self, y: Tensor) -> Tensor:
        """Normalise a map (B, C, h, w)."""
        momentum = 0.0 if self.momentum is None else self.momentum
        counted = self.momentum is not None or y.numel() > y.shape[1]
        if self.training and self.num_batches_tracked is not None and counted:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # averages over all batches used, for torch.optim.swa_utils.update_bn
                momentum = 1.0 / float(self.num_batches_tracked)
        return _batch_norm(
            y,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            momentum,
            self.eps,
        )


class Gate(nn.Module):
    """The recalibration function of one scale, Eq. (1): two linear maps, normalised, with ReLU and sigmoid."""

    def __init__(
        self,
        source_channels: int,
        rd_channels: int,
        channels: int,
        act_layer: type[nn.Module] = nn.ReLU,
        gate_layer: str | type[nn.Module] = 'sigmoid',
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = GateConv(source_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.bn1: nn.Module = GateNorm(rd_channels, **dd)
        self.act = create_act_layer(act_layer)
        self.fc2 = GateConv(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.bn2: nn.Module = GateNorm(channels, **dd)
        self.gate = create_act_layer(gate_layer)

    def forward(self, y: Tensor) -> Tensor:
        """Map means y on a grid of regions, (B, source_channels, h, w), to gates z, (B, channels, h, w)."""
        return self.gate(self.bn2(self.fc2(self.act(self.bn1(self.fc1(y))))))

    def reparameterize(self) -> None:
        """Fold both norms into the linear maps, for inference only: `timm.utils.reparameterize_model` calls this.

        Fold in float32 and cast the network after that, or rounding adds up.
        """
        self.bn1 = _fold(self.fc1, self.bn1)
        self.bn2 = _fold(self.fc2, self.bn2)


def _fold(fc: nn.Conv2d, bn: nn.Module) -> nn.Module:
    """Fold a norm into the convolution before it; return what is left of it. One without statistics is left alone."""
    if not isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm) or bn.running_mean is None or bn.running_var is None:
        return bn
    statistics = bn.running_mean, bn.running_var, bn.eps
    fc.weight, fc.bias = fuse_conv_bn_weights(fc.weight, fc.bias, *statistics, bn.weight, bn.bias)
    return nn.Identity()
