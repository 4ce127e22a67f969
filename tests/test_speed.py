"""`timm-msar speed` times the real networks, in turn, and prints medians."""

import re

import pytest
import timm
import torch

from timm_msar import cli
from timm_msar.cli.speed import COUNTERPARTS, Contestant, FigureTwo, kept_for_backward, measure, operators


def contestant(name='cifar_resnet20_msar', **kwargs):
    return Contestant(name, timm.create_model(name, **kwargs), amp=False, compiled=False)


def test_networks_are_timed_in_turn(monkeypatch):
    order = []
    for what in ('infer', 'train'):
        original = getattr(Contestant, what)

        def recorded(self, images, what=what, original=original):
            order.append((what, self.name))
            original(self, images)

        monkeypatch.setattr(Contestant, what, recorded)
    both = [contestant('cifar_resnet20'), contestant()]
    measure(both, torch.randn(2, 3, 32, 32), rounds=2)
    one_round = [(what, one.name) for what in ('infer', 'train') for one in both]
    assert order[-8:] == 2 * one_round
    for one in both:
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in (one.inference, one.training))


@pytest.mark.parametrize('amp', [False, True])
def test_a_training_step_computes_gradients_and_leaves_the_weights(amp):
    model = timm.create_model('cifar_resnet20_msar')
    before = {name: p.clone() for name, p in model.named_parameters()}
    gradients = []
    model.stages[0][0].se.scale['4'].fc1.weight.register_hook(gradients.append)
    Contestant('', model, amp, compiled=False).train(torch.randn(2, 3, 32, 32))
    assert gradients[0].abs().max() > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_operators_are_counted_without_views():
    # 20 convolutions, 17 ReLUs, 8 additions, max and mean pooling, the classifier; a norm counts twice, as it allocates
    # its statistics by an operator of its own.
    x = torch.randn(1, 3, 224, 224)
    assert operators(timm.create_model('resnet18'), x) == 20 + 17 + 8 + 3 + 2 * 20
    assert operators(timm.create_model('seresnet18'), x) == 136
    assert operators(timm.create_model('resnet18_msar'), x) <= 384


def test_what_is_kept_for_the_backward_pass():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.ReLU(), torch.nn.Flatten())
    images = torch.randn(2, 3, 8, 8)
    one = Contestant('', model, amp=False, compiled=False)
    # The images, for the gradient of the convolution; what the ReLU gave; and the log-probabilities with the targets
    # and the total weight, of 8 and 4 bytes, of the loss.
    kept = kept_for_backward(one, images)
    assert kept == 4 * images.numel() + 4 * 2 * 4 * 64 + 4 * 2 * 4 * 64 + 2 * 8 + 4


@torch.no_grad()
def test_figure_two_is_the_layer_where_regions_are_equal():
    from timm_msar import MultiScaleRecalibration

    ours, drawn = MultiScaleRecalibration(12, rd_ratio=0.5).eval(), FigureTwo(12, rd_channels=2).eval()
    for gate, branch in zip(ours.scale.values(), drawn.branches, strict=True):
        for norm in (gate.bn1, gate.bn2):
            norm.weight.normal_()
        weights = [w for name, w in gate.state_dict().items() if not name.endswith('tracked')]
        own = [w for name, w in branch.state_dict().items() if not name.endswith('tracked')]
        for w, other in zip(own, weights, strict=True):
            w.copy_(other)
    x = torch.randn(2, 12, 8, 16)
    torch.testing.assert_close(drawn(x), ours(x))


def test_table_gives_medians_of_times_and_of_ratios_to_timms_se_network_within_a_round(monkeypatch, capsys):
    def measured(contestants, images, rounds):
        for one in contestants:
            one.inference, one.training = [0.002, 0.001, 0.5], [0.02, 0.01, 0.5]
            one.memory, one.operators = 2_000_000, 88
            if one.name == 'resnet18_msar':
                one.inference, one.training = [0.003, 0.001, 0.9], [0.9, 0.0242, 0.001]

    monkeypatch.setattr('timm_msar.cli.speed.measure', measured)
    assert cli.main(['speed', 'resnet18_msar', '--device', 'cpu', '--rounds', '3', '--batch-size', '2']) == 0
    out = capsys.readouterr().out
    assert 'batch 2, 224 px, float32, channels_last, medians of times and of ratios in 3 rounds, on cpu' in out
    assert '| seresnet18 | 2.0 | 1.00 | 20.0 | 1.00 | 2 | 88 |' in out
    assert '| resnet18_msar | 3.0 | 1.50 | 24.2 | 2.42 | 2 | 88 |' in out


def test_command_times_every_network(capsys):
    options = ['--contiguous', '--amp', '--device', 'cpu', '--rounds', '1', '--batch-size', '2', '--img-size', '64']
    assert cli.main(['speed', *options]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r'^\| (\w*res\w+)(.*?) \|(?: [\d.]+ \|){6}$', out, re.M)
    ours = ((', scales=[1]', ''), ('', ''), (', Figure 2', ''))
    expected = []
    for name, plain_and_se in COUNTERPARTS.items():
        expected += [(other, '') for other in plain_and_se] + [(name, suffix) for suffix, _ in ours]
    assert rows == expected
    assert 'bfloat16 autocast, contiguous' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--device', 'gpu'], '--device gpu cannot be used: Expected one of cpu'),
        (['--batch-size', '9' * 14, '--device', 'cpu'], f'no room on cpu for {"9" * 14} images of 224 pixels: '),
        (['resnet18'], 'resnet18 is not among the networks compared, resnet18_msar, resnet34_msar'),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, capsys):
    assert cli.main(['speed', *arguments]) == 1
    assert capsys.readouterr().err.startswith(f'timm-msar speed: error: {message}')


def test_numbers_that_cannot_be_are_refused(capsys):
    for option, value in (('--batch-size', '1'), ('--img-size', '32'), ('--rounds', '0')):
        with pytest.raises(SystemExit) as info:
            cli.main(['speed', option, value])
        assert info.value.code == 2 and f'argument {option}' in capsys.readouterr().err
