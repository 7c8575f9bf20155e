"""A table of results: for the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """``rows`` of cells under ``columns``; numbers stay numbers until they are shown. ``notes`` say what the numbers mean."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row!r} has {len(row)} cells for {len(self.columns)} columns")

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> Table:
        """From dicts; columns in the order in which they first occur, a missing cell is empty."""
        columns = tuple(dict.fromkeys(name for row in rows for name in row))
        return cls(title, columns, tuple(tuple(row.get(c, "") for c in columns) for row in rows), tuple(notes))

    def without(self, *columns: str) -> Table:
        """The same without these columns."""
        keep = [i for i, name in enumerate(self.columns) if name not in columns]
        rows = tuple(tuple(row[i] for i in keep) for row in self.rows)
        return Table(self.title, tuple(self.columns[i] for i in keep), rows, self.notes)

    def shown(self) -> list[list[str]]:
        """Cells as text: floats with three decimals."""
        return [[show(cell) for cell in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers (or scores), and are set flush right."""
        return [all(not isinstance(row[i], str) or row[i] == "" for row in self.rows) for i in range(len(self.columns))]

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "|" + "|".join("---:" if right else "---" for right in self.numeric()) + "|"
        lines = [f"**{self.title}**", "", line(self.columns), rule, *(line(row) for row in self.shown())]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """Full precision."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.columns, *self.rows])
        return out.getvalue()

    def json(self) -> str:
        rows = [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]
        return json.dumps({"title": self.title, "rows": rows, "notes": self.notes}, indent=1)

    def save(self, path: str | Path) -> Path:
        """In the format that the suffix names: .md, .csv or .json."""
        path = Path(path)
        writers = {".md": self.markdown, ".csv": self.csv, ".json": self.json}
        if path.suffix not in writers:
            raise ValueError(f"path={str(path)!r} must end with {', '.join(writers)}")
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(writers[path.suffix](), encoding="utf-8")
        beside.replace(path)
        return path

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, caption="\n".join(self.notes) or None, caption_justify="left")
        for name, right in zip(self.columns, self.numeric(), strict=True):
            table.add_column(name, justify="right" if right else "left")
        for row in self.shown():
            bold = [cell.startswith("**") for cell in row]
            table.add_row(
                *(Text(c.strip("*") if b else c, "bold" if b else "") for c, b in zip(row, bold, strict=True))
            )
        return table


def show(cell: Any) -> str:
    """``0.5123`` -> ``0.512``; anything else as ``str``."""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _plain(cell: Any) -> Any:
    return cell if cell is None or isinstance(cell, str | int | float | bool) else getattr(cell, "__dict__", str(cell))
