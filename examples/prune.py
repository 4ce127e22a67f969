"""Torch-Pruning removes half of the channels of an MS-SAR ResNet. --random starts without pretrained weights."""

import sys
from unittest import mock

import timm
import torch
import torch_pruning as tp

from timm_msar import MultiScaleRecalibration


class RecalibrationPruner(tp.function.BasePruningFunc):
    """What a channel is in a layer: one of the inputs and outputs of each scale's gate."""

    def prune_out_channels(self, layer, idxs):
        gate = layer.gate[0]
        of_all_scales = [k * layer.channels + i for k in range(len(layer.scales)) for i in idxs]
        tp.prune_conv_in_channels(gate.fc1, of_all_scales)
        tp.prune_conv_out_channels(gate.fc2, of_all_scales)
        tp.prune_batchnorm_out_channels(gate.bn2, of_all_scales)
        layer.channels = layer.source_channels = layer.channels - len(idxs)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return layer.channels

    get_in_channels = get_out_channels


def traceable():
    """Torch-Pruning cannot follow channels through the mean over scales: meanwhile a layer is one operator to it."""
    return mock.patch.object(MultiScaleRecalibration, 'forward', lambda layer, x: x * 1)


PRUNERS = {MultiScaleRecalibration: RecalibrationPruner()}

if __name__ == '__main__':
    model = timm.create_model('resnet18_msar', pretrained='--random' not in sys.argv).eval()
    images = torch.randn(1, 3, 224, 224)
    before = sum(p.numel() for p in model.parameters())
    options = {'pruning_ratio': 0.5, 'ignored_layers': [model.fc], 'customized_pruners': PRUNERS}
    with traceable():
        pruner = tp.pruner.MagnitudePruner(model, images, tp.importance.MagnitudeImportance(), **options)
    pruner.step()
    model(images)
    print(f'share of the parameters that is left: {sum(p.numel() for p in model.parameters()) / before:.3f}')
