"""Imports go one way: everything below may be used, nothing above, no sibling, no cycle; and ``import everysat`` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "everysat"
LAYERS = (
    ("find", "progress", "table"),
    ("sensors",),
    ("types",),
    ("io", "nn"),
    ("data", "models", "objectives", "tasks", "baselines"),
    ("collect",),
    ("recipe", "manifest", "checkpoint", "logbook"),
    ("suite",),
    ("optimizer", "trainee"),
    ("train", "evaluate", "store", "report", "hub", "exported", "locate"),
    ("mapping",),
    ("predict",),
    ("polygons",),
    ("features",),
    ("fold",),
    ("bench",),
    ("tables", "demo", "words_demo"),
    ("cli", "serve"),
)
"""From the bottom to the top. Parts of one layer do not import each other; files of one part may."""
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


def module_name(file: Path, package: Path = PACKAGE) -> str:
    parts = [*file.relative_to(package.parent).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str) -> set[str]:
    """Modules of the package that ``source`` imports anywhere, also in functions; what only type checkers see does not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (above, node.module or "") if part)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "everysat" and name != "everysat"}


def wrong_imports(module: str, imported: set[str]) -> list[str]:
    """Imports that go up or sideways."""
    part = module.split(".")[1]
    wrong = []
    for name in sorted(imported):
        other = name.split(".")[1]
        if other in RANK and other != part and RANK[other] >= RANK[part]:
            wrong.append(f"{module} (layer {RANK[part]}) imports {name} (layer {RANK[other]})")
    return wrong


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of one cycle of ``graph``, empty when there is none."""
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> list[str]:
        if state.get(module) == 1:
            return [*path[path.index(module) :], module]
        if state.get(module) == 2:
            return []
        state[module] = 1
        for other in sorted(graph.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        state[module] = 2
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    sources = {module_name(file): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    every = {module: imports(text, module) for module, text in sources.items()}
    return {module: {name for name in names if name in sources and name != module} for module, names in every.items()}


def test_every_part_has_a_layer(graph: dict[str, set[str]]) -> None:
    parts = {module.split(".")[1] for module in graph if "." in module}
    assert parts <= set(RANK), f"give {parts - set(RANK)} a place in LAYERS"
    assert {"find", "sensors", "types"} <= parts


def test_imports_go_down_only(graph: dict[str, set[str]]) -> None:
    wrong = [line for module, names in graph.items() if "." in module for line in wrong_imports(module, names)]
    assert not wrong, "\n".join(wrong)


def test_no_cycle(graph: dict[str, set[str]]) -> None:
    assert not cycle(graph)


def test_the_package_itself_imports_nothing_at_once(graph: dict[str, set[str]]) -> None:
    assert graph["everysat"] == set()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("everysat.io.read", "from everysat.types import Raster", 0),
        ("everysat.io.read", "from everysat.io import grid", 0),
        ("everysat.io.read", "import everysat.nn.attention", 1),
        ("everysat.io.read", "from .. import nn", 1),
        ("everysat.io.read", "def f():\n    from everysat.train import train", 1),
        ("everysat.models.a", "from everysat.tasks.classify import build", 1),
        ("everysat.types", "from everysat import io", 1),
        ("everysat.sensors", "from everysat.find import suggest", 0),
        ("everysat.types", "if TYPE_CHECKING:\n    from everysat.io import read", 0),
        ("everysat.types", "import torch, rasterio", 0),
    ],
)
def test_the_rule_sees_what_it_should(module: str, source: str, wrong: int) -> None:
    assert bool(wrong_imports(module, imports(source, module))) == bool(wrong)


def test_the_rule_sees_cycles() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import everysat", ("torch", "numpy", "rasterio", "pydantic", "tomllib")),
        (
            "import everysat; everysat.Sensor; from everysat import sensors; sensors.get('modis')",
            ("torch", "numpy", "rasterio"),
        ),
        ("import everysat; everysat.Raster", ("rasterio", "odc", "xarray", "sklearn")),
    ],
)
def test_light_imports_stay_light(statement: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(heavy) & set(done.stdout.split())
