"""Read a checkpoint of timm's train.py without trusting it, and rebuild the network that it holds.

A checkpoint is a zip file that contains a pickle, and a pickle can run any code. So it is read with
`weights_only=True`: tensors, numbers, strings, containers, and one class besides, `argparse.Namespace`, in which
train.py keeps its arguments. That class only stores attributes: it has no `__setstate__` and no `__reduce__`, so
making one runs no code, whatever the file says. Anything else in the file is refused.

torch.load does not compare the checksums in the zip file, and where a flipped bit makes an entry a folder it returns
whatever is in memory: other weights without a word. So Python's zipfile, which compares them, reads the file, and
torch.load gets what it read.
"""

import argparse
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn

from .errors import CommandError, first_line, one_sentence, refuse_special
from .run_folder import check_arguments, read_arguments, read_summary


class Trained(NamedTuple):
    """A trained network and what is known about its training."""

    model: Any  # timm's networks have attributes that nn.Module does not declare
    args: dict[str, Any]  # train.py's arguments
    epoch: int
    ema: bool  # whether the weights are the exponential moving average
    results: dict[str, float]  # what validation measured on these very weights: top1, top5, loss


def load_trained(path: Path, ema: str = 'auto') -> Trained:
    """Read a checkpoint, the `args.yaml` (if the checkpoint has no arguments in it) and the `summary.csv` beside it.

    Which weights are the better ones is known only for those that train.py validated: with an EMA it validates the
    EMA alone, unless `--model-ema-force-cpu`, where it validates the plain weights. 'auto' takes the validated ones.

    Args:
        path: `model_best.pth.tar`, `last.pth.tar` or `checkpoint-EPOCH.pth.tar`.
        ema: 'auto', or 'yes' or 'no' to decide; results of the other weights are then left out.

    Raises:
        CommandError: If the files do not hold one complete, finite network and the results of its validation.
    """
    checkpoint = read_checkpoint(path)
    args = _arguments(checkpoint, path)
    state_dict, use_ema, validated_ema = _weights(checkpoint, args, path, ema)
    results = _results(checkpoint, args, path)
    model = _rebuild(args, state_dict, path)
    return Trained(model, args, checkpoint['epoch'], use_ema, results if use_ema == validated_ema else {})


