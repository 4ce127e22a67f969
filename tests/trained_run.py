"""A small run as train.py leaves it, made with the classes that train.py uses, for the tests of export and push."""

import argparse
import copy
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, update_summary

import timm_msar  # noqa: F401  registers the networks

CLASSES = ('ankle_boot', 'bag', 'coat')


def make_run(folder: Path, model: str = 'cifar_resnet20_msar', ema: bool = False, **changed) -> Path:
    """Train a few steps, validate, and save as train.py does, in the folder `run`; return the path of last.pth.tar.

    `ema` keeps a moving average; `changed` are further arguments of train.py, and `channels_last`.
    """
    run, data = folder / 'run', folder / 'data'
    run.mkdir(parents=True)
    for name in CLASSES:  # images are not needed, only that the folders are not empty
        (data / 'train' / name).mkdir(parents=True)
        (data / 'train' / name / '0.png').touch()
    args = argparse.Namespace(
        **{
            **dict(model=model, num_classes=len(CLASSES), in_chans=None, input_size=[3, 32, 32], img_size=None),
            **dict(gp=None, bn_momentum=None, bn_eps=None, drop=0.0, pretrained=False, device_modules=['timm_msar']),
            **dict(mean=[0.219] * 3, std=[0.332] * 3, interpolation='bilinear', crop_pct=0.8, crop_mode=None),
            **dict(data=None, data_dir=str(data), dataset='', train_split='train', val_split='validation'),
            **dict(class_map='', eval_metric='top1', model_ema=ema, model_ema_force_cpu=False, model_kwargs={}),
            **dict(epochs=2, opt='sgd', lr=0.05, batch_size=12, weight_decay=1e-4, seed=42),
            **changed,
        }
    )
    (run / 'args.yaml').write_text(yaml.safe_dump(vars(args), default_flow_style=False))

    torch.manual_seed(args.seed)
    chans = args.input_size[0]
    kwargs = dict(num_classes=args.num_classes, in_chans=chans, bn_eps=args.bn_eps, **args.model_kwargs)
    network = timm.create_model(model, **kwargs)
    if changed.get('channels_last'):
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr)
    average = ModelEmaV3(network, decay=0.5) if ema else None
    saver = CheckpointSaver(network, optimizer, args=args, model_ema=average, checkpoint_dir=str(run))
    images, targets = torch.randn(24, chans, 32, 32), torch.arange(24) % args.num_classes
    images += targets.view(-1, 1, 1, 1) * 0.5  # a difference that a network can learn
    for epoch in range(args.epochs):
        network.train()
        for half in (slice(0, 12), slice(12, 24)):
            loss = torch.nn.functional.cross_entropy(network(images[half]), targets[half])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if average:
                average.update(network)
        validated = copy.deepcopy(average.module if average and not args.model_ema_force_cpu else network).eval()
        with torch.no_grad():
            output = validated(images)
        top1, top5 = (value.item() for value in accuracy(output, targets, topk=(1, 5)))
        results = {'loss': torch.nn.functional.cross_entropy(output, targets).item(), 'top1': top1, 'top5': top5}
        update_summary(epoch, {'loss': loss.item()}, results, run / 'summary.csv', lr=args.lr, write_header=epoch == 0)
        saver.save_checkpoint(epoch, metric=results['top1'])
    return run / 'last.pth.tar'


def saved(path: Path) -> dict[str, Any]:
    """Read a checkpoint without the code under test."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def weights(path: Path, key: str = 'state_dict') -> dict[str, torch.Tensor]:
    """Weights of a checkpoint."""
    return saved(path)[key]


def resave(path: Path, **changed) -> None:
    """Replace entries of a checkpoint; None removes one."""
    torch.save({key: value for key, value in (saved(path) | changed).items() if value is not None}, path)


def logits(state_dict: dict[str, torch.Tensor], name: str = 'cifar_resnet20_msar', **kwargs) -> torch.Tensor:
    """What a network with these weights computes for fixed images."""
    model = timm.create_model(name, num_classes=len(CLASSES), **kwargs).eval()
    model.load_state_dict(state_dict)
    return logits_of(model)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
