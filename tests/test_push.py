"""From a checkpoint to the Hub and back: one commit, the same logits, and a repository that no failure changes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import Fault, Hub, Repository
from trained_run import logits, make_run, weights

TOKEN = 'hf_secret_of_me'

# One process for all, because importing torch takes longer than a push. It loads networks, too.
PUSH = """
import contextlib, io, json, sys
import timm, torch
from timm_msar_command import main

for line in sys.stdin:
    words, output = json.loads(line), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if words[0].startswith('hf-hub:'):
            model = timm.create_model(words[0], pretrained=True).eval()
            with torch.no_grad():
                logits = model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
            result = logits.tolist(), model.pretrained_cfg['tag'], model.pretrained_cfg['label_names']
        else:
            try:
                code = main(['push', *words])
            except SystemExit as error:
                code = error.code
            result = code, output.getvalue()
    print('RESULT', json.dumps(result), flush=True)
"""


class Pusher:
    """A process that pushes as one user."""

    def __init__(self, env):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, '-c', PUSH], env={**os.environ, **env}, **pipes)

    def __call__(self, *arguments):
        self.process.stdin.write(json.dumps([str(argument) for argument in arguments]) + '\n')
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('RESULT '):
                assert TOKEN not in line
                return json.loads(line.removeprefix('RESULT '))
        raise AssertionError('it ended')

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('plain'))


@pytest.fixture(scope='module')
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope='module')
def push(hub, tmp_path_factory):
    pusher = Pusher(hub.env(TOKEN, tmp_path_factory.mktemp('client')))
    yield pusher
    pusher.close()


def test_the_circle(hub, push, checkpoint, tmp_path):
    name, other_checkpoint = 'me/cifar_resnet20_msar.boots', make_run(tmp_path, seed=7)
    code, output = push(checkpoint, '--repo-id', name)
    assert code == 0 and f'hf-hub:{name}' in output, output
    repo = hub.repos[name]
    assert repo.history() == ['initial commit', 'Add cifar_resnet20_msar.boots']
    assert sorted(repo.files()) == ['README.md', 'config.json', 'model.safetensors']

    assert push(checkpoint, '--repo-id', name)[0] == 0  # the same again changes nothing
    assert len(repo.history()) == 2 and sum(request.startswith('PUT /storage/') for request in hub.requests) == 1

    code, output = push(other_checkpoint, '--repo-id', name, '--revision', 'seed7')
    assert code == 0 and f'hf-hub:{name}@seed7' in output
    code, output = push(other_checkpoint, '--repo-id', name, '--create-pr')
    assert code == 0 and output.endswith(f'{name}/discussions/1\n')
    assert len(repo.history()) == 2
    assert push(checkpoint, '--repo-id', 'me/hidden', '--private')[0] == 0 and hub.repos['me/hidden'].private

    first, other = logits(weights(checkpoint)), logits(weights(other_checkpoint))
    assert not torch.equal(first, other)
    revisions = {name: first, f'{name}@seed7': other, f'{name}@refs/pr/1': other, 'me/hidden': first}
    for revision, expected in revisions.items():
        values, tag, labels = push(f'hf-hub:{revision}')
        torch.testing.assert_close(torch.tensor(values), expected)  # another process may have more threads
        assert labels == ['ankle_boot', 'bag', 'coat']
        assert tag == ('run' if revision == 'me/hidden' else 'boots')


def test_bad_input_sends_nothing(hub, push, checkpoint, tmp_path):
    requests = len(hub.requests)
    for repo_id in ('net', 'me/-net', ''):
        code, output = push(checkpoint, '--repo-id', repo_id)
        assert code == 2 and f'{repo_id!r}' in output
    code, output = push(checkpoint, '--repo-id', 'me/net', '--revision', 'new', '--create-pr')
    assert code == 2 and 'not allowed with' in output
    code, output = push(tmp_path, '--repo-id', 'me/net')
    assert code == 1 and 'is not a file' in output
    assert len(hub.requests) == requests


@pytest.mark.parametrize(
    ('fault', 'reason'),
    [
        (Fault('PUT', '/storage/', 403), 'Fault on demand: 403'),
        (Fault('POST', '/commit/', 500), 'Fault on demand: 500'),
        (Fault('POST', '/commit/', 200), 'did not confirm it (Expecting value'),  # an empty answer
        (Fault('POST', '/commit/'), 'Server disconnected'),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_changes_nothing(hub, push, tmp_path, fault, reason):
    repo = hub.repos['me/net'] = Repository()
    hub.objects.clear()
    hub.faults = [fault]
    code, output = push(make_run(tmp_path, epochs=1), '--repo-id', 'me/net')
    assert hub.faults == [] and code == 1 and reason in output and f'Look at {hub.url}/me/net' in output
    assert repo.history() == ['initial commit']


def test_private_in_a_public_repository_is_refused_before_anything_is_uploaded(hub, push, checkpoint):
    hub.repos['me/public'] = Repository()
    code, output = push(checkpoint, '--repo-id', 'me/public', '--private')
    assert code == 1 and 'me/public exists and is public' in output
    assert not any('me/public/preupload' in request for request in hub.requests)


def test_after_a_lost_answer_the_same_push_changes_nothing(hub, push, checkpoint):
    for status in (None, 500):  # no answer, and an error of the server
        name = f'lost-{status}'
        hub.faults = [Fault('POST', '/commit/', status, applied=True)]
        code, output = push(checkpoint, '--repo-id', f'me/{name}')
        assert code == 1 and 'the Hub did not confirm it (' in output and f'Look at {hub.url}/me/{name}: ' in output
        assert 'the same push again changes nothing that is already there' in output
        assert push(checkpoint, '--repo-id', f'me/{name}')[0] == 0
        assert hub.repos[f'me/{name}'].history() == ['initial commit', f'Add {name}']
    hub.faults = [Fault('POST', '/commit/', applied=True)]
    code, output = push(checkpoint, '--repo-id', 'me/request', '--create-pr')
    assert code == 1 and 'the same push again opens another pull request' in output


WARM_START = """
import timm, timm_msar, torch

torch.manual_seed(3)
pushed = timm.create_model('resnet18')
timm.models.push_to_hf_hub(pushed, 'timm/resnet18.a1_in1k', safe_serialization=True)
warm = timm.create_model('resnet18_msar', pretrained=True).eval()
with torch.no_grad():
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(warm(x), pushed.eval()(x))
"""


@pytest.mark.slow
def test_a_plain_network_put_on_the_hub_by_timm_starts_one_with_msar(hub, tmp_path):
    env = {**os.environ, **hub.env('hf_timm', tmp_path)}
    process = subprocess.run([sys.executable, '-c', WARM_START], env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
