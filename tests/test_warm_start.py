"""Plain weights in an MS-SAR network: the same logits to the last bit, and gates that learn from there."""

import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_networks import KINDS, NETWORKS, layers_of, randomise
from timm.models import load_checkpoint
from timm.models.resnet import BasicBlock
from timm.optim import create_optimizer_v2
from timm.utils import freeze, reparameterize_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from timm_msar import MultiScaleRecalibration, start_from_plain


def plain(name, **kwargs):
    """The plain network of one with MS-SAR."""
    torch.manual_seed(0)
    return randomise(timm.create_model(NETWORKS[name][0], **kwargs)).eval()


@pytest.mark.parametrize('name', KINDS)
def test_the_same_logits_to_the_last_bit(name):
    source = plain(name)
    for kwargs in ({}, {'scales': (1, 2, 4, 3, 5), 'strategy': 'sliding'}):
        model = timm.create_model(name, **kwargs).eval()
        assert not model.load_state_dict(source.state_dict()).missing_keys
        for size in ((32, 32), (40, 24)) if name.startswith('cifar') else ((224, 224), (96, 160)):
            x = torch.randn(2, 3, *size)
            assert torch.equal(model(x), source(x))
            for layer in layers_of(model):
                if layer.source_channels == layer.channels:
                    assert all((z == 0.5).all() for z in layer.gates(torch.randn(1, layer.channels, 9, 9)).values())


@pytest.mark.parametrize('precision', ['highest', 'medium'])
@pytest.mark.parametrize('scales', [(1, 2, 4), (1, 2, 3, 4, 6, 12)], ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_closed_gate_is_one_half_in_any_precision_of_products(scales, precision, memory_format):
    """timm's scripts have float32 products in TF32 on a GPU; processors with bfloat16 products round alike."""
    model = timm.create_model('resnet18_msar', scales=scales).eval()
    model.load_state_dict(plain('resnet18_msar').state_dict())
    layer = model.layer4[0].se
    x = torch.randn(2, 512, 14, 14).contiguous(memory_format=memory_format)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(layer(x), x / 2)
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_way_of_loading_a_file(tmp_path):
    source = plain('resnet18_msar')
    path = tmp_path / 'plain.safetensors'
    save_file(source.state_dict(), path)
    x = torch.randn(1, 3, 64, 64)
    overlaid = timm.create_model('resnet18_msar', pretrained=True, pretrained_cfg_overlay={'file': str(path)})
    assert torch.equal(overlaid.eval()(x), source(x))
    initial = timm.create_model('resnet18_msar', checkpoint_path=str(path))
    assert torch.equal(initial.eval()(x), source(x))
    later = timm.create_model('resnet18_msar')
    load_checkpoint(later, str(path))
    assert torch.equal(later.eval()(x), source(x))

    features = timm.create_model(
        'resnet18_msar', pretrained=True, pretrained_cfg_overlay={'file': str(path)}, features_only=True
    ).eval()
    for out, expected in zip(features(x), source.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(out, expected)


def test_another_class_count_and_channels_adapt_as_in_timm(tmp_path):
    path = tmp_path / 'plain.safetensors'
    source = plain('resnet18_msar')
    save_file(source.state_dict(), path)
    kwargs = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(path)}, 'num_classes': 7, 'in_chans': 1}
    model, adapted = (timm.create_model(n, **kwargs).eval() for n in ('resnet18_msar', 'resnet18'))
    x = torch.randn(1, 1, 64, 64)
    assert model(x).shape == (1, 7)
    assert torch.equal(model.forward_features(x), adapted.forward_features(x))


def test_some_gate_weights_missing_is_for_pytorch_to_judge():
    state = timm.create_model('cifar_resnet20_msar').state_dict()
    key = 'stages.1.0.se.gate.1_2_4.fc1.weight'
    del state[key]
    model = timm.create_model('cifar_resnet20_msar')
    before = model.state_dict()[key].clone()
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [key]
    assert torch.equal(model.state_dict()[key], before)
    assert torch.equal(model.state_dict()['stages.1.0.bn2.weight'], state['stages.1.0.bn2.weight'])


@pytest.mark.parametrize('act_layer', ['relu', 'silu', 'gelu', 'hard_swish', 'relu6'])
@pytest.mark.parametrize('name', ['resnet18_msar', 'resnext50_msar'])
def test_the_same_logits_with_every_activation(name, act_layer):
    source = plain(name, act_layer=act_layer)
    model = timm.create_model(name, act_layer=act_layer).eval()
    model.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet50d'])
