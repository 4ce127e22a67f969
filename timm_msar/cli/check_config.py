"""Check config files, since train.py silently accepts a wrong key or type, and sees a wrong name late."""

import argparse
import math
import reprlib
import runpy
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.data import resolve_data_config
from timm.optim import get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs
from torch import nn
from torch.optim import SGD

from .errors import YAML_ERRORS, CommandError, first_line, one_sentence
from .run_folder import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `timm-msar check-config`."""
    parser.add_argument('script', type=Path, metavar='TRAIN_PY', help="timm's train.py")
    parser.add_argument('configs', type=Path, nargs='+', metavar='CONFIG', help='YAML files for its --config')


def main(args: argparse.Namespace) -> None:
    """Check every file; the first fault is an error."""
    advice = "give the path of timm's train.py"
    with one_sentence(f'cannot read {args.script}', advice=advice):
        if not args.script.is_file():
            raise CommandError(f'there is no script {args.script}; {advice}')
    try:
        parser = runpy.run_path(str(args.script)).get('parser')
    except (Exception, SystemExit) as error:
        raise CommandError(f'{args.script} cannot be run ({first_line(error)}); {advice}') from error
    if not isinstance(parser, argparse.ArgumentParser):
        raise CommandError(f'{args.script} has no argument parser named parser; {advice}')
    for path in args.configs:
        check(path, parser)
        print(f'{path}: {args.script.name} takes every key, with a value of this type')


def check(path: Path, parser: argparse.ArgumentParser) -> None:
    """Raise CommandError where a file has a key or value that `parser` does not take, or a model that timm lacks."""
    with one_sentence(f'cannot read {path}', *YAML_ERRORS):
        text = read_text(path)
        config = yaml.safe_load(text)
        node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(config, dict) or not config:
        raise CommandError(f'{path} must hold one line `key: value` for each option of train.py')
    keys = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
    if repeated := [key for key, count in keys.items() if count > 1]:
        raise CommandError(f'{path} has the key {repeated[0]} twice, and train.py takes the last; delete one')
    actions = {action.dest: action for action in parser._actions}
    for key in unknown(config, parser):
        if key in actions:
            raise CommandError(f'{path}: {key} cannot be {reprlib.repr(config[key])}: {actions[key].help}')
        close = get_close_matches(str(key).replace('-', '_'), actions, n=1)
        hint = f'did you mean {close[0]}?' if close else 'its options are listed by train.py --help'
        raise CommandError(f'{path}: train.py has no option {reprlib.repr(key)}, {hint}')
    model = config.get('model')
    if model is not None and ':' not in model:
        if not timm.is_model(model.partition('.')[0]):
            close = get_close_matches(model, timm.list_models(), n=1)
            raise CommandError(f'{path}: timm has no model {model}{f", did you mean {close[0]}?" if close else ""}')
        try:
            network = timm.create_model(model, device='meta', **(config.get('model_kwargs') or {}))
            resolve_data_config(config, model=network)
        except Exception as error:  # timm has no common class for arguments that a model does not take
            raise CommandError(f'{path}: {model} does not take these arguments: {first_line(error)}') from error
    try:
        get_optimizer_info((config.get('opt') or 'sgd').lower().rpartition('_')[2])  # lookahead_sgd is sgd inside
        create_scheduler_v2(SGD(nn.Linear(1, 1).parameters(), lr=0.1), sched=config.get('sched') or 'none')
    except ValueError as error:
        raise CommandError(f'{path}: {first_line(error)}') from error


def unknown(config: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The keys that a train.py does not know, or not with such a value."""
    actions = {action.dest: action for action in parser._actions}
    return [key for key, value in config.items() if key not in actions or not _takes(actions[key], value)]


def _takes(action: argparse.Action, value: Any) -> bool:
    """Whether a value from a file is of the type that the option gives from the command line."""
    if value is None:  # timm's transforms take no colour jitter for none, but its option has a default
        return action.default is None or action.dest == 'color_jitter'
    if action.nargs == 0:
        return isinstance(value, bool)
    if isinstance(action, ParseKwargs):
        return isinstance(value, dict)
    if action.nargs not in (None, '?'):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            return False
        return all(_is_a(action.type, v, 0) for v in value)
    if isinstance(value, str) and callable(action.type):  # as argparse does it; to YAML 1e-3 is a string
        try:
            value = action.type(value)
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            return False
    least = -math.inf if action.dest == 'head_init_bias' else 0  # the only one that may be below 0
    return _is_a(action.type, value, least) and (action.choices is None or value in action.choices)


def _is_a(kind: Any, value: Any, least: float) -> bool:
    """Whether a value is of a type and, if it is a number, finite and no smaller than `least`."""
    allowed: Any = {float: (float, int), int: (int,), str: (str,), None: (str,)}.get(kind)
    if allowed is None:
        return True
    if isinstance(value, bool) or not isinstance(value, allowed):
        return False
    return kind in (str, None) or (math.isfinite(value) and value >= least)
