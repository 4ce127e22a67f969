"""Two processes over gloo on the CPU: DDP itself, and timm's unmodified train.py under torchrun."""

import argparse
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

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


def gradients(model: nn.Module, parts, ddp: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over `parts`; as train.py accumulates them, DDP speaks in the last one only."""
    net = DistributedDataParallel(model) if ddp else model
    for i, (images, labels) in enumerate(parts):
        net.require_backward_grad_sync = i == len(parts) - 1
        (F.cross_entropy(net(images), labels) / len(parts)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    images, labels = batch()
    half = slice(4 * rank, 4 * rank + 4)
    found = {}
    for name in NETS:
        frozen = create(name).eval()
        found[name, 'halves'] = gradients(frozen, [(images[half], labels[half])], ddp=True)
        frozen = create(name).eval()
        quarters = [(images[half][i : i + 2], labels[half][i : i + 2]) for i in (0, 2)]
        found[name, 'accumulated'] = gradients(frozen, quarters, ddp=True)
        found[name, 'twice'] = gradients(create(name).train(), [(images[:4], labels[:4])], ddp=True)
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
@pytest.mark.parametrize('way', ['halves', 'accumulated'])
def test_gradients_equal_one_process_with_the_whole_batch(name, way, two_processes):
    """With frozen statistics, which do not depend on how the batch is divided; in double precision."""
    expected = gradients(create(name).eval(), [batch()])
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for found in two_processes:
        assert_same(found[name, way], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', NETS)
def test_gradients_through_training_statistics(name, two_processes):
    """Both processes hold the same images, so that their own statistics are those of the whole batch."""
    images, labels = batch()
    expected = gradients(create(name).train(), [(images[:4].repeat(2, 1, 1, 1), labels[:4].repeat(2))])
    for found in two_processes:
        assert_same(found[name, 'twice'], expected, rtol=1e-7, atol=1e-10)


class Trainer:
    """Starts timm's train.py in two processes on the digits; every run sees the same images in the same order."""

    def __init__(self, scripts: Path, data: Path, output: Path):
        self.output = output
        self.command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
        self.command += [scripts / 'train.py', '--config', RECIPE, '--model', NETS[0], '--data-dir', data]
        self.command += ['--output', output]
        self.command += ['--device', 'cpu', '--device-modules', 'timm_msar', 'ddp_on_cpu', '--workers', '0']
        # Not augmented: a resumed run seeds its generators anew and would draw other crops.
        self.command += ['--no-aug', '--log-interval', '1']

    def start(self, name: str, *arguments) -> subprocess.Popen:
        (self.output / name).mkdir()
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'RANK_WEIGHTS': str(self.output / name)}
        environment['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        command = [str(word) for word in (*self.command, '--experiment', name, *arguments)]
        pipe = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        return subprocess.Popen(command, env=environment, **pipe)

    def run(self, name: str, *arguments) -> str:
        """Train to the end and return the log."""
        process = self.start(name, *arguments)
        try:
            log = process.communicate()[0]
        finally:
            process.terminate()  # torchrun ends its workers with it
        assert process.returncode == 0, log[-3000:]
        return log

    def weights(self, name: str) -> list[dict]:
        """Weights and buffers that each process ended with."""
        return [torch.load(self.output / name / f'{rank}.pth', weights_only=True) for rank in range(2)]

    def checkpoint(self, name: str) -> dict:
        """What train.py saved last."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(self.output / name / 'last.pth.tar', weights_only=True)

    def summary(self, name: str) -> list[dict]:
        with open(self.output / name / 'summary.csv') as file:
            return [row for row in csv.DictReader(file) if row['epoch'] != 'epoch']


@pytest.fixture(scope='module')
def trainer(timm_scripts, digits_folder, tmp_path_factory) -> Trainer:
    return Trainer(timm_scripts, digits_folder, tmp_path_factory.mktemp('output'))


EPOCHS = ('--batch-size', '16', '--lr', '0.05', '--epochs', '3', '--model-ema', '--model-ema-decay', '0.9')


@pytest.fixture(scope='module')
def uninterrupted(trainer) -> str:
    return trainer.run('uninterrupted', *EPOCHS)


def test_two_processes_learn_and_stay_in_step(trainer, uninterrupted):
    first, second = trainer.weights('uninterrupted')
    assert_same(first, second, rtol=0, atol=0)
    assert 'Distributing BatchNorm running means and vars' in uninterrupted
    summary = trainer.summary('uninterrupted')
    assert float(summary[-1]['train_loss']) < 0.8 * float(summary[0]['train_loss'])
    checkpoint = trainer.checkpoint('uninterrupted')
    average = checkpoint['state_dict_ema']
    assert_same(checkpoint['state_dict'], first, rtol=0, atol=0)
    assert average.keys() == first.keys()
    assert not any(torch.equal(average[name], first[name]) for name in first if name.endswith('fc1.weight'))


def test_killed_run_resumes_to_the_same_result(trainer, uninterrupted):
    """kill -9 of everything in the middle of the second epoch; continued from the checkpoint of the first.

    On one machine the two results are the same bit for bit (measured: largest difference 0); 1e-6 is asserted.
    """
    process = trainer.start('killed', *EPOCHS)
    for line in process.stdout:
        if line.startswith('Train: 1 [   2/5 '):
            break
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    assert len(workers) == 2
    for pid in [process.pid, *map(int, workers)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [int(row['epoch']) for row in trainer.summary('killed')] == [0]

    log = trainer.run('resumed', *EPOCHS, '--resume', trainer.output / 'killed' / 'last.pth.tar')
    assert 'Restoring optimizer state' in log
    resumed, through = trainer.summary('resumed'), trainer.summary('uninterrupted')
    assert [int(row['epoch']) for row in resumed] == [1, 2]
    for row, other in zip(resumed, through[1:], strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, rel=1e-5)
    for key in ('state_dict', 'state_dict_ema'):
        assert_same(trainer.checkpoint('resumed')[key], trainer.checkpoint('uninterrupted')[key], rtol=0, atol=1e-6)


STEPS = ('--train-split', 'validation', '--batch-size', '10', '--epochs', '1')  # two steps of 2 x 10 images


@pytest.fixture(scope='module')
def plain(trainer) -> str:
    return trainer.run('plain', *STEPS)


@pytest.mark.parametrize(
    ('name', 'arguments', 'tolerance'),
    [
        ('bfloat16', ['--amp', '--amp-dtype', 'bfloat16'], 0.05),
        # All of torch.compile but inductor's code generation, which takes two cores ten minutes.
        ('compiled', ['--torchcompile', 'aot_eager'], 1e-3),
        ('channels-last', ['--channels-last'], 1e-3),
        ('checkpointed', ['--grad-checkpointing'], 1e-5),
    ],
)
def test_option_trains_like_plain(name, arguments, tolerance, trainer, plain):
    """Two steps with the option end where two plain steps do."""
    log = trainer.run(name, *STEPS, *arguments)
    first, second = trainer.weights(name)
    assert_same(first, second, rtol=0, atol=0)
    loss = float(trainer.summary(name)[0]['train_loss'])
    expected = float(trainer.summary('plain')[0]['train_loss'])
    assert 'Train: 0 [   1/2 (100%)]' in log
    assert loss == pytest.approx(expected, rel=tolerance)
