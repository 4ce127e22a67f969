"""Counts against the figures that follow from the paper, to the last digit, and against the paper's own."""

import re
import runpy
from pathlib import Path

import pytest
import slow_reference
import torch

from timm_msar import MultiScaleRecalibration
from timm_msar.cli.multiply_adds import multiply_adds

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
@pytest.mark.parametrize('size', [(2, 3), (7, 5)], ids=str)
def test_counted_by_hand(size, strategy):
    """A 3×3 convolution in 2 groups, gates with D' = 2 of each region that the paper's loops find, a linear layer."""
    conv, layer = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2), MultiScaleRecalibration(6, strategy=strategy)
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5)
    regions = sum(len(slow_reference.coordinate_sets(*size, k, strategy)[0]) for k in (1, 2, 4))
    expected = 6 * 2 * 9 * size[0] * size[1] + 2 * (6 + 6) * regions + 6 * 5
    assert multiply_adds(torch.nn.Sequential(conv, layer, *head), (4, *size)) == expected


def test_the_table_explains_every_difference_and_stands_in_the_docs(capsys):
    costs = runpy.run_path(str(ROOT / 'tools' / 'costs.py'))
    costs['main']()
    printed = capsys.readouterr().out
    rows = [line.split(' | ') for line in printed.splitlines() if re.match(r'\| \d', line)]
    assert len(rows) == 48 and all(re.search('[a-g]', row[-1]) for row in rows if '≠' in ''.join(row))
    # Every cost of Tables 2 and 3 follows from a default network, of the DenseNets without transitions.
    assert not any('≠' in row[3] for row in rows if row[0] in ('| 2', '| 3') and 'rd_ratio' not in row[1])
    assert costs['agreement'](125_899_000, '126.0M') == costs['agreement'](126_156_000, '126.0M') == '≠'
    assert (ROOT / 'docs' / 'costs.md').read_text(encoding='utf-8').endswith(printed)
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    for name, params, macs, more in re.findall(r'\| (\w+_msar) \| (.* M) \| .* M \| (.*) M \| (.* %) \|\n', printed):
        row = re.search(rf'^\| `{name}`.*$', readme, re.M)[0].split(' | ')
        value, unit = row[2].split()
        assert (row[1], row[3]) == (params, more)
        assert float(value) * {'M': 1, 'G': 1000}[unit] == pytest.approx(float(macs), rel=1e-3)
