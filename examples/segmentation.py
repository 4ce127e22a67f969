"""A U-Net on an MS-SAR network, with segmentation_models.pytorch. It learns where the ink of handwritten digits is.

python segmentation.py [ENCODER] [--deeplab] [--random]

ENCODER is `tu-` and a network's name. A network for 32×32 images has three features, hence the depth of 2.
--deeplab takes DeepLabV3+ at output stride 16, for ImageNet networks. --random starts without pretrained weights.
"""

import argparse

import segmentation_models_pytorch as smp
import torch
from sklearn.datasets import load_digits

import timm_msar  # noqa: F401  registers the networks

parser = argparse.ArgumentParser()
parser.add_argument('encoder', nargs='?', default='tu-resnext50_msar')
parser.add_argument('--deeplab', action='store_true')
parser.add_argument('--random', action='store_true')
args = parser.parse_args()

torch.manual_seed(0)
kwargs = {'encoder_weights': None if args.random else 'imagenet', 'classes': 1}
if args.deeplab:
    model = smp.DeepLabV3Plus(args.encoder, encoder_output_stride=16, **kwargs)
elif args.encoder.startswith('tu-cifar'):
    model = smp.Unet(args.encoder, encoder_depth=2, decoder_channels=(32, 16), **kwargs)
else:
    model = smp.Unet(args.encoder, **kwargs)

digits = torch.nn.functional.interpolate(torch.tensor(load_digits().images[:8, None]) / 16, size=32).float()
masks, images = (digits > 0.5).float(), digits.expand(-1, 3, -1, -1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(12):
    output = model(images)
    optimizer.zero_grad()
    smp.losses.DiceLoss('binary')(output, masks).backward()
    optimizer.step()
print(f'intersection over union: {((output > 0) * masks).sum() / ((output > 0) + masks).clamp(max=1).sum():.4f}')
