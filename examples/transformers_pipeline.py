"""A folder made by `timm-msar export`, in transformers' image classification pipeline.

timm-msar export output/train/RUN/model_best.pth.tar --output my_model
python transformers_pipeline.py my_model IMAGE
"""

import argparse

import transformers

import timm_msar  # noqa: F401  registers the networks

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('folder')
parser.add_argument('image')
args = parser.parse_args()

classify = transformers.pipeline('image-classification', model=args.folder)
best = classify(args.image)[0]
print(f'{best["label"]}: {best["score"]:.6f}')
