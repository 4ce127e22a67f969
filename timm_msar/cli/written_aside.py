"""Write a file or folder under another name, and give it its own name only when it is whole."""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give the name of a file or folder beside `path` to write; it takes the place of `path` when the block ends.

    What stood at `path` is kept until then. If the block raises, or the new one cannot be put in place, `path` is as it
    was. Where only the old folder cannot be deleted afterwards, the new one stays. What killed processes left beside it
    is removed.

    Args:
        path: The final name. Folders in which it lies are made.

    Yields:
        A name that does not exist yet, on the same file system, of this process alone.

    Raises:
        OSError: It cannot be written or renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(path)
    aside = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    old = path.with_name(f'.{path.name}.{os.getpid()}.old')
    try:
        yield aside
        if not aside.is_dir():
            aside.replace(path)  # replaces a file in one step
            return
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        for leftover in (aside, old):
            _remove(leftover)


def _clear_up(path: Path) -> None:
    """Remove what processes that were killed left of `path`, and put back what the last one was about to replace."""
    for leftover in path.parent.glob(f'.{glob.escape(path.name)}.*'):
        match = re.fullmatch(r'(\d+)\.(partial|old)', leftover.name.removeprefix(f'.{path.name}.'))
        if match is None or _is_running(int(match[1])):
            continue
        if match[2] == 'old' and not path.exists():
            leftover.rename(path)
        else:
            _remove(leftover)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process has so great a number
        return True
    return True


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()
