"""An exported file says what the model says, of any number of chips, and refuses what it is not for."""

from __future__ import annotations

import importlib.util
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from simple_encoder import SquareEncoder, image_batch
from torch import nn
from typer.testing import CliRunner

from everysat import exported
from everysat.cli import app
from everysat.find import find
from everysat.mapping.source import facts_of
from everysat.models import omnisat, weights
from everysat.nn.frozen import frozen
from everysat.nn.mappers import Dense, Tasked
from everysat.predict import predict
from everysat.tasks import classify
from everysat.types import Batch, ContractError, Place, Raster

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None,
    reason="needs onnx, onnxscript and onnxruntime: pip install 'everysat[export]'",
)
KINDS = [pytest.param("onnx", marks=needs_onnx), "pt2"]
S2 = {**omnisat.VARIANTS["tiny"]["modalities"]["s2"], "bands": ("B02", "B03"), "mean": (0.1, 0.2), "std": (0.1, 0.2)}
S2 |= {"widths": (16, 16), "out_widths": (16, 16)}


def encoder(seed: int = 0) -> omnisat.OmniSat:
    """Patches of 2 x 2 pixels of a series, chips of 3 x 3 patches."""
    torch.manual_seed(seed)
    model = omnisat.build("", grid=3, dim=16, depth=0, heads=4, patch_m=20, modalities={"s2": S2})
    for parameter in model.parameters():  # also those that begin at zero, so that all has an effect
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model.eval()


