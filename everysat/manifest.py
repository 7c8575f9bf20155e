"""What a result was made from: versions, settings, hashes, seed and machine, as JSON beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from everysat.io.output import replacing

PACKAGE = "everysat"


class Manifest:
    """Facts about a run in a JSON file that is rewritten, whole, with each change.

    ``with Manifest(path, recipe=...) as manifest: ...; manifest.note(weights_sha256=...)`` writes ``status`` running at the
    start, then complete, interrupted or failed. Facts of an earlier start at the same path are kept under ``earlier``.
    """

    def __init__(self, path: str | Path, **facts: Any) -> None:
        self.path = Path(path)
        self.facts: dict[str, Any] = {"status": "running", "started": now(), "ended": None, **environment(), **facts}

    def __enter__(self) -> Manifest:
        before = read(self.path)
        if before is not None:
            kept = ("status", "started", "ended", "commit", "resumed_at_step")
            earlier = before.get("earlier", [])
            self.facts["earlier"] = [*earlier, {k: before[k] for k in kept if k in before}]
        self.note()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        status = "complete" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        self.note(status=status, ended=now(), **({"error": f"{kind.__name__}: {error}"} if kind is not None else {}))

    def note(self, **facts: Any) -> None:
        """Add facts (JSON-able) and write the file."""
        self.facts.update(facts)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            partial.write_text(
                json.dumps(self.facts, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def read(path: str | Path) -> dict[str, Any] | None:
    """Facts of a manifest; None when there is none or it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def environment() -> dict[str, Any]:
    """Command, versions of this package and what it requires, commit of the code if it is in a git tree, machine."""
    return {
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def versions() -> dict[str, str]:
    """Installed versions of Python, this package and its requirements."""
    found = {"python": platform.python_version()}
    try:
        requirements = importlib.metadata.requires(PACKAGE) or []
        names = [PACKAGE, *(re.split(r"[^\w.\-]", r)[0] for r in requirements if "extra ==" not in r)]
    except importlib.metadata.PackageNotFoundError:
        names = []
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """Commit of the git tree that ``folder`` is in, with ``+changes`` when tracked files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def sha256(path: str | Path) -> str:
    """Hash of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(dataset: Any, places: int = 8) -> str:
    """``dataset.fingerprint()`` if it has one, else a hash of its length and of the content of a few places evenly spread.

    The second kind begins with ``sampled:`` because a change in another place does not change it.
    """
    if hasattr(dataset, "fingerprint"):
        return str(dataset.fingerprint())
    digest = hashlib.sha256(str(len(dataset)).encode())
    for index in sorted({i * len(dataset) // places for i in range(places)}) if len(dataset) else []:
        for name, layer in sorted(dataset[index].layers.items()):
            digest.update(name.encode())
            for part in _parts(layer):
                digest.update(part)
    return f"sampled:{digest.hexdigest()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parts(layer: Any) -> list[bytes]:
    """Content of a layer as bytes: arrays as they lie, everything else as text."""
    fields: Mapping[str, Any] = vars(layer)
    return [v.numpy().tobytes() if hasattr(v, "numpy") else repr(v).encode() for v in fields.values()]
