"""The files of train_configs/ say what the paper says, in words that timm's train.py knows."""

import copy
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import timm.optim
import timm.scheduler
import yaml
from PIL import Image

import timm_msar
from timm_msar.cli.check_config import unknown

FOLDER = Path(__file__).parents[1] / 'train_configs'
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob('*.yaml'))}
PAPER = {name: config for name, config in CONFIGS.items() if not name.endswith('_a2')}


def create(config, **kwargs):
    return timm.create_model(
        config['model'],
        num_classes=config['num_classes'],
        drop_path_rate=config.get('drop_path'),
        **config.get('model_kwargs', {}),
        **kwargs,
    )


def test_every_row_has_a_file():
    rows = [f'{net}_in1k' for net in ('resnet18', 'resnet34', 'resnext50_32x4d')]
    rows += [f'{net}_{variant}_in1k' for net in ('resnet18', 'resnet34', 'resnext50') for variant in ('se', 'msar')]
    nets = {
        'cifar10': ('resnet20', 'resnet32', 'resnet56', 'densenet100', 'densenet190'),
        'cifar100': ('resnet20', 'resnet32', 'resnet56', 'densenet100', 'densenet190'),
        'fashion_mnist': ('resnet20', 'resnet56'),
    }
    for dataset in nets:
        rows += [f'cifar_{net}{variant}_{dataset}' for net in nets[dataset] for variant in ('', '_se', '_msar')]
    assert sorted(CONFIGS) == sorted([*rows, 'resnext50_msar_in1k_a2'])


@pytest.mark.parametrize('name', CONFIGS)
def test_model_is_the_one_in_the_name(name):
    config = CONFIGS[name]
    model = create(config, device='meta')
    gates = [m for m in model.modules() if isinstance(m, timm_msar.MultiScaleRecalibration)]
    if '_msar_' in name or '_se_' in name:
        assert config['model'] == name[: re.search('_(se|msar)_', name).start()] + '_msar'
        assert gates
        assert all(tuple(gate.scales) == ((1,) if '_se_' in name else (1, 2, 4)) for gate in gates)
    else:
        assert name.startswith(config['model'] + '_')
        assert not gates
    assert model.num_classes == (1000 if 'in1k' in name else 100 if 'cifar100' in name else 10)
    assert config['device_modules'] == ['timm_msar']


def test_files_of_one_recipe_differ_only_in_model_and_data():
    own = {'model', 'model_kwargs', 'num_classes', 'mean', 'std'}
    for recipe in ('cifar_resnet', 'cifar_densenet', 'resne'):
        same = [{k: v for k, v in c.items() if k not in own} for n, c in PAPER.items() if n.startswith(recipe)]
        assert len(same) >= 9
        assert all(other == same[0] for other in same)
    constants = {(n.split('_')[-1], str(c['mean']), str(c['std']), c['num_classes']) for n, c in PAPER.items()}
    assert len(constants) == 4


@pytest.mark.parametrize(
    ('name', 'lr', 'phases', 'batch'),
    [
        ('cifar_resnet20_msar_cifar10', 0.1, (80, 40, 40), 128),
        ('cifar_densenet100_msar_cifar10', 0.1, (150, 75, 75), 64),
        ('resnet18_msar_in1k', 0.6, (30, 30, 30, 10), 1024 // 8),
    ],
)
def test_learning_rate_and_optimizer_are_the_papers(name, lr, phases, batch):
    """The rate in force in every epoch, and the decay of every weight, as train.py sets them up from the file.

    One file of each recipe: the test above shows that the others are the same.
    """
    config = PAPER[name]
    optimizer = timm.optim.create_optimizer_v2(
        create(config, device='meta'),
        opt=config['opt'],
        lr=config['lr'],
        weight_decay=config['weight_decay'],
        momentum=config['momentum'],
        **config['opt_kwargs'],
    )
    for group in optimizer.param_groups:
        assert (group['weight_decay'], group['momentum'], group['nesterov']) == (0.0001, 0.9, True)
    scheduler, epochs = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched=config['sched'],
        num_epochs=config['epochs'],
        decay_milestones=config['decay_milestones'],
        decay_rate=config['decay_rate'],
        warmup_epochs=config['warmup_epochs'],
    )
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    expected = [lr / 10**phase for phase, length in enumerate(phases) for _ in range(length)]
    assert rates == pytest.approx(expected)
    assert config['batch_size'] == batch
    assert config['smoothing'] == 0  # timm's default is 0.1


