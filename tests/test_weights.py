"""The weights inside the package: they load without a network and classify real images as their cards say."""

import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import resolve_model_input_args, save_for_hf
from torchvision.datasets import FashionMNIST

import timm_msar
from timm_msar.cifar_resnet import FASHION_MNIST

IMAGES = Path(__file__).parent / 'fashion_mnist'
SHIPPED = [tag for tag in timm.list_pretrained('cifar_*') if timm.get_pretrained_cfg(tag).file]


def first_500(model: torch.nn.Module) -> torch.Tensor:
    """The first 500 test images, 28×28, padded to 32×32 as `timm-msar data` stores them, through timm's transform."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    sheet = np.asarray(Image.open(IMAGES / 'first_500_test_images.png'))
    images = sheet.reshape(20, 28, 25, 28).swapaxes(1, 2).reshape(500, 28, 28)
    return torch.stack([transform(Image.fromarray(np.pad(image, 2)).convert('RGB')) for image in images])


def test_the_networks_for_fashion_mnist_have_weights():
    assert SHIPPED == ['cifar_resnet20.fashion_mnist', 'cifar_resnet20_msar.fashion_mnist']
    for tag in SHIPPED:
        assert timm.models.get_pretrained_cfg(tag.partition('.')[0]).tag == 'fashion_mnist'  # the default
    assert sorted(path.stem for path in (Path(__file__).parents[1] / 'hub_cards').iterdir()) == SHIPPED
    folder = Path(timm.get_pretrained_cfg(SHIPPED[0]).file).parent
    assert sorted(path.name for path in folder.iterdir()) == [f'{tag}.safetensors' for tag in SHIPPED]


@pytest.mark.parametrize('tag', SHIPPED)
@torch.no_grad()
def test_they_classify_real_images_as_the_card_says(tag, monkeypatch):
    monkeypatch.setattr(socket.socket, 'connect', None, raising=False)  # there is no network
    card = (Path(__file__).parents[1] / 'hub_cards' / f'{tag}.md').read_text(encoding='utf-8')
    accuracy = float(re.search(rf'^\| {re.escape(tag)} \| ([\d.]+) \|', card, re.MULTILINE)[1])
    promised = int(re.search(r'(\d+) of the first 500', card)[1])

    model = timm.create_model(tag, pretrained=True).eval()
    images = first_500(model)
    labels = torch.tensor(np.loadtxt(IMAGES / 'first_500_test_labels.txt', dtype=int).ravel())
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(50), labels.split(50)))
    assert abs(right - promised) <= 1  # another processor may round a close decision the other way

    # The slice is a sample of the whole test set: within three standard deviations.
    p = accuracy / 100
    assert abs(right / 500 - p) < 3 * math.sqrt(p * (1 - p) / 500)


def test_the_gates_have_learned():
    """Trained gates differ between regions, on real images, in every block."""
    model = timm.create_model('cifar_resnet20_msar', pretrained=True).eval()
    shares = timm_msar.asymmetry(model, first_500(model)[:32])
    assert len(shares) == 9 and min(shares.values()) > 0.05


def test_the_names_of_the_classes_belong_to_these_weights_alone(tmp_path):
    def names(name='cifar_resnet20_msar', **kwargs):
        return timm.create_model(name, **kwargs).pretrained_cfg.get('label_names')

    assert list(FASHION_MNIST) == FashionMNIST.classes
    assert names(pretrained=True) == names(pretrained=True, num_classes=10) == FASHION_MNIST
    assert names() is names(num_classes=10) is names(pretrained=True, num_classes=5) is names(SHIPPED[1]) is None
    assert 'label_names' not in timm.create_model(**resolve_model_input_args('cifar_resnet20')).pretrained_cfg
    others = [f'animal {i}' for i in range(10)]
    assert names(pretrained_cfg={'label_names': others}) is None  # as of another tag
    assert names(pretrained_cfg_overlay={'label_names': others}) == others
    save_for_hf(timm.create_model('cifar_resnet20_msar'), tmp_path, model_config={'label_names': others})
    assert names(f'local-dir:{tmp_path}') == names(f'local-dir:{tmp_path}', pretrained=True) == others


@pytest.mark.slow
def test_timms_own_script_prints_them(timm_scripts, tmp_path):
    (tmp_path / 'images').mkdir()
    sheet = Image.open(IMAGES / 'first_500_test_images.png')
    for i in range(4):
        sheet.crop((28 * i, 0, 28 * i + 28, 28)).save(tmp_path / 'images' / f'{i}.png')
    command = [sys.executable, '-m', 'timm_msar.run', str(timm_scripts / 'inference.py'), '--data-dir', 'images']
    command += ['--model', 'cifar_resnet20_msar', '--pretrained', '--label-type', 'name', '--results-file', 'out']
    command += ['--device', 'cpu', '-j', '0']
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert 'Ankle boot' in (tmp_path / 'out.csv').read_text()
