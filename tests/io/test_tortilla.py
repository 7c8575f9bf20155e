"""Files within a file: found, read alone, and errors that name them."""

from __future__ import annotations

import io
import struct

import numpy as np
import pandas as pd
import pytest

from everysat.io import arrays, tortilla


def parquet(**columns):
    held = io.BytesIO()
    pd.DataFrame(columns).to_parquet(held, index=False)
    return held.getvalue()


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 9, (2, 5, 6)).astype(np.uint16)


@pytest.fixture
def path(tmp_path, image):
    arrays.write_hdf5(tmp_path / "x.h5", {"data": image})
    inner = [
        ({"tortilla:id": "picture", "kind": "tiff"}, tortilla.tiff_of(image, "EPSG:32632", (500000, 5e6), 10)),
        ({"tortilla:id": "series", "kind": "hdf5"}, (tmp_path / "x.h5").read_bytes()),
        ({"tortilla:id": "rows", "kind": "parquet"}, parquet(x=[1, 2])),
    ]
    outer = [({"tortilla:id": name, "number": i}, tortilla.packed(inner)) for i, name in enumerate("ab")]
    (tmp_path / "set.tortilla").write_bytes(tortilla.packed(outer))
    return tmp_path / "set.tortilla"


def test_members_of_members_are_read_alone(path, image):
    samples = tortilla.members(path)
    assert [(s.name, s.facts["number"]) for s in samples] == [("a", 0), ("b", 1)]
    for sample in samples:
        picture, series, rows = sample.members()
        assert str(picture) == f"{path}:{sample.name}/picture"
        values, box = picture.tiff()
        assert np.array_equal(values, image)
        assert (str(box.crs), box.affine.f) == ("EPSG:32632", 5e6)
        assert np.array_equal(series.hdf5(), image)
        assert rows.frame()["x"].tolist() == [1, 2]


def test_bytes_and_files_give_the_same(path):
    in_memory = list(tortilla.unpacked(path.read_bytes()))
    assert [content for _, content in in_memory] == [member.content() for member in tortilla.members(path)]
    assert [row["tortilla:id"] for row, _ in in_memory] == ["a", "b"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(OSError, match=r"set\.tortilla cannot be read"):
        tortilla.members(path)


def test_what_is_none_is_named(path):
    whole = path.read_bytes()
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(OSError, match=r"begins with b'PK.*not with b'#y'"):
        tortilla.members(path)
    start, length = struct.unpack("<qq", whole[2:18])
    path.write_bytes(whole[:start] + b"?" * length)
    with pytest.raises(OSError, match=r"set\.tortilla cannot be read"):
        tortilla.members(path)
    with pytest.raises(FileNotFoundError, match=r"other\.tortilla is missing"):
        tortilla.members(path.with_name("other.tortilla"))


def test_a_member_beyond_the_end_or_of_another_kind_is_named(path):
    facts = {"tortilla:id": ["far"], "tortilla:offset": [200], "tortilla:length": [10**6]}
    table = parquet(**facts)
    path.write_bytes((b"#y" + struct.pack("<qq", 200, len(table))).ljust(200, b"\0") + table)
    with pytest.raises(OSError, match=r"far lies from 200 to 1000200 of"):
        tortilla.members(path)
    path.write_bytes(tortilla.packed([({"tortilla:id": "text"}, b"no picture at all")]))
    member = tortilla.members(path)[0]
    for read in (member.tiff, member.hdf5, member.frame):
        with pytest.raises(OSError, match=r"set\.tortilla:text cannot be read"):
            read()
    path.write_bytes(path.read_bytes()[:210])
    with pytest.raises(OSError, match="text ends 7 bytes too early"):
        member.content()


def test_a_table_without_positions_is_named(path):
    table = parquet(**{"tortilla:id": ["a"]})
    path.write_bytes((b"#y" + struct.pack("<qq", 200, len(table))).ljust(200, b"\0") + table)
    with pytest.raises(OSError, match=r"has no column 'tortilla:length'"):
        tortilla.members(path)
