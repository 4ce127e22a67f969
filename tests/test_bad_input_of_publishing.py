"""Checkpoints, arguments, results, paths and answers of the Hub that are wrong: each gets one sentence, and a true one.

Seeded, a few hundred inputs of each kind. A case is right if it ends in time with either what was asked for or one
CommandError of one line; any other exception fails the test by its traceback.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch
from hub_server import Hub
from trained_run import make_run, resave, weights

from timm_msar.cli import export
from timm_msar.cli.checkpoint import load_trained
from timm_msar.cli.errors import CommandError
from timm_msar.cli.run_folder import ARGUMENTS, read_arguments, read_summary
from timm_msar.cli.training_data import training_data
from timm_msar.cli.written_aside import written_aside


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    checkpoint = make_run(tmp_path_factory.mktemp('run'))
    resave(checkpoint, optimizer=None)  # a smaller file
    return checkpoint


@pytest.fixture
def copied(run, tmp_path):
    (tmp_path / 'run').mkdir()
    for path in run.parent.iterdir():
        (tmp_path / 'run' / path.name).write_bytes(path.read_bytes())
    return tmp_path / 'run' / run.name


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


ODD_VALUES = [
    *(0, 1, -1, 5, 32, 2.5, 1e300, 10**30, float('nan'), float('inf'), True, False),
    *('', 'abc', 'a\0b', 'a\nb', '\udcff', 'x' * 5000, 'top1', b'bytes'),
    *([], [1], ['top1'], [3, 0, 0], [3, 32, 32], [1, 32, 32], [3, 10**9, 10**9], [0.1, 0.2], [0, 0, 0], [[1]]),
    *({}, {'a': 1}, {1: 2}, {'scales': 'x'}, {'rd_ratio': float('inf')}, (1, 2), torch.zeros(2)),
]


def test_arguments_of_odd_types(copied, capsys):
    rng, count = random.Random(0), Count()
    with torch.serialization.safe_globals([argparse.Namespace]):
        good = torch.load(copied, weights_only=True)
    names = [*ARGUMENTS, 'drop', 'device_modules']
    for _ in range(300):
        changed = {rng.choice(names): rng.choice(ODD_VALUES) for _ in range(rng.choice((1, 1, 2)))}
        torch.save({**good, 'args': argparse.Namespace(**{**vars(good['args']), **changed})}, copied)
        with count.case():
            trained = load_trained(copied)
            config = export._data_config(trained, copied)
            training_data(trained.args, 3)
            assert all(value > 0 for value in config['std']) and 0 < config['crop_pct'] <= 1
            assert config['interpolation'] in ('bilinear', 'bicubic') and len(config['mean']) == config['input_size'][0]
    assert count.refused > 150 and count.done > 30


def test_tensors_of_odd_types(copied):
    rng, count, good = random.Random(0), Count(), weights(copied)
    odd = {
        'float8': lambda x: x.to(torch.float8_e4m3fn),
        'half': lambda x: x.half(),
        'double': lambda x: x.double(),
        'strided': lambda x: x.repeat_interleave(2, 0)[::2],
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
    for i in range(200):
        key, (kind, change) = rng.choice(list(good)), list(odd.items())[i % len(odd)]
        with contextlib.suppress(IndexError, RuntimeError):  # a scalar has no rows to repeat
            resave(copied, state_dict={**good, key: change(good[key])})
        with count.case():
            loaded = load_trained(copied).model.state_dict()
            assert torch.equal(loaded[key], change(good[key]).to(good[key].dtype)), kind
    assert count.refused > 100 and count.done > 30


def damaged(content, rng):
    """Change bits, digits or lines, cut, or put in what YAML and CSV stumble over."""
    kind = rng.randrange(6)
    at = rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 2:
        odd = (
            b'"',
            b'\0' * 200_000,
            b'9',
            b'-',
            b'\n',
            b',',
            b'!!int abc',
            b'2024-13-45',
            b'[' * 3000,
            b'\xff',
            b'&a *a',
        )
        return content[:at] + rng.choice(odd) + content[at:]
    lines = content.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == 3:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 4:
        del lines[i]
    else:
        lines.insert(i, lines[j])
    return b''.join(lines)


def test_damaged_text_files(copied):
    rng, count = random.Random(0), Count()
    resave(copied, args=None)  # so that args.yaml is read
    summary = copied.with_name('summary.csv')
    header, *rows = summary.read_text().splitlines()
    summary.write_text('\n'.join([header, *rows, header, rows[-1]]) + '\n')
    for path, cases in ((copied.with_name('args.yaml'), 250), (summary, 250)):
        good = path.read_bytes()
        for _ in range(cases):
            path.write_bytes(damaged(good, rng))
            with count.case():
                if path == summary:
                    found = read_summary(path)
                    assert [row['epoch'] for row in found] == sorted({row['epoch'] for row in found})
                    assert all(0 <= row['eval_top1'] <= row['eval_top5'] <= 100 for row in found)
                else:
                    for name, value in read_arguments(path.parent).items():
                        assert value is None or name not in ARGUMENTS or ARGUMENTS[name].holds(value)
        path.write_bytes(good)
    assert count.refused > 250 and count.done > 50


@pytest.mark.parametrize(
    'text',
    [
        '2024-13-45',
        '!!int abc',
        '!!bool maybe',
        '[' * 5000,
        'model: 5',
        'model: a\nepochs: abc',
        'seed: [1]',
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


def test_paths(run, copied, tmp_path):
    parser, count = argparse.ArgumentParser(), Count()
    export.add_arguments(parser)
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'locked').mkdir()
    (tmp_path / 'locked' / 'x').touch()
    (tmp_path / 'locked').chmod(0)
    odd = [
        *('', 'a' * 300, 'a\0b', os.fsdecode(b'\xff'), 'fifo', 'loop', 'loop/x', 'run', 'run/summary.csv/x', 'nothing')
    ]
    odd += [] if os.geteuid() == 0 else ['locked/x', 'locked/new']  # nothing is locked for root
    cases = [(tmp_path / name, tmp_path / 'out') for name in odd]
    cases += [(run, tmp_path / name) for name in odd if name not in ('nothing', os.fsdecode(b'\xff'))]
    for checkpoint, output in cases:
        with count.case():
            export.main(parser.parse_args([str(checkpoint), '--output', str(output)]))
    (tmp_path / 'locked').chmod(0o700)
    assert (count.refused, count.done) == (len(cases), 0)
    for name in ('summary.csv', 'args.yaml'):
        resave(copied, args=None)
        copied.with_name(name).unlink()
        os.mkfifo(copied.with_name(name))
        with pytest.raises(CommandError, match='it is not a file'):
            load_trained(copied)


def test_dataset_json_of_odd_types(tmp_path):
    rng = random.Random(0)
    values = [None, 5, 'cifar10', [], ['a', 'b'], [1, 2], [['a'], 'b'], {'a': 1}, [None, 'b'], True]
    for text in ['', '[', 'null', '[]', '3', '[' * 100_000, '\0', *('x' for _ in range(100))]:
        facts = {'dataset': rng.choice(values), 'classes': rng.choice(values)}
        (tmp_path / 'dataset.json').write_text(json.dumps(facts) if text == 'x' else text)
        data = training_data({'data_dir': str(tmp_path)}, 2)
        assert data.classes == (
            ('a', 'b')
            if text == 'x'
            and facts == {**facts, 'dataset': facts['dataset']}
            and isinstance(facts['dataset'], str)
            and facts['classes'] == ['a', 'b']
            else ()
        )


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    dead = subprocess.Popen(['true'])
    dead.wait()
    for name in (f'.out.{dead.pid}.partial', '.out.mine.partial', f'.out.{os.getppid()}.partial', '.outer.1.partial'):
        (tmp_path / name).mkdir()
    (tmp_path / f'.out.{dead.pid}.old').mkdir()  # killed between the two renames
    with written_aside(tmp_path / 'out') as aside:
        assert (tmp_path / 'out').is_dir()
        aside.mkdir()
    kept = ['.out.mine.partial', f'.out.{os.getppid()}.partial', '.outer.1.partial', 'out']
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


# Uploads a finished folder, case by case; the waits between the client's repeated requests are left out.
UPLOAD = """
import argparse, json, sys, time, traceback
from pathlib import Path
from timm_msar.cli import push
from timm_msar.cli.errors import CommandError

