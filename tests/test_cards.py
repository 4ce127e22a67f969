"""Model cards: what the Hub reads in them is valid, and every block of code runs as it stands, without the network."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import save_for_hf
from trained_run import CLASSES, make_run

from timm_msar.cli import export
from timm_msar.cli.model_card import IMAGE_URL, card_folder, model_card
from timm_msar.cli.multiply_adds import multiply_adds
from timm_msar.cli.training_data import training_data

CARDS = sorted(path for path in card_folder().glob('*.md') if path.name not in ('template.md', 'README.md'))
SECTIONS = ['Model Details', 'Model Usage', 'Model Comparison', 'Citation']
USES = ['Image Classification', 'Feature Map Extraction', 'Image Embeddings']

# Runs each block in a process of its own that has torch and timm but not timm_msar. https:// goes to a server here.
RUN_BLOCKS = """
import http.client, json, os, sys, traceback, urllib.request
import timm, torch

port = int(sys.argv[1])


class ToThisMachine(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(lambda host, **options: http.client.HTTPConnection('127.0.0.1', port), request)


urllib.request.install_opener(urllib.request.build_opener(ToThisMachine))
for block in json.load(sys.stdin):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            assert 'timm_msar' not in sys.modules
            exec(compile(block, 'card', 'exec'), {'__name__': '__main__'})
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, block
    print('-----')
"""


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        content = io.BytesIO()
        Image.linear_gradient('L').resize((120, 90)).save(content, 'PNG')
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content.getvalue())

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope='module')
def pictures():
    server = ThreadingHTTPServer(('127.0.0.1', 0), _Pictures)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder that holds `NAME.TAG`, as export writes it."""
    folder = tmp_path_factory.mktemp('cards')
    checkpoint = make_run(folder, dataset='torch/fashion_mnist')
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    export.main(parser.parse_args([str(checkpoint), '--output', str(folder / 'cifar_resnet20_msar.boots')]))
    return folder / 'cifar_resnet20_msar.boots'


def blocks(card: str) -> list[str]:
    found = re.findall(r'^```(\w*)\n(.*?)^```$', card, re.DOTALL | re.MULTILINE)
    assert {language for language, _ in found} <= {'python', 'bibtex', 'bash'}
    return [code for language, code in found if language == 'python']


def run_blocks(codes: list[str], pictures, cwd: Path, **env: str) -> list[str]:
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', **env}
    command = [sys.executable, '-c', RUN_BLOCKS, str(pictures.server_port)]
    given = dict(input=json.dumps(codes), capture_output=True, text=True, timeout=300)
    process = subprocess.run(command, cwd=cwd, env=environment, **given)
    assert process.returncode == 0, process.stderr
    return process.stdout.split('-----\n')[:-1]


def check_card(path: Path, licence: str | None) -> ModelCard:
    """What every card has."""
    card = ModelCard.load(path)
    assert card.data.library_name == 'timm' and card.data.license == licence and 'timm' in card.data.tags
    assert card.data.pipeline_tag == 'image-classification'
    for result in card.data.eval_results or []:
        assert 0 < result.metric_value <= 1 and result.dataset_name and result.dataset_type
    for dataset in card.data.datasets or []:
        assert re.fullmatch(r'[\w.-]+/[\w.-]+', dataset)
    assert re.findall(r'^## (.*)$', card.text, re.MULTILINE) == SECTIONS
    assert re.findall(r'^### (.*)$', card.text, re.MULTILINE) == USES
    for fact in ('Params \\(M\\)', 'GMACs'):
        assert re.search(rf'{fact}: [\d.]+$', card.text, re.MULTILINE)
    assert '$' not in card.text
    for code in blocks(card.content):
        assert code.startswith('# pip install timm-msar\nimport timm_msar')
    return card


def test_the_card_of_an_export_tells_what_was_measured(exported):
    card = check_card(exported / 'README.md', None)  # whoever trained it decides
    assert card.data.datasets == ['zalando-datasets/fashion_mnist']
    measured = {result.metric_type: result.metric_name for result in card.data.eval_results}
    assert measured == {'accuracy': 'Top-1 accuracy', 'top_5_accuracy': 'Top-5 accuracy'}
    sets = {(result.dataset_type, result.dataset_split) for result in card.data.eval_results}
    assert sets == {('zalando-datasets/fashion_mnist', 'test')}
    assert 'after 2 of 2 epochs, optimizer sgd, learning rate 0.05' in card.text

    model = timm.create_model('cifar_resnet20_msar', num_classes=3)
    params, macs = sum(p.numel() for p in model.parameters()), multiply_adds(model, (3, 32, 32))
    for fact, value in (('Params (M)', f'{params / 1e6:.2f}'), ('GMACs', f'{macs / 1e9:.3f}')):
        assert f'{fact}: {value}\n' in card.text
    assert 'Image size: 32 x 32\n' in card.text


def test_every_block_of_an_exported_card_runs_and_prints_what_it_says(exported, pictures):
    codes = blocks((exported / 'README.md').read_text())
    assert len(codes) == 3
    outputs = run_blocks(codes, pictures, cwd=exported.parent)
    assert pictures.paths[-3:] == ['/' + IMAGE_URL.split('/', 3)[3]] * 3
    lines = outputs[0].splitlines()
    assert len(lines) == 3 and all(re.fullmatch(r'\w+: [\d.]+ %', line) for line in lines)
    promised = re.findall(r'^    #  (torch.Size\(.*\))$', codes[1], re.MULTILINE)
    assert outputs[1].splitlines() == promised and len(promised) == 3


@pytest.mark.parametrize(('channels', 'mode'), [(1, 'L'), (3, 'RGB'), (4, 'RGBA')])
def test_every_block_opens_the_image_with_the_channels_of_the_network(channels, mode, tmp_path):
    model = timm.create_model('cifar_resnet20_msar', in_chans=channels)
    save_for_hf(model, tmp_path, safe_serialization=True, data_config={'input_size': (channels, 24, 32)})
    card = model_card(f'local-dir:{tmp_path}', 'me/x', training_data({}, 10), {}, '')
    assert [re.findall(r"\.convert\('(\w+)'\)", code) for code in blocks(card)] == 3 * [[mode]]
    assert 'Image size: 24 x 32\n' in card


def test_without_the_import_timm_does_not_know_the_network(exported, pictures):
    code = blocks((exported / 'README.md').read_text())[0].replace('import timm_msar', '#')
    with pytest.raises(AssertionError, match='Unknown model'):
        run_blocks([code], pictures, cwd=exported.parent)


def test_every_file_of_weights_has_a_card():
    tags = {*timm.list_pretrained('*msar*'), *timm.list_pretrained('cifar_*')}
    assert [path.stem for path in CARDS] == sorted(tag for tag in tags if timm.get_pretrained_cfg(tag).file)


@pytest.mark.parametrize('path', CARDS, ids=[path.stem for path in CARDS])
def test_the_cards_of_the_published_weights_are_valid(path):
    card = check_card(path, 'apache-2.0')
    assert timm.list_pretrained(path.stem) == [path.stem]
    assert f"'{path.stem}'" in card.text
    assert card.data.datasets
    assert f'network {"with" if "msar" in path.stem else "without"} Multi-Scale' in card.text
    top1, top5 = (result.metric_value for result in card.data.eval_results)
    assert f'| {path.stem} | {100 * top1:.2f} | {100 * top5:.2f} |' in card.text
    (commands,) = re.findall(r'^```bash\n(.*?)^```$', card.text, re.DOTALL | re.MULTILINE)
    config = re.search(r'--config (\S+)', commands)[1]
    assert (card_folder().parent / config).is_file()
    assert f'--output {path.stem}' in commands


def test_every_block_of_the_published_cards_runs(pictures, tmp_path):
    codes = [code for path in CARDS for code in blocks(path.read_text(encoding='utf-8'))]
    assert len(codes) == 3 * len(CARDS)
    outputs = run_blocks(codes, pictures, cwd=tmp_path)
    for path, output, code in zip(CARDS, outputs[1::3], codes[1::3], strict=True):
        assert output.splitlines() == re.findall(r'^    #  (torch.Size\(.*\))$', code, re.MULTILINE), path


def test_names_of_classes_and_folders_stand_in_the_card_as_they_are(tmp_path):
    names = ('a\nb', '*bold* <b>', '[x](y) | `z` \\')
    for name in names:
        (tmp_path / 'my\n# data' / 'train' / name.replace('/', '')).mkdir(parents=True)
        (tmp_path / 'my\n# data' / 'train' / name.replace('/', '') / 'a.png').touch()
    data = training_data({'data_dir': str(tmp_path / 'my\n# data')}, 3)
    assert set(data.classes) == set(names)
    card = model_card('cifar_resnet20', "local-dir:it's", data, {'top1': 50.0}, 'Told.')
    assert r'- **Dataset:** my \# data' + '\n' in card and 'split of my \\# data.\n' in card
    for name in ('a b', r'\*bold\* \<b\>', r'\[x\](y) \| \`z\` \\'):
        assert name in card
    assert re.findall(r'^# .*', card, re.MULTILINE)[0] == "# Model card for it's"
    for code in blocks(card):
        compile(code, 'card', 'exec')


def test_data_sets_are_known_by_what_they_hold_not_by_their_names(tmp_path, monkeypatch):
    def folder(name, classes, facts=None):
        for split in ('train', 'validation'):
            for label in classes:
                (tmp_path / name / split / label).mkdir(parents=True)
                (tmp_path / name / split / label / 'a.png').touch()
        if facts:
            (tmp_path / name / 'dataset.json').write_text(json.dumps(facts))
        return {'data_dir': str(tmp_path / name), 'dataset': ''}

    mine = training_data(folder('imagenet', ['class10', 'class9']), 2)
    assert (mine.name, mine.hub_id, mine.classes) == ('imagenet', None, ('class9', 'class10'))  # timm's order
    assert training_data(folder('more', CLASSES), 1000).classes == ()
    assert training_data(folder('mapped', CLASSES) | {'class_map': 'map.txt'}, 3).classes == ()

    facts = {'dataset': 'cifar10', 'classes': list(CLASSES), 'per_class': 1, 'train': 3, 'validation': 3}
    prepared = training_data(folder('x', CLASSES, facts), 3)
    assert (prepared.name, prepared.hub_id, prepared.split) == ('CIFAR-10', 'uoft-cs/cifar10', 'test')
    assert prepared.classes == CLASSES and prepared.per_class == 1
    assert '**Dataset:** CIFAR-10, 1 training images of each class' in model_card(
        'cifar_resnet20', 'x', prepared, {}, ''
    )
    excerpt = training_data(folder('excerpt', CLASSES, facts | {'validation': 10_000}), 3)
    assert (excerpt.name, excerpt.hub_id, excerpt.split) == ('excerpt', None, 'validation')

    synsets = timm.data.ImageNetInfo().label_names()
    assert training_data(folder('ilsvrc', synsets), 1000)[:2] == ('ilsvrc', None)  # an excerpt of it
    monkeypatch.setattr('timm_msar.cli.training_data.IMAGENET_IMAGES', 1000)
    assert training_data({'data_dir': str(tmp_path / 'ilsvrc')}, 1000).hub_id == 'ILSVRC/imagenet-1k'
    assert training_data({'dataset': 'hfds/timm/mini-imagenet'}, 100).hub_id == 'timm/mini-imagenet'
    assert training_data({'dataset': 'torch/cifar100'}, 100).hub_id == 'uoft-cs/cifar100'
    assert training_data({'dataset': 'wds/mine', 'data_dir': 'a'}, 5)[:2] == ('mine', None)
    assert training_data({'dataset': 'wds/imagenet', 'data_dir': 'a'}, 5)[:2] == ('imagenet', None)
    gone = training_data({'data_dir': str(tmp_path / 'gone')}, 5)
    assert (gone.name, gone.hub_id, gone.classes) == ('gone', None, ())
