"""The error that the command line shows as one sentence, and what it takes over from others."""


class CommandError(Exception):
    """Something the user can put right; its text is the whole message, without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
