"""Detection: ideal maps give their points back, shifts and masks are kept, matching is the best there is, and it learns to count."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import Point, Polygon, box
from simple_encoder import SquareEncoder, image_batch, label_raster

from everysat.find import find
from everysat.nn.losses import heat_focal
from everysat.nn.mappers import Tasked
from everysat.tasks.detect import DEFINITIONS, Matched, build, heat_map, matching, peaks
from everysat.types import ALWAYS, Batch, Vector

SIZES = {"gsd_m": 10.0, "token_size_m": 20.0, "sigma_m": 8.0, "radius_m": 15.0}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SquareEncoder()


def task_of(encoder, **options):
    torch.manual_seed(1)
    return build(encoder=encoder, **{**SIZES, **options})


def vector(rows, geometries, kinds=None):
    attributes = tuple({} if kinds is None else {"class": kind} for kind in (kinds or geometries))
    times = torch.tensor([ALWAYS] * len(rows), dtype=torch.float64).reshape(-1, 2)
    return Vector(tuple(geometries), attributes, times, torch.tensor(rows, dtype=torch.long))


def scene(generator, rows=3, side=12, count=4, kinds=1):
    """Dark places in which an object is a bright pixel, at least three pixels from the next; its class is the band."""
    values, found, geometries, names = torch.rand(rows, 2, side, side, generator=generator) * 0.1, [], [], []
    for row in range(rows):
        cells = torch.randperm((side // 3) ** 2, generator=generator)[:count]
        for cell in cells.tolist():
            y, x = 1 + 3 * (cell // (side // 3)), 1 + 3 * (cell % (side // 3))
            kind = int(torch.randint(kinds, (), generator=generator))
            values[row, kind, y, x] = 1.5
            found.append(row)
            geometries.append(Point(10.0 * x + 5.0, 10.0 * y + 5.0))
            names.append("ab"[kind])
    return image_batch(values).adding(label=vector(found, geometries, names))


def fit(task, encoder, batch, generator, steps):
    optimiser = torch.optim.AdamW([*task.parameters(), *encoder.parameters()], lr=0.03)
    for _ in range(steps):
        terms = task(encoder, batch, generator)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
    return terms


def scores(task, encoder, batch):
    metrics = task.metrics()
    assert set(metrics) == set(DEFINITIONS)
    for metric in metrics.values():
        metric.update(*task.pairs(task.predict(encoder.embed(batch), batch), batch))
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def ideal(task, batch, height, width):
    """The prediction that a perfect head makes."""
    objects = task.objects(batch)
    n = len(task.names)
    heat = heat_map(objects, len(batch), n, 10.0, task.config["sigma_m"], height, width)
    offset = torch.zeros(len(batch), 2, height, width)
    for row, south, east, _ in objects.tolist():
        y, x = int(south // 10), int(east // 10)
        offset[int(row), :, y, x] = torch.tensor([south - 10 * y - 5, east - 10 * x - 5])
    valid = torch.ones(len(batch), n + 2, height, width, dtype=torch.bool)
    like = label_raster(torch.zeros(len(batch), 1, height, width), 10.0)
    return replace(like, sensor=task.sensor, values=torch.cat([heat, offset], 1), valid=valid)


@given(
    st.sets(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 4), st.integers(0, 1))), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_peaks_of_the_ideal_map_are_the_points(cells, seed):
    """Objects two pixels apart, anywhere in their pixels, of two classes in three places."""
    g = torch.Generator().manual_seed(seed)
    task = build(encoder=SquareEncoder(), classes=["a", "b"], **{**SIZES, "radius_m": 19.0})
    chosen = sorted(cells)
    shift = 0.1 + 9.8 * torch.rand(len(chosen), 2, generator=g).double()
    if len({c[:3] for c in chosen}) < len(chosen):  # one offset serves all classes of a pixel
        shift = torch.full_like(shift, 7.0)
    points = [
        Point(20.0 * x + dx, 20.0 * y + dy) for (_, y, x, _), (dy, dx) in zip(chosen, shift.tolist(), strict=True)
    ]
    batch = image_batch(torch.zeros(3, 2, 10, 10))
    batch = batch.adding(label=vector([c[0] for c in chosen], points, ["ab"[c[3]] for c in chosen]))
    found = task.points(ideal(task, batch, 10, 10))
    told = sorted(
        (row, p.y // 20, p.x // 20, "ab".index(a["class"]), p.y, p.x)
        for row, a, p in zip(found.row.tolist(), found.attributes, found.geometry, strict=True)
    )
    assert [t[:4] for t in told] == chosen
    for each, point in zip(told, points, strict=True):
        assert each[4:] == pytest.approx((point.y, point.x), abs=1e-3)
    assert len(found.geometry) == len(chosen)
    assert all(a["confidence"] == 1 for a in found.attributes)


def test_the_heat_is_the_largest_gaussian_by_hand():
    objects = torch.tensor([[0, 33.0, 41.0, 0], [0, 35.0, 65.0, 0], [0, -5.0, 5.0, 0]], dtype=torch.float64)
    heat = heat_map(objects, 1, 1, 10.0, 12.0, 6, 9)[0, 0]
    y, x = torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij")
    bells = [torch.exp(-((10.0 * (y - 3)) ** 2 + (10.0 * (x - at)) ** 2) / (2 * 12.0**2)) for at in (4, 6)]
    torch.testing.assert_close(heat, torch.maximum(*bells), atol=4e-4, rtol=0)  # cut off beyond 4 sigma
    assert (heat == 1).sum() == 2


def test_heat_focal_by_hand():
    logits, heat = torch.tensor([[0.0], [1.0], [-2.0]]), torch.tensor([[1.0], [0.6], [0.0]])
    p = logits.sigmoid().flatten().tolist()
    expected = -(
        (1 - p[0]) ** 2 * math.log(p[0]) + 0.4**4 * p[1] ** 2 * math.log(1 - p[1]) + p[2] ** 2 * math.log(1 - p[2])
    )
    assert heat_focal(logits, heat) == pytest.approx(expected, rel=1e-5)
    twice = torch.cat([logits, logits]), torch.cat([heat, heat])
    assert heat_focal(*twice) == pytest.approx(expected, rel=1e-5)  # over the number of peaks
    sure = torch.tensor([[40.0], [-40.0]])
    assert heat_focal(sure, torch.tensor([[1.0], [0.0]])) == 0
    empty = torch.zeros(0, 1, requires_grad=True)
    heat_focal(empty, empty.detach()).backward()
    assert not empty.grad.any()


def test_equal_neighbours_are_one_detection(encoder, generator):
    task = task_of(encoder)
    batch = image_batch(torch.zeros(1, 2, 6, 6)).adding(label=vector([], []))
    flat = ideal(task, batch, 6, 6)
    flat.values[:, 0] = 0.7
    assert [(p.x, p.y) for p in task.points(flat).geometry] == [(5.0, 5.0)]
    flat.values[:, 0, 5, 5] = 0.8
    assert len(task.points(flat).geometry) == 2
    assert len(peaks(flat, radius_m=9.0, threshold=0.75).geometry) == 1


def test_a_shift_by_a_token_shifts_the_detections(encoder, generator):
    batch = scene(generator, side=12).without("label")
    task = task_of(encoder, threshold=0.05)
    values = batch.raster("image").values
    moved = image_batch(torch.nn.functional.pad(values, (2, 0, 4, 0)))
    first, second = (task.detect(encoder.embed(b), b) for b in (batch, moved))
    first_at, second_at = (
        {(row, round(p.x, 3), round(p.y, 3)) for row, p in zip(v.row.tolist(), v.geometry, strict=True)}
        for v in (first, second)
    )
    shifted = {(row, round(x + 20.0, 3), round(y + 40.0, 3)) for row, x, y in first_at}
    far = {p for p in shifted if p[1] > 60 and p[2] > 80}  # beyond the reach of what was added
    assert far
    assert far == {p for p in second_at if p[1] > 60 and p[2] > 80}


def test_objects_are_found_and_counted(encoder, generator):
    batch = scene(generator, rows=4, kinds=2)
    batch = Batch.cat(
        [batch, image_batch(torch.rand(1, 2, 12, 12, generator=generator) * 0.1).adding(label=vector([], []))]
    )
    task = task_of(encoder, classes=["a", "b"], head="mlp")
    begun = task(encoder, batch, generator)
    terms = fit(task, encoder, batch, generator, 150)
    assert terms["loss"] < 0.2 * begun["loss"]
    assert terms["objects"] == 16
    found = scores(task, encoder, batch)
    assert found["f1"] > 0.95
    assert found["count_mae"] < 0.3
    held = scene(torch.Generator().manual_seed(9), rows=4, kinds=2)
    assert scores(task, encoder, held)["f1"] > 0.9
    points = task.detect(encoder.embed(held), held)
    truth = task.objects(held)
    first = np.array([[p.y, p.x] for p, r in zip(points.geometry, points.row.tolist(), strict=True) if r == 0])
    assert np.abs(first[:, None] - truth[truth[:, 0] == 0, 1:3].numpy()).sum(-1).min(1).max() < 3.0


def test_masked_ground_yields_nothing_and_costs_nothing(encoder, generator):
    batch = scene(generator)
    values, valid = batch.raster("image").values, torch.ones(3, 2, 12, 12, dtype=torch.bool)
    valid[:, :, :, :6] = False
    task = task_of(encoder, threshold=0.01)
    found = []
    for wrong in (0.0, 1e6):
        masked = image_batch(torch.where(valid, values, wrong), valid=valid).adding(label=batch.layers["label"])
        points = task.detect(encoder.embed(masked), masked)
        found.append([(row, p.x, p.y) for row, p in zip(points.row.tolist(), points.geometry, strict=True)])
        found.append(float(task(encoder, masked, generator)["loss"].detach()))
    assert found[:2] == found[2:]
    assert found[0]
    assert all(x >= 55 for _, x, _ in found[0])


def test_an_area_says_where_objects_were_looked_for(encoder, generator):
    """Outside of it nothing is learnt from or scored, whatever is there."""
    batch = scene(generator)
    looked = torch.zeros(3, 1, 12, 12)
    looked[:2, :, :6] = 1
    area = label_raster(looked, 10.0)
    task = task_of(encoder, area="searched", threshold=0.02)
    inside = [
        p.y < 60 and row < 2
        for p, row in zip(batch.layers["label"].geometry, batch.layers["label"].row.tolist(), strict=True)
    ]
    fewer = batch.layers["label"].obs(torch.tensor(inside))
    both = [batch.adding(searched=area, label=label) for label in (batch.layers["label"], fewer)]
    terms = [task(encoder, b, generator) for b in both]
    assert torch.equal(terms[0]["offset"], terms[1]["offset"])
    assert terms[0]["objects"] == terms[1]["objects"] == sum(inside)
    pairs = [task.pairs(task.predict(encoder.embed(b)), b) for b in both]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    found, real = pairs[0]
    assert real[real[:, 3] < 0, 0].tolist() == [0, 1]
    assert len(found)
    assert (found[:, 0] < 2).all()
    assert (found[:, 1] <= 60).all()
    part = scene(generator).adding(searched=area.obs(torch.tensor([], dtype=torch.long)))
    assert float(task(encoder, part, generator)["loss"].detach()) == 0


def test_geometries_count_by_their_centroids(encoder):
    shapes = [Point(31, 22), box(0, 10, 20, 20), Polygon([(40, 40), (60, 40), (40, 60)])]
    batch = image_batch(torch.zeros(2, 2, 8, 8)).adding(label=vector([0, 1, 1], shapes))
    found = task_of(encoder).objects(batch)
    torch.testing.assert_close(found[:, 1:3], torch.tensor([[22.0, 31], [15, 10], [140 / 3, 140 / 3]]).double())
    assert found[:, 0].tolist() == [0, 1, 1]


def test_instances_of_a_raster_are_objects(encoder, generator):
    codes = torch.zeros(2, 1, 8, 8)
    codes[0, 0, 1:3, 2:6] = 4
    codes[0, 0, 6, 6] = 9
    codes[1, 0, 3, 3] = 4
    valid = torch.ones_like(codes, dtype=torch.bool)
    valid[0, 0, 4:] = False
    batch = image_batch(torch.rand(2, 2, 8, 8, generator=generator)).adding(label=label_raster(codes, 10.0, valid))
    task = task_of(encoder, threshold=0.02)
    assert task.objects(batch).tolist() == [[0, 20, 40, 0], [1, 35, 35, 0]]
    found, real = task.pairs(task.predict(encoder.embed(batch)), batch)
    assert (real[:, 3] < 0).sum() == 2
    assert not ((found[:, 0] == 0) & (found[:, 1] > 40)).any()
    assert torch.isfinite(task(encoder, batch, generator)["loss"])


def test_classes_that_are_not_asked_for_are_background(encoder, generator):
    batch = scene(generator, kinds=2)
    only = task_of(encoder, classes=["b"])
    wanted = sum(a["class"] == "b" for a in batch.layers["label"].attributes)
    assert 0 < wanted < 12
    assert len(only.objects(batch)) == wanted
    assert only.sensor.names == ("b", "south", "east")
    nameless = batch.adding(label=replace(batch.layers["label"], attributes=({"kind": "b"},) * 12))
    with pytest.raises(LookupError, match="no attribute 'class' but kind"):
        only.objects(nameless)


def best_by_trying(found, real, match_m):
    """The most matches, and of those the least sum, over all partial matchings."""
    best = (0, 0.0)
    small, large = (found, real) if len(found) <= len(real) else (real, found)
    for order in itertools.permutations(range(len(large)), len(small)):
        d = [float((small[i] - large[j]).norm()) for i, j in enumerate(order)]
        near = [each for each in d if each <= match_m]
        best = min(best, (-len(near), sum(near)))
    return -best[0], best[1]


@given(st.integers(0, 5), st.integers(0, 5), st.floats(1, 60), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_matching_is_the_best_of_all(n, m, match_m, seed):
    g = torch.Generator().manual_seed(seed)
    found, real = (torch.rand(k, 2, generator=g, dtype=torch.float64) * 80 for k in (n, m))
    first, second = matching(found, real, match_m)
    assert len(set(first.tolist())) == len(first) == len(set(second.tolist()))
    d = (found[first] - real[second]).norm(dim=1)
    assert (d <= match_m).all()
    count, total = best_by_trying(found, real, match_m)
    assert len(first) == count
    assert float(d.sum()) == pytest.approx(total)


def test_two_matches_are_better_than_one_that_is_nearer():
    found, real = torch.tensor([[0.0, 0], [9, 0]]), torch.tensor([[9.0, 0], [18, 0]])
    assert [each.tolist() for each in matching(found, real, 9.5)] == [[0, 1], [0, 1]]
    assert [each.tolist() for each in matching(found, real, 8.5)] == [[1], [0]]


def test_metrics_by_hand():
    """Place 0: one right, one of the wrong class, one too far. Place 1: nothing, and nothing found. Place 2: two found for one."""
    nan = math.nan
    found = torch.tensor(
        [[0, 10, 10, 0, 0.9], [0, 50, 50, 1, 0.8], [0, 90, 90, 0, 0.7], [2, 5, 5, 0, 0.9], [2, 8, 8, 0, 0.5]]
    ).double()
    real = torch.tensor(
        [[0, nan, nan, -1], [1, nan, nan, -1], [2, nan, nan, -1], [0, 12, 10, 0], [0, 50, 50, 0], [2, 7, 5, 0]]
    ).double()
    expected = {
        "precision": 2 / 5,
        "recall": 2 / 3,
        "f1": 4 / 8,
        "count_mae": (1 + 0 + 1) / 3,
        "count_rmse": math.sqrt(2 / 3),
    }
    for name, value in expected.items():
        metric = Matched(name, 5.0)
        metric.update(found, real)
        assert float(metric.compute()) == pytest.approx(value), name
        parts = Matched(name, 5.0)
        for row in (0, 1, 2):
            parts.update(found[found[:, 0] == row], real[real[:, 0] == row])
        assert parts.compute() == metric.compute()
        nothing = Matched(name, 5.0)
        nothing.update(found[:0], real[1:2])
        assert nothing.compute() == 0


def test_a_map_is_of_heat_not_of_classes(encoder, generator):
    batch = scene(generator, kinds=2)
    task = task_of(encoder, classes=["a", "b"])
    mapper = Tasked(encoder, task, 10.0, 20.0, 0.0)
    assert not mapper.probabilistic
    torch.testing.assert_close(mapper(batch), task.predict(encoder.embed(batch)).values)


def test_the_task_is_rebuilt_from_its_config(encoder, generator):
    batch = scene(generator)
    for head in ("linear", "norm", "mlp", "upernet"):
        task = task_of(encoder, head=head, loss_options={"beta": 2.0}, local=["image"])
        heat = task_of(encoder, head=head).predict(encoder.embed(batch)).values[:, 0]
        assert 0.01 < float(heat.mean()) < 0.4
        again = build(encoder=encoder, **json.loads(json.dumps(task.config)))
        again.load_state_dict(task.state_dict())
        assert torch.equal(*(t.predict(encoder.embed(batch), batch).values for t in (task, again)))
    assert find("tasks", "detect")[0].build is build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_m": 0.0}, "sigma_m=0.0 must be positive"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"classes": "tree"}, "different names"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"offset_weight": 0.0}, "offset_weight=0.0"),
        ({"variant": "place"}, "no variant 'place'"),
        ({"head": "upernt"}, "Did you mean upernet"),
        ({"gsd_m": 15.0}, "not a multiple"),
        ({"loss_options": {"gamma": 2.0}}, "takes no option 'gamma'"),
    ],
)
def test_options_that_do_not_fit_are_refused(encoder, options, message):
    with pytest.raises((ValueError, LookupError, TypeError), match=message):
        build(**{"encoder": encoder, **SIZES, **options})


def test_a_batch_without_the_layer_is_refused(encoder, generator):
    with pytest.raises(LookupError, match="Places without objects have an empty Vector"):
        task_of(encoder)(encoder, scene(generator).without("label"), generator)


def test_real_outlines_become_objects(data_dir, generator):
    from everysat.data import geobench

    data = geobench.build("m4sar", root=data_dir / "geobench2_mini")
    place = data[1]
    encoder = SquareEncoder(40.0, 10.0)
    task = build(encoder=encoder, sigma_m=30.0, gsd_m=10.0, token_size_m=40.0, target="objects")
    objects = task.objects(place)
    assert len(objects) == len(place.layers["objects"].geometry) == 8
    assert (objects[:, 1:3] >= 0).all()
    assert (objects[:, 1:3] <= 5120).all()
    height, width = place.raster("rgb").values.shape[2:]
    told = task.points(ideal(task, place, height, width))
    first = torch.tensor([[p.y, p.x] for p in told.geometry])
    assert len(matching(first, objects[:, 1:3], 60.0)[0]) == len(first) > 0
