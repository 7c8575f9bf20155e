"""Evaluation: draws are kept apart, uncertainty is of groups, differences are paired, tables keep their numbers."""

from __future__ import annotations

import json

import pytest
import torch

from everysat.evaluate import HOW, Samples, evaluate, of_predictions, results_table
from everysat.nn.probe import fit_linear
from everysat.nn.scores import SCORES
from everysat.table import Table

CLASSES = ("water", "forest", "city")
DRAWS = [(list(range(30)), list(range(30, 60))), (list(range(30, 60)), list(range(30)))]


def samples(seed=0, noise=1.0, per_group=20):
    g = torch.Generator().manual_seed(seed)
    of_group = torch.arange(60) % 3
    group = torch.arange(60).repeat_interleave(per_group)
    middle = torch.eye(3)[of_group] * 2 + noise * torch.randn(60, 3, generator=g)
    return Samples(middle[group] + 0.1 * torch.randn(len(group), 3, generator=g), of_group[group], group, CLASSES)


def perfect(data):
    def how(draw):
        return torch.eye(3)[data.label[data.of_groups(draw[1])]]

    return how


@pytest.mark.parametrize("how", ["probe", "knn", "forest"])
def test_separable_features_score_high_and_noise_scores_low(how):
    assert evaluate(samples(noise=0.1), DRAWS, how).score().mean > 0.98
    assert evaluate(samples(noise=20.0), DRAWS, how).score().mean < 0.6


def test_only_training_groups_are_fitted_and_only_test_groups_scored():
    data = samples(noise=0.1)
    spoilt = Samples(
        data.x, torch.where(data.of_groups(range(30, 60)), (data.label + 1) % 3, data.label), data.group, CLASSES
    )
    result = evaluate(spoilt, DRAWS[:1], "probe")
    assert result.score("accuracy").mean < 0.02, "test labels leaked into the fit"
    assert result.matrix().sum() == 600
    assert result.groups[0].tolist() == DRAWS[0][1]


def test_a_function_may_predict_instead():
    data = samples()
    result = evaluate(data, DRAWS, perfect(data))
    for name in SCORES:
        score = result.score(name)
        assert (score.mean, score.low, score.high, score.std) == (1, 1, 1, 0), name
    assert result.fitted == [None, None]


def test_mean_and_std_over_draws():
    result = evaluate(samples(noise=1.5), DRAWS, "probe")
    values = torch.tensor([float(SCORES["macro_f1"][1](c.sum(0))) for c in result.counts])
    score = result.score()
    assert score.mean == pytest.approx(float(values.mean()))
    assert score.std == pytest.approx(float(values.std()))
    assert (score.draws, score.groups) == (2, 60)
    assert score.low < score.mean < score.high
    assert "mean over the classes" in score.definition


def test_the_interval_is_of_groups_not_of_pixels():
    """Twenty times the pixels of the same polygons is no more evidence."""
    few, many = (evaluate(samples(noise=1.5, per_group=n), DRAWS, "probe").score("accuracy") for n in (2, 40))
    assert many.high - many.low > 0.7 * (few.high - few.low)
    n = 60
    p = many.mean
    assert many.high - many.low == pytest.approx(2 * 1.96 * (p * (1 - p) / n) ** 0.5, rel=0.35)


def test_differences_are_paired():
    data = samples(noise=1.5)
    a, b = evaluate(data, DRAWS, "probe"), evaluate(data, DRAWS, "knn")
    same = a.less(a)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    gap = a.less(b)
    assert gap.mean == pytest.approx(a.score().mean - b.score().mean)
    assert gap.high - gap.low < (a.score().high - a.score().low) + (b.score().high - b.score().low)
    better = evaluate(data, DRAWS, perfect(data)).less(b)
    assert better.low > 0
    with pytest.raises(ValueError, match="same draws"):
        a.less(evaluate(data, DRAWS[:1], "knn"))


