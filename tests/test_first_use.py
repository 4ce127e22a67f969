"""The layer keeps matrices between calls: whenever it meets a size first, it works, and is right ever after."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_msar import MultiScaleRecalibration
from timm_msar.regions import _kept

BEFORE = """
import atexit, os, signal, sys
from concurrent.futures import ThreadPoolExecutor
import slow_reference, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from timm_msar import MultiScaleRecalibration

torch.manual_seed(0)
layers = [MultiScaleRecalibration(4, strategy=strategy) for strategy in ('regional', 'sliding')]
inputs = [torch.randn(2, 4, *size) for size in [(7, 7), (5, 9), (8, 8)]]

def use(function=lambda layer, x: layer(x)):
    return [function(layer.eval(), x) for layer in layers for x in inputs]

def check(trainings=(False, True)):
    for layer in layers:
        for x in inputs:
            for training in trainings:
                z = slow_reference.gates(layer.train(training), x).float()
                leaf = x.clone().requires_grad_(training)
                out = layer(leaf)
                torch.testing.assert_close(out, leaf * z, rtol=1e-4, atol=1e-4)
                if training:
                    out.sum().backward()
                    assert leaf.grad.isfinite().all()
    print('right', flush=True)

for number, moment in enumerate(sys.argv[2:]):  # each in a process that has not used the layer
    if os.fork() == 0:
        for stream in (1, 2):
            os.dup2(os.open(f'{sys.argv[1]}/{number}.{stream}', os.O_WRONLY | os.O_CREAT), stream)
        exec(moment)
        sys.exit()
    os.wait()
"""
MOMENTS = {
    'inference_mode': 'with torch.inference_mode(): use()',
    'grad': 'use(lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x))',
    'hessian': 'use(lambda layer, x: torch.func.hessian(lambda x: layer(x).sum())(x[:1, :, :, :]))',
    'vmap': 'use(lambda layer, x: torch.func.vmap(lambda x: layer(x[None])[0])(x))',
    'fake tensors': """
with FakeTensorMode(allow_non_fake_inputs=True) as mode:
    use(lambda layer, x: layer(mode.from_tensor(x)))""",
    'export': 'use(lambda layer, x: torch.export.export(layer, (x,)).module()(x))',
    'trace': 'use(lambda layer, x: torch.jit.trace(layer, x))',
    'default dtype': 'torch.set_default_dtype(torch.float64); use(); torch.set_default_dtype(torch.float32)',
    'default device': "torch.set_default_device('meta'); use(); torch.set_default_device('cpu')",
    'other dtypes': """
for dtype in (torch.bfloat16, torch.float64):
    use(lambda layer, x: layer.to(dtype)(x.to(dtype)).float() is layer.float())""",
    'threads': """
sys.setswitchinterval(1e-6)
list(ThreadPoolExecutor(8).map(layers[0].eval(), [torch.randn(1, 4, 5, size) for size in range(5, 405)]))""",
    'after fork': """
use()
if os.fork() == 0: check(); os._exit(0)
os.wait()""",
    'signal': """
signal.signal(signal.SIGALRM, lambda *_: use())
for size in range(5, 25):
    signal.setitimer(signal.ITIMER_REAL, 0.0005)
    layers[0](torch.randn(2, 4, size, size))
signal.setitimer(signal.ITIMER_REAL, 0)""",
    'exit': 'atexit.register(check); sys.exit()',
    'deletion at the end': """
class Last:  # in inference mode: PyTorch 2.14 ends in an abort where a view outlives its base at the end
    def __init__(self):
        self.layer, self.x, self.mode, self.print = layers[0].eval(), inputs[0], torch.inference_mode, print
        self.expected = self.x * slow_reference.gates(self.layer, self.x).float()
    def __del__(self):
        with self.mode():
            error = (self.layer(self.x) - self.expected).abs().max()
        self.print('right' if error < 1e-4 else error, flush=True)
last = Last()
del layers, inputs
sys.exit()""",
}
ORDER = ['fake tensors', 'inference_mode', 'vmap', 'export', 'hessian', 'grad', 'trace', 'default device']


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """What each moment, and after it the check, printed on both streams."""
    folder, tests = tmp_path_factory.mktemp('moments'), Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get('PYTHONPATH', '')])
    orders = ['\n'.join(f'{MOMENTS[moment]}\ncheck()' for moment in order) for order in (ORDER, ORDER[::-1])]
    codes = [f'{code}\ncheck()' for code in MOMENTS.values()] + orders
    environment = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, '-c', BEFORE, folder, *codes], env=environment, check=True, timeout=300)
    names = [*MOMENTS, 'one order', 'the other']
    return {name: [(folder / f'{i}.{stream}').read_text() for stream in (1, 2)] for i, name in enumerate(names)}


@pytest.mark.slow
@pytest.mark.parametrize('moment', [*MOMENTS, 'one order', 'the other'])
def test_first_use(moment, results):
    out, err = results[moment]
    assert out.count('right') >= (len(ORDER) if 'order' in moment or moment == 'the other' else 1), err
    assert 'Error' not in err  # what is raised at exit


@pytest.mark.parametrize('device', ['cpu', 'meta'])  # which computes nothing, and keeps as a GPU does
def test_what_is_kept_belongs_to_no_mode_and_is_at_most_128_mb(device):
    layer, x = MultiScaleRecalibration(4, device=device).eval(), torch.zeros(2, 4, 7, 7, device=device)
    _kept.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(x)
    assert not _kept
    for mode in (lambda f: torch.func.hessian(lambda x: f(x).sum()), torch.func.functionalize, torch.inference_mode()):
        _kept.clear()
        mode(layer)(x)
        assert len(_kept) == 2 and not any(matrix.is_inference() for matrix in _kept.values())
        assert all(torch.func.debug_unwrap(matrix) is matrix for matrix in _kept.values())
    layer(x.requires_grad_()).sum().backward()
    assert len(_kept) == 2
    for size in range(301, 401):
        layer(torch.zeros(1, 4, 33, size, device=device))
    assert 2**26 < sum(matrix.nbytes for matrix in _kept.values()) <= 2**27
    _kept.clear()
