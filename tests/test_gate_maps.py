"""gates() against the slow reference and against what the layers put out, and asymmetry() against a slow loop."""

import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import slow_reference
import timm
import torch
from test_networks import create, randomise
from torch import nn

import timm_msar
from timm_msar import MultiScaleRecalibration, asymmetry, gates

NETWORKS = {
    'cifar_resnet20_msar': {},
    'cifar_densenet100_msar': {'depth': 2},
    'cifar_densenet100_msar, single-level': {'depth': 2, 'multi_level': False},
    'resnext50_msar': {'layers': (1, 1, 1, 1)},
    'resnet18': {'block_args': {'attn_layer': MultiScaleRecalibration}},
}


def network(name='cifar_resnet20_msar', **kwargs):
    """A network whose gates are nothing special, as after training, and images for it."""
    model = randomise(create(name.partition(',')[0], num_classes=5, **NETWORKS.get(name, {}), **kwargs)).train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(4, 3, 32, 32))
    return model.eval(), torch.randn(3, 3, 32, 32)


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MultiScaleRecalibration)}


@pytest.mark.parametrize('name', NETWORKS)
def test_gates_are_the_papers_and_what_the_layers_multiply_by(name):
    model, images = network(name)
    inputs, outputs = {}, {}
    for layer_name, layer in layers_of(model).items():

        def keep(layer, args, output, layer_name=layer_name):
            inputs[layer_name], outputs[layer_name] = [x.clone() for x in args], output.clone()

        layer.register_forward_hook(keep)
    with torch.no_grad():
        model(images)
    found = gates(model, images)
    assert list(found) == list(outputs) == list(layers_of(model)) and len(found) >= 4
    for layer_name, z in found.items():
        assert z.shape == outputs[layer_name].shape and 0 <= z.min() < z.max() <= 1
        torch.testing.assert_close(inputs[layer_name][0] * z, outputs[layer_name], rtol=1e-4, atol=1e-6)
    last = list(found)[-1]
    expected = slow_reference.gates(model.get_submodule(last), *inputs[last])
    torch.testing.assert_close(found[last].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
def test_scales_by_themselves(strategy):
    model, images = network(scales=(1, 2, 4), strategy=strategy)
    mean, scales = gates(model, images), gates(model, images, per_scale=True)
    assert list(mean) == list(scales)
    for name, z in scales.items():
        assert list(z) == [1, 2, 4]
        torch.testing.assert_close((z[1] + z[2] + z[4]) / 3, mean[name])
        assert (z[1] == z[1][:, :, :1, :1]).all()
    z = scales['stages.2.2.se']
    assert (z[4] != z[4][:, :, :1, :1]).any()


def test_one_forward_pass_that_changes_nothing():
    model, images = network(drop_path_rate=0.5)
    expected = gates(model, images)
    model.train()
    model.stages[0].eval()  # as if frozen
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    found = gates(model, images)
    assert len(calls) == 1
    assert all(torch.equal(found[name], z) and not z.requires_grad for name, z in expected.items())
    with pytest.raises(RuntimeError):
        gates(model, images[:, :2])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    found['stages.2.2.se'] * torch.ones(1, requires_grad=True)  # no inference tensor: may be used under autograd


def test_in_threads_beside_a_training_step():
    model, _ = network()
    batches = [torch.randn(2, 3, 32, 32) for _ in range(8)]
    expected = [gates(model, images) for images in batches]
    model.train()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(partial(gates, model), batches))
    assert all(module.training for module in model.modules())
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], z) for name, z in other.items())


def test_a_compiled_network():
    model, images = network(layers=(1, 1, 1), channels=(8, 8, 16))
    expected = gates(model, images)
    assert [z.shape[1] for z in expected.values()] == [8, 8, 16]
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        compiled(images)
    for name, z in gates(compiled, images).items():
        torch.testing.assert_close(z, expected[name])


def test_features_and_keyword_arguments():
    features = timm.create_model('resnet18_msar', features_only=True, out_indices=(1, 2))
    assert list(gates(features, torch.randn(1, 3, 64, 64))) == [f'layer{i}.{j}.se' for i in (1, 2) for j in (0, 1)]

    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.se = MultiScaleRecalibration(4, source_channels=2)

        def forward(self, x):
            return self.se(x[:, :4], source=x[:, 4:])

    model, x = ByKeyword().eval(), torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(x[:, :4] * gates(model, x)['se'], model(x))


@pytest.mark.parametrize('scales', [(1, 2, 4), (3,)], ids=str)
def test_asymmetry_is_its_formula(scales):
    model, images = network(scales=scales)
    maps, found = gates(model, images), asymmetry(model, images)
    assert list(found) == list(maps)
    for name, z in maps.items():
        if not name.startswith('stages.2'):  # the others are slow
            continue
        values = z.double().flatten(2).tolist()
        over_space = total = 0.0
        for c in range(z.shape[1]):
            over_space += statistics.fmean(statistics.pvariance(image[c]) for image in values)
            total += statistics.pvariance([gate for image in values for gate in image[c]])
        assert found[name] == pytest.approx(over_space / total, rel=1e-9)
        assert 0.01 < found[name] < 0.99


def test_asymmetry_is_0_without_and_1_with_nothing_but_space():
    model, images = network(scales=(1,))
    assert set(asymmetry(model, images).values()) == {0}
    warm = timm.create_model('cifar_resnet20_msar')  # closed gates: 0.5 everywhere
    timm_msar.start_from_plain(warm, timm.create_model('cifar_resnet20').state_dict())
    assert set(asymmetry(warm, images).values()) == {0}
    model, images = network()
    same = images[:1].expand(3, -1, -1, -1)
    assert list(asymmetry(model, same).values()) == pytest.approx([1] * 9)


def test_what_has_no_answer_is_told():
    plain = timm.create_model('cifar_resnet20')
    for function in (gates, asymmetry):
        with pytest.raises(ValueError, match=r'^CifarResNet has no MultiScaleRecalibration layer'):
            function(plain, torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match='needs at least two'):
        asymmetry(network()[0], torch.randn(1, 3, 32, 32))
