"""Start the command `timm-msar`. This is no part of the package, so that it runs before PyTorch is imported."""

import io
import os
import signal
import sys


def main() -> int:
    """Import and run the command; return its exit code."""
    # Importing PyTorch takes seconds. Until then nothing needs to be tidied up, so Ctrl-C may end the process at once.
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from timm_msar.cli import main as command

    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # tidies up, as Ctrl-C does
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        try:
            return command()
        finally:
            print(end='', flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try to print the rest at its end
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            return 141
        print(f'timm-msar: error: cannot print ({error.strerror})', file=sys.stderr)
        return 1
