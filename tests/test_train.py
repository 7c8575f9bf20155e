"""A run is a function of its recipe: killed, interrupted, resumed or spread over processes, it comes to the same end."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from everysat.data.synthetic import build as synthetic
from everysat.logbook import Logbook
from everysat.models.weights import load, load_task
from everysat.optimizer import learning_rate
from everysat.recipe import Recipe, RecipeError
from everysat.train import NonFiniteError, train

HERE = Path(__file__).parent
TREE = {
    "name": "tiny",
    "model": {"name": "third_party.strips"},
    "data": [
        {"name": "synthetic/images", "options": {"places": 24, "size_m": 40}, "weight": 2},
        {"name": "synthetic/images", "options": {"places": 10, "size_m": 20, "seed": 4}},
    ],
    "objective": {"name": "third_party.strips"},
    "augment": {"flip": True, "turn": True, "drop_bands": 0.2},
    "steps": 30,
    "batch_size": 5,
    "accumulate": 2,
    "lr": 0.01,
    "warmup_steps": 3,
    "clip": 1.0,
    "ema": 0.9,
    "checkpoint_every": 4,
    "accelerator": "cpu",
}


def recipe(folder: Path, *overrides: str) -> Recipe:
    return Recipe.parse(TREE, [f"out={folder}", *overrides])


def values(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Logbook.read(folder)]


def run_in_process(folder: str, overrides: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if "NO_DROPOUT=1" in overrides:
        overrides.remove("NO_DROPOUT=1")
        torch.nn.functional.dropout = lambda x, *options, **more: x
    train(recipe(Path(folder), *overrides), quiet=True)


@pytest.fixture(scope="module")
def processes():
    """Fresh processes in which only modules are loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["everysat.train", "lightning_fabric", "third_party.strips"])
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), os.pathsep.join(sys.path)
    yield lambda folder, *overrides, **environment: context.Process(
        target=run_in_process, args=(str(folder), list(overrides), environment)
    )
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums over several threads differ in the last digit from those of one, which runs in processes of their own use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """The run that nothing disturbed."""
    return train(recipe(tmp_path_factory.mktemp("whole")), quiet=True)


def test_it_learns_and_leaves_what_it_promises(whole):
    log = Logbook.read(whole.folder)
    assert [row["step"] for row in log] == list(range(1, 31))
    assert all(row["loss"] == pytest.approx(row["reconstruction"] + row["contrastive"]) for row in log)
    first, last = (sum(row["reconstruction"] for row in rows) for rows in (log[:8], log[-8:]))
    assert last < 0.7 * first
    assert {f.name for f in whole.folder.iterdir()} == {
        "weights.safetensors",
        "weights.safetensors.json",
        "objective.safetensors",
        "recipe.yaml",
        "log.jsonl",
        "run.json",
    }
    facts = json.loads((whole.folder / "run.json").read_text())
    assert facts["status"] == "complete"
    assert facts["versions"]["torch"] == torch.__version__
    assert Recipe.parse(facts["recipe"]) == Recipe.load(whole.folder / "recipe.yaml") == whole.recipe
    assert facts["weights_sha256"] == json.loads((whole.folder / "weights.safetensors.json").read_text())["sha256"]


def test_saved_weights_are_the_run_s(whole):
    encoder = load(whole.weights)
    batch = synthetic("images", places=3, size_m=40)[2]
    torch.testing.assert_close(encoder.embed(batch).mean, whole.encoder.embed(batch).mean, rtol=0, atol=0)


def test_a_complete_run_is_loaded_not_repeated(whole, tmp_path):
    before = (whole.folder / "run.json").read_text()
    again = train(whole.recipe, quiet=True)
    assert (whole.folder / "run.json").read_text() == before
    for name, tensor in whole.objective.state_dict().items():
        assert torch.equal(again.objective.state_dict()[name], tensor)
    assert again.log == whole.log


