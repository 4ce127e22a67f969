"""The recipes of train_configs/ say what the paper says, and the commands of its README are train.py's."""

import copy
import re
import runpy
import shlex
from pathlib import Path

import pytest
import timm
import timm.optim
import timm.scheduler
import yaml

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


def table_commands() -> list[str]:
    """What the README's tables stand for: each command with OPTIONS, and each row of the table below it."""
    commands = []
    for block, table in re.findall(r'```bash\n([^`]* OPTIONS\n[^`]*)```\n\n((?:\|.*\n)+)', README):
        rows = re.findall(r'^\| `(.+?)` \|', table, re.MULTILINE)
        commands += [line.replace('OPTIONS', row) for line in block.splitlines() for row in rows]
    return commands


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


def test_other_commands_of_all_pages_are_understood(parse):
    pages = [FOLDER / 'README.md', FOLDER.parent / 'README.md', *(FOLDER.parent / 'docs').glob('*.md')]
    lines = ''.join(page.read_text(encoding='utf-8') for page in pages).replace('\\\n', ' ').splitlines()
    commands = [line for line in lines if re.match(r'(python|torchrun) .*train.py --config (?!.* OPTIONS$)', line)]
    recipes = {recipe for recipe, args in map(parse, commands) if create(args)}
    assert recipes == set(RECIPES) - {'cifar_densenet'} and len(commands) >= 14
    # They replace the whole entry of the file, as the files say.
    assert parse('python train.py --config in1k.yaml --opt-kwargs fused=True')[1].opt_kwargs == {'fused': True}
