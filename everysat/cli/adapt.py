"""The command that moves a classifier to another sensor."""

from __future__ import annotations

from typing import Any

import typer

from everysat.cli.options import Quiet, Settings, show

app = typer.Typer()
SCORES = ("accuracy", "macro_f1", "weighted_f1")


@app.command()
def adapt(recipe: str, settings: Settings = None, quiet: Quiet = False) -> None:
    """Move a classifier from a labelled source to another sensor with few labels, as a recipe says. Again to resume.

    Leaves target.safetensors, which knows the target alone: everysat predict, embed, evaluate and export take it.
    """
    from everysat.models import weights
    from everysat.recipe import Recipe, RecipeError
    from everysat.train import train

    loaded = Recipe.load(recipe, settings or ())
    if loaded.task is None or loaded.task.name.partition("/")[0] != "adapt":
        raise RecipeError(
            f"recipe {recipe} has no task adapt; run it with: everysat {'pretrain' if loaded.task is None else 'finetune'} {recipe}"
        )
    run = train(loaded, quiet=quiet)
    whole: Any = run.encoder
    task: Any = run.objective
    facts = {"source": "trained", "run": loaded.name, "domain": "target", "unlabelled": _protocols(loaded.data)}
    path = weights.save(
        run.folder / "target.safetensors",
        whole.one("target"),
        task,
        {**facts, "recipe": loaded.plain()},
    )
    if "validation_accuracy" in run.log[-1]:
        table = _scores(run.log[-1], loaded)
        table.save(run.folder / "scores.json")
        show(table)
    print(path)


def _protocols(sources: Any) -> str:
    """What is unlabelled in these sources."""
    return ", ".join(dict.fromkeys(source.options.get("protocol", "inductive") for source in sources))


def _scores(row: dict[str, Any], recipe: Any) -> Any:
    from everysat.table import Table
    from everysat.tasks.classify import DEFINITIONS

    protocol, variant = _protocols(recipe.data), recipe.task.name.partition("/")[2] or "shedd"
    found = {"method": variant, "protocol": protocol, **{name: row[f"validation_{name}"] for name in SCORES}}
    notes = [
        {
            "inductive": "Inductive: unlabelled places are training places of the target; those that test were not seen.",
            "transductive": "Transductive: unlabelled places are those that test, without their labels; scores are of these places, not of new ones.",
        }[one]
        for one in protocol.split(", ")
    ]
    return Table.of(
        f"{recipe.name}: target places", [found], [*notes, *(f"{name}: {DEFINITIONS[name]}." for name in SCORES)]
    )
