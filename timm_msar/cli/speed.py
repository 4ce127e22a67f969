"""Time the ImageNet networks next to timm's plain and SE ones, in turn, and print medians.

A time on a shared machine says little. The ratio of two that were taken in turn, many times, says more: a round times
every network once, and the figures are medians over the rounds.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from .errors import CommandError, first_line

# The plain network, timm's SE network (which the others are compared to), and ours with L = {1} and L = {1, 2, 4}.
NETWORKS: list[list[tuple[str, dict[str, Any]]]] = [
    [(plain, {}), (se, {}), (msar, {'scales': [1]}), (msar, {})]
    for plain, se, msar in (
        ('resnet18', 'seresnet18', 'resnet18_msar'),
        ('resnet34', 'seresnet34', 'resnet34_msar'),
        ('resnext50_32x4d', 'seresnext50_32x4d', 'resnext50_msar'),
    )
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `timm-msar speed`."""
    parser.add_argument('--device', help='where to run (default: the accelerator if there is one, else cpu)')
    parser.add_argument('--batch-size', type=int, default=8, help='images at a time (default: %(default)s)')
    parser.add_argument('--img-size', type=int, default=224, help='height and width (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=15, help='times of each network (default: %(default)s)')


def main(args: argparse.Namespace) -> None:
    """Print a Markdown table of median times."""
    # At 32 px the last map is one pixel, and batch norm cannot train on one value.
    for option, value, least in (
        ('--batch-size', args.batch_size, 1),
        ('--img-size', args.img_size, 64),
        ('--rounds', args.rounds, 1),
    ):
        if value < least:
            raise CommandError(f'{option} must be at least {least}, not {value}.')
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(args.device or accelerator or 'cpu')
        images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built with CUDA
        raise CommandError(f'--device {args.device} cannot be used: {first_line(error)}') from error
    times = measure([network for group in NETWORKS for network in group], images, args.rounds)

    setting = f'batch {args.batch_size}, {args.img_size} px, float32, channels_last, {args.rounds} rounds'
    print(f'{setting}, on {_where(device)}')
    print('\n| Network | Inference (ms) | to SE | Training step (ms) | to SE |\n|---|--:|--:|--:|--:|')
    measured = iter(times)
    for group in NETWORKS:
        rows = [next(measured) for _ in group]
        _, *se = rows[1]
        for name, *ours in rows:
            cells = [f'{1e3 * median(own):.1f} | {median(own) / median(other):.2f}' for own, other in zip(ours, se)]
            print('|', ' | '.join([name, *cells]), '|')


def measure(
    networks: list[tuple[str, dict[str, Any]]], images: Tensor, rounds: int
) -> list[tuple[str, list[float], list[float]]]:
    """Time every network once a round, after one round that does not count.

    Args:
        networks: Names and arguments for timm.create_model.
        images: A batch (B, 3, H, W), on the device to measure.
        rounds: Rounds that count.

    Returns:
        For each network its name with its arguments, and `rounds` times in seconds of inference and of training.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    prepared: list[tuple[nn.Module, Optimizer, tuple[str, list[float], list[float]]]] = []
    for name, model_args in networks:
        model = timm.create_model(name, device=images.device, **model_args).to(memory_format=torch.channels_last)
        label = ', '.join([name, *(f'{key}={value}' for key, value in model_args.items())])
        sgd = SGD(model.parameters(), lr=0.0, momentum=0.9)  # the work of a step, but the same in every round
        prepared.append((model, sgd, (label, [], [])))
    for number in tqdm(range(rounds + 1), desc='Timing', unit=' rounds'):
        for model, optimizer, (_, inference, training) in prepared:
            seconds = _seconds(infer, model, images), _seconds(train, model, optimizer, images)
            if number > 0:  # the first round also allocates memory and chooses kernels
                inference.append(seconds[0])
                training.append(seconds[1])
    return [times for _, _, times in prepared]


def infer(model: nn.Module, images: Tensor) -> None:
    """Compute the logits in eval mode."""
    with torch.inference_mode():
        model.eval()(images)


def train(model: nn.Module, optimizer: Optimizer, images: Tensor) -> None:
    """Make one update: forwards, backwards, and the optimiser's step."""
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
    F.cross_entropy(model.train()(images), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def _seconds(function: Callable[..., None], *args) -> float:
    device = args[-1].device
    start = time.perf_counter()
    function(*args)
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)  # what is still queued there is part of the time
    return time.perf_counter() - start


def _where(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device}, {torch.get_num_threads()} threads' if device.type == 'cpu' else str(device)
