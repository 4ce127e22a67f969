"""timm's own, unmodified train.py trains and validates the networks from the recipes of train_configs/."""

import csv
import json
import logging
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image, ImageOps

import timm_msar_command

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / 'train_configs'
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
ON_CPU = ('--device', 'cpu', '--workers', 0)
BF16 = ('--amp', '--amp-dtype', 'bfloat16')


def run(*words) -> str:
    """Run Python with these arguments and return everything that it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def rows(folder: Path) -> list[dict]:
    with open(folder / 'summary.csv') as file:
        return [row for row in csv.DictReader(file) if row['epoch'] != 'epoch']


@pytest.fixture(scope='module')
def digits(timm_scripts, digits_folder) -> tuple:
    """Arguments that train ResNet-20 with MS-SAR by the paper's recipe on digits, 20 times shorter."""
    recipe = ('--config', FOLDER / 'cifar_resnet.yaml', '--model', 'cifar_resnet20_msar', '--data-dir', digits_folder)
    short = ('--batch-size', 16, '--lr', 0.05, '--decay-milestones', 5, 7)
    return (timm_scripts / 'train.py', *recipe, *short, *ON_CPU)


@pytest.fixture(scope='module')
def trained(digits, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp('output')
    run(*digits, '--epochs', 8, '--output', output, '--experiment', 'digits')
    return output / 'digits'


def test_learns_real_digits(trained):
    summary = rows(trained)
    assert [float(row['lr']) for row in summary] == pytest.approx([0.05] * 4 + [0.005] * 2 + [0.0005] * 2)
    assert float(summary[-1]['train_loss']) < float(summary[0]['train_loss']) / 2
    assert float(summary[-1]['eval_top1']) > 55  # guessing gives 25


def assert_validate_agrees(train_folder: Path, script: Path, *arguments) -> None:
    """validate.py finds the accuracy of the last epoch to its last digit, and the loss, which constants move."""
    log = run('-m', 'timm_msar.run', script, *arguments, *ON_CPU)
    result = json.loads(log.rpartition('--result\n')[2])
    last = rows(train_folder)[-1]
    assert result['top1'] == round(float(last['eval_top1']), 4)
    assert result['top5'] == round(float(last['eval_top5']), 4)
    loss = re.findall(r'Loss: +[\d.]+ \(([\d.]+)\)', log)[-1]
    assert float(loss) == pytest.approx(float(last['eval_loss']), abs=2e-4)


def test_validate_without_options_gives_the_same_accuracy(trained, timm_scripts, digits_folder, tmp_path):
    checkpoint, out = trained / 'last.pth.tar', tmp_path / 'out'
    assert timm_msar_command.main(['export', str(checkpoint), '--output', str(out)]) == 0
    for network in (('cifar_resnet20_msar', '--checkpoint', checkpoint), (f'local-dir:{out}', '--pretrained')):
        options = ('--model', *network, '--data-dir', digits_folder)
        assert_validate_agrees(trained, timm_scripts / 'validate.py', *options)


@pytest.mark.parametrize(
    ('model', 'options'),
    [
        ('resnet18_msar.warm_tv_in1k', []),
        ('resnet34_msar.warm_ra4_e3600_r224_in1k', ['--use-train-size']),  # which has a larger size for testing
    ],
)
def test_validate_gives_the_same_accuracy_of_an_imagenet_network(model, options, timm_scripts, digits_folder, tmp_path):
    """With the constants, the crop and the interpolation of the warm start, at 224 px, after eight updates."""
    data = tmp_path / 'data'
    for split, number in (('train', 8), ('validation', 4)):
        for folder in (digits_folder / split).iterdir():
            (data / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:number]:
                shutil.copy(file, data / split / folder.name)
    arguments = ('--model', model, '--data-dir', data)
    train = ('--config', FOLDER / 'in1k.yaml', *arguments, '--batch-size', 4, '--lr', 0.02, '--epochs', 1, *ON_CPU)
    run(timm_scripts / 'train.py', *train, '--output', tmp_path, '--experiment', 'run')
    checkpoint = ('--checkpoint', tmp_path / 'run' / 'last.pth.tar')
    assert_validate_agrees(tmp_path / 'run', timm_scripts / 'validate.py', *arguments, *checkpoint, *options)


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> dict[str, Path]:
    """Two classes with one photograph each, in ImageNet's layout and in that of `timm-msar data`."""
    images = pytest.importorskip('sklearn.datasets').load_sample_images().images
    root = tmp_path_factory.mktemp('photos')
    for split in ('train', 'val'):
        for name, pixels in zip(('n01', 'n02'), images, strict=True):
            photo = Image.fromarray(pixels[:400, :500])
            small = photo.resize((32, 32))
            small = ImageOps.expand(small, 4) if split == 'train' else small
            for layout, image in (('imagenet', photo), ('cifar', small)):
                file = root / layout / split / name / '0.png'
                file.parent.mkdir(parents=True)
                image.save(file)
    return {layout: root / layout for layout in ('imagenet', 'cifar')}


@pytest.fixture(scope='module')
def plain_weights(tmp_path_factory) -> Path:
    """Weights of a plain ResNet-18 on disk, for a warm start without a network."""
    path = tmp_path_factory.mktemp('weights') / 'resnet18.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('resnet18').state_dict(), path)
    return path


@pytest.mark.parametrize(
    ('recipe', 'model', 'options'),
    [
        ('cifar_resnet', 'cifar_resnet20', []),
        ('cifar_resnet', 'cifar_resnet56_msar', ['--model-kwargs', 'scales=[1,4]', '--grad-checkpointing']),
        ('cifar_resnet', 'cifar_resnet20_msar', ['--model-kwargs', 'strategy=sliding', '--num-classes', 100]),
        ('cifar_resnet', 'cifar_resnet20_msar', ['--torchcompile', 'aot_eager']),
        ('cifar_densenet', 'cifar_densenet100', ['--img-size', 16]),
        ('cifar_densenet', 'cifar_densenet100_msar', ['--img-size', 16, '--model-kwargs', 'multi_level=False', *BF16]),
        ('in1k', 'resnet18', ['--img-size', 64]),
        ('in1k', 'resnet18_msar', ['--img-size', 64, '--model-kwargs', 'scales=[1]']),
        ('in1k', 'resnext50_msar', ['--img-size', 64, '--channels-last', *BF16]),
        ('in1k_a2', 'resnext50_msar', ['--img-size', 64, '--warmup-epochs', 0, '--aug-repeats', 0]),
        ('finetune', 'resnet18_msar', ['--img-size', 64, '--warmup-epochs', 0, '--num-classes', 3]),
    ],
)
def test_recipe_starts(recipe, model, options, timm_scripts, photos, plain_weights, tmp_path, monkeypatch, capfd):
    """One update, one validation and one checkpoint, in this process: the rest is left to the recipe."""
    data = photos['cifar' if recipe.startswith('cifar') else 'imagenet']
    arguments = ['--config', FOLDER / f'{recipe}.yaml', '--model', model, '--data-dir', data, '--batch-size', 2]
    arguments += [*ON_CPU, '--epochs', 1, '--output', tmp_path, '--experiment', 'start', *options]
    arguments += ['--pretrained-path', plain_weights] if recipe == 'finetune' else []
    monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, arguments)])
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])  # train.py adds one each time
    runpy.run_path(str(timm_scripts / 'train.py'), run_name='__main__')
    size = options[options.index('--img-size') + 1] if '--img-size' in options else 32
    assert f'input_size: (3, {size}, {size})' in capfd.readouterr().err
    loss = float(rows(tmp_path / 'start')[0]['train_loss'])
    if recipe == 'in1k_a2':  # binary cross-entropy, the mean over the classes
        assert 0.3 < loss < 1.5
    else:
        classes = yaml.safe_load((tmp_path / 'start' / 'args.yaml').read_text())['num_classes']
        classes = classes or timm.create_model(model, device='meta').num_classes
        assert math.log(classes) / 2 < loss < math.log(classes) * 2
    assert (tmp_path / 'start' / 'last.pth.tar').is_file()
    shutil.rmtree(tmp_path / 'start')  # some hundred megabytes
