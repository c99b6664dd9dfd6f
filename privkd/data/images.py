"""Encoded images, from a folder with one sub-folder per class or from bytes in a table."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from privkd.data.dataset import MAX_VALUES, RawSet, Source, make_source
from privkd.errors import DataError, one_line

Encoded: TypeAlias = bytes | Path

# Raster formats that Pillow decodes by itself; others (EPS) would start an external program.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_GREY = {"1", "L", "LA"}
_COLOUR = {"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"}
_TRAIN, _TEST = ("train", "training"), ("test", "testing")
_HELD_OUT = ("val", "valid", "validation", "dev")
"""Names of folders that are splits: of records, of a test, and of what tests where there is none."""
_GROUND = (255, 255, 255, 255)


def load_image_folder(folder: Path, name: str) -> Source:
    """A folder whose sub-folders are the classes and hold the images.

    Sub-folders called ``train`` and ``test`` (or ``val``) are splits, which hold the class folders. Files
    without an image's suffix, and hidden ones, are passed over.

    Raises:
        DataError: no class folders, an empty one, splits without class folders, or an image that is damaged
            or of another size.
    """
    splits = _splits(_sub_folders(folder))
    if splits is None:
        records, names = _read_classes(folder)
        return _source_of(name, records, None, names)
    records, names = _read_classes(splits.train)
    test = None if splits.test is None else _read_classes(splits.test)[0]
    return _source_of(name, records, test, names, splits.said)


def _source_of(
    name: str,
    records: RawSet,
    test: RawSet | None,
    names: tuple[str, ...],
    splits: Mapping[str, str] | None = None,
) -> Source:
    taken = {"label": "each image's folder", **(splits or {})}
    classes = {*records.labels.tolist(), *(() if test is None else test.labels.tolist())}
    # A name without its folder, which is the label.
    return make_source(name, records, test, names=names, classes=classes, taken=taken)


@dataclass(frozen=True)
class _Splits:
    """The folders of splits: what is said of them is under ``said``."""

    train: Path
    test: Path | None
    said: Mapping[str, str]


def _splits(folders: Sequence[Path]) -> _Splits | None:
    """``folders`` as splits, where their names say that they are.

    Raises:
        DataError: some are called as splits are, and some are not.
    """
    by_name = {path.name.lower(): path for path in folders}
    trains, tests, held = (
        [by_name[name] for name in names if name in by_name] for names in (_TRAIN, _TEST, _HELD_OUT)
    )
    if len(trains) != 1 or not tests + held:
        return None
    root = trains[0].parent
    if len(trains + tests + held) < len(folders):
        other = next(path.name for path in folders if path not in trains + tests + held)
        raise DataError(
            f"{root}: {trains[0].name} and {(tests + held)[0].name} are called as splits are, {other} is "
            "not; leave only splits or only classes in it"
        )
    if len(tests) > 1 or (not tests and len(held) > 1):
        raise DataError(f"{root}: two folders could be the test split; remove one")
    test = (tests + held)[0]
    for split in (trains[0], test):
        if not _sub_folders(split):
            raise DataError(
                f"{split}: a split, so its images belong in one sub-folder per class; there is none"
            )
    said = {"test split": f"folder {test.name!r}"}
    passed_over = [path.name for path in held if path != test]
    return _Splits(
        trains[0], test, said | ({"left out": ", ".join(map(repr, passed_over))} if passed_over else {})
    )


def _read_classes(folder: Path) -> tuple[RawSet, tuple[str, ...]]:
    """The images of all class folders, and their files' names."""
    classes = _sub_folders(folder)
    if not classes:
        raise DataError(
            f"{folder}: no class folders and no IDX files; put images in one sub-folder per class"
        )
    members = {path: _image_files(path) for path in classes}
    for path, files in members.items():
        if not files:
            raise DataError(f"{path}: holds no images; add some or remove the folder")
    files = [file for path in classes for file in members[path]]
    labels = np.array([path.name for path in classes for _ in members[path]])
    pixels, colour = decode_images(files, map(str, files))
    return RawSet(pixels, labels, colour), tuple(file.name for file in files)


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in _listed(folder) if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in _listed(folder)
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({one_line(error)}); make it readable") from error


def decode_images(
    images: Sequence[Encoded], names: Iterable[str]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels ``[image, channel, height, width]``, and which images are coloured ``[image]``.

    Images are turned upright by their EXIF orientation, and lie on white where they are transparent. There is
    one channel where every image is grey, else three.

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
            if 3 * size[0] * size[1] * count > MAX_VALUES:
                raise DataError(f"{name}: {count} images of {_size(size)} pixels are too many; resize them")
            if opened.mode not in _GREY | _COLOUR:
                raise DataError(
                    f"{name}: pixel mode {opened.mode} is not 8 bits per channel; convert the image"
                )
            grey = opened.mode in _GREY
            upright = _upright(opened)
            size = (upright.height, upright.width)
            if expected is not None and size != expected:
                raise DataError(
                    f"{name}: {_size(size)} pixels, but the first image has {_size(expected)}; resize it"
                )
            return np.asarray(_on_white(upright).convert("L" if grey else "RGB"))
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


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"
