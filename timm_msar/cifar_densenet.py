"""DenseNet-BC for 32×32 images, plain and with MS-SAR (Table 1)

`Densely Connected Convolutional Networks` (Huang et al.) - https://arxiv.org/abs/1608.06993, with bottleneck layers
and transitions that halve the channels. MS-SAR recalibrates the new features of each dense layer before they are
concatenated. Multi-level recalibration computes the gates from all features fed to the layer, single-level from the
new ones (Sections 3.4 and 4.2).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from .cifar_net import CifarNet, cifar_cfg, create_cifar_net
from .recalibration import MultiScaleRecalibration
from .warm_start import DOUBLED

__all__ = ['CifarDenseNet']


class DenseLayer(nn.Module):
    """Appends `growth_rate` new features to its input.

    Args:
        in_channels: Channels of the input.
        growth_rate: New features.
        proj_drop_rate: Dropout of the new features.
        attn_layer: Layer that recalibrates the new features.
        multi_level: Compute its gates from the input rather than from the new features.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        proj_drop_rate: float = 0.0,
        attn_layer: Callable[..., nn.Module] | None = None,
        multi_level: bool = True,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = BatchNormAct2d(in_channels, **dd)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, kernel_size=1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(4 * growth_rate, **dd)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False, **dd)
        self.multi_level = multi_level
        self.se = None
        if attn_layer is not None:
            self.se = attn_layer(growth_rate, source_channels=in_channels if multi_level else growth_rate, **dd)
        self.drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, in_channels + growth_rate, H, W)."""
        new = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        if self.se is not None:
            source = x if self.multi_level else new
            new = self.se(new, source)
        return torch.cat([x, self.drop(new)], dim=1)


DOUBLED[DenseLayer] = ('conv2.weight',)


class Transition(nn.Sequential):
    """BN, ReLU, 1×1 convolution and 2×2 average pooling between dense blocks."""

    def __init__(self, in_channels: int, out_channels: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            OrderedDict(
                norm=BatchNormAct2d(in_channels, **dd),
                conv=nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False, **dd),
                pool=nn.AvgPool2d(kernel_size=2, stride=2),
            )
        )


class CifarDenseNet(CifarNet):
    """DenseNet-BC for 32×32 images.

    Args:
        depth: Layers of each of the three dense blocks.
        growth_rate: New features of each layer.
        proj_drop_rate: Dropout of the new features.
        attn_layer: Layer that recalibrates the new features, called with their number and `source_channels`.
        multi_level: Compute its gates from all features fed to a layer, not from the new ones.
        **kwargs: num_classes, in_chans, global_pool and drop_rate of CifarNet.
    """

    def __init__(
        self,
        depth: int = 16,
        growth_rate: int = 12,
        in_chans: int = 3,
        proj_drop_rate: float = 0.0,
        attn_layer: Callable[..., nn.Module] | None = None,
        multi_level: bool | None = None,
        device=None,
        dtype=None,
        **kwargs,
    ):
        if multi_level is not None and attn_layer is None:
            raise TypeError('multi_level is an argument of the networks with MS-SAR: this one has no gates.')
        dd = {'device': device, 'dtype': dtype}
        channels = 2 * growth_rate
        feature_chs: list[int] = []
        stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(in_chans, channels, kernel_size=3, padding=1, bias=False, **dd))
        )
        stages = []
        for i in range(3):
            layers: list[nn.Module] = []
            if i > 0:
                layers.append(Transition(channels, channels // 2, **dd))
                channels //= 2
            for _ in range(depth):
                layers.append(
                    DenseLayer(channels, growth_rate, proj_drop_rate, attn_layer, multi_level is not False, **dd)
                )
                channels += growth_rate
            if i == 2:
                layers.append(BatchNormAct2d(channels, **dd))
            stages.append(nn.Sequential(*layers))
            feature_chs.append(channels)
        super().__init__(stem, stages, feature_chs, in_chans=in_chans, **dd, **kwargs)


_create_cifar_densenet = partial(create_cifar_net, CifarDenseNet)


def _create_cifar_densenet_msar(
    variant: str,
    pretrained: bool,
    scales: Sequence[int] = (1, 2, 4),
    rd_ratio: float = 1.0,
    strategy: str = 'regional',
    multi_level: bool = True,
    **kwargs,
) -> CifarDenseNet:
    layer = partial(MultiScaleRecalibration, scales=scales, rd_ratio=rd_ratio, strategy=strategy)
    return _create_cifar_densenet(variant, pretrained, attn_layer=layer, multi_level=multi_level, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        'cifar_densenet100.untrained': cifar_cfg(),
        'cifar_densenet190.untrained': cifar_cfg(),
        'cifar_densenet100_msar.untrained': cifar_cfg(),
        'cifar_densenet190_msar.untrained': cifar_cfg(),
    }
)


@register_model
def cifar_densenet100(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-BC-100 with growth rate 12, 0.77 M parameters."""
    model_args = dict(depth=16, growth_rate=12)
    return _create_cifar_densenet('cifar_densenet100', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_densenet190(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-BC-190 with growth rate 40, 25.6 M parameters."""
    model_args = dict(depth=31, growth_rate=40)
    return _create_cifar_densenet('cifar_densenet190', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_densenet100_msar(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-BC-100 with MS-SAR in each dense layer, 0.89 M parameters."""
    model_args = dict(depth=16, growth_rate=12)
    return _create_cifar_densenet_msar('cifar_densenet100_msar', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_densenet190_msar(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-BC-190 with MS-SAR in each dense layer, 30.0 M parameters."""
    model_args = dict(depth=31, growth_rate=40)
    return _create_cifar_densenet_msar('cifar_densenet190_msar', pretrained, **dict(model_args, **kwargs))
