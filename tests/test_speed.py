"""`timm-msar speed` times the real networks, in turn, and prints medians."""

import re
from collections import Counter
from functools import partial
from statistics import median, quantiles

import timm
import torch

from timm_msar.cli import speed
from timm_msar_command import main


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


def test_every_network_runs_as_the_options_say(monkeypatch, capsys):
    calls = Counter()

    def note(module, inputs, output):
        if getattr(module, 'kernel_size', None) == (7, 7):
            laid_out = all(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], module.weight))
            calls[module.training, output.dtype, laid_out] += 1

    def compiled(model, mode):  # without minutes of compiling
        assert mode == 'some-mode'
        return torch.nn.Sequential(model)

    monkeypatch.setattr(torch, 'compile', compiled)
    monkeypatch.setattr(timm, 'create_model', partial(timm.create_model, layers=(1, 1, 1, 1)))  # made sooner
    timed, measure = [], speed.measure
    monkeypatch.setattr(speed, 'measure', lambda networks, rounds: (timed.extend(networks), measure(networks, rounds)))
    words = 'speed resnet18_msar --device cpu --rounds 3 --img-size 64 --batch-size 2 --amp --compile some-mode'
    with torch.nn.modules.module.register_module_forward_hook(note):
        assert main(words.split()) == 0
    out = capsys.readouterr().out
    # Of four networks a first call, a count and three rounds.
    assert calls == {(False, torch.bfloat16, True): 20, (True, torch.bfloat16, True): 20}
    assert 'batch 2, 64 px, channels_last, bfloat16 autocast, compiled (some-mode), medians in 3 rounds, on cpu' in out
    cell = r' ([\d.]+) \| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \| \d+ \|'
    names, *columns = zip(*re.findall(rf'^\| (\w*res.*?) \|{cell}{cell} \d+ \|$', out, re.M))
    assert names == ('resnet18', 'seresnet18', 'resnet18_msar, scales=[1]', 'resnet18_msar')
    for training, (ms, *ratios) in enumerate((columns[:4], columns[4:])):
        for number, one in enumerate(timed):
            assert float(ms[number]) == round(1e3 * median(one.seconds[training]), 2)
            pairs = zip(one.seconds[training], timed[1].seconds[training])
            low, _, high = quantiles([a / b for a, b in pairs], method='inclusive')
            said = float(ms[number]) / float(ms[1]), low, high  # what a reader divides, and the quartiles
            assert [ratio[number] for ratio in ratios] == [f'{value:.2f}' for value in said]


def test_a_network_that_has_no_plain_one_in_timm(capsys):
    assert main(['speed', 'resnet18_msar', 'cifar_resnet20_msar']) == 1
    assert 'error: cifar_resnet20_msar is none of resnet18_msar, resnet34_msar' in capsys.readouterr().err
