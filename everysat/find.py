"""Find a model, dataset, objective or task by name: ``find("models", "omnisat/treesat")``.

A name is ``module`` or ``module/variant``; the module is looked up in ``everysat/<kind>/`` under that file name, so adding
one is adding a file. Third parties use a dotted path, ``my_package.my_model/small``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

KINDS = ("models", "data", "objectives", "tasks")
_FOLDER = Path(__file__).parent


def names(kind: str) -> tuple[str, ...]:
    """Names of every module of a kind that can be asked for, sorted. A module that offers something defines ``build``."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    files = sorted((_FOLDER / kind).glob("[!_]*.py"))
    return tuple(f.stem for f in files if "\ndef build(" in f.read_text(encoding="utf-8"))


def find(kind: str, name: str) -> tuple[ModuleType, str]:
    """The module that ``name`` stands for and the variant behind the slash (empty when there is none).

    Raises:
        LookupError: no such module; the message offers the nearest names.
    """
    stem, _, variant = name.partition("/")
    known = names(kind)
    if "." in stem:
        module = importlib.import_module(stem)
        if not hasattr(module, "build"):
            raise LookupError(f"{stem} has no function build(); a third-party module of kind {kind} must define it")
        return module, variant
    stem = stem.replace("-", "_")
    if stem not in known:
        raise LookupError(f"no {kind.rstrip('s')} is called {name!r}. {suggest(stem, known)}")
    return importlib.import_module(f"everysat.{kind}.{stem}"), variant


def suggest(word: str, known: Iterable[str]) -> str:
    """A sentence that offers the known words nearest to ``word``, for error messages."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(known)}." if known else "None are known."