def test_killed_anywhere_it_ends_with_the_same_bits(whole, processes, tmp_path):
    for least in (6, 13, 21):
        process = processes(tmp_path)
        process.start()
        deadline = time.monotonic() + 60
        while len(Logbook.read(tmp_path)) < least and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "weights.safetensors").exists()
    process = processes(tmp_path)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["resumed_at_step"] >= 20
    assert [e["status"] for e in facts["earlier"]] == ["running"] * 3
    assert values(tmp_path) == values(whole.folder)
    for name in ("weights", "objective"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole.folder, tmp_path))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a)


def losses_of_one_and_of_two(processes, folder, *options: str) -> list[tuple[dict, dict]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    started = [processes(folder / "one", *options)]
    started += [processes(folder / "two", *options, "devices=2", LOCAL_RANK=rank, **shared) for rank in "01"]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert json.loads((folder / "two" / "run.json").read_text())["processes"] == 2
    return list(zip(values(folder / "one"), values(folder / "two"), strict=True))


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_two_processes_see_the_losses_of_one(processes, tmp_path, missing):
    """Unequal parts of the batch, batch normalisation, negatives of all, and layers that one process alone has."""
    options = ["model.options.dropout=0", "steps=8", *(f"data.{i}.options.missing={missing}" for i in (0, 1))]
    for one, two in losses_of_one_and_of_two(processes, tmp_path, *options):
        assert one == pytest.approx(two, rel=2e-4)


@pytest.mark.parametrize("family", ["omnisat", "anysat"])
def test_two_processes_pretrain_like_one(processes, tmp_path, family):
    modalities = {}
    for name, layer in synthetic("three", places=1)[0].without("label").layers.items():
        bands = [{"name": band.name, "gsd_m": band.gsd_m, "unit": band.unit} for band in layer.sensor.bands]
        modalities[name] = {
            "sensor": {"name": layer.sensor.name, "kind": layer.sensor.kind, "source": "synthetic", "bands": bands},
            "bands": list(layer.sensor.names),
            "gsd_m": layer.gsd_m,
            "projector": "image" if name == "vhr" else "series",
        }
        if family == "anysat" and name == "vhr":
            modalities[name]["pixels"] = 4
    sizes = {"grid": 6, "dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "drop_path": 0.0}
    objective = {"name": "omnisat"}
    if family == "anysat":
        sizes = {"dim": 64, "depth": 1, "heads": 4, "dropout": 0.0, "patch_m": 10}
        losses = {"targets": "batch", "centred": True}
        objective = {"name": "jepa", "options": {"patch_m": [10, 20], "depth": 1, "heads": 4, **losses}}
    model = {"name": f"{family}/", "statistics": "data", "options": {"modalities": modalities, **sizes}}
    data = [{"name": "synthetic", "options": {"places": 16, "missing": 0.35, "clouds": 0.3}}]
    changes = {
        "model": model,
        "data": data,
        "objective": objective,
        "steps": 4,
        "batch_size": 3,
        "accumulate": 1,
    }
    options = [f"{key}={json.dumps(value)}" for key, value in {**changes, "lr": 1e-3}.items()]
    # Dropout of attention is drawn by each process for its part, so it is off here.
    for one, two in losses_of_one_and_of_two(processes, tmp_path, *options, "NO_DROPOUT=1"):
        assert one == pytest.approx(two, rel=1e-3)


def test_ctrl_c_saves_and_the_same_command_goes_on(whole, tmp_path):
    class Pressing:
        """A dataset during whose use somebody presses Ctrl-C."""

        def __init__(self, dataset, at):
            self.dataset, self.left = dataset, at

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return self.dataset[index]

        def fingerprint(self):
            return self.dataset.fingerprint()

    mine = recipe(tmp_path, "workers=0")
    data = [source.build("data") for source in mine.data]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step"):
        train(mine, data=[Pressing(data[0], 70), data[1]], quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    assert 0 < len(Logbook.read(tmp_path)) < 30
    train(mine, quiet=True)
    assert values(tmp_path) == values(whole.folder)


def test_a_run_on_three_workers_is_the_same(whole, tmp_path):
    train(recipe(tmp_path, "workers=3"), quiet=True)
    assert values(tmp_path) == values(whole.folder)


def test_another_seed_is_another_run(whole, tmp_path):
    train(recipe(tmp_path, "seed=1", "steps=4"), quiet=True)
    assert all(a["loss"] != b["loss"] for a, b in zip(values(tmp_path), values(whole.folder), strict=False))


def test_another_recipe_or_other_data_are_refused_in_the_same_folder(whole, tmp_path):
    with pytest.raises(RecipeError, match=r"holds a run of another recipe: ema, lr differ"):
        train(recipe(whole.folder, "lr=0.02", "ema=null"), quiet=True)
    others = [synthetic("images", places=24, size_m=40, noise=0.1), whole.recipe.data[1].build("data")]
    with pytest.raises(RecipeError, match="on other data"):
        train(whole.recipe, data=others, quiet=True)
    mine = recipe(tmp_path, "steps=4")
    train(mine, quiet=True)
    train(recipe(tmp_path, "steps=5"), restart=True, quiet=True)
    assert len(Logbook.read(tmp_path)) == 5


def test_what_is_not_finite_is_named_and_nothing_of_it_applied(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"step 6: loss term contrastive is nan\. The batch has places [\d, ]+ of synthetic"
    ):
        train(recipe(tmp_path, "objective.options.poison_at=11", "checkpoint_every=5"), quiet=True)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["status"] == "failed"
    assert facts["error"].startswith("NonFiniteError: step 6")
    assert len(Logbook.read(tmp_path)) == 5
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "checkpoint.safetensors").values())


def test_frozen_parts_stay_and_other_learning_rates_hold(tmp_path):
    start = train(
        recipe(tmp_path / "start", "steps=1", "warmup_steps=0", "lr=1e-12", "weight_decay=0", "ema=null"), quiet=True
    )
    end = train(
        recipe(tmp_path / "end", "freeze=[encoder.project]", "lr_scale={'encoder.mix.*': 0}", "steps=5", "ema=null"),
        quiet=True,
    )
    for before, after in zip(start.encoder.parameters(), end.encoder.parameters(), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    assert not end.encoder.project["fine"][1].running_mean.any()  # frozen, so it does not follow the data either
    assert not torch.allclose(start.objective.decode.weight, end.objective.decode.weight)
    with pytest.raises(
        RecipeError, match=r"freeze: no parameter matches 'encoder.projct'. Did you mean encoder.project"
    ):
        train(recipe(tmp_path / "wrong", "freeze=[encoder.projct]"), quiet=True)
    with pytest.raises(RecipeError, match="leaves nothing to train"):
        train(recipe(tmp_path / "all", "freeze=[encoder, objective]"), quiet=True)


def test_accumulated_batches_average_their_gradients(tmp_path):
    options = [
        "model.options.dropout=0",
        "objective.options.plain=true",
        "freeze=[encoder.project]",
        "augment={}",
        "ema=null",
        "steps=1",
        "warmup_steps=0",
    ]
    data = [synthetic("images", places=8, size_m=40), synthetic("images", places=8, size_m=40)]
    one, two = (
        train(
            recipe(tmp_path / f"{size}", *options, f"batch_size={size}", f"accumulate={8 // size}"),
            data=data,
            quiet=True,
        )
        for size in (8, 4)
    )
    for term in ("loss", "gradient_norm"):
        assert one.log[0][term] == pytest.approx(two.log[0][term], rel=1e-5)


def test_weights_begin_from_a_file(whole, tmp_path):
    run = train(
        recipe(tmp_path, f"model.weights={whole.weights}", "steps=1", "lr=1e-12", "warmup_steps=0", "ema=null"),
        quiet=True,
    )
    for before, after in zip(load(whole.weights).parameters(), run.encoder.parameters(), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["initial_weights_sha256"] == json.loads((whole.folder / "run.json").read_text())["weights_sha256"]


def test_statistics_of_the_data_normalise_the_inputs(tmp_path):
    asked = recipe(tmp_path, "model.statistics=data", "steps=1", "warmup_steps=0")
    run = train(asked, quiet=True)
    wanted = load(run.weights).inputs["coarse"]
    sets = [source.build("data") for source in asked.data]
    x = torch.cat([each[i].raster("coarse").values[0].flatten(1) for each in sets for i in range(len(each))], 1)
    torch.testing.assert_close(torch.tensor(wanted.mean), x.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(wanted.std), x.std(1), rtol=1e-2, atol=1e-3)


def test_bf16_runs_and_its_losses_are_near(whole, tmp_path):
    run = train(recipe(tmp_path, "precision=bf16", "steps=6"), quiet=True)
    assert all(p.dtype == torch.float32 for p in run.encoder.parameters())
    exact = train(recipe(tmp_path / "fp32", "steps=6"), quiet=True)
    for a, b in zip(run.log, exact.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
        assert a["loss"] != b["loss"]


def test_the_average_is_validated_and_saved(tmp_path):
    options = [
        "validation=[{name: synthetic/images, options: {places: 6, size_m: 40, seed: 9}}]",
        "validate_every=10",
        "lr=0.05",
    ]
    run = train(recipe(tmp_path / "ema", *options), quiet=True)
    rows = [row for row in run.log if "validation_loss" in row]
    assert [row["step"] for row in rows] == [10, 20, 30]
    plain = train(recipe(tmp_path / "plain", *options, "ema=null"), quiet=True)
    assert [row["loss"] for row in plain.log] == [row["loss"] for row in run.log]  # the average does not touch training
    assert plain.log[9]["validation_loss"] != rows[0]["validation_loss"]
    assert not torch.equal(plain.encoder.project["fine"][0].weight, run.encoder.project["fine"][0].weight)


def test_learning_rate_rises_then_falls():
    mine = Recipe.parse(TREE, ["steps=103"])
    rates = [learning_rate(mine, s) for s in range(103)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[53] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
    assert 0 < rates[-1] < 0.001
    assert learning_rate(mine.changed(schedule="constant"), 100) == 1.0


def test_the_global_generator_is_left_as_it_was(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(recipe(tmp_path, "steps=2", "warmup_steps=0"), quiet=True)
    assert torch.equal(torch.rand(3), expected)
    assert math.isfinite(expected.sum())


def test_a_task_is_fine_tuned_by_the_same_loop(whole, tmp_path):
    task = {"name": "classify/place", "options": {"classes": ["a", "b", "c", "d"]}}
    options = {"size_m": 40, "label_gsd_m": 40, "regions": 1, "noise": 0.02}
    data = [{"name": "synthetic/images", "options": {**options, "places": 40}}]
    changes = {
        "objective": None,
        "task": task,
        "data": data,
        "steps": 60,
        "lr": 0.02,
        "ema": None,
        "validation": [{"name": "synthetic/images", "options": {**options, "places": 48}}],
        "model": {**TREE["model"], "weights": str(whole.weights)},
        "augment": {"flip": True, "drop_layers": 0.3},
    }
    run = train(recipe(tmp_path, *(f"{k}={json.dumps(v)}" for k, v in changes.items())), quiet=True)
    assert run.log[-1]["validation_macro_f1"] > 0.9
    assert run.log[-1]["validation_loss"] < run.log[0]["loss"]
    encoder, loaded = load_task(run.weights)
    batch = synthetic("images", places=41, size_m=40)[40]
    ours, theirs = (t.predict(e.embed(batch), batch) for e, t in ((run.encoder, run.objective), (encoder, loaded)))
    assert torch.equal(ours.values, theirs.values)
    again = train(run.recipe, quiet=True)
    assert torch.equal(again.objective.predict(again.encoder.embed(batch), batch).values, ours.values)


def test_tensorboard_is_asked_for_in_words_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'everysat\[tensorboard\]'"):
        train(recipe(tmp_path, "tensorboard=true"), quiet=True)


def test_a_log_that_was_cut_off_is_read_up_to_there(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    assert [row["step"] for row in Logbook.read(tmp_path)] == [1, 2]
    with Logbook(tmp_path, 1) as log:
        log.write(2, loss=math.inf)
    assert Logbook.read(tmp_path) == [{"step": 1, "loss": 2}, {"step": 2, "loss": None}]
