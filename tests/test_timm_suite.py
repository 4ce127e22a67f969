"""timm's own tests of its models, run on ours: fetched from timm's source distribution, never kept here."""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version

import pytest


@pytest.fixture(scope='session')
def timm_tests(tmp_path_factory):
    """The folder of timm's tests, of the installed version."""
    folder = tmp_path_factory.mktemp('timm')
    requirement = f'timm=={version("timm")}'
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:', requirement]
    subprocess.run([*command, '--dest', folder], check=True, capture_output=True)
    (archive,) = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter='data')
    return folder / archive.name.removesuffix('.tar.gz')


# All of them take four minutes; `make test-timm` sets the variable.
NETWORKS = '(msar or cifar)' if os.environ.get('TIMM_MSAR_ALL_NETWORKS') else '(cifar_resnet20 or resnet18_msar)'


@pytest.mark.timeout(3600)
def test_timm_finds_nothing_wrong(timm_tests):
    # Those of pretrained weights need the network; ours are loaded from a local Hub in tests of our own.
    command = [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist']
    result = subprocess.run(
        [*command, '-k', f'{NETWORKS} and not pretrained'],
        cwd=timm_tests,
        env={**os.environ, 'TORCH_BACKEND': 'timm_msar'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert ' passed' in result.stdout
