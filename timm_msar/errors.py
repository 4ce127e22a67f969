"""The error that the command line shows as one sentence."""


class CommandError(Exception):
    """Something the user can put right; its text is the whole message, without a traceback."""
