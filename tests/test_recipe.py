"""A recipe says what is wrong with it before any work begins."""

from __future__ import annotations

import re

import pytest
import yaml
from pydantic import BaseModel

from everysat.recipe import Recipe, RecipeError, check_options

TREE = {
    "name": "crops",
    "model": {"name": "omnisat/tiny", "options": {"dim": 16}},
    "data": [{"name": "synthetic"}, {"name": "synthetic/images", "weight": 2, "options": {"places": 8}}],
    "objective": {"name": "omnisat"},
    "steps": 10,
}
TEXT = """
name: crops
model: {name: omnisat/tiny, options: {dim: 16, rate: 1e-4}}
data:
  - name: synthetic
objective: {name: omnisat}
steps: 100
lr: 3e-4
lr_scale: {encoder: 1e-1}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "crops.yaml"
    path.write_text(TEXT)
    return path


def test_round_trip(tmp_path):
    recipe = Recipe.parse(TREE, ["augment.flip=true", "betas=[0.8, 0.95]", "ema=0.99"])
    recipe.dump(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert [f.name for f in tmp_path.iterdir()] == ["again.yaml"]


def test_plain_exponents_are_numbers_everywhere(file):
    recipe = Recipe.load(file)
    assert recipe.lr == 3e-4
    assert recipe.model.options["rate"] == 1e-4
    assert recipe.lr_scale == {"encoder": 0.1}


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("steps=20", lambda r: r.steps, 20),
        ("lr=1e-5", lambda r: r.lr, 1e-5),
        ("data.1.weight=0.5", lambda r: r.data[1].weight, 0.5),
        ("data.0.options.places=3", lambda r: r.data[0].options, {"places": 3}),
        ("data.1.options.modalities.x.bands=3", lambda r: r.data[1].options["modalities"], {"x": {"bands": 3}}),
        ("model.options.text=a=b", lambda r: r.model.options["text"], "a=b"),
        ("clip=null", lambda r: r.clip, None),
        ("freeze=[encoder.blocks]", lambda r: r.freeze, ["encoder.blocks"]),
        ("augment.crop_m=30", lambda r: r.augment.crop_m, 30.0),
    ],
)
def test_overrides(override, read, value):
    before = yaml.safe_dump(TREE)
    assert read(Recipe.parse(TREE, [override])) == value
    assert yaml.safe_dump(TREE) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "stpes: there is no such key. Did you mean steps"),
        ("model.optoins.dim=3", "model.optoins: there is no such key. Did you mean options?"),
        ("data.1.wieght=3", "data.1.wieght: there is no such key. Did you mean weight?"),
        ("augment.flipp=true", "augment.flipp: there is no such key. Did you mean flip?"),
        ("objective.nmae=x", "objective.nmae: there is no such key. Did you mean name?"),
        ("data.2.weight=1", "'2' is no index of a list of 2"),
        ("data.x.weight=1", "'x' is no index"),
        ("steps.x=1", "'x' lies below a plain value, 10"),
        ("steps", "must look like key.subkey=value"),
        ("steps=[", "not valid YAML"),
        ("steps=0", "steps: Input should be greater than or equal to 1 (got 0)"),
        ("precision=fp16", "precision: Input should be 'fp32' or 'bf16' (got 'fp16')"),
        ("warmup_steps=10", "warmup_steps=10 must be fewer than steps=10"),
        ("task.name=classify", "either an objective (pre-training) or a task"),
        ("objective=null", "either an objective (pre-training) or a task"),
        ("devices=17", "batch_size=16 cannot be shared by devices=17"),
        ("validate_every=5", "no validation data"),
        ("augment.drop_dates=1", "augment.drop_dates: Input should be less than 1 (got 1)"),
        ("name=../x", "name: String should match pattern"),
    ],
)
def test_what_is_wrong_is_named(override, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.parse(TREE, [override])


def test_every_field_of_every_part_forbids_unknown_keys():
    def parts(model):
        yield model
        for field in model.model_fields.values():
            for argument in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(argument, type) and issubclass(argument, BaseModel):
                    yield from parts(argument)

    found = set(parts(Recipe))
    assert len(found) >= 4
    assert all(part.model_config.get("extra") == "forbid" for part in found)


def test_all_errors_at_once():
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({**TREE, "stpes": 3, "lr": -1, "data": []})
    assert all(word in str(caught.value) for word in ("stpes", "lr:", "data:"))


def test_files_that_are_not_there_or_not_yaml(tmp_path, file):
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        Recipe.load(tmp_path / "none.yaml")
    file.write_text("name: a\nname: b\n")
    with pytest.raises(RecipeError, match="the key 'name' comes twice"):
        Recipe.load(file)
    file.write_text("- 1\n")
    with pytest.raises(RecipeError, match="expected keys and values at the top, got list"):
        Recipe.load(file)


def test_options_of_modules_are_checked():
    with pytest.raises(RecipeError, match=r"data synthetic has no option 'placse'. Did you mean places"):
        Recipe.parse(TREE, ["data.0.options.placse=3"]).data[0].build("data")
    with pytest.raises(LookupError, match="Did you mean synthetic"):
        Recipe.parse(TREE, ["data.0.name=syntetic"]).data[0].build("data")

    def build(variant="", *, encoder, width=3):
        return encoder, width

    check_options(build, {"encoder": 1}, "task x")
    with pytest.raises(RecipeError, match="task x needs the option 'encoder'"):
        check_options(build, {"width": 1}, "task x")
    assert len(Recipe.parse(TREE).data[1].build("data")) == 8
