"""Change: none between a store and itself, found where it was made, and refused where stores cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from made_store import made_store, random_vectors, read_all

from everysat.store.change import change, same


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.fixture(scope="module")
def years(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, np.ndarray]:
    """Two years that differ by noise and a shift of all pixels, and in one rectangle altogether."""
    folder, rng = tmp_path_factory.mktemp("change"), np.random.default_rng(4)
    before = random_vectors()
    after = before + 0.05 * rng.normal(size=before.shape).astype(np.float32) + 0.1
    changed = np.zeros(before.shape[:2], bool)
    changed[20:26, 30:40] = True
    after[changed] = rng.normal(size=(60, before.shape[2]))
    after[0, 0] = np.nan
    after /= np.linalg.norm(after, axis=-1, keepdims=True)
    stores = [made_store(folder / f"{name}.zarr", x) for name, x in (("y23", before), ("y24", after))]
    return stores[0], stores[1], changed


@pytest.mark.parametrize("score", ["cosine", "robust"])
def test_a_store_does_not_differ_from_itself(years: Any, score: str, tmp_path: Path) -> None:
    found = change(years[0], years[0], tmp_path / "none.tif", score=score, threshold="mad", quiet=True)
    values = read(found.paths["score"])
    data = np.isfinite(read_all(years[0])).all(1).reshape(values.shape)
    assert (values[data] == 0).all()
    assert np.isnan(values[~data]).all()
    assert found.share == 0


def test_the_score_is_one_minus_cosine(years: Any, tmp_path: Path) -> None:
    before, after, _ = years
    values = read(change(before, after, tmp_path / "change.tif", quiet=True).paths["score"]).ravel()
    a, b = read_all(before), read_all(after)
    both = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    assert not both[0]
    np.testing.assert_allclose(values[both], 1 - (a * b).sum(1)[both], atol=1e-6)
    assert np.isnan(values[~both]).all()


@pytest.mark.parametrize("score", ["cosine", "robust"])
@pytest.mark.parametrize("threshold", ["mad", "otsu"])
def test_what_was_changed_is_found(years: Any, score: str, threshold: str, tmp_path: Path) -> None:
    before, after, changed = years
    found = change(before, after, tmp_path / "change.tif", score=score, threshold=threshold, quiet=True)
    mask, values = read(found.paths["changed"]), read(found.paths["score"])
    seen = np.isfinite(values)
    assert (mask[~seen] == 255).all()
    assert ((values > found.threshold) == (mask == 1))[seen].all()
    assert (mask[changed] == 1).mean() > 0.9
    assert (mask[seen & ~changed] == 1).mean() < 0.05
    assert found.share == pytest.approx((mask[seen] == 1).mean())
    with rasterio.open(found.paths["changed"]) as file:
        assert file.tags()["rule"] == threshold
        assert file.tags(1)["class_1"] == "changed"


def test_robust_takes_out_what_all_pixels_share(tmp_path: Path) -> None:
    before = random_vectors(seed=2)
    shift = np.zeros(16, np.float32)
    shift[3] = 0.4
    stores = [
        made_store(tmp_path / f"{i}.zarr", x, quantiser="float32/1") for i, x in enumerate((before, before + shift))
    ]
    plain = read(change(*stores, tmp_path / "a.tif", quiet=True).paths["score"])
    robust = read(change(*stores, tmp_path / "b.tif", score="robust", quiet=True).paths["score"])
    assert np.nanmedian(plain) > 0.02
    assert np.nanmedian(robust) == pytest.approx(1, abs=0.3), "1 is usual"


def test_a_given_threshold_and_a_wrong_one(years: Any, tmp_path: Path) -> None:
    before, after, _ = years
    assert change(before, after, tmp_path / "a.tif", threshold="0.25", quiet=True).threshold == 0.25
    for wrong in ("much", "nan"):
        with pytest.raises(ValueError, match="threshold="):
            change(before, after, tmp_path / "b.tif", threshold=wrong)
    with pytest.raises(LookupError, match="Did you mean robust"):
        change(before, after, tmp_path / "b.tif", score="robst")
    assert not (tmp_path / "b.tif").exists()


def test_stores_that_cannot_be_compared_are_both_named(years: Any, tmp_path: Path) -> None:
    before = years[0]
    x = random_vectors()
    for name, other, message in (
        ("shifted", made_store(tmp_path / "shifted.zarr", x, corner=(500_010.0, 5_000_000.0)), "different grids"),
        ("small", made_store(tmp_path / "small.zarr", x[:-1]), "different grids"),
        ("zone", made_store(tmp_path / "zone.zarr", x, crs="EPSG:32632"), "different grids"),
        ("model", made_store(tmp_path / "model.zarr", x, model={"name": "made", "weights": "abc"}), "different models"),
        ("dim", made_store(tmp_path / "dim.zarr", x[..., :8]), "different models"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            same(before, other)
        assert "y23.zarr" in str(error.value)
        assert f"{name}.zarr" in str(error.value)


def test_nothing_in_common_leaves_no_file(years: Any, tmp_path: Path) -> None:
    empty = made_store(tmp_path / "empty.zarr", np.full((40, 52, 16), np.nan, np.float32))
    for threshold in ("none", "mad"):
        with pytest.raises(ValueError, match=r"no pixel has data in both .*y23.zarr and .*empty.zarr"):
            change(years[0], empty, tmp_path / "change.tif", threshold=threshold, quiet=True)
        assert list(tmp_path.glob("*.tif*")) == []
