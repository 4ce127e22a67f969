"""`timm-msar speed` times the real networks, in turn, and prints medians."""

import re

import pytest
import timm
import torch

from timm_msar import cli
from timm_msar.cli import speed


def test_networks_are_timed_in_turn(monkeypatch):
    order = []
    for what in ('infer', 'train'):
        original = getattr(speed, what)

        def recorded(model, *args, what=what, original=original):
            order.append((what, 'plain' if model.stages[0][0].se is None else 'msar'))
            original(model, *args)

        monkeypatch.setattr(speed, what, recorded)
    networks = [('cifar_resnet20', {}), ('cifar_resnet20_msar', {'scales': [1]})]
    times = speed.measure(networks, torch.randn(2, 3, 32, 32), rounds=2)
    assert order == 3 * [('infer', 'plain'), ('train', 'plain'), ('infer', 'msar'), ('train', 'msar')]
    assert [name for name, _, _ in times] == ['cifar_resnet20', 'cifar_resnet20_msar, scales=[1]']
    assert all(len(seconds) == 2 and min(seconds) > 0 for _, *both in times for seconds in both)


def test_a_training_step_computes_gradients_and_leaves_the_weights():
    model = timm.create_model('cifar_resnet20_msar')
    before = {name: p.clone() for name, p in model.named_parameters()}
    gradients = []
    model.stages[0][0].se.scale['4'].fc1.weight.register_hook(gradients.append)
    speed.train(model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), torch.randn(2, 3, 32, 32))
    assert gradients[0].abs().max() > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_table_gives_medians_and_their_ratio_to_timms_se_network(monkeypatch, capsys):
    names = [name for group in speed.NETWORKS for name, _ in group]
    seconds = {name: ([0.002, 0.001, 0.5], [0.02, 0.01, 0.5]) for name in names}
    seconds['resnet18_msar'] = ([0.003, 0.001, 0.9], [0.9, 0.0242, 0.001])
    monkeypatch.setattr(speed, 'measure', lambda *_: [(name, *seconds[name]) for name in names])
    assert cli.main(['speed', '--device', 'cpu', '--rounds', '3', '--batch-size', '2']) == 0
    out = capsys.readouterr().out
    assert 'batch 2, 224 px, float32, channels_last, 3 rounds, on cpu' in out
    assert '| seresnet18 | 2.0 | 1.00 | 20.0 | 1.00 |' in out
    assert '| resnet18_msar | 3.0 | 1.50 | 24.2 | 1.21 |' in out


def test_command_times_every_network(capsys):
    assert cli.main(['speed', '--device', 'cpu', '--rounds', '1', '--batch-size', '1', '--img-size', '64']) == 0
    rows = re.findall(
        r'^\| (\w*res\w+)(?:, scales=\[1\])? \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$', capsys.readouterr().out, re.M
    )
    assert rows == [name for group in speed.NETWORKS for name, _ in group]


@pytest.mark.parametrize(
    ('argument', 'value', 'message'),
    [
        ('--batch-size', '0', '--batch-size must be at least 1, not 0.'),
        ('--img-size', '32', '--img-size must be at least 64, not 32.'),
        ('--rounds', '0', '--rounds must be at least 1, not 0.'),
        ('--device', 'gpu', '--device gpu cannot be used: Expected one of cpu'),
    ],
)
def test_bad_arguments_are_one_sentence(argument, value, message, capsys):
    assert cli.main(['speed', argument, value]) == 1
    assert capsys.readouterr().err.startswith(f'timm-msar speed: error: {message}')
