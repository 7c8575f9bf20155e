"""Labels, draws and comparison of features on a place of synthetic fields."""

from __future__ import annotations

import geopandas
import pytest
import shapely
import torch
from odc.geo.geobox import GeoBox

from everysat import polygons
from everysat.models import omnisat
from everysat.sensors import get
from everysat.types import Batch, Place, Raster

GSD_M = 10.0
SIDE = 48


@pytest.fixture(scope="module")
def place() -> Place:
    geobox = GeoBox.from_bbox(
        (500_000, 5_000_000, 500_000 + SIDE * GSD_M, 5_000_000 + SIDE * GSD_M), "EPSG:32633", resolution=GSD_M
    )
    return Place(SIDE * GSD_M, SIDE * GSD_M, geobox)


@pytest.fixture(scope="module")
def fields() -> geopandas.GeoDataFrame:
    """64 square fields of 40 m, 20 m apart, of two crops in turn."""
    corners = [(500_010 + 60 * i, 5_000_010 + 60 * j) for i in range(8) for j in range(8)]
    boxes = [shapely.box(x, y, x + 40, y + 40) for x, y in corners]
    crop = ["maize" if i % 2 else "wheat" for i in range(64)]
    return geopandas.GeoDataFrame({"crop": crop}, geometry=boxes, crs="EPSG:32633")


@pytest.fixture(scope="module")
def batch(place, fields) -> Batch:
    """Wheat is brighter in the first band; noise everywhere."""
    labels = polygons.burn(fields, place, "crop", gsd_m=GSD_M)
    values = 0.1 + 0.02 * torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    values[0, 0] += 0.1 * (labels.label == labels.classes.index("wheat"))
    sensor = get("sentinel-2-l1c").select(["B02", "B03", "B04", "B08"])
    return Batch((place,), {"s2-10m": Raster.of(sensor, values, GSD_M)})


def test_labels_keep_class_polygon_and_centre_together(place, fields) -> None:
    labels = polygons.burn(fields, place, "crop", gsd_m=GSD_M)
    assert labels.classes == ("maize", "wheat")
    assert labels.label.shape == (SIDE, SIDE)
    assert ((labels.label >= 0) == (labels.polygon >= 0)).all()
    assert (labels.of[labels.polygon[labels.polygon >= 0]] == labels.label[labels.label >= 0]).all()
    y, x = torch.nonzero(labels.polygon == 9).double().mean(0).tolist()
    assert (x + 0.5) * GSD_M + 500_000 == pytest.approx(labels.xy_m[9, 0].item())
    assert 5_000_000 + SIDE * GSD_M - (y + 0.5) * GSD_M == pytest.approx(labels.xy_m[9, 1].item())


def test_draws_hold_out_whole_blocks_whatever_the_fraction(place, fields) -> None:
    labels = polygons.burn(fields, place, "crop", gsd_m=GSD_M)
    few, every = (polygons.draws(labels, fraction, 4, block_m=120.0) for fraction in (0.1, 1.0))
    for (some, test), (train, same) in zip(few, every, strict=True):
        assert test == same
        assert set(some) <= set(train)
        assert {labels.of[i].item() for i in some} == {0, 1}
        blocks = [{tuple((labels.xy_m[i] // 120).long().tolist()) for i in part} for part in (train, test)]
        assert not blocks[0] & blocks[1]
    assert len({tuple(test) for _, test in every}) > 1


def test_comparison_finds_what_tells_the_classes_apart(batch, fields) -> None:
    encoder = omnisat.build("", patch_m=20.0, grid=2, dim=16, depth=1, heads=4, modalities={
        "s2-10m": {"sensor": "sentinel-2-l1c", "bands": ["B02", "B03", "B04", "B08"], "gsd_m": 10.0, "projector": "texture"}
    })  # fmt: skip
    table = polygons.compare(
        {"random encoder": encoder}, batch, fields, "crop", fractions=(0.2, 1.0), draws=2, block_m=120.0, quiet=True
    )
    scores = {row[0]: row[-1].mean for row in table.rows}
    assert scores["bands"] > 0.95
    assert set(scores) == {"bands", "image statistics (90 m)", "random convolutions", "random encoder"}


def test_single_pixels_and_whole_images_give_the_same_samples(batch, place, fields) -> None:
    labels = polygons.burn(fields, place, "crop", gsd_m=GSD_M)
    encoder = omnisat.build("tiny", modalities={
        "s2-10m": {"sensor": "sentinel-2-l1c", "bands": ["B02", "B03", "B04", "B08"], "gsd_m": 10.0, "projector": "texture"}
    })  # fmt: skip
    dense = polygons.dense(encoder, GSD_M)
    some, _ = polygons.sampled(dense, batch, labels, share=0.5)
    every, _ = polygons.sampled(lambda b: dense(b), batch, labels, share=0.5)
    torch.testing.assert_close(some.x, every.x)
    assert torch.equal(some.group, every.group)
    assert 0.3 < len(some) / int((labels.label >= 0).sum()) < 0.7


def test_windows_of_a_large_place_give_the_samples_of_the_whole(batch, place, fields, monkeypatch) -> None:
    encoder = omnisat.build("tiny", grid=4, modalities={
        "s2-10m": {"sensor": "sentinel-2-l1c", "bands": ["B02", "B03", "B04", "B08"], "gsd_m": 10.0, "projector": "texture"}
    })  # fmt: skip
    dense = polygons.dense(encoder, GSD_M)
    whole, _ = polygons.sampled(dense, batch, polygons.burn(fields, place, "crop", gsd_m=GSD_M))
    plan_of, windows = polygons.plan_of, []

    def narrow(mapper, source, *rest):
        windows.append(plan_of(mapper, source, 160.0, *rest[1:]))
        return windows[-1]

    monkeypatch.setattr(polygons, "plan_of", narrow)
    some = polygons._sampled_by_windows(dense, polygons.open_source(batch, GSD_M), fields, "crop")
    assert windows[0].grid == (3, 3)
    assert some.classes == whole.classes
    for one in (some, whole):
        assert len(one) == 64 * 16
    for group in range(64):
        mine, theirs = some.group == group, whole.group == group
        torch.testing.assert_close(some.x[mine].mean(0), whole.x[theirs].mean(0))
        torch.testing.assert_close(some.x[mine].amax(0), whole.x[theirs].amax(0))
        assert some.label[mine].tolist() == whole.label[theirs].tolist()
    mapper = polygons.probe_mapper(encoder, batch, fields, "crop", gsd_m=GSD_M)
    assert set(mapper.names) == {"maize", "wheat"}


def test_a_model_whose_tokens_have_no_size_is_refused(batch) -> None:
    encoder = omnisat.build("tiny")
    del encoder.settings
    with pytest.raises(ValueError, match="how large its tokens are"):
        polygons.token_m(encoder)
