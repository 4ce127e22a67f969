"""Counts against the figures that follow from the paper, to the last digit, and against the paper's own."""

import re
from pathlib import Path

import pytest
import timm
import torch

from timm_msar import cli
from timm_msar.cli import costs
from timm_msar.cli.multiply_adds import multiply_adds

DOCS = Path(__file__).parents[1] / 'docs' / 'costs.md'
NARROW = {'rd_ratio': 0.375}
WIDE = {'rd_ratio': 1.0}


def create(name, **kwargs):
    return timm.create_model(name, **kwargs), (3, 32, 32) if name.startswith('cifar') else (3, 224, 224)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'macs', 'digits', 'params'),
    [
        ('cifar_resnet20', {}, 40.81, 2, 272_474),
        ('cifar_resnet20_msar', NARROW, 40.898, 3, 286_838),
        ('cifar_resnet20_msar', WIDE, 41.033, 3, 306_530),
        ('cifar_resnet32', {}, 69.12, 2, None),
        ('cifar_resnet32_msar', NARROW, 69.266, 3, 490_846),
        ('cifar_resnet32_msar', WIDE, 69.49, 2, None),
        ('cifar_resnet56', {}, 125.75, 2, 855_770),
        ('cifar_resnet56_msar', NARROW, 126.002, 3, 898_862),
        ('cifar_resnet56_msar', WIDE, 126.41, 2, None),
        ('cifar_densenet100', {}, 287.93, 2, 769_162),
        ('cifar_densenet190', {}, 9301.95, 2, 25_624_430),
        ('resnet18_msar', NARROW, 1817.729, 3, 12_224_712),
        ('resnet34_msar', NARROW, 3670.363, 3, 22_766_264),
        ('resnext50_msar', {}, 4247.930, 3, 27_570_870),
    ],
)
def test_multiply_adds_and_parameters(name, kwargs, macs, digits, params):
    model, size = create(name, **kwargs)
    assert round(multiply_adds(model, size) / 1e6, digits) == macs
    assert params in (None, sum(p.numel() for p in model.parameters()))


def test_counted_by_hand():
    """A 3×3 convolution in 2 groups, then a linear layer; the product of two maps is no layer."""

    class Square(torch.nn.Module):
        def forward(self, x):
            return x @ x.mT

    conv, linear = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.nn.Linear(6, 5)
    model = torch.nn.Sequential(conv, Square(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear)
    assert multiply_adds(model, (4, 8, 8)) == 8 * 8 * 6 * 2 * 9 + 6 * 5
    assert multiply_adds(model, (4, 8, 8), torch.nn.Conv2d) == 6 * 5
    assert model.training and conv.weight.device.type == 'cpu'


@pytest.mark.parametrize(
    ('value', 'figure', 'agreement'),
    [
        (40_813_184, '40.8M', '='),
        (125_787_840, '125.7M', '= cut off'),
        (253_480_000, '253.5M', '= rounded'),
        (126_156_000, '126.0M', '≠'),
        (125_899_000, '126.0M', '≠'),
    ],
)
def test_a_figure_of_the_paper_may_be_rounded_or_cut_off(value, figure, agreement):
    assert costs.agreement(value, figure) == agreement


def test_the_table_explains_every_difference_and_stands_in_the_docs(capsys):
    assert cli.main(['costs']) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if re.match(r'\| \d', line)]
    assert len(rows) == len(costs.rows())
    for row in rows:
        assert ('≠' in row) == bool(re.search(r'\| [a-f](, [a-f])* \|$', row)), row
    # Every cost of Tables 2 and 3 follows from a default network, of the DenseNets without transitions.
    exact = [r for r in rows if re.match(r'\| [123]', r) and 'rd_ratio' not in r and ('without' in r or 'resnet' in r)]
    assert len(exact) == 24 and not any('≠' in row.split('|')[4] for row in exact)
    more = [float(line.split(' | ')[-1].split()[0]) for line in printed.splitlines() if line.endswith(' % |')]
    assert len(more) == 9 and 0 < min(more) <= max(more) < 1
    assert DOCS.read_text(encoding='utf-8').endswith(printed)


def test_the_readme_sums_up_the_table_of_the_docs():
    readme = (DOCS.parents[1] / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(
        r'^\| (\w+_msar)(?:, not in the paper)? \| ([\d.]+ M) \| .* \| ([\d.]+) M \| (.* %) \|$', DOCS.read_text(), re.M
    )
    assert len(rows) == 9
    for name, params, macs, more in rows:
        row = re.search(rf'^\| `{name}`.*$', readme, re.M)[0].split(' | ')
        assert (row[1], row[3]) == (params, more)
        value, unit = row[2].split()
        assert abs(float(value) * {'M': 1, 'G': 1000}[unit] - float(macs)) <= (0.01 if unit == 'M' else 0.51)
