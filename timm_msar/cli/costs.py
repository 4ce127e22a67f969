"""Print parameters and multiply-adds of every network of the paper next to the paper's figures.

Multiply-adds are those of convolutions and linear layers for one image, the paper's "FLOPs". The paper rounds some of
its figures and cuts off others, even within one table, so a figure counts as equal when either gives it.
"""

import argparse
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm

from ..cifar_densenet import Transition
from .multiply_adds import multiply_adds

# Why figures differ from the paper's; a row names the reasons by their letters.
NOTES = {
    'a': "D' = D/L, as the paper's text says; its figures follow from the default D' = 3D/(8L)",
    'b': "0.487 M without the gates' batch norms, which the paper's figure seems to leave out",
    'c': 'the paper leaves out the transitions, as does the next line',
    'd': "the paper's parameters and its FLOPs do not belong to one network; ours gives its FLOPs",
    'e': "the plain nets have 11.69 M and 21.80 M parameters; the paper's +2.9 M and +5.6 M in the gates would cost "
    '19 M and 38 M multiply-adds, and its FLOPs leave room for 6 M and 16 M',
    'f': "3.86 G is ResNet-50's figure; ResNeXt-50 32x4d has 4.23 G",
}


@dataclass(frozen=True)
class Row:
    """A network in a table of the paper: how to create it, the paper's figures, and why ours differ if they do."""

    table: str
    model: str
    paper_macs: str
    paper_params: str = ''
    note: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    transitions: bool = True


def rows() -> list[Row]:
    """The rows of Tables 1, 2, 3 and 5 that give a cost."""
    listed = []
    for n, macs, params, msar_macs, msar_params, note in (
        (20, '40.8M', '0.27M', '40.9M', '0.28M', ''),
        (32, '69.1M', '0.46M', '69.3M', '0.48M', 'b'),
        (56, '125.7M', '0.85M', '126.0M', '0.89M', ''),
    ):
        listed += [
            Row('2, 3' if n == 56 else '1, 2', f'cifar_resnet{n}', macs, params),
            Row('2', f'cifar_resnet{n}_msar', msar_macs, msar_params, note),
            Row('2', f'cifar_resnet{n}_msar', msar_macs, msar_params, 'a', {'rd_ratio': 1.0}),
        ]
    for n, macs, params, msar_macs, msar_params in (
        (100, '252.5M', '0.80M', '253.3M', '0.99M'),
        (190, '7.95G', '25.8M', '7.98G', '32.7M'),
    ):
        for table, suffix, row_macs, row_params in (
            ('1, 2', '', macs, params),
            ('2', '_msar', msar_macs, msar_params),
        ):
            model = f'cifar_densenet{n}{suffix}'
            listed += [
                Row(table, model, row_macs, row_params, 'c, d'),
                Row(table, model, row_macs, row_params, 'd', transitions=False),
            ]
    for scales, resnet_macs, densenet_macs in (
        ((1,), '125.7M', '252.6M'),
        ((2,), '125.8M', '253.0M'),
        ((4,), '126.3M', '254.3M'),
        ((1, 2), '125.8M', '252.8M'),
        ((1, 4), '126.0M', '253.5M'),
        ((2, 4), '126.1M', '253.7M'),
        ((1, 2, 4), '126.0M', '253.3M'),
    ):
        listed += [
            Row('3', 'cifar_resnet56_msar', resnet_macs, model_args={'scales': scales}),
            Row('3', 'cifar_densenet100_msar', densenet_macs, '0.99M', 'd', {'scales': scales}, False),
        ]
    listed.append(Row('4.2', 'cifar_densenet100_msar', '', '0.80M', 'd', {'multi_level': False}, False))
    for name, plain, figures, note in (
        ('resnet18', 'resnet18', ('1.81G', '10.9M', '1.81G', '13.8M', '1.81G', '13.8M'), 'e'),
        ('resnet34', 'resnet34', ('3.66G', '21.7M', '3.66G', '27.3M', '3.67G', '27.4M'), 'e'),
        ('resnext50', 'resnext50_32x4d', ('3.86G', '25.0M', '3.87G', '27.5M', '3.89G', '27.6M'), 'f'),
    ):
        listed += [
            Row('4, 5', plain, figures[0], figures[1], note),
            Row('5', f'{name}_msar', figures[2], figures[3], note, {'scales': (1,)}),
            Row('5', f'{name}_msar', figures[4], figures[5], note),
        ]
        if note == 'e':
            listed.append(Row('5', f'{name}_msar', figures[4], figures[5], 'a, e', {'rd_ratio': 1.0}))
    return listed


UNITS = {'M': 1e6, 'G': 1e9}


def plain(name: str) -> str:
    """The name of the same network without gates."""
    return {'resnext50_msar': 'resnext50_32x4d'}.get(name, name.removesuffix('_msar'))


def agreement(value: int, figure: str) -> str:
    """How a figure of the paper such as '40.8M' follows from a count: '=', '= rounded', '= cut off', or '≠'."""
    number, unit = figure[:-1], UNITS[figure[-1]]
    steps = 10 ** len(number.partition('.')[2])
    scaled, wanted = value / unit * steps, round(float(number) * steps)
    rounded, cut_off = round(scaled) == wanted, math.floor(scaled) == wanted
    return '=' if rounded and cut_off else '= rounded' if rounded else '= cut off' if cut_off else '≠'


def _figure(value: int, unit: str) -> str:
    return f'{value / UNITS[unit]:.{4 if unit == "G" else 2}f} {unit}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no arguments."""


def main(args: argparse.Namespace) -> None:
    """Print a Markdown table of `rows()`, ours next to the paper's, and what the gates add in the default networks."""

    @cache
    def count(name: str, transitions: bool, **model_args: Any) -> tuple[int, int]:
        """Multiply-adds and parameters."""
        model = timm.create_model(name, **model_args)
        macs = multiply_adds(model, model.default_cfg['input_size'], () if transitions else Transition)
        return macs, sum(p.numel() for p in model.parameters())

    print('| Table | Network | Multiply-adds | paper | Parameters | paper | Note |')
    print('|---|---|--:|--:|--:|--:|---|')
    for row in rows():
        macs, params = count(row.model, row.transitions, **row.model_args)
        name = ', '.join([row.model, *(f'{k}={list(v) if k == "scales" else v}' for k, v in row.model_args.items())])
        cells = [row.table, name if row.transitions else f'{name}, without transitions']
        for value, figure in ((macs, row.paper_macs), (params, row.paper_params)):
            cells += [
                _figure(value, figure[-1] if figure else 'M'),
                f'{figure} {agreement(value, figure)}' if figure else '',
            ]
        print('|', ' | '.join([*cells, row.note if '≠' in ''.join(cells) else '']), '|')
    print()
    for letter, note in NOTES.items():
        print(f'- {letter}: {note}')
    print('\n| Network | Parameters | Multiply-adds without gates | with gates | more |\n|---|--:|--:|--:|--:|')
    of_the_paper = {row.model for row in rows() if row.model.endswith('_msar')}
    for name in sorted(of_the_paper | {'resnet50_msar'}):
        before, (after, params) = count(plain(name), True)[0], count(name, True)
        cells = [_figure(params, 'M'), _figure(before, 'M'), _figure(after, 'M'), f'{100 * (after / before - 1):.2f} %']
        print(f'| {name}{"" if name in of_the_paper else ", not in the paper"} |', ' | '.join(cells), '|')
