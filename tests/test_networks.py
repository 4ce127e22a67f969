"""Every network as a timm model: arguments, features, tools, and the formats that models are taken to."""

import json
import re

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BlurPool2d
from timm.models import create_feature_extractor, group_parameters, save_for_hf

from timm_msar import MultiScaleRecalibration

NETWORKS = {  # the plain network, blocks, stages
    'resnet18_msar': ('resnet18', 8, 4),
    'resnet34_msar': ('resnet34', 16, 4),
    'resnet50_msar': ('resnet50', 16, 4),
    'resnext50_msar': ('resnext50_32x4d', 16, 4),
    'cifar_resnet20_msar': ('cifar_resnet20', 9, 3),
    'cifar_resnet32_msar': ('cifar_resnet32', 15, 3),
    'cifar_resnet56_msar': ('cifar_resnet56', 27, 3),
    'cifar_densenet100_msar': ('cifar_densenet100', 48, 3),
    'cifar_densenet190_msar': ('cifar_densenet190', 93, 3),
}
CIFAR = [name for row in NETWORKS.items() for name in (row[0], row[1][0]) if name.startswith('cifar')]
# The first of each family; the others differ in depth and width alone.
KINDS = list({re.sub(r'\d', '', name): name for name in reversed(NETWORKS)}.values())
SMALL = [name for name in KINDS if name != 'resnext50_msar']  # which differs from resnet18_msar in its block alone


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def images(name, batch=2, chans=3):
    torch.manual_seed(1)
    return torch.randn(batch, chans, *((32, 32) if name.startswith('cifar') else (64, 96)))


def randomise(model):
    """Give norms weights that are nothing special: timm starts the last of each block at 0, which hides the gates."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, MultiScaleRecalibration)]


def test_every_network_is_tested():
    assert {*timm.list_models('*_msar'), *timm.list_models('cifar_*')} == {*NETWORKS, *CIFAR}


def test_every_warm_tag_prepares_images_as_the_plain_network_whose_weights_it_takes():
    tags = timm.list_pretrained('*_msar.warm_*')
    assert {tag.partition('.')[0] for tag in tags} == {name for name in NETWORKS if name not in CIFAR}
    fields = 'mean std input_size test_input_size crop_pct test_crop_pct crop_mode pool_size interpolation num_classes'
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        source = timm.get_pretrained_cfg(cfg.hf_hub_id.removeprefix('timm/'))
        assert cfg.hf_hub_id == f'timm/{source.architecture}.{source.tag}'
        assert source.architecture == NETWORKS[cfg.architecture][0]
        for field in fields.split():
            assert getattr(cfg, field) == getattr(source, field), (tag, field)
        assert cfg.license == (source.license or 'apache-2.0')
        if timm.get_pretrained_cfg(cfg.architecture).tag == cfg.tag:  # without a tag both have the same weights
            assert timm.get_pretrained_cfg(source.architecture).tag == source.tag
    for name in CIFAR:
        cfg = timm.get_pretrained_cfg(name)  # of CIFAR-10, as most have it
        assert (cfg.mean, cfg.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), name


@pytest.mark.parametrize('name', NETWORKS)
def test_a_layer_in_every_block(name):
    assert len(layers_of(create(name, device='meta'))) == NETWORKS[name][1]


@pytest.mark.parametrize('name', KINDS)
def test_arguments_reach_the_layers_and_come_back_from_disk(name, tmp_path):
    kwargs = {'scales': [1, 3], 'rd_ratio': 0.5, 'strategy': 'sliding', 'num_classes': 7, 'in_chans': 1}
    if 'densenet' in name:
        kwargs['multi_level'] = False
    model = create(name, **kwargs).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['scales'] == [1, 3]
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    for layer in layers_of(loaded):
        assert layer.scales == [1, 3]
        assert layer.strategy == 'sliding'
        assert layer.gate[0].fc1.out_channels == 2 * max(1, int(0.5 * layer.channels / 2))
        assert 'densenet' not in name or layer.source_channels == layer.channels == 12
    x = images(name, chans=1)
    assert torch.equal(loaded(x), model(x))


def test_multi_level_gates_see_every_feature_fed_to_the_layer():
    layers = layers_of(create('cifar_densenet100_msar', device='meta'))
    assert [layer.source_channels for layer in layers[:3]] == [24, 36, 48]
    assert all(layer.channels == 12 for layer in layers)


def test_the_activations_of_a_gate_are_those_asked_for():
    layer = MultiScaleRecalibration(8, scales=(1,), act_layer=nn.SiLU, gate_layer='hard_sigmoid').eval()
    gate, x = layer.gate[0], torch.randn(2, 8, 4, 4)
    hidden = F.silu(gate.bn1(gate.fc1(x.mean((2, 3), keepdim=True))))
    torch.testing.assert_close(layer(x), x * F.hardsigmoid(gate.bn2(gate.fc2(hidden))))


def test_the_gate_recalibrates_the_second_convolution():
    """Figure 2: after BN in a basic block, after BN and ReLU of the 3×3 convolution in a bottleneck block."""
    seen = {}
    for name, path in (
        ('resnet18_msar', 'layer1.0'),
        ('resnext50_msar', 'layer2.1'),
        ('cifar_resnet20_msar', 'stages.1.1'),
    ):
        model = create(name).eval()
        block = model.get_submodule(path)
        block.bn2.register_forward_hook(lambda m, i, out: seen.update(bn2=out.clone()))
        block.se.register_forward_hook(lambda m, i, out: seen.update(before=i[0].clone(), after=out.clone()))
        following = block.conv3 if name == 'resnext50_msar' else block.act2
        following.register_forward_pre_hook(lambda m, i: seen.update(following=i[0].clone()))
        block.register_forward_pre_hook(lambda m, i: seen.update(shortcut=i[0].clone()))
        model(images(name))
        if name == 'resnext50_msar':
            assert torch.equal(seen['before'], seen['bn2'].relu())
            assert torch.equal(seen['following'], seen['after'])
        else:
            assert torch.equal(seen['before'], seen['bn2'])
            assert torch.equal(seen['following'], seen['after'] + seen['shortcut'])
        torch.testing.assert_close(seen['after'], seen['before'] * sum(block.se.gates(seen['before']).values()) / 3)


@pytest.mark.parametrize('name', SMALL)
def test_features(name):
    model = create(name).eval()
    x = images(name)
    final, features = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model(x), model.forward_head(final))
    for kwargs in ({}, {'feature_cls': 'getter'}):
        wrapped = create(name, features_only=True, out_indices=tuple(range(len(features))), **kwargs).eval()
        assert len(wrapped(x)) == len(features)
        for out, expected, channels, reduction in zip(
            wrapped(x), features, wrapped.feature_info.channels(), wrapped.feature_info.reduction(), strict=True
        ):
            torch.testing.assert_close(out, expected)
            assert out.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)
    assert torch.equal(create(name, features_only=True, out_indices=(1, -1)).eval()(x)[1], features[-1])
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], features[1])


@pytest.mark.parametrize('name', CIFAR)
def test_cifar_features_are_one_a_stride(name):
    """Decoders such as segmentation_models.pytorch's take a network apart by these numbers."""
    info = create(name, device='meta', features_only=True).feature_info
    assert info.reduction() == [1, 2, 4]
    assert info.module_name() == ['stages.0', 'stages.1', 'stages.2']


