"""Time the ImageNet networks next to timm's plain and SE ones, in turn, and print medians.

Each round times every network. "To SE" is the ratio of two printed medians. How little it is worth on a busy machine is
in brackets: the quartiles of the ratios of two times in the same round. The other columns are counts: the bytes that a
training step keeps for its backward pass, and operators without views, each about one launch on a GPU.
"""

import argparse
import time
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from .errors import CommandError, positive

NETWORKS = {  # and the plain network of each; timm has an SE network of the same name
    **{f'{name}_msar': name for name in ('resnet18', 'resnet34', 'resnet50')},
    'resnext50_msar': 'resnext50_32x4d',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('network', nargs='*', metavar='NETWORK', help=f'of {", ".join(NETWORKS)} (default: all)')
    parser.add_argument('--device', help='where to run (default: the accelerator if there is one, else cpu)')
    parser.add_argument('--batch-size', type=positive, default=8, help='images (default: 8)')
    parser.add_argument('--img-size', type=positive, default=224, help='height and width (default: 224)')
    parser.add_argument('--rounds', type=positive, default=15, help='times of each network (default: 15)')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    modes = 'compile in a mode of torch.compile; reduce-overhead uses CUDA graphs (default: %(const)s)'
    parser.add_argument('--compile', nargs='?', const='default', metavar='MODE', help=modes)


def main(args: argparse.Namespace) -> None:
    """Print a Markdown table with four rows for each network: plain, SE, ours with L = {1}, and ours."""
    if unknown := set(args.network).difference(NETWORKS):
        raise CommandError(f'{unknown.pop()} is none of {", ".join(NETWORKS)}')
    device = torch.device(args.device or torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    torch.backends.cudnn.benchmark = True  # as timm's scripts do
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    contestants = []
    for ours in args.network or NETWORKS:
        plain = NETWORKS[ours]
        for name, kwargs in ((plain, {}), (f'se{plain}', {}), (ours, {'scales': [1]}), (ours, {})):
            model = timm.create_model(name, **kwargs).to(device, memory_format=torch.channels_last)
            name += ', scales=[1]' if kwargs else ''
            contestants.append(Contestant(name, model, images, args.amp, args.compile))
    measure(contestants, args.rounds)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device)
    kind = f'{"bfloat16 autocast" if args.amp else "float32"}{f", compiled ({args.compile})" if args.compile else ""}'
    setting = f'batch {args.batch_size}, {args.img_size} px, channels_last, {kind}'
    print(f'{setting}, medians in {args.rounds} rounds, on {where}, {torch.get_num_threads()} threads\n')
    print('| Network | Inference (ms) | to SE | Operators | Training step (ms) | to SE | Operators | Kept (MB) |')
    print('|---|--:|--:|--:|--:|--:|--:|--:|')
    for i, one in enumerate(contestants):
        se, cells = contestants[i // 4 * 4 + 1], [one.name]
        for training, times in one.seconds.items():
            ms, ms_of_se = (round(1e3 * float(np.median(x.seconds[training])), 2) for x in (one, se))
            low, high = np.quantile(np.divide(times, se.seconds[training]), (0.25, 0.75))
            cells += [f'{ms:.2f}', f'{ms / ms_of_se:.2f} ({low:.2f} to {high:.2f})', str(one.operators[training])]
        print(f'| {" | ".join(cells)} | {one.kept / 1e6:.0f} |')


class Contestant:
    """A network, and what was measured of its inference (False) and of its training steps (True)."""

    def __init__(self, name: str, model: nn.Module, images: Tensor, amp: bool = False, mode: str | None = None):
        self.name, self.eager, self.images = name, model, images
        self.model: Any = torch.compile(model, mode=mode) if mode else model
        self.targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.autocast: Any = torch.autocast(images.device.type, torch.bfloat16, enabled=amp)
        self.sgd = SGD(model.parameters(), lr=0.0, momentum=0.9)  # the work of a step, but the same in every round
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        self.operators: dict[bool, int] = {}
        self.kept = 0

    def run(self, model: Any, training: bool) -> None:
        """Run the network, eager or compiled, forwards and in training backwards."""
        with torch.set_grad_enabled(training), self.autocast:
            logits = model(self.images)
        if training:
            F.cross_entropy(logits.float(), self.targets).backward()

    def step(self, training: bool) -> None:
        """Infer, or make one update."""
        self.run(self.model, training)
        if training:
            self.sgd.step()
            self.sgd.zero_grad()

    def count(self, training: bool) -> None:
        """Count operators, and the bytes that autograd keeps for the backward pass: most of a step's peak memory."""
        kept: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)  # type: ignore
        with Operators() as operators, hooks:
            self.run(self.eager, training)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        weights = {x.untyped_storage().data_ptr() for x in self.eager.state_dict().values()}
        self.kept = sum(size for address, size in storages.items() if address not in weights)
        self.operators[training] = operators.total


class Operators(TorchDispatchMode):
    """Counts the operators of ATen, other than views, that are called in a block."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += not function.is_view and function is not torch.ops.aten._unsafe_view.default
        return function(*args, **(kwargs or {}))


def measure(contestants: list[Contestant], rounds: int) -> None:
    """Time every network once a round, first inference, then training. Each round starts with a different network."""
    for training in (False, True):
        for one in tqdm(contestants, desc='First calls', unit=' networks', disable=None):
            one.model.train(training)
            one.step(training)  # allocates, chooses kernels and compiles
            one.count(training)
        for number in tqdm(range(rounds), desc='Training' if training else 'Inference', unit=' rounds', disable=None):
            first = number % len(contestants)
            for one in contestants[first:] + contestants[:first]:
                start = time.perf_counter()
                one.step(training)
                if one.images.device.type != 'cpu':
                    torch.accelerator.synchronize(one.images.device)  # what is still queued there is part of the time
                one.seconds[training].append(time.perf_counter() - start)
