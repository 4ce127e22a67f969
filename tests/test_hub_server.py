"""The Hub of the tests, checked with the real huggingface_hub client in processes of its own."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import Hub

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB

SCRIPT = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

api = HfApi()


def upload(message='Add', token=None, **options):
    return api.upload_folder(repo_id='me/net', folder_path=sys.argv[1], commit_message=message, token=token, **options)


def download(path='model.safetensors', **options):
    return hf_hub_download('me/net', path, **options)


def error(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        answer = error if hasattr(error, 'response') else error.__cause__  # an upload's error is wrapped
        return [type(error).__name__, answer.response.status_code]
    return None


"""


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / 'hub') as hub:
        hub.add_user('me', token='hf_me')
        hub.add_user('guest', token='hf_guest')
        hub.add_user('reader', token='hf_reader', write=False)
        hub.create_repo('me/net')
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'model.safetensors').write_bytes(WEIGHTS)
    (folder / 'README.md').write_text('---\nlicense: mit\n---\n# Card\n')
    return folder


@pytest.fixture
def client(hub, folder, tmp_path):
    """Runs statements in a new process and gives what they put into `result`."""

    def run(code: str, token: str | None = 'hf_me', cache: str = 'cache'):
        env = {**os.environ, **hub.env(token, tmp_path / cache)}
        script = f'{SCRIPT}{code}\nprint(json.dumps(result))'
        command = [sys.executable, '-c', script, str(folder)]
        process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run


def test_files_come_back_as_they_were_uploaded_in_one_commit(hub, client):
    result = client("""
commit = upload()
info = api.model_info('me/net', files_metadata=True)
tree = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in api.list_repo_tree('me/net')}
paths = [file.path for file in api.get_paths_info('me/net', ['README.md', 'nothing'])]
result = [commit.oid == info.sha, info.card_data['license'], tree, paths, api.whoami()['name']]
""")
    files = hub.commit('me/net')['files']
    tree = {path: file['sha256'] or file['oid'] for path, file in files.items()}
    assert result == [True, 'mit', tree, ['README.md'], 'me']
    assert hub.read('me/net', 'model.safetensors') == WEIGHTS
    assert hub.history('me/net') == ['Add', 'initial commit']

    read = "p = download()\ndownload()\nresult = [p, open(p, 'rb').read().hex()]"
    path, content = client(read, token=None, cache='empty')
    assert bytes.fromhex(content) == WEIGHTS
    assert os.path.basename(os.path.realpath(path)) == tree['model.safetensors']  # the ETag is the SHA-256
    assert hub.count('GET', '/storage/') == 1  # the second time from the cache, after a HEAD
    assert hub.count('HEAD', '/resolve/') == 2


def test_an_identical_upload_makes_no_commit_and_a_changed_file_makes_one(hub, client, folder):
    client('upload()\nupload()\nresult = None')
    assert hub.history('me/net') == ['Add', 'initial commit']
    assert hub.count('PUT', '/storage/') == 1
    (folder / 'README.md').write_text('---\nlicense: mit\n---\n# Other card\n')
    client("upload('Change')\nresult = None")
    assert hub.history('me/net') == ['Change', 'Add', 'initial commit']
    assert hub.count('PUT', '/storage/') == 1


def test_a_folder_put_there_without_a_client_is_read_by_one(hub, client, folder):
    hub.put_folder('me/other', folder)
    read = "result = open(hf_hub_download('me/other', 'model.safetensors'), 'rb').read().hex()"
    assert bytes.fromhex(client(read, token=None)) == WEIGHTS