@pytest.mark.parametrize('name', CIFAR)
@torch.no_grad()
def test_the_children_without_the_last_are_the_network_without_its_classifier(name):
    model = create(name, drop_rate=0.5).eval()
    x = images(name)[..., :16, :16]
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert expected.shape == (2, model.num_features)
    assert torch.equal(nn.Sequential(*list(model.children())[:-1])(x), expected)
    assert torch.equal(nn.Sequential(*model.children())(x), model(x))
    model.reset_classifier(3)
    assert torch.equal(nn.Sequential(*list(model.children())[:-1])(x), expected)


@pytest.mark.parametrize('name', SMALL)
def test_pruned_to_a_feature(name):
    model = create(name).eval()
    x = images(name)
    expected = model.forward_intermediates(x, intermediates_only=True)
    for index in range(len(expected)):
        pruned = create(name).train()
        assert pruned.prune_intermediate_layers([index]) == [index]
        pruned.forward_intermediates(x, indices=[index], intermediates_only=True)[0].sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())
        out = create(name).eval()
        out.prune_intermediate_layers([index])
        assert torch.equal(out.forward_intermediates(x, indices=[index], intermediates_only=True)[0], expected[index])
    whole = create(name).eval()
    whole.prune_intermediate_layers([index], prune_head=False)
    assert torch.equal(whole(x), model(x))
    with pytest.raises((ValueError, AssertionError), match='ind'):
        model.forward_intermediates(x, indices=[9])


def test_blocks_are_dropped_in_training_alone_the_last_one_most_often():
    x, model = images('cifar_resnet20_msar'), create('cifar_resnet20_msar', drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage if block.drop_path]
    assert rates == pytest.approx([0.4 * i / 8 for i in range(1, 9)])
    assert torch.equal(model.eval()(x), create('cifar_resnet20_msar').eval()(x))
    assert not torch.equal(model.train()(x), model(x))


