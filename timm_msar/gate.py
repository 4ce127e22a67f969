"""The gate of Eq. (1): from the means around a position, at every scale, to a number from 0 to 1 for each channel."""

import warnings
from functools import cache

import torch
from timm.layers import create_act_layer, register_notrace_module
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_warn_once = cache(warnings.warn)  # Python's own filter forgets


@register_notrace_module  # timm's feature extraction by fx cannot ask for the number of images
class Gate(nn.Module):
    """z_K = σ2(Ω2 · σ1(Ω1 · y)) of all scales at once. Each scale is a group of channels with weights of its own."""

    def __init__(self, source_channels, rd_channels, channels, groups, act_layer, gate_layer, **dd):
        super().__init__()
        self.fc1 = nn.Conv2d(groups * source_channels, groups * rd_channels, 1, groups=groups, bias=False, **dd)
        self.bn1: nn.Module = nn.BatchNorm2d(groups * rd_channels, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(groups * rd_channels, groups * channels, 1, groups=groups, bias=False, **dd)
        self.bn2: nn.Module = nn.BatchNorm2d(groups * channels, **dd)
        self.gate = create_act_layer(gate_layer)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw weights as timm's ResNets do, each scale by itself: PyTorch's fan-out would be that of all groups."""
        for fc in (self.fc1, self.fc2):
            for weight in fc.weight.chunk(fc.groups):
                nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')

    def forward(self, y: Tensor) -> Tensor:
        """Map means y, (B, L · source_channels, h, w), to gates z, (B, L · channels, h, w)."""
        if not torch.jit.is_scripting() and isinstance(y, Tensor) and isinstance(y.shape[0], int) and y.shape[0] < 2:
            return self._of_one_image(y)
        return self._z(y)

    def _z(self, y: Tensor) -> Tensor:
        return self.gate(self.bn2(self.fc2(self.act(self.bn1(self.fc1(y))))))

    def _of_one_image(self, y: Tensor) -> Tensor:
        # In training its own statistics normalise it. They are not kept: at scale 1 all cells are alike, and a running
        # variance would go to 0. SyncBatchNorm counts the images of other processes, too.
        norms = [n for n in (self.bn1, self.bn2) if n.training and getattr(n, 'track_running_stats', False)]
        if isinstance(self.bn1, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            norms = norms if torch.distributed.get_world_size(self.bn1.process_group) == 1 else []
        if norms and y.shape[0] == 1 and not torch.compiler.is_compiling():
            _warn_once(
                'MS-SAR gates saw a batch of one image in training. They normalise it by its own statistics and '
                'remember none: the running statistics for evaluation stay as they are. Use larger batches, or '
                'freeze the norms (timm.utils.freeze).'
            )
        try:
            for norm in norms:
                norm.track_running_stats = False  # type: ignore[assignment]
            if y.shape[2] * y.shape[3] == 1:  # PyTorch normalises no single value, but two that are alike
                return self._z(y.expand(-1, -1, -1, 2))[:, :, :, :1]
            return self._z(y)
        finally:
            for norm in norms:
                norm.track_running_stats = True  # type: ignore[assignment]

    def reparameterize(self) -> None:
        """Fold the norms into the convolutions, for inference only: `timm.utils.reparameterize_model` calls this."""
        self.eval()
        for fc, bn in (('fc1', 'bn1'), ('fc2', 'bn2')):
            if getattr(getattr(self, bn), 'running_mean', None) is not None:
                setattr(self, fc, fuse_conv_bn_eval(getattr(self, fc), getattr(self, bn)))
                setattr(self, bn, nn.Identity())
