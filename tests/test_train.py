"""timm's own, unmodified train.py trains, resumes and validates the networks from the files of train_configs/."""

import csv
import json
import logging
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageOps

FOLDER = Path(__file__).parents[1] / 'train_configs'
CONFIGS = sorted(path.stem for path in FOLDER.glob('*.yaml'))
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}


def run(*words, code=0) -> str:
    """Run Python with these arguments and return everything that it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def rows(folder: Path) -> list[dict]:
    with open(folder / 'summary.csv') as file:
        return [row for row in csv.DictReader(file) if row['epoch'] != 'epoch']


DIGITS = ('--batch-size', '16', '--lr', '0.05', '--device', 'cpu', '--workers', '0')


@pytest.fixture(scope='module')
def trained(timm_scripts, digits_folder, tmp_path_factory) -> Path:
    """The folder of a run: ResNet-20 with MS-SAR by the paper's recipe, its 160 epochs and steps divided by 20."""
    output = tmp_path_factory.mktemp('output')
    config = FOLDER / 'cifar_resnet20_msar_cifar10.yaml'
    command = [timm_scripts / 'train.py', '--config', config, '--data-dir', digits_folder, '--output', output, *DIGITS]
    run(*command, '--experiment', 'digits', '--epochs', 8, '--decay-milestones', 5, 7)
    return output / 'digits'


def test_learns_real_digits(trained):
    summary = rows(trained)
    print([(row['train_loss'], row['eval_top1']) for row in summary])
    assert [float(row['lr']) for row in summary] == pytest.approx([0.05] * 4 + [0.005] * 2 + [0.0005] * 2)
    assert float(summary[-1]['train_loss']) < float(summary[0]['train_loss']) / 2
    assert float(summary[-1]['eval_top1']) > 55  # guessing gives 25


def test_validate_gives_the_same_accuracy(trained, timm_scripts, digits_folder, tmp_path):
    results = tmp_path / 'results.json'
    run(
        *('-m', 'timm_msar.run', timm_scripts / 'validate.py', '--data-dir', digits_folder),
        *('--model', 'cifar_resnet20_msar', '--num-classes', 10, '--checkpoint', trained / 'last.pth.tar'),
        *('--crop-pct', 0.8, '--interpolation', 'bilinear', '--device', 'cpu', '--workers', 0, '--batch-size', 16),
        *('--mean', 0.4914, 0.4822, 0.4465, '--std', 0.2470, 0.2435, 0.2616, '--results-file', results),
        *('--results-format', 'json'),
    )
    result = json.loads(results.read_text())
    result = result[0] if isinstance(result, list) else result
    last = rows(trained)[-1]
    assert result['top1'] == pytest.approx(float(last['eval_top1']), abs=1e-3)
    assert result['top5'] == pytest.approx(float(last['eval_top5']), abs=1e-3)


def test_resume_goes_on_from_the_checkpoint(trained, timm_scripts, digits_folder, tmp_path):
    config = FOLDER / 'cifar_resnet20_msar_cifar10.yaml'
    command = [
        timm_scripts / 'train.py',
        '--config',
        config,
        '--data-dir',
        digits_folder,
        '--output',
        tmp_path,
        *DIGITS,
    ]
    command += ['--experiment', 'on', '--epochs', 9, '--decay-milestones', 5, 7]
    log = run(*command, '--resume', trained / 'last.pth.tar')
    assert 'Restoring optimizer state' in log
    summary = rows(tmp_path / 'on')
    assert [int(row['epoch']) for row in summary] == [8]
    assert float(summary[0]['lr']) == pytest.approx(0.0005)
    assert float(summary[0]['train_loss']) < float(rows(trained)[1]['train_loss'])
    assert float(summary[0]['eval_top1']) == pytest.approx(float(rows(trained)[-1]['eval_top1']), abs=15)


def test_unknown_model_and_unknown_scales_stop_before_training(timm_scripts, digits_folder, tmp_path):
    config = yaml.safe_load((FOLDER / 'cifar_resnet20_msar_cifar10.yaml').read_text())
    for wrong, message in (
        ({'model': 'cifar_resnet20_mssar'}, 'Unknown model (cifar_resnet20_mssar)'),
        ({'model_kwargs': {'scales': []}}, 'scales'),
        ({'device_modules': ['timm_mssar']}, "No module named 'timm_mssar'"),
    ):
        file = tmp_path / 'wrong.yaml'
        file.write_text(yaml.safe_dump({**config, **wrong}))
        log = run(timm_scripts / 'train.py', '--config', file, '--data-dir', digits_folder, *DIGITS, code=1)
        assert message in log.splitlines()[-1]
        assert 'Train:' not in log


@pytest.fixture(scope='module')
def two_photos(tmp_path_factory):
    """A function that returns a folder of two classes with one photograph each, in ImageNet's layout or CIFAR's."""
    photos = pytest.importorskip('sklearn.datasets').load_sample_images().images

    def folder(imagenet: bool) -> Path:
        root = tmp_path_factory.getbasetemp() / ('photos' if imagenet else 'padded')
        for split in ('train', 'val'):
            for name, photo in zip(('n01', 'n02'), photos, strict=True):
                image = Image.fromarray(photo[:400, :500])
                if not imagenet:
                    image = ImageOps.expand(image.resize((32, 32)), 4)
                file = root / split / name / ('0.JPEG' if imagenet else '0.png')
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
        return root

    return folder


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_starts(name, timm_scripts, two_photos, tmp_path, monkeypatch):
    """One update, one validation and one checkpoint, in this process: the rest is left to the file."""
    imagenet = 'in1k' in name
    arguments = ['--config', FOLDER / f'{name}.yaml', '--data-dir', two_photos(imagenet), '--batch-size', 2]
    arguments += ['--device', 'cpu', '--workers', 0, '--epochs', 1, '--output', tmp_path, '--experiment', 'start']
    if imagenet:
        arguments += ['--input-size', 3, 64, 64, '--warmup-epochs', 0]
    elif 'densenet' in name:
        arguments += ['--input-size', 3, 16, 16]
    if name.endswith('_a2'):
        arguments += ['--aug-repeats', 0]
    monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, arguments)])
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])  # train.py adds one each time
    runpy.run_path(str(timm_scripts / 'train.py'), run_name='__main__')
    classes = yaml.safe_load((FOLDER / f'{name}.yaml').read_text())['num_classes']
    loss = float(rows(tmp_path / 'start')[0]['train_loss'])
    if name.endswith('_a2'):  # binary cross-entropy, the mean over the classes
        assert 0.3 < loss < 1.5
    else:
        assert math.log(classes) / 2 < loss < math.log(classes) * 2
    assert (tmp_path / 'start' / 'last.pth.tar').is_file()
    shutil.rmtree(tmp_path / 'start')  # 46 checkpoints are some gigabytes
