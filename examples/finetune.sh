#!/bin/sh
# Fine-tune a warm start on a folder of your images, DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg, with timm's train.py.
# The script is not in timm's package; get it from a checkout of the installed version:
#   git clone --depth 1 --branch v1.0.31 https://github.com/huggingface/pytorch-image-models
#   cp pytorch-image-models/train.py .
# Then, with OPTIONS of train.py if you like, for example --epochs 100:
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
print('best accuracy:', max(float(row['eval_top1']) for row in csv.DictReader(open(sys.argv[1]))), '%')
PYTHON
