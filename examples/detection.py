"""torchvision's Faster R-CNN on an MS-SAR network, one image a step. --random starts without pretrained weights."""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import timm_msar  # noqa: F401  registers the networks


class Backbone(torch.nn.Module):
    def __init__(self, name, out_channels=64, **kwargs):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


torch.manual_seed(0)
backbone = Backbone('resnet18_msar', pretrained='--random' not in sys.argv)
anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)  # a size for each of the four features
model = FasterRCNN(backbone, 11, min_size=128, max_size=128, rpn_anchor_generator=anchors)  # background, ten digits
digit = torch.nn.functional.interpolate(torch.tensor(load_digits().images[3][None, None]) / 16, size=64).float()[0]
image = torch.nn.functional.pad(digit, (40, 24, 20, 44)).expand(3, -1, -1)
target = {'boxes': torch.tensor([[40.0, 20.0, 104.0, 84.0]]), 'labels': torch.tensor([1 + 3])}
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
losses = []
for _ in range(15):
    losses.append(sum(model([image], [target]).values()))
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
print(f'loss of the last step over that of the first: {losses[-1] / losses[0]:.4f}')
