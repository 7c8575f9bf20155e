"""PASTIS: folds, no-data, the third channel of Sentinel-1, labels and ground, on real crops and on the synthetic set."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tortilla import members

from everysat.data import pastis
from everysat.data.pastis import build


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pastis")
    pastis.fake(folder, places=5)
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """Without SPOT, as PASTIS-R is."""
    return Path(shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("DATA_SPOT")))


def metadata(root: Path) -> dict:
    return json.loads((root / "metadata.geojson").read_text())


def test_folds_are_the_official_ones_and_can_be_chosen(root: Path) -> None:
    folds = {str(f["properties"]["ID_PATCH"]): f["properties"]["Fold"] for f in metadata(root)["features"]}
    for split, wanted in pastis.FOLDS.items():
        assert {folds[p.number] for p in build(root=root, split=split).patches} == set(wanted)
    assert [p.fold for p in build(root=root, fold=2).patches] == [2]
    assert {p.fold for p in build(root=root, fold=[1, 5]).patches} == {1, 5}
    with pytest.raises(ValueError, match="no place is in folds"):
        build(root=root, fold=7)


def test_values_are_those_of_the_files_and_no_data_is_invalid(root: Path) -> None:
    data = build(root=root, modalities=["s2", "s1-asc", "s1-des", "s1"])
    number, batch = data.patches[0].number, data[0]
    stored = np.load(root / "DATA_S2" / f"S2_{number}.npy")
    raster = batch.raster("s2")
    assert raster.valid.numpy().tolist() == (stored > -10000).tolist()
    np.testing.assert_allclose(raster.values.numpy(), np.where(stored > -10000, stored * 1e-4, 0), atol=1e-7)
    assert (raster.values < 0).any()  # dark surfaces stay
    for name, prefix in (("s1-asc", "S1A"), ("s1-des", "S1D"), ("s1", "S1A")):
        stored = np.load(root / f"DATA_{prefix}" / f"{prefix}_{number}.npy").astype(np.float32)
        assert not batch.raster(name).valid[0, :2, 0, 0].any()
        seen = batch.raster(name).valid
        assert batch.raster(name).values[seen].equal(torch.from_numpy(stored)[seen])


def test_real_crops(data_dir: Path, copy: Path) -> None:
    """Crops of 32 pixels and 3 dates; repeated to the size of a place."""
    number = build(root=copy, modalities=["s2"]).patches[0].number
    facts = metadata(copy)
    for name in ("S2", "S1A", "S1D"):
        facts["features"][0]["properties"][f"dates-{name}"] = {"0": 20180917, "1": 20180922, "2": 20180927}
    (copy / "metadata.geojson").write_text(json.dumps(facts))
    count = 0
    for _, sample in members((data_dir / "geobench2_mini" / "pastis.tortilla").read_bytes()):
        for row, member in members(sample):
            kind = {"s2": "DATA_S2/S2", "s1a": "DATA_S1A/S1A", "s1d": "DATA_S1D/S1D", "semantic": "ANNOTATIONS/TARGET"}
            if (name := kind.get(row["tortilla:id"])) is not None:
                values = h5py.File(io.BytesIO(member))["data"][()]
                np.save(copy / f"{name}_{number}.npy", np.tile(values, (*[1] * (values.ndim - 2), 4, 4)))
        batch = build(root=copy, modalities=["s2", "s1-asc", "s1-des"])[0]
        assert batch.raster("s2").valid.all()
        assert batch.raster("s2").values.min() > -0.1
        assert 0.03 < batch.raster("s2").values.mean() < 0.6
        for name in ("s1-asc", "s1-des"):
            vv, vh, ratio = (batch.raster(name).values[:, i] for i in range(3))
            assert -25 < vh.mean() < vv.mean() < -8
            torch.testing.assert_close(ratio, vv - vh, atol=0.02, rtol=0)  # stored with 16 bits
        assert batch.raster("label").valid.any()
        count += 1
    assert count >= 4


def test_the_third_channel_is_stored_or_the_quotient(root: Path) -> None:
    stored, quotient = (
        build(root=root, modalities=["s1-asc"], ratio=ratio)[0].raster("s1-asc") for ratio in ("stored", "quotient")
    )
    assert stored.values[:, :2].equal(quotient.values[:, :2])
    seen = quotient.valid.all(1)
    vv, vh, ratio = quotient.values.unbind(1)
    torch.testing.assert_close(ratio[seen], (vv / vh)[seen])
    torch.testing.assert_close(stored.values[:, 2][seen], (vv - vh)[seen], atol=0.02, rtol=0)


def test_void_is_not_labelled_unless_asked_for(root: Path) -> None:
    codes = np.load(root / "ANNOTATIONS" / f"TARGET_{build(root=root).patches[0].number}.npy")[0]
    for options, hidden in (
        ({}, [19]),
        ({"void": True}, []),
        ({"background": False}, [0, 19]),
        ({"background": False, "void": True}, [0]),
    ):
        label = build(root=root, modalities=["s2"], **options)[0].raster("label")
        assert label.valid[0, 0].numpy().tolist() == (~np.isin(codes, hidden)).tolist()
        assert set(label.sensor.bands[0].classes) == set(range(20)) - set(hidden)
        assert label.values[label.valid].tolist() == codes[~np.isin(codes, hidden)].tolist()


def test_presence_is_that_of_the_18_crops(root: Path) -> None:
    maps, present = (build(variant, root=root, modalities=["s1-des"]) for variant in ("", "classify"))
    for i in range(len(maps)):
        raster, label = maps[i].raster("label"), present[i].raster("label")
        assert label.sensor.names == pastis.CROPS
        assert len(pastis.CROPS) == 18
        there = set(raster.values[raster.valid].int().tolist()) - {0}
        assert {pastis.CROPS[k] for k in label.values.flatten().nonzero().flatten()} == {
            pastis.CLASSES[c] for c in there
        }
        assert label.gsd_m == 1280.0


def test_the_ground_is_the_utm_grid_of_the_tile(root: Path) -> None:
    for i, patch in enumerate(sorted(metadata(root)["features"], key=lambda f: f["properties"]["ID_PATCH"])):
        split = {1: "train", 2: "train", 3: "train", 4: "val", 5: "test"}[patch["properties"]["Fold"]]
        data = build(root=root, split=split, modalities=["s2"])
        place = next(p.place for p in data.patches if p.number == str(patch["properties"]["ID_PATCH"]))
        box = place.geobox
        assert (str(box.crs), box.shape) == ("EPSG:32631", (128, 128))
        assert (box.boundingbox.left, box.boundingbox.top) == (640000.0 + 1280 * i, 5110000.0)
        assert place.lonlat == pytest.approx((4.82 + 0.0166 * i, 46.12), abs=0.01)


def test_an_outline_that_is_no_square_gives_no_grid(copy: Path) -> None:
    facts = metadata(copy)
    facts["features"][0]["properties"]["TILE"] = ""
    facts["features"][3]["geometry"]["coordinates"][0][1][0] += 400.0
    facts["features"][4]["geometry"] = None
    (copy / "metadata.geojson").write_text(json.dumps(facts))
    places = [p.place for p in build(root=copy, modalities=["s2"]).patches]
    assert [place.geobox for place in places] == [None, None, None]
    assert [place.lonlat is None for place in places] == [False, False, True]
    assert all(place.height_m == 1280.0 for place in places)


def test_dates_come_in_the_order_of_the_data_however_they_are_written(copy: Path) -> None:
    facts = metadata(copy)
    days = {str(n): 20181001 + (7 * n) % 28 for n in (3, 0, 4, 1, 2)}
    facts["features"][0]["properties"]["dates-S2"] = str(days)
    (copy / "metadata.geojson").write_text(json.dumps(facts))
    start = build(root=copy, modalities=["s2"])[0].raster("s2").time_s[:, 0]
    first = 1538352000  # 2018-10-01
    assert ((start - first) / 86400).tolist() == [0, 7, 14, 21, 0]


def test_what_is_wrong_is_named(copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"SPOT6_RVB_1M00_2019_10000\.tif is missing"):
        build(root=copy)[0]
    data = build(root=copy, modalities=["s2"])
    np.save(copy / "DATA_S2" / "S2_10000.npy", np.zeros((4, 10, 128, 128), np.int16))
    with pytest.raises(
        ValueError, match=r"S2_10000\.npy holds 4 dates, but 5 are listed for it in .*metadata\.geojson"
    ):
        data[0]
    np.save(copy / "DATA_S2" / "S2_10000.npy", np.zeros((5, 128, 128, 10), np.int16))
    with pytest.raises(ValueError, match=r"S2_10000\.npy holds \(5, 128, 128, 10\), expected \[date, 10 bands, y, x\]"):
        data[0]
    np.save(copy / "ANNOTATIONS" / "TARGET_10000.npy", np.full((3, 128, 128), 23, np.uint8))
    with pytest.raises(ValueError, match=r"TARGET_10000\.npy holds the code 23"):
        build(root=copy, modalities=["s1-asc"])[0]
    np.save(copy / "ANNOTATIONS" / "TARGET_10000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(OSError, match=r"TARGET_10000\.npy cannot be read"):
        build(root=copy, modalities=["s1-asc"])[0]
    facts = metadata(copy)
    del facts["features"][2]["properties"]["dates-S1D"]
    facts["features"][1]["properties"]["dates-S2"]["0"] = 20181345
    (copy / "metadata.geojson").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"metadata\.geojson: a place lacks dates-S1D"):
        build(root=copy, modalities=["s1-des"])
    with pytest.raises(ValueError, match=r"metadata\.geojson.*20181345"):
        build(root=copy, split="val", modalities=["s2"])[0]