def load_network(path: Path, name: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Rebuild a network from a checkpoint, validated or not, or from a safetensors file, which holds its weights only.

    Args:
        path: A checkpoint of train.py, or a file that ends in .safetensors.
        name: The network's name; None for the one that a checkpoint of train.py names.

    Returns:
        The network in evaluation mode, and train.py's arguments, {'model': name} for a safetensors file.

    Raises:
        CommandError: The file cannot be read, or does not hold the complete, finite weights of this network.
    """
    if path.suffix == '.safetensors':
        if name is None:
            raise CommandError(f'{path} does not say of which network it is; give --model NAME')
        with one_sentence(f'cannot read {path}', SafetensorError):
            refuse_special(path)
            return _rebuild({'model': name}, load_file(path), path), {'model': name}
    checkpoint = read_checkpoint(path)
    args = _arguments(checkpoint, path)
    if name and args['model'].partition('.')[0] != name.partition('.')[0]:
        raise CommandError(f'{path} is a checkpoint of {args["model"]}, not of {name}')
    return _rebuild(args, _weights(checkpoint, args, path, 'auto')[0], path), args


def _weights(checkpoint: dict[str, Any], args: dict[str, Any], path: Path, ema: str) -> tuple[Any, bool, bool]:
    """The weights asked for, whether they are the EMA, and whether the EMA is what train.py validated."""
    validated_ema = 'state_dict_ema' in checkpoint and not args.get('model_ema_force_cpu')
    use_ema = validated_ema if ema == 'auto' else ema == 'yes'
    key = 'state_dict_ema' if use_ema else 'state_dict'
    if key not in checkpoint:
        raise CommandError(
            f'{path} has no EMA weights; train with --model-ema, or leave out --ema yes'
            if use_ema
            else f'{path} has no `state_dict`, so it is not a checkpoint of train.py'
        )
    return checkpoint[key], use_ema, validated_ema


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file after comparing its checksums.

    Raises:
        CommandError: If the file is missing, damaged, holds anything but data, or is no checkpoint of train.py.
    """
    advice = 'give the model_best.pth.tar or last.pth.tar of train.py'
    with one_sentence(f'cannot read {path}', zipfile.BadZipFile, advice=advice):
        refuse_special(path)
        with path.open('rb') as file:
            is_zip = zipfile.is_zipfile(file)
    if not is_zip:
        raise CommandError(
            f'{path} is not a checkpoint, or is cut off: train.py writes a zip file, and this is not one'
        )
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, 'w') as whole:
            for name in dict.fromkeys(archive.namelist()):  # a flipped bit may name an entry as another
                whole.writestr(name, archive.read(name))
        copy.seek(0)
    except Exception as error:  # a damaged zip file makes zipfile raise errors of many kinds
        raise CommandError(f'{path} is damaged ({first_line(error)}); copy or train it again') from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(copy, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CommandError(
            f'{path} holds {_unsafe_names(path)} and is not loaded, since that could run any code; '
            'a checkpoint of train.py holds only tensors, numbers and its arguments'
        ) from error
    except Exception as error:  # the file is a zip file, and can hold anything
        raise CommandError(f'{path} is not a checkpoint of train.py ({first_line(error)})') from error
    if not isinstance(checkpoint, dict) or type(checkpoint.get('epoch')) is not int:
        raise CommandError(f'{path} is not a checkpoint of train.py: it has no `epoch` and `state_dict`')
    return checkpoint


def _unsafe_names(path: Path) -> str:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # what could not be loaded need not be readable for this either
        names = []
    return f'Python objects ({", ".join(sorted(names))})' if names else 'something else than data'


def _arguments(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The arguments as train.py used them are in the checkpoint; a cleaned checkpoint may have lost them."""
    args = checkpoint.get('args')
    if isinstance(args, argparse.Namespace):
        return check_arguments(vars(args), path)
    try:
        return read_arguments(path.parent)
    except CommandError as error:
        raise CommandError(f'{path} does not hold the arguments of its training, and {error}') from error


def _rebuild(args: dict[str, Any], state_dict: Any, path: Path) -> nn.Module:
    """Make the network again and give it the weights, if they are complete, of its shapes, and finite."""
    input_size = args.get('input_size')
    in_chans = args.get('in_chans') or (input_size[0] if input_size else 3)
    try:
        model = timm.create_model(
            args['model'],
            pretrained=False,
            checkpoint_path='',
            num_classes=args.get('num_classes'),
            in_chans=in_chans,
            global_pool=args.get('gp'),
            bn_momentum=args.get('bn_momentum'),
            bn_eps=args.get('bn_eps'),
            **(args.get('model_kwargs') or {}),
        )
    except Exception as error:  # timm has no common class for arguments that a model does not take
        raise CommandError(f'the network of {path} cannot be built again: {first_line(error)}') from error
    # A file can hold tensors that PyTorch makes and then can do nothing with.
    with one_sentence(f'the weights in {path} cannot be used', RuntimeError, TypeError):
        if not isinstance(state_dict, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()
        ):
            raise CommandError(f'{path} is not a checkpoint of train.py: its weights are not a table of tensors')
        state_dict = clean_state_dict(state_dict)
        if args.get('split_bn'):  # the statistics of further augmentations, which only training uses
            state_dict = {name: value for name, value in state_dict.items() if '.aux_bn.' not in name}
        _check_weights(model, state_dict, args['model'], path)
        model.load_state_dict(state_dict)
    return model.eval()


def _check_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], name: str, path: Path) -> None:
    """Compare names and shapes, since load_state_dict alone would let a network's own hooks fill in what is missing.

    Shapes come before values: a file of a few bytes can hold a tensor of terabytes, one element expanded.
    """
    message, wanted = f'the weights in {path} are not those of {name}', model.state_dict()
    for problem, keys in (
        ('missing', [key for key in wanted if key not in state_dict]),
        ('not in the network', [key for key in state_dict if key not in wanted]),
    ):
        if keys:
            raise CommandError(f'{message}: {len(keys)} tensors are {problem}, the first is {keys[0]}')
    for key, own in wanted.items():
        tensor = state_dict[key]
        if tensor.shape != own.shape:
            raise CommandError(
                f'{message} with {getattr(model, "num_classes", "its")} classes: '
                f'{key} is {tuple(tensor.shape)}, not {tuple(own.shape)}'
            )
        if (tensor.layout, tensor.device.type, tensor.is_quantized) != (torch.strided, 'cpu', False) or (
            tensor.is_complex() or tensor.is_floating_point() != own.is_floating_point()
        ):
            raise CommandError(f'{message}: {key} is a tensor of {tensor.dtype}, {tensor.layout}, {tensor.device}')
        if not tensor.to(own.dtype).isfinite().all():
            raise CommandError(f'{path} has NaN or infinite numbers in {key}: the training diverged')


def _results(checkpoint: dict[str, Any], args: dict[str, Any], path: Path) -> dict[str, float]:
    """What validation measured in this epoch; the checkpoint's own metric shows that the summary is of the same run."""
    summary, epoch, name = path.with_name('summary.csv'), checkpoint['epoch'], args.get('eval_metric') or 'top1'
    metric = checkpoint.get('metric')
    if not isinstance(metric, (int, float)):
        raise CommandError(f'{path} was never validated (a recovery checkpoint?); give model_best or last.pth.tar')
    row = next((row for row in read_summary(summary) if row['epoch'] == epoch), {})
    results = {key: row[f'eval_{key}'] for key in ('top1', 'top5', 'loss') if f'eval_{key}' in row}
    if name not in results:
        raise CommandError(f'{summary} has no eval_{name} for epoch {epoch}, so there is no result to publish')
    if infinite := [key for key, value in results.items() if not math.isfinite(value)]:
        raise CommandError(f'{summary} has eval_{infinite[0]} {results[infinite[0]]} for epoch {epoch}: it diverged')
    if not math.isclose(results[name], metric, rel_tol=1e-6):
        raise CommandError(
            f'{summary} is of another run: it has eval_{name} {results[name]} for epoch {epoch}, '
            f'and the checkpoint {metric}'
        )
    return results
