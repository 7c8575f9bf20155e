"""The tutorial runs, pages that are made from the code hold what they should, and links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from everysat import sensors
from everysat.find import find, names

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted((REPO / "docs").glob("*.md"))


def python_blocks(page: Path) -> str:
    """The fenced Python blocks of a page, each on the lines where it stands there, so that tracebacks point into the page."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        kept.append(line if inside and not fence else "")
        inside = (line == "```python") if fence else inside
    return "\n".join(kept)


@pytest.mark.parametrize(
    "name",
    [
        "index.md",
        "tutorial.md",
        "places.md",
        "datasets.md",
        "evaluation.md",
        "anysat.md",
        "any_sensor.md",
        "maps.md",
        "words.md",
        "confidence.md",
        "distill.md",
        "adapt.md",
    ],
)
def test_the_python_of_a_page_runs(name: str) -> None:
    source = python_blocks(REPO / "docs" / name)
    assert source.strip()
    exec(compile(source, name, "exec"), {"__name__": name})


@pytest.fixture(scope="module")
def generated() -> dict[str, Any]:
    return runpy.run_path(str(REPO / "docs" / "generated_pages.py"))


def test_the_sensors_page_holds_every_band(generated: dict[str, Any]) -> None:
    page = generated["sensors_page"]()
    for name in sensors.names():
        sensor = sensors.get(name)
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert sensor.source in section
        rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert len(rows) == (len(sensor.bands) if len(sensor.bands) <= 40 else 10)
        assert all(line.count("|") == rows[0].count("|") for line in rows)


def test_the_datasets_page_lists_all_that_are_published(generated: dict[str, Any]) -> None:
    table = generated["datasets_table"]()
    published = [name for name in names("data") if getattr(find("data", name)[0], "SOURCE", "")]
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == published
    assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1


def test_the_api_has_a_page_for_every_documented_module(generated: dict[str, Any]) -> None:
    modules = generated["modules"]()
    assert {"everysat", "everysat.sensors", "everysat.types", "everysat.find", "everysat.models.omnisat"} <= set(
        modules
    )
    assert not [name for name in modules if "._" in name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_the_pages_name_exists(page: Path) -> None:
    """Paths such as `everysat/types.py` and modules such as `everysat.io.grid` in the text."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:everysat|tests|docs|recipes|benchmarks)/[\w./-]*)`", text):
        assert path.endswith("/x.py") or (REPO / path).exists(), f"{page.name} names {path}"  # x stands for any name
    for module in re.findall(r"`(everysat(?:\.[a-z_0-9]+)+)`", text):
        base = REPO.joinpath(*module.split("."))
        assert base.is_dir() or base.with_suffix(".py").exists(), f"{page.name} names {module}"


def test_the_architecture_page_places_every_part() -> None:
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    for part in (REPO / "everysat").iterdir():
        if not part.name.startswith("_") and (part.suffix == ".py" or (part / "__init__.py").exists()):
            assert f"`everysat/{part.name}`" in text, f"say on docs/architecture.md what everysat/{part.name} is"
