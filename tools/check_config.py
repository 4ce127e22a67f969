"""Check config files of train.py, which accepts a misspelt key or a value of another type without a word.

python tools/check_config.py TRAIN_PY CONFIG [CONFIG ...]
"""

import argparse
import runpy
import sys
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


def faults(text: str, parser: argparse.ArgumentParser) -> list[str]:
    """What is wrong with a config file, for the parser of a train.py."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    config = yaml.safe_load(text)
    if not isinstance(config, dict):
        return ['it must have a line `key: value` for each option']
    keys = Counter(key.value for key, _ in node.value)
    twice = [f'{key} stands there twice, and the last one counts' for key in keys if keys[key] > 1]
    return twice + [f'{key}: {fault}' for key, value in config.items() if (fault := _fault(key, value, parser))]


def _fault(key: Any, value: Any, parser: argparse.ArgumentParser) -> str | None:
    """What is wrong with an entry: the parser takes it as it would from the command line, or gives another value."""
    actions = {action.dest: action for action in parser._actions}
    if key not in actions:
        close = get_close_matches(str(key).replace('-', '_'), actions, n=1)
        return f'train.py has no such option{f", did you mean {close[0]}?" if close else ""}'
    action = actions[key]
    option = action.option_strings[-1]
    if value is None:  # not given; timm's transforms take it for no colour jitter, although its option has a default
        return None if action.default is None or key == 'color_jitter' else 'it must have a value'
    if action.nargs == 0:
        return None if isinstance(value, bool) else 'it must be true or false'
    words = [f'{option}={value}']
    if isinstance(value, list):
        words = [option, *map(str, value)]
    elif isinstance(value, dict):
        words = [option, *(f'{name}={argument}' for name, argument in value.items())]
    try:
        parsed = getattr(parser.parse_args(words), key)
    except (argparse.ArgumentError, ValueError, SystemExit) as error:
        return str(error)
    return None if isinstance(value, str) or parsed == value else f'it must be like {parsed!r}, not {value!r}'


def main() -> int:
    """Print what is wrong with each file. Return 1 if anything is."""
    arguments = argparse.ArgumentParser(description='Check config files of train.py.')
    arguments.add_argument('script', type=Path, metavar='TRAIN_PY', help="timm's train.py")
    arguments.add_argument('configs', type=Path, nargs='+', metavar='CONFIG', help='YAML files for its --config')
    args = arguments.parse_args()
    parser = runpy.run_path(str(args.script))['parser']
    parser.exit_on_error = False
    found = {path: faults(path.read_text(encoding='utf-8'), parser) for path in args.configs}
    for path in args.configs:
        for line in found[path] or ['train.py takes every key, with a value of this type']:
            print(f'{path}: {line}')
    return int(any(found.values()))


if __name__ == '__main__':
    sys.exit(main())
