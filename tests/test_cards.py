"""Model cards: the Hub can read them, and every block of code runs as it stands and prints what the card says.

`python tests/test_cards.py` writes the cards in hub_cards/ again, after a change of the template or the weights.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import save_for_hf
from trained_run import CLASSES, make_run

from timm_msar.cifar_resnet import FASHION_MNIST
from timm_msar.cli import export
from timm_msar.cli.card_data import HUB_DATASETS, TrainingData, training_data
from timm_msar.cli.model_card import model_card
from timm_msar.cli.multiply_adds import multiply_adds

CARDS = sorted((Path(__file__).parents[1] / 'hub_cards').glob('*.md'))

# Runs each block in a process of its own that has torch and timm, but not timm_msar.
RUN_BLOCKS = """
import json, os, sys
import timm, torch

for block in json.load(sys.stdin):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        assert 'timm_msar' not in sys.modules
        exec(compile(block, 'card', 'exec'), {'__name__': '__main__'})
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, block
    print('-----')
"""


def blocks(card: str) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```$', card, re.DOTALL | re.MULTILINE)


def run_blocks(codes: list[str], cwd: Path) -> list[str]:
    Image.linear_gradient('L').resize((120, 90)).save(cwd / 'picture.jpg')
    given = dict(input=json.dumps(codes), capture_output=True, text=True, timeout=300)
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1'}
    process = subprocess.run([sys.executable, '-c', RUN_BLOCKS], cwd=cwd, env=environment, **given)
    assert process.returncode == 0, process.stderr
    return process.stdout.split('-----\n')[:-1]


def regenerated(path: Path) -> str:
    """The card from the template, with what only the old card knows: how it was trained, and the results."""
    card, data = ModelCard.load(path), TrainingData(*HUB_DATASETS['fashion_mnist'], FASHION_MNIST)
    results = {key: 100 * result.metric_value for key, result in zip(('top1', 'top5'), card.data.eval_results)}
    description = card.text.strip().split('\n\n', 2)[2].partition('\n\n## Model Details')[0]
    return model_card(path.stem, path.stem, data, results, 'DESCRIPTION').replace('DESCRIPTION', description)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder that holds `NAME.TAG`, as export writes it."""
    folder = tmp_path_factory.mktemp('cards')
    checkpoint = make_run(folder, dataset='torch/fashion_mnist')
    export.main(argparse.Namespace(checkpoint=checkpoint, output=folder / 'cifar_resnet20_msar.boots'))
    return folder / 'cifar_resnet20_msar.boots'


def test_the_card_of_an_export_tells_what_was_measured(exported):
    card = ModelCard.load(exported / 'README.md')
    assert (card.data.library_name, card.data.license) == ('timm', None)  # whoever trained it chooses a licence
    assert card.data.datasets == ['zalando-datasets/fashion_mnist']
    measured = {(result.metric_type, result.dataset_split) for result in card.data.eval_results}
    assert measured == {('accuracy', 'test'), ('top_5_accuracy', 'test')}
    assert 'after 2 of 2 epochs, opt sgd, lr 0.05' in card.text and '$' not in card.text
    model = timm.create_model('cifar_resnet20_msar', num_classes=3)
    params, macs = sum(p.numel() for p in model.parameters()), multiply_adds(model, (3, 32, 32))
    for fact in (f'Params (M): {params / 1e6:.2f}', f'GMACs: {macs / 1e9:.3f}', 'Image size: 32 x 32'):
        assert f'{fact}\n' in card.text


@pytest.mark.parametrize('path', CARDS, ids=[path.stem for path in CARDS])
def test_the_published_cards_are_those_of_the_template(path):
    assert path.read_text(encoding='utf-8') == regenerated(path)
    assert timm.get_pretrained_cfg(path.stem).file


def test_every_block_runs_and_prints_what_it_says(exported):
    cards = [exported / 'README.md', *CARDS]
    codes = [code for path in cards for code in blocks(path.read_text(encoding='utf-8'))]
    assert len(codes) == 3 * len(cards)
    outputs = run_blocks(codes, cwd=exported.parent)
    for output, code in zip(outputs[1::3], codes[1::3], strict=True):
        assert output.splitlines() == re.findall(r'^    #  (torch.Size\(.*\))$', code, re.MULTILINE) != []
    assert re.fullmatch(r'(\d: [\d.]+ %\n){3}', outputs[0])
    for output in outputs[3::3]:
        names = [line.rpartition(': ')[0] for line in output.splitlines()]
        assert len(names) == 5 and set(names) < set(FASHION_MNIST)


def test_every_block_opens_an_image_that_fits_the_network(tmp_path):
    model = timm.create_model('cifar_resnet20_msar', in_chans=1)
    save_for_hf(model, tmp_path, safe_serialization=True, data_config={'input_size': (1, 24, 32)})
    card = model_card(f'local-dir:{tmp_path}', "me/it's", training_data({}, 10), {}, '')
    assert [re.findall(r"\.convert\('(\w+)'\)", code) for code in blocks(card)] == 3 * [['L']]
    assert 'Image size: 24 x 32\n' in card


def test_data_sets_are_known_by_what_they_hold_not_by_their_names(tmp_path):
    def folder(name, classes, facts=None):
        for split in ('train', 'validation'):
            for label in classes:
                (tmp_path / name / split / label).mkdir(parents=True)
                (tmp_path / name / split / label / 'a.png').touch()
        (tmp_path / name / 'dataset.json').write_text(json.dumps(facts))
        return {'data_dir': str(tmp_path / name), 'dataset': ''}

    mine = training_data(folder('imagenet', ['class10', 'class9']), 2)
    assert mine[:2] == ('imagenet', None) and mine.classes == ('class9', 'class10')  # in timm's order
    assert training_data(folder('alike', ['Cat', 'cat', 'dog']), 3).classes == ()  # timm leaves their order to chance
    assert training_data(folder('mapped', CLASSES) | {'class_map': 'map.txt'}, 3).classes == ()
    facts = {'dataset': 'cifar10', 'classes': list(CLASSES), 'per_class': 1, 'train': 3, 'validation': 3}
    prepared = training_data(folder('x', CLASSES, facts), 3)
    assert prepared == ('CIFAR-10', 'uoft-cs/cifar10', 'test', CLASSES, 1)
    assert 'CIFAR-10, 1 training images of each class' in model_card('cifar_resnet20', 'x', prepared, {}, '')
    excerpt = training_data(folder('excerpt', CLASSES, facts | {'validation': 10_000}), 3)
    assert excerpt[:3] == ('excerpt', None, 'validation')

    synsets = timm.data.ImageNetInfo().label_names()
    assert training_data(folder('ilsvrc', synsets), 1000)[:2] == ('ilsvrc', None)  # an excerpt of it
    for dataset, hub_id in (('hfds/timm/mini', 'timm/mini'), ('torch/cifar100', 'uoft-cs/cifar100')):
        assert training_data({'dataset': dataset, 'data_dir': 'a'}, 100).hub_id == hub_id
    assert training_data({'data_dir': str(tmp_path / 'gone')}, 5)[:2] == ('gone', None)


if __name__ == '__main__':
    for path in CARDS:
        path.write_text(regenerated(path), encoding='utf-8')
