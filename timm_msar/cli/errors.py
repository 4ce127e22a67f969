"""The error that the command line shows as one sentence, and the one place that turns other errors into it."""

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """Something the user can put right; its text is the whole message, without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


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
    except (OSError, ValueError, *others) as error:  # type: ignore[misc]
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CommandError(f'{failure}: {reason}{f"; {advice}" if advice else ""}') from error
