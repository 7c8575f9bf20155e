"""Laws of every reader of a published dataset, on the tiny synthetic set that it makes in the published layout.

A module of ``everysat/data`` that defines ``fake`` is tested. ``LAYERS`` are the layers that its default variant can give,
``label`` among them if there are labels; ``UNLABELLED`` names splits without, if there are any.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from everysat.data.batches import Dataset
from everysat.find import names
from everysat.types import Batch, Layer, Raster, Text

NAMED = {name: importlib.import_module(f"everysat.data.{name}") for name in names("data")}
READERS = {name: module for name, module in NAMED.items() if hasattr(module, "fake")}
LISTS = (".lst", ".csv")
"""Text of which a part is a shorter list: nothing tells that it was cut."""


@pytest.fixture(scope="module", params=sorted(READERS))
def reader(request: pytest.FixtureRequest) -> ModuleType:
    return READERS[request.param]


@pytest.fixture(scope="module")
def root(reader: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(reader.__name__.rsplit(".", 1)[1])
    reader.fake(folder)
    return folder


@pytest.fixture(scope="module")
def items(reader: ModuleType, root: Path) -> dict[str, list[Batch]]:
    """All places of every split."""
    return everything(reader, root)


def everything(reader: ModuleType, root: Path) -> dict[str, list[Batch]]:
    sets = {split: reader.build(root=root, split=split) for split in reader.SPLITS}
    return {split: [data[i] for i in range(len(data))] for split, data in sets.items()}


def same(a: Batch, b: Batch) -> bool:
    return a.layers.keys() == b.layers.keys() and all(same_layer(a.layers[name], b.layers[name]) for name in a.layers)


def same_layer(a: Layer, b: Layer) -> bool:
    if isinstance(a, Text) and isinstance(b, Text):
        return (a.strings, a.role) == (b.strings, b.role) and a.row.equal(b.row)
    return all(getattr(a, part).equal(getattr(b, part)) for part in ("values", "valid", "time_s", "row"))


def rasters(items: dict[str, list[Batch]]) -> Iterator[tuple[str, Raster]]:
    for batch in (batch for part in items.values() for batch in part):
        yield from ((name, layer) for name, layer in batch.layers.items() if isinstance(layer, Raster))


def inputs(reader: ModuleType) -> list[str]:
    return [name for name in reader.LAYERS if name != "label"]


def test_there_are_readers() -> None:
    assert {"treesatai", "pastis", "flair"} <= set(READERS)


def test_it_says_what_it_is(reader: ModuleType) -> None:
    assert reader.LICENCE
    assert re.search(r"https?://|doi:", reader.SOURCE)
    assert reader.__doc__
    assert "synthetic" in (reader.fake.__doc__ or "")


def test_every_split_has_places_that_are_batches_of_one(reader: ModuleType, root: Path, items) -> None:
    for split in reader.SPLITS:
        data = reader.build(root=root, split=split)
        assert isinstance(data, Dataset)
        assert len(data) == len(items[split]) > 0
        for batch in items[split]:
            assert len(batch) == 1
            assert batch.layers.keys() <= set(reader.LAYERS)
            assert set(batch.layers) - {"label"}
        with pytest.raises(IndexError):
            data[len(data)]


def test_labels_are_where_they_are_promised(reader: ModuleType, items) -> None:
    unlabelled = getattr(reader, "UNLABELLED", ())
    for split, part in items.items():
        assert all(
            ("label" in batch.layers) == ("label" in reader.LAYERS and split not in unlabelled) for batch in part
        )
    for name, raster in rasters(items):
        if name == "label" and raster.sensor.kind == "classes":
            for i, band in enumerate(raster.sensor.bands):
                assert set(raster.values[:, i][raster.valid[:, i]].unique().tolist()) <= set(band.classes)


def test_modalities_select_layers(reader: ModuleType, root: Path) -> None:
    for name in inputs(reader):
        data = reader.build(root=root, split=reader.SPLITS[0], modalities=[name])
        found = [set(data[i].layers) - {"label"} for i in range(len(data))]
        assert {name} in found
        assert all(layers <= {name} for layers in found)
    with pytest.raises(LookupError, match="modalities='hyperspectral' is unknown"):
        reader.build(root=root, modalities=["hyperspectral"])
    with pytest.raises((LookupError, ValueError), match="split='trian'"):
        reader.build(root=root, split="trian")


def test_values_are_physical(items) -> None:
    for name, raster in rasters(items):
        assert raster.values.dtype == torch.float32
        assert torch.isfinite(raster.values[raster.valid]).all()
        assert raster.valid.any(), f"nothing is valid in {name}"
        for i, band in enumerate(raster.sensor.bands):
            if band.range is not None:
                seen = raster.values[:, i][raster.valid[:, i]]
                assert ((seen >= band.range[0] - 1e-6) & (seen <= band.range[1] + 1e-6)).all(), f"{name} {band.name}"


def test_layers_lie_over_the_place(items) -> None:
    for batch in (batch for part in items.values() for batch in part):
        for name, raster in rasters({"": [batch]}):
            for pixels, extent in zip(raster.values.shape[2:], (batch.height_m, batch.width_m), strict=True):
                assert abs(pixels * raster.gsd_m - extent) <= max(raster.gsd_m, 0.03 * extent), name


def test_series_are_dated(items) -> None:
    for name, raster in rasters(items):
        assert (raster.time_s[:, 0] < raster.time_s[:, 1]).all()
        if len(raster.row) > 1:
            assert torch.isfinite(raster.time_s).all(), name
            assert ((raster.time_s > 0) & (raster.time_s < 2e9)).all(), name


def test_places_of_all_splits_join(items) -> None:
    every = [batch for part in items.values() for batch in part]
    joined = Batch.cat(every)
    assert len(joined) == len(every)
    assert all(joined[i].layers.keys() == batch.layers.keys() for i, batch in enumerate(every))


def test_reading_twice_in_threads_or_from_a_copy_gives_the_same(reader: ModuleType, root: Path, items) -> None:
    split = reader.SPLITS[0]
    data = pickle.loads(pickle.dumps(reader.build(root=root, split=split)))
    order = [*range(len(data)), *reversed(range(len(data)))]
    with ThreadPoolExecutor(3) as pool:
        for index, batch in zip(order, pool.map(data.__getitem__, order), strict=True):
            assert same(batch, items[split][index])


def test_splits_share_no_place(items) -> None:
    places = [(split, batch) for split, part in items.items() for batch in part]
    for i, (split, batch) in enumerate(places):
        for other, other_batch in places[:i]:
            assert not same(batch, other_batch), f"{split} and {other}"


def test_a_missing_root_says_what_was_looked_for_and_where_it_is_published(reader: ModuleType, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            reader.build(root=folder)
        assert str(folder) in str(error.value)
        assert re.search(r"https?://|doi:", str(error.value))


@contextmanager
def spoiled(path: Path, how: str) -> Iterator[None]:
    whole = path.read_bytes()
    try:
        path.unlink()
        if how == "cut off":
            path.write_bytes(whole[: len(whole) // 2])
        yield
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


def one_of_each_kind(root: Path) -> list[Path]:
    kinds: dict[str, Path] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        kinds.setdefault(re.sub(r"\d+", "0", path.relative_to(root).as_posix()), path)
    return list({re.sub(r"[A-Z]?[a-z]+_spec\._", "", kind): path for kind, path in kinds.items()}.values())


def outcome(reader: ModuleType, root: Path) -> tuple[dict[str, list[Batch]], str]:
    """All places, or the message of the error."""
    try:
        return everything(reader, root), ""
    except (OSError, ValueError, LookupError) as error:
        return {}, str(error)


def part_of(now: Batch, before: Batch) -> bool:
    """Whether every observation of ``now`` is one of ``before``, or the same without its date."""
    if not now.layers.keys() <= before.layers.keys():
        return False
    if not all(same_layer(now.layers[n], before.layers[n]) for n in now.layers if isinstance(now.layers[n], Text)):
        return False
    for name, new in rasters({"": [now]}):
        old = before.raster(name)
        if new.values.shape[1:] != old.values.shape[1:]:
            return False
        for i in range(len(new.row)):
            dated = (old.time_s == new.time_s[i]).all(1) | ~torch.isfinite(new.time_s[i]).any()
            equal = ((old.values == new.values[i]) & (old.valid == new.valid[i])).flatten(1).all(1)
            if not (dated & equal).any():
                return False
    return True


@pytest.mark.parametrize("how", ["missing", "cut off"])
def test_a_spoiled_file_is_named_or_changes_nothing(how: str, reader: ModuleType, root: Path, items) -> None:
    """Where folders are the only list of places or dates, one that is missing cannot be noticed; all others stay as they were."""
    files = [path for path in one_of_each_kind(root) if how == "missing" or path.suffix not in LISTS]
    named = 0
    for path in files:
        with spoiled(path, how):
            now, error = outcome(reader, root)
        if error:
            assert path.stem.split(".")[0] in error, f"{path} is {how}, the error does not say so: {error}"
            named += 1
        for split, part in now.items():
            kept = [sum(same(batch, before) for before in items[split]) for batch in part]
            if how == "missing":
                kept = [
                    k or any(part_of(b, before) for before in items[split]) for k, b in zip(kept, part, strict=True)
                ]
            whole = len(part) == len(items[split]) or how == "missing"
            assert all([*kept, whole]), f"{path} is {how}, and the data of {split} have silently changed"
    assert named or not files


def test_the_seed_decides_the_synthetic_set(reader: ModuleType, items, tmp_path: Path) -> None:
    split = reader.SPLITS[-1]
    reader.fake(tmp_path)
    data = reader.build(root=tmp_path, split=split)
    assert all(same(data[i], batch) for i, batch in enumerate(items[split]))
