"""Ways to compute the layer on a GPU, side by side in one run: first whether they are right, then how fast they are.

python tools/gpu_candidates.py  # batch 256, 224 px, bfloat16 autocast, channels_last
python tools/gpu_candidates.py --ways bmm --compile default reduce-overhead  # compiled networks instead
TRITON_INTERPRET=1 python tools/gpu_candidates.py --device cpu  # a dry run with small images: its times mean nothing

today     the package as it is
matrices  cells are never blocks of memory: means and gates are products with matrices at every size
bmm       matrices, and the gate's grouped convolutions as batched products
fused     bmm, and x ⊙ Z as one Triton kernel, whose backward pass reads x and the gradient once

Each way is compared with float64 on the CPU. Those that are right are timed in turn with timm's SE: ResNet-18's layers,
then networks. A table is printed as soon as it is there. Compiled networks are timed one after the other.
"""

import argparse
import contextlib
import copy
import itertools
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import triton
import triton.language as tl
from gpu_profile import difference, step
from torch import Tensor, nn

import timm_msar
from timm_msar import regions
from timm_msar.cli.speed import Contestant
from timm_msar.gate import Gate

NETWORKS = ('seresnet18', 'resnet18_msar'), ('seresnet34', 'resnet34_msar'), ('seresnext50_32x4d', 'resnext50_msar')
HEADER = '| | | inference (ms) | to SE | training step (ms) | to SE | peak (MB) | to SE |\n|---|---|' + 6 * '--:|'
# Norms divide by the deviation of regions, which are all alike at scale 1 of one image. That magnifies rounding.
LIMITS = {'evaluation': 1e-5, 'training': 1e-3, 'training with one image': 0.1}
Case = tuple[nn.Module, Callable[[bool], None]]  # what runs the module, in training or not


def grouped(conv: nn.Module, x: Tensor) -> Tensor:
    """A grouped 1×1 convolution as a batched product, where nothing could notice.

    Norms see (B, C, h, w) as ever. Were all positions one image, (1, C, B, h·w), they could get a gradient in
    channels_last order with an odd batch stride. PyTorch 2.14's batch norm is silently wrong there, on a processor.
    """
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    if type(conv) is not nn.Conv2d or conv.bias is not None or any(getattr(conv, name) for name in hooks):
        return conv(x)
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch * height * width, conv.groups, channels // conv.groups)
    weight = conv.weight.view(conv.groups, -1, channels // conv.groups)
    y = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)  # (positions, L, channels)
    return y.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def gate_by_bmm(self: Gate, y: Tensor) -> Tensor:
    return self.gate(self.bn2(grouped(self.fc2, self.act(self.bn1(grouped(self.fc1, y))))))


def fused_forward(self: timm_msar.MultiScaleRecalibration, x: Tensor, source: Tensor | None = None) -> Tensor:
    z = self.gate(self.regions(x if source is None else source))
    if self.strategy != 'regional' or not x.is_contiguous(memory_format=torch.channels_last):
        return regions.times(x, regions.spread(z, x, len(self.scales), self.regions.at_cells))
    cells = z.permute(0, 2, 3, 1).unflatten(3, (len(self.scales), -1)).mean(3)
    return Product.apply(x, cells.to(x.dtype).contiguous())


