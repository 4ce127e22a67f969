"""`timm-msar speed` times the real networks, in turn, and prints medians."""

import re
from collections import Counter
from functools import partial

import pytest
import timm
import torch

from timm_msar import cli
from timm_msar.cli.speed import COUNTERPARTS, Contestant, FigureTwo, kept_for_backward, measure, operators


@pytest.fixture
def shallow(monkeypatch):
    """Networks of one block a stage, which are made and run sooner."""
    monkeypatch.setattr(timm, 'create_model', partial(timm.create_model, layers=(1, 1, 1, 1)))


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
    turns = both, both[::-1]  # each round another one is the first
    assert order[-8:] == [(what, one.name) for what in ('infer', 'train') for turn in turns for one in turn]
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


def test_table_gives_medians_of_times_and_of_ratios_to_timms_se_network_within_a_round(shallow, monkeypatch, capsys):
    def measured(contestants, images, rounds):
        for one in contestants:
            one.inference, one.training = [0.002, 0.001, 0.5], [0.02, 0.01, 0.5]
            one.memory, one.operators = 2_000_000, 88
            if one.name == 'resnet18_msar':
                one.inference, one.training = [0.003, 0.001, 0.9], [0.9, 0.0242, 0.001]

    monkeypatch.setattr('timm_msar.cli.speed.measure', measured)
    assert cli.main(['speed', '--device', 'cpu', '--rounds', '3', '--batch-size', '2']) == 0
    out = capsys.readouterr().out
    assert 'batch 2, 224 px, float32, channels_last, medians of times and of ratios in 3 rounds, on cpu' in out
    assert '| seresnet18 | 2.0 | 1.00 | 20.0 | 1.00 | 2 | 88 |' in out
    assert '| resnet18_msar | 3.0 | 1.50 | 24.2 | 2.42 | 2 | 88 |' in out
    assert rows_of(out) == [row for name in COUNTERPARTS for row in group_of(name)]


def rows_of(table):
    return re.findall(r'^\| (\w*res.*?) \|(?: [\d.]+ \|){6}$', table, re.M)


def group_of(name):
    return [*COUNTERPARTS[name], f'{name}, scales=[1]', name, f'{name}, Figure 2']


@pytest.mark.parametrize(
    ('options', 'setting', 'dtype', 'memory_format'),
    [
        (['--amp', '--contiguous'], 'bfloat16 autocast, contiguous', torch.bfloat16, torch.contiguous_format),
        (['--compile'], 'float32, channels_last, compiled', torch.float32, torch.channels_last),
    ],
    ids=['amp and contiguous', 'compile'],
)
def test_every_call_of_every_network_is_as_the_options_say(
    options, setting, dtype, memory_format, shallow, monkeypatch, capsys
):
    calls = Counter()

    def compiled(model):  # what it does, without minutes of compiling
        model = torch.nn.Sequential(model)
        model.register_forward_hook(lambda model, *_: calls.update([('compiled', model.training)]))
        return model

    def note(module, inputs, output):
        if getattr(module, 'kernel_size', None) == (7, 7) and len(output) == 2:  # operators are counted of one image
            formats = {x.is_contiguous(memory_format=memory_format) for x in (inputs[0], module.weight)}
            calls.update([(module.training, output.dtype, *formats)])

    monkeypatch.setattr(torch, 'compile', compiled)
    command = ['speed', 'resnet18_msar', '--device', 'cpu', '--rounds', '1', '--batch-size', '2', '--img-size', '64']
    with torch.nn.modules.module.register_module_forward_hook(note):
        assert cli.main([*command, *options]) == 0
    # Five networks, twice in inference and three times in training, of which the first calls do not count.
    expected = {(False, dtype, True): 10, (True, dtype, True): 15}
    if '--compile' in options:
        expected |= {('compiled', False): 10, ('compiled', True): 15}
    assert calls == expected
    out = capsys.readouterr().out
    assert f'batch 2, 64 px, {setting}, medians of' in out
    assert rows_of(out) == group_of('resnet18_msar')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--device', 'meta'], '--device meta cannot be used: '),
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
