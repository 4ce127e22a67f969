"""The recipes of train_configs/ say what the paper says, and the commands of its README are train.py's."""

import copy
import random
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
import torch
import yaml
from PIL import Image

import timm_msar

FOLDER = Path(__file__).parents[1] / 'train_configs'
README = (FOLDER / 'README.md').read_text(encoding='utf-8')
RECIPES = {path.stem: yaml.safe_load(path.read_text(encoding='utf-8')) for path in sorted(FOLDER.glob('*.yaml'))}


def test_recipes_leave_network_and_images_to_the_command_line_and_the_network():
    assert list(RECIPES) == ['cifar_densenet', 'cifar_resnet', 'finetune', 'in1k', 'in1k_a2']
    others = {'model', 'model_kwargs', 'num_classes', 'input_size', 'img_size', 'mean', 'std', 'crop_pct'}
    for recipe in RECIPES.values():
        assert recipe['device_modules'] == ['timm_msar']
        assert not others & recipe.keys() and 'interpolation' not in recipe


@pytest.mark.parametrize(
    ('name', 'model', 'lr', 'phases', 'batch'),
    [
        ('cifar_resnet', 'cifar_resnet20_msar', 0.1, (80, 40, 40), 128),
        ('cifar_densenet', 'cifar_densenet100_msar', 0.1, (150, 75, 75), 64),
        ('in1k', 'resnet18_msar', 0.6, (30, 30, 30, 10), 1024 // 8),
    ],
)
def test_learning_rate_and_optimizer_are_the_papers(name, model, lr, phases, batch):
    """The rate in force in every epoch, and the decay of every weight, as train.py sets them up from the file."""
    recipe = RECIPES[name]
    optimizer = timm.optim.create_optimizer_v2(
        timm.create_model(model, device='meta'),
        opt=recipe['opt'],
        lr=recipe['lr'],
        weight_decay=recipe['weight_decay'],
        momentum=recipe['momentum'],
        **recipe['opt_kwargs'],
    )
    for group in optimizer.param_groups:
        assert (group['weight_decay'], group['momentum'], group['nesterov']) == (0.0001, 0.9, True)
    scheduler, epochs = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched=recipe['sched'],
        num_epochs=recipe['epochs'],
        decay_milestones=recipe['decay_milestones'],
        decay_rate=recipe['decay_rate'],
        warmup_epochs=recipe['warmup_epochs'],
    )
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    expected = [lr / 10**phase for phase, length in enumerate(phases) for _ in range(length)]
    assert rates == pytest.approx(expected)
    assert recipe['batch_size'] == batch
    assert recipe['smoothing'] == 0  # timm's default is 0.1


@pytest.mark.parametrize('name', ['cifar_resnet', 'cifar_densenet'])
def test_cifar_augmentation_pixel_by_pixel(name):
    """Training images stored padded to 40×40: each of the 81 crops, mirrored or not. A test image is itself."""
    recipe = RECIPES[name]
    model = timm.create_model('cifar_resnet56_msar', device='meta')
    own = timm.data.resolve_data_config(recipe, model=model)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    test = timm.data.create_transform(
        own['input_size'], crop_pct=own['crop_pct'], interpolation=own['interpolation'], normalize=False
    )
    assert (test(Image.fromarray(image)).permute(1, 2, 0).numpy() == image).all()

    train = timm.data.create_transform(
        own['input_size'],
        normalize=False,
        is_training=True,
        scale=recipe['scale'],
        ratio=recipe['ratio'],
        hflip=recipe['hflip'],
        color_jitter=recipe['color_jitter'],
        interpolation=recipe['train_interpolation'],
    )
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y : y + 32, x : x + 32]
            crops[crop.tobytes()] = (y, x, False)
            crops[crop[:, ::-1].tobytes()] = (y, x, True)
    random.seed(0)  # of other draws one in seventy lacks a crop
    torch.manual_seed(0)
    seen = {crops[train(Image.fromarray(padded)).permute(1, 2, 0).numpy().tobytes()] for _ in range(1500)}
    assert seen == set(crops.values())


