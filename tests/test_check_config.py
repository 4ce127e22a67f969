"""The check of config files, with train.py's own parser."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'tools' / 'check_config.py'


@pytest.fixture(scope='module')
def faults(timm_scripts):
    """A function from the text of a config file to what is wrong with it."""
    parser = runpy.run_path(str(timm_scripts / 'train.py'))['parser']
    parser.exit_on_error = False
    check = runpy.run_path(str(SCRIPT))['faults']
    return lambda text: check(text, parser)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('epoch: 3', 'epoch: train.py has no such option, did you mean epochs?'),
        ('epochs: 1.5', "epochs: argument --epochs: invalid int value: '1.5'"),
        ('epochs: null', 'epochs: it must have a value'),
        ('scale: 0.5', 'scale: it must be like [0.5], not 0.5'),
        ('input_size: [3, 32]', 'input_size: argument --input-size: expected 3 arguments'),
        ('model_kwargs: scales', 'model_kwargs: '),
        ('amp: 1', 'amp: it must be true or false'),
        ('lr: 0.1\nepochs: 3\nlr: 0.2', 'lr stands there twice, and the last one counts'),
        ('- lr', 'it must have a line `key: value`'),
    ],
)
def test_faults(faults, text, message):
    (fault,) = faults(text)
    assert fault.startswith(message)


def test_it_takes_every_recipe(timm_scripts, tmp_path):
    recipes = [str(path) for path in sorted((ROOT / 'train_configs').glob('*.yaml'))]
    command = [sys.executable, str(SCRIPT), str(timm_scripts / 'train.py'), *recipes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('train.py takes every key') == len(recipes)
