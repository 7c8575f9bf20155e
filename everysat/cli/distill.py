"""The command that teaches students: one model per modality from one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from everysat.cli.options import Quiet, Settings, show

app = typer.Typer()


@app.command()
def distill(recipe: str, settings: Settings = None, quiet: Quiet = False) -> None:
    """Train on several modalities, or from a teacher, and get one model for each modality that runs alone. Again to resume."""
    from everysat.recipe import Recipe
    from everysat.train import train

    loaded = Recipe.load(recipe, settings or ())
    if loaded.task is None or loaded.task.name.partition("/")[0] != "distill":
        raise ValueError(
            f"recipe {recipe} distils nothing: its task must be distill/discom, contrast, logits, features or alone; run it with: everysat "
            f"{'finetune' if loaded.task else 'pretrain'} {recipe}"
        )
    run = train(loaded, quiet=quiet)
    files = write(run)
    show(scores(run, files))
    for path in files.values():
        print(path)


def write(run: Any) -> dict[str, Path]:
    """A weights file of each modality in the folder of a finished run, with its contract and its task."""
    from everysat.manifest import sha256
    from everysat.models import weights

    facts = {
        "source": "distilled",
        "run": run.recipe.name,
        "recipe": run.recipe.plain(),
        "distilled_from_sha256": sha256(run.weights),
    }
    return {
        name: weights.save(run.folder / f"{name}.safetensors", encoder, task, facts)
        for name, (encoder, task) in run.objective.students(run.encoder).items()
    }


def scores(run: Any, files: Mapping[str, Path]) -> Any:
    """What each student reads, how large it is and how well it did on the validation places at the end of the run."""
    from everysat.table import Table

    students, last = run.objective.students(run.encoder), run.log[-1] if run.log else {}
    rows = []
    for name, (encoder, task) in students.items():
        parameters = sum(p.numel() for part in (encoder, task) for p in part.parameters())
        found = {metric: last.get(f"validation_{name}_{metric}") for metric in task.metrics()}
        told = {metric: value for metric, value in found.items() if value is not None}
        rows.append(
            {
                "student": name,
                "reads": ", ".join(encoder.inputs),
                "parameters": parameters,
                **told,
                "file": files[name].name,
            }
        )
    note = [] if run.recipe.validation else ["The recipe has no validation places, so there is no score."]
    return Table.of("Students", rows, note)
