"""Read what train.py leaves in a run's folder: its arguments, `args.yaml`, and its results, `summary.csv`.

Types are checked here, once; the code that uses an argument or a result trusts them.
"""

import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import YAML_ERRORS, CommandError, one_sentence, refuse_special

TRAIN_PY = 'is this the output folder of train.py?'
MAX_SIZE = 4096  # pixels; larger images do not fit in memory as activations
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
COLUMNS = ('epoch', 'train_loss')
EVAL_COLUMNS = ('eval_loss', 'eval_top1', 'eval_top5')


class Kind(NamedTuple):
    """What an argument must be: in words, and as a test of a value."""

    words: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _are(value: Any, holds: Callable[[Any], bool], *counts: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) in counts and all(map(holds, value))


TEXT = Kind('a text of one line', lambda value: isinstance(value, str) and value.isprintable())
SWITCH = Kind('true or false', lambda value: isinstance(value, bool))
NUMBER = Kind('a number', _is_number)
WHOLE = Kind('a whole number', lambda value: _is_whole(value, 0, 2**63))
COUNT = Kind('a whole number of at least 1', lambda value: _is_whole(value, 1, 2**31))
SIZE = Kind(f'a whole number from 1 to {MAX_SIZE}', lambda value: _is_whole(value, 1, MAX_SIZE))
ARGUMENTS = {
    **dict.fromkeys(('model', 'opt', 'gp', 'eval_metric', 'experiment'), TEXT),
    **dict.fromkeys(('data', 'data_dir', 'dataset', 'train_split', 'val_split', 'class_map'), TEXT),
    **dict.fromkeys(('pretrained_path', 'initial_checkpoint'), TEXT),
    **dict.fromkeys(('pretrained', 'model_ema', 'model_ema_force_cpu', 'split_bn'), SWITCH),
    **dict.fromkeys(('lr', 'weight_decay', 'bn_momentum', 'bn_eps'), NUMBER),
    **dict.fromkeys(('epochs', 'seed'), WHOLE),
    'num_classes': Kind('a whole number up to 100,000', lambda value: _is_whole(value, 0, 100_000)),
    **dict.fromkeys(('batch_size', 'grad_accum_steps', 'world_size'), COUNT),
    **dict.fromkeys(('in_chans', 'img_size'), SIZE),
    'input_size': Kind(
        f'three whole numbers from 1 to {MAX_SIZE}: channels, height, width', lambda v: _are(v, SIZE.holds, 3)
    ),
    'mean': Kind('one number a channel', lambda v: _are(v, _is_number, *range(1, 17))),
    'std': Kind('one number above 0 a channel', lambda v: _are(v, lambda x: _is_number(x) and x > 0, *range(1, 17))),
    'crop_pct': Kind('a number from 0.1 to 1', lambda value: _is_number(value) and 0.1 <= value <= 1),
    'interpolation': Kind(
        'bilinear, bicubic or another of PIL', lambda value: isinstance(value, str) and value in ('', *INTERPOLATIONS)
    ),
    'crop_mode': Kind(
        'center, squash or border', lambda value: isinstance(value, str) and value in ('', 'center', 'squash', 'border')
    ),
    'model_kwargs': Kind(
        'a table of names and values', lambda value: isinstance(value, dict) and all(map(TEXT.holds, value))
    ),
}


def read_arguments(run: Path) -> dict[str, Any]:
    """Read the arguments that train.py wrote into a run's folder.

    Args:
        run: The folder with args.yaml.

    Returns:
        The arguments by their names; those in `ARGUMENTS` are None or of the type that is told there.

    Raises:
        CommandError: There is no such file, it is not YAML, it names no model, or a value is of another type.
    """
    path = run / 'args.yaml'
    with one_sentence(f'cannot read {path}', *YAML_ERRORS, advice=TRAIN_PY):
        return check_arguments(yaml.safe_load(read_text(path)), path)


def check_arguments(arguments: Any, where: Path) -> dict[str, Any]:
    """Return train.py's arguments, from wherever they were read, if each that is used here is of its type.

    Raises:
        CommandError: They are no table, name no model, or a value is of another type.
    """
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise CommandError(f'{where} does not hold arguments by their names; {TRAIN_PY}')
    for name, kind in ARGUMENTS.items():
        value = arguments.get(name)
        if value is not None and not kind.holds(value):
            raise CommandError(f'{where}: {name} must be {kind.words}, not {reprlib.repr(value)}')
    if not arguments.get('model'):
        raise CommandError(f'{where} names no model; {TRAIN_PY}')
    return arguments


def read_summary(path: Path) -> list[dict[str, float]]:
    """Read losses and accuracies of each epoch from train.py's summary.csv.

    A resumed run writes the header again, and repeats the epochs since its checkpoint: the last one counts.

    Args:
        path: The file.

    Returns:
        One row an epoch, in order: `epoch` (an int, from 0), `train_loss` and, where the run was validated,
        `eval_loss`, `eval_top1` and `eval_top5` (percent). A loss may be NaN, where training diverged.

    Raises:
        CommandError: There is no such file, it has no row, a row is cut off or holds something else than numbers, an
            accuracy is impossible, or the epochs are in disorder.
    """
    with one_sentence(f'cannot read {path}', advice='train.py writes it after each validation'):
        text = read_text(path)
    lines = text.split('\n')  # the file has no quotes: train.py writes numbers alone
    header = lines[0].rstrip('\r').split(',')
    validated = any(name in header for name in EVAL_COLUMNS)
    columns = COLUMNS + EVAL_COLUMNS if validated else COLUMNS
    if missing := [name for name in columns if header.count(name) != 1]:
        raise CommandError(f'{path} has no column {", ".join(missing)}; it must be the summary.csv of train.py')
    if lines.pop():
        raise CommandError(f'the last line of {path} is cut off; delete it, or wait where the run is still writing')
    rows: dict[int, dict[str, float]] = {}
    previous, step = -1, math.inf
    for number, line in enumerate(lines, 1):
        cells = line.rstrip('\r').split(',')
        if cells == header:  # of a run that starts or resumes
            previous, step = -1, math.inf
            continue
        if len(cells) != len(header):
            raise CommandError(f'line {number} of {path} has {len(cells)} fields, not {len(header)}; delete this line')
        try:
            row = {name: float(cells[header.index(name)]) for name in columns}
            epoch = row['epoch'] = int(cells[header.index('epoch')])
        except ValueError as error:
            raise CommandError(
                f'line {number} of {path} holds something else than numbers: {reprlib.repr(line)}'
            ) from error
        if epoch < 0 or (validated and not 0 <= row['eval_top1'] <= row['eval_top5'] <= 100):
            raise CommandError(f'line {number} of {path} holds a result that cannot be: {reprlib.repr(line)}')
        # Rows come at even steps (--val-interval), but for the last, and never go back.
        if epoch <= previous or epoch - previous > step:
            raise CommandError(f'line {number} of {path} has epoch {epoch} after {previous}; correct or delete it')
        previous, step = epoch, epoch - previous if previous >= 0 else math.inf
        rows = {earlier: values for earlier, values in rows.items() if earlier < epoch} | {epoch: row}
    if not rows:
        raise CommandError(f'{path} has no epoch yet; train.py adds a line after each validation')
    return list(rows.values())


def read_text(path: Path) -> str:
    refuse_special(path)
    return path.read_text(encoding='utf-8')
