"""Quantisers: what comes back is near what went in, no data stays no data, and unknown names are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from everysat.store import quantise
from everysat.store.quantise import METHODS, Quantiser, fit, from_dict, get, measure


def clusters(n: int = 600, dim: int = 32, seed: int = 0) -> np.ndarray:
    """Unit vectors around 20 centres, as land cover makes them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, dim))[rng.integers(0, 20, n)] + 0.4 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def made(name: str, x: np.ndarray) -> Quantiser:
    return fit(name, x, **({"k": 12} if name in ("pca-int8/1", "prefix/1") else {}))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("name", METHODS)
def test_no_data_and_nothing_else_is_no_data(name):
    x = clusters()
    x[[0, 7]] = np.nan
    x[9, 3] = np.nan  # a vector of which a number is missing is none
    rule = made(name, x)
    codes, scale = rule.encode(x)
    assert codes.shape == (600, rule.width)
    assert codes.dtype == rule.dtype
    assert (scale is not None) == rule.scaled
    seen = rule.valid(codes, scale)
    assert np.flatnonzero(~seen).tolist() == [0, 7, 9]
    back = rule.decode(codes, scale)
    assert back.dtype == np.float32
    assert back.shape == (600, rule.out_dim)
    assert (np.isnan(back).all(1) == ~seen).all()
    assert np.isfinite(back[seen]).all()
    assert codes.nbytes + (0 if scale is None else scale.nbytes) == 600 * rule.bytes_per_vector


