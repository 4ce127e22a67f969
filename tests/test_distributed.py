"""Two processes over gloo on the CPU: DDP itself, and timm's unmodified train.py under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_train import rows
from torch.nn.parallel import DistributedDataParallel
from trained_run import weights as weights_of

import timm_msar  # noqa: F401  registers the networks

RECIPE = Path(__file__).parents[1] / 'train_configs' / 'cifar_resnet.yaml'
NETS = ('cifar_resnet20_msar', 'cifar_densenet100_msar')


def create(name: str) -> nn.Module:
    """The same double precision network in every process: every scale of a norm is used, the statistics are real."""
    torch.manual_seed(0)
    model = timm.create_model(name).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # the last one of a block begins at 0
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(batch()[0])
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64), torch.arange(8) % 10


def gradients(model: nn.Module, images, labels) -> dict[str, torch.Tensor]:
    net = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    F.cross_entropy(net(images), labels).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    images, labels = batch()
    half = slice(4 * rank, 4 * rank + 4)
    found = {}
    for name in NETS:
        frozen = create(name).eval()
        found[name, 'halves'] = gradients(frozen, images[half], labels[half])
        found[name, 'twice'] = gradients(create(name).train(), images[:4], labels[:4])
    torch.save(found, f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory) -> list[dict]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp('gloo')
    torch.multiprocessing.spawn(one_of_two_processes, (str(folder),), nprocs=2)
    return [torch.load(folder / f'{rank}.pth', weights_only=True) for rank in range(2)]


def assert_same(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f'{n}: {m}', **tolerance)


@pytest.mark.parametrize('name', NETS)
def test_gradients_equal_one_process_with_the_whole_batch(name, two_processes):
    """With frozen statistics, which do not depend on how the batch is divided; in double precision."""
    expected = gradients(create(name).eval(), *batch())
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for found in two_processes:
        assert_same(found[name, 'halves'], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', NETS)
def test_gradients_through_training_statistics(name, two_processes):
    """Both processes hold the same images, so that their own statistics are those of the whole batch."""
    images, labels = batch()
    expected = gradients(create(name).train(), images[:4].repeat(2, 1, 1, 1), labels[:4].repeat(2))
    for found in two_processes:
        assert_same(found[name, 'twice'], expected, rtol=1e-7, atol=1e-10)


@pytest.fixture(scope='module')
def train(timm_scripts, digits_folder, tmp_path_factory):
    """Trains by timm's train.py in two processes, which end with the same weights; returns its folder and its log."""
    output = tmp_path_factory.mktemp('output')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    command += [timm_scripts / 'train.py', '--config', RECIPE, '--model', NETS[0], '--data-dir', digits_folder]
    command += ['--device', 'cpu', '--device-modules', 'timm_msar', 'ddp_on_cpu', '--workers', '0', '--output', output]
    # Not augmented: a resumed run seeds its generators anew and would draw other crops.
    command += ['--no-aug', '--batch-size', '16', '--lr', '0.05', '--model-ema', '--model-ema-decay', '0.9']

    def train(name, *arguments):
        (output / name).mkdir()
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'RANK_WEIGHTS': str(output / name)}
        environment['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        words = map(str, (*command, '--experiment', name, *arguments))
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        first, second = (torch.load(output / name / f'{rank}.pth', weights_only=True) for rank in range(2))
        assert_same(first, second, rtol=0, atol=0)
        return output / name, done.stdout

    return train


@pytest.fixture(scope='module')
def three_epochs(train):
    return train('three', '--epochs', 3)


def test_two_processes_learn_and_stay_in_step(three_epochs):
    folder, log = three_epochs
    assert 'Distributing BatchNorm running means and vars' in log
    summary = rows(folder)
    assert float(summary[-1]['train_loss']) < 0.8 * float(summary[0]['train_loss'])
    weights, average = (weights_of(folder / 'last.pth.tar', key) for key in ('state_dict', 'state_dict_ema'))
    assert_same(weights, torch.load(folder / '0.pth', weights_only=True), rtol=0, atol=0)
    assert average.keys() == weights.keys()
    assert not any(torch.equal(average[name], weights[name]) for name in weights if name.endswith('fc1.weight'))


def test_a_run_that_ended_early_resumes_to_the_same_result(train, three_epochs):
    checkpoint = train('one', '--epochs', 1)[0] / 'last.pth.tar'
    resumed, log = train('resumed', '--epochs', 3, '--resume', checkpoint)
    assert 'Restoring optimizer state' in log
    for row, other in zip(rows(resumed), rows(three_epochs[0])[1:], strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, rel=1e-5)
    for key in ('state_dict', 'state_dict_ema'):  # on one machine bit for bit
        found, expected = (weights_of(folder / 'last.pth.tar', key) for folder in (resumed, three_epochs[0]))
        assert_same(found, expected, rtol=0, atol=1e-6)
