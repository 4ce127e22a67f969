"""Files that a person names: read only what is a file, and write all of it or nothing."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .errors import CommandError


def regular_file(path: Path) -> Path:
    """Return `path` if it is a file. A fifo would be waited for without end."""
    if not path.is_file():
        raise CommandError(f'{path} is not a file' if os.path.lexists(path) else f'there is no file {path}')
    return path


def open_image(path: Path) -> Image.Image:
    """Open an image that timm can convert: its values have 8 bits."""
    image = Image.open(regular_file(path))
    if image.mode[0] in 'IF':  # convert() cuts off what is above 255
        raise CommandError('its values have more than 8 bits, so timm would make it white')
    return image


@contextmanager
def written_whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """Give a name to write a file or a folder under. It becomes `path` when the block ends without an error.

    Until then it is in a hidden folder beside `path`, which only a killed process leaves behind. What is replaced is a
    file, or for a new folder an empty one that nobody is in.

    Args:
        path: The final name.
        folder: Make a folder, to write into.
    """
    path = Path(os.path.realpath(path))
    empty = path.is_dir() and not any(path.iterdir())
    taken = os.path.lexists(path) and not empty if folder else path.is_dir()
    if taken or path == Path.cwd():
        raise CommandError(f'{path} exists already; give another name')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.timm-msar-', dir=path.parent, ignore_cleanup_errors=True) as aside:
        new = Path(aside) / path.name
        if folder:
            new.mkdir()
        yield new
        os.replace(new, path)