class Product(torch.autograd.Function):
    """x ⊙ Z of x, (B, C, H, W) in channels_last, and Z at cells, (B, rows, cols, C), which are what it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(x, cells)
        return multiply(x, cells)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, cells = ctx.saved_tensors
        return multiply(gradient.contiguous(memory_format=torch.channels_last), cells, x)


def multiply(a: Tensor, cells: Tensor, b: Tensor | None = None) -> tuple[Tensor, ...]:
    """a ⊙ Z, and the sums of a ⊙ b over each cell."""
    (batch, channels, height, width), (rows, cols) = a.shape, cells.shape[1:3]
    out, sums = torch.empty_like(a), cells if b is None else torch.empty_like(cells)
    wide = triton.next_power_of_2(triton.cdiv(width, cols))
    block = min(triton.next_power_of_2(channels), max(1024 // wide, 1))
    grid, sizes = (batch, rows * cols, triton.cdiv(channels, block)), (height, width, rows, cols, channels)
    of_a_cell[grid](a, cells, a if b is None else b, out, sums, *sizes, b is not None, wide, block)
    return out, sums


# fmt: off
@triton.jit
def of_a_cell(a, cells, b, out, sums, height, width, rows, cols, channels,
              SUM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    # fmt: on
    image, cell, channel = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    top, bottom = (cell // cols * height + rows - 1) // rows, ((cell // cols + 1) * height + rows - 1) // rows
    left, right = (cell % cols * width + cols - 1) // cols, ((cell % cols + 1) * width + cols - 1) // cols
    place, col = (image * rows * cols + cell) * channels + channel, left + tl.arange(0, WIDE)
    gate = tl.load(cells + place, mask=channel < channels, other=0).to(tl.float32)  # as the interpreter needs it
    mask, total = (col < right)[:, None] & (channel < channels)[None], tl.zeros((BLOCK,), tl.float32)
    for row in range(top, bottom):
        at = ((image * height + row) * width + col)[:, None] * channels + channel[None]
        value = tl.load(a + at, mask=mask, other=0).to(tl.float32)
        tl.store(out + at, value * gate[None], mask=mask)
        if SUM:
            total += tl.sum(value * tl.load(b + at, mask=mask, other=0).to(tl.float32), 0)
    if SUM:
        tl.store(sums + place, total, mask=channel < channels)


MATRICES = (regions, '_are_blocks', lambda x, rows, cols: False)
BMM = (Gate, '_z', gate_by_bmm)
FUSED = (timm_msar.MultiScaleRecalibration, 'forward', fused_forward)
WAYS: dict[str, list[tuple]] = {
    'today': [], 'matrices': [MATRICES], 'bmm': [MATRICES, BMM], 'fused': [MATRICES, BMM, FUSED]
}  # fmt: skip


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Compute layers in this way inside the block. SE has its own."""
    with contextlib.ExitStack() as stack:
        for patch in WAYS.get(name, []):
            stack.enter_context(mock.patch.object(*patch))
        yield


def against_float64(name: str, device: torch.device) -> bool:
    """Compare the output, each gradient and each running statistic with float64 on the CPU in today's way."""
    worst, sizes = dict.fromkeys(LIMITS, 0.0), ((56, 56), (28, 28), (14, 14), (7, 7), (9, 13), (4, 4))
    formats, kinds = (torch.channels_last, torch.contiguous_format), zip(LIMITS, (8, 8, 1), (False, True, True))
    torch.manual_seed(0)
    for size, memory_format, (kind, batch, training) in itertools.product(sizes, formats, kinds):
        layer = timm_msar.MultiScaleRecalibration(48, rd_ratio=0.375).train(training)
        for key, tensor in layer.state_dict().items():
            if '.bn' in key and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        x, results = torch.randn(batch, 48, *size) + torch.randn(batch, 48, 1, 1), []
        x[:, :, : size[0] // 2] *= 2  # regions differ
        for who, *to in ('today', torch.device('cpu'), torch.float64), (name, device, torch.float32):
            module, images = copy.deepcopy(layer).to(*to), x.to(*to, memory_format=memory_format)
            with way(who):
                y = step(module, images.requires_grad_(training), training, amp=False)
            gradients = [p.grad for p in (images, *module.parameters()) if p.grad is not None]
            results.append([t.cpu() for t in (y, *gradients, *module.buffers()) if t.is_floating_point()])
        worst[kind] = max(worst[kind], difference(results[1], results[0]))
    differences = ', '.join(f'{kind} {value:.0e}' for kind, value in worst.items())
    print(f'{name}: largest difference to float64: {differences}', flush=True)
    return all(value < LIMITS[kind] for kind, value in worst.items())


def network(name: str, device: torch.device, mode: str | None = None) -> Case:
    """A network, and what runs it as `timm-msar speed` does."""
    batch, size = (256, 224) if device.type == 'cuda' else (2, 32)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    model = timm.create_model(name).to(device, memory_format=torch.channels_last)
    contestant = Contestant(name, model, images, amp=device.type == 'cuda', mode=mode)
    return contestant.model, contestant.step


def layer_of(name: str, device: torch.device, stage: int) -> Case:
    """The first layer in a stage of a network, and what runs it ten times: in a network, too, launches run ahead."""
    calls, batch, size = (10, 256, 56 >> stage) if device.type == 'cuda' else (1, 2, 8 >> stage)
    module = getattr(timm.create_model(name), f'layer{stage + 1}')[0].se.to(device, memory_format=torch.channels_last)
    amp = device.type == 'cuda'  # Triton's interpreter takes seconds for a layer in bfloat16
    maps = torch.randn(2, batch, 64 << stage, size, size, device=device, dtype=torch.bfloat16 if amp else None)
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in maps)
    x.requires_grad_()

    def run(training: bool) -> None:
        for _ in range(calls):
            with torch.set_grad_enabled(training), torch.autocast(device.type, torch.bfloat16, amp):
                y = module(x)
            if training:
                y.backward(gradient)
                x.grad = None
                module.zero_grad()

    return module, run


