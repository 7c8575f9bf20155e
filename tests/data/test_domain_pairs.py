"""Source and target in one dataset: which places come with labels, which never come, classes by their names, and coarser pixels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from shapely.geometry import box

from everysat.data import domains, rsicd, so2sat
from everysat.data.statistics import spread
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Place, Raster

IMAGE = Sensor("made", "optical", (Band("a", 10, "reflectance"), Band("b", 10, "reflectance")), "made for tests")


@dataclass(frozen=True)
class Made:
    """Places whose pixels are their number, plus ``first``; ``classes`` by code."""

    label: tuple[int | None, ...]
    classes: tuple[str, ...] = ("x", "y")
    first: float = 0.0
    side_px: int = 4

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Batch:
        values = torch.full((1, 2, self.side_px, self.side_px), self.first + index)
        layers = {"image": Raster.of(IMAGE, values, 10.0)}
        if self.label[index] is not None:
            band = Band("class", 40.0, "class", classes=dict(enumerate(self.classes)))
            code = torch.full((1, 1, 1, 1), float(self.label[index]))
            layers["label"] = Raster.of(Sensor(f"labels {self.first}", "classes", (band,), "made"), code, 40.0)
        return Batch((Place(40.0, 40.0),), layers)


SOURCE = Made((0, 1, 2, 0, 1, 2), ("x", "z", "y"), first=100.0)
TARGET = Made((0, 1) * 6)
TEST = Made((1, 0, 1, 0), first=200.0)


def number(place: Batch) -> float:
    return float(next(r for n, r in place.layers.items() if n != "label").values[0, 0, 0, 0])


def all_of(data):
    return [data[i] for i in range(len(data))]


def mixed(shots=2, source=SOURCE, target=TARGET, test=TEST, **options):
    classes = options.pop("classes", None)
    sets = domains.domains({"source": source, "target": target, "test": test}, classes)
    return domains.adaptation(sets, shots=shots, **options)


def test_batches_hold_three_kinds_of_places_in_their_shares() -> None:
    data = mixed(shares=(2, 1, 3))
    places = all_of(data)
    kinds = Counter((next(n.partition("/")[0] for n in p.layers if "/" in n), "label" in p.layers) for p in places)
    assert kinds == {("source", True): 8, ("target", True): 4, ("target", False): 12}
    assert {number(p) for p in places if "source/image" in p.layers} == {100.0, 102.0, 103.0, 105.0}
    unlabelled = {number(p) for p in places if "label" not in p.layers}
    assert unlabelled == set(map(float, range(12)))
    Batch.cat(places)  # labels of both are one layer
    seen = [next(iter(data[i].layers)) for i in spread(len(data), 6)]
    assert {"source/image", "target/image"} == set(seen)


def test_so_many_labels_of_each_class_are_drawn_by_the_seed() -> None:
    drawn = []
    for seed in range(4):
        places = all_of(mixed(shots=2, shares=(0, 1, 0), seed=seed))
        assert Counter(float(p.raster("label").values) for p in places) == {0.0: 2, 1.0: 2}
        assert all(number(p) % 2 == float(p.raster("label").values) for p in places)
        drawn.append(tuple(map(number, places)))
    assert len(set(drawn)) > 1
    assert drawn[0] == tuple(map(number, all_of(mixed(shots=2, shares=(0, 1, 0), seed=0))))
    few, more = ({number(p) for p in all_of(mixed(shots=n, shares=(0, 1, 0)))} for n in (2, 4))
    assert few < more


@pytest.mark.parametrize(("protocol", "seen"), [("inductive", False), ("transductive", True)])
def test_test_places_are_seen_in_one_protocol_alone_and_never_with_labels(protocol, seen) -> None:
    places = all_of(mixed(protocol=protocol))
    tested = [p for p in places if number(p) >= 200]
    assert bool(tested) == seen
    assert not any("label" in p.layers for p in tested)
    if seen:
        assert {number(p) for p in tested} == {200.0, 201.0, 202.0, 203.0}
        assert not [p for p in places if "label" not in p.layers and number(p) < 100]


def test_classes_are_matched_by_their_names() -> None:
    for classes in (
        None,
        ["y", "x"],
        {"ground": {"source": ["y", "z"], "target": ["y"]}, "x": {"source": ["x"], "target": ["x"]}},
    ):
        data = mixed(classes=classes, shares=(1, 1, 0))
        names = data.parts[0].label.bands[0].classes
        for p in all_of(data):
            source = "source/image" in p.layers
            own = (SOURCE if source else TARGET).classes
            dataset = SOURCE if source else TARGET
            called = own[dataset.label[int(number(p)) % 100]]
            shared = names[int(p.raster("label").values)]
            assert shared == called or (shared, called) in (("ground", "y"), ("ground", "z"))
        assert len(data.parts[0].code) == (6 if isinstance(classes, dict) else 4)


def test_places_of_the_target_without_a_label_are_unlabelled_ones() -> None:
    """Such as most tiles of a scene; a map of classes counts as the class of most of its pixels."""
    data = mixed(target=Made((None, 0, 1, None, 0, 1)), shots=None)
    kinds = Counter(("label" in p.layers, number(p)) for p in all_of(data) if "target/image" in p.layers)
    assert {n for labelled, n in kinds if labelled} == {1.0, 2.0, 4.0, 5.0}
    assert {n for labelled, n in kinds if not labelled} == set(map(float, range(6)))
    place = TARGET[0]
    codes = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[None, None]
    valid = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    valid[..., 2, :] = False
    valid[..., 1, 2] = False
    label = replace(place.raster("label"), values=codes, valid=valid)
    assert domains._code(place.adding(label=label)) == 1
    assert domains._code(place.adding(label=replace(label, valid=torch.zeros_like(valid)))) == domains.NONE


def test_coarser_pixels_are_means_of_what_was_seen() -> None:
    values = torch.arange(32.0).view(1, 2, 4, 4)
    valid = torch.ones_like(values, dtype=torch.bool)
    valid[0, 0, 0, 0] = valid[0, 1, :2, 2:] = False
    wild = torch.where(valid, values, torch.inf)
    found = domains.coarser(replace(Raster.of(IMAGE, values, 10.0), values=wild, valid=valid), 2)
    assert found.gsd_m == 20.0
    torch.testing.assert_close(found.values[0, 0], torch.tensor([[(1 + 4 + 5) / 3, 4.5], [10.5, 12.5]]))
    assert found.valid[0, 1].tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match="take a divisor of both sides"):
        domains.coarser(Raster.of(IMAGE, values, 10.0), 3)


def test_published_datasets_by_name(tmp_path) -> None:
    rsicd.fake(tmp_path, places=4, side_px=24)
    target = {"name": "rsicd", "options": {"root": tmp_path}, "bands": {"rgb": ["red"]}, "coarsen": 4}
    source = {"name": "rsicd", "options": {"root": tmp_path}}
    test = {**target, "options": {"root": tmp_path, "split": "val"}}
    data = domains.build(source=source, target=target, test=test)
    image = data[len(data) - 1].raster("target/rgb")
    assert (image.values.shape, image.gsd_m, image.sensor.names) == ((1, 1, 6, 6), 8.0, ("red",))
    assert data[0].raster("source/rgb").values.shape == (1, 3, 24, 24)
    held = domains.build(source=source, target=target, test=test, part="test")
    assert len(held) == 4
    assert all("label" in held[i].layers for i in range(4))
    assert data.fingerprint() == domains.build(source=source, target=target, test=test).fingerprint()
    others = [{"protocol": "transductive"}, {"shares": [1, 1, 2]}, {"part": "test"}]
    prints = {domains.build(source=source, target=target, test=test, **one).fingerprint() for one in others}
    assert len(prints | {data.fingerprint()}) == 4


def test_a_scene_of_the_user_is_a_target(tmp_path) -> None:
    """Tiles with polygons are labelled, all tiles are there without."""
    values = np.random.default_rng(0).integers(1, 9, (1, 32, 32)).astype("uint16")
    north_west = from_origin(500000, 5000000, 10, 10)
    profile = {"driver": "GTiff", "count": 1, "height": 32, "width": 32, "dtype": "uint16", "crs": "EPSG:32632"}
    with rasterio.open(tmp_path / "s.tif", "w", transform=north_west, **profile) as file:
        file.write(values)
    squares = [
        {"kind": kind, "geometry": box(500000 + east, 4999930, 500000 + east + 50, 4999980)}
        for kind, east in (("x", 10), ("y", 90), ("x", 180))
    ]
    geopandas.GeoDataFrame(squares, crs="EPSG:32632").to_file(tmp_path / "p.gpkg")
    sensor = Sensor("own", "optical", (Band("b", 10, "DN"),), "made for tests")
    reading = {"tile_m": 80, "sensor": sensor, "stored": "physical", "order": None}
    options = {"files": str(tmp_path / "s.tif"), **reading}
    spec = {"name": "scene", "options": {**options, "labels": str(tmp_path / "p.gpkg"), "column": "kind"}}
    rsicd.fake(tmp_path, places=4)
    source = {"name": "rsicd", "options": {"root": tmp_path}}
    shared = {"x": {"source": ["Airport"], "target": ["x"]}, "y": {"source": ["Commercial"], "target": ["y"]}}
    data = domains.build(source=source, target=spec, unlabelled={"name": "scene", "options": options}, classes=shared)
    kinds = dict(zip(("source", "labelled", "unlabelled"), map(len, data.parts), strict=True))
    assert kinds == {"source": 2, "labelled": 3, "unlabelled": 16}
    places = all_of(data)
    assert {
        float(p.raster("label").values) for p in places if "label" in p.layers and "source/rgb" not in p.layers
    } == {
        0.0,
        1.0,
    }
    assert sum("label" not in p.layers for p in places) == 16


def test_optical_and_radar_of_one_set(tmp_path) -> None:
    so2sat.fake(tmp_path, places=30)
    spec = lambda split, layer: {"name": "so2sat", "options": {"root": tmp_path, "split": split, "modalities": [layer]}}  # noqa: E731
    data = domains.build(source=spec("train", "s2"), target=spec("val", "s1"), shots=1)
    assert {n for p in all_of(data) for n in p.layers} == {"source/s2", "target/s1", "label"}
    assert np.isin(data.parts[1].code, data.parts[0].code).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0, 0, 0)}, "must be three whole numbers"),
        ({"shares": (1, 1)}, "must be three whole numbers"),
        ({"shots": 0}, "at least 1 label"),
        ({"protocol": "deductive"}, "Did you mean inductive"),
        ({"classes": ["x"]}, "at least two classes"),
        ({"classes": ["x", "w"]}, "has no class 'w'"),
        ({"source": Made((0, 0), ("x", "y")), "classes": ["x", "y"]}, "source has no place of the class 'y'"),
        ({"target": Made((None, None))}, "no place with a layer 'label'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        mixed(**options)


def test_what_is_missing_is_said() -> None:
    sets = domains.domains({"target": TARGET})
    with pytest.raises(ValueError, match="source is missing"):
        domains.adaptation(sets)
    with pytest.raises(ValueError, match="test is missing"):
        domains.adaptation(sets, shares=(0, 1, 1), protocol="transductive")
    assert len(domains.adaptation(sets, shares=(0, 1, 1))) == 24
    with pytest.raises(ValueError, match="part='test' needs test"):
        domains.build(target={"name": "synthetic"}, part="test")
    with pytest.raises(LookupError, match="Did you mean options"):
        domains.build(target={"name": "rsicd", "option": {}})
