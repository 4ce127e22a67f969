"""What is told to a user: lines, errors that can be put right, and words that are no whole number."""

import argparse

from timm_msar_command import printable


class CommandError(Exception):
    """Something the user can put right; its text is the whole message, without a traceback."""


def say(*lines: object) -> None:
    """Print lines. All that the command prints comes through here, so that no name or number of a file does harm."""
    print(*map(printable, lines), sep='\n')


def positive(text: str) -> int:
    """Return a whole number from 1 on, as a `type` for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 on, not {text!r}')
    return int(text)
