"""Write a file or folder under another name, and give it its own name only when it is whole."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CommandError

ASIDE = f'.timm-msar.{socket.gethostname()}.'


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a name to write a file or folder under; it takes the place of `path` when the block ends.

    Both are kept in a hidden folder beside `path` until then. If the block raises, `path` is as it was. It is so, too,
    where the process is killed, at the latest when something is written beside `path` again. What cannot be deleted of
    an old folder stays in the hidden one.

    Args:
        path: The final name. Folders in which it lies are made; where it is a link, what it points to is replaced.

    Yields:
        A name that does not exist yet, on the same file system, of this call alone.

    Raises:
        OSError: It cannot be written.
        CommandError: It is whole but cannot be put in place. It is kept then; the text says where.
    """
    path = Path(os.path.realpath(path))
    with suppress(FileExistsError):  # where it is a file, making `aside` fails
        path.parent.mkdir(parents=True)
    _clear_after_the_dead(path.parent)
    aside = Path(tempfile.mkdtemp(prefix=f'{ASIDE}{os.getpid()}.', dir=path.parent))
    try:
        old, new = aside / 'old' / path.name, aside / path.name
        old.parent.mkdir()
        yield new
        try:
            if new.is_dir() and path.is_dir():
                path.rename(old)
            new.replace(path)
        except OSError as error:
            kept = path.parent / aside.name.removeprefix('.')
            new.rename(kept)
            raise CommandError(f'cannot replace {path} ({error.strerror}); the new one is kept as {kept}') from error
    finally:
        _clear(aside)


def _clear(aside: Path) -> None:
    """Put back what was moved away, unless something took its place, and delete the rest."""
    for old in aside.glob('old/*'):
        if not os.path.lexists(aside.parent / old.name):
            old.rename(aside.parent / old.name)
    shutil.rmtree(aside, ignore_errors=True)


def _clear_after_the_dead(folder: Path) -> None:
    """Clear what processes of this machine left in `folder` when they were killed."""
    for aside in folder.glob(f'{ASIDE}*.*'):
        if not _is_running(aside.name.removeprefix(ASIDE).partition('.')[0]):
            _clear(aside)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True
