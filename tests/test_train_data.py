"""What a recipe may say of its data: batches of places of similar length, and places that may be broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from everysat.data import batches, synthetic
from everysat.logbook import Logbook
from everysat.recipe import Recipe, RecipeError
from everysat.train import train

TREE = {
    "name": "lengths",
    "model": {"name": "third_party.strips"},
    "data": [{"name": "synthetic/images", "options": {"places": 12, "size_m": 20}, "label": "made"}],
    "objective": {"name": "third_party.strips"},
    "steps": 6,
    "batch_size": 4,
    "accelerator": "cpu",
}


def recipe(folder: Path, *overrides: str) -> Recipe:
    return Recipe.parse(TREE, [f"out={folder}", *overrides])


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in Logbook.read(folder)]


def with_broken(*places: int):
    class Damaged(synthetic.Synthetic):
        def __getitem__(self, index):
            if index in places:
                raise OSError(f"x_{index}.npy ends")
            return super().__getitem__(index)

    made = synthetic.build("images", places=12, size_m=20)
    return Damaged(**{name: getattr(made, name) for name in made.__dataclass_fields__})


def test_bucketed_runs_are_the_same_on_any_number_of_workers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("everysat.train.observations", lambda data: np.arange(len(data)) % 5)
    for name, more in (("one", ["workers=0"]), ("three", ["workers=3"]), ("plain", ["by_length=false"])):
        train(recipe(tmp_path / name, "by_length=true", *more), quiet=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "three")
    assert losses(tmp_path / "one") != losses(tmp_path / "plain")


def test_broken_places_are_skipped_where_that_is_allowed_and_written_down(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"x_3\.npy ends"):
        train(recipe(tmp_path / "strict"), data=[with_broken(3)], quiet=True)
    tolerant = batches.Tolerant(with_broken(3), most=0.2)
    with pytest.warns(UserWarning, match=r"place 3 is skipped: x_3\.npy ends"):
        train(recipe(tmp_path / "tolerant"), data=[tolerant], quiet=True)
    facts = json.loads((tmp_path / "tolerant" / "run.json").read_text())
    assert facts["broken_places"] == {"made": {"3": "x_3.npy ends"}}
    assert facts["status"] == "complete"
    assert len(losses(tmp_path / "tolerant")) == 6


def test_a_source_may_say_how_many_places_may_be_broken() -> None:
    built = recipe(Path("x"), "data.0.skip_broken=0.1").data[0].build("data")
    assert isinstance(built, batches.Tolerant)
    assert built.most == 2
    assert not isinstance(recipe(Path("x")).data[0].build("data"), batches.Tolerant)
    with pytest.raises(RecipeError, match="skip_broken"):
        recipe(Path("x"), "data.0.skip_broken=3")


def test_a_run_from_before_these_settings_can_be_gone_on_with(tmp_path: Path) -> None:
    done = train(recipe(tmp_path), quiet=True)
    facts = json.loads((tmp_path / "run.json").read_text())
    del facts["recipe"]["by_length"], facts["recipe"]["data"][0]["skip_broken"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert train(recipe(tmp_path), quiet=True).log == done.log
    with pytest.raises(RecipeError, match="of another recipe: by_length differ"):
        train(recipe(tmp_path, "by_length=true"), quiet=True)
