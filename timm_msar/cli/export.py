"""Turn a checkpoint of train.py into a folder that timm loads by `local-dir:`: weights, config and model card.

The folder holds model.safetensors, config.json and README.md, and no pickle. It gets its name only when the network
loaded from it computes the same logits as the checkpoint's, bit by bit.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models import save_for_hf

from .card_data import training_data
from .errors import CommandError, say
from .files import regular_file, written_whole
from .model_card import model_card
from .trained_run import data_config, load_trained, read_results

TRAINING = ('opt', 'lr', 'weight_decay', 'batch_size', 'grad_accum_steps', 'world_size', 'seed')
ABOUT_THE_BASE = ('origin_url', 'license', 'notes', 'paper_ids', 'paper_name')  # in timm's config of pretrained weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', type=Path, help='model_best.pth.tar or last.pth.tar, beside its summary.csv')
    parser.add_argument('--output', metavar='DIR', type=Path, required=True, help='folder to make, MODEL.TAG')


def main(args: argparse.Namespace) -> None:
    """Export the checkpoint."""
    output = Path(os.path.realpath(args.output))  # `a/../b` is not found where there is no `a`
    with written_whole(output, folder=True) as folder:
        summary = write_folder(args.checkpoint, folder, f'local-dir:{output.name}')
    say(summary, f'{output} is ready; after import timm, timm_msar:')
    say(f'timm.create_model("local-dir:{output}", pretrained=True)')


@torch.no_grad()
def write_folder(checkpoint: Path, folder: Path, model_id: str) -> str:
    """Write weights, config and card of a checkpoint into a folder, load them back and compare the logits.

    Args:
        checkpoint: The file. The name of its folder is the tag where `model_id` has none.
        folder: Folder to make, or an empty one.
        model_id: What its reader loads it by, `hf-hub:ME/MODEL.TAG` or `local-dir:MODEL.TAG`.

    Returns:
        One line on what was exported.
    """
    model, args, trained = load_trained(checkpoint)
    results = read_results(checkpoint, args, trained)
    data, config = training_data(args, model.num_classes), data_config(args, model)
    image = torch.randn(2, *config['input_size'], generator=torch.Generator().manual_seed(0))
    expected = model(image)
    if not expected.isfinite().all():
        raise CommandError(f'the logits of a test image are NaN or infinite with the weights in {checkpoint}')

    other_weights = args.get('pretrained_path') or args.get('initial_checkpoint')  # they may be any
    base = model.pretrained_cfg if args.get('pretrained') and not other_weights else {}
    tag = model_id.rpartition('/')[2].partition('.')[2] or checkpoint.resolve().parent.name
    model_config = {'pretrained_cfg': {'tag': tag}, 'label_names': data.classes}
    save_for_hf(model, str(folder), model_config=model_config, safe_serialization=True, data_config=config)
    _complete_config(folder, keep=ABOUT_THE_BASE if base else ())

    start = f'{base["architecture"]}.{base["tag"]}' if base else 'other weights' if other_weights else ''
    average = ' (a moving average)' if args.get('model_ema') and not args.get('model_ema_force_cpu') else ''
    description = (
        f"Trained with timm's train.py{start and f', fine-tuned from {start}'}. "
        f'Weights{average} after {trained["epoch"] + 1} of {args.get("epochs")} epochs, '
        f'{", ".join(f"{key} {args[key]}" for key in TRAINING if args.get(key) is not None)}.'
    )
    source = f'local-dir:{folder}'
    card = model_card(source, model_id, data, results, description, base.get('hf_hub_id'))
    (folder / 'README.md').write_text(card, encoding='utf-8')

    loaded = timm.create_model(source, pretrained=True).eval()
    if not torch.equal(loaded(image), expected):
        raise CommandError(
            f'the folder computes other logits than {checkpoint}, and is not kept; '
            'config.json may not hold all arguments of the network'
        )
    measured = ', '.join(f'{name} {value:.4g}' for name, value in results.items()) or 'not validated'
    return f'{args["model"]} after {trained["epoch"] + 1} epochs: {measured}'


def compare_checksum(folder: Path) -> None:
    """Compare the weights in an exported folder, where all must be files, with the checksum in config.json, if any."""
    for path in filter(Path.exists, folder.iterdir()):
        _ = path.is_dir() or regular_file(path)
    wanted = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('weights_sha256')
    if wanted and wanted != hashlib.sha256(np.memmap(folder / 'model.safetensors', mode='r').data).hexdigest():
        raise CommandError(f'{folder}/model.safetensors is damaged: its SHA-256 is not the one in config.json')


def _complete_config(folder: Path, keep: tuple[str, ...]) -> None:
    """Add the checksum of the weights to config.json, and take out what is true of other weights only."""
    path, weights = folder / 'config.json', folder / 'model.safetensors'
    config = json.loads(path.read_text(encoding='utf-8'))
    for key in {'label_names', *ABOUT_THE_BASE}.difference(keep):
        config['pretrained_cfg'].pop(key, None)
    config.get('model_args', {}).pop('num_classes', None)  # is there already; transformers refuses to have it twice
    config['weights_sha256'] = hashlib.sha256(np.memmap(weights, mode='r').data).hexdigest()
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
    shutil.copymode(path, weights)  # safetensors lets nobody else read it
