"""The recipes of AnySat and RAMEN run on data in the published formats (made up, a few places each) with a small model."""

from __future__ import annotations

import pytest
import torch

from everysat.data import berlin
from everysat.find import find
from everysat.models import anysat, simplesat, weights
from everysat.nn.minilm import text_encoder
from everysat.recipe import SHIPPED, Recipe
from everysat.train import train

SMALL = {"dim": 64, "depth": 1, "heads": 4}
SMALL_RAMEN = {**SMALL, "time_heads": 4, "key_dim": 4}
SMALL_SIMPLE = {k: list(v) if isinstance(v, tuple) else v for k, v in simplesat.NANO.items()}
FINE = (
    "anysat_treesatai",
    "anysat_pastis_classify",
    "anysat_pastis_segment",
    "anysat_pastis_probe",
    "anysat_pastis_lora",
    "omnisat_levir",
    "anysat_flair",
    "anysat_planted",
    "anysat_braddts",
    "anysat_sickle",
    "anysat_timesen2crop",
    "ramen_pastis",
    "simplesat_pastis",
    "distill_fuel_moisture",
)
PRE = ("anysat_geoplex", "ramen_pretrain")
ALONE = ("simplesat_pretrain", "georeset_rsicd", "georeset_world")
"""Run by tests of their own, here and elsewhere."""
ADAPT = ("adapt_so2sat",)
"""Run by tests/test_adapt_command.py."""
ON_REAL_DATA = (
    "berlin",
    "ask_berlin",
    "ask_georeset",
    "confidence_berlin",
    "georeset_berlin",
    "anysat_berlin",
    "anysat_joint",
    "anysat_new_sensor",
    "ramen_berlin",
    "atomizer_berlin",
)


def small(name: str, folder, *overrides: str) -> Recipe:
    """The recipe with its datasets replaced by made-up ones, for one step."""
    recipe = Recipe.load(name)
    family = recipe.model.name.split("/")[0]
    sizes = {"ramen": SMALL_RAMEN, "simplesat": SMALL_SIMPLE, "students": {"dim": 8}}.get(family, SMALL)
    options = [f"model.options.{k}={v}" for k, v in sizes.items()]
    for part in ("data", "validation"):
        for number, source in enumerate(getattr(recipe, part)):
            root = folder / source.name.split("/")[0]
            if not root.exists():
                find("data", source.name)[0].fake(root)
            options.append(f"{part}.{number}.options.root={root}")
    shorter = ["steps=1", "batch_size=2", "warmup_steps=0", "validate_every=0", f"out={folder / 'run'}", *overrides]
    return Recipe.load(name, [*options, *shorter])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.filterwarnings("ignore:No positive samples")  # a class that three made-up places lack
@pytest.mark.parametrize("name", FINE)
def test_fine_tuning_runs_on_the_published_format(name, folder) -> None:
    run = train(small(name, folder), restart=True, quiet=True)
    last = run.log[-1]
    assert last["loss"] > 0
    assert last["labelled"] > 0
    assert any(key.startswith("validation_") for key in last)


def test_the_joint_recipe_runs_on_real_data(folder, data_dir) -> None:
    pytest.importorskip("rasterio")
    roots = [f"data.1.options.root={data_dir / 'satclip_s2'}", f"data.2.options.root={data_dir / 'worldcereal'}"]
    less = ["data.1.options.stride_m=1200", "data.0.options.stride_m=1800", "steps=4", "batch_size=2", "warmup_steps=0"]
    run = train(Recipe.load("anysat_joint", [*roots, *less, f"out={folder / 'joint'}"]), restart=True, quiet=True)
    assert len(run.log) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", PRE)
def test_pre_training_runs_on_several_published_datasets(name, folder) -> None:
    sources = Recipe.load(name).data
    sizes = [f"data.{i}.batch_size=2" for i in range(len(sources))]
    options = ["objective.options.depth=1", "objective.options.heads=4"]
    options += ["objective.options.dim=32"] if name.startswith("ramen") else []
    run = train(small(name, folder, "steps=8", *sizes, *options), restart=True, quiet=True)
    assert len({key for row in run.log for key in row if key.startswith("loss_")}) >= min(3, len(sources))