def test_calibration_uses_held_out_groups():
    data = samples(noise=2.0)
    names_groups = torch.randn(60, 20, generator=torch.Generator().manual_seed(1))[data.group]
    data = Samples(torch.cat([data.x, names_groups], 1), data.label, data.group, CLASSES)
    result, raw = (evaluate(data, DRAWS, "probe", strengths=[1e-4], calibrate=c) for c in (True, False))
    assert result.calibration()["error"] < 0.6 * raw.calibration()["error"]
    coverage, risk = result.calibration()["risk_coverage"]
    assert risk[-1] == pytest.approx(1 - float(torch.cat(result.correct).double().mean()))
    assert len(coverage) == len(risk)


def test_samples_of_a_grid_leave_out_what_is_unlabelled_or_unseen():
    x = torch.arange(2 * 3 * 4, dtype=torch.float32).view(1, 2, 3, 4)
    x[0, 1, 0, 0] = torch.nan
    label = torch.zeros(3, 4, dtype=torch.long)
    label[1] = -1
    group = torch.arange(12).view(3, 4)
    data = Samples.of_grid(x, label, group, CLASSES)
    assert data.group.tolist() == [1, 2, 3, 8, 9, 10, 11]
    assert data.x[-1].tolist() == [11, 23]


@pytest.mark.parametrize(
    ("draws", "how", "message"),
    [
        ([([0, 1], [1, 2])], "probe", "group 1 is in training and test"),
        ([([0, 1], [99])], "probe", "no sample is of the test groups"),
        ([], "probe", "draws is empty"),
        (DRAWS, "prob", "Did you mean probe"),
        (DRAWS, lambda draw: torch.ones(2, 3), "expected \\(600, 3\\)"),
        (DRAWS, lambda draw: torch.full((600, 3), torch.nan), "not finite"),
    ],
)
def test_bad_input_is_named(draws, how, message):
    with pytest.raises((ValueError, LookupError), match=message):
        evaluate(samples(), draws, how)


def test_unknown_scores_are_refused():
    with pytest.raises(LookupError, match="Did you mean macro_f1"):
        evaluate(samples(), DRAWS).score("macrof1")


def test_tables_keep_definitions_and_numbers(tmp_path):
    data = samples()
    results = {("probe", "all"): evaluate(data, DRAWS), ("knn", "all"): evaluate(data, DRAWS, "knn")}
    table = results_table(results, columns=("how", "bands"))
    text = table.markdown()
    for name in ("macro_f1", "accuracy"):
        assert SCORES[name][0] in text
    score = results["probe", "all"].score()
    assert f"| probe | all | {score} |" in text
    assert json.loads(table.json())["rows"][0]["macro_f1"]["mean"] == score.mean
    for suffix in ("md", "csv", "json"):
        assert table.save(tmp_path / f"results.{suffix}").stat().st_size > 0
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="must end with"):
        table.save(tmp_path / "results.xlsx")


def test_confusion_table_rows_add_up_to_one():
    table = evaluate(samples(noise=1.5), DRAWS).confusion_table()
    assert [sum(row[1:]) for row in table.rows] == pytest.approx([1, 1, 1])
    assert table.columns == ("label", *CLASSES)


def test_a_table_refuses_ragged_rows_and_prints(capsys):
    from rich.console import Console

    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table("t", ("a", "b"), (("x",),))
    Console(width=80).print(Table.of("Title", [{"a": "x", "b": 0.12345}, {"a": "y"}], ["a note"]))
    out = capsys.readouterr().out
    assert "0.123" in out
    assert "a note" in out


def test_draws_that_test_other_groups_add_evidence_and_repeated_ones_do_not():
    data = samples(noise=1.5)

    def width(draws):
        score = evaluate(data, draws).score("accuracy")
        return score.high - score.low

    alone = [width([draw]) for draw in DRAWS]
    assert width([DRAWS[0]] * 2) == pytest.approx(alone[0])
    assert width(DRAWS) < 0.85 * sum(alone) / 2


