"""Turn a checkpoint of train.py into a folder that timm loads by `local-dir:`: weights, config and model card.

The folder holds model.safetensors, config.json and README.md, and no pickle. It is written aside, loaded back, and
gets its name only when the network loaded from it computes the same logits as the checkpoint's, bit by bit.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import save_for_hf

from .checkpoint import Trained, load_trained
from .errors import CommandError
from .model_card import model_card
from .training_data import training_data

TOLD_ARGUMENTS = {
    'opt': 'optimizer',
    'lr': 'learning rate',
    'batch_size': 'batch size (of one process)',
    'weight_decay': 'weight decay',
    'seed': 'seed',
}


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
    if output.exists():
        raise CommandError(f'{output} exists already; delete it or give another --output')
    trained = load_trained(args.checkpoint, args.ema)
    aside = output.with_name(f'.{output.name}.{os.getpid()}.partial')
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise CommandError(f'cannot write to {output.parent}: {error.strerror}') from error
    try:
        with disk_errors(output):
            write_folder(trained, aside, f'local-dir:{output.name}', args.checkpoint)
            aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f'{describe(trained)}\n{output} is ready; after import timm, timm_msar:')
    print(f'timm.create_model("local-dir:{output}", pretrained=True)')


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Tell errors in writing in one sentence.

    Raises:
        CommandError: In place of the error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CommandError(f'cannot write {folder}: {reason}; nothing was kept') from error


def describe(trained: Trained) -> str:
    """One line on what is exported."""
    results = ', '.join(f'{name} {value:.4g}' for name, value in trained.results.items())
    weights = 'EMA weights' if trained.ema else 'weights'
    return f'{trained.args["model"]}, {weights} of epoch {trained.epoch}: {results or "not validated"}'


def write_folder(trained: Trained, folder: Path, model_id: str, checkpoint: Path) -> None:
    """Write weights, config and card into a folder, load them back and compare the logits.

    Args:
        trained: What `load_trained` gave.
        folder: Existing, empty folder.
        model_id: What its reader loads it by, `hf-hub:ME/MODEL.TAG` or `local-dir:MODEL.TAG`.
        checkpoint: Where the network came from; the name of its folder is the tag where `model_id` has none.

    Raises:
        CommandError: If what was written does not compute the same.
    """
    model, args = trained.model, trained.args
    data = training_data(args, model.num_classes)
    tag = model_id.rpartition('/')[2].partition('.')[2] or checkpoint.resolve().parent.name
    # A file in place of timm's weights may hold anything, so then the base is not known.
    from_hub = args.get('pretrained') and not (args.get('pretrained_path') or args.get('initial_checkpoint'))
    base_model = model.pretrained_cfg.get('hf_hub_id') if from_hub else None
    model_config = {'pretrained_cfg': {'tag': tag}, 'label_names': data.classes}
    data_config = resolve_data_config(args, model=model)  # as train.py does it for its own validation
    save_for_hf(model, folder, model_config=model_config, safe_serialization=True, data_config=data_config)

    source = f'local-dir:{folder}'
    card = model_card(source, model_id, data, trained.results, _description(trained), base_model)
    (folder / 'README.md').write_text(card, encoding='utf-8')

    loaded = timm.create_model(source, pretrained=True).eval()
    image = torch.randn(2, *data_config['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.equal(loaded(image), model(image)):
            raise CommandError(
                f'{model_id} loaded back computes other logits than {checkpoint}; it is not exported. '
                'An argument of its training that config.json cannot hold may be the reason'
            )


def _description(trained: Trained) -> str:
    args = trained.args
    weights = 'Exponential moving average of the weights' if trained.ema else 'Weights'
    facts = [f'{weights} after {trained.epoch + 1} of {args.get("epochs", "?")} epochs']
    facts += [f'{name} {args[key]}' for key, name in TOLD_ARGUMENTS.items() if args.get(key) is not None]
    fine_tuned = args.get('pretrained') or args.get('initial_checkpoint')
    start = ', fine-tuned from pretrained weights' if fine_tuned else ''
    return f"Trained with timm's train.py{start}. {', '.join(facts)}."
