#!/bin/sh
# Fine-tune a warm start on images of your own, DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg, with timm's train.py.
# train.py is not in timm's package. Get that of the installed version:
#   git clone --depth 1 --branch v1.0.31 https://github.com/huggingface/pytorch-image-models
#   cp pytorch-image-models/train.py .
# Then start it, with OPTIONS of train.py if you like, such as --epochs 100:
#   sh finetune.sh train.py DATA [OPTIONS]
set -eu
script=$1 data=$2
shift 2
config=$(python -c 'import timm_msar, pathlib; folder = pathlib.Path(timm_msar.__file__).parent
print(next(path for path in (folder / "train_configs", folder.parent / "train_configs") if path.is_dir()))')/finetune.yaml
output=$(mktemp -d)
python "$script" --config "$config" --model resnet18_msar --num-classes "$(ls "$data/train" | wc -l)" \
    --data-dir "$data" --output "$output" --experiment finetuned "$@"
echo "weights: $output/finetuned"
python - "$output/finetuned/summary.csv" <<'PYTHON'
import csv, sys
print(f'best accuracy: {max(float(row["eval_top1"]) for row in csv.DictReader(open(sys.argv[1]))):.2f} %')
PYTHON
