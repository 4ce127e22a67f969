"""A network that was traced, scripted, exported or compiled at one size is right at every other."""

import pytest
import timm
import torch
from test_networks import create, randomise
from torch._inductor import metrics

from timm_msar import MultiScaleRecalibration

SIZES = [(224, 224), (160, 160), (192, 192), (256, 256), (192, 320), (96, 96)]


def network(name='resnet18_msar', **kwargs):
    return randomise(create(name, num_classes=5, **kwargs)).eval()


@torch.no_grad()
def compare(model, other, sizes=SIZES, batch=2):
    for size in sizes:
        x = torch.randn(batch, 3, *size)
        expected = model(x)
        assert (other(x) - expected).abs().max() < 1e-5 * expected.abs().max(), size


@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
def test_traced(strategy):
    model = network(strategy=strategy)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 3, 224, 224))
    compare(model, traced)


def test_scripted_and_trained_on_one_image():
    model = network()
    scripted = torch.jit.script(model)
    compare(model, scripted)
    scripted.train()(torch.randn(1, 3, 64, 64)).sum().backward()


def test_scripted_and_trained_then_evaluated():
    """train.py --torchscript. At 30 px maps are of 30, 15 and 8 positions, which 4 divides once."""
    scripted = torch.jit.script(timm.create_model('cifar_resnet20_msar'))
    scripted.train()(torch.randn(4, 3, 30, 30)).sum().backward()
    scripted.eval()
    for _ in range(2):
        with torch.inference_mode():
            scripted(torch.randn(4, 3, 30, 30))


@pytest.mark.parametrize('strict', [False, True])
def test_exported_with_symbolic_sizes(strict):
    """A strict export refuses maps smaller than a scale: at 96 px the last one is 3×3."""
    model, dims = network(), dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(model, (torch.randn(3, 3, 224, 224),), dynamic_shapes={'x': dims}, strict=strict)
    compare(model, exported.module(), SIZES[:5] if strict else SIZES)
    compare(model, exported.module(), SIZES[:2], batch=1)


@pytest.mark.parametrize('scales', [(1, 2, 4), (3, 4)], ids=str)
def test_exported_for_training_with_symbolic_sizes(scales):
    """Regions without positions would count in the norms' statistics."""
    layer, dims = MultiScaleRecalibration(4, scales=scales), {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(layer, (torch.randn(2, 4, 24, 24),), dynamic_shapes={'x': dims}).module()
    for size in ((9, 10), (4, 5)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(exported(x), layer(x))
    with pytest.raises(AssertionError, match=r'x\.size\(\)\[3\] >= 4'):
        exported(torch.randn(2, 4, 5, 3))


@pytest.mark.slow
@pytest.mark.parametrize(('size', 'training', 'most'), [(56, False, 6), (14, False, 5), (56, True, 30), (14, True, 28)])
def test_the_number_of_kernels_that_inductor_makes(size, training, most):
    """A kernel is a launch, and on a GPU launches are time: many ways to write the same formula make twice as many."""
    layer = MultiScaleRecalibration(64, rd_ratio=0.375).train(training)
    x = torch.randn(8, 64, size, size).contiguous(memory_format=torch.channels_last).requires_grad_(training)
    torch.compiler.reset()
    metrics.reset()
    with torch.set_grad_enabled(training), torch._inductor.config.patch(force_disable_caches=True):
        out = torch.compile(layer)(x)
        if training:
            out.sum().backward()
    assert 0 < metrics.generated_kernel_count <= most


def test_compiled_for_seven_sizes_with_four_graphs_at_most():
    model, graphs = network(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compare(model, torch.compile(model, fullgraph=True, backend=backend), [*SIZES[:5], (288, 288), (320, 320)])
    assert len(graphs) <= 4


@pytest.mark.parametrize('dynamic', [True, False, None])
@pytest.mark.parametrize('scales', [(1, 2, 4), (2, 7)], ids=str)
def test_compiled_in_training_for_changing_sizes(dynamic, scales):
    """Empty regions, of maps smaller than the scale, would count in the norms' statistics."""
    layer = MultiScaleRecalibration(6, scales=scales)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend='eager')
    for batch, height, width in ((4, 3, 5), (4, 8, 8), (3, 14, 14), (2, 9, 12)):
        x = torch.randn(batch, 6, height, width)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize('size', [64, 96, 224])
def test_a_hook_on_the_output_sees_its_gradient(size):
    """The output is no view, whose hooks would miss the gradient after timm's `x += shortcut`."""
    model, seen = network(), []
    for layer in model.modules():
        if isinstance(layer, MultiScaleRecalibration):
            layer.register_forward_hook(lambda _, __, out: out.register_hook(seen.append) and None)
    model(torch.randn(1, 3, size, size)).sum().backward()
    assert len(seen) == 8
