"""Output appears when it is complete: it is written beside its final name and renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` (``.partial`` appended) to write a file or a folder to; renamed to ``path`` if the block succeeds.

    What stood at ``path`` before is replaced at that moment, and stays untouched if the block fails; nothing else is left.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    partial = path.with_name(path.name + ".partial")
    remove(partial)
    try:
        yield partial
        move(partial, path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder tree, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(partial: Path, path: Path) -> None:
    """Rename a complete file or folder to ``path``; what stands there is replaced."""
    if not path.is_dir():
        os.replace(partial, path)
        return
    # A folder that is not empty cannot be replaced in one step: the old one moves aside first.
    aside = path.with_name(path.name + ".replaced.partial")
    remove(aside)
    os.replace(path, aside)
    try:
        os.replace(partial, path)
    except BaseException:
        os.replace(aside, path)
        raise
    remove(aside)
