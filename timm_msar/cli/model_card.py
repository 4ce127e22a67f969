"""Fill the template of a model card, `hub_cards/template.md`: timm's sections, with front matter for the Hub."""

import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData

from ..recalibration import MultiScaleRecalibration
from .multiply_adds import multiply_adds
from .photo import MODES
from .training_data import TrainingData

IMAGE_URL = 'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/beignets-task-guide.png'
REQUIREMENT = (
    ' It needs the package `timm-msar`: importing it registers the network, and without it timm says "Unknown model".'
)
METRICS = {'top1': ('accuracy', 'Top-1 accuracy'), 'top5': ('top_5_accuracy', 'Top-5 accuracy')}


def card_folder() -> Path:
    """`hub_cards/`, which the wheel holds inside the package and a checkout beside it."""
    package = Path(str(files('timm_msar')))
    return next(path for path in (package / 'hub_cards', package.parent / 'hub_cards') if path.is_dir())


def model_card(
    source: str,
    model_id: str,
    data: TrainingData,
    results: dict[str, float],
    description: str,
    base_model: str | None = None,
    sha256: str = '',
) -> str:
    """Write a model card.

    Args:
        source: What `timm.create_model` builds the network from here: `local-dir:FOLDER`, or a registered name.
        model_id: What the reader's `timm.create_model` loads it by: `hf-hub:ME/NAME`, or a registered name.
        data: What it was trained on.
        results: Measured `top1` and `top5` in percent; they go into the model index.
        description: A paragraph on how it was trained, in Markdown.
        base_model: Repository of the weights that it started from.
        sha256: Checksum of model.safetensors.

    Returns:
        The text of README.md.
    """
    model: Any = timm.create_model(source).eval()
    cfg = model.pretrained_cfg
    in_chans, height, width = cfg['input_size']
    params = sum(parameter.numel() for parameter in model.parameters())
    macs = multiply_adds(model, (in_chans, height, width))
    title, dataset = as_markdown(model_id.rpartition('/')[2].removeprefix('local-dir:')), as_markdown(data.name)
    shapes, unpooled = _feature_shapes(source, model)
    own = (title, *(f'{results[name]:.2f}' if name in results else 'not measured' for name in METRICS))
    table = [('Model', 'Top-1 (%)', 'Top-5 (%)'), ('---', '---', '---'), own]
    measured = f'Measured on the {as_markdown(data.split)} split of {dataset}.\n\n' if results else ''
    metadata = ModelCardData(
        license=cfg.get('license'),  # who trained the weights decides
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-msar'],
        datasets=[data.hub_id] if data.hub_id else None,
        base_model=base_model,
        metrics=['accuracy'] if results else None,
        model_name=title if results else None,
        eval_results=_eval_results(data, results) or None,
    )
    names = {
        'front_matter': metadata.to_yaml(),
        'title': title,
        'with_or_without': 'with' if _is_recalibrated(model) else 'without',
        'requirement': REQUIREMENT if _is_from_here(model) else '',
        'description': description,
        'params': f'{params / 1e6:.2f}',
        'gmacs': f'{macs / 1e9:.3f}',
        'image_size': f'{height} x {width}',
        'classes': _classes(data, model.num_classes),
        'dataset': dataset + (f', {data.per_class} training images of each class' if data.per_class else ''),
        'sha256': sha256,
        'model_id': repr(model_id),
        'image_url': IMAGE_URL,
        'image_mode': MODES.get(in_chans, 'RGB'),
        'topk': str(min(5, model.num_classes)),
        'feature_shapes': '\n'.join(f'    #  torch.Size({list(shape)})' for shape in shapes),
        'unpooled_shape': tuple(unpooled),
        'comparison': measured + '\n'.join(f'| {" | ".join(row)} |' for row in table),
    }
    return Template((card_folder() / 'template.md').read_text(encoding='utf-8')).substitute(names)


def as_markdown(text: str) -> str:
    """Write a name so that Markdown shows it as it is, in one line."""
    printable = ''.join(letter if letter.isprintable() else ' ' for letter in text)
    return re.sub(r'([\\`*\[\]<>|~&#])', r'\\\1', ' '.join(printable.split()))


def _is_from_here(model: torch.nn.Module) -> bool:
    return type(model).__module__.startswith('timm_msar.')


def _is_recalibrated(model: torch.nn.Module) -> bool:
    return any(isinstance(module, MultiScaleRecalibration) for module in model.modules())


def _classes(data: TrainingData, num_classes: int) -> str:
    if not data.classes:
        return str(num_classes)
    names = ', '.join(map(as_markdown, data.classes[:10]))
    return f'{num_classes} ({names}{", ..." if len(data.classes) > 10 else ""})'


def _eval_results(data: TrainingData, results: dict[str, float]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=data.hub_id or data.name,
            dataset_name=data.name,
            dataset_split=data.split,
            metric_type=metric,
            metric_name=name,
            metric_value=round(results[key] / 100, 6),  # the Hub's accuracy is a fraction
        )
        for key, (metric, name) in METRICS.items()
        if key in results
    ]


@torch.no_grad()
def _feature_shapes(source: str, model: Any) -> tuple[list[torch.Size], torch.Size]:
    """Shapes that the examples of the card print."""
    image = torch.zeros(1, *model.pretrained_cfg['input_size'])
    features = timm.create_model(source, features_only=True).eval()
    return [feature.shape for feature in features(image)], model.forward_features(image).shape
