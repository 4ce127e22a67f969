"""The error of what a user can put right, and whole numbers on the command line."""

import argparse


class CommandError(Exception):
    """Something the user can put right; its text is the whole message, without a traceback."""


def positive(text: str) -> int:
    """Return a whole number from 1 on, as a `type` for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 on, not {text!r}')
    return int(text)
