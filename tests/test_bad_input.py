"""A few hundred wrong files, folders and paths through the command, from seeds.

Each ends in time, in what was asked for or in one sentence. Nothing half-written stays, and no code of a file is run.
"""

import os
import random
import time
from pathlib import Path

import pytest
from PIL import Image
from trained_run import make_run, resave

from timm_msar.cli import curves
from timm_msar_command import main


@pytest.fixture
def command(tmp_path, capsys):
    """Run the command, and check that it ends as it should; return its exit code and what it printed."""

    def run(*words, output=None):
        before, start = sorted(tmp_path.rglob('*')), time.monotonic()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert time.monotonic() - start < 20, words
        lines = [line for line in err.splitlines() if 'cannot be read: ' not in line]
        assert code == len(lines) and code in (0, 1), err
        assert all(line.startswith(f'timm-msar {words[0]}: error: ') for line in lines), err
        after = [path for path in sorted(tmp_path.rglob('*')) if output not in (path, *path.parents)]
        assert after == before and (output is None or output.exists() == (code == 0)), words
        return code, out

    return run


def damaged(content, rng, pieces=(b'\0' * 300,)):
    """Cut, change a bit, put something in, or drop or repeat a line."""
    kind, at = rng.randrange(5), rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + rng.choice(pieces) + content[at:]
    lines = content.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    lines[i : i + 1] = [rng.choice(lines)] * (kind - 3)
    return b''.join(lines)


class Code:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints(tmp_path, command):
    """Half of the damages are where a checkpoint's structure is: the pickle at its start, the directory at its end."""
    rng, path = random.Random(0), make_run(tmp_path, 'cifar_resnet20_msar')
    image, output = tmp_path / 'image.png', tmp_path / 'out.png'
    Image.linear_gradient('L').save(image)
    resave(path, optimizer=None)  # a smaller file
    good, right = path.read_bytes(), command('predict', image, '--checkpoint', path)
    structure, codes = [*range(20_000), *range(len(good) - 20_000, len(good))], []
    for i in range(120):
        content = bytearray(good if i % 4 else damaged(good, rng))
        for _ in range(rng.choice((1, 1, 3)) if i % 4 else 0):
            content[rng.choice(structure) if i % 2 else rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        result = command('predict', image, '--checkpoint', path)
        assert result == right or result[0] == 1  # other weights would have other probabilities
        codes.append(result[0])
        if i % 20 == 0:
            name, source = ('export', (path,)) if i % 40 else ('gates', (image, '--checkpoint', path))
            command(name, *source, '--output', output.with_name(f'{i}.png'), output=output.with_name(f'{i}.png'))
    assert right[0] == 0 and 80 < sum(codes) < 120  # the others are flips in what nobody reads

    path.write_bytes(good)
    resave(path, epoch=Code(tmp_path / 'ran'))
    for words in (('export', path), ('gates', image, '--checkpoint', path)):
        assert command(*words, '--output', output)[0] == 1
    assert not (tmp_path / 'ran').exists()


PIECES = (
    *(b'"', b'\0' * 2000, b'9', b'-', b'\n', b',', b'!!int abc', b'2024-13-45', b'[' * 3000, b'\xff', b'&a *a', b': '),
    *(b'.nan', b'{', b'<<: ', b'!!python/object/apply:os.mkdir [ran]', b'\xef\xbb\xbf'),
)


@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv'])
def test_runs(name, tmp_path, command, monkeypatch):
    monkeypatch.setattr(curves, 'draw', lambda groups, output: None)
    monkeypatch.chdir(tmp_path)
    rng, path = random.Random(0), make_run(tmp_path, 'cifar_resnet20').with_name(name)
    good, codes = path.read_bytes(), []
    for _ in range(100):
        path.write_bytes(damaged(good, rng, PIECES))
        codes.append(command('curves', path.parent)[0])
    assert 20 < sum(codes) < 100


def odd_image(path, rng):
    """Write something under the name of an image."""
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(rng.choice((path.parent, path, Path('/nowhere'))))
    else:
        Image.new(rng.choice(('RGB', 'P', '1', 'RGBA', 'I;16')), (8, 8)).save(path, 'png')
        path.write_bytes(damaged(path.read_bytes(), rng) if kind < 4 else path.read_bytes())


def test_folders_of_images(tmp_path, command):
    rng, codes = random.Random(0), []
    names = ['cat', 'Cat', '1', '01', '²', 'a\nb', os.fsdecode(b'\xff'), ' ', '.hidden', 'x' * 255, 'dog', 'ß', 'ss']
    for i in range(100):
        root = tmp_path / str(i)
        splits = rng.sample(('train', 'validation', 'val', 'training', 'test'), 2) if i % 4 == 0 else ('train', 'val')
        for split in splits:
            for name in ('bird', 'dog') if i % 2 else rng.sample(names, 2):
                (root / split / name).mkdir(parents=True)
                Image.new('RGB', (8, 8)).save(root / split / name / '0.png')
        if i % 3:
            odd_image(rng.choice(list(root.glob('*/*'))) / rng.choice(('1.png', '².png', 'a\n.jpg', '1.txt')), rng)
        codes.append(command('data', 'check', root)[0])
    assert 40 < sum(codes) < 95


def test_paths(tmp_path, command):
    """Names that cannot be read or written, or not as what they should be."""
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'file').write_bytes(bytes(1000))
    names = ['a' * 300, 'a\0b', 'fifo', 'loop', 'loop/x', 'file', 'file/x', 'x/' * 3000, os.fsdecode(b'\xff' * 256)]
    odd = [tmp_path, *(tmp_path / name for name in names)]
    model = ('--model', 'cifar_resnet20_msar')
    for path in odd:
        for words in (
            ('export', path, '--output', tmp_path / 'out'),
            ('curves', path, '--output', tmp_path / 'out.png'),
            ('data', 'check', path),
            ('data', 'fashion_mnist', tmp_path / 'new', '--source', path),
            ('data', 'fashion_mnist', path, '--source', tmp_path),
            ('demo', '--output', path),
            ('predict', path, *model),
            ('predict', tmp_path / 'file', '--checkpoint', path),
            ('predict', tmp_path / 'file', '--model', f'local-dir:{path}'),
            ('gates', path, *model, '--output', tmp_path / 'out.png'),
            ('gates', tmp_path / 'file', *model, '--output', path),
        ):
            assert command(*words)[0] == 1, words


