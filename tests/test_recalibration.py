"""The layer against a slow reference written from the paper's equations, and its properties."""

import re
import subprocess
import sys
import warnings

import pytest
import slow_reference
import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.utils import freeze, reparameterize_model
from torch.nn.utils import prune

from timm_msar import MultiScaleRecalibration

SMALL = [(8, 8), (7, 7), (3, 3), (2, 2), (1, 1), (5, 9)]
SCALES = [(1, 2, 4), (1,), (4,), (2, 1), (3, 4), (7,)]


def layer_of(channels=6, seed=0, **kwargs):
    """A layer with weights and running statistics that are nothing special."""
    torch.manual_seed(seed)
    layer = MultiScaleRecalibration(channels, **kwargs)
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
    return layer


def mean_gates(layer, x, source=None):
    """Z of Eq. (2)."""
    gates = layer.gates(x, source)
    assert list(gates) == layer.scales
    return sum(gates.values()) / len(gates)


def compare(layer, shape, source_channels=None, training=True):
    """Compare output and gradients with the reference, all in float64."""
    layer = layer.double().train(training)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(2, layer.channels, *shape, dtype=torch.float64, requires_grad=True)
    source = None
    if source_channels is not None:
        source = torch.randn(2, source_channels, *shape, dtype=torch.float64, requires_grad=True)
    wanted_from = [x, *([source] if source is not None else []), *layer.parameters()]
    cotangent = torch.randn(x.shape, dtype=torch.float64)

    expected = x * slow_reference.gates(layer, x, source)
    expected_grads = torch.autograd.grad(expected, wanted_from, cotangent)
    out = layer(x, source)
    grads = torch.autograd.grad(out, wanted_from, cotangent)

    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-8)
    layer.load_state_dict(state)
    torch.testing.assert_close(x * mean_gates(layer, x, source), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('scales', SCALES, ids=str)
@pytest.mark.parametrize('shape', SMALL, ids=str)
def test_regional_is_the_paper(shape, scales, training):
    compare(layer_of(scales=scales), shape, training=training)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('scales', [(1, 2, 4), (3,)], ids=str)
@pytest.mark.parametrize('shape', SMALL, ids=str)
def test_sliding_is_the_paper(shape, scales, training):
    compare(layer_of(channels=3, scales=scales, strategy='sliding'), shape, training=training)


@pytest.mark.parametrize('scales', [(1, 2, 4), (3, 4)], ids=str)
@pytest.mark.parametrize('shape', [(14, 14), (28, 40), (56, 56)], ids=str)
def test_regional_is_the_paper_on_large_maps(shape, scales):
    compare(layer_of(channels=3, scales=scales), shape)


@pytest.mark.parametrize('shape', [(14, 14), (12, 20)], ids=str)
def test_sliding_is_the_paper_on_large_maps(shape):
    compare(layer_of(channels=2, scales=(2, 4), strategy='sliding'), shape)


@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
def test_gates_from_another_tensor(strategy):
    compare(layer_of(channels=4, source_channels=9, strategy=strategy), (7, 7), source_channels=9)


@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
@pytest.mark.parametrize('scales', [(1,), (2,), (4,)], ids=str)
def test_a_change_outside_the_set_leaves_the_gate_untouched(scales, strategy):
    layer = layer_of(scales=scales, strategy=strategy).eval()
    x = torch.randn(1, 6, 14, 14)
    before = mean_gates(layer, x)
    changed = x.clone()
    changed[0, :, 5, 9] += 100
    same = (mean_gates(layer, changed) == before).all(1)[0]
    for h in range(14):
        for w in range(14):
            inside = (5, 9) in slow_reference.coordinate_set(h, w, 14, 14, scales[0], strategy)
            assert same[h, w] == (not inside), (h, w)


@pytest.mark.parametrize('shape', [(7, 7), (8, 8), (28, 40)], ids=str)
@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
def test_memory_format_does_not_matter(strategy, shape):
    layer = layer_of(channels=8, strategy=strategy)
    x = torch.randn(2, 8, *shape)
    expected = layer(x)
    out = layer(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('shape', [(7, 7), (8, 8), (28, 40)], ids=str)
def test_compiled_is_eager(shape):
    for strategy in ('regional', 'sliding'):
        layer = layer_of(strategy=strategy).eval()
        compiled = torch.compile(layer, fullgraph=True)
        x = torch.randn(2, 6, *shape, requires_grad=True)
        expected, out = layer(x), compiled(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
        )


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('shape', [(7, 7), (8, 8), (4, 12)], ids=str)
@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
def test_mapped_over_images_and_differentiated_twice(strategy, shape, memory_format):
    layer = layer_of(strategy=strategy).double().eval()
    x = torch.randn(2, 6, *shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    torch.testing.assert_close(torch.func.vmap(lambda image: layer(image[None])[0])(x), layer(x))
    x = x[:, :, :4, :4].requires_grad_()
    assert torch.autograd.gradcheck(layer, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, x)


def test_bfloat16_autocast_is_close_to_float32():
    layer = layer_of(channels=16).eval()
    x = torch.randn(2, 16, 14, 14)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.03, atol=0.03)


def test_half_precision_does_not_overflow_in_large_regions():
    layer = layer_of(channels=4).half().eval()
    assert layer(torch.full((1, 4, 56, 56), 100.0, dtype=torch.float16)).isfinite().all()


def test_half_precision_counts_more_positions_than_it_has_numbers_for():
    layer = layer_of(channels=4, rd_ratio=12).half().eval()
    large, small = (layer(torch.ones(1, 4, size, size, dtype=torch.float16)) for size in (257, 7))
    torch.testing.assert_close(large[..., :1, :1], small[..., :1, :1], rtol=5e-3, atol=0)


@pytest.mark.parametrize('scales', [(1, 2, 4), (1,)], ids=str)
@pytest.mark.parametrize('shape', [(8, 8), (7, 7), (1, 1)], ids=str)
def test_one_image_in_training(shape, scales):
    """It is normalised by its own statistics, and nothing of it is kept."""
    layer = layer_of(scales=scales).double().train()  # at scale 1 all cells are alike: a norm magnifies rounding
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(1, 6, *shape, dtype=torch.float64)
    expected = slow_reference.gates(layer, x)
    torch.compiler.reset()  # PyTorch counts what other tests compiled
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    for out in (layer(x), compiled(x)):
        torch.testing.assert_close(out, x * expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    running_mean = layer.gate[0].bn1.running_mean.clone()
    layer(torch.randn(2, 6, 8, 8, dtype=torch.float64))
    assert not torch.equal(layer.gate[0].bn1.running_mean, running_mean)


def test_one_warning_says_that_nothing_of_one_image_is_kept():
    code = 'import sys, torch, timm_msar; layer = timm_msar.MultiScaleRecalibration(8)\n'
    code += 'import warnings\nfor _ in range(3):\n  with warnings.catch_warnings(): pass\n'  # so Python forgets it
    code += '  layer(torch.randn(int(sys.argv[1]), 8, 7, 7))'
    for images, times in (('1', 1), ('2', 0), ('0', 0)):
        done = subprocess.run([sys.executable, '-c', code, images], capture_output=True, text=True, check=True)
        assert done.stderr.count('UserWarning: MS-SAR gates saw a batch of one image in training') == times
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        x, layer = torch.randn(1, 6, 7, 7), layer_of()
        layer.eval()(x)
        layer.train()
        for norm in (layer.gate[0].bn1, layer.gate[0].bn2):
            norm.eval()
        layer(x)
        freeze(layer)
        layer.train()(x)
        torch.compile(layer_of(), backend='eager', fullgraph=True)(x)


def test_nothing_of_one_image_is_kept_by_timms_feature_extractor():
    model = timm.models.create_feature_extractor(timm.create_model('cifar_resnet20_msar'), ['fc']).train()
    state = {key: value.clone() for key, value in model.state_dict().items() if 'gate' in key}
    model(torch.randn(1, 3, 32, 32))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items()) and len(state) > 99


def test_gradients_of_one_image_survive_the_next_forward_pass():
    model = timm.create_model('cifar_resnet20_msar').double().train()
    one, four = (torch.randn(batch, 3, 32, 32, dtype=torch.float64) for batch in (1, 4))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(one).square().sum(), parameters)
    loss = model(one).square().sum()
    model(four)
    for grad, wanted in zip(torch.autograd.grad(loss, parameters), expected):
        assert torch.equal(grad, wanted)


def test_one_image_without_running_statistics():
    layer = torch.func.replace_all_batch_norm_modules_(layer_of())
    x = torch.randn(1, 6, 1, 1)
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_weights_do_not_depend_on_how_many_scales_there_are():
    for scales in ((1,), (1, 2), (1, 2, 4)):
        layer = MultiScaleRecalibration(48, scales=scales)
        assert sum(p.numel() for n, p in layer.named_parameters() if 'fc' in n) == 2 * 48 * 48
    assert MultiScaleRecalibration(16, rd_ratio=0.375).gate[0].fc1.out_channels == 3 * 2
    assert MultiScaleRecalibration(2, rd_ratio=0.1).gate[0].fc1.out_channels == 3 * 1


@pytest.mark.parametrize('name', ['resnet18_msar', 'resnext50_msar', 'cifar_resnet20_msar', 'cifar_densenet100_msar'])
def test_the_weights_of_each_scale_start_as_those_of_a_gate_of_its_own(name):
    """PyTorch's fan-out of a grouped convolution is that of all groups together."""
    torch.manual_seed(0)
    layers = [m for m in timm.create_model(name).modules() if isinstance(m, MultiScaleRecalibration)]
    for layer in (layers[-1], MultiScaleRecalibration(48)):
        for fc in (layer.gate[0].fc1, layer.gate[0].fc2):
            wanted = (2 / (fc.out_channels / fc.groups)) ** 0.5
            assert fc.weight.std().item() == pytest.approx(wanted, rel=0.15)


def test_the_keys_that_published_weights_depend_on_name_the_scales():
    state = MultiScaleRecalibration(8, scales=(4, 1)).state_dict()
    assert [k for k in state if k.endswith('weight')] == [f'gate.1_4.{m}.weight' for m in ('fc1', 'bn1', 'fc2', 'bn2')]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) .*gate\.1_2\.fc1'):
        MultiScaleRecalibration(8, scales=(1, 2)).load_state_dict(state)


