"""Files, folders, values and paths that are wrong: each gets one sentence, in time, and no traceback.

Seeded, a few hundred inputs of each kind in one process. A case is right if it ends in time with either what was asked
for or one CommandError of one line; any other exception fails the test by its traceback.
"""

import argparse
import contextlib
import gzip
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trained_run import make_run, resave, weights

from timm_msar import MultiScaleRecalibration, cli
from timm_msar.cli import check_config, data, export
from timm_msar.cli.checkpoint import load_trained
from timm_msar.cli.errors import CommandError
from timm_msar.cli.run_folder import ARGUMENTS, read_arguments, read_summary
from timm_msar.cli.training_data import training_data


class Count:
    """Outcomes of many cases: how many were refused in a sentence, how many did what was asked."""

    refused = done = 0

    @contextlib.contextmanager
    def case(self, limit=20.0):
        start = time.monotonic()
        try:
            yield
        except CommandError as error:
            text = str(error)
            assert text and '\n' not in text and len(text) < 1000, text
            self.refused += 1
        else:
            self.done += 1
        assert time.monotonic() - start < limit


def run_command(capsys, *words):
    """Run the command in this process; return its exit code, 1 with one sentence or 0 with none."""
    start = time.monotonic()
    code = cli.main([str(word) for word in words])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not line.startswith('Checking')]
    assert len(errors) == code and all(line.startswith(f'timm-msar {words[0]}: error: ') for line in errors), errors
    assert time.monotonic() - start < 20
    return code


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    checkpoint = make_run(tmp_path_factory.mktemp('run'), 'cifar_resnet20')  # has a third of the tensors
    resave(checkpoint, optimizer=None)  # a smaller file
    return checkpoint


@pytest.fixture
def copied(run, tmp_path):
    (tmp_path / 'run').mkdir()
    for path in run.parent.iterdir():
        (tmp_path / 'run' / path.name).write_bytes(path.read_bytes())
    return tmp_path / 'run' / run.name


ODD_VALUES = [
    *(0, 1, -1, 5, 32, 2.5, 1e300, 10**30, float('nan'), float('inf'), True, False),
    *('', 'abc', 'a\0b', 'a\nb', '\udcff', 'x' * 5000, 'top1', b'bytes'),
    *([], [1], ['top1'], [3, 0, 0], [3, 32, 32], [1, 32, 32], [3, 10**9, 10**9], [0.1, 0.2], [0, 0, 0], [[1]]),
    *({}, {'a': 1}, {1: 2}, {'scales': 'x'}, {'rd_ratio': float('inf')}, (1, 2), torch.zeros(2)),
]


def test_arguments_of_odd_types(copied):
    rng, count = random.Random(0), Count()
    with torch.serialization.safe_globals([argparse.Namespace]):
        good = torch.load(copied, weights_only=True)
    names = [*ARGUMENTS, 'drop', 'device_modules']
    for _ in range(200):
        changed = {rng.choice(names): rng.choice(ODD_VALUES) for _ in range(rng.choice((1, 1, 2)))}
        torch.save({**good, 'args': argparse.Namespace(**{**vars(good['args']), **changed})}, copied)
        with count.case():
            trained = load_trained(copied)
            config = export._usable_data_config(trained, copied)
            training_data(trained.args, 3)
            assert all(value > 0 for value in config['std']) and 0 < config['crop_pct'] <= 1
            assert config['interpolation'] in ('bilinear', 'bicubic') and len(config['mean']) == config['input_size'][0]
    assert count.refused > 100 and count.done > 10


