"""timm's unmodified train.py under torchrun: two processes over gloo on the CPU learn, and stay in step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import rows
from trained_run import weights as weights_of

RECIPE = Path(__file__).parents[1] / 'train_configs' / 'cifar_resnet.yaml'


@pytest.mark.slow
@pytest.mark.parametrize('model', ['cifar_resnet20_msar', 'cifar_densenet100_msar'])
def test_two_processes_learn_and_stay_in_step(model, timm_scripts, digits_folder, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    command += [timm_scripts / 'train.py', '--config', RECIPE, '--data-dir', digits_folder]
    command += ['--device', 'cpu', '--device-modules', 'timm_msar', 'ddp_on_cpu', '--workers', '0', '--epochs', '3']
    command += ['--no-aug', '--batch-size', '16', '--lr', '0.05', '--model-ema', '--model-ema-decay', '0.9']
    command += ['--model', model, '--img-size', 16, '--output', tmp_path, '--experiment', 'run']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'RANK_WEIGHTS': str(tmp_path)}
    environment['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Distributing BatchNorm running means and vars' in done.stderr
    summary = rows(tmp_path / 'run')
    assert float(summary[-1]['train_loss']) < 0.8 * float(summary[0]['train_loss'])
    ranks = [torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2)]
    weights, average = (weights_of(tmp_path / 'run' / 'last.pth.tar', k) for k in ('state_dict', 'state_dict_ema'))
    torch.testing.assert_close(ranks, [weights, weights], rtol=0, atol=0)
    assert average.keys() == weights.keys()
    assert not any(torch.equal(average[name], weights[name]) for name in weights if name.endswith('fc1.weight'))
