"""Weights come back as they were saved, or not at all, and the reason is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from third_party import strips

from everysat.data.statistics import summarise
from everysat.data.synthetic import build as synthetic
from everysat.io import statistics
from everysat.models import omnisat
from everysat.models.weights import contract_path, convert, load, load_strictly, load_task, normalised, save
from everysat.tasks import classify
from everysat.types import ContractError


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return strips.build(dim=4).eval()


@pytest.fixture
def file(encoder, tmp_path):
    return save(tmp_path / "a.safetensors", encoder, provenance={"licence": "CC0"})


@pytest.fixture
def batch():
    return synthetic("images", places=2, size_m=40)[1]


def edit(path, **changes):
    contract = json.loads(contract_path(path).read_text())
    contract_path(path).write_text(json.dumps({**contract, **changes}))


def published(encoder):
    """The weights of a small OmniSat under the names of the published code."""
    state = {}
    for name, tensor in encoder.state_dict().items():
        for new, old in [("class_token", "cls_token"), ("cross.attn.query", "blocks.2.attn.q_learned")]:
            name = old if name == new else name
        state[name] = tensor
    return state


def test_round_trip(encoder, file, batch):
    again = load(file)
    assert not again.training
    assert torch.equal(again.embed(batch).mean, encoder.embed(batch).mean)
    assert again.config == encoder.config
    assert again.inputs == encoder.inputs
    assert json.loads(contract_path(file).read_text())["licence"] == "CC0"
    assert sorted(f.name for f in file.parent.iterdir()) == ["a.safetensors", "a.safetensors.json"]


def test_the_contract_says_what_the_model_expects(file):
    inputs = json.loads(contract_path(file).read_text())["inputs"]
    assert inputs["coarse"]["gsd_m"] == 10
    assert inputs["coarse"]["bands"][1] == {"name": "coarse-2", "unit": "reflectance", "mean": 0.3, "std": 0.2}


def test_a_task_comes_back_with_its_encoder(encoder, tmp_path, batch):
    task = classify.build("place", encoder=encoder, classes=["a", "b", "c"]).eval()
    path = save(tmp_path / "t.safetensors", encoder, task)
    again_encoder, again = load_task(path)
    before, after = task.predict(encoder.embed(batch)), again.predict(again_encoder.embed(batch))
    assert torch.equal(before.values, after.values)
    assert again.config == task.config
    assert torch.equal(load(path).embed(batch).mean, encoder.embed(batch).mean)  # the encoder alone


def test_no_task_is_an_error(file):
    with pytest.raises(ContractError, match="holds an encoder without a task"):
        load_task(file)


def test_a_name_gives_a_fresh_encoder_and_says_so():
    with pytest.warns(UserWarning, match=r"omnisat/tiny is built with random weights"):
        assert load("omnisat/tiny").dim == 32


def test_a_changed_or_cut_file_is_refused(file):
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ContractError, match="sha256 differs"):
        load(file)
    file.write_bytes(data[:-8])
    with pytest.raises(ContractError, match="sha256 differs"):
        load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "is no contract of the format"),
        ({"inputs": {}}, "input 'fine' is .* when rebuilt, the contract says None"),
        ({"config": {"dim": 6}}, "of another shape: project.fine.0.weight is"),
    ],
)
def test_a_contract_that_does_not_fit_is_refused(file, changes, message):
    edit(file, **changes)
    with pytest.raises(ContractError, match=message):
        load(file)


def test_missing_files_and_wrong_suffix(file, encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="Weights are two files"):
        load(tmp_path / "none.safetensors")
    contract_path(file).unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors\.json"):
        load(file)
    with pytest.raises(ValueError, match="must end in"):
        save(tmp_path / "a.pt", encoder)


def test_what_could_not_be_loaded_is_not_saved(encoder, tmp_path):
    encoder.family = "nowhere"
    with pytest.raises(LookupError, match="no model is called 'nowhere'"):
        save(tmp_path / "a.safetensors", encoder)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(encoder, file):
    before = file.read_bytes()
    with pytest.raises(TypeError):
        save(file, encoder, provenance={"x": object()})
    assert file.read_bytes() == before
    load(file)


def test_differences_are_summed_up(encoder):
    state = dict(encoder.state_dict())
    state["mix.00.weight"] = state.pop("mix.0.weight")
    state["mix.0.bias"] = torch.zeros(9)
    with pytest.raises(ContractError) as caught:
        load_strictly(encoder, state, "a.pth")
    text = str(caught.value)
    assert "1 missing: mix.0.weight" in text
    assert "1 unexpected: mix.00.weight" in text
    assert "mix.00.weight: Did you mean mix.0.weight" in text
    assert "mix.0.bias is [9], expected [4]" in text


def test_changes_hold_when_the_weights_still_fit(file):
    assert load(file, dropout=0.5).mix[2].p == 0.5
    with pytest.raises(ContractError, match="do not fit"):
        load(file, dim=8)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
def test_published_weights_are_converted(tmp_path, suffix):
    torch.manual_seed(2)
    source = omnisat.build("tiny").eval()
    state = {f"model.encoder.{k}": v for k, v in published(source).items()}
    state["model.encoder.projector_s2.attention_heads.fc1_k.bias"] = torch.zeros(3)
    state["model.decoder.weight"] = torch.zeros(2)
    path = tmp_path / f"up{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    out = tmp_path / "out.safetensors"
    done = convert("omnisat/tiny", path, out, prefix="model.encoder.", source="made here", licence="MIT")
    assert done.kept == len(source.state_dict())
    assert done.dropped == {
        "model.decoder.weight": "does not begin with 'model.encoder.'",
        "model.encoder.projector_s2.attention_heads.fc1_k.bias": "cancels in the softmax over dates",
    }
    again = load(out)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in source.state_dict().items())
    contract = json.loads(contract_path(out).read_text())
    assert contract["source"] == "made here"
    assert contract["dropped"] == done.dropped
    assert all(k.startswith("encoder.") for k in load_file(out))


def test_a_tensor_without_a_place_is_an_error(tmp_path):
    state = published(omnisat.build("tiny"))
    torch.save({**state, "head.weight": torch.zeros(2, 2)}, tmp_path / "up.pth")
    with pytest.raises(ContractError, match=r"1 unexpected: head\.weight"):
        convert("omnisat/tiny", tmp_path / "up.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_silent_drop_is_an_error(tmp_path, monkeypatch):
    state = published(omnisat.build("tiny"))
    torch.save({**state, "secret": torch.zeros(2)}, tmp_path / "up.pth")
    honest = omnisat.convert
    monkeypatch.setattr(omnisat, "convert", lambda s, c: honest({k: v for k, v in s.items() if k != "secret"}, c))
    with pytest.raises(ContractError, match="no place for 1 published tensors and gives no reason in DROPPED: secret"):
        convert("omnisat/tiny", tmp_path / "up.pth", tmp_path / "out.safetensors")


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"state_dict": Trap()}))
    torch.save({"state_dict": {"a": Trap()}}, tmp_path / "trap.ckpt")
    (tmp_path / "sprung").unlink(missing_ok=True)
    for name in ("trap.pth", "trap.ckpt"):
        with pytest.raises(ValueError, match="cannot be read safely"):
            convert("omnisat/tiny", tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_files_without_tensors_or_that_are_not_there(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "up.pth")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        convert("omnisat/tiny", tmp_path / "up.pth", tmp_path / "out.safetensors")
    with pytest.raises(FileNotFoundError):
        convert("omnisat/tiny", tmp_path / "none.pth", tmp_path / "out.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "up.pth")
    with pytest.raises(ContractError, match=r"no key of .* begins with 'x\.'"):
        convert("omnisat/tiny", tmp_path / "up.pth", tmp_path / "out.safetensors", prefix="x.")


def test_published_anysat_weights_are_converted_with_their_quirks(tmp_path) -> None:
    published = load_file(Path(__file__).parent.parent / "golden" / "anysat_release_weights_s0.weights.safetensors")
    torch.save({"state_dict": published}, tmp_path / "AnySat.pth")
    done = convert(
        "anysat/base",
        tmp_path / "AnySat.pth",
        tmp_path / "a.safetensors",
        licence="MIT",
        dim=64,
        depth=2,
        heads=4,
    )
    assert len(done.dropped) == 7  # key biases, which cancel
    encoder = load(tmp_path / "a.safetensors")
    assert set(encoder.config["quirks"]) == {"first_head_bias", "nested_subpatches", "padded", "placeless_context"}
    assert json.loads((tmp_path / "a.safetensors.json").read_text())["licence"] == "MIT"


def test_a_new_sensor_gets_a_projector_of_its_own_and_the_rest_stays(tmp_path) -> None:
    from everysat.models import anysat

    torch.manual_seed(0)
    encoder = anysat.build("nano")
    path = save(tmp_path / "a.safetensors", encoder)
    bands = ["blue", "green", "red", "nir"]
    planet = {"sensor": "planetscope-4b", "bands": bands, "gsd_m": 3.0, "projector": "series", "pixels": 4}
    grown = load(path, modalities={"planet": planet})
    assert set(grown.inputs) == {*encoder.inputs, "planet"}
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(grown.state_dict()[name], tensor)
    few = load(path, modalities=["s2"])
    assert set(few.inputs) == {"s2"}
    assert not any(key.startswith("projectors.spot") for key in few.state_dict())
    with pytest.raises(LookupError, match="s2"):
        load(path, modalities=["s3"])


def test_what_was_converted_without_a_path_is_found_by_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVERYSAT_WEIGHTS", str(tmp_path / "deep" / "weights"))
    published = Path(__file__).parent.parent / "golden" / "anysat_release_weights_s0.weights.safetensors"
    done = convert("anysat/base", published, dim=64, depth=2, heads=4)
    assert done.path == tmp_path / "deep" / "weights" / "anysat-base.safetensors"
    assert load("anysat/base").dim == 64  # the file's sizes, and no warning


# --- statistics of the user's data ---------------------------------------------------------------------------------------


def three(**changes):
    """A small OmniSat for the synthetic modalities, with statistics that fit no data."""
    layers = synthetic("three", places=1)[0].layers
    kinds = {"vhr": "image", "optical": "series", "radar": "series"}
    modalities = {
        name: {
            "sensor": {"name": r.sensor.name, "kind": r.sensor.kind, "source": "synthetic",
                       "bands": [{"name": b.name, "gsd_m": b.gsd_m, "unit": b.unit} for b in r.sensor.bands]},
            "bands": list(r.sensor.names), "gsd_m": r.gsd_m, "projector": kinds[name],
            "mean": [7.0] * len(r.sensor.bands), "std": [3.0] * len(r.sensor.bands),
        }
        for name, r in layers.items() if name in kinds
    }  # fmt: skip
    options = {"patch_m": 10.0, "grid": 6, "dim": 16, "depth": 1, "heads": 4, **changes}
    return omnisat.build("", modalities=modalities, **options).eval()


@pytest.fixture(scope="module")
def measured():
    data = synthetic("three", places=6)
    return {name: summary.plain(name) for name, summary in summarise(data).items()}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(2)
    return save(tmp_path / "three.safetensors", three())


def test_statistics_of_a_file_normalise_the_input_and_stay(saved, measured, tmp_path):
    file = statistics.save(tmp_path / "stats.json", measured, {})
    encoder = load(saved, statistics=file)
    batch = synthetic("three", places=6)
    seen = [encoder.inputs["radar"].normalise(batch[i].raster("radar")) for i in range(6)]
    assert torch.cat(seen).mean((0, 2, 3)).abs().max() < 1e-5
    assert encoder.config["modalities"]["radar"]["mean"] == measured["radar"]["mean"]
    before = load(saved)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), encoder.parameters(), strict=True))
    assert not torch.equal(before.embed(batch[0]).mean, encoder.embed(batch[0]).mean)
    again = load(save(tmp_path / "again.safetensors", encoder))
    assert again.inputs == encoder.inputs
    assert torch.equal(again.embed(batch[0]).mean, encoder.embed(batch[0]).mean)


def test_bands_are_matched_by_name_and_what_is_not_there_stays(saved, measured):
    radar = measured["radar"]
    turned = {key: value[::-1] if isinstance(value, list) else value for key, value in radar.items()}
    more = {key: [*value, value[0]] if isinstance(value, list) else value for key, value in turned.items()}
    more["bands"] = [*turned["bands"], "radar-9"]
    content = {"format": statistics.FORMAT, "layers": {"radar": more, "thermal": radar}}
    inputs = load(saved, statistics=content).inputs
    assert inputs["radar"].mean == tuple(radar["mean"])
    assert inputs["radar"].std == tuple(radar["std"])
    assert inputs["vhr"].mean == (7.0,) * 3


def test_statistics_of_something_else_are_refused_with_what_to_do(saved, measured):
    def refused(message, **change):
        content = {"format": statistics.FORMAT, "layers": {"radar": {**measured["radar"], **change}}}
        with pytest.raises(ContractError, match=rf"layer 'radar'.*{message}.*everysat stats --model"):
            load(saved, statistics=content)

    refused("are of sensor sentinel-1-grd, the model expects synthetic-radar", sensor="sentinel-1-grd")
    refused("bands VV, radar-2 and lack radar-1", bands=["VV", "radar-2"])
    refused("band radar-2 are in linear, the model expects dB", unit=["dB", "linear"])
    with pytest.raises(ContractError, match=r"are of the layers s2, the model has vhr, optical, radar: none in common"):
        load(saved, statistics={"format": statistics.FORMAT, "layers": {"s2": measured["radar"]}})
    with pytest.raises(FileNotFoundError, match="no statistics file"):
        load(saved, statistics="nowhere.json")


def test_a_model_without_modalities_in_its_config_takes_none(encoder, measured):
    encoder.config = {"dim": 4}
    with pytest.raises(ContractError, match=r"config of third_party\.strips lists no modalities"):
        normalised(encoder, {"format": statistics.FORMAT, "layers": measured})


def test_the_given_encoder_is_left_as_it_is(encoder):
    fine = {
        "sensor": "synthetic-fine",
        "gsd_m": 5.0,
        "bands": ["fine-1", "fine-2", "fine-3"],
        "unit": ["reflectance"] * 3,
    }
    fine |= {"mean": [0.1] * 3, "std": [0.4] * 3, "count": [9] * 3}
    again = normalised(encoder, {"format": statistics.FORMAT, "layers": {"fine": fine}})
    assert again.inputs["fine"].mean == (0.1,) * 3
    assert encoder.inputs["fine"].mean == (0.3,) * 3
    with torch.no_grad():
        next(again.parameters()).add_(1.0)
    assert not torch.equal(next(again.parameters()), next(encoder.parameters()))


def test_a_fresh_model_takes_statistics_too():
    with pytest.warns(UserWarning, match="random weights"):
        wanted = load("omnisat/treesat", dim=16, depth=1, heads=4).inputs["s2"]
    names = list(wanted.sensor.names)
    s2 = {
        "sensor": "sentinel-2-l2a",
        "gsd_m": 10.0,
        "bands": names,
        "unit": ["reflectance"] * 10,
        "mean": [0.5] * 10,
        "std": [0.25] * 10,
        "count": [1] * 10,
    }
    with pytest.warns(UserWarning, match="random weights"):
        encoder = load(
            "omnisat/treesat", dim=16, depth=1, heads=4, statistics={"format": statistics.FORMAT, "layers": {"s2": s2}}
        )
    assert encoder.inputs["s2"].mean == (0.5,) * 10
    assert encoder.dim == 16
    assert not encoder.training