def test_nothing_in_the_gate_is_special():
    """Tools look modules up by their exact type."""
    kinds = [type(module) for module in MultiScaleRecalibration(8).gate[0].children()]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, timm.layers.Sigmoid]


@pytest.mark.parametrize('convert', [lambda layer: layer, convert_sync_batchnorm])
def test_norms_are_folded_by_timm(convert):
    model = nn.Sequential(convert(layer_of(channels=6)))
    folded = reparameterize_model(model)  # validate.py --reparam calls it in train mode
    x = torch.randn(3, 6, 14, 14)
    expected = model.eval()(x)
    torch.testing.assert_close(folded.eval()(x), expected)
    torch.testing.assert_close(torch.jit.script(reparameterize_model(folded))(x), expected)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())


@pytest.mark.parametrize('size', [8, 7])
def test_the_order_of_the_scales_means_nothing(size):
    layer, other = layer_of(scales=(1, 2, 4)), MultiScaleRecalibration(6, scales=(4, 1, 2)).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, size, size)
    torch.testing.assert_close(other(x), layer.eval()(x))
    assert list(other.gates(x)) == [1, 2, 4]


def test_what_is_no_batch_norm_is_not_folded():
    layer = layer_of(channels=6)
    layer.gate[0].bn1, layer.gate[0].bn2 = nn.GroupNorm(3, 6), nn.BatchNorm2d(18, track_running_stats=False)
    x = torch.randn(3, 6, 14, 14)
    torch.testing.assert_close(reparameterize_model(nn.Sequential(layer)).eval()(x), layer.eval()(x))