def test_who_may_read_and_write(hub, client):
    result = client("""
missing = ['RepositoryNotFoundError', 404]
assert error(api.model_info, 'me/nothing') == missing
assert error(api.model_info, 'me/nothing', token=False) == ['RepositoryNotFoundError', 401]
assert error(api.model_info, 'me/net', token='hf_wrong')[1] == 401
refused = [[error(upload, token=t), error(api.create_repo, 'me/x', token=t)] for t in ('hf_guest', 'hf_reader', False)]

private = api.create_repo('me/private', private=True)
repeated = api.create_repo('me/private', exist_ok=True)
assert private == repeated and private.repo_id == 'me/private'
assert error(api.create_repo, 'me/private')[1] == 409
api.upload_file(repo_id='me/private', path_or_fileobj=b'secret', path_in_repo='secret.txt')
assert api.model_info('me/private').private
assert error(api.model_info, 'me/private', token='hf_guest') == missing
assert error(hf_hub_download, 'me/private', 'secret.txt', token='hf_guest')
assert open(hf_hub_download('me/private', 'secret.txt')).read() == 'secret'
api.delete_repo('me/private')
result = [refused, api.repo_exists('me/private')]
""")
    forbidden = [['HfHubHTTPError', 403]] * 2
    assert result[0][:2] == [forbidden, forbidden]
    assert [status for _, status in result[0][2]] == [401, 401]
    assert result[1] is False
    assert hub.history('me/net') == ['initial commit']


def test_branches_revisions_and_pull_requests(hub, client):
    result = client("""
api.create_branch('me/net', branch='dev')
upload('On dev', revision='dev')
number = upload('Asked', create_pr=True, token='hf_guest').pr_num
names = [branch.name for branch in api.list_repo_refs('me/net').branches]
on = [api.file_exists('me/net', 'README.md', revision=r) for r in ('main', 'dev', 'refs/pr/1')]
card = open(download('README.md', revision='refs/pr/1')).read()
api.delete_branch('me/net', branch='dev')
assert error(api.model_info, 'me/net', revision='dev') == ['RevisionNotFoundError', 404]
assert error(download, 'nothing.txt') == ['RemoteEntryNotFoundError', 404]
result = [number, names, on, card[:3]]
""")
    assert result == [1, ['dev', 'main'], [False, True, True], '---']
    assert hub.history('me/net') == ['initial commit']
    assert hub.history('me/net', 'refs/pr/1') == ['Asked', 'initial commit']


def test_a_commit_on_an_old_parent_or_without_its_objects_is_refused(hub, client):
    hub.fault('PUT', '/storage/', status=200)  # storage that claims to have kept what it lost
    result = client("""
parent = api.model_info('me/net').sha
lost = error(upload)
upload()
late = error(upload, 'Late', parent_commit=parent, path_in_repo='folder')
result = [lost, late]
""")
    assert [status for _, status in result] == [404, 412]
    assert hub.history('me/net') == ['Add', 'initial commit']


def test_faults_of_the_commit_reach_the_client_and_leave_the_repository(hub, client):
    statuses = [401, 403, 404, 409, 429, 500]
    for status in statuses:
        hub.fault('POST', '/commit/', status=status)
    result = client(f'result = [error(upload) for _ in range({len(statuses)})]')
    assert [status for _, status in result] == statuses
    assert hub.history('me/net') == ['initial commit']


def test_faults_that_the_client_repairs_by_itself(hub, client):
    hub.fault('POST', '/preupload/', status=429, headers={'Retry-After': '1', 'RateLimit': '"api";r=0;t=1'})
    hub.fault('PUT', '/storage/', drop_after=1000)
    hub.fault('PUT', '/storage/', status=500)
    hub.fault('GET', '/storage/', drop_after=200_000)
    content = client("upload()\nresult = open(download(), 'rb').read().hex()")
    assert bytes.fromhex(content) == WEIGHTS
    assert hub.history('me/net') == ['Add', 'initial commit']
    assert hub.count('POST', '/preupload/') == 2
    assert hub.count('PUT', '/storage/') == 3
    assert hub.count('GET', '/storage/') == 2  # the second one asked for the rest alone


def test_a_corrupted_download_has_the_right_size_and_the_wrong_hash(hub, client):
    """The client compares sizes, not hashes; `hf cache verify` is what compares hashes."""
    hub.fault('GET', '/storage/', corrupt=True)
    content, wrong = client("""
upload()
content = open(download(), 'rb').read().hex()
result = [content, [mismatch['path'] for mismatch in api.verify_repo_checksums('me/net').mismatches]]
""")
    assert [a ^ b for a, b in zip(bytes.fromhex(content), WEIGHTS, strict=True) if a != b] == [1]
    assert wrong == ['model.safetensors']
