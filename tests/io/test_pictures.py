"""Pictures of 8 bits: whole, or an error that names them."""

from __future__ import annotations

import numpy as np
import pytest

from everysat.io import archives, arrays, pictures


@pytest.fixture
def values():
    return np.kron(np.random.default_rng(0).integers(0, 256, (3, 3, 4)), np.ones((1, 8, 8))).astype(np.uint8)


def test_a_png_comes_back_as_it_was_a_jpeg_nearly(tmp_path, values):
    archives.write_png(tmp_path / "a.png", values)
    pictures.write_jpeg(tmp_path / "a.jpg", values)
    assert np.array_equal(pictures.picture(tmp_path / "a.png"), values)
    near = pictures.picture(tmp_path / "a.jpg")
    assert near.shape == values.shape
    assert np.abs(near.astype(int) - values).mean() < 8


def test_a_fourth_channel_is_left_out(tmp_path, values):
    archives.write_png(tmp_path / "a.png", np.concatenate([values, values[:1]]))
    assert np.array_equal(pictures.picture(tmp_path / "a.png"), values)
    assert np.array_equal(pictures.picture(tmp_path / "a.png", 1), values[:1])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_picture_is_named(tmp_path, values, name, share):
    noise = np.random.default_rng(1).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    (pictures.write_jpeg if name == "a.jpg" else archives.write_png)(tmp_path / name, noise)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(OSError, match=rf"{name[0]}\.{name[2:]} cannot be read"):
        pictures.picture(tmp_path / name)


def test_what_is_no_colour_picture_is_refused(tmp_path, values):
    archives.write_png(tmp_path / "grey.png", values[:1])
    with pytest.raises(ValueError, match=r"grey\.png holds uint8 of \(1, 24, 32\), expected 8 bits in 3 bands"):
        pictures.picture(tmp_path / "grey.png")
    arrays.write_tiff(tmp_path / "deep.tif", values.astype(np.uint16))
    with pytest.raises(ValueError, match=r"deep\.tif holds uint16"):
        pictures.picture(tmp_path / "deep.tif")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg is missing"):
        pictures.picture(tmp_path / "none.jpg")