def test_the_convolutions_are_called_as_modules():
    """Hooks for visualisation see them, and so does pruning, which computes the weight before each call."""
    layer, called = layer_of(channels=6), []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    layer(torch.randn(3, 6, 14, 14))
    assert set(called) == {name for name, module in layer.named_modules()}
    convs = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        prune.l1_unstructured(conv, 'weight', amount=0.3)
    for _ in range(2):
        layer(torch.randn(3, 6, 14, 14)).sum().backward()
    assert all(conv.weight_orig.grad is not None for conv in convs)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnext50_32x4d', 'ecaresnet26t'])
def test_timm_takes_the_layer_for_any_of_its_resnets(name):
    model = timm.create_model(name, block_args={'attn_layer': MultiScaleRecalibration}, num_classes=3)
    layers = [m for m in model.modules() if isinstance(m, MultiScaleRecalibration)]
    assert len(layers) == sum(len(getattr(model, f'layer{i}')) for i in (1, 2, 3, 4))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())


@pytest.mark.parametrize('scales', [(), (0,), (-1,), (1, 1), (1.5,), (True,), ('1',), 4, None, '124'], ids=repr)
def test_bad_scales(scales):
    with pytest.raises(ValueError, match='scales must be distinct positive integers'):
        MultiScaleRecalibration(8, scales=scales)