def table_commands() -> list[str]:
    """What the README's tables stand for: each command with OPTIONS, and each row of the table below it."""
    commands = []
    for block, table in re.findall(r'```bash\n([^`]* OPTIONS\n[^`]*)```\n\n((?:\|.*\n)+)', README):
        rows = re.findall(r'^\| `(.+?)` \|', table, re.MULTILINE)
        commands += [line.replace('OPTIONS', row) for line in block.splitlines() for row in rows]
    return commands


def other_commands() -> list[str]:
    lines = README.replace('\\\n', ' ').splitlines()
    return [line for line in lines if ' train.py --config ' in line and not line.endswith(' OPTIONS')]


@pytest.fixture(scope='module')
def parse(timm_scripts):
    """A function that parses a command as train.py does it, its recipe first."""
    train_parser = runpy.run_path(str(timm_scripts / 'train.py'))['parser']

    def parse(command: str):
        words = shlex.split(command.partition(' train.py ')[2], comments=True)
        assert words[0] == '--config'
        parser = copy.deepcopy(train_parser)
        parser.set_defaults(**RECIPES[Path(words[1]).stem])
        return Path(words[1]).stem, parser.parse_args(words[2:])

    return parse


def create(args):
    kwargs = dict(drop_path_rate=args.drop_path, global_pool=args.gp, **args.model_kwargs)
    return timm.create_model(args.model, num_classes=args.num_classes, device='meta', **kwargs)


def test_the_tables_have_every_row_of_the_paper(parse):
    """Tables 2, 3 and 5 and Section 4.2: the recipe, the network with its gates, and the classes of every row."""
    scales = [(1,), (2,), (4,), (1, 2), (1, 4), (2, 4)]
    rows = {'cifar_resnet': [], 'cifar_densenet': [], 'in1k': []}
    for depth in (20, 32, 56):
        rows['cifar_resnet'] += [(f'cifar_resnet{depth}',), (f'cifar_resnet{depth}_msar', (1, 2, 4))]
    for depth in (100, 190):
        rows['cifar_densenet'] += [(f'cifar_densenet{depth}',), (f'cifar_densenet{depth}_msar', (1, 2, 4))]
    for name, recipe in (('cifar_resnet56_msar', 'cifar_resnet'), ('cifar_densenet100_msar', 'cifar_densenet')):
        rows[recipe] += [(name, scale) for scale in scales]
        rows[recipe].append((name, (1, 2, 4), 'sliding'))
    rows['cifar_densenet'].append(('cifar_densenet100_msar', (1, 2, 4), 'single-level'))
    for plain, name in (('resnet18',) * 2, ('resnet34',) * 2, ('resnext50_32x4d', 'resnext50')):
        rows['in1k'] += [(plain,), (f'{name}_msar', (1,)), (f'{name}_msar', (1, 2, 4))]
    expected = [(recipe, 100, *row) for recipe in ('cifar_resnet', 'cifar_densenet') for row in rows[recipe]]
    expected += [(recipe, None, *row) for recipe in rows for row in rows[recipe]]

    found = []
    for command in table_commands():
        recipe, args = parse(command)
        assert ('cifar100' in args.data_dir) == (args.num_classes == 100)
        row = (recipe, args.num_classes, args.model)
        model = create(args)
        gates = [m for m in model.modules() if isinstance(m, timm_msar.MultiScaleRecalibration)]
        if gates:
            row += (tuple(gates[0].scales),)
            row += ('sliding',) if gates[0].strategy == 'sliding' else ()
            row += ('single-level',) if args.model_kwargs.get('multi_level') is False else ()
        assert bool(gates) == ('_msar' in args.model)
        found.append(row)
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_other_commands_of_the_readme_are_understood(parse):
    commands = other_commands()
    recipes = {recipe for recipe, args in map(parse, commands) if create(args)}
    assert recipes == set(RECIPES) - {'cifar_densenet'} and len(commands) >= 10
    # They replace the whole entry of the file, as the files say.
    assert parse('python train.py --config in1k.yaml --opt-kwargs fused=True')[1].opt_kwargs == {'fused': True}