@pytest.mark.parametrize("how", ["probe", "forest"])
def test_values_and_several_labels_are_scored_too(how):
    data = samples(noise=0.3)
    several = Samples(data.x, torch.stack([data.label != c for c in range(3)], 1), data.group, CLASSES)
    values = Samples(data.x, 3 * data.x[:, 0] + 7, data.group, ("height",))
    assert evaluate(several, DRAWS, how).score("macro_f1").mean > 0.95
    found = evaluate(values, DRAWS, how)
    assert found.score("r2").mean > 0.9
    assert found.score("rmse").low < found.score("rmse").mean < found.score("rmse").high
    with pytest.raises(LookupError, match="no score of values is called 'macro_f1'"):
        found.score()
    never = Samples(data.x, several.label & torch.tensor([True, True, False]), data.group, CLASSES)
    assert evaluate(never, DRAWS, how).score("macro_f1").mean > 0.95
    with pytest.raises(LookupError, match="how='knn' is unknown for values"):
        evaluate(values, DRAWS, "knn")


@pytest.mark.parametrize("strength", [1e-4, 1.0])
def test_what_is_held_out_chooses_and_does_not_train(strength):
    """Held-out labels are what the fit of one strength predicts there, so that this strength is the best on them."""
    data = samples(noise=3.0)
    train, apart = data.of_groups(range(20)), data.of_groups(range(20, 40))
    draw = list(range(20)), list(range(40, 60)), list(range(20, 40))
    one = fit_linear(data.x[train], data.label[train], data.group[train], classes=CLASSES, strengths=[strength])
    told = torch.where(apart, one.probabilities(data.x).argmax(1), data.label)
    found = evaluate(Samples(data.x, told, data.group, CLASSES), [draw], "probe", strengths=[1e-4, 1.0])
    assert found.fitted[0].strength == strength
    assert torch.equal(found.fitted[0].weight, one.weight), "held-out labels were trained on"
    assert found.groups[0].tolist() == draw[1]
    with pytest.raises(ValueError, match="group 40 is in test and validation"):
        evaluate(data, [(*draw[:2], [40])], "probe")


def test_values_held_out_choose_the_strength():
    data = samples(noise=0.3)
    values = Samples(data.x, data.x[:, 0], data.group, ("height",))
    draw = list(range(20)), list(range(40, 60))
    away = Samples(
        data.x, torch.where(data.of_groups(range(20, 40)), values.label.mean(), values.label), data.group, ("height",)
    )
    chosen = [evaluate(of, [(*draw, list(range(20, 40)))], "probe").fitted[0].strength for of in (values, away)]
    assert chosen == [1e-4, 0.1]


def test_a_draw_that_comes_twice_is_fitted_once(monkeypatch):
    torch.manual_seed(0)
    samples = Samples(torch.randn(60, 3), torch.randint(2, (60,)), torch.arange(60), ("a", "b"))
    first, second = (list(range(40)), list(range(40, 60))), (list(range(20)), list(range(40, 60)))
    fitted = []

    def fit(*args, seed, **options):
        fitted.append(seed)
        return fit_linear(*args, seed=seed, **options)

    monkeypatch.setitem(HOW["classes"], "probe", fit)
    found = evaluate(samples, [first, second, first], "probe")
    assert fitted == [0, 1]
    assert len(found.counts) == len(found.groups) == len(found.confidence) == len(found.correct) == 3
    assert torch.equal(found.counts[0], found.counts[2])
    assert not torch.equal(found.confidence[0], found.confidence[1])


def test_ready_predictions_score_as_those_of_a_function_do(generator) -> None:
    label, group = torch.randint(3, (60,), generator=generator), torch.arange(60) // 5
    said = [torch.rand(60, 3, generator=generator) for _ in range(2)]
    samples = Samples(torch.zeros(60, 1), label, group, ("a", "b", "c"))
    trained = Samples(
        torch.zeros(61, 1), torch.cat([label[:1], label]), torch.cat([group[:1] - 1, group]), samples.classes
    )
    waiting = iter(said)
    by_function = evaluate(trained, [([-1], list(range(12)))] * 2, lambda _: next(waiting))
    ready = of_predictions(samples, said)
    assert ready.score("macro_f1") == by_function.score("macro_f1")
    assert ready.score("accuracy").values[0] == pytest.approx(float((said[0].argmax(1) == label).double().mean()))
    with pytest.raises(ValueError, match="shape"):
        of_predictions(samples, [said[0][:5]])
