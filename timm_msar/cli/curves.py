"""Draw losses and error of runs of train.py, averaged over seeds; print last and best values, and differences.

Runs are averaged where everything in their args.yaml is the same but the seed and what cannot change the result (names,
logging, workers …), and only over the epochs that all of them have reached. The band is one standard deviation (of the
sample: divided by n - 1) to both sides. An error is 100 - eval_top1, in percent.

A difference of two configurations has the standard error √(s²/n + s'²/n') of independent runs. The same seed does not
pair them: networks with other weights leave the generator elsewhere, so that their images come in another order.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .errors import CommandError, one_sentence
from .run_folder import read_arguments, read_summary
from .written_aside import written_aside

# arguments of train.py that may differ between runs of the same configuration
IRRELEVANT = {
    *('seed', 'experiment', 'output', 'resume', 'start_epoch', 'no_resume_opt', 'checkpoint_hist', 'recovery_interval'),
    *('log_interval', 'log_wandb', 'wandb_project', 'wandb_resume_id', 'wandb_tags', 'save_images', 'workers'),
    *('pin_mem', 'local_rank', 'device'),
}


@dataclass
class Curves:
    """The runs of one configuration: one row per seed, one column per epoch."""

    label: str
    epochs: np.ndarray
    training_loss: np.ndarray
    validation_loss: np.ndarray
    error: np.ndarray
    planned_epochs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-msar curves`."""
    parser.add_argument('runs', metavar='RUN_DIR', nargs='+', type=Path, help='folder with summary.csv and args.yaml')
    parser.add_argument(
        '--output', metavar='PNG', type=Path, default=Path('curves.png'), help='picture to write (default: %(default)s)'
    )


def main(args: argparse.Namespace) -> None:
    """Write the picture and print the table.

    Raises:
        CommandError: If a run cannot be read or the picture cannot be written.
    """
    if args.output.suffix.lower() != '.png':
        raise CommandError(f'the picture is a PNG, so --output must end in .png, not {args.output}')
    groups = read_runs(args.runs)
    with one_sentence(f'cannot write {args.output}'):
        if args.output.is_dir():
            raise CommandError(f'--output {args.output} is a folder; give the name of a picture')
        draw(groups, args.output)
    print(table(groups))
    if pairs := differences(groups):
        print(f'\n{pairs}\n')
    print(f'drawn in {args.output}')


def read_runs(runs: Sequence[Path]) -> list[Curves]:
    """Read the runs and put the seeds of a configuration together, in the order in which they are given.

    Raises:
        CommandError: If a file of a run is missing or broken, a run was not validated, or two runs are the same seed of
            one configuration.
    """
    settings: list[dict[str, str]] = []
    members: list[dict[Any, Path]] = []
    planned: list[int] = []
    for run in runs:
        arguments = read_arguments(run)
        if arguments.get('data_dir'):  # the same data may lie elsewhere on another machine
            arguments['data_dir'] = Path(arguments['data_dir']).name
        configuration = {key: _in_words(value) for key, value in arguments.items() if key not in IRRELEVANT}
        if configuration not in settings:
            settings.append(configuration)
            members.append({})
            planned.append(arguments.get('epochs') or 0)
        group, seed = members[settings.index(configuration)], arguments.get('seed')
        if seed in group:
            raise CommandError(
                f'{group[seed]} and {run} are the same configuration with the same seed {seed}, '
                'which says nothing about the spread; leave one of them out'
            )
        group[seed] = run
    return [
        _together(label, list(group.values()), epochs)
        for label, group, epochs in zip(_labels(settings), members, planned, strict=True)
    ]


def _in_words(value: Any) -> str:
    """A value as in a line of YAML, which is short where a value holds another one many times, or itself."""
    return ' '.join(yaml.safe_dump(value, default_flow_style=True).split()).removesuffix(' ...')


def _labels(settings: Sequence[dict[str, str]]) -> list[str]:
    """Name a configuration by its model and, where this is not enough, by the arguments that differ."""
    labels = []
    for configuration in settings:
        same_model = [other for other in settings if other['model'] == configuration['model']]
        keys = sorted({key for other in same_model for key in other})
        differing = [key for key in keys if any(other.get(key) != same_model[0].get(key) for other in same_model)]
        details = ', '.join(f'{key}={configuration.get(key)}' for key in differing if configuration.get(key) != '{}')
        labels.append(configuration['model'] + (f' ({details})' if details else ''))
    return labels


