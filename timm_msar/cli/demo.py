"""Train cifar_resnet20_msar on real handwritten digits, save it, load it back, and draw its gates.

The digits are the 1,797 images of 8×8 pixels that scikit-learn ships, so nothing is downloaded. Model, loader,
optimiser, scheduler and export are timm's; the loop is what train.py does, in as few lines as possible.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch.utils.data import Dataset
from tqdm import tqdm

from .errors import whole_number
from .files import whole
from .gates import draw, look
from .photo import Network

# Of the loader and of the saved network, so that whoever loads it prepares images as they were here.
DATA_CONFIG: dict[str, Any] = {
    'input_size': (3, 32, 32),
    'mean': (0.305, 0.305, 0.305),
    'std': (0.354, 0.354, 0.354),
    'crop_pct': 1.0,
    'interpolation': 'bilinear',
}
DIGITS = tuple('0123456789')


class Digits(Dataset):
    """Every fifth of scikit-learn's digits, from the fifth, if `held_out`, else the others, as 32×32 PIL images."""

    def __init__(self, held_out: bool):
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = (np.arange(len(digits.target)) % 5 == 4) == held_out
        pixels = (digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.images = [Image.fromarray(p).convert('RGB').resize((32, 32), Image.Resampling.BILINEAR) for p in pixels]
        self.targets = digits.target[chosen].tolist()
        self.transform: Any = None  # the loader sets it

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.targets[index]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-msar demo`."""
    seed = whole_number(0, 2**32 - 1)  # NumPy takes no other
    parser.add_argument('--output', type=Path, default=Path('demo'), help='folder to make (default: %(default)s)')
    parser.add_argument('--epochs', type=whole_number(1), default=8, help='passes over the images (%(default)s)')
    parser.add_argument('--seed', type=seed, default=0, help='seed of everything random (%(default)s)')


def main(args: argparse.Namespace) -> None:
    """Run the demo and say where everything is."""
    import matplotlib  # noqa: F401  is needed at the end

    random_seed(args.seed)
    start, output = time.monotonic(), args.output
    with whole(output, folder=True) as aside:
        model, accuracy = train(args.epochs)
        config = {'pretrained_cfg': {'tag': 'digits'}, 'label_names': DIGITS}
        save_for_hf(model, aside / 'weights', config, safe_serialization=True, data_config=DATA_CONFIG)
        loaded = timm.create_model(f'local-dir:{aside / "weights"}', pretrained=True).eval()
        images = torch.cat([x for x, _ in loader(Digits(held_out=True), is_training=False)])
        with torch.inference_mode():
            if not torch.equal(loaded(images), model(images)):
                raise RuntimeError('the weights loaded back give other logits')
        network = Network('', loaded, DATA_CONFIG, DIGITS)
        looks = [look(network, image[None]) for image in images[:: len(images) // 8][:8]]
        draw(looks, 'Test images with predictions, and gates of the last block of each stage', aside / 'gates.png')
    print(f"""
held-out accuracy   {accuracy:.2f} % after {args.epochs} epochs, {time.monotonic() - start:.0f} s
weights             {output / 'weights'} (loaded back: the same logits)
gates               {output / 'gates.png'}
use them            timm.create_model('local-dir:{output / 'weights'}', pretrained=True)
                    after import timm, timm_msar""")


def loader(dataset: Digits, is_training: bool):
    """Make timm's loader, which moves and scales images a little in training; a digit is not mirrored."""
    augmentation = {'scale': (0.7, 1.0), 'ratio': (0.9, 1.1), 'hflip': 0.0, 'color_jitter': 0.0}
    here = {'num_workers': 0, 'use_prefetcher': False, 'device': torch.device('cpu')}
    return create_loader(dataset, **DATA_CONFIG, **augmentation, **here, batch_size=64, is_training=is_training)


def train(epochs: int) -> tuple[torch.nn.Module, float]:
    """Train on the digits; return the network in eval mode and its held-out accuracy in percent."""
    model = timm.create_model('cifar_resnet20_msar', num_classes=10)
    train_loader = loader(Digits(held_out=False), is_training=True)
    test_loader = loader(Digits(held_out=True), is_training=False)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4)
    updates = len(train_loader)
    by_update = {'updates_per_epoch': updates, 'step_on_epochs': False, 'warmup_epochs': 0, 'min_lr': 0}
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=epochs, **by_update)
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        progress = tqdm(train_loader, f'epoch {epoch + 1}/{epochs}', unit=' batches', disable=None)
        for step, (images, targets) in enumerate(progress, epoch * updates + 1):
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(step)
        model.eval()
        with torch.inference_mode():
            correct = sum((model(images).argmax(1) == targets).sum().item() for images, targets in test_loader)
        accuracy = 100 * correct / len(test_loader.dataset)
        print(f'epoch {epoch + 1}/{epochs}: held-out accuracy {accuracy:.2f} %')
    return model.eval(), accuracy
