"""Laws of the values that flow: batches join and part again, order and dates survive, what is invalid has no effect."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from beartype import beartype
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Float64, Int64, jaxtyped
from shapely import Point
from torch import Tensor

from everysat import sensors
from everysat.sensors import Band, Sensor
from everysat.types import (
    ALWAYS,
    Batch,
    ContractError,
    Coords,
    Encoder,
    Features,
    Input,
    Place,
    Raster,
    Text,
    Tokens,
    Vector,
)

S2 = sensors.get("sentinel-2-l2a").select(["B02", "B04", "B08"])
DEM = sensors.get("copernicus-dem")
DAY_S = 86_400.0
LAYERS = ("s2", "dem", "fields", "caption")


@jaxtyped(typechecker=beartype)
def check_shapes(
    values: Float[Tensor, "obs band y x"],
    valid: Bool[Tensor, "obs band y x"],
    time_s: Float64[Tensor, "obs 2"],
    row: Int64[Tensor, " obs"],
    var: Float[Tensor, "obs band y x"] | None = None,
) -> None:
    """One set of sizes for all fields of a raster."""


def raster(
    sensor: Sensor, obs: int, height: int, width: int, seed: int, *, dated: bool = True, var: bool = False
) -> Raster:
    draw = torch.Generator().manual_seed(seed)
    shape = (obs, len(sensor.bands), height, width)
    start = torch.randint(0, 20_000, (obs, 1), generator=draw).double() * DAY_S
    made = Raster.of(
        sensor,
        torch.randn(shape, generator=draw),
        10.0,
        valid=torch.rand(shape, generator=draw) < 0.7,
        time_s=torch.cat([start, start + DAY_S], 1) if dated else None,
    )
    return replace(made, var=torch.rand(shape, generator=draw)) if var else made


def vector(n: int) -> Vector:
    time_s = torch.tensor([ALWAYS] * n, dtype=torch.float64).reshape(n, 2)
    things = tuple(Point(i, i) for i in range(n)), tuple({"id": i} for i in range(n))
    return Vector(*things, time_s, torch.zeros(n, dtype=torch.int64))


def text(n: int) -> Text:
    return Text(tuple(f"word {i}" for i in range(n)), ("caption",) * n, torch.zeros(n, dtype=torch.int64))


@st.composite
def singles(draw: st.DrawFn) -> Batch:
    """A batch of one place with some layers, each with at least one observation."""
    seed, height, width = draw(st.integers(0, 2**31)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    count = {name: draw(st.integers(0, 3)) for name in LAYERS}
    layers: dict[str, Any] = {
        "s2": raster(S2, count["s2"], height, width, seed),
        "dem": raster(DEM, min(1, count["dem"]), height, width, seed + 1, dated=False),
        "fields": vector(count["fields"]),
        "caption": text(count["caption"]),
    }
    return Batch((Place(10.0 * height, 10.0 * width),), {name: layers[name] for name in LAYERS if count[name]})


def same(a: Any, b: Any) -> bool:
    """Whether two layers or batches are equal, up to invalid pixels added at the south and east of ``b``."""
    if isinstance(a, Batch):
        return (
            a.places == b.places
            and a.layers.keys() == b.layers.keys()
            and all(same(a.layers[n], b.layers[n]) for n in a.layers)
        )
    if not torch.equal(a.row, b.row):
        return False
    if isinstance(a, Text):
        return a.strings == b.strings and a.role == b.role
    if isinstance(a, Vector):
        return a.geometry == b.geometry and a.attributes == b.attributes and torch.equal(a.time_s, b.time_s)
    height, width = a.values.shape[2:]
    added = b.valid.clone()
    added[:, :, :height, :width] = False
    cut = b.values[:, :, :height, :width], b.valid[:, :, :height, :width]
    return (
        a.sensor == b.sensor
        and a.gsd_m == b.gsd_m
        and torch.equal(a.time_s, b.time_s)
        and torch.equal(a.values, cut[0])
        and torch.equal(a.valid, cut[1])
        and not added.any()
    )


# ---------------------------------------------------------------------------------------------------------------- batches


@settings(deadline=None)
@given(st.lists(singles(), max_size=4))
def test_joined_batches_part_again(parts: list[Batch]) -> None:
    """Also with different numbers of dates, layers that are missing here and there, and images of different sizes."""
    joined = Batch.cat(parts)
    assert len(joined) == len(parts)
    assert set(joined.layers) == {name for part in parts for name in part.layers}
    for index, part in enumerate(parts):
        assert same(part, joined[index])
        assert same(part, joined[index - len(parts)])
    assert same(joined, Batch.cat(joined))
    for layer in joined.layers.values():
        if isinstance(layer, Raster):
            check_shapes(layer.values, layer.valid, layer.time_s, layer.row)


@settings(deadline=None)
@given(singles(), singles(), singles())
def test_joining_is_associative_and_empty_is_neutral(a: Batch, b: Batch, c: Batch) -> None:
    assert same(Batch.cat([Batch.cat([a, b]), c]), Batch.cat([a, Batch.cat([b, c])]))
    assert same(Batch.cat([a, Batch(()), b]), Batch.cat([a, b]))
    assert len(Batch.cat([])) == 0


@settings(deadline=None)
@given(st.lists(singles(), min_size=1, max_size=4))
def test_dates_keep_their_order(parts: list[Batch]) -> None:
    dates = [part.raster("s2").time_s for part in parts if "s2" in part.layers]
    assume(dates)
    assert torch.equal(Batch.cat(parts).raster("s2").time_s, torch.cat(dates))


@settings(deadline=None)
@given(singles(), st.sets(st.sampled_from(LAYERS)))
def test_only_without_and_adding(batch: Batch, chosen: set[str]) -> None:
    assert set(batch.only(*chosen).layers) == set(batch.layers) & chosen
    assert set(batch.without(*chosen).layers) == set(batch.layers) - chosen
    assert same(batch.only(*chosen).adding(**batch.without(*chosen).layers).only(*batch.layers), Batch(batch.places, {
        **batch.only(*chosen).layers, **batch.without(*chosen).layers}))  # fmt: skip
    assert same(batch, batch.to("cpu"))


def test_a_smaller_image_is_padded_with_invalid_pixels() -> None:
    small, large = (
        Batch((Place(10.0 * n, 10.0 * n),), {"s2": Raster.of(S2, torch.ones(1, 3, n, n), 10)}) for n in (2, 3)
    )
    joined = Batch.cat([small, large])
    values, valid = joined.raster("s2").values, joined.raster("s2").valid
    assert values.shape == (2, 3, 3, 3)
    assert valid[0, :, :2, :2].all()
    assert valid[1].all()
    assert int(valid[0].sum()) == 3 * 4
    assert (joined.height_m, joined.width_m) == (30.0, 30.0)
    assert joined.places == (*small.places, *large.places)


def test_variance_travels_when_all_parts_have_it() -> None:
    a, b = (Batch((Place(20, 20),), {"s2": raster(S2, n, 2, 2, n, var=True)}) for n in (1, 2))
    var = Batch.cat([a, b]).raster("s2").var
    assert var is not None
    assert torch.equal(var[1:], b.raster("s2").var)  # type: ignore[arg-type]
    plain = b.adding(s2=replace(b.raster("s2"), var=None))
    assert Batch.cat([a, plain]).raster("s2").var is None


def test_joining_what_does_not_belong_together() -> None:
    place = (Place(20, 20),)
    one = Batch(place, {"x": raster(S2, 1, 2, 2, 0)})
    with pytest.raises(
        ValueError, match=r"mixes sentinel-2-l2a \(B04, B02\) and sentinel-2-l2a \(B02, B04, B08\).*same order"
    ):
        Batch.cat([one, Batch(place, {"x": raster(S2.select(["B04", "B02"]), 1, 2, 2, 0)})])
    with pytest.raises(ValueError, match=r"gsd_m 20.0 and 10.0; resample"):
        Batch.cat([one, Batch(place, {"x": replace(raster(S2, 1, 2, 2, 0), gsd_m=20.0)})])
    with pytest.raises(ValueError, match="'x' is of different kinds: Raster, Text"):
        Batch.cat([one, Batch(place, {"x": text(1)})])


def test_errors_of_a_batch_name_what_came() -> None:
    batch = Batch((Place(20, 20),), {"s2": raster(S2, 1, 2, 2, 0), "caption": text(1)})
    for index in (1, -2):
        with pytest.raises(IndexError, match=f"index {index} is outside a batch of 1"):
            batch[index]
    with pytest.raises(LookupError, match="no raster layer 's1'; it has s2, caption"):
        batch.raster("s1")
    with pytest.raises(LookupError, match="no raster layer 'caption'"):
        batch.raster("caption")
    for row in (-1, 1):
        with pytest.raises(ValueError, match=rf"'s2' has rows {row} to {row}, the batch has 1 places.*Batch\.cat"):
            batch.adding(s2=replace(batch.raster("s2"), row=torch.tensor([row])))
    with pytest.raises(ValueError, match="height_m=0"):
        Place(0, 10)
    with pytest.raises(ValueError, match="width_m=nan"):
        Place(10, math.nan)


# ---------------------------------------------------------------------------------------------------------------- rasters


def test_a_raster_of_values() -> None:
    values = torch.tensor([[1.0, math.nan], [math.inf, 4.0]]).expand(2, 3, 2, 2)
    made = Raster.of(S2, values, 10)
    check_shapes(made.values, made.valid, made.time_s, made.row)
    assert torch.equal(made.valid, torch.isfinite(values))
    assert torch.isfinite(made.values).all()
    assert made.time_s.tolist() == [list(ALWAYS)] * 2
    masked = Raster.of(S2, values, 10, valid=torch.tensor([[True, True], [True, False]]))
    assert torch.equal(masked.valid, torch.tensor([[True, False], [False, False]]).expand(2, 3, 2, 2))
    codes = Raster.of(DEM, torch.tensor([[[[7, 8]]]]), 10)
    assert codes.values.tolist() == [[[[7.0, 8.0]]]]
    assert codes.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 2)}, r"values has shape \(2, 2\), expected \[obs, band, y, x\]"),
        ({"valid": torch.ones(1, 3, 2, 1, dtype=torch.bool)}, r"valid has shape \(1, 3, 2, 1\), expected \(1, 3, 2, 2\)"),
        ({"time_s": torch.zeros(2, 2)}, r"time_s has shape \(2, 2\), expected \(1, 2\)"),
        ({"row": torch.zeros(2)}, r"row has shape \(2,\), expected \(1,\)"),
        ({"sensor": DEM}, "values has 3 bands, sensor copernicus-dem lists 1: elevation"),
    ],
)  # fmt: skip
def test_a_raster_that_does_not_fit_itself(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(raster(S2, 1, 2, 2, 0), **change)


def test_a_batch_tells_what_is_in_it_and_not_its_numbers() -> None:
    raster = Raster.of(S2, torch.arange(12.0).view(1, 3, 2, 2), gsd_m=10.0, time_s=[[0.0, 86400.0]])
    text = repr(Batch((Place(20.0, 20.0),), {"image": raster}))
    assert text.splitlines()[0] == "Batch: 1 place of 20 x 20 m"
    for part in (
        "image",
        S2.name,
        "1 obs of 3 bands",
        "2 x 2 px of 10 m",
        "0 to 11",
        "100% valid",
        "1970-01-01 to 1970-01-02",
    ):
        assert part in text
    assert "nothing valid" in repr(Raster.of(S2, torch.full((1, 3, 2, 2), torch.nan), gsd_m=10.0))
    assert len(repr(Batch.cat([Batch((Place(20.0, 20.0),), {"image": raster})] * 50))) < 400


def test_times_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="ends before it starts"):
        Raster.of(S2, torch.zeros(1, 3, 1, 1), 10, time_s=[(2.0, 1.0)])
    with pytest.raises(ValueError, match=r"time_s has shape \(1, 2\), expected \(2, 2\)"):
        Raster.of(S2, torch.zeros(2, 3, 1, 1), 10, time_s=[(1.0, 2.0)])


@given(st.permutations(S2.names), st.integers(1, 3))
def test_select_takes_values_mask_and_variance_along(order: list[str], keep: int) -> None:
    whole = raster(S2, 2, 2, 3, 5, var=True)
    part = whole.select(order[:keep])
    check_shapes(part.values, part.valid, part.time_s, part.row, part.var)
    for i, name in enumerate(order[:keep]):
        j = S2.names.index(name)
        assert torch.equal(part.values[:, i], whole.values[:, j])
        assert torch.equal(part.valid[:, i], whole.valid[:, j])
        assert part.var is not None
        assert whole.var is not None
        assert torch.equal(part.var[:, i], whole.var[:, j])
    assert torch.equal(whole.select(["red"]).values, whole.values[:, 1:2]), "aliases work"
    with pytest.raises(LookupError, match="has no band 'B03'"):
        whole.select(["B03"])


@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_obs_picks_by_mask_or_index(keep: list[bool]) -> None:
    mask = torch.tensor(keep)
    index = mask.nonzero()[:, 0]
    for whole in (raster(S2, 4, 1, 2, 3, var=True), vector(4), text(4)):
        numbered = replace(whole, row=torch.arange(4))
        picked = numbered.obs(mask)
        assert picked.row.tolist() == index.tolist()
        assert same(picked, numbered.obs(index))
        assert same(numbered, numbered.obs(torch.arange(4)))


# --------------------------------------------------------------------------------------------------------- tokens, features


def coords(row: Tensor, cells: Tensor, size_m: float) -> Coords:
    n = len(row)
    at_m = (cells + 0.5) * size_m
    return Coords(
        row,
        at_m,
        torch.full((n,), size_m),
        torch.tensor([ALWAYS] * n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.int64),
    )


@st.composite
def features(draw: st.DrawFn) -> Features:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    size_m = draw(st.sampled_from([0.2, 2.0, 10.0, 30.0, 333.3]))
    everywhere = torch.cartesian_prod(*(torch.arange(n) for n in shape))
    keep = torch.tensor(draw(st.lists(st.booleans(), min_size=len(everywhere), max_size=len(everywhere))))
    assume(bool(keep.any()))
    mixed = everywhere[keep][
        torch.randperm(int(keep.sum()), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    ]
    places = tuple(Place(shape[1] * size_m, shape[2] * size_m) for _ in range(shape[0]))
    mean = torch.randn(len(mixed), 5, generator=torch.Generator().manual_seed(1))
    return Features(mean, coords(mixed[:, 0], mixed[:, 1:], size_m), torch.zeros(shape[0], 5), places)


@settings(deadline=None)
@given(features())
def test_a_grid_holds_each_token_in_its_cell_and_nan_elsewhere(made: Features) -> None:
    image = made.grid()
    height, width = round(made.places[0].height_m / float(made.coords.size_m[0])), round(
        made.places[0].width_m / float(made.coords.size_m[0]))  # fmt: skip
    assert image.shape == (len(made.places), 5, height, width)
    cells = made.coords.cells()
    assert torch.equal(image[made.coords.row, :, cells[:, 0], cells[:, 1]], made.mean)
    assert int(torch.isfinite(image).all(1).sum()) == len(made.mean)


@given(st.integers(0, 10_000), st.sampled_from([0.2, 2.0, 10.0, 20.0, 333.3]))
def test_cells_of_centres_are_exact_far_from_the_corner(cell: int, size_m: float) -> None:
    made = coords(torch.zeros(1, dtype=torch.int64), torch.tensor([[cell, 3]]), size_m)
    assert made.cells().tolist() == [[cell, 3]]


def test_features_that_form_no_grid() -> None:
    row, cells = torch.zeros(2, dtype=torch.int64), torch.tensor([[0, 0], [0, 1]])
    made = Features(torch.ones(2, 3), coords(row, cells, 10), torch.zeros(1, 3), (Place(10, 20),))
    with pytest.raises(ValueError, match="no tokens"):
        replace(made, mean=made.mean[:0], coords=made.coords[torch.tensor([], dtype=torch.int64)]).grid()
    with pytest.raises(ValueError, match="different sizes"):
        replace(made, coords=replace(made.coords, size_m=torch.tensor([10.0, 20.0]))).grid()
    with pytest.raises(ValueError, match="several tokens lie in one cell"):
        replace(made, coords=coords(row, cells[[0, 0]], 10)).grid()


def test_tokens_are_masked_by_indexing() -> None:
    where = coords(torch.tensor([0, 0, 1]), torch.tensor([[0, 0], [0, 1], [0, 0]]), 10)
    tokens = Tokens(torch.arange(3.0)[:, None], where, ("s2",), (Place(10, 20), Place(10, 20)), {"kept": 1})
    kept = tokens[torch.tensor([True, False, True])]
    assert len(tokens) == len(where) == 3
    assert kept.x.flatten().tolist() == [0.0, 2.0]
    assert kept.coords.row.tolist() == [0, 1]
    assert (kept.places, kept.memo, kept.groups) == (tokens.places, tokens.memo, tokens.groups)
    again = Coords.cat([where[:1], where[1:]])  # type: ignore[misc]
    assert all(torch.equal(getattr(again, n), getattr(where, n)) for n in ("row", "at_m", "size_m", "time_s", "group"))


# --------------------------------------------------------------------------------------------------------------- contract

CONTRACT = Input(S2.select(["B08", "B04"]), 10.0, (0.3, 0.1), (0.2, 0.05), dated=True)


def test_the_contract_brings_bands_into_its_order() -> None:
    given_ = raster(S2, 2, 2, 2, 0)
    fitted = CONTRACT.fit(given_, "s2")
    assert fitted.sensor.names == ("B08", "B04")
    assert torch.equal(fitted.values, given_.values[:, [2, 1]])
    assert CONTRACT.fit(fitted, "s2") is fitted
    named = Sensor(
        S2.name,
        "optical",
        tuple(replace(b, name=n, aliases=(b.name,)) for b, n in zip(S2.bands, "bgn", strict=True)),
        "me",
    )
    assert CONTRACT.fit(replace(given_, sensor=named), "s2").sensor.names == ("n", "g"), "found by alias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.select(["B02", "B04"]), r"'s2' \(sentinel-2-l2a: B02, B04\) lacks B08; .* expects B08, B04.*batch\.without\('s2'\)"),
        (lambda r: replace(r, sensor=replace(S2, bands=tuple(replace(b, unit="DN") for b in S2.bands))), "B08 is in DN, the model expects reflectance"),
        (lambda r: replace(r, sensor=replace(S2, name="sentinel-2-l1c")), r"is of sensor sentinel-2-l1c, the model expects sentinel-2-l2a"),
        (lambda r: replace(r, gsd_m=20.0), r"gsd_m=20, the model expects 10; read it with gsd_m=10"),
        (lambda r: replace(r, time_s=torch.tensor([ALWAYS] * 2).double()), r"every observation needs a date. Give times="),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_contract_is_an_error_with_the_way_out(change: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        CONTRACT.fit(change(raster(S2, 2, 2, 2, 0)), "s2")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.0,), (1.0, 1.0), "mean has 1 values for 2 bands"),
        ((0.0, 0.0), (1.0,), "std has 1 values for 2 bands"),
        ((0.0, 0.0), (1.0, 0.0), "must be positive"),
        ((0.0, 0.0), (1.0, math.nan), "must be positive"),
        ((0.0, math.nan), (1.0, 1.0), "must be finite"),
    ],
)  # fmt: skip
def test_a_contract_that_cannot_be(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Input(S2.select(["B08", "B04"]), 10.0, mean, std)


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e30, -7.0, math.inf, math.nan]))
def test_normalising_is_linear_and_blind_to_invalid_values(seed: int, junk: float) -> None:
    clean = CONTRACT.fit(raster(S2, 2, 2, 3, seed), "s2")
    out = CONTRACT.normalise(clean)
    dirty = replace(clean, values=torch.where(clean.valid, clean.values, junk))
    assert torch.equal(CONTRACT.normalise(dirty), out)
    back = out * torch.tensor(CONTRACT.std).view(1, 2, 1, 1) + torch.tensor(CONTRACT.mean).view(1, 2, 1, 1)
    assert torch.allclose(back[clean.valid], clean.values[clean.valid], atol=1e-6)
    assert not out[~clean.valid].any()


class Means(Encoder):
    """Mean of each band over all that was observed of a place: the least encoder there is."""

    family = "means"

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.dim, self.config = {"s2": CONTRACT}, 2, {}
        self.gain = torch.nn.Parameter(torch.ones(2))
        self.drop = torch.nn.Dropout(0.5)

    def tokenize(self, batch: Batch) -> Tokens:
        layer = CONTRACT.fit(batch.raster("s2"), "s2")
        where = coords(layer.row, torch.zeros(len(layer.row), 2), batch.places[0].height_m)
        return Tokens(CONTRACT.normalise(layer).mean((2, 3)), where, ("s2",), batch.places)

    def forward(self, tokens: Tokens) -> Features:
        x = self.drop(tokens.x * self.gain)
        summary = torch.zeros(len(tokens.places), 2).index_add(0, tokens.coords.row, x)
        return Features(x, tokens.coords, summary, tokens.places)


def test_embed_takes_one_raster_without_gradients_and_restores_the_mode() -> None:
    encoder, layer = Means(), raster(S2, 1, 2, 2, 0)
    made = encoder.embed(layer)
    assert made.places == (Place(20.0, 20.0),)
    assert not made.mean.requires_grad
    assert encoder.training
    assert torch.equal(made.mean, encoder.embed(Batch((Place(20, 20),), {"s2": layer})).mean), "no dropout"
    with pytest.raises(
        ContractError, match=r"no input of the model takes copernicus-dem at 10 m \(elevation\). It takes s2"
    ):
        encoder.embed(raster(DEM, 1, 2, 2, 0))
    with pytest.raises(ContractError, match="sentinel-2-l2a at 20 m"):
        encoder.layer_for(replace(layer, gsd_m=20.0))
    assert encoder.training, "also after an error"


def test_bands_are_values() -> None:
    assert Band("x", 10, "K") == Band("x", 10, "K")
    assert len({Band("x", 10, "K"), Band("x", 10, "K"), Band("y", 10, "K")}) == 2
