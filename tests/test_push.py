"""From a checkpoint to the Hub and back: one commit, the same logits, and a repository that no failure changes."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from hub_server import Hub
from trained_run import logits, make_run, weights

from timm_msar.cli import main

TOKEN = 'hf_secret_of_me'

# Several pushes in one process, because importing torch takes longer than a push.
PUSH = """
import argparse, contextlib, io, json, os, sys
from timm_msar.cli import push
from timm_msar.cli.errors import CommandError

parser = argparse.ArgumentParser()
push.add_arguments(parser)
for line in sys.stdin:
    token, *arguments = json.loads(line)
    os.environ['HF_TOKEN'] = token
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output):
        try:
            push.main(parser.parse_args(arguments))
        except CommandError as error:
            code = 1
            print(error)
    print('RESULT', json.dumps([code, output.getvalue()]), flush=True)
"""

LOAD = """
import json, sys
import timm, timm_msar, torch

names = sys.argv[1:]
for name in names:
    model = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    print('RESULT', json.dumps([logits.tolist(), model.pretrained_cfg['tag'], model.pretrained_cfg['label_names']]))
"""


class Pusher:
    """A process that pushes as one user; the error output of the client is kept as well."""

    def __init__(self, env, folder):
        self.log = folder / 'stderr.txt'
        with open(self.log, 'w') as log:
            command = [sys.executable, '-c', PUSH]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            self.process = subprocess.Popen(command, env={**os.environ, **env}, text=True, **pipes)

    def start(self, checkpoint, *options, token=TOKEN):
        self.process.stdin.write(json.dumps([token, str(checkpoint), *options]) + '\n')
        self.process.stdin.flush()

    def __call__(self, checkpoint, *options, token=TOKEN):
        self.start(checkpoint, *options, token=token)
        for line in self.process.stdout:
            if line.startswith('RESULT '):
                return json.loads(line.removeprefix('RESULT '))
        raise AssertionError(self.log.read_text())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('plain'))


@pytest.fixture(scope='module')
def other_checkpoint(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('other'), seed=7)


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp('hub')) as hub:
        hub.add_user('me', token=TOKEN)
        hub.add_user('timm', token='hf_timm')
        hub.create_repo('timm/public')
        yield hub


@pytest.fixture(scope='module')
def push(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp('client')
    pusher = Pusher(hub.env(TOKEN, folder / 'cache'), folder)
    yield pusher
    pusher.close()
    assert TOKEN not in pusher.log.read_text()


def load(hub, cache, *names, token=None):
    """Load networks as a new user would: a new process, an empty cache, `import timm_msar`."""
    env = {**os.environ, **hub.env(token, cache)}
    command = [sys.executable, '-c', LOAD, *names]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    lines = [line.removeprefix('RESULT ') for line in process.stdout.splitlines() if line.startswith('RESULT ')]
    return [(torch.tensor(values), tag, names) for values, tag, names in map(json.loads, lines)]


def test_the_circle(hub, push, checkpoint, other_checkpoint, tmp_path):
    repo = 'me/cifar_resnet20_msar.boots'
    code, output = push(checkpoint, '--repo-id', repo)
    assert code == 0, output
    assert f'hf-hub:{repo}' in output and TOKEN not in output
    assert hub.history(repo) == ['Add cifar_resnet20_msar.boots', 'initial commit']
    assert sorted(hub.commit(repo)['files']) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']

    uploads, head = hub.count('PUT', '/storage/'), hub.head(repo)
    code, output = push(checkpoint, '--repo-id', repo)
    assert (code, hub.head(repo), hub.count('PUT', '/storage/')) == (0, head, uploads)
    assert 'nothing changed' in output

    branch = push(other_checkpoint, '--repo-id', repo, '--revision', 'seed7')
    request = push(other_checkpoint, '--repo-id', repo, '--create-pr')
    assert branch[0] == request[0] == 0 and '@seed7' in branch[1] and '/discussions/1' in request[1]
    assert hub.head(repo) == head
    private = push(checkpoint, '--repo-id', 'me/hidden', '--private')
    assert private[0] == 0 and json.loads((hub.repo_dir('me/hidden') / 'repo.json').read_text())['private']

    names = [f'hf-hub:{repo}', f'hf-hub:{repo}@seed7', f'hf-hub:{repo}@refs/pr/1', 'hf-hub:me/hidden']
    loaded = load(hub, tmp_path / 'empty', *names, token=TOKEN)
    first, other = logits(weights(checkpoint)), logits(weights(other_checkpoint))
    assert not torch.equal(first, other)
    for (result, _, labels), expected in zip(loaded, (first, other, other, first), strict=True):
        assert torch.equal(result, expected)
        assert labels == ['ankle_boot', 'bag', 'coat']
    assert [tag for _, tag, _ in loaded] == ['boots', 'boots', 'boots', 'run']
    assert hub.history('me/hidden') == ['Add hidden', 'initial commit']


def test_a_dry_run_shows_all_and_sends_nothing(hub, push, checkpoint):
    requests = len(hub.requests)
    code, output = push(checkpoint, '--repo-id', 'me/cifar_resnet20_msar.dry', '--dry-run')
    assert code == 0 and len(hub.requests) == requests
    for part in (
        'model.safetensors',
        'config.json',
        '# Model card for cifar_resnet20_msar.dry',
        'Nothing was uploaded',
    ):
        assert part in output


REFUSED = [
    # what goes wrong, the request, how, what the sentence says
    ('storage refuses, before it has the file', 'PUT', '/storage/', dict(status=403), 'no right to write'),
    ('the token is not accepted', 'POST', '/preupload/', dict(status=401), 'does not accept your token'),
    ('the repository is not yours', 'POST', '/preupload/', dict(status=403), 'no right to write to me/net'),
    ('gone', 'POST', '/commit/', dict(status=404), 'answered 404'),
    ('somebody commits', 'POST', '/commit/', dict(status=409), 'somebody else is changing'),
    ('too often', 'POST', '/commit/', dict(status=429, headers={'Retry-After': '17'}), 'wait 17 seconds'),
    ('down', 'POST', '/commit/', dict(status=500), 'a problem of its own (error 500)'),
    ('the connection breaks', 'POST', '/commit/', dict(drop_after=100), 'no connection to http://127.0.0.1'),
]


def test_refusals_are_one_sentence_and_change_nothing(hub, push, checkpoint, tmp_path):
    changed = make_run(tmp_path, seed=9)
    assert push(checkpoint, '--repo-id', 'me/net')[0] == 0
    history, head = hub.history('me/net'), hub.head('me/net')
    for name, method, path, what, sentence in REFUSED:
        fault = hub.fault(method, path, **what)
        code, output = push(changed, '--repo-id', 'me/net')
        last = output.splitlines()[-1]
        assert code == 1 and sentence in last and last.endswith('no file of me/net was changed'), (name, output)
        assert fault.times == 0 and hub.head('me/net') == head, name
    hub.fault('POST', '/commit/', status=500)
    assert push(changed, '--repo-id', 'me/net', '--revision', 'new')[0] == 1
    refs = sorted(path.name for path in (hub.repo_dir('me/net') / 'refs').iterdir())
    assert (refs, hub.history('me/net')) == (['main'], history)  # the branch that was made for it is gone

    code, output = push(checkpoint, '--repo-id', 'timm/public')
    assert code == 1 and 'no right to write to timm/public' in output
    code, output = push(checkpoint, '--repo-id', 'timm/new')
    assert code == 1 and 'no right to write to timm/new' in output
    code, output = push(checkpoint, '--repo-id', 'me/net', '--private')
    assert code == 1 and 'exists and is public' in output
    for repo_id in ('net', 'me/net/more', 'me/-net', 'me/my net', 'me/net.git', ''):
        requests = len(hub.requests)
        code, output = push(checkpoint, '--repo-id', repo_id)
        assert (code, len(hub.requests)) == (1, requests) and 'is not a repository id' in output, repo_id
    assert hub.head('me/net') == head


def test_a_bad_checkpoint_sends_nothing(hub, push, checkpoint, tmp_path):
    cut = tmp_path / 'cut.pth.tar'
    cut.write_bytes(checkpoint.read_bytes()[:-5000])
    requests = len(hub.requests)
    code, output = push(cut, '--repo-id', 'me/cut')
    assert (code, len(hub.requests)) == (1, requests) and 'is not a checkpoint, or is cut off' in output


def test_without_token_or_network(hub, checkpoint, tmp_path):
    pusher = Pusher({**hub.env(None, tmp_path / 'cache'), 'HF_ENDPOINT': 'http://127.0.0.1:9'}, tmp_path)
    try:
        code, output = pusher(checkpoint, '--repo-id', 'me/net', token='')
        assert code == 1
        assert output == 'you are not logged in to the Hub; run `hf auth login` with a token that may write\n'
        code, output = pusher(checkpoint, '--repo-id', 'me/net')
        assert code == 1 and 'no connection to http://127.0.0.1:9 (ConnectError)' in output
    finally:
        pusher.close()


def test_a_push_that_is_killed_leaves_the_repository_and_the_next_one_succeeds(hub, push, checkpoint, tmp_path):
    assert push(checkpoint, '--repo-id', 'me/killed')[0] == 0
    files = hub.commit('me/killed')
    fault = hub.fault('PUT', '/storage/', drop_after=100_000, times=1000)
    killed = Pusher(hub.env(TOKEN, tmp_path / 'cache'), tmp_path)
    try:
        started = hub.count('PUT', '/storage/')
        killed.start(make_run(tmp_path / 'third', seed=8), '--repo-id', 'me/killed')
        deadline = time.monotonic() + 300
        while hub.count('PUT', '/storage/') == started and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hub.count('PUT', '/storage/') > started
    finally:
        killed.close()
        fault.times = 0
    assert hub.commit('me/killed') == files
    code, output = push(tmp_path / 'third' / 'run' / 'last.pth.tar', '--repo-id', 'me/killed')
    assert code == 0, output
    assert hub.history('me/killed') == ['Add killed', 'Add killed', 'initial commit']


def test_the_command_line_ends_with_the_sentence_and_one(checkpoint, capsys):
    assert main(['push', str(checkpoint), '--repo-id', 'nobody']) == 1
    output = capsys.readouterr()
    assert output.out == '' and len(output.err.splitlines()) == 1
    assert output.err.startswith("timm-msar push: error: 'nobody' is not a repository id")


TIMM_PUSH = """
import timm, torch

torch.manual_seed(3)
model = timm.create_model('resnet18')
timm.models.push_to_hf_hub(model, 'timm/resnet18.a1_in1k', safe_serialization=True)
"""

WARM_START = """
import timm, timm_msar, torch

plain = timm.create_model('resnet18.a1_in1k', pretrained=True).eval()
warm = timm.create_model('resnet18_msar', pretrained=True).eval()
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
torch.manual_seed(3)
assert torch.equal(plain.conv1.weight, timm.create_model('resnet18').conv1.weight)
with torch.no_grad():
    assert torch.equal(warm(x), plain(x))
"""


def test_a_plain_network_put_on_the_hub_by_timm_starts_one_with_msar(hub, tmp_path):
    import timm

    if not timm.list_pretrained('resnet18_msar'):
        pytest.skip('resnet18_msar has no pretrained weights')
    for script, token in ((TIMM_PUSH, 'hf_timm'), (WARM_START, None)):
        env = {**os.environ, **hub.env(token, tmp_path / str(token))}
        process = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
    assert 'model.safetensors' in hub.commit('timm/resnet18.a1_in1k')['files']
