"""Publish a checkpoint of train.py on the Hugging Face Hub, so that `timm.create_model('hf-hub:ME/NAME')` loads it.

It uploads what `timm-msar export` writes, after the same checks. Pushing the same again changes nothing. The token is
that of `hf auth login` or HF_TOKEN. The Hub's client sends it; nothing here shows it.
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from .errors import CommandError, say
from .export import write_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', type=Path, help='model_best.pth.tar or last.pth.tar, beside its summary.csv')
    parser.add_argument(
        '--repo-id', metavar='ME/NAME', type=repository, required=True, help='repository; NAME should be MODEL.TAG'
    )
    parser.add_argument('--private', action='store_true', help='only you can see the repository')
    target = parser.add_mutually_exclusive_group()  # the Hub opens pull requests against main alone
    target.add_argument('--revision', metavar='BRANCH', help='branch to push to, made if it is not there')
    target.add_argument('--create-pr', action='store_true', help='open a pull request instead of changing main')


def repository(text: str) -> str:
    """Return `text` if it is ME/NAME; argparse makes a refusal of any ValueError."""
    validate_repo_id(text)
    if text.count('/') != 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not ME/NAME')
    return text


def main(args: argparse.Namespace) -> None:
    """Check, export and upload the checkpoint, in one commit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(write_folder(args.checkpoint, folder, f'hf-hub:{args.repo_id}'))
        say(*_upload(folder, args.repo_id, args))


def _upload(folder: Path, repo_id: str, args: argparse.Namespace) -> list[str]:
    """Upload the folder in one commit, and return lines on where it is."""
    api = HfApi(library_name='timm-msar', token=True)  # without a token the client says how to log in
    try:
        api.create_repo(repo_id, private=args.private or None, exist_ok=True)
        if args.private and not api.model_info(repo_id).private:
            raise CommandError(f'{repo_id} exists and is public; make it private in its settings or give another name')
        if args.revision:
            api.create_branch(repo_id, branch=args.revision, exist_ok=True)
        to = {'repo_id': repo_id, 'revision': args.revision, 'create_pr': args.create_pr}
        commit = api.upload_folder(folder_path=folder, commit_message=f'Add {repo_id.partition("/")[2]}', **to)
    except (HTTPError, RuntimeError, ValueError, LookupError) as error:  # refused, broken off, or a strange answer
        messages = [getattr(e, 'server_message', None) for e in (error, error.__cause__)]
        reason = next(filter(None, messages), str(error.__cause__ or error)).partition('\n')[0]
        again = 'opens another pull request' if args.create_pr else 'changes nothing that is already there'
        raise CommandError(
            f'the Hub did not confirm it ({reason}). Look at {api.endpoint}/{repo_id}: the same push again {again}'
        ) from error
    at = f'@{args.revision}' if args.revision else ''
    load = f'Load it: import timm_msar; timm.create_model("hf-hub:{repo_id}{at}", pretrained=True)'
    return [commit.pr_url] if commit.pr_url else [commit.commit_url, load]