def task(model: omnisat.OmniSat) -> classify.Classify:
    torch.manual_seed(1)
    return classify.build("pixel", encoder=model, classes=("water", "forest", "city"), gsd_m=10.0).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of each kind: features as pt2, by the command line, and classes as onnx."""
    path = tmp_path_factory.mktemp("exported")
    weights.save(path / "m.safetensors", encoder())
    done = CliRunner().invoke(
        app, ["export", str(path / "m.safetensors"), "--obs", "s2=3", "-o", str(path / "model.pt2")]
    )
    assert done.exit_code == 0, done.output
    assert "differs from the model by" in done.output
    if importlib.util.find_spec("onnxruntime") is not None:
        model = encoder()
        exported.export((model, task(model)), path / "model.onnx", obs={"s2": 3})
    return path


def place(height: int = 12, width: int = 18, obs: int = 3, seed: int = 0) -> Batch:
    """A place of pixels of 10 m, with dates that differ by seed."""
    g = torch.Generator().manual_seed(seed)
    wanted = encoder().inputs["s2"]
    start = 1.6e9 + 86400.0 * torch.randint(0, 2000, (obs,), generator=g).double()
    raster = Raster.of(
        wanted.sensor,
        torch.rand(obs, 2, height, width, generator=g),
        10.0,
        time_s=torch.stack([start, start + 60], 1),
    )
    box = GeoBox((height, width), Affine(10, 0, 600000, 0, -10, 5000000), "EPSG:32633")
    return Batch((Place(10.0 * height, 10.0 * width, geobox=box),), {"s2": raster})


def mapper(kind: str) -> Dense | Tasked:
    """The model itself, mapping chip by chip."""
    model = encoder()
    if kind == "pt2":
        return Dense(model, 20.0, 20.0, chip_m=60.0, stride_m=60.0)
    return Tasked(model, task(model), 10.0, align_m=60.0, halo_m=0.0, chip_m=60.0)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_says_what_the_model_says_of_any_number_of_chips(folder: Path, kind: str) -> None:
    run = exported.load(folder / f"model.{kind}")
    for size in ((6, 6), (6, 12), (30, 18)):
        batch = place(*size, seed=sum(size))
        close(run(batch), mapper(kind)(batch))
    found = run(batch)
    assert torch.isfinite(found).all()
    assert (found.std((2, 3)) > 0.02).any(), "there is nothing to see"


@pytest.mark.parametrize("kind", KINDS)
def test_two_places_are_two_places_and_the_order_of_dates_does_not_matter(folder: Path, kind: str) -> None:
    run, batches = exported.load(folder / f"model.{kind}"), [place(seed=1), place(seed=2)]
    both = run(Batch.cat(batches))
    for one, batch in zip(both, batches, strict=True):
        close(one, run(batch)[0])
        turned = batch.raster("s2").obs(torch.tensor([2, 0, 1]))
        close(one, run(batch.adding(s2=turned))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_pixels_have_no_effect_and_unseen_patches_make_no_data(folder: Path, kind: str) -> None:
    run, batch = exported.load(folder / f"model.{kind}"), place()
    raster = batch.raster("s2")
    valid = raster.valid.clone()
    valid[:, :, 0, 0] = False  # one pixel of a patch
    valid[1, 0, 2:4, 6:8] = False  # one band of a patch
    valid[2, :, 6:8, 0:2] = False  # a whole patch of the chip south-west, on one date
    values = torch.where(valid, raster.values, torch.nan)
    found = run(batch.adding(s2=replace(raster, values=values, valid=valid)))
    expected = mapper(kind)(batch.adding(s2=replace(raster, valid=valid)))
    half, chip = (found.shape[2] // 2, found.shape[3] // 3)
    assert torch.isnan(found[:, :, half:, :chip]).all()
    assert torch.isfinite(expected).all()
    expected[:, :, half:, :chip] = torch.nan
    close(found, expected)
    assert (found[:, :, :half, :chip] - run(batch)[:, :, :half, :chip]).abs().max() > 1e-4


def test_of_more_dates_those_that_saw_most_of_the_chip_count(folder: Path) -> None:
    run, batch = exported.load(folder / "model.pt2"), place(6, 6, obs=5)
    raster = batch.raster("s2")
    valid = raster.valid.clone()
    valid[1], valid[3, :, :2, :2] = False, False
    clear = raster.obs(torch.tensor([0, 2, 4]))
    close(run(batch.adding(s2=replace(raster, valid=valid))), run(batch.adding(s2=clear)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_of_the_file_is_the_map_of_the_model(folder: Path, tmp_path: Path, kind: str) -> None:
    """Also where the place ends within a chip, and in windows."""
    run, batch = exported.load(folder / f"model.{kind}"), place(24, 36)
    made = predict(run, batch, tmp_path / "file.tif", window_m=120.0, quiet=True, threads=2)
    real = predict(mapper(kind), batch, tmp_path / "model.tif", window_m=120.0, quiet=True, threads=1)
    assert made.keys() == real.keys()
    for what in made:
        with rasterio.open(made[what]) as one, rasterio.open(real[what]) as other:
            assert one.transform == other.transform
            np.testing.assert_allclose(one.read(), other.read(), atol=1e-5 if kind == "pt2" else 1)
    again = predict(run, batch, tmp_path / "again.tif", window_m=60.0, quiet=True, threads=1)
    for what in made:
        with rasterio.open(made[what]) as one, rasterio.open(again[what]) as other:
            np.testing.assert_allclose(one.read(), other.read(), atol=1e-5)


def test_a_place_that_ends_within_a_chip_is_covered(folder: Path) -> None:
    run, batch = exported.load(folder / "model.pt2"), place(8, 17)
    found, expected = run(batch), mapper("pt2")(place(8, 16))
    assert found.shape[2:] == (4, 9)
    assert torch.isnan(found[..., 8]).all()  # half a token
    torch.testing.assert_close(found[..., 4:, :8], expected[..., 4:, :8], equal_nan=True)
    assert torch.isfinite(found[..., :8]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_travels_to_other_processes_and_is_known_by_its_content(folder: Path, kind: str) -> None:
    run = exported.load(folder / f"model.{kind}")
    twin = pickle.loads(pickle.dumps(run))
    assert json.dumps(facts_of(twin)) == json.dumps(facts_of(run))
    assert run.contract["sha256"] in json.dumps(facts_of(run))
    close(twin(place()), run(place()))


def test_the_contract_says_what_goes_in_and_out(folder: Path) -> None:
    told = json.loads((folder / "model.pt2.json").read_text())
    assert (told["family"], told["chip_m"], told["token_m"], told["gsd_m"]) == ("omnisat", 60, 20, 20)
    layer = told["layers"]["s2"]
    assert (layer["obs"], layer["chip_px"], layer["input"]["bands"]) == (3, 6, ["B02", "B03"])
    assert layer["units"] == ["reflectance", "reflectance"]
    assert told["inputs"] == ["s2_values", "s2_valid", "s2_time_s"]
    assert len(told["channels"]) == 16
    assert 0 <= told["difference"] <= told["tolerance"]
    assert exported.load(folder / "model.pt2").inputs == encoder().inputs


@needs_onnx
def test_the_onnx_file_alone_is_enough(folder: Path) -> None:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    raster = place(6, 6).raster("s2")
    given = {"s2_values": raster.values, "s2_valid": raster.valid, "s2_time_s": raster.time_s}
    (found,) = session.run(None, {name: tensor[None].numpy() for name, tensor in given.items()})
    close(torch.from_numpy(found), mapper("onnx")(place(6, 6)))
    told = json.loads((folder / "model.onnx.json").read_text())
    assert (told["channels"], told["probabilistic"], told["gsd_m"]) == (["water", "forest", "city"], True, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(folder: Path, kind: str) -> None:
    run, batch = exported.load(folder / f"model.{kind}"), place()
    raster = batch.raster("s2")
    with pytest.raises(ContractError, match="lacks B03"):
        run(batch.adding(s2=raster.select(["B02"])))
    with pytest.raises(ContractError, match=r"layer 's2' has 2 observations, .* takes 3"):
        run(place(obs=2))
    with pytest.raises(ContractError, match="gsd_m=20"):
        run(batch.adding(s2=replace(raster, gsd_m=20.0)))
    with pytest.raises(ContractError, match="takes chips of 60 m"):
        run(place(6, 4))
    with pytest.raises(LookupError, match="no raster layer 's2'"):
        run(batch.without("s2"))


@pytest.mark.parametrize("kind", KINDS)
def test_another_file_than_the_contract_says_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    data = bytearray((folder / f"model.{kind}").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / f"m.{kind}").write_bytes(data)
    with pytest.raises(FileNotFoundError, match="two files"):
        exported.load(tmp_path / f"m.{kind}")
    (tmp_path / f"m.{kind}.json").write_text((folder / f"model.{kind}.json").read_text())
    with pytest.raises(ContractError, match="sha256 differs"):
        exported.load(tmp_path / f"m.{kind}")
    told = json.loads((tmp_path / f"m.{kind}.json").read_text())
    for content, message in (
        ({**told, "format": "other/1"}, "no contract of the format"),
        ({k: v for k, v in told.items() if k != "chip_m"}, "does not say chip_m"),
    ):
        (tmp_path / f"m.{kind}.json").write_text(json.dumps(content))
        with pytest.raises(ContractError, match=message):
            exported.load(tmp_path / f"m.{kind}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"torch.ops.aten.relu.default"', '"torch.hub.load"', "calls 'torch.hub.load'"),
        ("Symbol('s", "__import__('s", "evaluates"),
        ('"use_pickle": false', '"use_pickle": true', "pickled object"),
        ('"guards_code": []', '"guards_code": ["print()"]', "code to evaluate"),
        (None, "archive/data/constants/custom_obj_0", "pickled object or code"),
    ],
)
def test_archives_that_could_run_something_are_not_loaded(
    folder: Path, tmp_path: Path, old: str | None, new: str, message: str
) -> None:
    changed = 0
    with zipfile.ZipFile(folder / "model.pt2") as before, zipfile.ZipFile(tmp_path / "m.pt2", "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if old and name.endswith(".json"):
                changed += content.count(old.encode())
                content = content.replace(old.encode(), new.encode())
            after.writestr(name, content)
        if old is None:
            changed = 1
            after.writestr(new, pickle.dumps(print))
    assert changed, "the archive has nothing of the kind any more"
    told = json.loads((folder / "model.pt2.json").read_text())
    sha256 = exported.hashlib.sha256((tmp_path / "m.pt2").read_bytes()).hexdigest()
    (tmp_path / "m.pt2.json").write_text(json.dumps({**told, "sha256": sha256}))
    with pytest.raises(ContractError, match=message):
        exported.load(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "layer 's2' is a series: say how many dates"),
        ({"obs": {"s3": 1}}, "obs names the layer 's3'. Did you mean"),
        ({"obs": {"s2": 0}}, "must be at least 1"),
        ({"obs": {"s2": 2}, "chip_m": 50.0}, "no multiple of the token, 20 m"),
        ({"obs": {"s2": 2}, "to": "tflite"}, "none of onnx, pt2"),
        ({"obs": {"s2": 2}, "to": "onnx"}, "must end in .onnx"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exported.export(encoder(), tmp_path / "m.pt2", **options)
    assert not list(tmp_path.iterdir())


def test_an_encoder_without_a_grid_of_tokens_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="makes no grid of tokens"):
        exported.export(SquareEncoder(), tmp_path / "m.pt2")
    assert image_batch(torch.rand(1, 2, 4, 4))  # an encoder like it does embed


def test_a_network_whose_shapes_hang_on_its_numbers_is_refused() -> None:
    example = {"x": torch.tensor([1.0, 2.0, 2.0])}
    for network in (lambda given: given["x"].unique().sum(), lambda given: given["x"] * int(given["x"].max())):
        with pytest.raises(ContractError, match="looks at numbers of its input"):
            frozen(network, example)


def test_a_frozen_network_holds_or_says_nothing() -> None:
    """What is decided by validity is decided as in the example, and NaN where it would be otherwise."""

    def network(given: dict[str, torch.Tensor]) -> torch.Tensor:
        x, seen = given["x"], given["seen"]
        out = x.new_zeros(4)
        out[torch.arange(4)[seen]] = x[seen] * len(torch.nonzero(seen))
        out += 1 if seen.all() else 100
        return torch.cat([out, torch.where(seen, x, 0.0).sum()[None]])

    graph = frozen(network, {"x": torch.rand(4), "seen": torch.ones(4, dtype=torch.bool)})
    x, seen = torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool)
    seen[1, 2] = False
    found = graph(x, seen)
    for row in (0, 2):
        close(found[row], network({"x": x[row], "seen": seen[row]}))
    assert torch.isnan(found[1]).all()


@pytest.mark.parametrize(("name", "chip_m"), [("anysat/nano", 120.0), ("ramen/nano", 80.0)])
def test_graphs_of_other_families_say_what_these_say(name: str, chip_m: float) -> None:
    """Without writing them, which takes long; what is written is the same graph."""
    module, variant = find("models", name)
    torch.manual_seed(0)
    model = module.build(variant).eval()
    obs = {layer: 2 for layer, wanted in model.inputs.items() if wanted.dated}
    small = exported._Signature.of(model, None, obs, chip_m)
    graph = frozen(small.one, {name: tensor[0] for name, tensor in small.random(1, 0).items()})
    assert exported._difference(lambda given: graph(*given.values()), small) < 1e-5


@pytest.mark.parametrize("name", ["galileo/nano", "atomizer/nano"])
def test_families_that_look_at_dates_or_cannot_be_traced_are_refused(name: str, tmp_path: Path) -> None:
    module, variant = find("models", name)
    model = module.build(variant).eval()
    obs = {layer: 2 for layer, wanted in model.inputs.items() if wanted.dated}
    with pytest.raises(ContractError, match=r"Use the weights file itself"):
        exported.export(model, tmp_path / "m.pt2", obs=obs)
    assert not list(tmp_path.iterdir())


def written(folder: Path) -> list[str]:
    """Three dates of two bands as files, and the options that say what they are."""
    g, paths = np.random.default_rng(0), []
    profile = {"driver": "GTiff", "count": 2, "height": 15, "width": 18, "dtype": "float32", "crs": "EPSG:32633"}
    for name in "abc":
        paths.append(str(folder / f"{name}.tif"))
        transform = Affine(10, 0, 600000, 0, -10, 5000000)
        with rasterio.open(paths[-1], "w", transform=transform, **profile) as file:
            file.write(g.uniform(1000, 4000, (2, 15, 18)).astype("float32"))
            file.descriptions = ("B02", "B03")
    times = [part for day in (3, 9, 27) for part in ("--time", f"2021-05-{day:02d}")]
    return [*paths, "--sensor", "sentinel-2-l2a", *times, "--quiet"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_maps_with_a_file_as_with_a_model(folder: Path, tmp_path: Path, kind: str) -> None:
    given, model = written(tmp_path), encoder()
    weights.save(tmp_path / "m.safetensors", model, task(model) if kind == "onnx" else None)
    verb, image = ("predict", "map-probabilities") if kind == "onnx" else ("embed", "map")
    found = []
    for number, name in enumerate((folder / f"model.{kind}", tmp_path / "m.safetensors")):
        (tmp_path / str(number)).mkdir()
        out = ["-o", str(tmp_path / str(number) / "map.tif"), *(["--probabilities"] if kind == "onnx" else [])]
        done = CliRunner().invoke(app, [verb, str(name), *given, *out], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        with rasterio.open(tmp_path / str(number) / f"{image}.tif") as file:
            found.append(file.read())
    # The last chip of a model with a task reaches beyond the place; that of a file ends with it, and its neighbour fades into it.
    kept = 8 if kind == "onnx" else None
    np.testing.assert_allclose(found[0][:, :kept], found[1][:, :kept], atol=1e-3)
    assert np.isfinite(found[0][:, :14]).all()


def test_what_does_not_go_with_a_file_is_said(folder: Path, tmp_path: Path) -> None:
    given = [*written(tmp_path), "-o", str(tmp_path / "map.tif")]
    for verb, extra, message in (
        ("predict", [], "gives features, not a map"),
        ("embed", ["--chip-m", "120"], "choose it when exporting"),
        ("embed", ["--at", "patch_m=40"], "choose it when exporting"),
    ):
        done = CliRunner().invoke(app, [verb, str(folder / "model.pt2"), *given, *extra])
        assert isinstance(done.exception, ValueError)
        assert message in str(done.exception)
