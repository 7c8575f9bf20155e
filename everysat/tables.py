"""Tables and the report of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from everysat.bench import Result
from everysat.evaluate import Evaluation, Score
from everysat.nn.scores import KINDS, LESS_IS_BETTER
from everysat.report import Report, curves_figure, intervals_figure, matrix_figure
from everysat.suite import Cell, Data, Suite, amount
from everysat.table import Table


def tables(suite: Suite, results: Sequence[Result]) -> list[Table]:
    """Of each dataset a table with a row a model and way, a column a label fraction with mean and 95 % interval of the first score, and what it cost, on
    the first of its modality subsets; and, where there are several, a table with a column for each of them, with all labels. ``=`` marks what is not
    worse than the best of its modality subset: the interval of the paired difference holds 0."""
    return [table for _, some in by_dataset(suite, results) for table in some]


def by_dataset(suite: Suite, results: Sequence[Result]) -> list[tuple[str, list[Table]]]:
    """The same, by title of the dataset."""
    found = []
    for title, data in suite.datasets.items():
        mine = [result for result in results if result.cell.dataset == title]
        if mine or not results:
            best, first = _best(data, mine), data.titles[0]
            whole = {(r.cell.model, r.cell.how) for r in mine if r.cell.modalities == first}
            main = [r for r in mine if r.cell.modalities == first or (r.cell.model, r.cell.how) not in whole]
            several = len({result.cell.modalities for result in mine}) > 1
            found.append(
                (
                    title,
                    [_table(suite, title, data, main, best), *([_subsets(title, data, mine, best)] if several else [])],
                )
            )
    return found


Best = Mapping[tuple[str, str], Evaluation]
"""By modality subset and label fraction."""


COSTS = ("parameters", "features, s", "fitting, s")
"""Columns that say what a row took."""


def _table(suite: Suite, title: str, data: Data, results: list[Result], best: Best) -> Table:
    rows: list[dict[str, Any]] = []
    for result in results:
        row: dict[str, Any] = {"model": result.cell.model, "layers": result.cell.modalities, "how": result.cell.how}
        for labels in data.labels:
            one = result.evaluations.get(labels)
            row[labels] = (
                "" if one is None else _cell(one, best.get((result.cell.modalities, labels)), _first(data, one))
            )
        row["parameters"] = result.facts.get("parameters") or ""
        row["features, s"] = _seconds(result.facts.get("seconds_features"))
        row["fitting, s"] = _seconds(result.facts.get("seconds_fitting"))
        if "error" in result.facts:
            row["failed"] = result.facts["error"]
        rows.append(row)
    rows += [_published(entry, data) for entry in data.published]
    return Table.of(f"{title}: {_score_name(data, results)}", rows, _notes(suite, data, results))


def _subsets(title: str, data: Data, results: list[Result], best: Best) -> Table:
    """A row a model and way, a column a modality subset, with all labels."""
    labels, rows, failed = data.labels[-1], [], []
    titles = [one for one in data.titles if any(r.cell.modalities == one for r in results)]
    for model, how in dict.fromkeys((r.cell.model, r.cell.how) for r in results):
        row = {"model": model, "how": how}
        for result in (r for r in results if (r.cell.model, r.cell.how) == (model, how)):
            one, shown = result.evaluations.get(labels), result.cell.modalities
            if one is not None:
                score, leader = one.score(_first(data, one)), best[shown, labels]
                text = f"{score.mean:.3f}"
                row[shown] = f"**{text}**" if leader is one else f"{text} =" if tied(one, leader, score.name) else text
            elif "error" in result.facts:
                row[shown] = "failed"
                failed.append(f"{result.cell} failed: {result.facts['error']}")
        if len(row) > 3:
            rows.append({"model": model, "how": how, **{one: row.get(one, "") for one in titles}})
    return Table.of(f"{title}, {labels} of the labels, by what is shown: {_score_name(data, results)}", rows, failed)


def _cell(one: Evaluation, best: Evaluation | None, name: str) -> str:
    score = one.score(name)
    text = f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]"
    if best is None or best is one:
        return f"**{text}**"
    return f"{text} =" if tied(one, best, name) else text


def tied(one: Evaluation, best: Evaluation, name: str) -> bool:
    """Whether the interval of the paired difference holds 0."""
    less = one.less(best, name)
    return less.low <= 0 <= less.high


def _best(data: Data, results: Sequence[Result]) -> dict[tuple[str, str], Evaluation]:
    """Of each modality subset and label fraction the evaluation with the best mean."""
    found: dict[tuple[str, str], tuple[float, Evaluation]] = {}
    for result in results:
        for labels, one in result.evaluations.items():
            name = _first(data, one)
            value = one.score(name).mean * (-1 if name in LESS_IS_BETTER else 1)
            where = result.cell.modalities, labels
            if where not in found or value > found[where][0]:
                found[where] = value, one
    return {where: one for where, (_, one) in found.items()}


def _first(data: Data, one: Evaluation) -> str:
    known = [name for name in data.score if name in KINDS[one.kind]]
    if not known:
        raise LookupError(f"score={data.score} has none that fits {one.kind}; there are {', '.join(KINDS[one.kind])}")
    return known[0]


def _score_name(data: Data, results: Sequence[Result]) -> str:
    return next((_first(data, one) for result in results for one in result.evaluations.values()), data.score[0])


def _notes(suite: Suite, data: Data, results: Sequence[Result]) -> list[str]:
    notes = [data.about] if data.about else []
    one = next((one for result in results for one in result.evaluations.values()), None)
    if one is not None:
        score: Score = one.score(_first(data, one))
        facts = next(result.facts for result in results if result.evaluations)
        notes += [
            f"{score.name}: {score.definition}.",
            f"Mean over {score.draws} draws ({len(data.folds)} folds × {suite.seeds} draws of labels), [95 % interval] from resampling {score.groups} test "
            f"places. Bold: best of its layers; =: the interval of the paired difference to it holds 0. Places (all folds together): {_counts(facts['places'])}; "
            f"labelled samples: {_counts(facts['samples'])}.",
        ]
        if facts.get("ground"):
            reach, apart = (f"{facts['ground'][name] / 1000:.3g} km" for name in ("correlated_m", "apart_m"))
            notes.append(
                f"Training labels are alike up to about {reach}; half of the test places lie farther than {apart} from all training places (first fold)."
            )
    shown = {result.cell.model for result in results}
    return notes + [f"{name}: {row.note}" for name, row in suite.models.items() if row.note and name in shown]


def _counts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in parts.items())


def _published(entry: dict[str, Any], data: Data) -> dict[str, Any]:
    label = entry.get("labels", data.labels[-1])
    return {
        "model": f"{entry['model']} (published)",
        "layers": entry.get("layers", ""),
        "how": entry.get("source", ""),
        label: f"{entry['value']:g}",
    }


def _seconds(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def report(suite: Suite, results: Sequence[Result]) -> Report:
    """Tables and pictures on one HTML page."""
    page = Report(suite.title or suite.name, suite.about)
    for title, (table, *subsets) in by_dataset(suite, results):
        data = suite.datasets[title]
        mine = [result for result in results if result.cell.dataset == title and result.evaluations]
        page.add_heading(title)
        for one in (table, *subsets):
            page.add_table(replace(one, title=one.title.removeprefix(title).lstrip(":, ")))
        if not mine:
            continue
        rows = {_title(result.cell, data): _scores(data, result) for result in mine}
        page.add_figure(
            intervals_figure(rows, x=_score_name(data, mine)),
            "Mean and 95 % interval, by share of labels.",
            alt=f"Scores on {title}",
        )
        shares = [labels for labels in data.labels if amount(labels)[0]]
        if len(shares) > 1:
            first = next(iter(data.modalities))
            whole = [result for result in mine if result.cell.modalities == first]
            lines = {_title(r.cell, data): _line(_scores(data, r), shares) for r in whole}
            ticks = {amount(labels)[0]: labels for labels in shares}
            page.add_figure(
                curves_figure(lines, x="share of labels", y=_score_name(data, mine), log_x=True, ticks=ticks),
                f"By share of labels: {first}. Bars are standard deviations over draws.",
            )
        _details(page, data, mine)
    page.add_facts(
        {"cells": len(results), "failed": sum("error" in r.facts for r in results), "folder": str(suite.folder)}
    )
    return page


def _details(page: Report, data: Data, results: Sequence[Result]) -> None:
    """Confusion and calibration of the best model on all layers and labels."""
    for (modalities, labels), best in _best(data, results).items():
        if modalities == next(iter(data.modalities)) and labels == data.labels[-1] and best.kind == "classes":
            name = next(str(r.cell.model) for r in results if any(best is one for one in r.evaluations.values()))
            said, true, _ = best.calibration()["reliability"]
            error = best.calibration()["error"]
            page.add_figure(
                matrix_figure(best.matrix().numpy(), best.classes), f"Best with {labels}: {name}.", wide=False
            )
            line = {"": (said.tolist(), true.tolist(), None)}
            page.add_figure(
                curves_figure(line, x="confidence", y="accuracy", diagonal=True),
                f"Its calibration: expected calibration error {error:.3f}.",
                wide=False,
            )


def _title(cell: Cell, data: Data) -> str:
    parts = [cell.model, cell.how if cell.how != "probe" else "", cell.modalities if len(data.modalities) > 1 else ""]
    return ", ".join(part for part in parts if part)


def _scores(data: Data, result: Result) -> dict[str, Score]:
    return {labels: one.score(_first(data, one)) for labels, one in result.evaluations.items()}


def _line(scores: dict[str, Score], shares: Sequence[str]) -> tuple[list[float], list[float], list[float]]:
    there = [labels for labels in shares if labels in scores]
    return (
        [amount(labels)[0] for labels in there],
        [scores[labels].mean for labels in there],
        [scores[labels].std for labels in there],
    )


def page(suite: Suite, results: Sequence[Result]) -> str:
    """All tables as a page of Markdown, with a heading for each dataset, and what computing them took."""
    parts = [f"# {suite.title or suite.name}", suite.about]
    for title, (main, *subsets) in by_dataset(suite, results):
        parts += [
            f"## {title}",
            *(
                replace(one, title=one.title.removeprefix(title).lstrip(":, ")).markdown().rstrip("\n")
                for one in (main, *subsets)
            ),
        ]
    took = sum(r.facts.get(name) or 0 for r in results for name in ("seconds_features", "seconds_fitting"))
    failed = sum("error" in r.facts for r in results)
    parts.append(
        f"{len(results)} cells, {failed} of them failed; training, features and fitting together took {took / 60:.0f} minutes. Repeat: `everysat bench {suite.name}`."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def save(suite: Suite, results: Sequence[Result]) -> list[Path]:
    """``table.md``, ``scores.csv`` and ``report.html`` in the suite's folder."""
    suite.folder.mkdir(parents=True, exist_ok=True)
    text = suite.folder / "table.md"
    beside = text.with_name(".table.md.part")
    beside.write_text(page(suite, results), encoding="utf-8")
    beside.replace(text)
    rows = [
        {
            "dataset": r.cell.dataset,
            "model": r.cell.model,
            "layers": r.cell.modalities,
            "how": r.cell.how,
            "labels": labels,
            "score": name,
        }
        | {k: getattr(one.score(name), k) for k in ("mean", "std", "low", "high", "draws", "groups")}
        | {k: r.facts.get(k, "") for k in ("parameters", "dim", "seconds_features", "seconds_fitting")}
        for r in results
        for labels, one in r.evaluations.items()
        for name in suite.datasets[r.cell.dataset].score
        if name in KINDS[one.kind]
    ]
    rows += [
        {
            "dataset": r.cell.dataset,
            "model": r.cell.model,
            "layers": r.cell.modalities,
            "how": r.cell.how,
            "error": r.facts["error"],
        }
        for r in results
        if "error" in r.facts
    ]
    return [
        text,
        Table.of(suite.name, rows).save(suite.folder / "scores.csv"),
        report(suite, results).save(suite.folder / "report.html"),
    ]