@pytest.mark.filterwarnings('ignore')  # PyTorch's own, on rare kinds of tensors
def test_tensors_of_odd_types(copied):
    rng, count, good = random.Random(0), Count(), weights(copied)
    odd = {
        'float8': lambda x: x.to(torch.float8_e4m3fn),
        'half': lambda x: x.half(),
        'double': lambda x: x.double(),
        'strided': lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
        'parameter': lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
        'complex': lambda x: x.to(torch.complex64),
        'whole': lambda x: x.to(torch.int32),
        'truth': lambda x: x.bool(),
        'sparse': lambda x: x.to_sparse(),
        'meta': lambda x: x.to('meta'),
        'quantised': lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        'terabytes': lambda x: torch.zeros(1).expand(10**12),
        'infinite': lambda x: x.float() + float('inf'),
        'too great': lambda x: x.double() + 1e300,
        'empty': lambda x: torch.zeros(0),
        'number': lambda x: 3,
        'text': lambda x: 'x',
        'list': lambda x: [1.0],
    }
    for kind, change in list(odd.items()) * 7:
        key = rng.choice(list(good))
        resave(copied, state_dict={**good, key: change(good[key])})
        with count.case():
            loaded = load_trained(copied).model.state_dict()
            assert torch.equal(loaded[key], change(good[key]).to(good[key].dtype)), kind
    assert count.refused > 80 and count.done > 20


def test_flipped_bits_and_cuts_never_load_something_else(copied):
    """Half of them where the file's structure is: the pickle at its start and the directory of the zip file."""
    rng, count = random.Random(0), Count()
    good, expected = copied.read_bytes(), load_trained(copied).model.state_dict()
    structure = [*range(20_000), *range(len(good) - 20_000, len(good))]
    for i in range(300):
        content = bytearray(good)
        if i % 4 == 0:
            del content[rng.randrange(len(good)) :]
        else:
            for _ in range(rng.choice((1, 1, 3))):
                content[rng.choice(structure) if i % 2 else rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        copied.write_bytes(content)
        with count.case():  # it loads where the bit is padding, or in a field of the zip file that nobody reads
            loaded = load_trained(copied).model.state_dict()
            assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert count.refused > 200


def test_an_entry_that_says_it_is_a_folder_is_read(copied):
    """PyTorch's own reader returns uninitialised memory for it."""
    expected, content, record = load_trained(copied).model.state_dict(), bytearray(copied.read_bytes()), -1
    while (record := content.find(b'PK\x01\x02', record + 1)) >= 0:
        content[record + 38] ^= 0x10
    copied.write_bytes(content)
    loaded = load_trained(copied).model.state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


PIECES = (
    *(b'"', b'\0' * 200_000, b'9', b'-', b'\n', b',', b'!!int abc', b'2024-13-45', b'[' * 3000, b'\xff', b'&a *a'),
    *(b'!!bool maybe', b': ', b'.nan', b'{', b'? ', b'<<: ', b'!!python/object:os.system x', b'\xef\xbb\xbf'),
)


def damaged(content, rng):
    """Change bits, digits or lines, cut, or put in what YAML and CSV stumble over."""
    kind, at = rng.randrange(6), rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + rng.choice(PIECES) + content[at:]
    lines = content.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == 3:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 4:
        del lines[i]
    else:
        lines.insert(i, lines[j])
    return b''.join(lines)


def test_damaged_arguments(copied):
    rng, count, path = random.Random(0), Count(), copied.with_name('args.yaml')
    good = path.read_bytes()
    for _ in range(300):
        path.write_bytes(damaged(good, rng))
        with count.case():
            for name, value in read_arguments(path.parent).items():
                assert value is None or name not in ARGUMENTS or ARGUMENTS[name].holds(value)
    assert count.refused > 100 and count.done > 50


def test_damaged_results(copied):
    rng, count, path = random.Random(0), Count(), copied.with_name('summary.csv')
    header, *rows = path.read_text().splitlines()
    good = '\n'.join([header, *rows, header, rows[-1]]).encode() + b'\n'
    for _ in range(300):
        path.write_bytes(damaged(good, rng))
        with count.case():
            found = read_summary(path)
            assert [row['epoch'] for row in found] == sorted({row['epoch'] for row in found})
            assert all(0 <= row['eval_top1'] <= row['eval_top5'] <= 100 for row in found)
    assert count.refused > 100 and count.done > 20


@pytest.mark.parametrize(
    'text',
    [
        *('2024-13-45', '!!int abc', '!!bool maybe', '[' * 2000, 'model: 5', 'model: a\nepochs: abc', 'seed: [1]'),
        '2024-01-01: a',
    ],
)
def test_yaml_that_stops_its_reader(tmp_path, text):
    (tmp_path / 'args.yaml').write_text(text)
    with pytest.raises(CommandError, match=r'args\.yaml'):
        read_arguments(tmp_path)


HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        (HEADER + '0,1,1,50,900,.1\n', 'a result that cannot be'),
        (HEADER + '0,1,1,50,-5,.1\n', 'a result that cannot be'),
        (HEADER + '0,1,1,50,49,.1\n', 'a result that cannot be'),
        (HEADER + '0,1,1,900,900,.1\n', 'a result that cannot be'),
        (HEADER + '0,1,1,50,90,.1\n1,1,1,50,90,.1\n0,1,1,50,90,.1\n', 'epoch 0 after 1'),
        (HEADER + '0,1,1,50,90,.1\n1,1,1,50,90,.1\n12,1,1,50,90,.1\n', 'epoch 12 after 1'),
        (HEADER + '"0,1,1,50,90,.1\n1,1,1,50,90,.1\n', 'something else than numbers'),
        (HEADER + '0' * 200_000 + 'x,1,1,50,90,.1\n', 'something else than numbers'),
        (HEADER.replace('top5', 'topq') + '0,1,1,50,90,.1\n', 'no column eval_top5'),
        (HEADER + '0,1,1,50,90,.1', 'cut off'),
        (HEADER + '0,1,1,50\n', '4 fields, not 6'),
        (HEADER, 'no epoch yet'),
    ],
)
def test_results_that_cannot_be(tmp_path, text, sentence):
    (tmp_path / 'summary.csv').write_text(text)
    with pytest.raises(CommandError, match=sentence):
        read_summary(tmp_path / 'summary.csv')


