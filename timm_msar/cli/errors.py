"""The error that the command line shows as one sentence, and the one place that turns other errors into it."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

# What yaml.safe_load raises besides ValueError: for `!!bool maybe`, `!!int`, and brackets a thousand deep.
YAML_ERRORS = yaml.YAMLError, KeyError, AttributeError, RecursionError


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


def refuse_special(path: Path) -> None:
    """Raise OSError for what is there and no file: a folder, or a fifo, which would be waited for without end."""
    if path.exists() and not path.is_file():
        raise OSError(0, 'it is not a file')


def first_line(error: BaseException) -> str:
    """What is wrong, in one line: without the number of an OSError, with the line of a YAML file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f'{error.problem} in line {error.problem_mark.line + 1}'
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return ' '.join(lines[:2]) if lines[0].endswith(':') else lines[0]  # load_state_dict says what after a colon


@contextmanager
def one_sentence(failure: str, *others: type[Exception], advice: str = '') -> Iterator[None]:
    """Raise CommandError 'FAILURE: REASON; ADVICE' in place of an error of the file system or of a bad value.

    Args:
        failure: What cannot be done, with the name of the file: 'cannot read runs/summary.csv'.
        *others: Further classes of errors that mean the same here.
        advice: What the user can do about it.

    Raises:
        CommandError: In place of OSError (no such file, no permission, disk full, a name that is too long), ValueError
            (a NUL in a path, bytes that are not UTF-8) and the other classes.
    """
    try:
        yield
    except BrokenPipeError:  # who reads what is printed has gone, as `| head` does
        raise
    except (OSError, ValueError, *others) as error:  # type: ignore[misc]
        raise CommandError(f'{failure}: {first_line(error)}{f"; {advice}" if advice else ""}') from error
