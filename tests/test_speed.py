"""`timm-msar speed` times the real networks, in turn, and prints medians."""

import argparse
import re
from collections import Counter
from functools import partial

import pytest
import timm
import torch

from timm_msar.cli import speed


@pytest.fixture
def table(monkeypatch, capsys):
    """A function that runs the command on networks of one block a stage, which are made sooner."""
    monkeypatch.setattr(timm, 'create_model', partial(timm.create_model, layers=(1, 1, 1, 1)))
    parser = argparse.ArgumentParser()
    speed.add_arguments(parser)

    def run(*options, network='resnet18_msar'):
        speed.main(parser.parse_args([network, '--device', 'cpu', '--rounds', '1', '--img-size', '64', *options]))
        return capsys.readouterr().out

    return run


def test_networks_are_timed_in_turn_and_weights_stay(monkeypatch):
    order, original = [], speed.Contestant.step
    monkeypatch.setattr(
        speed.Contestant, 'step', lambda one, training: (order.append(one.name), original(one, training))
    )
    names = ['cifar_resnet20', 'cifar_resnet20_msar']
    both = [speed.Contestant(name, timm.create_model(name), torch.randn(2, 3, 32, 32), amp=True) for name in names]
    weight, gradients = both[1].eager.stem.conv.weight, []
    before = weight.clone()
    weight.register_hook(gradients.append)
    speed.measure(both, rounds=2)
    assert order == 2 * [*names, *names, *reversed(names)]  # a first call of each, then two rounds
    assert all(len(times) == 2 and min(times) > 0 for one in both for times in one.seconds.values())
    assert gradients[-1].abs().max() > 0 and torch.equal(weight, before)


def test_what_is_counted():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.ReLU(), torch.nn.Flatten())
    images = torch.randn(2, 3, 8, 8)
    one = speed.Contestant('', model, images)
    one.count(training=True)
    # The images, the output of the ReLU, the log-probabilities, the targets and the total weight of the loss.
    assert one.kept == 4 * images.numel() + 4 * 2 * 4 * 64 + 4 * 2 * 4 * 64 + 2 * 8 + 4
    # Convolution, ReLU, softmax and loss, each forwards and backwards, and the gradient of the loss itself.
    assert one.operators == {True: 2 * 4 + 1}


@pytest.mark.parametrize(
    ('options', 'setting', 'dtype'),
    [
        (['--amp'], 'bfloat16 autocast', torch.bfloat16),
        (['--compile', 'some-mode'], 'float32, compiled (some-mode)', torch.float32),
    ],
)
def test_every_network_runs_as_the_options_say(options, setting, dtype, table, monkeypatch):
    calls = Counter()

    def note(module, inputs, output):
        if getattr(module, 'kernel_size', None) == (7, 7):
            laid_out = all(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], module.weight))
            calls[module.training, output.dtype, laid_out] += 1

    def compiled(model, mode):  # without minutes of compiling
        assert mode == 'some-mode'
        return torch.nn.Sequential(model)

    monkeypatch.setattr(torch, 'compile', compiled)
    with torch.nn.modules.module.register_module_forward_hook(note):
        out = table('--batch-size', '2', *options)
    # Of four networks a first call, a count and one round.
    assert calls == {(False, dtype, True): 12, (True, dtype, True): 12}
    assert f'batch 2, 64 px, channels_last, {setting}, medians in 1 rounds, on cpu' in out
    rows = re.findall(
        r'^\| (\w*res.*?) \| [\d.]+ \| ([\d.]+) \| \d+ \| [\d.]+ \| ([\d.]+) \| \d+ \| \d+ \|$', out, re.M
    )
    assert [row[0] for row in rows] == ['resnet18', 'seresnet18', 'resnet18_msar, scales=[1]', 'resnet18_msar']
    assert rows[1][1:] == ('1.00', '1.00')
