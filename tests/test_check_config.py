"""The check of config files, against a parser made of the kinds of options that train.py has."""

import pytest

from timm_msar import cli

SCRIPT = """
import argparse
from timm.utils import ParseKwargs
parser = argparse.ArgumentParser()
parser.add_argument('--model', default='resnet50', type=str, help='Name of model to train')
parser.add_argument('--lr', type=float, help='learning rate')
parser.add_argument('--epochs', type=int, help='number of epochs')
parser.add_argument('--mean', type=float, nargs='+', help='Mean of the pixels')
parser.add_argument('--scale', type=float, nargs='+', help='Random resize scale')
parser.add_argument('--input-size', type=int, nargs=3, help='Input image dimensions')
parser.add_argument('--head-init-bias', type=float, help='Head initialization bias value')
parser.add_argument('--amp-impl', type=str, default='native', choices=['native', 'apex'], help='AMP implementation')
parser.add_argument('--sync', type=str, nargs='?', const='all', help='what to synchronise')
parser.add_argument('--color-jitter', type=float, default=0.4, help='Color jitter factor')
parser.add_argument('--opt', default='sgd', type=str, help='Optimizer')
parser.add_argument('--sched', type=str, default='cosine', help='LR scheduler')
parser.add_argument('--amp', action='store_true', help='use mixed precision')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
if __name__ == '__main__':
    raise SystemExit('checking must not train')
"""


def check(tmp_path, text):
    (tmp_path / 'train.py').write_text(SCRIPT)
    (tmp_path / 'config.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    return cli.main(['check-config', str(tmp_path / 'train.py'), str(tmp_path / 'config.yaml')])


def test_a_config_that_train_py_takes(tmp_path, capsys):
    text = 'model: cifar_resnet20_msar\nlr: 1e-3\nepochs: null\ncolor_jitter: null\nscale: [0.6, 1]\namp: true\n'
    text += 'input_size: [3, 32, 32]\namp_impl: apex\nsync: all\nhead_init_bias: -6.9\n'
    text += 'opt: lookahead_fusedlamb\nsched: multistep\nmodel_kwargs: {scales: [1]}'
    assert check(tmp_path, text) == 0
    assert 'config.yaml: train.py takes every key' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('epoch: 3', "train.py has no option 'epoch', did you mean epochs?"),
        ('zzz: 3', "train.py has no option 'zzz', its options are listed by train.py --help"),
        ('2024-01-01: 3', 'train.py has no option datetime.date(2024, 1, 1), its options'),
        ('lr: fast', "lr cannot be 'fast': learning rate"),
        ('lr: .nan', 'lr cannot be nan: learning rate'),
        ('lr: inf', "lr cannot be 'inf': learning rate"),
        ('epochs: 1.5', 'epochs cannot be 1.5: number of epochs'),
        ('epochs: -1', 'epochs cannot be -1: number of epochs'),
        ('scale: 0.5', 'scale cannot be 0.5: Random resize scale'),
        ('input_size: [3, 32]', 'input_size cannot be [3, 32]: Input image dimensions'),
        ('input_size: [3, 32, 32, 32]', 'input_size cannot be [3, 32, 32, 32]: Input image dimensions'),
        ('input_size: [3, 32, a]', "input_size cannot be [3, 32, 'a']: Input image dimensions"),
        ('head_init_bias: .nan', 'head_init_bias cannot be nan: Head initialization bias value'),
        ('amp_impl: none', "amp_impl cannot be 'none': AMP implementation"),
        ('sync: [all]', "sync cannot be ['all']: what to synchronise"),
        ('model_kwargs: scales', "model_kwargs cannot be 'scales'"),
        ('scale: [0.5, -1]', 'scale cannot be [0.5, -1]: Random resize scale'),
        ('amp: 1', 'amp cannot be 1: use mixed precision'),
        ('model: 5', 'model cannot be 5: Name of model to train'),
        ('lr: 0.1\nepochs: 3\nlr: 0.2', 'config.yaml has the key lr twice, and train.py takes the last'),
        ('model: cifar_resnet20_mssar', 'timm has no model cifar_resnet20_mssar, did you mean cifar_resnet20_msar?'),
        ('model: cifar_resnet20_msar\nmodel_kwargs: {scaless: [1]}', "unexpected keyword argument 'scaless'"),
        ('model: cifar_resnet20_msar\nmodel_kwargs: {scales: []}', 'scales must be one or more distinct'),
        ('model: cifar_resnet20_msar\nmodel_kwargs: {5: 1}', 'keywords must be strings'),
        ('model: cifar_resnet20_msar\nmean: [0.5, 0.5]', 'does not take these arguments: AssertionError'),
        ('model: resnet18_msar.warm_a2_in1k', 'Invalid pretrained tag (warm_a2_in1k)'),
        ('model: resnet18_msar\nmodel_kwargs: {output_stride: 7}', 'does not take these arguments: AssertionError'),
        ('opt: null', 'opt cannot be None'),
        ('opt: sdg', 'sdg'),
        ('sched: multi_step', "Unknown scheduler 'multi_step'"),
        ('- lr', 'must hold one line `key: value`'),
        ('', 'must hold one line `key: value`'),
        ('lr: [', "cannot read {}: expected the node content, but found '<stream end>' in line 1"),
        ('lr: 2024-13-45', 'cannot read {}: month must be in 1..12'),
        ('lr: !!bool maybe', 'cannot read {}: '),
        (f'lr: {"[" * 5000}', 'cannot read {}: maximum recursion depth exceeded'),
        ('lr: "\xff"'.encode('latin-1'), "cannot read {}: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_faults_are_one_sentence(tmp_path, capsys, text, message):
    assert check(tmp_path, text) == 1
    error = capsys.readouterr().err
    assert message.format(tmp_path / 'config.yaml') in error if 'cannot read {}' in message else message in error
    assert error.count('\n') == 1


def test_not_a_script(tmp_path, capsys):
    assert cli.main(['check-config', str(tmp_path / 'none.py'), 'c.yaml']) == 1
    assert 'there is no script' in capsys.readouterr().err
    (tmp_path / 'broken.py').write_text('hello')
    assert cli.main(['check-config', str(tmp_path / 'broken.py'), 'c.yaml']) == 1
    assert "cannot be run (name 'hello' is not defined)" in capsys.readouterr().err
