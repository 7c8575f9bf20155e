"""STAC of stores: pystac reads it, and the fields are those of the embedding extension, each where the extension has it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pystac
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from everysat.store import create, open_store, stac_collection, stac_item, write_chips, write_cog, write_stac

ITEM_FIELDS = {"emb:runtime_parameters", "emb:quantization"}
COLLECTION_FIELDS = {"emb:type", "emb:dimensions", "emb:chip_layout"}
"""What the extension's schema allows of what is written here; it allows no other ``emb:`` fields."""
MODEL = {"name": "m", "weights": "ab", "url": "https://a.org/m"}


@pytest.fixture
def pixels(tmp_path):
    geobox = GeoBox((40, 50), Affine(10, 0, 600_000, 0, -10, 5_400_000), "EPSG:32631")
    writer = create(
        tmp_path / "a.zarr", geobox, 4, model=MODEL, period=("2024-01-01", "2025-01-01"), source=["https://a.org/s2"]
    )
    writer.write(slice(0, 40), slice(0, 50), np.random.default_rng(0).normal(size=(4, 40, 50)))
    return open_store(writer.finish())


@pytest.fixture
def table(tmp_path):
    x = np.random.default_rng(0).normal(size=(9, 4))
    boxes = shapely.box(np.arange(9) * 100, 0, np.arange(9) * 100 + 100, 100)
    return open_store(write_chips(tmp_path / "c.parquet", boxes, x, 32631, model=MODEL, quantiser="float32/1"))


def test_item_of_pixels(pixels, tmp_path):
    made = datetime(2025, 3, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    path = write_stac(stac_item(pixels, made=made, collection="c"), tmp_path / "a.json")
    item = pystac.Item.from_file(str(path))
    assert item.id == "a"
    assert item.common_metadata.start_datetime == datetime(2024, 1, 1, tzinfo=UTC)
    assert item.common_metadata.end_datetime == datetime(2025, 1, 1, tzinfo=UTC)
    assert item.properties["processing:datetime"] == "2025-03-01T10:00:00Z"
    assert item.properties["gsd"] == 10
    assert item.properties["proj:code"] == "EPSG:32631"
    assert item.properties["proj:shape"] == [40, 50]
    assert item.properties["proj:transform"] == [10, 0, 600_000, 0, -10, 5_400_000]
    assert item.properties["emb:quantization"] == {
        "method": "per_pixel_scale",
        "original_dtype": "float32",
        "quantized_dtype": "int8",
    }
    run = item.properties["emb:runtime_parameters"]
    assert run["quantiser"] == {"name": "int8-linear/1", "dim": 4}
    assert run["quality"] == pixels.quality
    assert {key for key in item.properties if key.startswith("emb:")} == ITEM_FIELDS
    asset = item.assets["embeddings"]
    assert (asset.href, asset.roles) == (str(pixels.path), ["data"])
    assert asset.media_type == "application/vnd.zarr; version=3"
    assert asset.extra_fields["data_type"] == "int8"
    assert "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json" in item.stac_extensions
    links = {link.rel: link.target for link in item.links if link.rel.startswith("emb:")}
    assert links == {"emb:model": "https://a.org/m", "emb:source-data": "https://a.org/s2"}
    assert item.collection_id == "c"


def test_footprint_holds_the_grid(pixels):
    item = stac_item(pixels)
    outline = shapely.geometry.shape(item["geometry"])
    assert outline.bounds == tuple(item["bbox"])
    area = outline.area * 111_320**2 * np.cos(np.deg2rad(48.74))
    assert area == pytest.approx(400 * 500, rel=0.01)


def test_item_of_chips_and_files(table, pixels, tmp_path):
    item = stac_item(table, period=("2024", "2024-07-01T00:00:00+02:00"), name="n", href="https://b.org/c.parquet")
    read = pystac.Item.from_dict(item)
    assert (read.id, read.assets["embeddings"].href) == ("n", "https://b.org/c.parquet")
    assert read.assets["embeddings"].media_type == "application/vnd.apache.parquet"
    assert (item["properties"]["start_datetime"], item["properties"]["end_datetime"]) == (
        "2024-01-01T00:00:00Z",
        "2024-06-30T22:00:00Z",
    )
    assert "emb:quantization" not in item["properties"], "float32 is what the model gives"
    assert "proj:transform" not in item["properties"]
    cog = open_store(write_cog(pixels, tmp_path / "a.tif"))
    asset = stac_item(cog)["assets"]["embeddings"]
    assert asset["type"] == "image/tiff; application=geotiff; profile=cloud-optimized"
    assert asset["data_type"] == "float32"
    with pytest.raises(ValueError, match="tells no period"):
        stac_item(table)
    with pytest.raises(ValueError, match="'soon' is no ISO 8601 date"):
        stac_item(table, period=("soon", "2025"))


def test_collection(pixels, table, tmp_path):
    about = stac_collection([pixels], name="c", description="d", license="CC-BY-4.0")
    read = pystac.Collection.from_file(str(write_stac(about, tmp_path / "collection.json")))
    assert read.extent.temporal.intervals == [[datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)]]
    assert read.extent.spatial.bboxes == [stac_item(pixels)["bbox"]]
    assert about["emb:type"] == "pixel"
    assert about["emb:dimensions"] == 4
    assert about["data_type"] == "int8"
    assert {"emb:model", "emb:source-data"} <= {link["rel"] for link in about["links"]}
    assert {key for key in about if key.startswith("emb:")} <= COLLECTION_FIELDS
    chips = stac_collection([table], name="c", description="d", period=("2024", "2025"))
    assert chips["emb:chip_layout"]["layout_type"] in ("regular_grid", "variable_grid", "named_grid")
    pystac.Collection.from_dict(chips)
    json.dumps(chips, allow_nan=False)
    with pytest.raises(ValueError, match="differ in kind"):
        stac_collection([pixels, table], name="c", description="d", period=("2024", "2025"))
    with pytest.raises(ValueError, match="tells no period"):
        stac_collection([table], name="c", description="d")
    with pytest.raises(ValueError, match="at least one store"):
        stac_collection([], name="c", description="d")


def test_footprint_over_the_antimeridian_has_two_parts(tmp_path):
    geobox = GeoBox((10, 100), Affine(1000, 0, 780_000, 0, -1000, 100_000), "EPSG:32660")
    item = stac_item(open_store(create(tmp_path / "a.zarr", geobox, 2, period=("2024", "2025")).finish()))
    outline = shapely.geometry.shape(item["geometry"])
    assert outline.geom_type == "MultiPolygon"
    assert sorted(round(part.bounds[0]) for part in outline.geoms) == [-180, 180]
    assert outline.area == pytest.approx(100_000 * 10_000 / 111_320**2, rel=0.02)