def _together(label: str, runs: Sequence[Path], planned_epochs: int) -> Curves:
    summaries = [{row['epoch']: row for row in read_summary(run / 'summary.csv')} for run in runs]
    epochs = sorted(set.intersection(*map(set, summaries)))
    if not epochs:
        raise CommandError(f'the runs of {label} have no epoch in common: {", ".join(map(str, runs))}')

    def values(column: str) -> np.ndarray:
        try:
            return np.array([[summary[epoch][column] for epoch in epochs] for summary in summaries])
        except KeyError as error:
            raise CommandError(f'a run of {label} was not validated, so it has no error to draw') from error

    losses = values('train_loss'), values('eval_loss')
    return Curves(label, np.array(epochs) + 1, *losses, 100 - values('eval_top1'), planned_epochs)


def table(groups: Sequence[Curves]) -> str:
    """Make the table of configuration, number of seeds, last and best error, last losses, and epochs."""
    header = 'configuration', 'n', 'last error %', 'best error %', 'training loss', 'validation loss', 'epochs'
    rows: list[tuple[str, ...]] = [header]
    for group in groups:
        last, of = group.epochs[-1], group.planned_epochs
        values = group.error[:, -1], group.error.min(axis=1), group.training_loss[:, -1], group.validation_loss[:, -1]
        cells = [_mean_and_std(value, digits) for value, digits in zip(values, (2, 2, 4, 4), strict=True)]
        rows.append((group.label, str(len(group.error)), *cells, f'{last} of {of}' if last < of else f'{last}'))
    return _aligned(rows)


def differences(groups: Sequence[Curves]) -> str:
    """Make the table of differences after the last epoch, mean and standard error of independent runs.

    It has a row for each two configurations of two runs or more that have ended after the same number of epochs.
    """
    rows: list[tuple[str, ...]] = [
        ('difference, mean ± standard error', 'n', 'error (points)', 'training loss', 'validation loss')
    ]
    ended = [group for group in groups if len(group.error) > 1 and group.epochs[-1] >= group.planned_epochs]
    for first, second in combinations(ended, 2):
        if first.epochs[-1] != second.epochs[-1]:
            continue
        cells = []
        for column, digits in (('error', 2), ('training_loss', 4), ('validation_loss', 4)):
            ours, theirs = getattr(second, column)[:, -1], getattr(first, column)[:, -1]
            error = (ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs)) ** 0.5
            cells.append(f'{ours.mean() - theirs.mean():+.{digits}f} ± {error:.{digits}f}')
        number = f'{len(second.error)}, {len(first.error)}'
        rows.append((f'{second.label} - {first.label}', number, *cells))
    return _aligned(rows) if len(rows) > 1 else ''


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _mean_and_std(values: np.ndarray, digits: int) -> str:
    mean = f'{values.mean():.{digits}f}'
    return f'{mean} ± {values.std(ddof=1):.{digits}f}' if len(values) > 1 else mean  # one run has no spread


def draw(groups: Sequence[Curves], output: Path) -> None:
    """Draw losses and error of each group as a line with a band.

    Raises:
        CommandError: If matplotlib is missing.
        OSError: If the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise CommandError('drawing needs matplotlib: pip install "timm-msar[demo]"') from error

    figure = Figure(figsize=(15, 4.5), layout='constrained')
    axes = figure.subplots(1, 3)
    panels = {
        'training loss': [group.training_loss for group in groups],
        'validation loss': [group.validation_loss for group in groups],
        'validation error (%)': [group.error for group in groups],
    }
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        for number, (group, values) in enumerate(zip(groups, panel, strict=True)):
            color = f'C{number}'
            mean = values.mean(axis=0)
            style = 'o' if len(group.epochs) == 1 else '-'
            axis.plot(group.epochs, mean, style, color=color, linewidth=1.2, label=f'{group.label}, n = {len(values)}')
            if len(values) > 1:
                std = values.std(axis=0, ddof=1)
                axis.fill_between(group.epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        # Most of a run happens close to its end value: a logarithmic axis, which has no 0, shows it without a second,
        # enlarged picture.
        axis.set_yscale('log' if all((values > 0).all() for values in panel) else 'linear')
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        axis.tick_params(axis='y', which='minor', labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel('epoch')
        axis.set_title(title)
        axis.grid(which='both', alpha=0.25)
    for text in axes[-1].legend(loc='best', fontsize=8).get_texts():
        text.set_parse_math(False)
    with written_aside(output) as aside:
        figure.savefig(aside, format='png', dpi=150)
