"""The error of what a user can put right, and whole numbers on the command line."""

import argparse
from collections.abc import Callable


class CommandError(Exception):
    """Something the user can put right; its text is the whole message, without a traceback."""


def whole_number(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Make a `type` for argparse that takes whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.lstrip('-').isdigit() else None
        if number is None or not low <= number <= high:
            upper = f' to {high}' if high < 2**63 - 1 else ' on'
            raise argparse.ArgumentTypeError(f'must be a whole number from {low}{upper}, not {text!r}')
        return number

    return parse
