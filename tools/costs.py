"""Print parameters and multiply-adds of every network of the paper next to the paper's figures.

python tools/costs.py

The paper rounds some of its figures and cuts off others, even within one table. So `=` means that either gives it.
"""

import csv
import math
from ast import literal_eval
from functools import cache
from pathlib import Path

import timm
from tqdm import tqdm

from timm_msar.cifar_densenet import Transition
from timm_msar.cli.multiply_adds import multiply_adds
from timm_msar.cli.speed import NETWORKS

NOTES = {
    'a': 'a misprint: Tables 2 and 3 give 125.7M, as we count',
    'b': 'the paper does not count the transitions, and neither does this line',
    'c': "0.487 M without the gates' batch norms, which the paper's figure seems to leave out",
    'd': "the paper's parameters and its FLOPs do not belong to one network; ours gives its FLOPs",
    'e': "3.86 G is ResNet-50's figure; ResNeXt-50 32x4d has 4.23 G",
    'f': "the paper's +2.9 M and +5.6 M parameters in the gates would cost 19 M and 38 M multiply-adds, "
    'and its FLOPs leave room for 6 M and 16 M',
    'g': "D' = D/L, as the paper's text says; its figures follow from our default D' = 3D/(8L)",
}
UNITS = {'M': 1e6, 'G': 1e9}


def agreement(value: int, figure: str) -> str:
    """How a figure of the paper such as '40.8M' follows from a count: '=', '= rounded', '= cut off', or '≠'."""
    steps = 10 ** len(figure.partition('.')[2][:-1])
    scaled, wanted = value / UNITS[figure[-1]] * steps, round(float(figure[:-1]) * steps)
    rounded, cut_off = round(scaled) == wanted, math.floor(scaled) == wanted
    return '=' if rounded and cut_off else '= rounded' if rounded else '= cut off' if cut_off else '≠'


@cache
def count(name: str, arguments: str = '', transitions: bool = True) -> tuple[int, int]:
    """Multiply-adds and parameters of a network with an argument such as 'scales=[1,4]'."""
    key, _, value = arguments.partition('=')
    model = timm.create_model(name, **({key: literal_eval(value)} if key else {}))
    macs = multiply_adds(model, model.default_cfg['input_size'], () if transitions else Transition)
    return macs, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Print a Markdown table of ours next to the paper's figures, and one of what the gates add in each network."""
    lines = ['| Table | Network | Multiply-adds | paper | Parameters | paper | Note |', '|---|---|--:|--:|--:|--:|---|']
    paper = (Path(__file__).parent / 'paper_costs.csv').read_text().splitlines()  # line by line as it prints them
    for row in tqdm(list(csv.DictReader(paper)), unit=' networks', disable=None):
        macs, params = count(row['network'], row['arguments'], 'densenet' not in row['network'])
        cells = [row['table'], ', '.join(filter(None, (row['network'], row['arguments'])))]
        for value, figure in (macs, row['macs']), (params, row['params']):
            cells.append(f'{value / 1e9:.4f} G' if figure.endswith('G') else f'{value / 1e6:.2f} M')
            cells.append(f'{figure} {agreement(value, figure)}' if figure else '')
        lines.append(f'| {" | ".join([*cells, row["notes"]])} |')
    lines += ['', *(f'- {letter}: {note}' for letter, note in NOTES.items()), '']
    lines += ['| Network | Parameters | Multiply-adds without gates | with gates | more |', '|---|--:|--:|--:|--:|']
    for name in timm.list_models('*_msar'):
        plain = NETWORKS.get(name, name.removesuffix('_msar'))
        before, (after, params) = count(plain)[0], count(name)
        millions = ' | '.join(f'{value / 1e6:.2f} M' for value in (params, before, after))
        lines.append(f'| {name} | {millions} | {100 * (after / before - 1):.2f} % |')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
