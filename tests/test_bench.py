"""Suites: draws keep parts apart, features are computed once, cells resume, tables say what is best and what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from everysat import bench
from everysat.data import bigearthnet, dea_cropmask, fuel_moisture, pastis
from everysat.features import Cache, Extracted, Part, extract
from everysat.models import omnisat, weights
from everysat.recipe import RecipeError
from everysat.suite import Suite, amount
from everysat.tables import save, tables

BASELINES = {
    "statistics": {"baseline": "statistics"},
    "series": {"baseline": "series", "options": {"steps": 2}, "how": ["probe", "forest"]},
}
SMALL = {"patch_m": 10, "grid": 1, "dim": 16, "depth": 1, "heads": 2, "modalities": "data"}


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    root = tmp_path_factory.mktemp("dea")
    dea_cropmask.fake(root)
    return root


def suite(root, out, models=None, name="dea_cropmask", **data):
    data = {"options": {"root": str(root)}, "labels": ["50%", "100%"], "score": ["balanced_accuracy"], **data}
    tree = {"name": "test", "datasets": {"set": {"name": name, **data}}, "models": models or BASELINES, "seeds": 2}
    return Suite.parse({**tree, "out": str(out)})


def test_amounts_are_read():
    assert amount("10%") == (0.1, 0)
    assert amount("0.5 %") == (0.005, 0)
    assert amount("5/class") == (0.0, 5)
    for wrong in ("10", "0%", "101%", "0/class", "five"):
        with pytest.raises(ValueError, match="must look like 10% or 5/class"):
            amount(wrong)


def test_a_suite_that_cannot_be_is_told_by_its_entries(tmp_path, crops, monkeypatch):
    good = suite(crops, tmp_path)
    assert [str(c) for c in good.cells()] == [
        "set / statistics / all / probe",
        "set / series / all / probe",
        "set / series / all / forest",
    ]
    for change, message in (
        ({"labels": ["some"]}, "must look like 10%"),
        ({"parts": {"train": "train"}}, "must have train and test"),
        ({"levle": "pixel"}, "no such key. Did you mean level"),
    ):
        with pytest.raises(RecipeError, match=message):
            suite(crops, tmp_path, **change)
    with pytest.raises(RecipeError, match="either a baseline or a model"):
        suite(crops, tmp_path, models={"nothing": {}})
    with pytest.raises(RecipeError, match="set the variable NOT_THERE"):
        suite("${NOT_THERE}", tmp_path)
    monkeypatch.setenv("SOMEWHERE", "/a")
    assert suite("${SOMEWHERE}/b", tmp_path).datasets["set"].options["root"] == "/a/b"
    assert suite("${NOT_THERE:-c}/b", tmp_path).datasets["set"].options["root"] == "c/b"


def test_draws_keep_parts_and_folds_apart(tmp_path, crops):
    regions = sorted(path.name for path in crops.iterdir())
    data = suite(crops, tmp_path, fold_option="held_out", folds=regions[:2]).datasets["set"]
    folds = [bench.Fold(data, number) for number in range(2)]
    seen: set[int] = set()
    for fold in folds:
        train, test, val = fold.draw("50%", 0)
        assert not set(train) & set(test) | set(train) & set(val) | set(test) & set(val)
        assert not seen & {*train, *test, *val}
        seen |= {*train, *test, *val}
        labelled = fold.labelled["train"]
        mine = torch.isin(fold.group("train"), torch.tensor(train))
        for c in range(len(labelled.classes)):
            of_class = labelled.label == c
            assert abs(int((mine & of_class).sum()) - 0.5 * int(of_class.sum())) <= 1
        few = fold.draw("2/class", 0)[0]
        assert len(few) == 2 * len(labelled.label.unique())
        assert fold.draw("50%", 0) == (train, test, val) != fold.draw("50%", 1)


def test_cells_resume_and_a_failure_stops_nothing(tmp_path, crops, monkeypatch):
    models = {**BASELINES, "broken": {"baseline": "series", "options": {"stepps": 2}}}
    asked = suite(crops, tmp_path, models)
    results = bench.run(asked, quiet=True)
    assert [("error" in r.facts) for r in results] == [False, False, False, True]
    assert "stepps" in results[-1].facts["error"]
    path, csv, html = save(asked, results)
    assert "stepps" in path.read_text()
    assert "<table" in html.read_text()
    assert "balanced_accuracy" in csv.read_text()

    computed = []

    def compute(suite, cell, folds, taught):
        computed.append(cell)
        raise RuntimeError("computed again")

    monkeypatch.setattr(bench, "_computed", compute)
    again = bench.run(asked, quiet=True)
    assert [str(cell) for cell in computed] == ["set / broken / all / probe"], "only what failed is tried again"
    for before, after in zip(results[:3], again[:3], strict=True):
        for labels, one in before.evaluations.items():
            assert after.evaluations[labels].score("balanced_accuracy") == one.score("balanced_accuracy")
    computed.clear()
    bench.run(suite(crops, tmp_path, models, per_place=7), only="statistics", quiet=True)
    assert len(computed) == 1, "settings changed, so the cell is computed anew"


def test_features_are_computed_once(tmp_path):
    calls = []

    def compute() -> Extracted:
        calls.append(1)
        return Extracted(torch.arange(6.0).view(3, 2), 1.5)

    cache = Cache(tmp_path / "features")
    first, second = (cache.get(["weights", {"a": 1}], compute) for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first.x, second.x)
    assert second.seconds == 1.5
    cache.get(["weights", {"a": 2}], compute)
    assert len(calls) == 2


def test_the_table_marks_the_best_and_what_equals_it(tmp_path, crops):
    models = {**BASELINES, "the same": BASELINES["statistics"]}
    asked = suite(crops, tmp_path, models, published=[{"model": "theirs", "value": 0.5, "source": "a paper"}])
    (table,) = tables(asked, bench.run(asked, quiet=True))
    assert table.columns[:5] == ("model", "layers", "how", "50%", "100%")
    cells = {row[0] + row[2]: row[4] for row in table.rows}
    assert sum(cell.startswith("**") for cell in cells.values()) == 1
    assert cells["statisticsprobe"].strip("*= ") == cells["the sameprobe"].strip("*= ")
    assert cells["theirs (published)a paper"] == "0.5"
    assert any("recall per class" in note for note in table.notes)


def test_values_and_several_labels(tmp_path):
    fuel_moisture.fake(tmp_path / "fuel")
    values = suite(tmp_path / "fuel", tmp_path / "a", name="fuel_moisture", folds=[0, 1], score=["r2", "rmse"])
    results = bench.run(values, quiet=True)
    assert not [r.facts["error"] for r in results if "error" in r.facts]
    assert results[0].evaluations["100%"].score("rmse").mean > 0
    assert results[0].evaluations["100%"].score("r2").draws == 4
    bigearthnet.fake(tmp_path / "ben")
    several = suite(
        tmp_path / "ben",
        tmp_path / "b",
        name="bigearthnet",
        score=["micro_f1"],
        models={"statistics": BASELINES["statistics"]},
    )
    (result,) = bench.run(several, quiet=True)
    assert result.evaluations["100%"].kind == "labels", result.facts
    assert 0 <= result.evaluations["100%"].score("micro_f1").mean <= 1


def test_pixels_are_labelled_by_the_pixel(tmp_path):
    pastis.fake(tmp_path / "pastis")
    models = {"bands": {"baseline": "bands", "options": {"layers": ["s2"]}}}
    asked = suite(
        tmp_path / "pastis", tmp_path / "out", models, name="pastis", level="pixel", per_place=50, labels=["100%"], score=["miou"]
    )  # fmt: skip
    fold = bench.Fold(asked.datasets["set"], 0)
    labelled, part = fold.labelled["train"], fold.parts["train"]
    place = part.dataset[1].raster("label")
    for i in torch.nonzero(labelled.place == 1).flatten().tolist():
        y, x = labelled.at[i].tolist()
        assert place.valid[0, 0, y, x]
        assert labelled.classes[int(labelled.label[i])] == place.sensor.bands[0].classes[int(place.values[0, 0, y, x])]
    found = extract(
        lambda batch: batch.raster("label").values, Part(part.dataset, "none", per_place=50), labelled, "pixel"
    )
    codes = sorted(place.sensor.bands[0].classes)
    assert [codes[i] for i in labelled.label.tolist()] == found.x[:, 0].long().tolist(), "features are of other pixels"
    (result,) = bench.run(asked, quiet=True)
    assert result.evaluations["100%"].score("miou").groups == len(fold.parts["test"]), result.facts


def test_models_are_probed_pretrained_and_fine_tuned(tmp_path, crops):
    model = {"name": "omnisat/", "statistics": "data", "options": SMALL}
    objective = {"name": "omnisat", "options": {"normalise": False}}
    models = {
        "untrained": {"model": model},
        "pre-trained": {"model": model, "pretrain": {"objective": objective, "steps": 2, "batch_size": 4}},
        "from scratch": {"model": model, "how": ["finetune"], "finetune": {"steps": 2, "batch_size": 4}},
    }
    asked = suite(crops, tmp_path, models, modalities={"s2": ["s2"]}, labels=["100%"])
    results = bench.run(asked, quiet=True)
    assert not [r.facts["error"] for r in results if "error" in r.facts]
    assert all(r.facts["parameters"] > 1000 for r in results)
    x = {json.dumps(r.evaluations["100%"].counts[0].tolist()) for r in results}
    assert len(x) > 1
    assert len(list(Path(tmp_path / "pretrained").iterdir())) == 1


def test_features_of_pixels_are_pooled_over_places(tmp_path):
    bigearthnet.fake(tmp_path / "ben")
    models = {"convolutions": {"baseline": "convolutions", "options": {"filters": 4}}, "bands": {"baseline": "bands"}}
    asked = suite(
        tmp_path / "ben", tmp_path / "out", models, name="bigearthnet", score=["micro_f1"], modalities={"s2": ["s2"]}
    )
    convolutions, bands = bench.run(asked, quiet=True)
    assert (convolutions.facts.get("dim"), bands.facts.get("dim")) == (8, 12), (convolutions.facts, bands.facts)


def test_values_are_fine_tuned_in_their_unit(tmp_path):
    fuel_moisture.fake(tmp_path / "fuel")
    row = {
        "model": {"name": "omnisat/", "statistics": "data", "options": {**SMALL, "skip": True}},
        "how": ["finetune"],
        "finetune": {"steps": 40, "batch_size": 8, "lr": 3e-3},
    }
    asked = suite(
        tmp_path / "fuel",
        tmp_path / "out",
        {"scratch": row},
        name="fuel_moisture",
        labels=["100%"],
        score=["rmse", "r2"],
    )
    (result,) = bench.run(asked, quiet=True)
    assert "error" not in result.facts
    labelled = bench.Fold(asked.datasets["set"], 0).labelled["test"].label
    assert result.evaluations["100%"].score("rmse").mean < 2 * float(labelled.std())
    assert float(labelled.mean()) > 20, "values that are not standard, so that predictions have to be in their unit"


def test_classes_keep_their_codes_in_fine_tuning(tmp_path):
    """Codes of PASTIS begin at 0 with what is no crop and leave some out; the head is told each by its code."""
    pastis.fake(tmp_path / "pastis")
    row = {
        "model": {
            "name": "omnisat/",
            "statistics": "data",
            "options": {**SMALL, "patch_m": 20, "grid": 4, "modalities": "data", "skip": True},
        },
        "how": ["finetune"],
        "finetune": {"steps": 2, "batch_size": 2},
    }
    data = {"options": {"root": str(tmp_path / "pastis"), "modalities": ["s2"]}, "level": "pixel", "per_place": 20}
    asked = suite(
        tmp_path / "pastis", tmp_path / "out", {"scratch": row}, name="pastis", labels=["100%"], score=["miou"], **data
    )
    fold = bench.Fold(asked.datasets["set"], 0)
    every = torch.ones(len(fold.labelled["train"]), dtype=torch.bool)
    task = bench._task(asked.datasets["set"], "classes", fold.labelled["train"], asked.models["scratch"], every)
    assert task["options"]["classes"] == {str(c): n for c, n in fold.labelled["train"].sensor.bands[0].classes.items()}
    (result,) = bench.run(asked, quiet=True)
    assert "error" not in result.facts, result.facts


def test_fine_tuning_begins_with_the_pre_trained_weights(tmp_path, crops):
    model = {"name": "omnisat/", "statistics": "data", "options": SMALL}
    pretrain = {
        "objective": {"name": "omnisat", "options": {"normalise": False}},
        "steps": 2,
        "batch_size": 4,
        "lr": 0.01,
    }
    finetune = {"steps": 1, "batch_size": 4, "lr": 1e-9, "weight_decay": 0.0}
    models = {"pre-trained": {"model": model, "pretrain": pretrain, "finetune": finetune, "how": ["finetune"]}}
    asked = suite(crops, tmp_path, models, modalities={"s2": ["s2"]}, labels=["100%"])
    (result,) = bench.run(asked, quiet=True)
    assert "error" not in result.facts, result.facts
    (before,) = (tmp_path / "pretrained").glob("*/weights.safetensors")
    after = sorted((tmp_path / "runs").glob("*/weights.safetensors"))
    assert len(after) == asked.seeds
    learned = dict(weights.load(before).named_parameters())
    for file in after:
        for name, parameter in weights.load(file).named_parameters():
            torch.testing.assert_close(parameter, learned[name], rtol=0, atol=1e-6)


def test_a_model_that_is_shown_none_of_its_layers_is_refused(tmp_path, crops):
    options = {
        **SMALL,
        "modalities": {"other": {"sensor": "sentinel-1-grd", "bands": ["VV"], "gsd_m": 10, "projector": "series"}},
    }
    (result,) = bench.run(
        suite(crops, tmp_path, {"blind": {"model": {"name": "omnisat/", "options": options}}}), quiet=True
    )
    assert "ContractError" in result.facts["error"]
    assert "the model takes other" in result.facts["error"]


def test_weights_that_are_not_installed_are_no_fresh_model(tmp_path, crops):
    (result,) = bench.run(
        suite(crops, tmp_path, {"Presto": {"model": {"name": "presto/base", "weights": "presto/base"}}}), quiet=True
    )
    assert "weights='presto/base' is no file, and none are installed" in result.facts["error"]
    assert "everysat convert presto/base FILE" in result.facts["error"]


def test_large_places_are_computed_few_at_a_time(tmp_path, monkeypatch):
    pastis.fake(tmp_path / "pastis")
    asked = suite(tmp_path / "pastis", tmp_path / "out", {"bands": {"baseline": "bands"}}, name="pastis", level="pixel")
    asked.datasets["set"].options["modalities"] = ["s2"]
    fold = bench.Fold(asked.datasets["set"], 0)
    part, labelled = fold.parts["train"], fold.labelled["train"]
    seen = []

    def bands(batch):
        seen.append(len(batch))
        return batch.raster("s2").values[
            batch.raster("s2").row.unique(return_inverse=True)[1].diff(prepend=torch.tensor([-1])) > 0
        ]

    together = extract(bands, part, labelled, "pixel")
    first, seen = seen, []
    monkeypatch.setattr("everysat.features.PIXELS", 128 * 128)
    alone = extract(bands, part, labelled, "pixel")
    assert max(seen) < max(first)
    assert torch.equal(together.x, alone.x)


def test_one_trained_model_is_tested_with_every_subset(tmp_path, crops):
    model = {"name": "omnisat/", "statistics": "data", "options": SMALL}
    row = {"model": model, "how": ["finetune"], "finetune": {"steps": 2, "batch_size": 4}, "trained_on": "all"}
    modalities = {"all": [], "s2": ["s2"], "rain": ["rain"]}
    results = bench.run(suite(crops, tmp_path, {"one": row}, modalities=modalities, labels=["100%"]), quiet=True)
    assert not [r.facts["error"] for r in results if "error" in r.facts]
    assert len(list((tmp_path / "runs").iterdir())) == 2, "a run for each seed, whatever is shown"
    said = [r.evaluations["100%"].confidence[0] for r in results]
    assert not torch.equal(said[0], said[1])
    assert not torch.equal(said[1], said[2])
    (frozen,) = bench.run(
        suite(crops, tmp_path, {"one": {**row, "how": ["probe"]}}, modalities=modalities), only="/ rain /", quiet=True
    )
    assert frozen.facts["parameters"] == results[0].facts["parameters"], "the encoder of all layers"
    with pytest.raises(RecipeError, match="trained_on='s1' is no modality subset of set"):
        suite(crops, tmp_path, {"one": {**row, "trained_on": "s1"}}, modalities=modalities)


def test_a_split_that_leaks_is_refused(tmp_path):
    bigearthnet.fake(tmp_path / "ben")
    options = {"name": "bigearthnet", "score": ["micro_f1"], "parts": {"train": "train", "test": "train"}}
    asked = suite(tmp_path / "ben", tmp_path / "out", {"bands": {"baseline": "bands"}}, **options)
    (result,) = bench.run(asked, quiet=True)
    assert "of train and place 0 of test" in result.facts["error"]
    assert "a score would be too good" in result.facts["error"]
    allowed = suite(tmp_path / "ben", tmp_path / "out", {"bands": {"baseline": "bands"}}, leaks=True, **options)
    (result,) = bench.run(allowed, quiet=True)
    assert "error" not in result.facts
    assert bench.Fold(allowed.datasets["set"], 0).ground == {}, "too few places for a range"


def test_a_table_says_how_far_apart_the_parts_lie(tmp_path):
    fuel_moisture.fake(tmp_path / "fuel", places=60)
    asked = suite(
        tmp_path / "fuel", tmp_path / "out", {"mean": {"baseline": "statistics"}}, name="fuel_moisture", score=["r2"]
    )
    (result,) = bench.run(asked, quiet=True)
    assert result.facts["ground"]["apart_m"] > 1000
    assert "Training labels are alike up to about" in tables(asked, [result])[0].markdown()


def test_weights_are_found_by_the_name_they_are_installed_under(tmp_path, crops, monkeypatch):
    monkeypatch.setenv("EVERYSAT_WEIGHTS", str(tmp_path / "weights"))
    row = {"named": {"model": {"name": "omnisat/", "weights": "omnisat/mine"}}}
    asked = suite(crops, tmp_path / "out", row, modalities={"s2": ["s2"]}, labels=["100%"])
    (result,) = bench.run(asked, quiet=True)
    assert "none are installed under that name" in result.facts["error"]
    modalities = {"s2": {"sensor": "sentinel-2-l2a", "bands": ["B04", "B08"], "gsd_m": 10, "projector": "series"}}
    encoder = omnisat.build("", **{**SMALL, "modalities": modalities})
    (tmp_path / "weights").mkdir()
    weights.save(weights.installed("omnisat/mine"), encoder)
    (result,) = bench.run(asked, quiet=True)
    assert "error" not in result.facts, result.facts
    assert result.facts["parameters"] == sum(p.numel() for p in encoder.parameters())


def test_disturbed_tests_share_the_trained_model_and_change_only_the_tests(tmp_path):
    fuel_moisture.fake(tmp_path / "fuel")
    row = {
        "model": {"name": "omnisat/", "statistics": "data", "options": SMALL, "probabilistic": {"dim": 8}},
        "how": ["finetune"],
        "trained_on": "all",
        "finetune": {"task": {"name": "probabilistic", "options": {"samples": 2}}},
    }
    asked = suite(
        tmp_path / "fuel",
        tmp_path / "out",
        {"product": row, "mean": {**row, "at": {"fusion": "mean"}}, "statistics": {"baseline": "statistics"}},
        name="fuel_moisture",
        folds=[0],
        labels=["100%"],
        score=["rmse"],
        modalities={"all": [], "s2": ["s2"]},
        disturbed={"noise": {"how": "noise", "share": 1.0}, "gone": {"of": "all", "how": "missing", "share": 0.4}},
    )
    asked = asked.model_copy(update={"seeds": 1, "finetune": {"steps": 2, "batch_size": 4, "lr": 1e-3}})
    results = bench.run(asked, quiet=True)
    assert [str(r.cell) for r in results][:4] == [
        f"set / product / {t} / finetune" for t in ("all", "s2", "noise", "gone")
    ]
    assert not [r.facts["error"] for r in results if "error" in r.facts]
    rmse = {(r.cell.model, r.cell.modalities): r.evaluations["100%"].score("rmse").mean for r in results}
    assert len(set(rmse.values())) == len(rmse), "each title, and each fusion, tells something else"
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1, "one training for two fusions and four titles"
    assert all(r.facts["samples"] == results[0].facts["samples"] for r in results)
    main, subsets = tables(asked, results)
    assert [row[:3] for row in main.rows] == [
        (m, "all", h) for m, h in (("product", "finetune"), ("mean", "finetune"), ("statistics", "probe"))
    ]
    assert subsets.columns == ("model", "how", "all", "s2", "noise", "gone")
    assert [sum(str(row[i]).startswith("**") for row in subsets.rows) for i in range(2, 6)] == [1, 1, 1, 1]
    assert subsets.rows[0][3].strip("*= ") == f"{rmse['product', 's2']:.3f}"
    assert "by what is shown" in save(asked, results)[2].read_text()
    fold = bench.Fold(asked.datasets["set"], 0)
    train, test = (fold.showing("noise").parts[name].place(0) for name in ("train", "test"))
    whole = fold.parts["test"].place(0)
    assert torch.equal(train.raster("s2").values, fold.parts["train"].place(0).raster("s2").values)
    assert not torch.equal(test.raster("s2").values, whole.raster("s2").values)
    assert torch.equal(test.raster("label").values, whole.raster("label").values)
    with pytest.raises(RecipeError, match="must be one of all"):
        suite(tmp_path, tmp_path, disturbed={"x": {"of": "s3", "how": "noise"}})
