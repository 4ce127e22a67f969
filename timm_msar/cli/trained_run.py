"""Read what timm's train.py left in a run's folder: a checkpoint, its arguments and its results.

A checkpoint is a zip file with a pickle in it, and a pickle can run any code. So it is read with `weights_only=True`:
tensors, numbers, strings, containers, and one class more, `argparse.Namespace`, which holds train.py's arguments. That
class only stores attributes, whatever the file says. Anything else is refused.
"""

import argparse
import json
import math
import pickle
import zipfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import clean_state_dict

from .errors import CommandError
from .files import regular_file

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Pillow's mode of an image, by its number of channels


def load_trained(path: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Rebuild a network from a checkpoint, with the weights that train.py validates.

    These are the moving average of the weights if there is one, except under `--model-ema-force-cpu`.

    Returns:
        The network in evaluation mode, all weights finite; train.py's arguments; the checkpoint with its `epoch`.
    """
    checkpoint = _read_checkpoint(path)
    args = checkpoint.get('args')
    args = _checked(vars(args), path) if isinstance(args, argparse.Namespace) else read_arguments(path.parent)
    ema = 'state_dict_ema' in checkpoint and not args.get('model_ema_force_cpu')
    model = _rebuild(args, checkpoint['state_dict_ema' if ema else 'state_dict'], path)
    return model, args, checkpoint


def read_arguments(run: Path) -> dict[str, Any]:
    """Read train.py's arguments from the `args.yaml` of a run's folder; `model` is among them."""
    path = regular_file(run / 'args.yaml')
    text = path.read_text(encoding='utf-8')
    if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)) > 16:  # safe_load merges without end
        raise CommandError(f'{path} has more aliases of YAML than any args.yaml of train.py')
    return _checked(yaml.safe_load(text), path)


def read_summary(path: Path) -> list[dict[str, float]]:
    """Read the losses and accuracies of each epoch from a `summary.csv`.

    Some versions of train.py write the header again when they resume, and repeat epochs. The last one counts.

    Returns:
        A row for each epoch, in order: `epoch` (an int, from 0), `train_loss` and the other columns, such as
        `eval_top1` in percent. A loss may be NaN, where training diverged.
    """
    header, *lines = regular_file(path).read_text(encoding='utf-8').splitlines(keepends=True) or ['\n']
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines or [''], 2):
        if line == header:
            continue
        try:
            row = dict(zip(header.strip().split(','), map(float, line.split(',')), strict=True))
            if not row['epoch'].is_integer() or 'train_loss' not in row or not line.endswith('\n'):
                raise ValueError
            epoch = row['epoch'] = int(row['epoch'])
        except (ValueError, KeyError) as error:
            raise CommandError(f'line {number} of {path} is missing or damaged') from error
        rows = {earlier: values for earlier, values in rows.items() if earlier < epoch} | {epoch: row}
    return list(rows.values())


def read_results(path: Path, args: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, float]:
    """Read `top1` and `top5` of a checkpoint in percent from the `summary.csv` beside it; none if it was not validated.

    The checkpoint's own metric shows whether the file is of another run.
    """
    if (metric := checkpoint.get('metric')) is None:
        return {}
    summary, name = path.with_name('summary.csv'), f'eval_{args.get("eval_metric") or "top1"}'
    row = next((row for row in read_summary(summary) if row['epoch'] == checkpoint['epoch']), {})
    if not math.isclose(row.get(name, math.nan), metric, rel_tol=1e-6):
        raise CommandError(f'{summary} is of another run: its {name} is {row.get(name)}, not {metric}')
    return {key: row[f'eval_{key}'] for key in ('top1', 'top5') if f'eval_{key}' in row}


def data_config(args: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return what timm's `create_transform` needs to prepare images as train.py with these `args` did for validation.

    Where a network of grey images has three means, timm's loader takes their average, and so does this.
    """
    config = resolve_data_config(args, model=model)
    channels = config['input_size'][0]
    for name in ('mean', 'std'):
        if len(config[name]) != channels:
            config[name] = (np.mean(config[name]).item(),) * channels
    return config


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after comparing the archive's checksums.

    torch.load does not compare them, and for an entry that is marked as a folder it returns whatever is in memory.
    PyTorch compresses nothing, and an archive that unpacks to more than its size could fill the memory.
    """
    try:
        with zipfile.ZipFile(regular_file(path)) as archive:
            entries = archive.infolist()
            if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError('it is compressed, which PyTorch never does')
            if any(e.external_attr & 0x10 for e in entries) or len(set(archive.namelist())) < len(entries):
                raise ValueError('its directory is wrong')
            if wrong := archive.testzip():
                raise ValueError(f'the checksum of {wrong} is wrong')
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(checkpoint, dict) or not {'epoch', 'state_dict'} <= checkpoint.keys():
            raise ValueError('it has no `epoch` and `state_dict`')
        if not isinstance(checkpoint['epoch'], int):
            raise ValueError('its `epoch` is no whole number')
    except pickle.UnpicklingError as error:
        raise CommandError(f'{path} holds more than data; it is not loaded, since that could run any code') from error
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise CommandError(f'{path} is not a checkpoint of train.py, or is cut off or damaged: {error}') from error
    return checkpoint


def _checked(args: Any, path: Path) -> dict[str, Any]:
    """Return arguments that name a model and are no more as text than in the file: lists may share lists."""
    sizes = accumulate(map(len, json.JSONEncoder(default=id).iterencode(args)))
    if any(size > 1_000_000 for size in sizes) or not isinstance(args, dict) or not args.get('model'):
        raise CommandError(f'{path} does not hold the arguments of train.py: it names no model, or holds far more')
    return args


def _rebuild(args: dict[str, Any], state_dict: dict[str, torch.Tensor], path: Path) -> Any:
    """Build the network again and give it the weights, if they are complete, of its shapes, and finite.

    Names and shapes are compared here, since load_state_dict lets a network's own hooks fill in what is missing.
    """
    name, input_size = args['model'], args.get('input_size')
    if not name or ':' in name:
        advice = '--model NAME (for other weights --initial-checkpoint FILE)'
        raise CommandError(f'{path}: give the network by its name in timm, not as {name}: {advice}')
    kwargs = {key: args.get(key) for key in ('num_classes', 'bn_momentum', 'bn_eps')} | {'global_pool': args.get('gp')}
    kwargs |= {'pretrained': False, 'checkpoint_path': '', 'in_chans': args.get('in_chans') or (input_size or [3])[0]}
    model = timm.create_model(name, **kwargs, **(args.get('model_kwargs') or {}))
    # --split-bn trains further norms, for augmented images only.
    given = {key: tensor for key, tensor in clean_state_dict(state_dict).items() if '.aux_bn.' not in key}
    given_kinds, kinds = (  # what is copied loses imaginary parts and, to integers, fractions
        {(k, x.shape, x.is_floating_point()) for k, x in tensors.items()} for tensors in (given, model.state_dict())
    )
    if odd := sorted(given_kinds ^ kinds):
        raise CommandError(f'{path} does not fit {name} with {model.num_classes} classes: {odd[0][0]} differs')
    model.load_state_dict(given)
    if infinite := [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise CommandError(f'{path} has NaN or infinite numbers in {infinite[0]}: the training diverged')
    return model.eval()
