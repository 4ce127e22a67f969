"""The curves' numbers against figures worked out by hand, the picture, and runs that cannot be read."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from timm.utils import update_summary

from timm_msar.cli import curves
from timm_msar.cli.errors import CommandError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'docs' / 'results'


def run(*words):
    """What `timm-msar curves WORDS` does."""
    parser = argparse.ArgumentParser()
    curves.add_arguments(parser)
    curves.main(parser.parse_args([str(word) for word in words]))


def make_run(folder, top1, model='cifar_resnet20_msar', **arguments):
    """A run as train.py leaves it: one epoch per accuracy; losses are a hundredth and a fiftieth of the error."""
    folder.mkdir()
    arguments = {
        **{'model': model, 'epochs': len(top1), 'lr': 0.1, 'data_dir': '/data/fmnist', 'seed': 0, 'workers': 4},
        **arguments,
        'experiment': folder.name,
    }
    (folder / 'args.yaml').write_text(yaml.safe_dump(arguments))
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


def test_table_and_picture(three_seeds, tmp_path, capsys):
    plain = make_run(tmp_path / 'plain', [70.0, 88.5, 87.25], model='cifar_resnet20', epochs=160)
    output = tmp_path / 'picture.png'
    run(*three_seeds, plain, '--output', output)
    # last errors 10, 8, 6: mean 8, deviations 2, 0, -2, so std = sqrt(8 / 2) = 2
    # best errors 9, 8, 6: mean 23/3 = 7.67, deviations 4/3, 1/3, -5/3, so std = sqrt(42/9 / 2) = 1.53
    lines = [line.split('  ') for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    losses = ['training loss', 'validation loss']
    assert rows[0] == ['configuration', 'n', 'last error %', 'best error %', *losses, 'epochs']
    losses = ['0.0800 ± 0.0200', '0.1600 ± 0.0400']
    assert rows[1] == ['cifar_resnet20_msar', '3', '8.00 ± 2.00', '7.67 ± 1.53', *losses, '3']
    assert rows[2] == ['cifar_resnet20', '1', '12.75', '11.50', '0.1275', '0.2550', '3 of 160']
    assert sorted(path.name for path in tmp_path.glob('*picture*')) == ['picture.png']
    with Image.open(output) as image:
        assert image.format == 'PNG'
        pixels = np.asarray(image.convert('RGB')).astype(int)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # matplotlib's first two: a line for each configuration
        for panel in np.array_split(pixels, 3, axis=1):
            assert (abs(panel - color).max(axis=2) < 8).sum() > 50


def test_lines_and_bands_are_mean_and_std_of_the_seeds(three_seeds, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {'plot': [], 'fill_between': []}
    for name, calls in drawn.items():
        original = getattr(Axes, name)

        def record(axis, *args, _original=original, _calls=calls, **kwargs):
            _calls.append(args)
            return _original(axis, *args, **kwargs)

        monkeypatch.setattr(Axes, name, record)
    curves.draw(curves.read_runs(three_seeds), tmp_path / 'picture.png')
    (epochs, loss, _), (_, validation_loss, _), (_, error, _) = drawn['plot']
    assert epochs.tolist() == [1, 2, 3]
    assert error.tolist() == [18.0, 8.0, 8.0]
    assert loss == pytest.approx([0.18, 0.08, 0.08])
    assert validation_loss == pytest.approx([0.36, 0.16, 0.16])
    _, _, (_, low, high) = drawn['fill_between']
    assert low == pytest.approx([16.0, 7.0, 6.0])
    assert high == pytest.approx([20.0, 9.0, 10.0])


def test_other_arguments_make_another_configuration(tmp_path):
    runs = [
        make_run(tmp_path / 'a', [90.0], lr=0.1),
        make_run(tmp_path / 'b', [90.0], lr=0.2),
        make_run(tmp_path / 'c', [90.0], lr=0.2, seed=1),
        make_run(tmp_path / 'd', [90.0], lr=0.2, data_dir='/data/cifar10'),
    ]
    groups = curves.read_runs(runs)
    assert [(group.label, len(group.error)) for group in groups] == [
        ('cifar_resnet20_msar (data_dir=fmnist, lr=0.1)', 1),
        ('cifar_resnet20_msar (data_dir=fmnist, lr=0.2)', 2),
        ('cifar_resnet20_msar (data_dir=cifar10, lr=0.2)', 1),
    ]


def test_differences_have_the_standard_error_of_independent_runs(three_seeds, tmp_path, capsys):
    plain = [
        make_run(tmp_path / 'plain 1', [80.0, 88.0, 91.0], model='cifar_resnet20', seed=1),
        make_run(tmp_path / 'plain 0', [70.0, 88.0, 87.0], model='cifar_resnet20', seed=0),
    ]
    run(*three_seeds, *plain, '--output', tmp_path / 'curves.png')
    # errors 9 and 13, mean 11, variance 8; 10, 8 and 6, mean 8, variance 4: 11 - 8 = 3 and sqrt(8/2 + 4/3) = 2.31
    line = 'cifar_resnet20 - cifar_resnet20_msar 2, 3 +3.00 ± 2.31 +0.0300 ± 0.0231 +0.0600 ± 0.0462'
    (found,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith('cifar_resnet20 - ')]
    assert found.split() == line.split()

    # neither a single run, nor runs of another length, nor unfinished ones are compared
    assert curves.differences(curves.read_runs([*three_seeds, plain[0]])) == ''
    short = [make_run(tmp_path / f'short {seed}', [80.0], seed=seed, lr=0.2) for seed in range(3)]
    assert curves.differences(curves.read_runs([*three_seeds, *short])) == ''
    cut = [make_run(tmp_path / f'cut {seed}', [80.0, 80.0, 80.0], epochs=9, seed=seed) for seed in range(3)]
    assert curves.differences(curves.read_runs([*three_seeds, *cut])) == ''


@pytest.mark.parametrize('regime', sorted({path.name.partition('-')[0] for path in RESULTS.iterdir()}))
def test_the_tables_of_our_own_results_are_printed_from_their_files(regime, tmp_path, capsys):
    run(*sorted(RESULTS.glob(f'{regime}-*')), '--output', tmp_path / 'curves.png')
    tables = capsys.readouterr().out.partition('\ndrawn in')[0].strip()
    assert f'```\n{tables}\n```' in (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')

    plain, msar, one = (line.split('  ') for line in tables.splitlines()[1:4])
    last = [[cell.strip() for cell in row if cell.strip()][2] for row in (plain, one, msar)]
    assert f'| {" | ".join(last)} |\n' in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_only_epochs_that_all_seeds_have_are_averaged(tmp_path):
    runs = [
        make_run(tmp_path / 'a', [80.0, 90.0, 95.0], epochs=3),
        make_run(tmp_path / 'b', [82.0, 92.0], epochs=3, seed=1),
    ]
    (group,) = curves.read_runs(runs)
    assert group.error.tolist() == [[20.0, 10.0], [18.0, 8.0]]
    assert '2 of 3' in curves.table([group])


def test_the_same_seed_twice_is_refused(tmp_path):
    runs = [make_run(tmp_path / name, [90.0]) for name in 'ab']
    with pytest.raises(CommandError, match='same configuration with the same seed 0'):
        run(*runs)


def test_a_run_that_was_not_validated_is_told(tmp_path):
    folder = make_run(tmp_path / 'a', [90.0])
    (folder / 'summary.csv').write_text('epoch,train_loss,lr\r\n0,0.5,0.1\r\n')
    with pytest.raises(CommandError, match='a run of cifar_resnet20_msar was not validated'):
        run(folder)


@pytest.mark.filterwarnings('error')
def test_no_error_is_drawn_where_a_logarithm_would_not_be(tmp_path):
    run(make_run(tmp_path / 'a', [100.0, 100.0]), '--output', tmp_path / 'picture.png')


def test_names_are_drawn_as_they_are(tmp_path):
    """Between $ signs matplotlib reads formulas, and fails on this one."""
    runs = [make_run(tmp_path / name, [90.0], opt=opt) for name, opt in (('a', 'sgd'), ('b', '$x^$'))]
    curves.draw(curves.read_runs(runs), tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').stat().st_size > 1000


def test_a_value_that_holds_itself_or_too_much_is_compared(tmp_path):
    folder = make_run(tmp_path / 'a', [90.0])
    lines = ['me: &me [*me]', 'b0: &b0 [1, 1, 1, 1, 1, 1, 1, 1, 1]']
    lines += [f'b{i}: &b{i} [{", ".join(9 * [f"*b{i - 1}"])}]' for i in range(1, 20)]  # 9 to the power of 20 numbers
    with open(folder / 'args.yaml', 'a') as file:
        file.write('\n'.join(lines))
    shutil.copytree(folder, tmp_path / 'b')
    with pytest.raises(CommandError, match='same configuration with the same seed 0'):
        run(folder, tmp_path / 'b')


def test_other_bad_input_is_told(tmp_path):
    folder = make_run(tmp_path / 'a', [90.0])
    with pytest.raises(CommandError, match=r'must end in \.png'):
        run(folder, '--output', tmp_path / 'picture.pdf')
    (tmp_path / 'folder.png').mkdir()
    with pytest.raises(CommandError, match=r'folder\.png is a folder'):
        run(folder, '--output', tmp_path / 'folder.png')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'folder.png']
    (folder / 'summary.csv').write_text('')
    with pytest.raises(CommandError, match='has no column epoch'):
        run(folder)
    with pytest.raises(CommandError, match=r'cannot read .*args\.yaml: No such file'):
        run(tmp_path / 'b')
