"""A Hugging Face Hub on this machine: it speaks what huggingface_hub sends, keeps everything on disk, fails on demand.

What is there: whoami, create and delete a model repository (public or private), card validation, preupload, LFS batch,
upload and verify (the `basic` transfer; Xet is another protocol, so clients run with `HF_HUB_DISABLE_XET=1`), commits,
branches, pull requests, model info, tree, paths-info, and `resolve` with ETag, HEAD, ranges and a redirect to storage.
Storage listens on its own port: another origin, as on the real Hub, where the token must not follow.

    with Hub(folder) as hub:
        hub.add_user('me', token='hf_write')
        subprocess.run([...], env={**os.environ, **hub.env('hf_write', cache=tmp_path / 'cache')})
        hub.fault('PUT', '/storage/', drop_after=1000)

On disk: `objects/SHA256` (LFS), `blobs/SHA1` (git), `repos/OWNER/NAME/repo.json`, `…/commits/ID.json`, `…/refs/NAME`.
A commit is one new file in `commits/`, then one rename in `refs/`: it is there entirely or not at all.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import threading
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.tar', '.onnx', '.npz', '.pkl')
GIT_ATTRIBUTES = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES).encode()
LFS_MINIMUM = 10 * 2**20  # larger files are LFS whatever their name


@dataclass
class Fault:
    """What goes wrong, and for how many matching requests."""

    method: str
    path: str
    times: int = 1
    skip: int = 0  # matching requests that go right before
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None  # bytes: of a GET's reply, which then ends; of another request, which is then reset
    corrupt: bool = False  # flips one bit in the middle of the reply
    body: bytes | None = None  # is answered in place of the right content
    silent: bool = False  # the connection is accepted and kept, and nothing is answered
    applied: bool = False  # the request is carried out first, and only its answer goes wrong


class HubError(Exception):
    """An answer of the Hub that is not a success."""

    def __init__(self, status: int, message: str, code: str | None = None, **answer: str):
        super().__init__(message)
        self.status = status
        self.code = code
        self.answer = {'error': message, **answer}


class Hub:
    """The server; use it as a context manager.

    Args:
        root: Folder for everything that is stored.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.users: dict[str, tuple[str, bool]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        handler = type('Handler', (_Handler,), {'hub': self})
        self._servers = [ThreadingHTTPServer(('127.0.0.1', 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f'http://127.0.0.1:{server.server_port}' for server in self._servers)

    def __enter__(self) -> 'Hub':
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def env(self, token: str | None, cache: Path) -> dict[str, str]:
        """Environment of a client process that talks to this Hub, as nobody else and from its own cache."""
        env = {
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(cache),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'NO_PROXY': '127.0.0.1',
            'no_proxy': '127.0.0.1',
            'OMP_NUM_THREADS': '1',
        }
        return {**env, 'HF_TOKEN': token} if token else env

    def add_user(self, name: str, token: str, write: bool = True) -> None:
        self.users[token] = (name, write)

    def fault(self, method: str, path: str, **what) -> Fault:
        """The next `times` requests of this method, whose path matches the pattern, go wrong as told."""
        fault = Fault(method, path, **what)
        self.faults.append(fault)
        return fault

    def count(self, method: str, path: str) -> int:
        """How many requests of this method had a path that matches the pattern."""
        return sum(1 for m, p, _ in self.requests if m == method and re.search(path, p))

    # --- repositories on disk ---

    def repo_dir(self, repo_id: str) -> Path:
        if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
            raise HubError(400, f'Invalid repository id {repo_id}')
        return self.root / 'repos' / repo_id

    def head(self, repo_id: str, revision: str = 'main') -> str:
        """Commit of a branch, a pull request or a commit's own id."""
        ref = self.repo_dir(repo_id) / 'refs' / quote(revision, safe='')
        if ref.is_file():
            return ref.read_text()
        if (self.repo_dir(repo_id) / 'commits' / f'{revision}.json').is_file():
            return revision
        raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def commit(self, repo_id: str, revision: str = 'main') -> dict[str, Any]:
        path = self.repo_dir(repo_id) / 'commits' / f'{self.head(repo_id, revision)}.json'
        return json.loads(path.read_text())

    def history(self, repo_id: str, revision: str = 'main') -> list[str]:
        """Messages of the commits, newest first."""
        messages, commit = [], self.commit(repo_id, revision)
        while True:
            messages.append(commit['message'])
            if commit['parent'] is None:
                return messages
            commit = self.commit(repo_id, commit['parent'])

    def read(self, repo_id: str, path: str, revision: str = 'main') -> bytes:
        """Content of one file."""
        return self.stored(self.commit(repo_id, revision)['files'][path]).read_bytes()

    def stored(self, entry: dict[str, Any]) -> Path:
        return self.root / 'objects' / entry['sha256'] if entry['sha256'] else self.root / 'blobs' / entry['oid']

    def create_repo(self, repo_id: str, private: bool = False) -> None:
        """A repository with one commit that holds `.gitattributes`, as the real Hub makes it."""
        folder = self.repo_dir(repo_id)
        if folder.exists():
            raise HubError(409, 'You already created this model repo', url=f'{self.url}/{repo_id}')
        write(folder / 'repo.json', json.dumps({'id': repo_id, 'private': private}).encode())
        files = {'.gitattributes': self.add_blob(GIT_ATTRIBUTES)}
        self.set_head(repo_id, 'main', {'message': 'initial commit', 'parent': None, 'files': files})

    def put_folder(self, repo_id: str, folder: Path) -> None:
        """A repository with the files of a folder, without a client."""
        self.create_repo(repo_id)
        commit = {**self.commit(repo_id), 'message': 'Add files', 'parent': self.head(repo_id)}
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            if path.suffix in LFS_SUFFIXES:
                sha256 = hashlib.sha256(content).hexdigest()
                write(self.root / 'objects' / sha256, content)
                commit['files'][path.name] = self.add_lfs(sha256, len(content))
            else:
                commit['files'][path.name] = self.add_blob(content)
        self.set_head(repo_id, 'main', commit)

    def set_head(self, repo_id: str, revision: str, commit: dict[str, Any]) -> str:
        content = json.dumps(commit).encode()
        oid = hashlib.sha1(content + uuid.uuid4().bytes).hexdigest()
        write(self.repo_dir(repo_id) / 'commits' / f'{oid}.json', content)
        write(self.repo_dir(repo_id) / 'refs' / quote(revision, safe=''), oid.encode())
        return oid

    def add_blob(self, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
        write(self.root / 'blobs' / oid, content)
        return {'oid': oid, 'size': len(content), 'sha256': None}

    def add_lfs(self, sha256: str, size: int) -> dict[str, Any]:
        stored = self.root / 'objects' / sha256
        if not stored.is_file() or stored.stat().st_size != size:
            raise HubError(400, f'LFS pointer points to an object that was not uploaded: {sha256}')
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n'.encode()
        oid = hashlib.sha1(b'blob %d\0' % len(pointer) + pointer).hexdigest()
        return {'oid': oid, 'size': size, 'sha256': sha256, 'pointer': len(pointer)}


def write(path: Path, content: bytes) -> None:
    """Writes aside and renames, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
    aside.write_bytes(content)
    os.replace(aside, path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # an answer is written in two parts, and the second would wait for 40 ms
    hub: Hub

    ROUTES = (
        ('GET', r'/api/whoami-v2', 'whoami'),
        ('POST', r'/api/validate-yaml', 'validate_card'),
        ('POST', r'/api/repos/create', 'create_repo'),
        ('DELETE', r'/api/repos/delete', 'delete_repo'),
        ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)', 'preupload'),
        ('POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'lfs_batch'),
        ('POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/verify', 'lfs_verify'),
        ('PUT', r'/storage/(?P<oid>[0-9a-f]{64})', 'store'),
        ('GET', r'/storage/(?P<oid>[0-9a-f]{64})', 'fetch'),
        ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)', 'create_commit'),
        ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)', 'create_branch'),
        ('DELETE', r'/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)', 'delete_branch'),
        ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/refs', 'refs'),
        ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.*))?', 'tree'),
        ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)', 'paths_info'),
        ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?', 'model_info'),
        ('HEAD', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
        ('GET', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
    )

    def log_message(self, format, *args):
        pass  # the tests read hub.requests

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.sent: int | None = None
        fault = self.take_fault(url.path)
        length = int(self.headers.get('Content-Length') or 0)
        self.corrupt = self.drop_reply_after = self.instead = None
        if fault and fault.applied:
            self.instead, fault = fault, None
        if fault and fault.silent:
            self.record(url.path, 0)
            return self.say_nothing()
        if fault and fault.drop_after is not None and self.command != 'GET':
            self.rfile.read(min(fault.drop_after, length))
            self.record(url.path, 0)
            return self.hang_up()
        self.body = self.read_body(length)
        try:
            if fault and fault.body is not None:
                return self.reply(fault.status or 200, fault.body, fault.headers)
            if fault and fault.status:
                message = f'Fault on demand: {fault.status}'
                return self.reply_json(fault.status, {'error': message}, {'X-Error-Message': message, **fault.headers})
            if fault:
                self.corrupt, self.drop_reply_after = fault.corrupt, fault.drop_after
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and method == self.command:
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, name)(**parts)
            raise HubError(404, f'No such route: {self.command} {url.path}')
        except HubError as error:
            headers = {'X-Error-Message': str(error)}
            if error.code:
                headers['X-Error-Code'] = error.code
            self.reply_json(error.status, error.answer, headers)
        finally:
            self.record(url.path, self.sent or 0)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def take_fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def record(self, path: str, status: int) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, path, status))

    def read_body(self, length: int) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def say_nothing(self) -> None:
        """Keeps the connection until the server stops."""
        self.hub.stopped.wait()
        self.close_connection = True

    def hang_up(self) -> None:
        """Resets the connection without an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.rfile.close()
        self.connection.close()

    # --- answers ---

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        if self.instead:
            fault, self.instead = self.instead, None
            if fault.silent:
                return self.say_nothing()
            if fault.body is None and not fault.status:
                return self.hang_up()
            status, content = fault.status or status, fault.body or b''
        self.sent = status
        self.send_response(status)
        for key, value in {'X-Request-Id': uuid.uuid4().hex, **(headers or {})}.items():
            self.send_header(key, value)
        if 'Content-Length' not in (headers or {}):
            self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.corrupt and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.wfile.write(content if self.drop_reply_after is None else content[: self.drop_reply_after])
        self.close_connection = self.close_connection or self.drop_reply_after is not None

    def reply_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps(value).encode(), {'Content-Type': 'application/json', **(headers or {})})

    # --- who may do what ---

    def user(self) -> tuple[str, bool] | None:
        """Name and right to write of the token's owner; None without a token."""
        header = self.headers.get('Authorization')
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix('Bearer '))
        if user is None:
            raise HubError(401, 'Invalid credentials in Authorization header')
        return user

    def may_read(self, repo: str) -> dict[str, Any]:
        path = self.hub.repo_dir(repo) / 'repo.json'
        user = self.user()
        info = json.loads(path.read_text()) if path.is_file() else None
        if info is None or (info['private'] and (user is None or user[0] != repo.split('/')[0])):
            # the real Hub does not tell a stranger whether a private repository exists
            raise HubError(404 if user else 401, 'Repository not found', 'RepoNotFound')
        return info

    def may_write(self, repo: str, pull_request: bool = False) -> None:
        self.may_read(repo)
        user = self.user()
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        if not user[1] or (user[0] != repo.split('/')[0] and not pull_request):
            raise HubError(403, f'Forbidden: you need write access to {repo}')

    # --- routes ---

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        role = 'write' if user[1] else 'read'
        token = {'displayName': 'test', 'role': role}
        self.reply_json(200, {'type': 'user', 'name': user[0], 'orgs': [], 'auth': {'accessToken': token}})

    def validate_card(self) -> None:
        match = re.match(r'---\n(.*?)\n---', self.json()['content'], re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self.reply_json(400, {'errors': [{'message': str(error)}], 'warnings': []})
        warnings = [] if data else [{'message': 'empty or missing yaml metadata in repo card'}]
        return self.reply_json(200, {'errors': [], 'warnings': warnings})

    def create_repo(self) -> None:
        asked, user = self.json(), self.user()
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        owner = asked.get('organization') or user[0]
        if owner != user[0] or not user[1]:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo = f'{owner}/{asked["name"]}'
        with self.hub.lock:
            self.hub.create_repo(repo, private=asked.get('visibility') == 'private')
        self.reply_json(200, {'url': f'{self.hub.url}/{repo}', 'name': repo})

    def delete_repo(self) -> None:
        asked, user = self.json(), self.user()
        repo = f'{asked.get("organization") or (user or ("",))[0]}/{asked["name"]}'
        self.may_write(repo)
        shutil.rmtree(self.hub.repo_dir(repo))
        self.reply_json(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        self.may_write(repo, pull_request='create_pr' in self.query)
        files, have = [], self.hub.commit(repo, revision)['files']
        for file in self.json()['files']:
            lfs = file['path'].endswith(LFS_SUFFIXES) or file['size'] > LFS_MINIMUM
            entry = have.get(file['path'])
            oid = (entry['sha256'] or entry['oid']) if entry else None
            mode = 'lfs' if lfs else 'regular'
            files.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        self.reply_json(200, {'files': files})

    def lfs_batch(self, repo: str) -> None:
        self.may_write(repo, pull_request=True)  # the batch request does not say whether it is for a pull request
        objects = []
        for item in self.json()['objects']:
            actions = {
                'upload': {'href': f'{self.hub.storage_url}/storage/{item["oid"]}', 'header': {}},
                'verify': {'href': f'{self.hub.url}/{repo}.git/info/lfs/objects/verify', 'header': {}},
            }
            present = (self.hub.root / 'objects' / item['oid']).is_file()
            objects.append({'oid': item['oid'], 'size': item['size'], **({} if present else {'actions': actions})})
        self.reply_json(200, {'transfer': 'basic', 'objects': objects})

    def store(self, oid: str) -> None:
        if self.headers.get('Authorization'):
            raise HubError(400, 'Only one auth mechanism allowed: the token must not be sent to storage')
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, 'XAmzContentSHA256Mismatch')
        write(self.hub.root / 'objects' / oid, self.body)
        self.reply(200, b'', {'ETag': f'"{oid}"'})

    def lfs_verify(self, repo: str) -> None:
        stored = self.hub.root / 'objects' / self.json()['oid']
        if not stored.is_file() or stored.stat().st_size != self.json()['size']:
            raise HubError(404, 'Object not found in storage')
        self.reply_json(200, {'message': 'Object verified'})

    def create_commit(self, repo: str, revision: str) -> None:
        pull_request = 'create_pr' in self.query
        self.may_write(repo, pull_request)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]['value']
        with self.hub.lock:
            parent = self.hub.head(repo, revision)
            if header.get('parentCommit', parent) != parent:
                raise HubError(412, 'A commit has happened since. Please refresh and try again.')
            files = self.hub.commit(repo, parent)['files']
            for line in lines[1:]:
                self.apply(files, line['key'], line['value'])
            commit = {'message': header['summary'], 'parent': parent, 'files': files}
            answer = {'success': True}
            if pull_request:
                number = len(list((self.hub.repo_dir(repo) / 'refs').glob('refs%2Fpr%2F*'))) + 1
                revision = f'refs/pr/{number}'
                answer['pullRequestUrl'] = f'{self.hub.url}/{repo}/discussions/{number}'
            oid = self.hub.set_head(repo, revision, commit)
        url = f'{self.hub.url}/{repo}/commit/{oid}'
        self.reply_json(200, {**answer, 'commitOid': oid, 'commitUrl': url, 'hookOutput': ''})

    def apply(self, files: dict[str, Any], key: str, value: dict[str, Any]) -> None:
        path = value['path']
        if key == 'file':
            files[path] = self.hub.add_blob(base64.b64decode(value['content']))
        elif key == 'lfsFile':
            files[path] = self.hub.add_lfs(value['oid'], value['size'])
        elif key in ('deletedFile', 'deletedFolder'):
            gone = [name for name in files if name == path or name.startswith(path.rstrip('/') + '/')]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", 'EntryNotFound')
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f'Unknown operation {key}')

    def create_branch(self, repo: str, branch: str) -> None:
        self.may_write(repo)
        ref = self.hub.repo_dir(repo) / 'refs' / quote(branch, safe='')
        if ref.exists():
            raise HubError(409, f'Reference {branch} already exists')
        write(ref, self.hub.head(repo, self.json().get('startingPoint', 'main')).encode())
        self.reply_json(200, {})

    def delete_branch(self, repo: str, branch: str) -> None:
        self.may_write(repo)
        self.hub.head(repo, branch)
        (self.hub.repo_dir(repo) / 'refs' / quote(branch, safe='')).unlink()
        self.reply_json(200, {})

    def refs(self, repo: str) -> None:
        self.may_read(repo)
        names = sorted(unquote(path.name) for path in (self.hub.repo_dir(repo) / 'refs').iterdir())
        branches = [
            {'name': name, 'ref': f'refs/heads/{name}', 'targetCommit': self.hub.head(repo, name)}
            for name in names
            if not name.startswith('refs/')
        ]
        self.reply_json(200, {'branches': branches, 'tags': [], 'converts': []})

    def model_info(self, repo: str, revision: str = 'main') -> None:
        info = self.may_read(repo)
        files = self.hub.commit(repo, revision)['files']
        card = {}
        if 'README.md' in files:
            match = re.match(r'---\n(.*?)\n---', self.hub.read(repo, 'README.md', revision).decode(), re.DOTALL)
            card = yaml.safe_load(match[1]) if match else {}
        siblings = [{'rfilename': path} for path in sorted(files)]
        sha = self.hub.head(repo, revision)
        self.reply_json(200, {**info, 'modelId': repo, 'sha': sha, 'siblings': siblings, 'cardData': card, 'tags': []})

    def entry(self, path: str, file: dict[str, Any]) -> dict[str, Any]:
        lfs = {'oid': file['sha256'], 'size': file['size'], 'pointerSize': file.get('pointer')}
        entry = {'type': 'file', 'path': path, 'size': file['size'], 'oid': file['oid']}
        return {**entry, 'lfs': lfs} if file['sha256'] else entry

    def tree(self, repo: str, revision: str, path: str = '') -> None:
        self.may_read(repo)
        prefix = f'{path}/' if path else ''
        entries: dict[str, Any] = {}
        for name, file in sorted(self.hub.commit(repo, revision)['files'].items()):
            if not name.startswith(prefix):
                continue
            if '/' in name[len(prefix) :]:
                folder = prefix + name[len(prefix) :].split('/')[0]
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries.setdefault(folder, {'type': 'directory', 'path': folder, 'size': 0, 'oid': oid})
                if self.query.get('recursive', '').lower() != 'true':
                    continue
            entries[name] = self.entry(name, file)
        if path and not entries:
            raise HubError(404, f'{path} does not exist', 'EntryNotFound')
        self.reply_json(200, list(entries.values()))

    def paths_info(self, repo: str, revision: str) -> None:
        self.may_read(repo)
        files = self.hub.commit(repo, revision)['files']
        asked = parse_qs(self.body.decode()).get('paths', [])
        self.reply_json(200, [self.entry(path, files[path]) for path in asked if path in files])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        self.may_read(repo)
        commit = self.hub.head(repo, revision)
        headers = {'X-Repo-Commit': commit, 'Accept-Ranges': 'bytes'}
        file = self.hub.commit(repo, commit)['files'].get(path)
        if file is None:
            message = 'Entry not found'
            missing = {'X-Error-Code': 'EntryNotFound', 'X-Error-Message': message}
            return self.reply_json(404, {'error': message}, {**headers, **missing})
        if file['sha256']:
            headers.update({'X-Linked-Size': str(file['size']), 'X-Linked-Etag': f'"{file["sha256"]}"'})
            headers['Location'] = f'{self.hub.storage_url}/storage/{file["sha256"]}'
            return self.reply(302, b'', headers)
        headers['ETag'] = f'"{file["oid"]}"'
        return self.reply_file(self.hub.stored(file), headers)

    def fetch(self, oid: str) -> None:
        if self.headers.get('Authorization'):
            raise HubError(400, 'Only one auth mechanism allowed: the token must not be sent to storage')
        stored = self.hub.root / 'objects' / oid
        if not stored.is_file():
            raise HubError(404, 'NoSuchKey')
        return self.reply_file(stored, {'ETag': f'"{oid}"'})

    def reply_file(self, path: Path, headers: dict[str, str]) -> None:
        content = path.read_bytes()
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not match:
            return self.reply(200, content, {**headers, 'Content-Length': str(len(content))})
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        if start >= len(content):
            return self.reply(416, b'', {'Content-Range': f'bytes */{len(content)}'})
        part = content[start : end + 1]
        headers = {**headers, 'Content-Range': f'bytes {start}-{start + len(part) - 1}/{len(content)}'}
        return self.reply(206, part, {**headers, 'Content-Length': str(len(part))})
