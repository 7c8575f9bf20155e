"""GEO-Bench-2: every benchmark in physical units, what cannot be used refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everysat.data.bigearthnet import CLASSES
from everysat.data.geobench import FILED, INPUTS, SPLITS, build, fake
from everysat.io import tortilla
from everysat.types import Vector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("geobench")
    fake(root)
    return root


def repacked(folder, change, rows=lambda facts: facts):
    """The fake with the members of each place changed."""
    path = folder / "benv2.tortilla"
    places = []
    for sample in tortilla.members(path):
        inner = {m.facts["tortilla:id"]: (dict(m.facts), m.content()) for m in sample.members()}
        places.append((rows(dict(sample.facts)), tortilla.packed(list(change(inner).values()))))
    path.write_bytes(tortilla.packed(places))


def test_layers_are_the_members(folder):
    sample = tortilla.members(folder / "benv2.tortilla")[3]
    parts = {m.facts["tortilla:id"]: m.tiff()[0] for m in sample.members()}
    place = build(root=folder, split="all")[3]
    s2 = torch.from_numpy(parts["s2"].astype(np.float32)) * 1e-4
    torch.testing.assert_close(place.raster("s2").values[0][place.raster("s2").valid[0]], s2[s2 > 0])
    assert place.raster("s1").sensor.names == ("VH", "VV")
    np.testing.assert_allclose(place.raster("s1").values[0], parts["s1"])
    assert place.raster("s2").time_s.tolist() == [[1527552000.0 + 3 * 864000, 1527552000.0 + 3 * 864000 + 86400]]
    label = place.raster("label")
    there = [name for name, yes in zip(CLASSES, label.values[0, :, 0, 0], strict=True) if yes]
    assert there == sorted(sample.facts["labels"], key=CLASSES.index)
    assert (place.places[0].width_m, str(place.places[0].geobox.crs)) == (1200, "EPSG:32632")


def test_splits_are_those_of_the_table_and_files_may_come_in_parts(folder, tmp_path):
    sizes = {split: len(build(root=folder, split=split)) for split in (*SPLITS, "all")}
    assert sizes == {"train": 2, "val": 2, "test": 2, "all": 6}
    for part in range(2):
        (tmp_path / f"geobench_benv2.{part:04d}.part.tortilla").write_bytes((folder / "benv2.tortilla").read_bytes())
    both = build(root=tmp_path, split="val")
    assert len(both) == 4
    assert both[0].raster("s2").values.equal(both[2].raster("s2").values)
    assert both.fingerprint() != build(root=folder, split="val").fingerprint()


def test_what_cannot_be_used_is_refused(folder):
    with pytest.raises(LookupError, match="modalities='s1' of treesatai cannot be used: its negative decibels"):
        build("treesatai", root=folder, modalities=["s1"])
    with pytest.raises(LookupError, match="modalities='s1' of dynamic_earthnet cannot be used"):
        build("dynamic_earthnet", root=folder, modalities=["s1"])
    with pytest.raises(LookupError, match="variant='benv3' is unknown"):
        build("benv3", root=folder)
    with pytest.raises(FileNotFoundError, match=r"pastis\.tortilla is missing"):
        build("pastis", root=folder)


def test_members_that_do_not_fit_are_named(tmp_path):
    fake(tmp_path)
    repacked(tmp_path, lambda inner: {"s1": inner["s1"]})
    with pytest.raises(ValueError, match=r"benv2\.tortilla:sample_0 has no member 's2'; it has s1"):
        build(root=tmp_path)[0]
    fake(tmp_path)
    repacked(tmp_path, lambda inner: inner | {"s2": (inner["s2"][0], inner["s1"][1])})
    with pytest.raises(ValueError, match=r"benv2\.tortilla:sample_0/s2 holds \(2, 120, 120\), expected \[12 bands"):
        build(root=tmp_path)[0]
    fake(tmp_path)
    repacked(tmp_path, lambda inner: inner, lambda facts: facts | {"labels": ["Lava"]})
    with pytest.raises(ValueError, match=r"sample_0 has the label 'Lava'"):
        build(root=tmp_path)[0]
    fake(tmp_path)
    repacked(tmp_path, lambda inner: inner, lambda facts: facts | {"tortilla:data_split": "dev"})
    with pytest.raises(ValueError, match=r"sample_0 is of the split 'dev', expected train, validation, test"):
        build(root=tmp_path)


@pytest.fixture(scope="module")
def real(data_dir):
    if not (data_dir / "geobench2_mini").is_dir():
        pytest.skip("needs geobench2_mini")
    return data_dir / "geobench2_mini"


@pytest.mark.parametrize("variant", INPUTS)
def test_every_real_place_is_physical(real, variant):
    data = build(variant, root=real, split="all")
    assert len(data) == sum(len(build(variant, root=real, split=split)) for split in FILED)
    seen = set()
    for i in range(len(data)):
        place = data[i]
        seen |= set(place.layers)
        for name in set(place.layers) - {"objects"}:
            raster = place.raster(name)
            for k, band in enumerate(raster.sensor.bands):
                values = raster.values[:, k][raster.valid[:, k]]
                if band.range is not None and len(values):
                    inside = (values >= band.range[0]) & (values <= band.range[1])
                    assert inside.float().mean() > 0.999, f"{name} {band.name}"
            if len(raster.row) > 1:
                assert torch.isfinite(raster.time_s).all()
                assert (raster.time_s.diff(dim=0) > 0).all()
            extent = raster.values.shape[2] * raster.gsd_m
            assert extent == pytest.approx(place.places[0].height_m, rel=0.03)
    assert seen - {"label", "objects"} <= set(INPUTS[variant])
    assert len(seen) >= len(INPUTS[variant])


def spectrum(raster):
    return {b: raster.values[:, k][raster.valid[:, k]].median().item() for k, b in enumerate(raster.sensor.names)}


def test_real_bands_are_what_they_are_called(real):
    """Vegetation: bright beyond 0.7 um, darker in red than in green; cross-polarised backscatter is the weaker."""
    for variant, layer, at in (
        ("treesatai", "s2", 0),
        ("dynamic_earthnet", "s2", 0),
        ("pastis", "s2", 0),
        ("biomassters", "s2", 0),
    ):
        s = spectrum(build(variant, root=real, split="all")[at].raster(layer))
        assert s["B08"] > 2.5 * s["B04"], variant
        assert s["B05"] < s["B06"] < s["B07"], variant
        assert s["B12"] < s["B11"] < s["B8A"], variant
    planet = spectrum(build("dynamic_earthnet", root=real, split="all")[0].raster("planet"))
    own = spectrum(build("dynamic_earthnet", root=real, split="all")[0].raster("s2"))
    for name, band in (("blue", "B02"), ("green", "B03"), ("red", "B04"), ("nir", "B08")):
        assert planet[name] == pytest.approx(own[band], rel=0.35)
    aerial = spectrum(build("treesatai", root=real, split="all")[0].raster("aerial"))
    assert aerial["nir"] > 1.5 * aerial["red"]
    for variant, layer in (("benv2", "s1"), ("biomassters", "s1-asc"), ("pastis", "s1-asc"), ("pastis", "s1-des")):
        s = spectrum(build(variant, root=real, split="all")[0].raster(layer))
        assert s["VH"] < s["VV"] - 3
        assert -30 < s["VH"] < s["VV"] < -5


def test_real_dates_and_labels(real):
    days = build("dynamic_earthnet", root=real, split="train")[0].raster("planet").time_s
    assert len(days) == 31
    assert (days[1:, 0] == days[:-1, 1]).all(), "a day after the other"
    crops = build("pastis", root=real, split="all")[0]
    assert 0 < crops.raster("label").valid.float().mean() < 1, "void is not labelled"
    trees = build("treesatai", root=real, split="all")[0].raster("label")
    assert [n for n, v in zip(trees.sensor.names, trees.values[0, :, 0, 0], strict=True) if v] == ["Fagus", "Picea"]


def test_real_objects_lie_on_their_image(real):
    """Bridges are over water, which is dark in radar: outlines are where they should be."""
    place = build("m4sar", root=real, split="all")[1]
    objects = place.layers["objects"]
    assert isinstance(objects, Vector)
    assert len(objects.geometry) == len(objects.attributes) == len(objects.row)
    assert all(shape.is_valid and 0 < shape.area < 1e6 for shape in objects.geometry)
    bounds = np.array([shape.bounds for shape in objects.geometry])
    assert bounds.min() >= 0
    assert bounds.max() <= place.places[0].width_m == 5120
