"""Tables that R saved: columns as they were, and files that are none."""

from __future__ import annotations

import numpy as np
import pytest

from everysat.io import rda


@pytest.fixture
def path(tmp_path):
    rows = [{"Index": np.array([11213.0, 11229.0]), "NDVI": np.array([0.1, v])} for v in (0.2, 0.3)]
    rda.write(tmp_path / "a.rda", samples={"x": np.array([1.5, 2.5]), "label": np.array(["a", "b"]), "series": rows})
    return tmp_path / "a.rda"


def test_columns_come_back_as_they_were_written(path):
    held = rda.tables(path)["samples"]
    assert list(held) == ["x", "label", "series"]
    assert held["x"].tolist() == [1.5, 2.5]
    assert held["label"].tolist() == ["a", "b"]
    assert [float(row["NDVI"][1]) for row in held["series"]] == [0.2, 0.3]


@pytest.mark.parametrize("length", [0, 5, 60, -9])
def test_a_truncated_file_is_named(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(OSError, match=r"a\.rda cannot be read"):
        rda.tables(path)


def test_what_is_not_of_r_or_not_there_is_named(path):
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(OSError, match=r"a\.rda cannot be read.*does not begin as files of R do"):
        rda.tables(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.rda is missing"):
        rda.tables(path)


def test_real_data_frames_are_read_without_a_warning(data_dir):
    """Nested tibbles with dates: their days are of the MODIS product, whose year begins anew every January."""
    file = data_dir / "modis_ts" / "sits_rda" / "point_mt_6bands.rda"
    if not file.is_file():
        pytest.skip("needs modis_ts")
    held = rda.tables(file)["point_mt_6bands"]
    assert float(held["longitude"][0]) == pytest.approx(-55.50563)
    days = np.asarray(held["time_series"][0]["Index"]).astype("datetime64[D]")
    assert (len(days), str(days[0])) == (204, "2000-09-13")