@pytest.mark.parametrize('strategy', ['local', ['sliding'], None])
def test_bad_strategy(strategy):
    with pytest.raises(ValueError, match=re.escape(f"strategy must be 'regional' or 'sliding', not {strategy!r}")):
        MultiScaleRecalibration(8, strategy=strategy)


def test_scales_with_too_many_cells():
    with pytest.raises(ValueError, match=r'scales \[5, 6, 7\] need 210×210 cells, too many'):
        MultiScaleRecalibration(8, scales=(5, 6, 7))
    MultiScaleRecalibration(8, scales=(5, 6, 7), strategy='sliding')


@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
@pytest.mark.parametrize('shape', [(0, 8, 7, 7), (0, 8, 8, 8)], ids=str)
def test_no_images(shape, strategy):
    for training in (True, False):
        assert MultiScaleRecalibration(8, strategy=strategy).train(training)(torch.empty(shape)).shape == shape


@pytest.mark.parametrize('strides', [(8, 1, 1, 1), (8, 1, 8, 8)], ids=str)
def test_one_position_compiled_without_inductor(strides):
    x = torch.randn(2, 8, 1, 1).as_strided((2, 8, 1, 1), strides).requires_grad_()
    torch.compile(MultiScaleRecalibration(8), backend='aot_eager')(x).sum().backward()
    assert x.grad.isfinite().all()


def test_bad_tensors():
    """PyTorch's own errors, which name the shapes, and Python's for another number of dimensions."""
    layer = MultiScaleRecalibration(8, source_channels=4)
    x, source = torch.randn(2, 8, 7, 7), torch.randn(2, 4, 7, 7)
    with pytest.raises(RuntimeError, match='to have 12 channels, but got 24'):
        layer(x)
    for size in (7, 8):
        x, source = torch.randn(2, 8, size, size), torch.randn(2, 4, size, size)
        for other in (x[:, :3], x[:1], x.reshape(1, 16, size, size), x.reshape(4, 4, size, size)):
            with pytest.raises(RuntimeError, match=r'invalid for input of size|must match the existing size'):
                layer(other, source)
    with pytest.raises(ValueError, match=r'not enough values to unpack \(expected 4, got 3\)'):
        layer(x[0], source[0])