time.sleep = lambda seconds: None
push.TIMEOUT = 0.5
parser = argparse.ArgumentParser()
push.add_arguments(parser)
for line in sys.stdin:
    folder, *options = json.loads(line)
    try:
        answer = [0, push._upload(Path(folder), parser.parse_args(['unused', *options]))]
    except CommandError as error:
        answer = [1, str(error)]
    except Exception:
        answer = [2, traceback.format_exc()]
    print('RESULT', json.dumps(answer), flush=True)
"""


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp('hub')) as hub:
        hub.add_user('me', token='hf_secret')
        yield hub


@pytest.fixture
def upload(hub, run, tmp_path):
    """Uploads an exported folder with another card each time, so that there is something to commit."""
    folder = tmp_path / 'exported'
    export.write_folder(load_trained(run), folder, 'hf-hub:me/net', run)
    card, number = (folder / 'README.md').read_text(), 0
    with open(tmp_path / 'log', 'w') as log:
        env = {**os.environ, **hub.env('hf_secret', tmp_path / 'cache')}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        process = subprocess.Popen([sys.executable, '-c', UPLOAD], env=env, **pipes)

    def one(*options):
        nonlocal number
        number += 1
        (folder / 'README.md').write_text(f'{card}\n{number}\n')
        process.stdin.write(json.dumps([str(folder), *options]) + '\n')
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith('RESULT '):
                assert 'hf_secret' not in line
                return json.loads(line.removeprefix('RESULT '))
        raise AssertionError((tmp_path / 'log').read_text())

    yield one
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


STEPS = [
    ('GET', '/api/models/'),
    ('POST', '/api/repos/create'),
    ('POST', '/branch/'),
    ('POST', '/validate-yaml'),
    ('POST', '/preupload/'),
    ('POST', '/objects/batch'),
    ('PUT', '/storage/'),
    ('POST', '/objects/verify'),
    ('POST', '/commit/'),
]
BODIES = [
    b'',
    b'null',
    b'[]',
    b'{}',
    b'3',
    b'"x"',
    b'[null]',
    b'{"error": null}',
    b'<html>Bad</html>',
    b'{"files": 1',
    b'\xff\0',
]
STATUSES = [200, 200, 200, 201, 204, 302, 400, 401, 403, 404, 409, 412, 413, 422, 429, 500, 502, 503, 504]


def check_truth(hub, repo, branch, code, text):
    """Compare what the push said with what is on the Hub."""
    assert code in (0, 1), text
    assert (code == 0 or '\n' not in text) and len(text) < 500
    there = hub.repo_dir(repo).exists()
    refs = {path.name for path in (hub.repo_dir(repo) / 'refs').iterdir()} if there else set()
    changed = there and any(hub.history(repo, ref.replace('%2F', '/'))[0].startswith('Add') for ref in refs - {'base'})
    if code == 0:
        assert changed, text
    elif 'no file of' in text:
        assert not changed, text
        assert ('repository' in text.partition('stayed')[0]) == (there and 'base' not in refs) or 'stayed' not in text
        if branch in refs and branch != 'main':
            assert branch in text.partition('no file of')[2], text
    else:
        assert 'look at http' in text, text


def test_answers_of_the_hub_that_go_wrong(hub, upload):
    rng, codes = random.Random(0), []
    for i in range(300):
        repo, options = f'me/net{i}', rng.choice(([], [], ['--revision', 'new'], ['--create-pr']))
        if rng.random() < 0.7:
            hub.create_repo(repo)
            hub.set_head(repo, 'base', hub.commit(repo))  # marks a repository that was there before
        method, path = rng.choice(STEPS)
        what = dict(status=rng.choice(STATUSES), body=rng.choice(BODIES), applied=rng.random() < 0.4)
        if rng.random() < 0.2:
            what = dict(drop_after=0, applied=rng.random() < 0.5) if method != 'GET' else dict(status=500)
        fault = hub.fault(method, path, **what, times=rng.choice((1, 1, 50)))
        code, text = upload('--repo-id', repo, *options)
        fault.times = 0
        check_truth(hub, repo, 'new', code, text)
        codes.append(code)
    assert codes.count(0) > 50 and codes.count(1) > 100


def test_a_commit_whose_answer_is_lost_is_found(hub, upload):
    hub.create_repo('me/lost')
    for what in (dict(), dict(body=b'null'), dict(body=b'{"commitOid'), dict(status=504), dict(silent=True)):
        before = hub.head('me/lost')
        hub.fault('POST', '/commit/', applied=True, **what)
        code, text = upload('--repo-id', 'me/lost')
        assert code == 0 and 'the commit is there' in text and hub.head('me/lost') in text, text
        assert hub.head('me/lost') != before
    lost = hub.fault('POST', '/commit/', applied=True)
    gone = hub.fault('GET', '/api/models/me/lost/revision', status=500, times=0)
    gone.times = 0
    hub.faults.remove(gone)
    code, text = upload('--repo-id', 'me/lost', '--create-pr')
    assert code == 0 or 'is not known' in text
    lost.times = 0


def test_what_a_failed_push_left_is_told(hub, upload):
    fault = hub.fault('POST', '/preupload/', status=403)
    code, text = upload('--repo-id', 'me/fresh')
    assert code == 1 and text.endswith('no file of me/fresh was changed, but the new, empty repository stayed')
    fault = hub.fault('POST', '/preupload/', status=403)
    kept = hub.fault('DELETE', '/branch/', status=403)
    code, text = upload('--repo-id', 'me/fresh', '--revision', 'new')
    assert text.endswith('no file of me/fresh was changed, but its new branch new stayed')
    assert fault.times == kept.times == 0


@pytest.mark.parametrize(('method', 'path'), STEPS)
def test_a_hub_that_never_answers(hub, upload, method, path):
    fault = hub.fault(method, path, silent=True, times=1000)
    start = time.monotonic()
    code, text = upload('--repo-id', 'me/silent' + re.sub(r'\W', '', path), '--revision', 'new')
    fault.times = 0
    assert code == 1 and 'no connection' in text and time.monotonic() - start < 30, text
