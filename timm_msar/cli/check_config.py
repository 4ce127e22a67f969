"""Check config files, since train.py silently accepts a wrong key or type, and sees a wrong name late."""

import argparse
import runpy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.optim import get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs
from torch import nn
from torch.optim import SGD

from .errors import CommandError, first_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `timm-msar check-config`."""
    parser.add_argument('script', type=Path, metavar='TRAIN_PY', help="timm's train.py")
    parser.add_argument('configs', type=Path, nargs='+', metavar='CONFIG', help='YAML files for its --config')


def main(args: argparse.Namespace) -> None:
    """Check every file; the first fault is an error."""
    if not args.script.is_file():
        raise CommandError(f"There is no script {args.script}: pass the path of timm's train.py.")
    try:
        parser = runpy.run_path(str(args.script)).get('parser')
    except (Exception, SystemExit) as error:
        raise CommandError(f"{args.script} cannot be read ({error}): pass the path of timm's train.py.") from error
    if not isinstance(parser, argparse.ArgumentParser):
        raise CommandError(f"{args.script} has no argument parser named parser: pass timm's train.py.")
    for path in args.configs:
        check(path, parser)
        print(f'{path}: {args.script.name} takes every key, with a value of this type')


def check(path: Path, parser: argparse.ArgumentParser) -> None:
    """Raise CommandError where a file has a key or value that `parser` does not take, or a model that timm lacks."""
    try:
        config = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f'{path} cannot be read as YAML: {" ".join(str(error).split())}') from error
    if not isinstance(config, dict):
        raise CommandError(f'{path} must hold one line `key: value` an option of train.py.')
    actions = {action.dest: action for action in parser._actions}
    for key in unknown(config, parser):
        if key in actions:
            raise CommandError(f'{path}: {key} cannot be {config[key]!r}: {actions[key].help}.')
        close = get_close_matches(str(key).replace('-', '_'), actions, n=1)
        hint = f'did you mean {close[0]}?' if close else 'its options are listed by train.py --help.'
        raise CommandError(f'{path}: train.py has no option {key}, {hint}')
    model = config.get('model')
    if model is not None and ':' not in model:
        if not timm.is_model(model.partition('.')[0]):
            close = get_close_matches(model, timm.list_models(), n=1)
            raise CommandError(f'{path}: timm has no model {model}{f", did you mean {close[0]}?" if close else "."}')
        try:
            timm.create_model(model, device='meta', **config.get('model_kwargs', {}))
        except Exception as error:  # timm has no common class for arguments that a model does not take
            raise CommandError(f'{path}: {model} cannot be made: {first_line(error)}') from error
    try:
        get_optimizer_info((config.get('opt') or 'sgd').lower().rpartition('_')[2])  # lookahead_sgd is sgd inside
        create_scheduler_v2(SGD(nn.Linear(1, 1).parameters(), lr=0.1), sched=config.get('sched') or 'none')
    except ValueError as error:
        raise CommandError(f'{path}: {error}') from error


def unknown(config: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The keys that a train.py does not know, or not with such a value."""
    actions = {action.dest: action for action in parser._actions}
    return [key for key, value in config.items() if key not in actions or not _takes(actions[key], value)]


def _takes(action: argparse.Action, value: Any) -> bool:
    """Whether a value from a file is of the type that the option gives from the command line."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    if isinstance(action, ParseKwargs):
        return isinstance(value, dict)
    if action.nargs not in (None, '?'):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            return False
        return all(_is_a(action.type, v) for v in value)
    if isinstance(value, str) and callable(action.type):  # as argparse does it; to YAML 1e-3 is a string
        try:
            value = action.type(value)
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            return False
    return _is_a(action.type, value) and (action.choices is None or value in action.choices)


def _is_a(kind: Any, value: Any) -> bool:
    allowed = {float: (float, int), int: (int,), str: (str,), None: (str,)}.get(kind)
    return allowed is None or (isinstance(value, allowed) and not isinstance(value, bool))
