"""The benchmark of positions: scores and regressions are those of scikit-learn, folds share no block, names are taken out of texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score

from benchmarks import where
from everysat.collect.records import Article


def test_regression_on_all_strengths_at_once() -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(60, 5) * 3 + 1, torch.randn(60, 2), torch.rand(60) + 0.1
    fit = torch.arange(60) < 40
    for w in (None, weight):
        found = where._path(x, y, fit, ~fit, w)
        given = np.ones(40) if w is None else w[fit].numpy()
        scaled = (x / x[fit].std(0)).numpy()
        for i, strength in enumerate(where.STRENGTHS):
            ridge = Ridge(strength * given.sum()).fit(scaled[:40], y[fit].numpy(), sample_weight=given)
            np.testing.assert_allclose(found[i].numpy(), ridge.predict(scaled[40:]), atol=2e-4)


def test_scores_with_intervals() -> None:
    rng = np.random.default_rng(0)
    truth, block = rng.normal(size=300), rng.integers(0, 30, 300)
    near = truth + 0.5 * rng.normal(size=300)
    score, low, high = where._r2(truth, near, block)
    assert score == pytest.approx(r2_score(truth, near), abs=1e-3)
    assert low < score < high
    label = rng.integers(0, 4, 300)
    guess = np.where(rng.random(300) < 0.6, label, rng.integers(0, 4, 300))
    score, low, high = where._balanced(guess == label, label, block)
    assert score == pytest.approx(100 * balanced_accuracy_score(label, guess), abs=0.1)
    assert low < score < high
    median, low, high, share = where._kilometres(np.abs(truth) * 1000, block)
    assert median == round(float(np.median(np.abs(truth) * 1000)))
    assert low < median < high
    assert share == pytest.approx(100 * (np.abs(truth) < 1).mean(), abs=0.1)


def test_blocks_are_in_one_fold() -> None:
    lonlat = where.anywhere(5000, np.random.default_rng(0))
    fold, block = where.fold_of(lonlat, 0), where.blocks(lonlat)
    assert len(np.unique(np.stack([fold, block]), axis=1).T) == len(np.unique(block))
    assert set(fold) == set(range(where.FOLDS))
    assert (where.fold_of(lonlat, 1) != fold).any()
    corners = np.array([[-180.0, -90], [179.99, 89.99], [180, 90]])
    assert len(set(where.blocks(corners))) == 3
    assert len(where.fold_of(corners, 0)) == 3


def test_pictures_of_the_earth_are_read_at_positions(tmp_path) -> None:
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=1, height=18, width=36, dtype="uint16",
                       crs="EPSG:4326", transform=rasterio.Affine(10, 0, -180, 0, -10, 90)) as file:  # fmt: skip
        file.write(np.arange(18 * 36, dtype="uint16").reshape(1, 18, 36))
    found = where.at(str(tmp_path / "a.tif"), np.array([[-175.0, 85], [175, -85], [180, -90], [5, 5]]))
    assert found.tolist() == [0, 18 * 36 - 1, 17 * 36, 8 * 36 + 18]


def test_names_are_taken_out(tmp_path) -> None:
    facts = {
        "Geography": {"Geographic coordinates": {"text": "62 00 N, 10 00 E"}, "Climate": {"text": "Norway is cold; Norwegian fjords"}},
        "Government": {"Country name": {"conventional short form": {"text": "Norway"}, "local short form": {"text": "Norge"}}},
        "People and Society": {"Nationality": {"adjective": {"text": "Norwegian"}}},
    }  # fmt: skip
    (tmp_path / "europe").mkdir()
    (tmp_path / "europe" / "no.json").write_text(json.dumps(facts), encoding="utf-8")
    article = Article("Norway", (10, 62), (("Climate", "Norway is cold; Norwegian fjords"),), "en", "x", "y", "no")
    assert where._nameless(str(tmp_path), [article])[0].sections == (("Climate", "it is cold; it fjords"),)
