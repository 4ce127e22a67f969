"""A file of torch.onnx.export computes what the network computes, at every size, and holds no more than it must."""

import onnxruntime
import pytest
import torch
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
