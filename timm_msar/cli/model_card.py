"""Fill the template of a model card, `model_card.md`: timm's sections, with front matter for the Hub."""

import re
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData

from ..recalibration import MultiScaleRecalibration
from .card_data import TrainingData
from .errors import printable
from .multiply_adds import multiply_adds
from .trained_run import MODES

METRICS = {'top1': ('accuracy', 'Top-1 accuracy'), 'top5': ('top_5_accuracy', 'Top-5 accuracy')}
# What Markdown interprets: anywhere, at the start, between words, and in addresses, which GitHub makes links of.
MARKUP = re.compile(
    r'(?i)[*`<\[\]|~$@]|&(?=#?\w+;)|\\(?=[^\w\s]|_|$)|^[-+>=#\s]|^\d(?=\d*[.)](\s|$))|(?<=\s)#|(?<![^\W_])_|_(?![^\W_])'
    r'|:(?=//)|(?<=www)\.'
)


@torch.no_grad()
def model_card(
    source: str,
    model_id: str,
    data: TrainingData,
    results: dict[str, float],
    description: str,
    base_model: str | None = None,
) -> str:
    """Write a model card, the text of README.md.

    Args:
        source: What `timm.create_model` builds the network from here: `local-dir:FOLDER`, or a registered name.
        model_id: What the reader's `timm.create_model` loads it by: `hf-hub:ME/NAME`, or a registered name.
        data: What it was trained on.
        results: Measured `top1` and `top5` in percent; they go into the model index.
        description: How it was trained, in plain text.
        base_model: Repository of the weights that it started from.
    """
    model: Any = timm.create_model(source).eval()
    input_size = model.pretrained_cfg['input_size']
    image = torch.zeros(1, *input_size)
    features = timm.create_model(source, features_only=True).eval()(image)
    title = model_id.rpartition('/')[2].removeprefix('local-dir:')
    recalibrated = any(isinstance(module, MultiScaleRecalibration) for module in model.modules())
    images = f', {data.per_class} training images of each class' if data.per_class else ''
    classes = ', '.join(data.classes[:10]) + (', ...' if len(data.classes) > 10 else '')
    measured = {key: METRICS[key] for key in METRICS if key in results}
    metadata = ModelCardData(
        license=model.pretrained_cfg.get('license'),  # who trained the weights decides
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-msar'],
        datasets=[data.hub_id] if data.hub_id else None,
        base_model=base_model,
        metrics=['accuracy'] if measured else None,
        model_name=title if measured else None,
        eval_results=[
            EvalResult(
                *('image-classification', data.hub_id or data.name, data.name, metric),
                round(results[key] / 100, 6),  # the Hub's accuracy is a fraction
                dataset_split=data.split,
                metric_name=name,
            )
            for key, (metric, name) in measured.items()
        ]
        or None,
    )
    code = {  # YAML and Python
        'front_matter': '\n'.join(map(printable, metadata.to_yaml().split('\n'))),
        'model_id': repr(model_id),
        'mode': MODES.get(input_size[0], 'RGB'),
        'topk': min(5, model.num_classes),
        'feature_shapes': '\n'.join(f'    #  torch.Size({list(feature.shape)})' for feature in features),
        'unpooled_shape': tuple(model.forward_features(image).shape),
    }
    text = {
        'title': title,
        'with_or_without': 'with' if recalibrated else 'without',
        'description': description,
        'params': f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}',
        'gmacs': f'{multiply_adds(model, input_size) / 1e9:.3f}',
        'image_size': f'{input_size[1]} x {input_size[2]}',
        'classes': f'{model.num_classes} ({classes})' if classes else model.num_classes,
        'dataset': data.name + images,
        'measured': f'Measured on the {data.split} split of {data.name}.' if measured else 'Not measured.',
        **{key: f'{results[key]:.2f}' if key in results else '' for key in METRICS},
    }
    template = Template(Path(__file__).with_suffix('.md').read_text(encoding='utf-8'))
    return template.substitute({key: as_markdown(value) for key, value in text.items()}, **code)


def as_markdown(text: object) -> str:
    """Write text that stands in a line of Markdown so that the page shows it as it is, whatever is in it."""
    return MARKUP.sub(lambda match: f'&#{ord(match[0])};', printable(text))
