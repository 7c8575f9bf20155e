"""Parts are disjoint, complete, and far from each other where that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import box

from everysat.data.split import (
    autocorrelation_range_m,
    folds,
    label_fraction,
    leaks,
    refuse_leaks,
    spatial_blocks,
    unit_sphere_m,
)

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def rng(seed=0):
    return np.random.default_rng(seed)


def places(n=400, extent=10000.0, seed=1):
    return np.random.default_rng(seed).uniform(-extent, extent, (n, 2))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), block=st.sampled_from([800.0, 1500.0, 4000.0]))
def test_blocks_are_whole_and_the_split_complete(seed, block):
    xy = places(seed=seed)
    split = spatial_blocks(xy, block, SHARES, rng(seed))
    everything = np.sort(np.concatenate(list(split.values())))
    assert np.array_equal(everything, np.arange(len(xy)))
    blocks = {n: {tuple(b) for b in np.floor(xy[i] / block)} for n, i in split.items()}
    assert all(blocks[a].isdisjoint(blocks[b]) for a in blocks for b in blocks if a != b)
    total = sum(map(len, blocks.values()))
    assert all(abs(len(blocks[n]) - SHARES[n] * total) <= 1 for n in SHARES)


def test_the_generator_decides_and_every_part_gets_a_block():
    xy = places()
    a, b, c = (spatial_blocks(xy, 1500, SHARES, rng(s)) for s in (3, 3, 4))
    assert all(np.array_equal(a[n], b[n]) for n in SHARES)
    assert not all(np.array_equal(a[n], c[n]) for n in SHARES)
    three = np.array([[0.5, 0.5], [1.5, 0.5], [2.5, 0.5]])
    assert all(len(i) == 1 for i in spatial_blocks(three, 1.0, {"a": 0.98, "b": 0.01, "c": 0.01}, rng()).values())
    with pytest.raises(ValueError, match="too few for 3 parts; lower block_m"):
        spatial_blocks(three, 100.0, SHARES, rng())
    with pytest.raises(ValueError, match="without a finite position"):
        spatial_blocks([[np.nan, 0]], 1.0, SHARES, rng())


def test_a_buffer_keeps_training_away():
    xy = places()
    split = spatial_blocks(xy, 3000, SHARES, rng(), buffer_m=700)
    others = np.concatenate([split["val"], split["test"]])
    distance = np.linalg.norm(xy[split["train"]][:, None] - xy[others][None], axis=-1)
    assert distance.min() > 700
    whole = spatial_blocks(xy, 3000, SHARES, rng())
    assert 0 < len(split["train"]) < len(whole["train"])


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=6), fraction=st.floats(0.001, 1.0))
def test_a_fraction_of_every_class(counts, fraction):
    labels = np.repeat([f"c{i}" for i in range(len(counts))], counts)
    chosen = label_fraction(labels, fraction, rng())
    assert len(set(chosen.tolist())) == len(chosen)
    for i, count in enumerate(counts):
        assert (labels[chosen] == f"c{i}").sum() == min(count, max(1, round(fraction * count)))


def test_fraction_of_one_is_everything_and_zero_is_refused():
    assert np.array_equal(label_fraction([1, 2, 2, 1], 1.0, rng()), np.arange(4))
    with pytest.raises(ValueError, match="fraction=0"):
        label_fraction([1], 0, rng())


def test_official_folds():
    split = folds([1, 2, 3, 4, 5, 5], {"train": [1, 2, 3], "val": [4], "test": [5]})
    assert {n: i.tolist() for n, i in split.items()} == {"train": [0, 1, 2], "val": [3], "test": [4, 5]}
    with pytest.raises(ValueError, match="in several parts"):
        folds([1, 2], {"train": [1, 2], "test": [2]})
    with pytest.raises(ValueError, match="no place is in fold 7; there are 1, 2"):
        folds([1, 2], {"train": [1, 7]})


def test_overlap_across_parts_is_a_leak_touching_is_not():
    shapes = [box(0, 0, 10, 10), box(10, 0, 20, 10), box(9, 9, 19, 19), box(100, 100, 110, 110)]
    assert leaks(shapes, {"train": [0, 3], "test": [1]}) == []
    assert leaks(shapes, {"train": [0, 2], "test": [3]}) == []  # inside one part is none
    assert sorted(leaks(shapes, {"train": [0, 1], "test": [2, 3]})) == [
        ("train", 0, "test", 2),
        ("train", 1, "test", 2),
    ]
    assert leaks(shapes, {"train": [0], "val": [0]}) == [("train", 0, "val", 0)]
    with pytest.raises(ValueError, match="train 0 and test 2"):
        refuse_leaks(shapes, {"train": [0], "test": [2]})


@pytest.mark.parametrize("block_m", [500.0, 2000.0])
def test_the_range_is_that_of_the_field(block_m):
    """Classes of a checkerboard with random cells are alike within a cell alone."""
    at = places(3000)
    cell = np.floor(at / block_m).astype(int)
    value = np.random.default_rng(3).normal(size=(100, 100))[cell[:, 0] % 100, cell[:, 1] % 100]
    found = autocorrelation_range_m(at, value, rng())
    assert 0.3 * block_m < found < 3 * block_m


def test_noise_has_no_range_and_a_trend_has_all():
    at = places(1000)
    assert autocorrelation_range_m(at, np.random.default_rng(5).normal(size=1000), rng()) == 0
    assert autocorrelation_range_m(at, at[:, 0], rng()) > 5000
    with pytest.raises(ValueError, match="x_m has 2 places"):
        autocorrelation_range_m(at[:2], at[:2, 0], rng())


def test_distances_on_the_ball():
    a, b, c = unit_sphere_m(np.array([[0.0, 0.0], [0.0, 1.0], [180.0, 0.0]]))
    assert np.linalg.norm(a - b) == pytest.approx(111_194, rel=1e-3)
    assert np.linalg.norm(a - c) == pytest.approx(2 * 6.371e6)
