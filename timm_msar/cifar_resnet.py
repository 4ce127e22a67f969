"""ResNet for 32×32 images, plain and with MS-SAR (Table 1)

Three stages of timm's basic blocks with 16, 32 and 64 channels behind a 3×3 stem, as in `Deep Residual Learning for
Image Recognition` (He et al., Section 4.2) - https://arxiv.org/abs/1512.03385. Shortcuts between stages are 1×1
projections: with them, not with zero padding, the paper's multiply-adds come out, but for a misprint in Table 1.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock

from .cifar_net import CifarNet, cifar_cfg, create_cifar_net
from .recalibration import MultiScaleRecalibration

__all__ = ['CifarResNet']

FASHION_MNIST = (
    *('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat'),
    *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
)


class CifarResNet(CifarNet):
    """ResNet for 32×32 images.

    Args:
        layers: Blocks in each of the three stages.
        channels: Channels of each stage.
        drop_path_rate: Probability of skipping the last block in training, falling linearly to 0 for the first.
        attn_layer: Layer after the second convolution of each block, called with its channels.
        **kwargs: num_classes, in_chans, global_pool and drop_rate of CifarNet.
    """

    def __init__(
        self,
        layers: tuple[int, int, int] = (3, 3, 3),
        channels: tuple[int, int, int] = (16, 32, 64),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        attn_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False, **dd),
                bn=nn.BatchNorm2d(channels[0], **dd),
                act=nn.ReLU(inplace=True),
            )
        )
        stages: list[nn.Sequential] = []
        inplanes = channels[0]
        drop_probs = iter(calculate_drop_path_rates(drop_path_rate, sum(layers)))
        for planes, depth in zip(channels, layers):
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and stages else 1
                drop_prob = next(drop_probs)
                blocks.append(
                    BasicBlock(
                        inplanes,
                        planes,
                        stride=stride,
                        downsample=_projection(inplanes, planes, stride, **dd) if stride == 2 else None,
                        attn_layer=attn_layer,
                        drop_path=DropPath(drop_prob) if drop_prob > 0 else None,
                        **dd,
                    )
                )
                inplanes = planes
            stages.append(nn.Sequential(*blocks))
        super().__init__(stem, stages, channels, in_chans=in_chans, **dd, **kwargs)


def _projection(in_channels: int, out_channels: int, stride: int, **dd) -> nn.Sequential:
    """1×1 convolution and BN, for the shortcut of a block that changes the shape."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False, **dd),
        nn.BatchNorm2d(out_channels, **dd),
    )


_create_cifar_resnet = partial(create_cifar_net, CifarResNet)


def _create_cifar_resnet_msar(
    variant: str,
    pretrained: bool,
    scales: Sequence[int] = (1, 2, 4),
    rd_ratio: float = 0.375,
    strategy: str = 'regional',
    **kwargs,
) -> CifarResNet:
    layer = partial(MultiScaleRecalibration, scales=scales, rd_ratio=rd_ratio, strategy=strategy)
    return _create_cifar_resnet(variant, pretrained, attn_layer=layer, **kwargs)


def _fashion_mnist_cfg(variant: str) -> dict[str, Any]:
    """Weights that come with this package. Fashion-MNIST's images take CIFAR-10's normalisation, too: one a network."""
    file = Path(__file__).parent / 'weights' / f'{variant}.fashion_mnist.safetensors'
    return cifar_cfg(file=str(file), label_names=FASHION_MNIST)


default_cfgs = generate_default_cfgs(
    {
        'cifar_resnet20.fashion_mnist': _fashion_mnist_cfg('cifar_resnet20'),
        'cifar_resnet32.untrained': cifar_cfg(),
        'cifar_resnet56.untrained': cifar_cfg(),
        'cifar_resnet20_msar.fashion_mnist': _fashion_mnist_cfg('cifar_resnet20_msar'),
        'cifar_resnet32_msar.untrained': cifar_cfg(),
        'cifar_resnet56_msar.untrained': cifar_cfg(),
    }
)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20, 0.27 M parameters."""
    model_args = dict(layers=(3, 3, 3))
    return _create_cifar_resnet('cifar_resnet20', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32, 0.47 M parameters."""
    model_args = dict(layers=(5, 5, 5))
    return _create_cifar_resnet('cifar_resnet32', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56, 0.86 M parameters."""
    model_args = dict(layers=(9, 9, 9))
    return _create_cifar_resnet('cifar_resnet56', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet20_msar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20 with MS-SAR in each block, 0.29 M parameters."""
    model_args = dict(layers=(3, 3, 3))
    return _create_cifar_resnet_msar('cifar_resnet20_msar', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet32_msar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32 with MS-SAR in each block, 0.49 M parameters."""
    model_args = dict(layers=(5, 5, 5))
    return _create_cifar_resnet_msar('cifar_resnet32_msar', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet56_msar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56 with MS-SAR in each block, 0.90 M parameters."""
    model_args = dict(layers=(9, 9, 9))
    return _create_cifar_resnet_msar('cifar_resnet56_msar', pretrained, **dict(model_args, **kwargs))
