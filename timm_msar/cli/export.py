"""Turn a checkpoint of train.py into a folder that timm loads by `local-dir:`: weights, config and model card.

The folder holds model.safetensors, config.json and README.md, and no pickle. It is written aside, loaded back, and
gets its name only when the network loaded from it computes the same logits as the checkpoint's, bit by bit.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform
from timm.models import save_for_hf

from .checkpoint import Trained, load_trained
from .data_config import data_config
from .errors import CommandError, first_line, one_sentence
from .model_card import as_markdown, model_card
from .photo import MODES
from .training_data import training_data
from .written_aside import written_aside

TOLD_ARGUMENTS = {'opt': 'optimizer', 'lr': 'learning rate', 'weight_decay': 'weight decay', 'seed': 'seed'}


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `export` and `push` have in common."""
    parser.add_argument(
        'checkpoint',
        metavar='CHECKPOINT',
        type=Path,
        help='model_best.pth.tar or last.pth.tar in the output folder of train.py, beside its summary.csv',
    )
    parser.add_argument(
        '--ema',
        choices=('auto', 'yes', 'no'),
        default='auto',
        help='take the moving average of the weights (default: auto, those that train.py validated)',
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-msar export`."""
    add_checkpoint_arguments(parser)
    parser.add_argument('--output', metavar='DIR', type=Path, required=True, help='folder to make, MODEL.TAG')


def main(args: argparse.Namespace) -> None:
    """Export the checkpoint.

    Raises:
        CommandError: If the checkpoint is not what it should be, or the folder cannot be written.
    """
    output = args.output
    with one_sentence(f'cannot write {output}', SafetensorError, advice='nothing was kept'):
        if os.path.lexists(output):
            raise CommandError(f'{output} exists already; delete it or give another --output')
        trained = load_trained(args.checkpoint, args.ema)
        with written_aside(output) as aside:
            write_folder(trained, aside, f'local-dir:{output.name}', args.checkpoint)
    print(f'{describe(trained)}\n{output} is ready; after import timm, timm_msar:')
    print(f'timm.create_model("local-dir:{output}", pretrained=True)')


def describe(trained: Trained) -> str:
    """One line on what is exported."""
    results = ', '.join(f'{name} {value:.4g}' for name, value in trained.results.items())
    weights = 'EMA weights' if trained.ema else 'weights'
    return f'{trained.args["model"]}, {weights} of epoch {trained.epoch}: {results or "not validated"}'


def write_folder(trained: Trained, folder: Path, model_id: str, checkpoint: Path) -> None:
    """Write weights, config and card into a folder, load them back and compare the logits.

    Args:
        trained: What `load_trained` gave.
        folder: Folder to make, or an empty one.
        model_id: What its reader loads it by, `hf-hub:ME/MODEL.TAG` or `local-dir:MODEL.TAG`.
        checkpoint: Where the network came from; the name of its folder is the tag where `model_id` has none.

    Raises:
        CommandError: The network or its data config cannot be used, or what was written does not compute the same.
        OSError: The folder cannot be written.
        SafetensorError: The weights cannot be written.
    """
    model, args = trained.model, trained.args
    data = training_data(args, model.num_classes)
    config = _usable_data_config(trained, checkpoint)
    image = torch.randn(2, *config['input_size'], generator=torch.Generator().manual_seed(0))
    size = 'x'.join(map(str, config['input_size']))
    with (
        one_sentence(f'the network of {checkpoint} takes no image of {size}', RuntimeError, TypeError),
        torch.no_grad(),
    ):
        expected = model(image)

    fine_tuned = args.get('pretrained') and not _started_from_a_file(args)
    base_model = model.pretrained_cfg.get('hf_hub_id') if fine_tuned else None
    tag = model_id.rpartition('/')[2].partition('.')[2] or checkpoint.resolve().parent.name
    model_config = {'pretrained_cfg': {'tag': tag}, 'label_names': data.classes}
    save_for_hf(model, folder, model_config=model_config, safe_serialization=True, data_config=config)
    sha256 = _complete_config(folder, bool(fine_tuned))

    source = f'local-dir:{folder}'
    card = model_card(source, model_id, data, trained.results, _description(trained), base_model, sha256)
    (folder / 'README.md').write_text(card, encoding='utf-8')

    loaded = timm.create_model(source, pretrained=True).eval()
    with torch.no_grad():
        same = torch.equal(loaded(image), expected) and _sha256(folder / 'model.safetensors') == sha256
    if not same:
        raise CommandError(
            f'{model_id} loaded back computes other logits than {checkpoint}; it is not exported. '
            'An argument of its training that config.json cannot hold may be the reason'
        )


def _usable_data_config(trained: Trained, checkpoint: Path) -> dict[str, Any]:
    """What timm's transform needs to know about the images, from the arguments, after transforming one."""
    try:
        config = data_config(trained.args, trained.model)
        image = Image.new(MODES.get(config['input_size'][0], 'RGB'), (50, 40))
        usable = create_transform(**config)(image).shape == tuple(config['input_size'])
    except Exception as error:  # timm and torchvision have no common class for values that they cannot use
        raise CommandError(
            f'images cannot be prepared with the mean, std, interpolation and crop of {checkpoint}: {first_line(error)}'
        ) from error
    if not usable:
        raise CommandError(f'timm makes no images of the size that the network of {checkpoint} takes')
    return config


def _complete_config(folder: Path, fine_tuned: bool) -> str:
    """Add the checksum of the weights to config.json, take out what is not true of them, and return the checksum."""
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    if not fine_tuned:  # these are facts about weights from which the training did not start
        for key in ('origin_url', 'license', 'notes', 'paper_ids', 'paper_name'):
            config['pretrained_cfg'].pop(key, None)
    config.get('model_args', {}).pop('num_classes', None)  # is there already; transformers refuses to have it twice
    config['weights_sha256'] = _sha256(folder / 'model.safetensors')
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
    shutil.copymode(path, folder / 'model.safetensors')  # safetensors lets nobody else read it
    return config['weights_sha256']


def compare_checksum(folder: Path) -> None:
    """Compare the weights in an exported folder with their checksum in config.json, if it has one.

    Raises:
        CommandError: They differ.
        OSError: The folder lacks a file.
    """
    wanted = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('weights_sha256')
    if wanted and wanted != _sha256(folder / 'model.safetensors'):
        raise CommandError(
            f'{folder / "model.safetensors"} is damaged or another file: its SHA-256 is not the one in config.json; '
            'copy the folder or export it again'
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _started_from_a_file(args: dict[str, Any]) -> bool:
    """A file in place of the network's own pretrained weights may hold anything, so then the base is not known."""
    return bool(args.get('pretrained_path') or args.get('initial_checkpoint'))


def _description(trained: Trained) -> str:
    args = trained.args
    weights = 'Exponential moving average of the weights' if trained.ema else 'Weights'
    facts = [f'{weights} after {trained.epoch + 1} of {args.get("epochs", "?")} epochs']
    facts += [
        f'{name} {as_markdown(str(args[key]))}' for key, name in TOLD_ARGUMENTS.items() if args.get(key) is not None
    ]
    if args.get('batch_size'):
        facts.append(_batch_size(args['batch_size'], args.get('grad_accum_steps') or 1, args.get('world_size')))
    start = ''
    if args.get('pretrained') or args.get('initial_checkpoint'):
        cfg = trained.model.pretrained_cfg
        base = 'other weights' if _started_from_a_file(args) else f'{cfg["architecture"]}.{cfg["tag"]}'
        start = f', fine-tuned from {base}'
    return f"Trained with timm's train.py{start}. {', '.join(facts)}."


def _batch_size(images: int, steps: int, processes: int | None) -> str:
    """The images of one update; args.yaml does not say how many processes there were, a checkpoint does."""
    if processes is None:
        return f'batch size {images * steps} of each process'
    parts = [(processes, 'processes'), (images, 'images'), (steps, 'accumulated steps')]
    told = ' × '.join(f'{number} {name}' for number, name in parts if number > 1)
    return f'batch size {processes * images * steps}' + (f' ({told})' if processes * steps > 1 else '')
