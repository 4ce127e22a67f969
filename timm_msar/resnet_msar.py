"""ResNet and ResNeXt with MS-SAR, for 224×224 images (Table 4)

The networks are timm's own ResNets: the basic block takes the layer where it takes Squeeze-and-Excitation, and the
bottleneck block recalibrates its second convolution rather than its last (Section 3.4 and Figure 2).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor

from .gate import Gate
from .recalibration import MultiScaleRecalibration
from .warm_start import DOUBLED, complete_gates

__all__ = ['RecalibratedBottleneck', 'ResNetMsar']


class RecalibratedBottleneck(Bottleneck):
    """timm's bottleneck block with the attention layer after the 3×3 convolution, its BN and ReLU (Section 3.4)."""

    def __init__(self, *args, attn_layer, device=None, dtype=None, **kwargs):
        super().__init__(*args, attn_layer=None, device=device, dtype=dtype, **kwargs)
        self.se = attn_layer(self.conv2.out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.se(x)
        x = self.bn3(self.conv3(x))
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act3(x)


DOUBLED[RecalibratedBottleneck] = ('conv3.weight',)  # not bn2: an activation stands between it and the layer


class ResNetMsar(ResNet):
    """timm's ResNet, which completes plain weights when it loads them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(complete_gates)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise as timm does, and then the gates, each scale by itself."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, Gate):
                module.init_weights()


def _create_resnet_msar(
    variant: str,
    pretrained: bool,
    scales: Sequence[int] = (1, 2, 4),
    rd_ratio: float = 0.375,
    strategy: str = 'regional',
    **kwargs,
) -> ResNetMsar:
    layer = partial(MultiScaleRecalibration, scales=scales, rd_ratio=rd_ratio, strategy=strategy)
    return build_model_with_cfg(ResNetMsar, variant, pretrained, block_args={'attn_layer': layer}, **kwargs)


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


def _timm_cfg(source: str, **kwargs) -> dict[str, Any]:
    """A warm start from plain weights that timm trained; timm evaluates them at 288 pixels too."""
    return _cfg(
        hf_hub_id=f'timm/{source}',
        test_input_size=(3, 288, 288),
        test_crop_pct=1.0,
        origin_url='https://github.com/huggingface/pytorch-image-models',
        **{'crop_pct': 0.95, **kwargs},
    )


def _torchvision_cfg(source: str) -> dict[str, Any]:
    """A warm start from torchvision's first plain weights, trained as in the paper's time."""
    return _cfg(
        hf_hub_id=f'timm/{source}',
        interpolation='bilinear',
        license='bsd-3-clause',
        origin_url='https://github.com/pytorch/vision',
    )


# Each tag is a plain network's weights, with gates that change nothing until they are trained. The first of a network
# is what timm itself takes for the plain one, so that the two compare alike.
default_cfgs = generate_default_cfgs(
    {
        'resnet18_msar.warm_a1_in1k': _timm_cfg('resnet18.a1_in1k'),
        'resnet18_msar.warm_tv_in1k': _torchvision_cfg('resnet18.tv_in1k'),
        'resnet34_msar.warm_a1_in1k': _timm_cfg('resnet34.a1_in1k'),
        'resnet34_msar.warm_tv_in1k': _torchvision_cfg('resnet34.tv_in1k'),
        'resnet34_msar.warm_ra4_e3600_r224_in1k': _timm_cfg(
            'resnet34.ra4_e3600_r224_in1k', crop_pct=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        'resnet50_msar.warm_a1_in1k': _timm_cfg('resnet50.a1_in1k'),
        'resnet50_msar.warm_tv_in1k': _torchvision_cfg('resnet50.tv_in1k'),
        'resnext50_msar.warm_a1h_in1k': _timm_cfg('resnext50_32x4d.a1h_in1k'),
        'resnext50_msar.warm_tv_in1k': _torchvision_cfg('resnext50_32x4d.tv_in1k'),
    }
)


@register_model
def resnet18_msar(pretrained: bool = False, **kwargs) -> ResNetMsar:
    """ResNet-18 with MS-SAR in each block, 12.22 M parameters."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_resnet_msar('resnet18_msar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_msar(pretrained: bool = False, **kwargs) -> ResNetMsar:
    """ResNet-34 with MS-SAR in each block, 22.77 M parameters."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_resnet_msar('resnet34_msar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_msar(pretrained: bool = False, **kwargs) -> ResNetMsar:
    """ResNet-50 with MS-SAR in each block, 26.20 M parameters; not in the paper, with ResNeXt-50's `rd_ratio`."""
    model_args = dict(block=RecalibratedBottleneck, layers=(3, 4, 6, 3), rd_ratio=0.25)
    return _create_resnet_msar('resnet50_msar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_msar(pretrained: bool = False, **kwargs) -> ResNetMsar:
    """ResNeXt-50 32x4d with MS-SAR in each block, 27.57 M parameters; `rd_ratio` is what the paper's count implies."""
    model_args = dict(block=RecalibratedBottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4, rd_ratio=0.25)
    return _create_resnet_msar('resnext50_msar', pretrained, **dict(model_args, **kwargs))
