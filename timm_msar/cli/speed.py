"""Time the ImageNet networks next to timm's plain and SE ones, in turn, and print medians.

A time on a shared machine says little. The ratio of two that were taken shortly after each other, many times, says
more: a round times the inference of every network, then a training step of each, and a ratio is the median of the
ratios within the rounds, not that of the medians beside it. Two more columns are counted: the bytes that a training
step keeps for its backward pass, and the operators of a forward pass in evaluation, each a launch on a GPU.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import truediv
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ..recalibration import MultiScaleRecalibration
from .costs import plain
from .errors import CommandError, first_line, one_sentence
from .whole_number import whole_number

# For each network timm's plain and SE ones, the second of which the others are compared to.
COUNTERPARTS = {
    name: (plain(name), f'se{plain(name)}')
    for name in ('resnet18_msar', 'resnet34_msar', 'resnet50_msar', 'resnext50_msar')
}


class FigureTwo(nn.Module):
    """The layer as Figure 2 draws it, a branch for each scale: what it costs without the thoughts of `regions.py`."""

    def __init__(self, channels: int, rd_channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(k),
                ConvNormAct(channels, rd_channels, 1),
                ConvNormAct(rd_channels, channels, 1, act_layer=nn.Sigmoid),
            )
            for k in (1, 2, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(F.interpolate(branch(x), x.shape[2:]) for branch in self.branches) / 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `timm-msar speed`."""
    parser.add_argument('network', nargs='*', metavar='NETWORK', help=f'of {", ".join(COUNTERPARTS)} (default: all)')
    parser.add_argument('--device', help='where to run (default: the accelerator if there is one, else cpu)')
    # Batch norm cannot train on one value: the last map is one pixel at 32 px, Figure 2 has one mean per image.
    for option, least, default, text in (
        ('--batch-size', 2, 8, 'images at a time'),
        ('--img-size', 64, 224, 'height and width'),
        ('--rounds', 1, 15, 'times of each network'),
    ):
        parser.add_argument(option, type=whole_number(least), default=default, help=f'{text} (default: %(default)s)')
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument('--channels-last', action='store_true', default=True, help='memory format (the default)')
    layout.add_argument('--contiguous', dest='channels_last', action='store_false', help='the other memory format')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--compile', action='store_true', help='torch.compile each network')


def main(args: argparse.Namespace) -> None:
    """Print a Markdown table of median times and counts.

    Raises:
        CommandError: A network or the device is not known.
    """
    unknown = [name for name in args.network if name not in COUNTERPARTS]
    if unknown:
        raise CommandError(f'{unknown[0]} is not among the networks compared, {", ".join(COUNTERPARTS)}')
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(args.device or accelerator or 'cpu')
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built with CUDA
        raise CommandError(f'--device {args.device} cannot be used: {first_line(error)}') from error
    no_room = f'no room on {device} for {args.batch_size} images of {args.img_size} pixels'
    with one_sentence(no_room, RuntimeError):
        images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    groups = [_group(name) for name in args.network or COUNTERPARTS]
    try:
        contestants = [
            Contestant(name, make().to(device).to(memory_format=memory_format), args.amp, args.compile)
            for group in groups
            for name, make in group
        ]
        measure(contestants, images.contiguous(memory_format=memory_format), args.rounds)
    except torch.OutOfMemoryError as error:  # not one_sentence, which would call every ValueError a lack of room
        raise CommandError(f'{no_room}: {first_line(error)}; give a smaller --batch-size') from error

    setting = f'batch {args.batch_size}, {args.img_size} px, {"bfloat16 autocast" if args.amp else "float32"}'
    setting += f', {"channels_last" if args.channels_last else "contiguous"}{", compiled" if args.compile else ""}'
    print(f'{setting}, medians of times and of ratios in {args.rounds} rounds, on {_where(device)}')
    print('\n| Network | Inference (ms) | to SE | Training step (ms) | to SE | Kept (MB) | Operators |')
    print('|---|--:|--:|--:|--:|--:|--:|')
    rows = iter(contestants)
    for group in groups:
        members = [next(rows) for _ in group]
        for one in members:
            times = zip((one.inference, one.training), (members[1].inference, members[1].training))
            cells = [f'{1e3 * median(own):.1f} | {median(map(truediv, own, se)):.2f}' for own, se in times]
            print('|', ' | '.join([one.name, *cells, f'{one.memory / 1e6:.0f}', str(one.operators)]), '|')