@pytest.mark.parametrize('name', ['cifar_resnet20_msar_cifar10'])
def test_cifar_augmentation_pixel_by_pixel(name):
    """On images stored padded to 40x40: each of the 81 crops, mirrored or not; in testing the image itself."""
    config = CONFIGS[name]
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    common = {'input_size': tuple(config['input_size']), 'normalize': False}
    train = timm.data.create_transform(
        **common,
        is_training=True,
        scale=config['scale'],
        ratio=config['ratio'],
        hflip=config['hflip'],
        color_jitter=config['color_jitter'],
        interpolation=config['train_interpolation'],
    )
    test = timm.data.create_transform(**common, crop_pct=config['crop_pct'], interpolation=config['interpolation'])
    assert (test(Image.fromarray(padded)).permute(1, 2, 0).numpy() == image).all()

    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y : y + 32, x : x + 32]
            crops[crop.tobytes()] = (y, x, False)
            crops[crop[:, ::-1].tobytes()] = (y, x, True)
    seen = {crops[train(Image.fromarray(padded)).permute(1, 2, 0).numpy().tobytes()] for _ in range(1500)}
    assert seen == set(crops.values())


def test_fashion_mnist_constants():
    """Mean and deviation of the 60,000 training images, padded with zeros from 28 to 32 pixels."""
    folder = Path('/usr/share/datasets/fashion-mnist')
    if not folder.is_dir():
        pytest.skip('needs the files of the Debian package dataset-fashion-mnist')
    import gzip

    with gzip.open(folder / 'train-images-idx3-ubyte.gz') as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2))) / np.float32(255)
    config = CONFIGS['cifar_resnet20_msar_fashion_mnist']
    assert config['mean'] == [round(float(pixels.mean(dtype=np.float64)), 4)] * 3
    assert config['std'] == [round(float(pixels.std(dtype=np.float64)), 4)] * 3


@pytest.fixture(scope='module')
def train_parser(timm_scripts):
    return runpy.run_path(str(timm_scripts / 'train.py'))['parser']


@pytest.mark.parametrize('name', CONFIGS)
def test_keys_and_types_are_those_of_train_py(name, train_parser):
    assert unknown(CONFIGS[name], train_parser) == []


def test_wrong_keys_and_types_are_found(train_parser):
    wrong = {'lerning_rate': 0.1, 'lr': 'fast', 'epochs': 1.5, 'amp': 1, 'model_kwargs': 'scales=[1]', 'mean': 0.5}
    assert unknown(wrong, train_parser) == list(wrong)
    assert unknown({'weight-decay': 0.1, 'input_size': [32, 32], 'train_size_schedule': 'none'}, train_parser) == [
        'weight-decay',
        'input_size',
        'train_size_schedule',
    ]


def test_a_number_without_a_point_is_a_string_that_train_py_converts(train_parser):
    config = yaml.safe_load('lr: 1e-3')
    assert config == {'lr': '1e-3'} and unknown(config, train_parser) == []
    parser = copy.deepcopy(train_parser)
    parser.set_defaults(**config)  # as train.py does it
    assert parser.parse_args([]).lr == 0.001


def test_commands_of_the_readme_are_understood(train_parser):
    """Every train.py line of train_configs/README.md parses, and its model builds with its arguments."""
    readme = (FOLDER / 'README.md').read_text()
    commands = re.findall(r'^(?:python|torchrun).* train\.py (.*)$', readme, re.MULTILINE)
    assert len(commands) >= 15
    kwargs = []
    for command in commands:
        words = shlex.split(command, comments=True)
        config = CONFIGS[Path(words[words.index('--config') + 1]).stem]
        del words[words.index('--config') : words.index('--config') + 2]
        args = train_parser.parse_args(words)
        if args.model_kwargs:
            config = {**config, 'model_kwargs': args.model_kwargs}
            kwargs.append(args.model_kwargs)
        create(config, device='meta')
    assert [1, 4] in [k.get('scales') for k in kwargs]
    assert 0.375 in [k.get('rd_ratio') for k in kwargs]