def test_simplesat_pretrain_gives_weights_that_fine_tuning_takes(folder) -> None:
    before = train(small("simplesat_pretrain", folder, "objective.options.cells=32"), restart=True, quiet=True)
    assert before.log[-1]["loss"] > 0
    root = folder / "pastis"
    recipe = small("simplesat_pastis", folder, f"model.weights={before.weights}", f"out={folder / 'fine'}", "lr=1e-9")
    assert all(source.options["root"] == str(root) for source in recipe.data)
    after = train(recipe.changed(model={**recipe.model.model_dump(), "options": {}}), restart=True, quiet=True)
    learned = weights.load(before.weights)
    assert after.encoder.inputs == learned.inputs
    for name, parameter in after.encoder.named_parameters():
        torch.testing.assert_close(parameter, dict(learned.named_parameters())[name], rtol=0, atol=1e-6)


def test_confidence_of_the_real_scene(folder) -> None:
    try:
        berlin.files()
    except FileNotFoundError as error:
        pytest.skip(f"needs the scene: {error}")
    few = (
        "steps=2",
        "batch_size=2",
        "warmup_steps=0",
        "validation=[]",
        "task.options.alone=1",
        f"out={folder / 'sure'}",
    )
    run = train(Recipe.load("confidence_berlin", few), quiet=True)
    assert {"agreement", "prior", "alone"} <= set(run.log[-1])
    encoder, task = weights.load_task(run.weights)
    assert encoder.fusion == "product"
    assert task.config["corruption"] == 0.1
    assert task.task.names == ("farm", "forest", "grass", "meadow", "residential", "scrub", "water", "wetland")


def test_every_recipe_is_tested_here_or_on_real_data() -> None:
    assert {f.stem for f in SHIPPED.glob("*.yaml")} == {*FINE, *PRE, *ALONE, *ADAPT, *ON_REAL_DATA}


def test_a_new_sensor_learns_and_the_rest_stays(folder) -> None:
    """PlanetScope, which no published AnySat saw, on top of a frozen model."""
    from everysat.data import synthetic

    torch.manual_seed(0)
    plain = {"s2": {**anysat.MODALITIES["s2"], "mean": [0.3] * 10, "std": [0.1] * 10}}
    file = weights.save(folder / "a.safetensors", anysat.build("", **SMALL, modalities=plain))
    bands = ["planet-1", "planet-2", "planet-3"]
    table = {
        "name": "synthetic-planet",
        "kind": "optical",
        "source": "synthetic",
        "defaults": {"gsd_m": 3, "unit": "reflectance"},
    }
    table["bands"] = [{"name": b} for b in bands]
    planet = {"sensor": table, "bands": bands, "gsd_m": 3.0, "projector": "series", "pixels": 4}
    recipe = Recipe.load("anysat_new_sensor").changed(
        model={
            "name": "anysat/",
            "weights": str(file),
            "statistics": "data",
            "options": {"patch_m": 60, "output": "dense", "dense": "planet", "modalities": {"planet": planet}},
        },
        data=[{"name": "synthetic"}],
        task={
            "name": "classify/pixel",
            "options": {"gsd_m": 12, "token_size_m": 12, "classes": [f"class {i}" for i in range(4)]},
        },
        steps=2,
        warmup_steps=0,
        out=str(folder / "new"),
    )
    layers = {"planet": {"gsd_m": 3.0, "bands": 3, "dates": (2, 3)}}
    data = synthetic.build("", modalities=layers, places=8, size_m=120.0, label_gsd_m=12.0)
    run = train(recipe, data=[data], quiet=True, restart=True)
    before, after = weights.load(file).state_dict(), run.encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fresh = weights.load(file, modalities={"planet": planet}).state_dict()
    assert not torch.equal(after["projectors.planet.query"], fresh["projectors.planet.query"])


@pytest.mark.parametrize("name", ["georeset_berlin", "ask_berlin", "ask_georeset"])
def test_words_of_the_real_scene(name, folder) -> None:
    try:
        berlin.files()
        text_encoder("minilm")
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(f"not installed: {error}")
    few = [
        "steps=1",
        "batch_size=2",
        "warmup_steps=0",
        "validation=[]",
        "validate_every=0",
        "data.0.options.options.stride_m=1440",
        f"out={folder / name}",
    ]
    if name == "ask_georeset":
        few.append("model.weights=georeset/berlin")
    run = train(Recipe.load(name, few), quiet=True)
    assert run.log[-1]["loss"] > 0
    assert {"georeset_berlin": "ground"}.get(name, "blind") in run.log[-1]