SCRIPT = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument('--model', default='resnet50', type=str, help='Name of model to train')
parser.add_argument('--lr', type=float, help='learning rate')
parser.add_argument('--epochs', type=int, default=300, help='number of epochs')
parser.add_argument('--mean', type=float, nargs='+', help='Mean of the pixels')
parser.add_argument('--opt', default='sgd', type=str, help='Optimizer')
parser.add_argument('--sched', type=str, default='cosine', help='LR scheduler')
parser.add_argument('--amp', action='store_true', help='use mixed precision')
"""
CONFIG = b'model: cifar_resnet20\nlr: 0.1\nepochs: 160\nmean: [0.5, 0.4, 0.4]\nopt: sgd\nsched: cosine\namp: true\n'


def test_damaged_configs(tmp_path):
    rng, count, path = random.Random(0), Count(), tmp_path / 'config.yaml'
    scope = {}
    exec(SCRIPT, scope)
    for _ in range(300):
        path.write_bytes(damaged(CONFIG, rng))
        with count.case():
            check_config.check(path, scope['parser'])
    assert count.refused > 150 and count.done > 20


def test_dataset_json_of_odd_types(tmp_path):
    rng = random.Random(0)
    values = [None, 5, 'cifar10', [], ['a', 'b'], [1, 2], [['a'], 'b'], {'a': 1}, [None, 'b'], True]
    counts = {'train': 0, 'validation': 0}
    odd = [{name: rng.choice(values) for name in ('dataset', 'classes', 'per_class')} for _ in range(150)]
    right = json.dumps({'dataset': 'cifar10', 'classes': ['a', 'b'], **counts})
    right_too = [json.dumps({'dataset': 'cifar10', 'classes': ['a', 'b'], 'per_class': n, **counts}) for n in (None, 5)]
    for text in [
        '',
        '[',
        'null',
        '[]',
        '3',
        '[' * 100_000,
        '\0',
        right,
        *(json.dumps(facts | counts) for facts in odd),
    ]:
        (tmp_path / 'dataset.json').write_text(text)
        known = text in (right, *right_too)
        assert training_data({'data_dir': str(tmp_path)}, 2).classes == (('a', 'b') if known else ())


def image(path, rng):
    """Write something under the name of an image."""
    kind = rng.randrange(9)
    if kind == 0:
        path.write_bytes(rng.choice((b'', b'\0' * 500, b'\x89PNG\r\n\x1a\n', b'GIF89a', b'<svg/>')))
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(rng.choice((path.parent, path, path.parent.parent, Path('/nowhere'))))
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        Image.fromarray(np.full((8, 8), 20_000, np.uint16)).save(path, 'png')
    else:
        Image.new(rng.choice(('RGB', 'L', 'P', '1', 'RGBA', 'LA')), (8, 8)).save(path, 'png')
        if kind == 5:
            path.write_bytes(damaged(path.read_bytes(), rng))


def test_folders_of_images(tmp_path, capsys):
    rng, refused = random.Random(0), 0
    names = ['cat', 'Cat', '1', '01', '²', 'a\nb', os.fsdecode(b'\xff'), ' ', '.hidden', 'x' * 255, 'dog', 'ß', 'ss']
    for i in range(200):
        root = tmp_path / str(i)
        splits = rng.sample(('train', 'validation', 'val', 'training', 'test'), 2) if i % 4 == 0 else data.SPLITS
        classes = ['bird', 'dog'] if i % 2 else rng.sample(names, 2)
        for split in splits:
            for name in classes:
                (root / split / name).mkdir(parents=True)
                Image.new('RGB', (8, 8)).save(root / split / name / '0.png')
        if i % 3:
            image(rng.choice(list(root.glob('*/*'))) / rng.choice(('1.png', '².png', 'a\n.jpg', '1.txt')), rng)
        if i % 5 == 0:
            (root / splits[0] / 'loop').symlink_to(root / splits[0])
        code = run_command(capsys, 'data', 'check', root)
        refused += code
        if code == 0:
            for dataset in data.check(root).values():
                assert all(dataset[number][0].size == (8, 8) for number in range(len(dataset)))
    assert 80 < refused < 180


def test_sources_of_fashion_mnist(tmp_path):
    rng, count, source = random.Random(0), Count(), tmp_path / 'source'
    source.mkdir()
    good = {}
    for name, images in (('train', 20), ('t10k', 10)):
        pixels = struct.pack('>IIII', 0x803, images, 28, 28) + bytes(images * 28 * 28)
        labels = struct.pack('>II', 0x801, images) + bytes(i % 10 for i in range(images))
        good[f'{name}-images-idx3-ubyte.gz'], good[f'{name}-labels-idx1-ubyte.gz'] = pixels, labels
    for i in range(200):
        chosen = rng.choice(list(good))
        for name, content in good.items():
            content = bytearray(content)
            if name == chosen and i % 2:
                content[rng.randrange(16 if 'images' in name else len(content))] ^= 1 << rng.randrange(8)
            packed = gzip.compress(content, 1)
            (source / name).write_bytes(damaged(packed, rng) if name == chosen and not i % 2 else packed)
        with count.case():
            data.main(
                argparse.Namespace(dataset='fashion_mnist', root=tmp_path / str(i), source=source, per_class=None)
            )
    assert count.refused > 100
    assert len(list(tmp_path.iterdir())) == 1 + count.done  # what is refused leaves nothing


def odd_paths(folder):
    """Names that cannot be read or written, or not as what they should be."""
    os.mkfifo(folder / 'fifo')
    (folder / 'loop').symlink_to('loop')
    (folder / 'file').touch()
    (folder / 'zeros').write_bytes(bytes(1000))
    (folder / 'locked').mkdir()
    (folder / 'locked' / 'x').touch()
    (folder / 'locked').chmod(0)
    names = ['', 'a' * 300, 'a\0b', 'a\nb' * 200, 'fifo', 'loop', 'loop/x', 'file', 'file/x', 'zeros', 'fifo/x']
    names += [f'{os.fsdecode(bytes([255]))}{"a" * 255}', 'x/' * 3000]
    names += [] if os.geteuid() == 0 else ['locked/x', 'locked/new', 'locked']  # nothing is locked for root
    return [folder / name for name in names]


def test_paths(run, tmp_path, capsys):
    (tmp_path / 'train.py').write_text(SCRIPT)
    (tmp_path / 'config.yaml').write_bytes(CONFIG)
    odd, images = odd_paths(tmp_path), tmp_path / 'images'
    missing = [tmp_path / 'nothing', tmp_path / os.fsdecode(b'\xff')]
    commands = [('export', path, '--output', tmp_path / 'out') for path in odd + missing]
    commands += [('export', run, '--output', path) for path in odd]
    commands += [('push', path, '--repo-id', 'me/net', '--dry-run') for path in odd + missing]
    commands += [('curves', path, '--output', tmp_path / 'out.png') for path in odd + missing]
    commands += [('check-config', path, tmp_path / 'config.yaml') for path in odd + missing]
    commands += [('check-config', tmp_path / 'train.py', path) for path in odd + missing]
    commands += [('data', 'check', path) for path in odd + missing]
    commands += [('data', 'fashion_mnist', images, '--source', path) for path in odd + missing]
    commands += [('data', 'fashion_mnist', path, '--source', tmp_path) for path in odd]
    commands += [('demo', '--output', path) for path in odd if path != tmp_path]  # it would train
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in commands:
        assert run_command(capsys, *command) == 1, command
    (tmp_path / 'locked').chmod(0o700)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_fifos_beside_a_checkpoint(copied):
    resave(copied, args=None)
    for name in ('summary.csv', 'args.yaml'):
        copied.with_name(name).unlink()
        os.mkfifo(copied.with_name(name))
        with pytest.raises(CommandError, match='it is not a file'):
            load_trained(copied)


def test_numbers_that_no_layer_can_have():
    rng = random.Random(0)
    odd = {
        **dict.fromkeys(('channels', 'source_channels', 'rd_channels'), (0, -1, -(10**30))),
        'rd_ratio': (0, -1, float('inf'), float('-inf'), float('nan')),
    }
    for _ in range(200):
        names = rng.sample(list(odd), rng.choice((1, 2)))
        with pytest.raises(ValueError, match='must be a positive'):
            MultiScaleRecalibration(**{'channels': 8, **{name: rng.choice(odd[name]) for name in names}})


START = """
import signal, sys, timm_msar_command
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and hand that on
print('started', flush=True)
sys.exit(timm_msar_command.main())
"""


def start(*words, **env):
    """Start the command and return when it is about to import PyTorch."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, '-c', START, *words], env={**os.environ, **env}, **pipes)
    assert process.stdout.readline() == b'started\n'
    return process


def test_a_closed_pipe_a_terminal_of_ascii_and_control_c():
    stopped, closed = start('costs'), start('costs')  # the second start leaves the first time to reach its import
    stopped.send_signal(signal.SIGINT)
    closed.stdout.close()
    ascii_ = start('check-config', '±.py', 'x', PYTHONIOENCODING='ascii')
    assert stopped.communicate()[1] == b'' and stopped.returncode == -signal.SIGINT
    assert closed.stderr.read() == b'' and closed.wait() == 141
    error = ascii_.communicate()[1]
    assert ascii_.returncode == 1 and error.startswith(b'timm-msar check-config: error: there is no script \\xb1.py')
