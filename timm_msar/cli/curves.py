"""Draw training loss and validation error of runs of train.py, averaged over seeds, and print their errors.

Runs are averaged where everything in their args.yaml is the same but the seed and what cannot change the result (names,
logging, workers …), and only over the epochs that all of them have reached. The band is one standard deviation (of the
sample: divided by n - 1) to both sides. An error is 100 - eval_top1, in percent.
"""

import argparse
import csv
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .errors import CommandError

COLUMNS = ('epoch', 'train_loss', 'eval_top1')
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
    loss: np.ndarray
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
    draw(groups, args.output)
    print(table(groups))
    print(f'drawn in {args.output}')


def read_runs(runs: Sequence[Path]) -> list[Curves]:
    """Read the runs and put the seeds of a configuration together, in the order in which they are given.

    Raises:
        CommandError: If a file of a run is missing or broken, or two runs are the same seed of one configuration.
    """
    settings: list[dict[str, Any]] = []
    members: list[dict[Any, Path]] = []
    for run in runs:
        arguments = _read_arguments(run)
        seed = arguments.get('seed')
        configuration = {key: value for key, value in arguments.items() if key not in IRRELEVANT}
        if configuration.get('data_dir'):  # the same data may lie elsewhere on another machine
            configuration['data_dir'] = Path(configuration['data_dir']).name
        if configuration not in settings:
            settings.append(configuration)
            members.append({})
        group = members[settings.index(configuration)]
        if seed in group:
            raise CommandError(
                f'{group[seed]} and {run} are the same configuration with the same seed {seed}, '
                'which says nothing about the spread; leave one of them out'
            )
        group[seed] = run
    return [
        _average(label, list(group.values()), configuration)
        for label, group, configuration in zip(_labels(settings), members, settings, strict=True)
    ]


def _read_arguments(run: Path) -> dict[str, Any]:
    path = run / 'args.yaml'
    if not run.is_dir():
        raise CommandError(f'there is no folder {run}; give the folders that train.py wrote its summary.csv into')
    try:
        arguments = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CommandError(f'cannot read {path} ({error.strerror}); is {run} the output folder of train.py?') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f'{path} is not YAML as train.py writes it') from error
    if not isinstance(arguments, dict) or not arguments.get('model'):
        raise CommandError(f'{path} names no model, so it is not from train.py')
    return arguments


def _labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Name a configuration by its model and, where this is not enough, by the arguments that differ."""
    labels = []
    for configuration in settings:
        same_model = [other for other in settings if other['model'] == configuration['model']]
        keys = sorted({key for other in same_model for key in other})
        differing = [key for key in keys if any(other.get(key) != same_model[0].get(key) for other in same_model)]
        details = ', '.join(f'{key}={configuration.get(key)}' for key in differing)
        labels.append(configuration['model'] + (f' ({details})' if details else ''))
    return labels


def _average(label: str, runs: Sequence[Path], configuration: dict[str, Any]) -> Curves:
    summaries = [read_summary(run / 'summary.csv') for run in runs]
    epochs = sorted(set.intersection(*(set(summary) for summary in summaries)))
    if not epochs:
        raise CommandError(f'the runs of {label} have no epoch in common: {", ".join(map(str, runs))}')
    values = np.array([[summary[epoch] for epoch in epochs] for summary in summaries])
    planned = configuration.get('epochs') or 0
    return Curves(label, np.array(epochs) + 1, values[:, :, 0], 100 - values[:, :, 1], planned)


def read_summary(path: Path) -> dict[int, tuple[float, float]]:
    """Read training loss and top-1 accuracy of each epoch from train.py's summary.csv.

    A run that was resumed writes its header again, and repeats the epochs since its checkpoint: the last one counts.

    Raises:
        CommandError: If the file is missing, truncated, without rows or a column, or holds something else than numbers.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise CommandError(
            f'cannot read {path} ({error.strerror}); train.py writes it after its first epoch'
        ) from error
    except UnicodeDecodeError as error:
        raise CommandError(f'{path} is not a text file as train.py writes it') from error
    lines = list(csv.reader(text.splitlines()))
    header = lines[0] if lines else []
    if missing := [column for column in COLUMNS if column not in header]:
        raise CommandError(f'{path} has no column {", ".join(missing)}; it must be the summary.csv of train.py')
    positions = [header.index(column) for column in COLUMNS]
    summary: dict[int, tuple[float, float]] = {}
    for number, row in enumerate(lines, 1):
        if row == header or not row:
            continue
        if len(row) != len(header) or (number == len(lines) and not text.endswith('\n')):
            raise CommandError(
                f'line {number} of {path} is truncated ({len(row)} of {len(header)} fields); '
                'delete this line, or wait where the run is still writing'
            )
        try:
            epoch, loss, top1 = (float(row[position]) for position in positions)
            epoch = int(epoch)
        except (ValueError, OverflowError) as error:
            raise CommandError(f'line {number} of {path} holds something else than numbers: {",".join(row)}') from error
        summary = {earlier: values for earlier, values in summary.items() if earlier < epoch}
        summary[epoch] = loss, top1
    if not summary:
        raise CommandError(f'{path} has no epoch yet; train.py adds a line after each')
    return summary


def table(groups: Sequence[Curves]) -> str:
    """Make the table of configuration, number of seeds, last and best error, and epochs."""
    rows = [('configuration', 'n', 'last error %', 'best error %', 'epochs')]
    for group in groups:
        epochs = str(group.epochs[-1])
        if group.epochs[-1] < group.planned_epochs:
            epochs += f' of {group.planned_epochs}'
        last, best = group.error[:, -1], group.error.min(axis=1)
        rows.append((group.label, str(len(group.error)), _mean_and_std(last), _mean_and_std(best), epochs))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _mean_and_std(values: np.ndarray) -> str:
    mean = f'{values.mean():.2f}'
    return f'{mean} ± {values.std(ddof=1):.2f}' if len(values) > 1 else mean  # one run has no spread


def draw(groups: Sequence[Curves], output: Path) -> None:
    """Draw loss and error of each group as a line with a band.

    Raises:
        CommandError: If matplotlib is missing or the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise CommandError('drawing needs matplotlib: pip install "timm-msar[demo]"') from error

    figure = Figure(figsize=(11, 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(axes, ('loss', 'error'), ('training loss', 'validation error (%)'), strict=True):
        for number, group in enumerate(groups):
            values, color = getattr(group, name), f'C{number}'
            mean = values.mean(axis=0)
            style = 'o' if len(group.epochs) == 1 else '-'
            axis.plot(group.epochs, mean, style, color=color, linewidth=1.2, label=f'{group.label}, n = {len(values)}')
            if len(values) > 1:
                std = values.std(axis=0, ddof=1)
                axis.fill_between(group.epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        # most of a run happens close to its end value: a logarithmic axis shows it without a second, enlarged picture
        axis.set_yscale('log')
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        axis.tick_params(axis='y', which='minor', labelsize=7)
        axis.set_xlabel('epoch')
        axis.set_title(title)
        axis.grid(which='both', alpha=0.25)
    axes[1].legend(loc='best', fontsize=8)

    aside = output.with_name(f'{output.name}.partial')
    try:
        figure.savefig(aside, format='png', dpi=150)
        aside.replace(output)
    except OSError as error:
        raise CommandError(f'cannot write {output} ({error.strerror})') from error
    finally:
        with suppress(OSError):
            aside.unlink()
