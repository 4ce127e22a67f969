"""Print the five most probable classes of images, by name where the names are known.

They are the names of the data set of a checkpoint, or those in an exported folder or in a network's config.
"""

import argparse

import torch

from . import inference
from .errors import CommandError, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inference.add_arguments(parser)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Predict every image that can be read."""
    files = inference.image_files(args.images)
    network = inference.load(args.model, args.checkpoint)
    if not network.model.num_classes:
        raise CommandError(f'{network.name} has no classifier, so it predicts nothing')
    read = 0
    for read, (path, x) in enumerate(inference.prepared(files, network), 1):  # noqa: B007
        say(path)
        probabilities = network.model(x).softmax(1)[0]
        best = probabilities.topk(min(5, len(probabilities)))
        for probability, index in zip(best.values.tolist(), best.indices.tolist()):
            say(f'  {probability:8.3%}  {network.classes[index]}')
    if read < len(files):
        raise CommandError(f'{len(files) - read} of {len(files)} images cannot be read')
