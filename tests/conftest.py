"""Fixtures that several test files need: timm's scripts, and small folders of real images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope='session')
def timm_scripts() -> Path:
    """The folder with timm's train.py, validate.py, ... of the installed version."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("set TIMM_SCRIPTS to a folder with timm's train.py and validate.py to run this test")
    return Path(os.environ['TIMM_SCRIPTS'])


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits of four classes as `timm-msar data` stores CIFAR: 40 a class to train on, padded from 32×32 to
    40×40, and 10 to test on, 32×32.
    """
    datasets = pytest.importorskip('sklearn.datasets')
    root = tmp_path_factory.mktemp('digits')
    digits = datasets.load_digits()
    for label in (0, 1, 4, 7):
        for i, image in enumerate(digits.images[digits.target == label][:50]):
            split, padding = ('train', 4) if i < 40 else ('validation', 0)
            pixels = np.pad(np.kron(image, np.full((4, 4), 255 / 16)), padding).astype(np.uint8)
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert('RGB').save(folder / f'{i}.png')
    return root
