"""Images of mixed sizes become squares of one: cut in the middle, never squeezed, and without aliasing."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from privkd.config import DataConfig
from privkd.data import build_scenario, images, load
from privkd.errors import ConfigError, DataError


def folder(path: Path, *pictures: Any, form: str = "png", **more: Any) -> str:
    """A folder of one class for each picture."""
    for number, pixels in enumerate(pictures):
        place = path / str(number)
        place.mkdir(parents=True)
        Image.fromarray(pixels).save(place / f"a.{form}", **more)
    return str(path)


def squares(path: str, side: int) -> Any:
    return load(DataConfig(source=path, image_size=side)).records.inputs


def bands(length: int, width: int) -> Any:
    """Black, white and black thirds, side by side."""
    row = np.repeat([0, 255, 0], length // 3).astype(np.uint8)
    return np.tile(row, (width, 1))


class TestSquares:
    def test_are_cut_in_the_middle(self, tmp_path: Path) -> None:
        path = folder(tmp_path, bands(12, 4), bands(24, 8).T.copy())
        found = squares(path, 4)
        assert found.shape == (2, 1, 4, 4)
        assert found.min() > 200, "a squeezed or padded picture would have black edges"

    def test_are_turned_upright_before(self, tmp_path: Path) -> None:
        pixels = np.zeros((8, 8), dtype=np.uint8)
        pixels[:4] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn clockwise: what was above comes to the right
        path = folder(tmp_path, pixels, form="jpg", exif=exif, quality=100)
        (tmp_path / "1").mkdir()
        Image.fromarray(pixels).save(tmp_path / "1" / "b.png")
        found = squares(path, 2)
        assert (found[0, 0] > 127).tolist() == [[False, True], [False, True]]
        assert (found[1, 0] > 127).tolist() == [[True, True], [False, False]]

    def test_do_not_alias(self, tmp_path: Path) -> None:
        board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
        found = squares(folder(tmp_path, board, board), 8)
        assert np.abs(found.astype(int) - 127).max() <= 8

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(0, 255))
    def test_of_one_shade_keep_it(self, height: int, width: int, side: int, shade: int) -> None:
        buffer = io.BytesIO()
        Image.new("L", (width, height), shade).save(buffer, "PNG")
        pixels, coloured = images.decode_images([buffer.getvalue()], ["a"], side)
        assert pixels.shape == (1, 1, side, side)
        assert not coloured.any()
        assert (pixels == shade).all()

    def test_of_colours_and_greys(self, tmp_path: Path) -> None:
        red = np.zeros((5, 9, 3), dtype=np.uint8)
        red[..., 0] = 200
        found = squares(folder(tmp_path, red, np.full((7, 3), 9, dtype=np.uint8)), 6)
        assert found.shape == (2, 3, 6, 6)
        assert found[0].reshape(3, -1).mean(axis=1).tolist() == [200, 0, 0]
        assert (found[1] == 9).all()

    def test_in_parquet(self, tmp_path: Path) -> None:
        pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = []
        for pixels in (bands(12, 4), bands(9, 3)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue()})
        writer.write_table(pyarrow.table({"image": rows, "label": [0, 1]}), tmp_path / "a.parquet")
        found = squares(str(tmp_path / "a.parquet"), 3)
        assert found.shape == (2, 1, 3, 3)
        assert found.min() > 200

    def test_beside_the_data_too(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for name, count in (("own", 30), ("public", 20)):
            for number in range(count):
                place = tmp_path / name / str(number % 2)
                place.mkdir(parents=True, exist_ok=True)
                sides = rng.integers(4, 20, 2)
                Image.fromarray(rng.integers(0, 255, sides, dtype=np.uint8)).save(place / f"{number}.png")
        config = DataConfig(
            source=str(tmp_path / "own"), public=str(tmp_path / "public"), image_size=6, devices=2,
            device_test_records=2,
        )  # fmt: skip
        found = build_scenario(config, 0)
        assert found.input_shape == (1, 6, 6)
        assert found.taken["image size"].startswith("6 x 6: ")


class TestRefused:
    def test_mixed_sizes_name_the_flag(self, tmp_path: Path) -> None:
        path = folder(tmp_path, bands(12, 4), bands(9, 3))
        with pytest.raises(DataError, match=r"9x3 pixels, but the first image has 12x4; .*--image-size N"):
            load(DataConfig(source=path))

    def test_what_holds_no_image_files(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((4, 5, 5), np.uint8), y=np.arange(4) % 2)
        for source in (str(tmp_path / "a.npz"), "digits"):
            with pytest.raises(ConfigError, match=r"data\.image_size=8: .* no image files"):
                load(DataConfig(source=source, image_size=8))

    def test_more_than_memory_holds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder(tmp_path, bands(12, 4), bands(24, 8))
        monkeypatch.setattr(images, "MAX_VALUES", 3 * 24 * 8)
        assert squares(path, 4).shape == (2, 1, 4, 4)
        with pytest.raises(DataError, match="2 images of 20x20 pixels are too many"):
            squares(path, 20)
        monkeypatch.setattr(images, "MAX_VALUES", 3 * 24 * 8 - 1)
        with pytest.raises(DataError, match="too many"):
            squares(path, 4)
