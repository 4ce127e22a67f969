"""One ONNX file for every batch, height and width, run by onnxruntime.

python onnx_any_size.py [FILE.onnx] [--random]

--random exports a network without pretrained weights.
"""

import sys

import onnxruntime
import timm
import torch

import timm_msar  # noqa: F401  registers the networks

torch.manual_seed(0)
path = next((argument for argument in sys.argv[1:] if argument != '--random'), 'resnet18_msar.onnx')
model = timm.create_model('resnet18_msar', pretrained='--random' not in sys.argv, zero_init_last=False).eval()
dims = {0: 'batch', 2: 'height', 3: 'width'}
torch.onnx.export(
    model,
    (torch.randn(2, 3, 224, 224),),
    path,
    dynamo=True,
    dynamic_shapes=(dims,),
    input_names=['images'],
    output_names=['logits'],
    optimize=False,  # onnxruntime does it itself
)
session = onnxruntime.InferenceSession(path)
differences = []
for shape in ((1, 3, 224, 224), (3, 3, 160, 160), (1, 3, 192, 320), (2, 3, 97, 33)):
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
    (logits,) = session.run(None, {'images': x.numpy()})
    differences.append((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max())
print(f'largest difference, relative to the largest logit: {max(differences):.1e}')
