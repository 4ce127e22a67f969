"""Where a GPU's time goes in ResNet-18 with SE and with MS-SAR, and whether the layer is right there.

python tools/gpu_profile.py               # batch 256, 224 px, bfloat16, channels_last
python tools/gpu_profile.py --device cpu  # a dry run with small images, which counts the CPU's operators

It prints a table of the networks and of one layer at each size: kernels, their time, the time from call to call, and
the gaps, in which the GPU waits for launches. Then it compares the layer with float64 on the CPU, repeats a training
step, and replays CUDA graphs. It returns 1 if any of these is wrong.
"""

import argparse
import copy
import itertools
import sys
import time

import timm
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import timm_msar


def step(module: nn.Module, x: Tensor, training: bool, amp: bool = True) -> Tensor:
    """Run a module forwards, and in training backwards. Return the output."""
    x.grad = None
    module.zero_grad()
    with torch.set_grad_enabled(training), torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        y = module(x)
    if training:
        y.backward(torch.ones_like(y).cumsum(-1))
    return y.detach()


def measure(module: nn.Module, x: Tensor, training: bool, repeats: int) -> str:
    """Kernels of a call, their time, the time from call to call, and the difference, as cells of a table."""
    synchronize = torch.cuda.synchronize if x.is_cuda else int

    def calls() -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step(module.train(training), x, training)
        synchronize()
        return 1e6 * (time.perf_counter() - start)

    calls()  # allocates and chooses kernels
    wall = calls()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * x.is_cuda]) as profile:
        calls()
    kernels = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    if not x.is_cuda:
        kernels = [e for e in profile.events() if e.name.startswith('aten::') and not e.cpu_children]
    busy = sum(e.time_range.elapsed_us() for e in kernels)
    return ' | '.join(f'{value / repeats:.0f}' for value in (len(kernels), busy, wall, wall - busy))


def print_profile(device: torch.device, batch_size: int, img_size: int, repeats: int) -> None:
    """Print a Markdown table of both networks, and of the first layer of each of their stages."""
    print('| | | inference: kernels | busy (µs) | call (µs) | gaps (µs) | step: kernels | busy | call | gaps |')
    print('|---|---|--:|--:|--:|--:|--:|--:|--:|--:|')
    for name in ('seresnet18', 'resnet18_msar'):
        model = timm.create_model(name).to(device, memory_format=torch.channels_last)
        cases = [('network', model, (3, img_size, img_size), torch.float32)]
        for i, channels in enumerate((64, 128, 256, 512)):
            shape = channels, img_size // 2 ** (i + 2), img_size // 2 ** (i + 2)
            layer = getattr(model, f'layer{i + 1}')[0].se
            cases.append((f'layer, {channels} × {shape[1]}²', layer, shape, torch.bfloat16))
        for what, module, shape, dtype in cases:
            x = torch.randn(batch_size, *shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            cells = [measure(module, x.requires_grad_(training), training, repeats) for training in (False, True)]
            print(f'| {name} | {what} | {" | ".join(cells)} |', flush=True)


def outcome(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The output, and all gradients in one vector, on the CPU."""
    gradients = [p.grad.flatten() for p in (x, *module.parameters()) if p.grad is not None]
    return [y.cpu(), torch.cat(gradients).cpu()] if gradients else [y.cpu()]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference relative to the largest value of its tensor. It is infinite if one is not a number."""
    differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(differences).nan_to_num(nan=torch.inf).max().item()


def against_float64(device: torch.device) -> bool:
    """Compare the layer's output and gradients with float64 on the CPU, and a repeated step with the first."""
    worst, other = {False: 0.0, True: 0.0}, []
    formats, sizes = (torch.contiguous_format, torch.channels_last), (56, 28, 14, 7, 4, 3, 2, 1)
    for case in itertools.product(('regional', 'sliding'), formats, sizes, (1, 8), (False, True)):
        strategy, memory_format, size, batch, training = case
        layer = timm_msar.MultiScaleRecalibration(64, rd_ratio=0.375, strategy=strategy).train(training)
        for name, tensor in layer.state_dict().items():
            if '.bn' in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        x = torch.randn(batch, 64, size, size).to(memory_format=memory_format)
        results = []
        for to in (torch.device('cpu'), torch.float64), (device, torch.float32), (device, torch.float32):
            module, images = copy.deepcopy(layer).to(*to), x.to(*to).requires_grad_(training)
            results.append(outcome(module, images, step(module, images, training, amp=False)))
        if not all(map(torch.equal, *results[1:])):
            other.append(case)
        worst[training] = max(worst[training], difference(results[1], results[0]))
    print(f'\nlargest difference to float64 on the CPU: evaluation {worst[False]:.0e}, training {worst[True]:.0e}')
    print(f'cases in which a repeated step gives other bits: {other or None}')
    # In training a batch norm divides by the deviation of regions that are nearly alike, and so magnifies rounding.
    return worst[False] < 1e-5 and worst[True] < 2e-2 and not other


def graphs(device: torch.device) -> bool:
    """Capture inference and a training step as CUDA graphs, and compare a replay with other images to plain calls."""
    model = timm.create_model('resnet18_msar', zero_init_last=False).to(device)
    images, others = torch.randn(2, 8, 3, 96, 96, device=device)
    worst = 0.0
    for training in (False, True):
        model.train(training)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                step(model, images, training, amp=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step(model, images, training, amp=False)
        images.copy_(others)
        graph.replay()
        found = outcome(model, images, y)
        worst = max(worst, difference(found, outcome(model, others, step(model, others, training, amp=False))))
    print(f'largest difference of a replayed CUDA graph: {worst:.0e}')
    return worst < 1e-4


def main() -> int:
    """Print the table, then the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    device = torch.device(parser.parse_args().device)
    torch.backends.cudnn.benchmark = True  # as timm's scripts do
    print_profile(device, *((256, 224, 20) if device.type == 'cuda' else (2, 64, 2)))
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True  # cuDNN chooses algorithms that add in any order, otherwise
    torch.manual_seed(0)
    return int(not all([against_float64(device), device.type != 'cuda' or graphs(device)]))


if __name__ == '__main__':
    sys.exit(main())