def test_what_would_be_waited_for_in_a_folder(tmp_path, command):
    checkpoint, image, exported = make_run(tmp_path), tmp_path / 'image.png', tmp_path / 'exported'
    Image.linear_gradient('L').save(image)
    command('export', checkpoint, '--output', exported, output=exported)
    cifar = tmp_path / 'cifar' / 'cifar-10-batches-py'
    cifar.mkdir(parents=True)
    predict, export = ('predict', image, '--model', f'local-dir:{exported}'), ('export', checkpoint, '--output')
    for file, words in (
        *((exported / name, predict) for name in ('config.json', 'model.safetensors')),
        *((exported / name, predict) for name in ('pytorch_model.bin', 'open_clip_model.safetensors')),
        *((checkpoint.with_name(name), ('curves', checkpoint.parent)) for name in ('args.yaml', 'summary.csv')),
        (checkpoint.with_name('summary.csv'), (*export, tmp_path / 'out')),
        (checkpoint, (*export, tmp_path / 'out')),
        (cifar / 'data_batch_1', ('data', 'cifar10', tmp_path / 'new', '--source', tmp_path / 'cifar')),
    ):
        content = file.read_bytes() if file.exists() else b''
        for make in (os.mkfifo, lambda path: path.symlink_to('/dev/zero')):
            file.unlink(missing_ok=True)
            make(file)
            assert command(*words)[0] == 1
        file.unlink()
        if content:
            file.write_bytes(content)
    os.mkfifo(tmp_path / 'data' / 'dataset.json')
    assert command(*export, tmp_path / 'out', output=tmp_path / 'out')[0] == 0