def test_timms_own_resnets_start_from_plain_weights(name):
    torch.manual_seed(0)
    source = randomise(timm.create_model(name, num_classes=5)).eval()
    model = timm.create_model(name, num_classes=5, block_args={'attn_layer': MultiScaleRecalibration}).eval()
    start_from_plain(model, source.state_dict())
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(model(x), source(x))


def test_a_network_with_folded_norms_starts_too():
    source = plain('resnet18_msar')
    model = reparameterize_model(timm.create_model('resnet18_msar')).eval()
    start_from_plain(model, source.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), source(x))


def test_se_weights_start_without_their_gates_and_it_is_said(caplog):
    source = randomise(timm.create_model('seresnet18', num_classes=5)).eval()
    model = timm.create_model('resnet18_msar', num_classes=5).eval()
    start_from_plain(model, source.state_dict())
    assert 'SE layers' in caplog.text
    assert torch.equal(model.layer2[0].conv1.weight, source.layer2[0].conv1.weight)
    assert torch.equal(model.layer2[0].bn2.weight, 2 * source.layer2[0].bn2.weight)


def test_what_cannot_start_exactly_is_an_error():
    with pytest.raises(ValueError, match='no MultiScaleRecalibration layer'):
        start_from_plain(timm.create_model('resnet18'), {})
    block = torch.nn.Sequential()
    block.conv2, block.se = torch.nn.Conv2d(3, 8, 1), MultiScaleRecalibration(8)
    with pytest.raises(ValueError, match=r'0\.se is in a block Sequential'):
        start_from_plain(torch.nn.Sequential(block), {})

    class Moved(BasicBlock):
        def forward(self, x):  # may have the layer elsewhere
            return super().forward(x)

    with pytest.raises(ValueError, match=r'layer1\.0\.se is in a block Moved'):
        start_from_plain(timm.create_model('resnet18_msar', block=Moved), {})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\)'):  # nothing is completed, nor half of it
        timm.create_model('resnet18_msar', block=Moved).load_state_dict(plain('resnet18_msar').state_dict())


def test_the_loaded_state_dict_is_not_changed():
    source = plain('cifar_resnet20_msar')
    state = source.state_dict()
    copy = {k: v.clone() for k, v in state.items()}
    timm.create_model('cifar_resnet20_msar').load_state_dict(state)
    assert state.keys() == copy.keys()
    assert all(torch.equal(v, copy[k]) for k, v in state.items())


def test_gates_learn_from_the_first_step():
    """Fine-tune on real digits: every gate gets a gradient, the loss falls, and the gates leave 0.5."""
    datasets = pytest.importorskip('sklearn.datasets')
    digits = datasets.load_digits()
    images = F.interpolate(torch.tensor(digits.images[:128], dtype=torch.float32)[:, None] / 16, size=32)
    images, targets = images.repeat(1, 3, 1, 1), torch.tensor(digits.target[:128])
    model = timm.create_model('cifar_resnet20_msar')
    model.load_state_dict(plain('cifar_resnet20_msar').state_dict())
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(12):
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first = loss.item()
            for layer in layers_of(model):
                assert all(group.abs().max() > 0 for group in layer.gate[0].bn2.weight.grad.chunk(3))
        optimizer.step()
    assert loss.item() < 0.7 * first
    moved = []
    for layer in layers_of(model):
        gates = layer.eval().gates(torch.randn(8, layer.channels, 8, 8))
        moved.append(max((z - 0.5).abs().max().item() for z in gates.values()))
    assert min(moved) > 1e-5
    assert max(moved) > 1e-3


def test_gates_without_storage_are_missing():
    """`assign=True` takes tensors for a network on the meta device; the gates' own are none yet."""
    model = timm.create_model('cifar_resnet20_msar', device='meta')
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "stages.0.0.se.gate.1_2_4.fc1.weight"'):
        model.load_state_dict(timm.create_model('cifar_resnet20').state_dict(), assign=True)