def _group(name: str) -> list[tuple[str, Callable[[], nn.Module]]]:
    """The plain network, timm's SE network, ours with L = {1} and {1, 2, 4}, and the latter as Figure 2 draws it."""
    without, se = COUNTERPARTS[name]
    return [
        (without, partial(timm.create_model, without)),
        (se, partial(timm.create_model, se)),
        (f'{name}, scales=[1]', partial(timm.create_model, name, scales=[1])),
        (name, partial(timm.create_model, name)),
        (f'{name}, Figure 2', partial(_as_figure_two, name)),
    ]


def _as_figure_two(name: str) -> nn.Module:
    """The network with FigureTwo of the same width in the place of MS-SAR."""
    model = timm.create_model(name)
    for module in list(model.modules()):
        if isinstance(getattr(module, 'se', None), MultiScaleRecalibration):
            module.se = FigureTwo(module.se.channels, module.se.scale['1'].fc1.out_channels)
    return model


class Contestant:
    """A network, and what was measured of it: seconds of every round, bytes, and the number of operators."""

    def __init__(self, name: str, model: nn.Module, amp: bool, compiled: bool):
        self.name, self.amp = name, amp
        self.eager = model
        self.model: Any = torch.compile(model) if compiled else model
        self.sgd = SGD(model.parameters(), lr=0.0, momentum=0.9)  # the work of a step, but the same in every round
        self.inference: list[float] = []
        self.training: list[float] = []
        self.memory = self.operators = 0

    def infer(self, images: Tensor) -> None:
        """Compute the logits in eval mode."""
        with torch.inference_mode(), self._autocast(images):
            self.model.eval()(images)

    def train(self, images: Tensor) -> None:
        """Make one update: forwards, backwards, and the optimiser's step."""
        targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
        with self._autocast(images):
            loss = F.cross_entropy(self.model.train()(images), targets)
        loss.backward()
        self.sgd.step()
        self.sgd.zero_grad()

    def _autocast(self, images: Tensor):
        return torch.autocast(images.device.type, torch.bfloat16) if self.amp else nullcontext()


def measure(contestants: list[Contestant], images: Tensor, rounds: int) -> None:
    """Time every network once a round, after first calls that do not count, in which memory and operators are counted.

    Args:
        contestants: The networks.
        images: A batch (B, 3, H, W), on the device to measure.
        rounds: Rounds that count.
    """
    for one in tqdm(contestants, desc='First calls', unit=' networks'):
        one.infer(images)  # also allocates, chooses kernels and compiles
        one.train(images)
        one.memory = kept_for_backward(one, images)
        one.operators = operators(one.eager, images[:1])
    # Apart, since an inference after training finds caches and memory as nobody who only infers does.
    for number in tqdm(range(rounds), desc='Inference', unit=' rounds'):
        for one in _from(number, contestants):
            one.inference.append(_seconds(one.infer, images))
    for number in tqdm(range(rounds), desc='Training', unit=' rounds'):
        for one in _from(number, contestants):
            one.training.append(_seconds(one.train, images))


def _from(number: int, contestants: list[Contestant]) -> list[Contestant]:
    """All of them, from another one on in each round, so that none always comes after the same."""
    first = number % len(contestants)
    return contestants[first:] + contestants[:first]


def kept_for_backward(one: Contestant, images: Tensor) -> int:
    """Bytes of activations that autograd keeps from the forward to the backward pass: most of a step's peak memory."""
    storages = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        one.train(images)
    for weight in one.eager.state_dict().values():
        storages.pop(weight.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def operators(model: nn.Module, images: Tensor) -> int:
    """How many operators of ATen other than views a forward pass in evaluation calls."""
    with torch.no_grad(), _Calls() as calls:
        model.eval()(images)
    return calls.count


class _Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function is not torch.ops.aten._unsafe_view.default
        return function(*args, **(kwargs or {}))


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
