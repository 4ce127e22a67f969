"""Whole numbers on the command line, with a range."""

import argparse
from collections.abc import Callable


def whole_number(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Make a `type` for argparse that takes whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            upper = f' to {high}' if high < 2**63 - 1 else ' on'
            raise argparse.ArgumentTypeError(f'must be a whole number from {low}{upper}, not {text!r}')
        return number

    return parse
