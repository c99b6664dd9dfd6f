"""Encoded images, from a folder with one sub-folder per class or from bytes in a table."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from privkd.data.source import MAX_VALUES, RawSet, Source, make_source
from privkd.errors import DataError, one_line

Encoded: TypeAlias = bytes | Path

# Raster formats that Pillow decodes by itself; others (EPS) would start an external program.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_GREY = {"1", "L"}
_COLOUR = {"RGB", "RGBA", "RGBX", "P", "PA", "LA", "CMYK", "YCbCr", "HSV", "LAB"}


def load_image_folder(folder: Path, name: str) -> Source:
    """A folder whose sub-folders are the classes and hold the images.

    Files without an image's suffix, and hidden ones, are passed over.

    Raises:
        DataError: no class folders, an empty one, or an image that is damaged or of another size.
    """
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        members = {path: _image_files(path) for path in classes}
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({one_line(error)}); make it readable") from error
    if not classes:
        raise DataError(
            f"{folder}: no class folders and no IDX files; put images in one sub-folder per class"
        )
    for path, files in members.items():
        if not files:
            raise DataError(f"{path}: holds no images; add some or remove the folder")
    files = [file for path in classes for file in members[path]]
    labels = np.array([path.name for path in classes for _ in members[path]])
    pixels, colour = decode_images(files, map(str, files))
    # A name without its folder, which is the label.
    return make_source(name, RawSet(pixels, labels, colour), names=tuple(file.name for file in files))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def decode_images(
    images: Sequence[Encoded], names: Iterable[str]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels ``[image, channel, height, width]``, and which images are coloured ``[image]``.

    There is one channel where every image is grey, else three.

    Args:
        images: encoded images, in memory or in files, all of one size.
        names: what messages call each of them.

    Raises:
        DataError: an image is damaged, of another size than the first, or not of 8 bits per channel.
    """
    pixels: list[NDArray[np.uint8]] = []
    for image, name in zip(images, names, strict=True):
        expected = pixels[0].shape[:2] if pixels else None
        pixels.append(_decode(image, name, expected, len(images)))
    coloured = np.array([image.ndim == 3 for image in pixels])
    if not coloured.any():
        return np.stack(pixels)[:, None], coloured
    height, width = pixels[0].shape[:2]
    colour = np.empty((len(pixels), 3, height, width), dtype=np.uint8)
    for slot, decoded in zip(colour, pixels, strict=True):
        slot[...] = decoded if decoded.ndim == 2 else decoded.transpose(2, 0, 1)
    return colour, coloured


def _decode(image: Encoded, name: str, expected: tuple[int, ...] | None, count: int) -> NDArray[np.uint8]:
    """One image as ``[height, width]`` where grey, else ``[height, width, 3]``."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_FORMATS) as opened:
            size = (opened.height, opened.width)
            if expected is not None and size != expected:
                raise DataError(
                    f"{name}: {_size(size)} pixels, but the first image has {_size(expected)}; resize it"
                )
            if 3 * size[0] * size[1] * count > MAX_VALUES:
                raise DataError(f"{name}: {count} images of {_size(size)} pixels are too many; resize them")
            if opened.mode not in _GREY | _COLOUR:
                raise DataError(
                    f"{name}: pixel mode {opened.mode} is not 8 bits per channel; convert the image"
                )
            return np.asarray(opened.convert("L" if opened.mode in _GREY else "RGB"))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes.
        raise DataError(f"{name}: not a readable image ({one_line(error)}); replace or remove it") from error


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"