def test_dropout_is_of_what_the_classifier_sees_or_of_new_features_behind_their_gates():
    def are_half(out, expected):
        kept = out != 0
        return torch.equal(out[kept], 2 * expected[kept]) and 0.4 < kept.float().mean() < 0.6

    for name, kwargs in (('cifar_resnet20_msar', {}), ('cifar_densenet100_msar', {'depth': 2})):
        x = images(name, batch=8)[..., :16, :16]
        model, whole = (create(name, drop_rate=rate, **kwargs).train() for rate in (0.5, 0))
        features = model.forward_features(x)
        assert torch.equal(features, whole.forward_features(x))
        assert are_half(model.forward_head(features, pre_logits=True), whole.forward_head(features, pre_logits=True))
        assert torch.equal(model.eval()(x), whole.eval()(x))
    kwargs = {'depth': 1, 'multi_level': False}  # these gates would see what is dropped before them
    model, whole = (create('cifar_densenet100_msar', proj_drop_rate=rate, **kwargs).train() for rate in (0.5, 0))
    x = torch.randn(2, 24, 16, 16)
    out, expected = model.stages[0](x), whole.stages[0](x)
    assert torch.equal(out[:, :24], x) and are_half(out[:, 24:], expected[:, 24:])
    assert torch.equal(model.eval().stages[0](x), whole.eval().stages[0](x))


@pytest.mark.parametrize(
    'kwargs', [{'drop_path_rate': 0.5}, {'drop_block_rate': 0.2}, {'aa_layer': BlurPool2d}], ids=lambda k: next(iter(k))
)
def test_a_bottleneck_block_has_every_layer_of_timms(kwargs):
    def output(model):
        torch.manual_seed(1)
        return model.train()(torch.randn(4, 3, 128, 128))

    given = {'layers': (1, 1, 1, 1), 'zero_init_last': False}
    source, model, without = (
        create('resnet50', **given, **kwargs),
        create('resnet50_msar', **given, **kwargs),
        create('resnet50_msar', **given),
    )
    model.load_state_dict(source.state_dict())  # gates of 0.5, also in training
    without.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(output(model), output(source))
    assert not torch.equal(output(model), output(without))


@pytest.mark.parametrize('name', SMALL)
def test_gradient_checkpointing_computes_every_block_twice_and_the_same(name):
    x = images(name)
    gradients, calls = [], []
    for enable in (False, True):
        model = create(name).train()
        for layer in layers_of(model):
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
        model.set_grad_checkpointing(enable)
        for out in (model(x), model.forward_intermediates(x, intermediates_only=True)[-1]):
            calls.clear()
            out.square().mean().backward()
            assert len(calls) == enable * len(layers_of(model))
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('name', NETWORKS)
def test_parameter_groups_follow_the_blocks(name):
    for network in {name, NETWORKS[name][0]} & {*NETWORKS, *CIFAR}:
        model = create(network, device='meta')
        fine = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        for gate in (n for n in fine if '.se.' in n):
            block = gate.split('.se.')[0]
            assert fine[gate] == fine[next(n for n in fine if n.startswith(f'{block}.conv2'))]
        assert len(set(coarse.values())) == NETWORKS[name][2] + 2  # the stem and the head


@pytest.mark.parametrize(
    ('name', 'strategy'), [*((name, 'regional') for name in SMALL), ('cifar_resnet20_msar', 'sliding')]
)
def test_fx(name, strategy):
    model = create(name, strategy=strategy)
    torch.fx.symbolic_trace(model.train())
    x, traced = images(name), torch.fx.symbolic_trace(model.eval())
    (out,) = create_feature_extractor(model, ['fc'])(x).values()
    torch.testing.assert_close(out, model(x))
    for size in (x, x[..., :24, :20]):
        assert torch.equal(traced(size), model(size))


@pytest.mark.parametrize('name', KINDS)
def test_device_and_dtype(name):
    model = create(name, device='meta', dtype=torch.bfloat16)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert all(t.device.type == 'meta' and t.dtype == torch.bfloat16 for t in tensors)
    model.reset_classifier(3)
    assert all(p.device.type == 'meta' and p.dtype == torch.bfloat16 for p in model.get_classifier().parameters())
    out = create(name, dtype=torch.bfloat16).eval()(images(name).bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize('name', KINDS)
def test_bad_input(name):
    for error, kwargs in ((TypeError, {'scale': [1]}), (ValueError, {'scales': []}), (ValueError, {'strategy': 'x'})):
        with pytest.raises(error, match=next(iter(kwargs))):
            create(name, **kwargs)
