"""Draw losses and error of runs of train.py, averaged over seeds; print last and best values, and differences.

Runs are averaged where everything in their args.yaml is the same but the seed and what cannot change the result (names,
logging, workers …), and only over the epochs that all of them have reached. The band is the range of the runs. An error
is 100 - eval_top1, in percent, and ± is the standard deviation of the sample.

A difference of two configurations has the standard error √(s²/n + s'²/n') of independent runs. The same seed does not
pair them: networks with other weights leave the generator elsewhere, so that their images come in another order.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import CommandError, printable, say
from .files import written_whole
from .trained_run import read_arguments, read_summary

# arguments of train.py that may differ between runs of the same configuration
IRRELEVANT = {
    *('seed', 'experiment', 'output', 'resume', 'start_epoch', 'no_resume_opt', 'checkpoint_hist', 'recovery_interval'),
    *('log_interval', 'log_wandb', 'wandb_project', 'wandb_resume_id', 'wandb_tags', 'save_images', 'workers'),
    *('pin_mem', 'local_rank', 'device'),
}
COLUMNS = {'train_loss': 'training loss', 'eval_loss': 'validation loss', 'error': 'validation error (%)'}
DIGITS = {'error': 2, 'train_loss': 4, 'eval_loss': 4}  # in the tables


class Curves(NamedTuple):
    """The runs of one configuration: of each of `COLUMNS` an array with a row for a seed and a column for an epoch."""

    label: str
    epochs: np.ndarray
    values: dict[str, np.ndarray]
    planned_epochs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('runs', metavar='RUN_DIR', nargs='+', type=Path, help='folder with summary.csv and args.yaml')
    default = Path('curves.png')
    parser.add_argument('--output', metavar='PNG', type=Path, default=default, help='picture to write (%(default)s)')


def main(args: argparse.Namespace) -> None:
    """Write the picture and print the tables."""
    if args.output.suffix.lower() != '.png':
        raise CommandError(f'the picture is a PNG, so --output must end in .png, not {args.output}')
    groups = read_runs(args.runs)
    draw(groups, args.output)
    say(*table(groups), *differences(groups), '', f'drawn in {args.output}')


def read_runs(runs: Sequence[Path]) -> list[Curves]:
    """Read the runs and put the seeds of a configuration together, in the order in which they are given."""
    groups: dict[tuple[tuple[str, str], ...], dict[int, Path]] = {}
    for run in runs:
        arguments = read_arguments(run)
        seed = arguments.get('seed', 0)
        if arguments.get('data_dir'):  # the same data may lie elsewhere on another machine
            arguments['data_dir'] = Path(arguments['data_dir']).name
        setting = ((key, str(value).replace("'", '')) for key, value in arguments.items() if key not in IRRELEVANT)
        group = groups.setdefault(tuple(sorted(setting)), {})
        if seed in group:
            raise CommandError(f'{group[seed]} and {run} are the same configuration with the same seed {seed}')
        group[seed] = run
    settings = [dict(setting) for setting in groups]
    return [_together(setting, settings, list(group.values())) for setting, group in zip(settings, groups.values())]


def _together(setting: dict[str, str], settings: Sequence[dict[str, str]], runs: Sequence[Path]) -> Curves:
    """Read the runs of a setting. Name it by its model and, where this is not enough, by the arguments that differ."""
    same_model = [other for other in settings if other['model'] == setting['model']]
    differing = [key for key in setting if len({other.get(key) for other in same_model}) > 1]
    details = ', '.join(f'{key}={setting[key]}' for key in differing if setting[key] != '{}')
    label = printable(setting['model'] + (f' ({details})' if details else ''))
    summaries = [{row['epoch']: row for row in read_summary(run / 'summary.csv')} for run in runs]
    epochs = sorted(set.intersection(*map(set, summaries)))
    if not epochs or 'eval_top1' not in summaries[0][epochs[0]]:
        raise CommandError(f'the runs of {label} have no validated epoch in common')
    for row in (row for summary in summaries for row in summary.values()):
        row['error'] = 100 - row['eval_top1']
    values = {key: np.array([[summary[epoch][key] for epoch in epochs] for summary in summaries]) for key in COLUMNS}
    return Curves(label, np.array(epochs) + 1, values, int(setting['epochs']))


def table(groups: Sequence[Curves]) -> list[str]:
    """Make the table of configuration, number of seeds, last and best error, last losses, and epochs."""
    rows = [['configuration', 'n', 'last error %', 'best error %', 'training loss', 'validation loss', 'epochs']]
    for label, epochs, values, planned in groups:
        best = values['error'].min(axis=1)
        last = {column: _mean(values[column][:, -1], digits) for column, digits in DIGITS.items()}
        of = f' of {planned}' if epochs[-1] < planned else ''
        row = [label, str(len(best)), last['error'], _mean(best, 2), last['train_loss'], last['eval_loss']]
        rows.append([*row, f'{epochs[-1]}{of}'])
    return _aligned(rows)


def differences(groups: Sequence[Curves]) -> list[str]:
    """Make the table of differences after the last epoch, mean and standard error of independent runs.

    It has a row for each two configurations of two runs or more that have come to the same epoch.
    """
    rows = [['difference, mean ± standard error', 'n', 'error (points)', 'training loss', 'validation loss']]
    for first, second in combinations(groups, 2):
        n, m = len(first.values['error']), len(second.values['error'])
        if n > 1 < m and first.epochs[-1] == second.epochs[-1]:
            row = [f'{second.label} - {first.label}', f'{m}, {n}']
            for column, digits in DIGITS.items():
                theirs, ours = first.values[column][:, -1], second.values[column][:, -1]
                error = (ours.var(ddof=1) / m + theirs.var(ddof=1) / n) ** 0.5
                row.append(f'{ours.mean() - theirs.mean():+.{digits}f} ± {error:.{digits}f}')
            rows.append(row)
    return ['', *_aligned(rows)] if len(rows) > 1 else []


def _mean(x: np.ndarray, digits: int) -> str:
    return f'{x.mean():.{digits}f}' + (f' ± {x.std(ddof=1):.{digits}f}' if len(x) > 1 else '')


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]


def draw(groups: Sequence[Curves], output: Path) -> None:
    """Draw losses and error of each group as a line, the mean of the runs, in a band, their range."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(13, 4.4), layout='constrained')
    axes = figure.subplots(1, 3)
    for axis, (column, title) in zip(axes, COLUMNS.items()):
        for number, group in enumerate(groups):
            x, y, color = group.epochs, group.values[column], f'C{number}'
            label = f'{group.label}, n = {len(y)}'
            axis.plot(x, y.mean(axis=0), '.-', color=color, linewidth=1.2, markersize=2, label=label)
            axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.2, linewidth=0)
        low, high = (extreme([extreme(group.values[column]) for group in groups]) for extreme in (np.min, np.max))
        if 0 < 5 * low < high:  # most of a run happens close to its end value
            axis.set_yscale('log')
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high < 100 * low else (1, 3)))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.minorticks_off()
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel('epoch')
        axis.set_title(title)
        axis.grid(alpha=0.3)
    lines = axes[0].get_legend_handles_labels()
    heading = 'mean and range of n runs' if any(len(group.values['error']) > 1 for group in groups) else None
    figure.legend(*lines, loc='outside lower center', ncols=3, fontsize=8, title=heading)
    with written_whole(output) as aside:
        figure.savefig(aside, format='png', dpi=150)
