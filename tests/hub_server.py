"""A Hugging Face Hub in this process, for the real client: it takes pushes, serves downloads, and fails on demand.

It speaks what huggingface_hub sends for a push and a download with `HF_HUB_DISABLE_XET=1`: repositories, branches, pull
requests, LFS uploads, commits and files.

    with Hub() as hub:
        hub.faults.append(Fault('POST', '/commit/', status=500))
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = '.safetensors'


@dataclass
class Fault:
    """The next request that matches is answered with `status`, or the connection breaks where that is None."""

    method: str
    path: str
    status: int | None = None
    applied: bool = False  # whether the request is carried out first


@dataclass
class Repository:
    """A repository: for each branch and pull request, its commits, each with its message and all files."""

    private: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(
        default_factory=lambda: {'main': [('initial commit', {})]}
    )

    def files(self, revision: str = 'main') -> dict[str, bytes]:
        return self.branches[revision][-1][1]

    def history(self) -> list[str]:
        return [message for message, _ in self.branches['main']]

    def sha(self, revision: str) -> str:
        return hashlib.sha1(repr(self.branches[revision]).encode()).hexdigest()


class Hub:
    """The server; use it as a context manager."""

    def __init__(self):
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.url = f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, token: str | None, cache: Path) -> dict[str, str]:
        """Environment of a client process that talks to this Hub, as nobody else and from its own cache."""
        switches = ('HF_HUB_DISABLE_XET', 'HF_HUB_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_PROGRESS_BARS')
        env = {'HF_ENDPOINT': self.url, 'HF_HOME': str(cache), 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1'}
        return {**env, **dict.fromkeys(switches, '1'), **({'HF_TOKEN': token} if token else {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # an answer is written in two parts, and the second would wait for 40 ms
    hub: Hub

    MODEL = r'/api/models/(?P<repo_id>[^/]+/[^/]+)'
    ROUTES = (
        (r'POST /api/validate-yaml', 'validate_card'),
        (r'POST /api/repos/create', 'create_repo'),
        (rf'POST {MODEL}/preupload/(?P<revision>[^/]+)', 'preupload'),
        (r'POST /(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'lfs_batch'),
        (r'PUT /storage/(?P<oid>[0-9a-f]{64})', 'store'),
        (rf'POST {MODEL}/commit/(?P<revision>[^/]+)', 'create_commit'),
        (rf'POST {MODEL}/branch/(?P<branch>[^/]+)', 'create_branch'),
        (rf'GET {MODEL}(/revision/(?P<revision>[^/]+))?', 'model_info'),
        (r'(HEAD|GET) /(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
    )

    def log_message(self, format, *args):
        pass  # the tests read hub.requests

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        request = f'{self.command} {url.path}'
        with self.hub.lock:
            self.hub.requests.append(request)
            matching = (f for f in self.hub.faults if f.method == self.command and f.path in url.path)
            if fault := next(matching, None):
                self.hub.faults.remove(fault)
            self.fault = fault
            if fault and not fault.applied:
                return self.reply(200, b'')
            for pattern, name in self.ROUTES:
                if match := re.fullmatch(pattern, request):
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, name)(**parts)
        self.refuse(404, 'No such route')

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault and self.fault.status is None:
            self.close_connection = True  # without an answer
            return
        if self.fault:
            status, headers = self.fault.status, {'X-Error-Message': f'Fault on demand: {self.fault.status}'}
        self.send_response(status)
        for key, value in {'Content-Length': str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def reply_json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def refuse(self, status: int, message: str, code: str = '') -> None:
        self.reply(status, b'{}', {'X-Error-Message': message, 'X-Error-Code': code})

    def validate_card(self) -> None:
        self.reply_json({'errors': [], 'warnings': []})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        repo_id = f'{asked["organization"]}/{asked["name"]}'
        status = 409 if repo_id in self.hub.repos else 200
        self.hub.repos.setdefault(repo_id, Repository(private=asked.get('visibility') == 'private'))
        self.reply_json({'url': f'{self.hub.url}/{repo_id}'}, status)

    def preupload(self, repo_id: str, revision: str) -> None:
        have, answer = self.hub.repos[repo_id].files(revision), []
        for path in (file['path'] for file in json.loads(self.body)['files']):
            content, lfs = have.get(path), path.endswith(LFS)
            git = b'' if lfs or not content else b'blob %d\0' % len(content)
            oid = content and (hashlib.sha256 if lfs else hashlib.sha1)(git + content).hexdigest()
            answer.append({'path': path, 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False, 'oid': oid})
        self.reply_json({'files': answer})

    def lfs_batch(self, repo_id: str) -> None:
        objects = [{'oid': item['oid'], 'size': item['size']} for item in json.loads(self.body)['objects']]
        for item in objects:
            if item['oid'] not in self.hub.objects:
                item['actions'] = {'upload': {'href': f'{self.hub.url}/storage/{item["oid"]}'}}
        self.reply_json({'transfer': 'basic', 'objects': objects})

    def store(self, oid: str) -> None:
        self.hub.objects[oid] = self.body
        self.reply(200, b'')

    def create_commit(self, repo_id: str, revision: str) -> None:
        repo, (header, *changes) = self.hub.repos[repo_id], map(json.loads, self.body.splitlines())
        files = dict(repo.files(revision))
        for change in (line['value'] for line in changes):
            lfs = 'oid' in change
            files[change['path']] = self.hub.objects[change['oid']] if lfs else base64.b64decode(change['content'])
        commits, answer = [*repo.branches[revision], (header['value']['summary'], files)], {}
        if 'create_pr' in self.query:
            revision, answer = 'refs/pr/1', {'pullRequestUrl': f'{self.hub.url}/{repo_id}/discussions/1'}
        repo.branches[revision] = commits
        url = f'{self.hub.url}/{repo_id}/commit/{repo.sha(revision)}'
        self.reply_json({**answer, 'commitOid': repo.sha(revision), 'commitUrl': url})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self.hub.repos[repo_id]
        repo.branches.setdefault(branch, repo.branches['main'])  # the real Hub answers 409 where it is there
        self.reply_json({})

    def model_info(self, repo_id: str, revision: str = 'main') -> None:
        repo = self.hub.repos[repo_id]
        self.reply_json({'id': repo_id, 'private': repo.private, 'sha': repo.sha(revision), 'siblings': []})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.hub.repos[repo_id]
        if (content := repo.files(revision).get(path)) is None:
            return self.refuse(404, 'Entry not found', 'EntryNotFound')
        self.reply(
            200, content, {'X-Repo-Commit': repo.sha(revision), 'ETag': f'"{hashlib.sha1(content).hexdigest()}"'}
        )