def measure(cases: dict[str, Case], end: float) -> dict[str, list[float]]:
    """The medians in ms of inference and of a training step, and the MB that a step adds at its peak, by way.

    There are 5 rounds (on a processor 1), and up to 50 if they end in time. Each starts with another case.
    """
    found: dict[str, list[list[float]]] = {name: [[], [], []] for name in cases}
    on_gpu = next(next(iter(cases.values()))[0].parameters()).is_cuda
    synchronize, fewest = (torch.cuda.synchronize, 5) if on_gpu else (int, 1)
    for number in range(-3 if on_gpu else 0, 50):  # the first three compile, choose kernels and allocate
        start, first = time.perf_counter(), number % len(cases)
        for name, training in itertools.product([*cases, *cases][first : first + len(cases)], (False, True)):
            module, run = cases[name]
            module.train(training)
            torch.accelerator.reset_peak_memory_stats()
            with way(name):
                before, clock = torch.accelerator.memory_allocated(), time.perf_counter()
                run(training)
                synchronize()
                ms, peak = 1e3 * (time.perf_counter() - clock), torch.accelerator.max_memory_allocated() - before
            if number >= 0:
                found[name][training].append(ms)
                found[name][2].append(peak / 1e6)
        if number + 1 >= fewest and 2 * time.perf_counter() - start > end:
            break
    return {name: [float(np.median(ms)) for ms in (x, y)] + [max(peaks)] for name, (x, y, peaks) in found.items()}


def main() -> int:
    """Print differences to float64, then the tables. Return 1 if a way is wrong or does not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    parser.add_argument('--seconds', type=int, default=200, help='end after so many (default: 200), or 20 more')
    parser.add_argument('--compile', nargs='+', default=[], metavar='MODE', help='modes of torch.compile')
    args = parser.parse_args()
    deadline, device, ways = time.perf_counter() + args.seconds, torch.device(args.device), []
    signal.signal(signal.SIGALRM, lambda *_: sys.exit('The time is over.'))
    signal.alarm(args.seconds + 20)
    warnings.filterwarnings('ignore', 'MS-SAR gates saw a batch of one image')
    torch.backends.cudnn.allow_tf32 = False
    for name in args.ways:
        try:
            with way(name):
                layer_of('resnet18_msar', device, 0)[1](True)  # on a GPU in bfloat16
            ways += [name] * against_float64(name, device)
        except Exception as error:  # the other ways are worth their tables
            print(f'{name}: {type(error).__name__}: {error}', flush=True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True  # as in timm's scripts

    print(HEADER)
    tables: list[tuple] = [(f'layer of stage {i + 1}, 10 calls', layer_of, i, *NETWORKS[0]) for i in range(4)]
    tables += [(ours, network, None, se, ours) for se, ours in NETWORKS]
    if args.compile:
        tables = [(f'{ours}, {mode}', network, mode, se, ours) for mode in args.compile for se, ours in NETWORKS]
    names = ['SE', *ways]
    for left, (title, case, argument, se, ours) in zip(range(len(tables), 0, -1), tables):
        now = time.perf_counter()
        found: dict[str, list[float]] = {}
        for group in [[name] for name in names] if args.compile else [names]:
            torch.compiler.reset()  # or a network could run code compiled for another way
            cases = {name: case(se if name == 'SE' else ours, device, argument) for name in group}
            try:
                found |= measure(cases, now + (deadline - now) / left)
            except Exception as error:  # a way that cannot be compiled, say
                print(f'| {title} | {", ".join(group)} | {type(error).__name__} |', flush=True)
                continue
            for name in group:
                pairs = zip(found[name], found['SE'])
                cells = ' | '.join(f'{value:.2f} | {value / of_se if of_se else 0:.2f}' for value, of_se in pairs)
                print(f'| {title} | {name} | {cells} |', flush=True)
    return int(len(ways) < len(args.ways))


if __name__ == '__main__':
    sys.exit(main())
