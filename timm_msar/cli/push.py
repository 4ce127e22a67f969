"""Publish a checkpoint of train.py on the Hugging Face Hub, so that `timm.create_model('hf-hub:ME/NAME')` loads it.

What is uploaded is what `timm-msar export` writes, after the same checks, and as one commit: a push that is cut off
changes no file there, and pushing the same again changes nothing. The model card on the Hub is replaced.
The token is the one of `hf auth login` or HF_TOKEN; the Hub's client sends it and nothing here shows it.

The Hub compares what it receives with its SHA-256. A reader's client compares sizes alone; `hf cache verify ME/NAME`
compares the hashes of what was downloaded.
"""

import argparse
import hashlib
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from .checkpoint import load_trained
from .errors import CommandError, first_line, one_sentence
from .export import add_checkpoint_arguments, describe, write_folder

TIMEOUT = 60  # seconds without a byte from the Hub; its client by itself waits for ever


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-msar push`."""
    add_checkpoint_arguments(parser)
    parser.add_argument('--repo-id', metavar='ME/NAME', required=True, help='repository; NAME is best MODEL.TAG')
    parser.add_argument('--private', action='store_true', help='only you can see the repository')
    parser.add_argument('--revision', metavar='R', help='branch to push to, made if it is not there (default: main)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of changing the branch')
    parser.add_argument('--dry-run', action='store_true', help='show the files and the card, and upload nothing')


def main(args: argparse.Namespace) -> None:
    """Check, export and upload the checkpoint.

    Raises:
        CommandError: If the checkpoint is not what it should be, or the Hub does not take it.
    """
    _check_repo_id(args.repo_id)
    if not args.dry_run and get_token() is None:
        raise CommandError('you are not logged in to the Hub; run `hf auth login` with a token that may write')
    trained = load_trained(args.checkpoint, args.ema)
    print(describe(trained))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with one_sentence(f'cannot write {folder}', SafetensorError):
            write_folder(trained, folder, f'hf-hub:{args.repo_id}', args.checkpoint)
        for path in sorted(folder.iterdir()):
            print(f'{path.stat().st_size:>12,} bytes  {path.name}')
        if args.dry_run:
            print(f'\n{(folder / "README.md").read_text(encoding="utf-8")}\nNothing was uploaded.')
            return
        print(_upload(folder, args))


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count('/') == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise CommandError(
            f'{repo_id!r} is not a repository id; it is ME/NAME, made of letters, digits, `-`, `_` and `.`, '
            'for example me/resnext50_msar.my_in1k'
        )


@dataclass
class Made:
    """What a push has made on the Hub so far, to be told if it fails."""

    repository: bool = False
    branch: bool = False
    before: str = ''  # the branch's commit before the upload; empty until it is known


def _upload(folder: Path, args: argparse.Namespace) -> str:
    """Upload the folder and return what to tell the user; where the answer was lost, ask what became of it."""
    _limit_waiting()
    api, made = HfApi(library_name='timm-msar'), Made()
    try:
        return _commit(api, folder, args, made)
    except CommandError:
        raise
    except Exception as error:  # the client raises errors of any class on an answer that it does not expect
        # It wraps an error during the upload of a file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        head = _head(api, args, made)
        if head not in (made.before, None) and _holds(api, folder, args.repo_id, head):
            return f'{constants.ENDPOINT}/{args.repo_id}/commit/{head}\nThe answer was lost, but the commit is there.'
        raise CommandError(f'{_reason(cause, args.repo_id)}; {_outcome(api, args, made, head, cause)}') from error


def _limit_waiting() -> None:
    """Give each request of the Hub's client a time-out, also after it made itself a new session."""
    session = get_session()
    hooks = session.event_hooks

    def client():
        return type(session)(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT)

    set_client_factory(client)


def _commit(api: HfApi, folder: Path, args: argparse.Namespace, made: Made) -> str:
    repo_id, revision = args.repo_id, args.revision
    try:
        private = api.model_info(repo_id, timeout=TIMEOUT).private
    except RepositoryNotFoundError:
        made.repository, private = True, args.private
        api.create_repo(repo_id, private=args.private or None)
    if args.private and not private:
        raise CommandError(f'{repo_id} exists and is public; make it private in its settings or give another name')
    try:
        made.before = api.model_info(repo_id, revision=revision, timeout=TIMEOUT).sha or ''
    except RevisionNotFoundError:
        made.branch = True
        api.create_branch(repo_id, branch=revision)
        made.before = api.model_info(repo_id, revision=revision, timeout=TIMEOUT).sha or ''
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=args.create_pr,
        commit_message=f'Add {repo_id.partition("/")[2]}',
    )
    if commit.oid == made.before:
        return f'{repo_id} has these files already; nothing changed.'
    if commit.pr_url:
        return f'Opened {commit.pr_url}'
    at = f'@{revision}' if revision else ''
    return f'{commit.commit_url}\nLoad it: import timm_msar; timm.create_model("hf-hub:{repo_id}{at}", pretrained=True)'


def _head(api: HfApi, args: argparse.Namespace, made: Made) -> str | None:
    """The commit that the branch has now; None where the Hub does not say."""
    if not made.before:
        return made.before  # nothing was uploaded
    try:
        return api.model_info(args.repo_id, revision=args.revision, timeout=TIMEOUT).sha
    except Exception:  # as in _upload
        return None


def _holds(api: HfApi, folder: Path, repo_id: str, commit: str) -> bool:
    """Whether a commit has the files of the folder."""
    try:
        found = api.get_paths_info(repo_id, [path.name for path in folder.iterdir()], revision=commit)
        hashes = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in found}  # type: ignore[union-attr]
    except Exception:  # as in _upload
        return False
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    return all(
        hashes.get(name) in (hashlib.sha256(content).hexdigest(), _git_id(content))
        for name, content in contents.items()
    )


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _outcome(api: HfApi, args: argparse.Namespace, made: Made, head: str | None, error: BaseException) -> str:
    """What the failed push changed and what it left, as far as that can be known."""
    repo_id, branch = args.repo_id, args.revision or 'main'
    refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
    if head != made.before:
        known = f'the branch {branch} has another commit than before' if head else 'what was changed is not known'
        return f'{known}: look at {constants.ENDPOINT}/{repo_id}'
    if args.create_pr and made.before and not refused:
        return f'whether the pull request was opened is not known: look at {constants.ENDPOINT}/{repo_id}/discussions'
    left = []
    if made.branch and made.before:
        try:
            api.delete_branch(repo_id, branch=branch)
        except Exception:  # as in _upload
            left.append(f'its new branch {branch}')
    elif made.branch and not refused:
        left.append(f'perhaps its new branch {branch}')
    if made.repository:
        with suppress(Exception):
            api.model_info(repo_id, timeout=TIMEOUT)
            left.append('the new, empty repository')
    unchanged = f'no file of {repo_id} was changed'
    return f'{unchanged}, but {" and ".join(left)} stayed' if left else unchanged


def _reason(error: BaseException, repo_id: str) -> str:
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, HTTPError):
            return f'no connection to {constants.ENDPOINT} ({type(error).__name__}); check the network and push again'
        if isinstance(error, OSError):
            return f'the Hub could not be asked: {first_line(error)}'
        return f'the Hub gave an answer that its client does not understand ({type(error).__name__}); push again later'
    status = error.response.status_code
    if status == 401:
        return 'the Hub does not accept your token; run `hf auth login` with one that may write'
    if status == 403:
        return f'your token has no right to write to {repo_id}; check the owner, and that the token may write'
    if status in (409, 412):
        return 'somebody else is changing the repository; look at what changed there, and push again'
    if status == 429:
        wait = error.response.headers.get('Retry-After')
        return f'the Hub asks to wait{f" {wait} seconds" if wait else ""} before the next request; push again then'
    if status >= 500:
        return f'the Hub has a problem of its own (error {status}); push again later'
    return f'the Hub answered {status}: {" ".join((error.server_message or "no reason given").split())}'
