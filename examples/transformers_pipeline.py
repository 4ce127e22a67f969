"""A folder made by `timm-msar export`, in transformers' image classification pipeline.

timm-msar export output/train/RUN/model_best.pth.tar --output my_model
python transformers_pipeline.py my_model IMAGE
"""

import sys

import transformers

import timm_msar  # noqa: F401  registers the networks

folder, image = sys.argv[1:]
classify = transformers.pipeline('image-classification', model=folder)
best = classify(image)[0]
print(f'{best["label"]}: {best["score"]:.6f}')
