"""The scripts of examples/, as a user starts them; each prints one figure, which would be wrong if the thing were."""

import csv
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from trained_run import make_run

import timm_msar_command

FOLDER = Path(__file__).parents[1] / 'examples'
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}


def run(*words) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figure(script, *words) -> float:
    """The number at the end of what an example prints."""
    return float(re.findall(r': ([\d.e+-]+)$', run(sys.executable, FOLDER / script, *words).strip())[-1])


@pytest.mark.parametrize(
    ('encoder', 'options'),
    [('tu-cifar_resnet20_msar', []), pytest.param('tu-resnext50_msar', ['--deeplab'], marks=pytest.mark.slow)],
)
def test_segmentation_finds_the_ink(encoder, options):
    pytest.importorskip('segmentation_models_pytorch')
    # Everything called ink gives about 0.3.
    assert figure('segmentation.py', encoder, '--random', *options) > 0.5


def test_detection_learns_from_one_image():
    assert figure('detection.py', '--random') < 0.2


@pytest.mark.slow
def test_pruning_leaves_a_quarter():
    assert 0.25 < figure('prune.py', '--random') < 0.3


@pytest.mark.parametrize('strategy', ['regional', 'sliding'])
def test_pruning_channels_that_are_always_zero_changes_nothing(strategy):
    prune = pytest.importorskip('torch_pruning')
    example = runpy.run_path(str(FOLDER / 'prune.py'))
    model = timm.create_model('cifar_resnet20_msar', strategy=strategy).eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for tensor in (t for norm in norms for t in (norm.weight, norm.bias, norm.running_mean)):
        torch.nn.init.normal_(tensor)
    images = torch.randn(2, 3, 32, 32)
    with example['traceable']():
        graph = prune.DependencyGraph().build_dependency(model, images, customized_pruners=example['PRUNERS'])
    groups = list(graph.get_all_groups(ignored_layers=[model.fc], root_module_types=[torch.nn.Conv2d]))
    groups = [graph.get_pruning_group(g[0].dep.target.module, prune.prune_conv_out_channels, [1, 3]) for g in groups]
    for norm, channels in ((dep.target.module, c) for g in groups for dep, c in g if dep.target.module in norms):
        norm.weight.data[channels] = norm.bias.data[channels] = 0
    expected = model(images)
    for group in groups:
        group.prune()
    assert [stage[0].se.channels for stage in model.stages] == [14, 30, 62]
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx_is_right_at_every_size(tmp_path):
    assert figure('onnx_any_size.py', tmp_path / 'network.onnx', '--random') < 1e-5


def test_the_pipeline_of_transformers_gives_the_networks_probability(tmp_path):
    pytest.importorskip('transformers')
    assert timm_msar_command.main(['export', str(make_run(tmp_path)), '--output', str(tmp_path / 'out')]) == 0
    image = Image.linear_gradient('L').resize((40, 40)).convert('RGB')
    image.save(tmp_path / 'image.png')
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(image)[None]).softmax(1).max().item()
    score = figure('transformers_pipeline.py', tmp_path / 'out', tmp_path / 'image.png')
    assert score == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_finetuning_learns_digits(timm_scripts, digits_folder, tmp_path):
    weights = tmp_path / 'resnet18.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('resnet18').state_dict(), weights)
    short = ('--img-size', 64, '--epochs', 4, '--warmup-epochs', 0, '--batch-size', 16, '--lr', 0.05, '--hflip', 0)
    options = ('--pretrained-path', weights, '--device', 'cpu', '--workers', 0, *short)
    printed = run('sh', FOLDER / 'finetune.sh', timm_scripts / 'train.py', digits_folder, *options)
    best = float(re.findall(r'best accuracy: ([\d.]+) %', printed)[0])
    output = Path(re.findall(r'weights: (.+)', printed)[0])
    with open(output / 'summary.csv') as file:
        assert best == pytest.approx(max(float(row['eval_top1']) for row in csv.DictReader(file)), abs=0.005)
    assert (output / 'model_best.pth.tar').is_file() and best > 40  # guessing gives 25
