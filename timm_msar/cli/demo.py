"""Train cifar_resnet20_msar on real handwritten digits, save it, load it back, and draw its gates.

The digits are the 1,797 images of 8×8 pixels that scikit-learn ships, so nothing is downloaded. Model, loader,
optimiser, scheduler and export are timm's; the loop is what train.py does, in as few lines as possible.
"""

import argparse
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

from .errors import positive
from .files import written_whole
from .gates import draw, inspect
from .inference import Network

NAME = 'cifar_resnet20_msar'
# Of the loader and of the saved network, so that whoever loads it prepares images as they were here.
DATA_CONFIG: dict[str, Any] = dict(
    input_size=(3, 32, 32), mean=(0.305,) * 3, std=(0.354,) * 3, crop_pct=1.0, interpolation='bilinear'
)
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
    parser.add_argument('--output', type=Path, default=Path('demo'), help='folder to make (default: %(default)s)')
    parser.add_argument('--epochs', type=positive, default=8, help='passes over the images (%(default)s)')


def main(args: argparse.Namespace) -> None:
    """Run the demo and say where everything is."""
    random_seed(0)
    with written_whole(args.output, folder=True) as aside:
        model, test = train(args.epochs), Digits(held_out=True)
        config = {'pretrained_cfg': {'tag': 'digits'}, 'label_names': DIGITS}
        save_for_hf(model, aside / 'weights', config, safe_serialization=True, data_config=DATA_CONFIG)
        loaded = timm.create_model(f'local-dir:{aside / "weights"}', pretrained=True).eval()
        images = torch.cat([x for x, _ in loader(test, is_training=False)])
        with torch.inference_mode():
            logits = loaded(images)
            if not torch.equal(logits, model(images)):
                raise RuntimeError('the weights loaded back give other logits')
        accuracy = 100 * np.mean(logits.argmax(1).numpy() == test.targets)
        network = Network('', loaded, DATA_CONFIG, DIGITS)
        shown = [*zip(images, test.targets)][:: len(images) // 8][:8]
        inspected = [
            (seen := inspect(network, x[None]))._replace(prediction=f'label: {y}\n{seen.prediction}') for x, y in shown
        ]
        title = f'{NAME}: {len(inspected)} of {len(test)} held-out digits, their labels, predictions and gates'
        draw(inspected, title, aside / 'gates.png')
    print(f"""
network            {NAME}, trained on {len(Digits(held_out=False))} of scikit-learn's handwritten digits
held-out accuracy  {accuracy:.2f} % of the {len(test)} other digits, after {args.epochs} epochs
weights            {args.output / 'weights'} (loaded back: the same logits)
gates              {args.output / 'gates.png'}
use them           import timm, timm_msar; timm.create_model('local-dir:{args.output / 'weights'}', pretrained=True)""")


def loader(dataset: Digits, is_training: bool):
    """Make timm's loader, which moves and scales images a little in training; a digit is not mirrored."""
    augmentation = {'scale': (0.7, 1.0), 'ratio': (0.9, 1.1), 'hflip': 0.0, 'color_jitter': 0.0}
    here = {'num_workers': 0, 'use_prefetcher': False, 'device': torch.device('cpu')}
    return create_loader(dataset, **DATA_CONFIG, **augmentation, **here, batch_size=64, is_training=is_training)


def train(epochs: int) -> torch.nn.Module:
    """Train on the digits, and return the network in evaluation mode."""
    model, batches = timm.create_model(NAME, num_classes=10), loader(Digits(False), is_training=True)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4)
    by_update = {'updates_per_epoch': len(batches), 'step_on_epochs': False, 'warmup_epochs': 0, 'min_lr': 0}
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=epochs, **by_update)
    for epoch in range(epochs):
        progress = tqdm(batches, f'epoch {epoch + 1}/{epochs}', unit=' batches', disable=None)
        for step, (images, targets) in enumerate(progress, epoch * len(batches) + 1):
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(step)
        print(f'epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}')
    return model.eval()
