"""A file of torch.onnx.export computes what the network computes, at every size, and holds no more than it must."""

import onnxruntime
import pytest
import torch
from onnxruntime.quantization.shape_inference import quant_pre_process
from test_any_size import network
from torch.export import Dim


@torch.no_grad()
def compare(path, model, shapes):
    session = onnxruntime.InferenceSession(path)
    for shape in shapes:
        x = torch.randn(*shape)
        out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        expected = model(x)
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max(), shape


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'most'), [('resnet18', 49), ('seresnet18', 97), ('resnet18_msar', 190)])
def test_the_number_of_nodes_at_a_fixed_size(name, most, tmp_path):
    model = network(name)
    program = torch.onnx.export(model, (torch.randn(1, 3, 224, 224),), dynamo=True, verbose=False)
    assert len(list(program.model.graph)) <= most
    program.save(tmp_path / 'network.onnx')
    compare(tmp_path / 'network.onnx', model, [(1, 3, 224, 224)])


@pytest.mark.slow
@pytest.mark.parametrize('model_args', [{}, {'strategy': 'sliding'}, {'scales': [3, 4]}], ids=str)
def test_one_file_for_every_size(model_args, tmp_path):
    model = network('cifar_resnet20_msar', **model_args)
    sizes = {0: Dim('batch', min=1, max=64), 2: Dim('height', min=8, max=512), 3: Dim('width', min=8, max=512)}
    options = dict(dynamo=True, verbose=False, optimize=False, dynamic_shapes=(sizes,))
    torch.onnx.export(model, (torch.randn(2, 3, 32, 32),), tmp_path / 'network.onnx', **options)
    compare(tmp_path / 'network.onnx', model, [(2, 3, 32, 32), (1, 3, 28, 28), (3, 3, 40, 64), (1, 3, 9, 10)])


@pytest.mark.slow
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
@pytest.mark.parametrize('opset', [11, 13, 17])
def test_the_old_exporter(opset, strategy, memory_format, tmp_path):
    """That of timm's onnx_export.py: for any batch, at the size of the export or at any."""
    model = network('cifar_resnet20_msar', strategy=strategy).to(memory_format=memory_format)
    x, path = torch.randn(2, 3, 32, 32).contiguous(memory_format=memory_format), tmp_path / 'network.onnx'
    for axes, shapes in (({0: 'b'}, []), ({0: 'b', 2: 'h', 3: 'w'}, [(3, 3, 40, 64), (1, 3, 30, 33)])):
        options = dict(dynamo=False, opset_version=opset, input_names=['x'], dynamic_axes={'x': axes})
        torch.onnx.export(model, (x,), path, **options)
        compare(path, model, [(1, 3, 32, 32), (3, 3, 32, 32), *shapes])
        quant_pre_process(path, tmp_path / 'prepared.onnx')  # infers every shape
