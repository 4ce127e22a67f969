"""The curves' numbers against figures worked out by hand, the picture, and runs that cannot be compared."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from timm.utils import update_summary

from timm_msar_command import main

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'docs' / 'results'


def run(*words):
    return main(['curves', *map(str, words)])


def make_run(folder, top1, model='cifar_resnet20_msar', **arguments):
    """A run as train.py leaves it: one epoch per accuracy; losses are a hundredth and a fiftieth of the error."""
    folder.mkdir()
    default = {'model': model, 'epochs': len(top1), 'lr': 0.1, 'data_dir': '/data/fmnist', 'seed': 0, 'workers': 4}
    (folder / 'args.yaml').write_text(yaml.safe_dump(default | arguments | {'experiment': folder.name}))
    for epoch, accuracy in enumerate(top1):
        loss = {'loss': (100 - accuracy) / 100}
        results = {'loss': 2 * loss['loss'], 'top1': accuracy, 'top5': max(accuracy, 99.0)}
        update_summary(epoch, loss, results, folder / 'summary.csv', lr=0.1, write_header=epoch == 0)
    return folder


@pytest.fixture
def three_seeds(tmp_path):
    return [
        make_run(tmp_path / 'a', [80.0, 91.0, 90.0], seed=0),
        make_run(tmp_path / 'b', [82.0, 92.0, 92.0], seed=1, data_dir='/elsewhere/fmnist', workers=8),
        make_run(tmp_path / 'c', [84.0, 93.0, 94.0], seed=2, device='cuda:1'),
    ]


def test_tables_and_picture(three_seeds, tmp_path, capsys):
    plain = [
        make_run(tmp_path / 'plain 1', [80.0, 88.0, 91.0, 99.0], epochs=3, model='cifar_resnet20', seed=1),
        make_run(tmp_path / 'plain 0', [70.0, 88.0, 87.0], model='cifar_resnet20', seed=0),
    ]
    cut = make_run(tmp_path / 'cut', [70.0, 88.5, 87.25], lr=0.2, epochs=160)
    assert run(*three_seeds, *plain, cut, '--output', tmp_path / 'picture.png') == 0
    # of the epochs that all seeds have: last errors 10, 8, 6: mean 8, deviations 2, 0, -2, so std = sqrt(8 / 2) = 2
    # best errors 9, 8, 6: mean 23/3 = 7.67, deviations 4/3, 1/3, -5/3, so std = sqrt(42/9 / 2) = 1.53
    # errors 9 and 13, mean 11, variance 8; 10, 8 and 6, mean 8, variance 4: 11 - 8 = 3 and sqrt(8/2 + 4/3) = 2.31
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] + lines[6:-2] == [
        'cifar_resnet20_msar (epochs=3, lr=0.1) 3 8.00 ± 2.00 7.67 ± 1.53 0.0800 ± 0.0200 0.1600 ± 0.0400 3',
        'cifar_resnet20 2 11.00 ± 2.83 10.50 ± 2.12 0.1100 ± 0.0283 0.2200 ± 0.0566 3',
        'cifar_resnet20_msar (epochs=160, lr=0.2) 1 12.75 11.50 0.1275 0.2550 3 of 160',
        'cifar_resnet20 - cifar_resnet20_msar (epochs=3, lr=0.1) 2, 3 +3.00 ± 2.31 +0.0300 ± 0.0231 +0.0600 ± 0.0462',
    ]
    assert Image.open(tmp_path / 'picture.png').width == 1950


def test_lines_are_means_and_bands_are_ranges(three_seeds, tmp_path):
    assert run(*three_seeds, '--output', tmp_path / 'picture.png') == 0
    pixels = np.asarray(Image.open(tmp_path / 'picture.png').convert('RGB'))[:560].astype(int)  # above the legend
    for axis in np.split(pixels[:, :, 2] - pixels[:, :, 0], 3, axis=1):  # how blue: the line 149, the band 30
        x = np.flatnonzero((axis > 20).any(0))[[3, -4]]
        drawn = []
        for column in axis[:, [x[0], x.sum() // 2, x[1]]].T:
            band, line = np.flatnonzero(column > 20), np.flatnonzero(column > 100)
            drawn.append((band[-1], line.mean(), band[0]))
        # Errors of the epochs: the best, the mean, the worst. Losses are in proportion.
        heights = 6 + (drawn[2][0] - np.array(drawn)) * 10 / (drawn[2][0] - drawn[0][0])
        assert heights == pytest.approx(np.array([(16, 18, 20), (7, 8, 9), (6, 8, 10)]), abs=0.2)


@pytest.mark.parametrize('regime', sorted({path.name.partition('-')[0] for path in RESULTS.iterdir()}))
def test_the_tables_of_our_own_results_are_printed_from_their_files(regime, tmp_path, capsys):
    assert run(*sorted(RESULTS.glob(f'{regime}-*')), '--output', tmp_path / 'curves.png') == 0
    tables = capsys.readouterr().out.partition('\ndrawn in')[0].strip()
    assert f'```\n{tables}\n```' in (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')

    # The columns of README's table; a regime may lack a network.
    last = {}
    for line in tables.partition('\n\n')[0].splitlines()[1:]:
        label, _, error, *_ = [cell.strip() for cell in line.split('  ') if cell.strip()]
        last['L = {1}' if 'scales: [1]' in label else label] = error
    row = [last.get(label, '–') for label in ('cifar_resnet20', 'L = {1}', 'cifar_resnet20_msar')]
    assert f'| {" | ".join(row)} |\n' in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    folder = make_run(tmp_path / 'a', [90.0])
    (tmp_path / 'folder.png').mkdir()
    aliases = make_run(tmp_path / 'aliases', [90.0], mean=[0.5] * 3)
    bomb = '\n'.join(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]' for i in range(1, 10))
    for text in (
        f'a0: &a0 [lol]\n{bomb}',
        f'a0: &a0 {{a: b}}\n{bomb}\nb: {{<<: *a9}}',
        f'a: &a {"x" * 10**6}\nb: [*a, *a]',
    ):
        (aliases / 'args.yaml').write_text(f'model: cifar_resnet20\nepochs: 1\n{text}')
        assert run(aliases) == 1 and len(capsys.readouterr().err) < 300
    (aliases / 'args.yaml').write_text(
        'model: x\nepochs: 1\nmean: &id001\n- 0.5\nstd: *id001'
    )  # of a recipe with aliases
    assert run(aliases, '--output', tmp_path / 'curves.png') == 0
    unvalidated = make_run(tmp_path / 'b', [90.0], seed=1)
    (unvalidated / 'summary.csv').write_text('epoch,train_loss,lr\r\n0,0.5,0.1\r\n')
    for words, message in (
        ((folder, folder), 'same configuration with the same seed 0'),
        ((unvalidated,), 'cifar_resnet20_msar have no validated epoch in common'),
        ((folder, '--output', tmp_path / 'picture.pdf'), 'must end in .png'),
        ((folder, '--output', tmp_path / 'folder.png'), 'folder.png exists already'),
        ((tmp_path / 'none',), 'args.yaml'),
    ):
        assert run(*words) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'aliases', 'b', 'curves.png', 'folder.png']
