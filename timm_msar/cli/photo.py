"""Read an image file of any kind as a person sees it: turned by its EXIF tag, over white, from 8 or 16 bits."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import CommandError, first_line

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
MAX_ASPECT = 100  # what is longer becomes millions of pixels long when its short side is resized to 224


def read_photo(path: Path, channels: int) -> Image.Image:
    """Read an image, the first one of an animation.

    Args:
        path: The file.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.

    Raises:
        CommandError: The file is missing or broken, is no image, or is one that cannot be used.
    """
    try:
        if not path.is_file():
            raise CommandError('it is not a file' if path.exists() else 'there is no such file')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # a photo of 100 megapixels is none
            with Image.open(path) as image:
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise CommandError(f'with {image.width}×{image.height} pixels it is too narrow to crop')
                return _eight_bits(ImageOps.exif_transpose(image), channels)
    except UnidentifiedImageError as error:
        raise CommandError(f'cannot read {path}: it is not an image') from error
    except Exception as error:  # Pillow has no common class for what is wrong in a broken file
        raise CommandError(f'cannot read {path}: {first_line(error)}') from error


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith('I'):  # convert() would make white of everything above 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise CommandError('it has 32 bits a pixel; save it with 8 or 16')
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == 'F':
        raise CommandError('its pixels are floating-point numbers; save it with 8 or 16 bits')
    if channels != 4 and ('A' in image.getbands() or 'transparency' in image.info):  # hidden pixels have any colour
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert(MODES[channels])
