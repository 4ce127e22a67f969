"""Publish a checkpoint of train.py on the Hugging Face Hub, so that `timm.create_model('hf-hub:ME/NAME')` loads it.

What is uploaded is what `timm-msar export` writes, after the same checks, and as one commit: a push that is cut off
changes no file there, and pushing the same again changes nothing. The model card on the Hub is replaced.
The token is the one of `hf auth login` or HF_TOKEN; the Hub's client sends it and nothing here shows it.

The Hub compares what it receives with its SHA-256. A reader's client compares sizes alone; `hf cache verify ME/NAME`
compares the hashes of what was downloaded.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .checkpoint import load_trained
from .errors import CommandError, first_line
from .export import add_checkpoint_arguments, describe, disk_errors, write_folder


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
        with disk_errors(folder):
            write_folder(trained, folder, f'hf-hub:{args.repo_id}', args.checkpoint)
        for path in sorted(folder.iterdir()):
            print(f'{path.stat().st_size:>12,} bytes  {path.name}')
        if args.dry_run:
            print(f'\n{(folder / "README.md").read_text(encoding="utf-8")}\nNothing was uploaded.')
            return
        with _hub_errors(args.repo_id):
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


def _upload(folder: Path, args: argparse.Namespace) -> str:
    api, repo_id, revision = HfApi(library_name='timm-msar'), args.repo_id, args.revision
    api.create_repo(repo_id, private=args.private or None, exist_ok=True)
    if args.private and not api.model_info(repo_id).private:
        raise CommandError(f'{repo_id} exists and is public; make it private in its settings or give another name')
    new_branch = False
    try:
        before = api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        before, new_branch = None, True
        api.create_branch(repo_id, branch=revision)
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=args.create_pr,
            commit_message=f'Add {repo_id.partition("/")[2]}',
        )
    except BaseException:
        if new_branch:
            with suppress(HTTPError):
                api.delete_branch(repo_id, branch=revision)
        raise
    if commit.oid == before:
        return f'{repo_id} has these files already; nothing changed.'
    if commit.pr_url:
        return f'Opened {commit.pr_url}'
    at = f'@{revision}' if revision else ''
    return f'{commit.commit_url}\nLoad it: import timm_msar; timm.create_model("hf-hub:{repo_id}{at}", pretrained=True)'


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Tell what the Hub, or the way to it, did not allow, in one sentence."""
    try:
        yield
    except (HTTPError, RuntimeError, ValueError, OSError) as error:
        # the client wraps an error during the upload of a file in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise CommandError(f'{_reason(cause, repo_id)}; no file of {repo_id} was changed') from error


def _reason(error: BaseException, repo_id: str) -> str:
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, HTTPError):
            return f'no connection to {constants.ENDPOINT} ({type(error).__name__}); check the network and push again'
        return f'the Hub did not take it: {first_line(error)}'
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
    return f'the Hub answered {status}: {error.server_message or "no reason given"}'
