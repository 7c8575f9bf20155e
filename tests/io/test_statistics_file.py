"""Statistics come back as they were saved, and what is no statistics file is named."""

from __future__ import annotations

import json

import pytest

from everysat.io.statistics import load, save

ENTRY = {
    "sensor": "sentinel-2-l2a", "gsd_m": 10.0, "bands": ["B02", "B04"], "unit": ["reflectance"] * 2,
    "mean": [0.1, 0.2], "std": [0.01, 0.02], "count": [7, 6],
}  # fmt: skip


def test_round_trip(tmp_path):
    path = save(tmp_path / "a.json", {"s2": ENTRY}, {"files": ["x.tif"]})
    assert load(path) == load(json.loads(path.read_text())) == {"s2": ENTRY}
    assert json.loads(path.read_text())["source"] == {"files": ["x.tif"]}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.1]}, "lists of different lengths"),
        ({"mean": [0.1, float("nan")]}, "not finite"),
        ({"std": [0.1, 0.0]}, "not positive"),
    ],
)
def test_numbers_that_cannot_be_are_neither_saved_nor_loaded(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"layer 's2' has .*{message}"):
        save(tmp_path / "a.json", {"s2": {**ENTRY, **change}}, {})
    assert not list(tmp_path.iterdir())
    path = save(tmp_path / "a.json", {"s2": ENTRY}, {})
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers": {"s2": {**ENTRY, **change}}}))
    with pytest.raises(ValueError, match=rf"a\.json: layer 's2' has .*{message}"):
        load(path)


def test_what_is_no_statistics_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no statistics file .*none\.json; make one with: everysat stats"):
        load(tmp_path / "none.json")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{")
    with pytest.raises(ValueError, match=r"wrong\.json is no valid JSON"):
        load(wrong)
    wrong.write_text('{"format": "everysat-weights/1"}')
    with pytest.raises(ValueError, match=r"wrong\.json is no statistics file"):
        load(wrong)
    with pytest.raises(ValueError, match="layer 's2' lacks std, count"):
        load({"format": "everysat-statistics/1", "layers": {"s2": {k: ENTRY[k] for k in list(ENTRY)[:5]}}})
