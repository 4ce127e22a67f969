"""Answers of the Hub that are wrong, late or lost: a push ends in one sentence, and what it says is true."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from hub_server import Hub
from trained_run import make_run

from timm_msar.cli import export
from timm_msar.cli.checkpoint import load_trained

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


@pytest.fixture(scope='module')
def upload(hub, tmp_path_factory):
    """Uploads an exported folder with another card each time, so that there is something to commit."""
    tmp_path = tmp_path_factory.mktemp('upload')
    folder, run, number = tmp_path / 'exported', make_run(tmp_path, 'cifar_resnet20'), 0
    export.write_folder(load_trained(run), folder, 'hf-hub:me/net', run)
    card = (folder / 'README.md').read_text()
    with open(tmp_path / 'log', 'w') as log:
        env = {**os.environ, **hub.env('hf_secret', tmp_path / 'cache')}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        process = subprocess.Popen([sys.executable, '-c', UPLOAD], env=env, **pipes)

    def one(*options):
        nonlocal number
        number += 1
        (folder / 'README.md').write_text(f'{card}\n{number}\n')
        shutil.rmtree(hub.root / 'objects', ignore_errors=True)  # the weights have to be sent again
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
    for i in range(200):
        repo, options = f'me/net{i}', rng.choice(([], [], ['--revision', 'new'], ['--create-pr']))
        if rng.random() < 0.7:
            hub.create_repo(repo)
            hub.set_head(repo, 'base', hub.commit(repo))  # marks a repository that was there before
        method, path = rng.choice(STEPS)
        status = rng.choice(STATUSES)
        applied = rng.random() < 0.4 and not 400 <= status < 500  # what is refused is not carried out
        what = dict(status=status, body=rng.choice(BODIES), applied=applied)
        if rng.random() < 0.2:
            what = dict(drop_after=0, applied=rng.random() < 0.5) if method != 'GET' else dict(status=500)
        fault = hub.fault(method, path, **what, times=rng.choice((1, 1, 50)))
        code, text = upload('--repo-id', repo, *options)
        fault.times = 0
        check_truth(hub, repo, 'new', code, text)
        codes.append(code)
    assert codes.count(0) > 40 and codes.count(1) > 60


def test_a_commit_whose_answer_is_lost_is_found(hub, upload):
    hub.create_repo('me/lost')
    for what in (dict(), dict(body=b'null'), dict(body=b'{"commitOid'), dict(status=504), dict(silent=True)):
        before = hub.head('me/lost')
        hub.fault('POST', '/commit/', applied=True, **what)
        code, text = upload('--repo-id', 'me/lost')
        assert code == 0 and 'the commit is there' in text and hub.head('me/lost') in text, text
        assert hub.head('me/lost') != before
    hub.fault('POST', '/commit/', applied=True, status=504)
    hub.fault('GET', '/api/models/me/lost', status=500, skip=2)
    code, text = upload('--repo-id', 'me/lost')
    assert code == 1 and 'what was changed is not known: look at http' in text
    hub.fault('POST', '/commit/', applied=True)
    code, text = upload('--repo-id', 'me/lost', '--create-pr')
    assert code == 1 and 'whether the pull request was opened is not known: look at http' in text


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
    code, text = upload('--repo-id', f'me/silent{STEPS.index((method, path))}', '--revision', 'new')
    fault.times = 0
    assert code == 1 and 'no connection' in text and time.monotonic() - start < 30, text
