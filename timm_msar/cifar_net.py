"""What the networks for 32×32 images have in common: a stem, three stages at strides 1, 2 and 4, and a linear head."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from timm.layers import create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, resolve_pretrained_cfg
from torch import Tensor

from .warm_start import complete_gates

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def cifar_cfg(**kwargs) -> dict[str, Any]:
    """Pretrained config of a network for 32×32 images, with CIFAR-10's normalisation unless `kwargs` says otherwise."""
    return {
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': CIFAR10_MEAN,
        'std': CIFAR10_STD,
        'first_conv': 'stem.conv',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


def create_cifar_net(cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs) -> Any:
    """Build a network by timm, with the names of a tag's classes only where it has the tag's weights and classifier.

    timm gives a network the config of its tag, loaded or not, and its scripts print the names in it. Names from a
    folder, from the Hub or in `pretrained_cfg_overlay` stay.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.pop('pretrained_cfg', None))
    if not cfg.source and not (pretrained and kwargs.get('num_classes', cfg.num_classes) == cfg.num_classes):
        cfg = replace(cfg, label_names=None)
    feature_cfg = {'out_indices': (0, 1, 2), 'flatten_sequential': True}
    return build_model_with_cfg(cls, variant, pretrained, cfg.to_dict(), feature_cfg=feature_cfg, **kwargs)


def _feature_indices(indices: int | Sequence[int] | None, num_features: int) -> list[int]:
    """Absolute indices of the features asked for: all for None, the last n for an int n, or those of a sequence."""
    if indices is None:
        return list(range(num_features))
    chosen = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not chosen or not all(-num_features <= i < num_features for i in chosen):
        raise ValueError(
            f'indices must be up to {num_features} last features or indices from {-num_features} to '
            f'{num_features - 1}, not {indices!r}.'
        )
    return [i % num_features for i in chosen]


class CifarNet(nn.Module):
    """A network for 32×32 images whose features are those of its stages, at strides 1, 2 and 4.

    The stem's are no feature of their own: they have the first stage's stride, and who builds on features (a feature
    pyramid, segmentation_models.pytorch) expects one a stride.

    Args:
        stem: Maps images to the input of the first stage.
        stages: The three stages.
        feature_chs: Channels of the features of each stage.
        num_classes: Classes, 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling before the classifier, '' for none.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Sequence[nn.Sequential],
        feature_chs: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.register_load_state_dict_pre_hook(complete_gates)
        self.feature_info = [
            {'num_chs': chs, 'reduction': 2**i, 'module': f'stages.{i}'} for i, chs in enumerate(feature_chs)
        ]
        self.num_features = feature_chs[-1]
        # In the order of use, so that list(model.children())[:-1] is the network without its classifier.
        self.global_pool, fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=device, dtype=dtype
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = fc
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:  # the gates have done so
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group parameters by stage (coarse) or block, for layer-wise learning rates."""
        return {'stem': r'^stem', 'blocks': r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block's activations a second time in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is given."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self)
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute intermediate features of images (B, in_chans, H, W).

        Args:
            x: The images.
            indices: The last n features if an int, those at these indices if a sequence, all if None.
            norm: Not supported, ignored.
            stop_early: Stop at the last feature asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Return the intermediate features only.

        Returns:
            The final features and the list of intermediate ones, or the list alone.

        Raises:
            ValueError: An argument is not one of those above.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}.")
        take = _feature_indices(indices, len(self.feature_info))
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > max(take):
                break
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features at `indices` do not need; return their absolute indices."""
        take = _feature_indices(indices, len(self.feature_info))
        shortened = max(take) + 1 < len(self.stages)
        self.stages = self.stages[: max(take) + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max(take)]['num_chs']
        if prune_head or shortened:
            self.reset_classifier(0, '')
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to features (B, num_features, H / 4, W / 4)."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x, flatten=True)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits (B, num_classes), or to what the classifier sees with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
