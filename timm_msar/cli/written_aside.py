"""Write a file or folder under another name, and give it its own name only when it is whole."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import CommandError

ASIDE = '.timm-msar.'


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    for lock in path.parent.glob(f'{ASIDE}*.lock'):  # of a process that was killed, or still writes
        with suppress(OSError, Timeout), _cleared(lock.with_suffix('')):
            pass
    aside = path.parent / f'{ASIDE}{secrets.token_hex(8)}'
    old, new = aside / 'old' / path.name, aside / path.name
    with _cleared(aside):
        old.parent.mkdir(parents=True)
        yield new
        try:
            if new.is_dir() and path.is_dir():
                path.rename(old)
            new.replace(path)
        except OSError as error:
            kept = path.parent / aside.name.removeprefix('.')
            new.rename(kept)
            raise CommandError(f'cannot replace {path} ({error.strerror}); the new one is kept as {kept}') from error


@contextmanager
def _cleared(aside: Path) -> Iterator[None]:
    """Hold the lock of a hidden folder, which its process lets go of even when it is killed, and clear it at the end.

    The lock is held before there is a folder, so whoever finds a folder and gets its lock may clear it.
    """
    lock = Path(f'{aside}.lock')
    with FileLock(lock, blocking=False):
        try:
            yield
        finally:
            for old in aside.glob('old/*'):  # put back what was moved away, unless something took its place
                if not os.path.lexists(aside.parent / old.name):
                    old.rename(aside.parent / old.name)
            shutil.rmtree(aside, ignore_errors=True)
            if not aside.exists():
                with suppress(OSError):  # Windows deletes no file that is open; filelock does it there
                    lock.unlink()
