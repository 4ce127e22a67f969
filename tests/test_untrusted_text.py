"""Names and arguments that came with data or a checkpoint: cards and terminals show them, and do nothing else."""

import argparse
import ast
import json
import re
import shutil

import pytest
import timm
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from test_curves import make_run as make_curve
from timm.models import save_for_hf
from trained_run import make_run, resave, saved

from timm_msar.cli.card_data import TrainingData
from timm_msar.cli.export import TRAINING
from timm_msar.cli.model_card import model_card
from timm_msar_command import main, printable

PLAIN = ('T-shirt/top', '0.5', 'R&D a_b (1.5) C#, {}', "it's; 50 % + 1.")
MARKUP = (
    *('<img src=x onerror=alert(1)> <b> </td></table>', 'a <!-- b', '<https://a.b> https://a.b HTTP://a.b'),
    *('[a](https://a.b) ![a](b.png) [^1]', '[a]: b', 'www.a.b me@a.b', '`a` ``b``', '```', '~~~', '# a #', '---'),
    *('*a* **a** _a_ __a__ a__ ~a~ ~~a~~', '===', '- a', '> a', '1. a', 'a | b |', '&lt;b&gt; &#60;b>', 'a\\'),
    *('\\*a* \\\\*a* \\<b>', '\\(a\\) $a$ $$', '${title}', 'a\n# b', 'a\n\n---\n\nb', 'a\n```\nb', 'a\r\rb'),
    *('\x1b]0;a\x07 \x9b2J', 'a\x85b\u2028c', '\u202eb\u2066', '\udcff\0'),
)


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp('network')
    save_for_hf(timm.create_model('cifar_resnet20_msar', num_classes=2), folder, safe_serialization=True)
    return f'local-dir:{folder}'


def card_of(network, text, title):
    """A card in which every field that can hold text holds this one."""
    data = TrainingData(text, text, text, (text, text), text)
    return ModelCard(model_card(network, f'me/{title}', data, {'top1': 90, 'top5': 99}, text, text))


def parsed(card):
    """What the page consists of, its lines in Markdown, and its lines as they are shown."""
    tokens = MarkdownIt('commonmark').enable(['table', 'strikethrough']).parse(card.text)
    lines = [token for token in tokens if token.type == 'inline']
    inner = [t for line in lines for t in line.children if t.type != 'text']
    parts = [(t.type, t.tag, t.attrs) for t in (*tokens, *inner)]
    parts += re.findall(r'://|www\.|\w@\w', ' '.join(line.content for line in lines), re.IGNORECASE)  # links on GitHub
    return parts, [line.content for line in lines], [''.join(t.content for t in line.children) for line in lines]


@pytest.mark.parametrize('text', [*PLAIN, *MARKUP])
def test_a_card_shows_text_as_it_is(text, network):
    title = text.replace('/', '-')
    card, of_a_word = card_of(network, text, title), card_of(network, 'TEXT', 'TITLE')
    (parts, lines, shown), (wanted, *clean) = parsed(card), parsed(of_a_word)
    put = {'TEXT': printable(text), 'TITLE': printable(title)}
    clean, shown_clean = ([re.sub('TEXT|TITLE', lambda m: put[m[0]], line) for line in part] for part in clean)
    assert parts == wanted and [line.strip() for line in shown] == [line.strip() for line in shown_clean]
    if text in PLAIN:
        assert lines == clean
    assert all(line.isprintable() for line in str(card).split('\n'))
    assert card.data.to_dict().keys() == of_a_word.data.to_dict().keys()
    for block in re.findall(r'^```python\n(.*?)^```$', card.text, re.DOTALL | re.MULTILINE):
        assert f'me/{title}' in [getattr(node, 'value', '') for node in ast.walk(ast.parse(block))]


def test_an_export_passes_on_plain_text(tmp_path):
    cards = []
    for text in ('TEXT', '<b> *a*\n# `'):
        run = make_run(tmp_path / str(len(cards)))
        args = vars(saved(run)['args']) | dict.fromkeys((*TRAINING, 'epochs', 'val_split'), text)
        overlay = {'pretrained_cfg_overlay': {'tag': text}}
        args |= {'pretrained': True, 'dataset': f'hfds/{text}', 'model_kwargs': overlay}
        resave(run, args=argparse.Namespace(**args))
        assert main(['export', str(run), '--output', str(run.parent / text)]) == 0
        cards.append(ModelCard.load(run.parent / text / 'README.md'))
    (clean, _, lines), (parts, _, shown) = map(parsed, cards)
    assert parts == clean and shown == [line.replace('TEXT', printable(text)) for line in lines]
    assert ''.join(lines).count('TEXT') == 14


def test_a_terminal_shows_lines(network, tmp_path, capsys):
    """Whatever is in the names of classes, images, folders and networks."""
    printed = []
    for text in ('word', 'a\n\rb\x1b]0;c\x07\x9b\x85\u2028\u202e'):
        folder, images = tmp_path / str(len(printed)) / text, tmp_path / f'images{len(printed)}'
        shutil.copytree(network.removeprefix('local-dir:'), folder)
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | {'label_names': [text, text]}))
        for path in (images / 'train' / text / '1.png', images / 'validation' / text / '1.png'):
            path.parent.mkdir(parents=True)
            Image.linear_gradient('L').save(path)
        (images / 'train' / f'a.{text}').touch()
        runs = [make_curve(folder / f'{i}', [90.0], model=text, seed=i, lr=i // 2) for i in range(4)]
        checkpoint = make_run(folder / 'run')
        for code, *words in (
            (0, 'predict', images, '--model', f'local-dir:{folder}'),
            (0, 'gates', images, '--model', f'local-dir:{folder}', '--output', folder / 'gates.png'),
            (0, 'curves', *runs, '--output', folder / 'curves.png'),
            (0, 'data', 'check', images),
            (0, 'export', checkpoint, '--output', folder / 'out'),
            (1, 'predict', folder / 'run' / 'data', '--model', f'local-dir:{folder}'),
        ):
            assert main([*map(str, words)]) == code
        with pytest.raises(SystemExit):
            main(['speed', f'-{text}'])
        printed.append(''.join(capsys.readouterr()))
    assert all(line.isprintable() for line in printed[1].split('\n'))
    counts = printed[0].count('\n'), printed[0].count('word')
    assert (printed[1].count('\n'), printed[1].count(r'\x1b]0;c')) == counts