def test_loaders_that_fill_in_missing_keys_with_the_networks_own():
    """As `accelerate.load_checkpoint_in_model` does, through PyTorch."""
    source, x = plain('cifar_resnet20_msar'), torch.randn(2, 3, 32, 32)
    model = timm.create_model('cifar_resnet20_msar').eval()
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, source.state_dict(), options=options)
    assert torch.equal(model(x), source(x))
    trained = randomise(timm.create_model('cifar_resnet20_msar')).eval()
    set_model_state_dict(model, trained.state_dict(), options=options)
    assert torch.equal(model(x), trained(x))
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(x), trained(x))


@pytest.mark.parametrize('left_out', [('.gate.',), ('.gate.', 'fc.')], ids=str)
@pytest.mark.parametrize('name', ['cifar_resnet20_msar', 'cifar_densenet100_msar', 'resnext50_msar'])
def test_a_trained_network_keeps_its_gates(name, left_out):
    """Federated learning with local gates, or a part of a checkpoint: everything but the gates is loaded."""
    torch.manual_seed(0)
    model, other = timm.create_model(name), timm.create_model(name)
    x = torch.randn(4, 3, 64, 64)
    for network in (model, other):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        network(x).square().sum().backward()
        optimizer.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part = {k: v.clone() for k, v in other.state_dict().items() if not any(word in k for word in left_out)}
    expected = {**before, **part}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\)'):
        model.load_state_dict(part)
    assert all(
        '.gate.' in key or key.startswith('fc.') for key in model.load_state_dict(part, strict=False).missing_keys
    )
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    for copies in ({k: v.clone() for k, v in model.state_dict().items()}, model.state_dict()):
        copies.update(part)
        model.load_state_dict(copies)
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    set_model_state_dict(model, part, options=StateDictOptions(full_state_dict=True, strict=False))
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    'steps', ['warm', 'folded', 'warm, then frozen', 'batch', 'one image', 'frozen', 'norms in eval']
)
def test_which_gates_are_still_to_be_completed(steps):
    """Those of a warm start, but not those that saw a batch, or whose norms stay as they are while others learn."""
    source, model, x = plain('cifar_resnet20_msar'), timm.create_model('cifar_resnet20_msar'), torch.randn(4, 3, 32, 32)
    gates = {f'{n}.gate': m.gate[0] for n, m in model.named_modules() if isinstance(m, MultiScaleRecalibration)}
    if steps in ('warm', 'warm, then frozen'):
        model.load_state_dict(source.state_dict())
    if 'frozen' in steps:
        freeze(model, list(gates))
        for gate in gates.values():
            gate.fc1.requires_grad_(), gate.fc2.requires_grad_()
    if steps == 'norms in eval':
        for norm in (norm for gate in gates.values() for norm in (gate.bn1, gate.bn2)):
            norm.eval().requires_grad_(False)
    if steps in ('batch', 'one image', 'frozen', 'norms in eval'):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(x[:1] if steps == 'one image' else x).square().sum().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r'Missing key\(s\)'):
            model.load_state_dict(source.state_dict())
        start_from_plain(model, source.state_dict())  # which says what is wanted
    else:
        model = reparameterize_model(model) if steps == 'folded' else model
        model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model.eval()(x), source(x), rtol=0, atol=1e-4 if 'frozen' in steps else 0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_assigned_weights_give_the_gates_their_dtype(dtype):
    source, x = plain('cifar_resnet20_msar').to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    model = timm.create_model('cifar_resnet20_msar').eval()
    model.load_state_dict(source.state_dict(), assign=True)
    assert {t.dtype for t in model.state_dict().values()} == {dtype, torch.int64}
    assert torch.equal(model(x), source(x))


def test_weights_with_other_names_are_for_pytorch_to_judge():
    """Those of blocks that a wrapper holds, for activation checkpointing, and of a pruned layer beside a gate."""
    for change in (
        lambda model: apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BasicBlock)),
        lambda model: prune.identity(model.stages[0][0].bn2, 'weight'),
    ):
        model = timm.create_model('cifar_resnet20_msar')
        change(model)
        model.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match=r'Missing key\(s\)'):
            model.load_state_dict(plain('cifar_resnet20_msar').state_dict())


def test_a_sharded_network_starts_too(tmp_path, monkeypatch):
    """FSDP2 holds DTensors, which have no address of their own."""
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # PyTorch sets one that names the rank, for good
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        source, model = plain('cifar_resnet20_msar'), timm.create_model('cifar_resnet20_msar').eval()
        for block in [*(block for stage in model.stages for block in stage), model]:
            fully_shard(block)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, source.state_dict(), options=options)
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()
