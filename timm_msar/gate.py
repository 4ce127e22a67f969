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
    """Batch norm of rows y, (N, C), by running statistics in evaluation, or where there is just one row.

    One row has no variance, so PyTorch raises in training. It happens at scale 1 with a batch of one image, which is
    how detection and segmentation networks are fine-tuned.
    """
    if running_mean is None:
        training = True
    elif training and y.shape[0] < 2:
        training = False
    return F.batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps)


class GateNorm(nn.BatchNorm1d):
    """The BN in σ1 and σ2. In training, a single row is normalised by the running statistics."""

    def forward(self, y: Tensor) -> Tensor:
        """Normalise rows (N, C), or in evaluation maps (B, C, h, w)."""
        momentum = 0.0 if self.momentum is None else self.momentum
        counted = self.momentum is not None or y.shape[0] > 1
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
    """The recalibration function of one scale, Eq. (1): two linear maps, normalised, with ReLU and sigmoid.

    Ω1 and Ω2 are 1×1 convolutions, as in timm's SEModule. On a grid of a few regions PyTorch is several times faster
    with the same product as a linear map over rows, (B·h·w, channels); other runtimes are not, so programs exported for
    inference have the convolutions, and exporters fold the norms into these.
    """

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
        self.fc1 = nn.Conv2d(source_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.bn1: nn.Module = GateNorm(rd_channels, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.bn2: nn.Module = GateNorm(channels, **dd)
        self.gate = create_act_layer(gate_layer)

    def forward(self, y: Tensor) -> Tensor:
        """Map means y on a grid of regions, (B, source_channels, h, w), to gates z, (B, channels, h, w)."""
        if is_exporting() and not self.training:
            return self.gate(self.bn2(self.fc2(self.act(self.bn1(self.fc1(y))))))
        rows = y.permute(0, 2, 3, 1).flatten(0, 2)
        rows = self.act(self.bn1(F.linear(rows, self.fc1.weight.flatten(1), self.fc1.bias)))
        rows = self.gate(self.bn2(F.linear(rows, self.fc2.weight.flatten(1), self.fc2.bias)))
        return rows.view(y.shape[0], y.shape[2], y.shape[3], rows.shape[1]).permute(0, 3, 1, 2)

    def reparameterize(self) -> None:
        """Fold both norms into the linear maps, for inference only: `timm.utils.reparameterize_model` calls this.

        Fold in float32 and cast the network after that, or rounding adds up.
        """
        self.bn1 = _fold(self.fc1, self.bn1)
        self.bn2 = _fold(self.fc2, self.bn2)


def _fold(fc: nn.Conv2d, bn: nn.Module) -> nn.Module:
    """Fold a norm into the convolution before it; return what is left of it. One without statistics is left alone."""
    if not isinstance(bn, nn.BatchNorm1d | nn.SyncBatchNorm) or bn.running_mean is None or bn.running_var is None:
        return bn
    statistics = bn.running_mean, bn.running_var, bn.eps
    fc.weight, fc.bias = fuse_conv_bn_weights(fc.weight, fc.bias, *statistics, bn.weight, bn.bias)
    return nn.Identity()