@pytest.mark.parametrize("name", METHODS)
def test_description_makes_the_same_quantiser(name):
    x = clusters()
    rule = made(name, x)
    again = from_dict(rule.to_dict(), rule.arrays())
    assert type(again) is type(rule)
    for one, two in zip(rule.encode(x), again.encode(x), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(rule.decode(*rule.encode(x)), again.decode(*again.encode(x)))


vectors = arrays(
    np.float32, st.tuples(st.integers(1, 6), st.just(9)), elements=st.floats(-(2.0**15), 2.0**15, width=32)
)


@given(vectors)
@settings(max_examples=60, deadline=None)
def test_linear_errs_by_half_a_step(x):
    rule = get("int8-linear/1", 9)
    codes, scale = rule.encode(x)
    assert codes.min() >= -127
    error = np.abs(rule.decode(codes, scale) - x).max(1)
    # Rows of subnormal numbers become 0.
    assert (error <= np.abs(x).max(1) / 254 * (1 + 1e-5) + 127 * np.finfo(np.float32).tiny).all()


@given(vectors)
@settings(max_examples=60, deadline=None)
def test_encoding_what_was_decoded_changes_nothing(x):
    for name in ("float32/1", "float16/1", "int8-linear/1", "binary/1"):
        rule = get(name, 9)
        once = rule.decode(*rule.encode(x))
        np.testing.assert_allclose(rule.decode(*rule.encode(once)), once, rtol=1e-6, atol=1e-30)


@given(arrays(np.float32, (4, 9), elements=st.floats(-1, 1, width=32)))
@settings(max_examples=60, deadline=None)
def test_square_errs_by_half_a_step_of_the_root(x):
    x = unit(x[np.linalg.norm(x, axis=1) > 0.1])
    rule = get("int8-square/1", 9)
    back = rule.decode(*rule.encode(x))
    root = np.sqrt(np.abs(x)) * 127.5
    # The root is a code off by a half, or by up to 0.5 at the end, where 127.5 is cut to 127.
    bound = ((root + 0.5) ** 2 - root**2) / 127.5**2
    assert (np.abs(back - x) <= bound + 1e-6).all()
    assert (np.sign(back) * np.sign(x) >= 0).all()


def test_square_is_the_published_rule():
    rule = get("int8-square/1", 4)
    codes = np.array([[127, -127, 64, 0], [-128, -128, -128, -128], [1, -1, 2, -2]], np.int8)
    back = rule.decode(codes)
    expected = np.sign(codes[[0, 2]]) * (np.abs(codes[[0, 2]].astype(float)) / 127.5) ** 2
    np.testing.assert_allclose(back[[0, 2]], expected, rtol=1e-6)
    assert np.isnan(back[1]).all()
    every = np.arange(-127, 128, dtype=np.int8)
    lone = quantise.Int8Square(1)
    np.testing.assert_array_equal(lone._encode(lone.decode(every[:, None]), np.zeros(255, bool))[0].ravel(), every)


def test_square_refuses_vectors_of_other_length():
    with pytest.raises(ValueError, match=r"unit vectors, these have lengths 2 to 2"):
        get("int8-square/1", 4).encode(np.ones((3, 4), np.float32))


def test_linear_reading_of_square_codes_would_be_wrong():
    x = clusters()
    codes = get("int8-square/1", 32).encode(x)[0]
    right = get("int8-square/1", 32).decode(codes)
    linear = codes / 127.5
    assert np.abs(np.linalg.norm(right, axis=1) - 1).max() < 0.02
    assert np.linalg.norm(linear, axis=1).min() > 1.5


def test_binary_keeps_signs_and_the_best_length():
    x = clusters(dim=19)
    rule = get("binary/1", 19)
    codes, scale = rule.encode(x)
    assert codes.shape == (600, 3)
    back = rule.decode(codes, scale)
    assert (np.sign(back) == np.where(x > 0, 1, -1)).all()
    signs = np.where(x > 0, 1, -1)
    best = (signs * x).sum(1) / 19  # least squares
    np.testing.assert_allclose(scale, best, rtol=1e-5)


def test_pca_of_all_components_is_nearly_exact_and_fewer_are_the_best_plane():
    x = clusters()
    full = fit("pca-int8/1", x, k=32)
    np.testing.assert_allclose(full.components @ full.components.T, np.eye(32), atol=1e-5)
    assert np.abs(full.decode(*full.encode(x)) - x).max() < 0.05
    few = fit("pca-int8/1", x, k=8)
    error = np.square(few.decode(*few.encode(x)) - x).sum()
    spread = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert error == pytest.approx(np.square(spread[8:]).sum(), rel=0.01)
    # Distances of codes are distances of decoded vectors, which a search may use.
    codes, scale = few.encode(x)
    short = codes * scale[:, None]
    np.testing.assert_allclose(
        np.linalg.norm(short[:50] - short[50:100], axis=1),
        np.linalg.norm(few.decode(codes, scale)[:50] - few.decode(codes, scale)[50:100], axis=1),
        rtol=1e-4,
    )
    assert fit("pca-int8/1:8", x).width == 8
    x[3] = np.nan
    assert np.isfinite(fit("pca-int8/1", x, k=8).mean).all()


def test_prefix_is_of_unit_length():
    x = clusters() * 7
    rule = get("prefix/1", 32, k=10)
    assert rule.out_dim == 10
    back = rule.decode(*rule.encode(x))
    assert np.abs(np.linalg.norm(back, axis=1) - 1).max() < 0.01
    np.testing.assert_allclose(back, unit(x[:, :10]), atol=0.01)
    assert get("prefix/1:10", 32) == rule
    zero = np.zeros((1, 32), np.float32)
    assert (rule.decode(*rule.encode(zero)) == 0).all()


@pytest.mark.parametrize("name", ["float32/1", "float16/1", "int8-linear/1", "pca-int8/1", "binary/1"])
def test_zero_vectors_are_data(name):
    x = np.concatenate([np.zeros((1, 32), np.float32), clusters(40)])
    rule = made(name, x)
    back = rule.decode(*rule.encode(x))
    assert np.isfinite(back).all()
    if name not in ("pca-int8/1",):
        assert (back[0] == 0).all()


def test_half_precision_ends():
    rule = get("float16/1", 2)
    back = rule.decode(*rule.encode(np.array([[65504, 1e-3]], np.float32)))
    np.testing.assert_allclose(back, [[65504, 1e-3]], rtol=2**-11)
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        rule.encode(np.array([[70000, 0]], np.float32))


@pytest.mark.parametrize("name", METHODS)
def test_bad_input(name):
    x = clusters()
    rule = made(name, x)
    with pytest.raises(ValueError, match=r"expects \[n, 32\]"):
        rule.encode(x[:, :5])
    with pytest.raises(ValueError, match="infinite"):
        rule.encode(np.where(np.arange(32) == 3, np.inf, x))
    with pytest.raises(ValueError, match="codes has shape"):
        rule.decode(np.zeros((3, rule.width + 1), rule.dtype))
    if rule.scaled:
        with pytest.raises(ValueError, match="needs scale"):
            rule.decode(np.zeros((3, rule.width), rule.dtype))
    none = rule.encode(x[:0])
    assert rule.decode(*none).shape == (0, rule.out_dim)


def test_unknown_names_and_options():
    with pytest.raises(LookupError, match=r"Did you mean int8-linear/1.*Known: binary/1"):
        get("int8-linear/7", 8)
    with pytest.raises(LookupError, match="Known: binary/1, float16/1"):
        from_dict({"name": "percentile-4bit/1", "dim": 8})
    with pytest.raises(ValueError, match=r"fit\('pca-int8/1'"):
        get("pca-int8/1", 8)
    with pytest.raises(ValueError, match="does not take these options: k"):
        get("int8-linear/1", 8, k=3)
    with pytest.raises(ValueError, match="between 1 and"):
        get("prefix/1", 8, k=9)
    with pytest.raises(ValueError, match="at most the smaller"):
        fit("pca-int8/1", clusters(20), k=21)
    with pytest.raises(ValueError, match="k=many"):
        fit("pca-int8/1:many", clusters(20))
    with pytest.raises(ValueError, match="at least one number"):
        get("float32/1", 0)


def test_measured_cost_is_what_a_search_loses():
    x = clusters(800)
    told = {name: measure(made(name, x), x) for name in METHODS}
    assert told["float32/1"] == {
        "relative_l2": 0.0,
        "cosine": 1.0,
        "recall_at_10": 1.0,
        "sample": 800,
        "bytes_per_vector": 128,
    }
    assert told["int8-linear/1"]["relative_l2"] < 0.01
    assert told["int8-linear/1"]["recall_at_10"] > 0.95
    assert told["int8-square/1"]["recall_at_10"] > 0.9
    assert 0.2 < told["binary/1"]["recall_at_10"] < told["int8-square/1"]["recall_at_10"]
    # By hand, for one row and the method that loses most.
    rule = made("binary/1", x)
    back = unit(rule.decode(*rule.encode(x)))
    hits = []
    for row in range(800):
        truth, guess = x @ x[row], back @ back[row]
        truth[row] = guess[row] = -9
        best = set(np.argsort(-truth)[:10])
        hits.append(
            np.mean([truth[i] >= truth[list(best)].min() - 1e-6 for i in np.argsort(-guess, kind="stable")[:10]])
        )
    # Equal scores of binary vectors may fall either way.
    assert measure(rule, x, queries=800)["recall_at_10"] == pytest.approx(np.mean(hits), abs=0.03)


def test_cost_of_few_vectors():
    rule = get("int8-linear/1", 32)
    assert measure(rule, clusters(5))["recall_at_10"] is None
    assert measure(rule, np.full((4, 32), np.nan))["sample"] == 0
    same = np.repeat(clusters(1), 30, axis=0)
    assert measure(rule, same)["recall_at_10"] == 1.0, "equally similar ones count alike"
