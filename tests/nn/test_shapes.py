"""Transforms of shapes against sums over fine grids and against the laws of the Fourier transform; sets of shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
import shapely.affinity
import torch
from shapely.geometry import LineString, MultiPoint, MultiPolygon, Point, Polygon, box

from everysat.data import berlin
from everysat.io.vector import load_frame
from everysat.nn.shapes import ShapeSet, Spectra, below, features, frequencies, said, spoken, transform
from everysat.types import Batch, Place, Vector

FREQUENCY = frequencies(400.0, 12.0, 5)
HOLED = Polygon(
    [(5, 3), (62, 8), (70, 55), (30, 40), (8, 60)], [[(20, 15), (20, 30), (35, 28)], [(45, 20), (55, 22), (52, 35)]]
)
SHAPES = {
    "point": Point(13, 29),
    "points": MultiPoint([(3, 4), (40, 12), (17, 33)]),
    "line": LineString([(0, 0), (30, 10), (35, 44), (2, 50)]),
    "polygon": HOLED,
    "clockwise": Polygon(HOLED.exterior.coords[::-1], [ring.coords[::-1] for ring in HOLED.interiors]),
    "two": MultiPolygon([box(0, 0, 10, 20), box(30, 30, 44, 36)]),
}


def of(shape, frequency=FREQUENCY, **options) -> Spectra:
    return transform([shape], frequency, **options)


def summed(shape, frequency=FREQUENCY, step=0.1) -> torch.Tensor:
    """Sum over small squares (polygons) or short segments (lines), each at its middle."""
    if shape.area:
        left, top, right, bottom = shape.bounds
        x, y = np.meshgrid(np.arange(left, right, step) + step / 2, np.arange(top, bottom, step) + step / 2)
        at = np.stack([x.ravel(), y.ravel()], 1)[shapely.contains_xy(shape, x.ravel(), y.ravel())]
        weight = step**2
    elif shape.length:
        along = np.linspace(0, shape.length, 20_001)
        at = shapely.get_coordinates(shapely.line_interpolate_point(shape, (along[1:] + along[:-1]) / 2))
        weight = shape.length / 20_000
    else:
        at, weight = shapely.get_coordinates(shape), 1.0
    return torch.exp(-2j * math.pi * torch.from_numpy(at) @ frequency.T.to(torch.complex128)).sum(0) * weight


@pytest.mark.parametrize("name", SHAPES)
def test_transform_is_the_integral(name) -> None:
    shape = SHAPES[name]
    found = of(shape)
    size = {0: len(shapely.get_coordinates(shape)), 1: shape.length, 2: shape.area}[shapely.get_dimensions(shape)]
    assert found.measure.item() == pytest.approx(size, rel=1e-12)
    assert found.values[0, 0].real.item() == pytest.approx(size, rel=1e-12)
    torch.testing.assert_close(found.values[0], summed(shape), rtol=0, atol=2e-3 * size)


def test_the_way_round_is_irrelevant() -> None:
    torch.testing.assert_close(of(SHAPES["polygon"]).values, of(SHAPES["clockwise"]).values)
    line = SHAPES["line"]
    torch.testing.assert_close(of(line).values, of(LineString(line.coords[::-1])).values)


@pytest.mark.parametrize("name", SHAPES)
def test_translation_is_a_phase(name) -> None:
    shape, move = SHAPES[name], torch.tensor([731.0, -88.0], dtype=torch.float64)
    moved = of(shapely.affinity.translate(shape, *move.tolist())).values
    phase = torch.exp(-2j * math.pi * (FREQUENCY @ move))
    torch.testing.assert_close(moved, of(shape).values * phase, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(of(shape, origin_m=-move).values, moved, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", SHAPES)
def test_scale_law(name) -> None:
    """F of a shape s times as large at u is s^dimension F at s u."""
    shape, s = SHAPES[name], 2.5
    larger = of(shapely.affinity.scale(shape, s, s, origin=(0, 0))).values
    factor = s ** shapely.get_dimensions(shape)
    torch.testing.assert_close(larger, factor * of(shape, FREQUENCY * s).values, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", SHAPES)
def test_rotation_turns_frequencies(name) -> None:
    shape, angle = SHAPES[name], 0.7
    turned = of(shapely.affinity.rotate(shape, angle, origin=(0, 0), use_radians=True)).values
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    torch.testing.assert_close(turned, of(shape, FREQUENCY @ turn).values, rtol=1e-9, atol=1e-8)


def test_halves_sum_up_and_holes_are_taken_away() -> None:
    whole, left, right = (of(box(*b)).values for b in ((0, 0, 30, 20), (0, 0, 12, 20), (12, 0, 30, 20)))
    torch.testing.assert_close(whole, left + right)
    hole = box(5, 5, 9, 11)
    torch.testing.assert_close(of(box(0, 0, 30, 20).difference(hole)).values, whole - of(hole).values)


def test_a_rectangle_is_a_product_of_sincs() -> None:
    found = of(box(-4, -10, 4, 10)).values[0]
    expected = 8 * torch.sinc(8 * FREQUENCY[:, 0]) * 20 * torch.sinc(20 * FREQUENCY[:, 1])
    torch.testing.assert_close(found.real, expected, rtol=1e-9, atol=1e-9)
    assert found.imag.abs().max() < 1e-9


def test_low_frequencies_far_away_keep_their_digits() -> None:
    frequency = torch.tensor([[1e-7, 2e-7]], dtype=torch.float64)
    found = of(box(50_000, 50_000, 50_010, 50_010), frequency).values.abs()
    assert found.item() == pytest.approx(100.0, rel=1e-9)


def test_shapes_without_extent_are_what_is_left_of_them() -> None:
    flat, stub = Polygon([(0, 0), (10, 0), (5, 0)]), LineString([(3, 4), (3, 4)])
    found = transform([flat, stub, shapely.GeometryCollection([Point(0, 0), box(0, 0, 1, 2)])], FREQUENCY)
    assert found.kind.tolist() == [1, 0, 2]
    assert found.measure.tolist() == [20.0, 1.0, 2.0]
    torch.testing.assert_close(found.values[1], of(Point(3, 4)).values[0])


def test_frequencies_hold_one_of_each_pair() -> None:
    assert FREQUENCY.shape == ((11**2 + 1) // 2, 2)
    assert (FREQUENCY[0] == 0).all()
    both = torch.cat([FREQUENCY, -FREQUENCY[1:]])
    assert len(torch.unique(both, dim=0)) == 11**2
    sizes = FREQUENCY.abs()[FREQUENCY.abs() > 0]
    assert sizes.min().item() == pytest.approx(1 / 400)
    assert sizes.max().item() == pytest.approx(1 / 12)


def test_what_has_no_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="geometry 1 is an empty Polygon"):
        transform([Point(0, 0), Polygon()], FREQUENCY)
    with pytest.raises(ValueError, match="not finite"):
        of(LineString([(0, 0), (math.inf, 1)]))
    with pytest.raises(ValueError, match="shortest_m=20"):
        frequencies(10, 20, 4)
    assert transform([], FREQUENCY).values.shape == (0, len(FREQUENCY))


def test_tags_as_sentences() -> None:
    tags = {"land_use": "orchard", "name": None, "width": float("nan"), "note": " ", "building": "yes"}
    assert said(tags) == ["building is yes", "land use is orchard"]
    assert said(tags, ["building", "height"]) == ["building is yes"]


class Letters:
    """Counts of letters, of length 1: a text encoder for tests."""

    dim = 26

    def __call__(self, strings):
        counts = torch.tensor([[float(text.count(chr(97 + i))) for i in range(26)] for text in strings])
        return torch.nn.functional.normalize(counts.view(-1, 26), dim=1)


PLACES = (Place(100.0, 100.0),) * 3


def layer(order=None) -> Vector:
    shapes = [*SHAPES.values(), box(10, 10, 20, 30)]
    tags = [{"use": word} for word in ("tree", "trees", "road", "lake", "lake", "houses", "farm")]
    row = torch.tensor([2, 0, 2, 0, 2, 2, 0])
    every = Vector(tuple(shapes), tuple(tags), torch.zeros(7, 2), row)
    return every if order is None else every.obs(order)


def read(module, vector, places=PLACES):
    return module(features(vector, places, FREQUENCY, Letters()), len(places))


@pytest.fixture
def module() -> ShapeSet:
    torch.manual_seed(0)
    return ShapeSet(len(FREQUENCY), 26, 16).eval()


def test_sets_have_no_order_and_places_do_not_mix(module) -> None:
    x, there = read(module, layer())
    assert there.tolist() == [True, False, True]
    assert (x[1] == 0).all()
    shuffled, _ = read(module, layer(torch.tensor([6, 2, 4, 0, 1, 3, 5])))
    torch.testing.assert_close(shuffled, x, rtol=1e-4, atol=1e-5)
    for row in (0, 2):
        mine = Batch.cat([Batch(PLACES, {"osm": layer()})])[row]
        torch.testing.assert_close(read(module, mine.layers["osm"], PLACES[:1])[0][0], x[row], rtol=1e-4, atol=1e-5)


def test_what_a_shape_is_and_where_it_lies_matters(module) -> None:
    x, _ = read(module, layer())
    vector = layer()
    tags = ({"use": "zoo"}, *vector.attributes[1:])
    moved = (shapely.affinity.translate(vector.geometry[0], 20, 0), *vector.geometry[1:])
    for other in (
        Vector(vector.geometry, tags, vector.time_s, vector.row),
        Vector(moved, vector.attributes, vector.time_s, vector.row),
    ):
        found, _ = read(module, other)
        torch.testing.assert_close(found[0], x[0])
        assert not torch.allclose(found[2], x[2], atol=1e-4)


def test_every_parameter_of_a_set_learns(module) -> None:
    x, _ = read(module, layer())
    x.square().sum().backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


def test_no_shapes_at_all(module) -> None:
    x, there = read(module, layer(torch.zeros(0, dtype=torch.long)))
    assert x.shape == (3, 16)
    assert not there.any()


def test_polygons_that_cross_themselves_give_no_huge_numbers() -> None:
    bow = Polygon([(0, 0), (30, 30.001), (30, 0), (0, 30)])
    vector = Vector((bow,), ({},), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    found = features(vector, PLACES[:1], FREQUENCY, Letters())
    assert found.form.abs().max() < 3
    assert (found.tags == 0).all()


def test_land_use_of_a_real_town() -> None:
    """Polygons of OpenStreetMap near Berlin, some with holes and thousands of vertices: areas, and one transform against a sum over squares."""
    try:
        path = berlin.polygons()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    frame = load_frame(path)
    frame = frame.to_crs(frame.estimate_utm_crs())
    every = [shapely.affinity.translate(shape, -390_000, -5_800_000) for shape in frame.geometry]
    holed = min((s for s in every if shapely.get_num_interior_rings(shapely.get_parts(s)).sum()), key=lambda s: s.area)
    shapes = [holed, *every[:60]]
    frequency = frequencies(5000.0, 100.0, 3)
    found = transform(shapes, frequency)
    torch.testing.assert_close(found.measure, torch.tensor([shape.area for shape in shapes], dtype=torch.float64))
    assert (found.values.abs() <= found.measure[:, None] * (1 + 1e-9)).all()
    expected = summed(holed, frequency, math.sqrt(holed.area) / 150)
    torch.testing.assert_close(found.values[0], expected, rtol=0, atol=1e-2 * holed.area)


def test_points_lie_in_the_shapes_of_their_own_place():
    shapes = (box(0, 0, 10, 10), Polygon([(0, 0), (20, 0), (0, 20)]), box(0, 0, 10, 10), Point(5, 5))
    layer = Vector(shapes, ({},) * 4, torch.zeros(4, 2).double(), torch.tensor([0, 0, 1, 0]))
    row, south_east = torch.tensor([0, 0, 0, 1]), torch.tensor([[5.0, 5.0], [3.0, 15.0], [15.0, 15.0], [5.0, 5.0]])
    point, shape = below(layer, row, south_east)
    assert set(zip(point.tolist(), shape.tolist(), strict=True)) == {(0, 0), (0, 1), (1, 1), (3, 2)}
    assert [len(index) for index in below(layer, row[:0], south_east[:0])] == [0, 0]


def test_values_are_spoken_without_their_keys():
    assert spoken({"natural": "wood", "bridge": "yes", "lanes": 2}) == [
        "bridge is yes",
        "lanes is 2",
        "natural is wood",
        "wood",
    ]
