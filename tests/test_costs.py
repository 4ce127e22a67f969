"""Counts against the figures that the design fixes, to the last digit that it gives, and against the paper's."""

import re
from pathlib import Path

import pytest
import timm
import torch

from timm_msar import cli
from timm_msar.cli import costs

README = Path(__file__).parent.parent / 'README.md'


def counts(name, **kwargs):
    model = timm.create_model(name, device='meta', **kwargs)
    return costs.count(model, model.default_cfg['input_size'])


@pytest.mark.parametrize(
    ('name', 'kwargs', 'macs', 'digits'),
    [
        ('cifar_resnet20', {}, 40.81, 2),
        ('cifar_resnet20_msar', {}, 41.03, 2),
        ('cifar_resnet20_msar', {'rd_ratio': 0.375}, 40.90, 2),
        ('cifar_resnet32', {}, 69.12, 2),
        ('cifar_resnet32_msar', {}, 69.49, 2),
        ('cifar_resnet32_msar', {'rd_ratio': 0.375}, 69.27, 2),
        ('cifar_resnet56', {}, 125.75, 2),
        ('cifar_resnet56_msar', {}, 126.41, 2),
        ('cifar_resnet56_msar', {'rd_ratio': 0.375}, 126.00, 2),
        ('resnet18_msar', {}, 1823.8, 1),
        ('resnet34_msar', {}, 3681.3, 1),
        ('resnext50_msar', {}, 4247.9, 1),
    ],
)
def test_multiply_adds(name, kwargs, macs, digits):
    assert round(counts(name, **kwargs)[1] / 1e6, digits) == macs


def test_parameters_that_are_known():
    assert counts('cifar_resnet20')[0] == 272_474
    assert counts('cifar_resnet56')[0] == 855_770
    assert counts('cifar_densenet100')[0] == 769_162
    assert counts('cifar_densenet190')[0] == 25_624_430


def test_counted_by_hand():
    """A 3×3 convolution in 2 groups, then a linear layer."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, padding=1, groups=2),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 5),
    )
    params = 6 * 2 * 9 + 6 + 6 * 5 + 5
    assert costs.count(model, (4, 8, 8)) == (params, 8 * 8 * 6 * 2 * 9 + 6 * 5, 8 * 8 * 6 + 5)


def test_a_figure_of_the_paper_may_be_rounded_or_cut_off():
    assert costs.equals_paper(125_747_840, '125.7M')
    assert costs.equals_paper(253_480_000, '253.5M')
    assert costs.equals_paper(126_056_000, '126.0M')
    assert not costs.equals_paper(126_156_000, '126.0M')
    assert not costs.equals_paper(125_899_000, '126.0M')


def test_gates_cost_at_most_one_percent():
    for name in timm.list_models('*_msar'):
        plain = costs.PLAIN.get(name, name.removesuffix('_msar'))
        assert counts(plain)[1] < counts(name)[1] <= 1.01 * counts(plain)[1]


def test_the_table_explains_every_difference_and_stands_in_the_readme(capsys):
    assert cli.main(['costs']) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.match(r'\| \d', line)]
    assert len(rows) == len(costs.rows())
    for row in rows:
        assert ('≠' in row) == bool(re.search(r'\| [a-f](, [a-f])* \|$', row)), row
    # Every cost of Tables 2 and 3 follows from the configuration that the row names.
    exact = [row for row in rows if 'rd_ratio' in row or 'without transitions' in row]
    assert not any('≠' in row.split('|')[4] for row in exact)
    readme = README.read_text().splitlines()
    assert [line for line in lines if line not in readme] == []
