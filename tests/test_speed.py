"""`timm-msar speed` times the real networks, and prints a table that a reader can recompute."""

import re

import pytest
import torch

from timm_msar.cli import speed
from timm_msar_command import main


def test_what_is_counted():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.ReLU(), torch.nn.Flatten())
    images = torch.randn(2, 3, 8, 8)
    one = speed.Contestant('', model, images)
    one.count(training=True)
    # The images, the output of the ReLU, the log-probabilities, the targets and the total weight of the loss.
    assert one.kept == 4 * images.numel() + 4 * 2 * 4 * 64 + 4 * 2 * 4 * 64 + 2 * 8 + 4
    # Convolution, ReLU, softmax and loss, each forwards and backwards, and the gradient of the loss itself.
    assert one.operators == {True: 2 * 4 + 1}


def test_every_ratio_follows_from_the_printed_times(capsys):
    operators = []
    for options, kind in (([], 'float32'), (['--amp'], 'bfloat16 autocast')):
        words = ['speed', 'resnet18_msar', '--rounds', '1', '--img-size', '32', '--batch-size', '2', '--device', 'cpu']
        assert main(words + options) == 0
        out = capsys.readouterr().out
        assert f'batch 2, 32 px, channels_last, {kind}, medians in 1 rounds, on cpu' in out
        cell = r' ([\d.]+) \| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \| (\d+) \|'
        names, *columns = zip(*re.findall(rf'^\| (\w*res.*?) \|{cell}{cell} (\d+) \|$', out, re.M))
        assert names == ('resnet18', 'seresnet18', 'resnet18_msar, scales=[1]', 'resnet18_msar')
        numbers = torch.tensor([[float(number) for number in column] for column in columns])
        for ms, *ratios, _ in (numbers[:5], numbers[5:10]):
            for ratio in ratios:  # the quartiles of one round are its ratio
                torch.testing.assert_close(ratio, ms / ms[1], atol=0.011, rtol=0)
        operators.append(numbers[[4, 9]])
    (inference, training), with_casts = operators
    assert (inference < training).all() and (operators[0] < with_casts).all()


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['cifar_resnet20_msar'], 'error: cifar_resnet20_msar is none of resnet18_msar, resnet34_msar'),  # of timm's
        (['--compile', 'some-mode'], 'some-mode'),
    ],
)
def test_a_network_or_mode_that_is_not_there(words, message, capsys):
    assert main(['speed', 'resnet18_msar', *words]) == 1
    assert message in capsys.readouterr().err
