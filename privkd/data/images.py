"""Encoded images, from a folder with one sub-folder per class or from bytes in a table."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from privkd.data.columns import UNLABELLED
from privkd.data.dataset import MAX_VALUES, RawSet, Source, make_source
from privkd.data.folders import class_files, files_below, splits_of
from privkd.errors import DataError, one_line

Encoded: TypeAlias = bytes | Path

# Raster formats that Pillow decodes by itself; others (EPS) would start an external program.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_GREY = {"1", "L", "LA"}
_COLOUR = {"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"}
_GROUND = (255, 255, 255, 255)


def load_image_folder(folder: Path, name: str, image_size: int | None = None) -> Source:
    """A folder whose sub-folders are the classes and hold the images.

    Sub-folders called ``train`` and ``test`` (or ``val``) are splits, which hold the class folders. Files
    without an image's suffix, and hidden ones, are passed over. For ``image_size`` see `decode_images`.

    Raises:
        DataError: no class folders, an empty one, splits without class folders, or an image that is damaged
            or of another size.
    """
    splits = splits_of(folder, "images")
    records, names = _read_classes(splits.train, image_size)
    test = None if splits.test is None else _read_classes(splits.test, image_size)[0]
    return _source_of(name, records, test, names, splits.said)


def load_images(folder: Path, name: str, image_size: int | None = None) -> Source:
    """The images in a folder and in its sub-folders, without labels.

    Raises:
        DataError: there are none, or an image is damaged or of another size; or the sub-folders are splits.
    """
    files = files_below(folder, IMAGE_SUFFIXES, "images")
    pixels, colour = decode_images(files, map(str, files), image_size)
    records = RawSet(pixels, pixels, colour)
    return make_source(name, records, taken={"label": UNLABELLED}, labelled=False)


def _source_of(
    name: str,
    records: RawSet,
    test: RawSet | None,
    names: tuple[str, ...],
    splits: Mapping[str, str],
) -> Source:
    taken = {"label": "each image's folder", **splits}
    classes = {*records.labels.tolist(), *(() if test is None else test.labels.tolist())}
    # A name without its folder, which is the label.
    return make_source(name, records, test, names=names, classes=classes, taken=taken)


def _read_classes(folder: Path, image_size: int | None) -> tuple[RawSet, tuple[str, ...]]:
    """The images of all class folders, and their files' names."""
    files, labels = class_files(folder, IMAGE_SUFFIXES, "images")
    pixels, colour = decode_images(files, map(str, files), image_size)
    return RawSet(pixels, np.array(labels), colour), tuple(file.name for file in files)


def decode_images(
    images: Sequence[Encoded], names: Iterable[str], image_size: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels ``[image, channel, height, width]``, and which images are coloured ``[image]``.

    Images are turned upright by their EXIF orientation, and lie on white where they are transparent. There is
    one channel where every image is grey, else three.

    Args:
        images: encoded images, in memory or in files, all of one size unless ``image_size`` is given.
        names: what messages call each of them.
        image_size: side of a square that each is brought to: see `_squared`.

    Raises:
        DataError: an image is damaged, of another size than the first, or not of 8 bits per channel.
    """
    pixels: list[NDArray[np.uint8]] = []
    for image, name in zip(images, names, strict=True):
        expected = pixels[0].shape[:2] if pixels else None
        pixels.append(_decode(image, name, expected, len(images), image_size))
    coloured = np.array([image.ndim == 3 for image in pixels])
    if not coloured.any():
        return np.stack(pixels)[:, None], coloured
    height, width = pixels[0].shape[:2]
    colour = np.empty((len(pixels), 3, height, width), dtype=np.uint8)
    for slot, decoded in zip(colour, pixels, strict=True):
        slot[...] = decoded if decoded.ndim == 2 else decoded.transpose(2, 0, 1)
    return colour, coloured


def _decode(
    image: Encoded, name: str, expected: tuple[int, ...] | None, count: int, side: int | None
) -> NDArray[np.uint8]:
    """One image as ``[height, width]`` where grey, else ``[height, width, 3]``."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_FORMATS) as opened:
            size = (opened.height, opened.width)
            kept = size if side is None else (side, side)
            if 3 * max(math.prod(size), math.prod(kept) * count) > MAX_VALUES:
                raise DataError(f"{name}: {count} images of {_size(kept)} pixels are too many; resize them")
            if opened.mode not in _GREY | _COLOUR:
                raise DataError(
                    f"{name}: pixel mode {opened.mode} is not 8 bits per channel; convert the image"
                )
            grey = opened.mode in _GREY
            upright = _upright(opened)
            size = (upright.height, upright.width)
            if expected is not None and size != expected and side is None:
                raise DataError(
                    f"{name}: {_size(size)} pixels, but the first image has {_size(expected)}; resize it, or "
                    "all of them with --image-size N"
                )
            shown = _on_white(upright).convert("L" if grey else "RGB")
            return np.asarray(shown if side is None else _squared(shown, side))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes.
        raise DataError(f"{name}: not a readable image ({one_line(error)}); replace or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    """As a viewer shows it: turned by its EXIF orientation, if that can be read."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises almost anything on damaged EXIF, of an image that is whole.
        return image


def _on_white(image: Image.Image) -> Image.Image:
    """As a viewer shows it: what is transparent lets a white ground through."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _GROUND), image)


def _squared(image: Image.Image, side: int) -> Image.Image:
    """The square in its middle, brought to ``side`` pixels: what is longer is cut at both ends, not squeezed.

    Bicubic, over as many pixels as one stands for, so that nothing aliases.
    """
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"
