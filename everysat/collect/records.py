"""What is collected, on disk: texts about places with source and licence, without duplicates, and a note of origin beside every file."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from everysat.io.output import replacing

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Article:
    """A text about a place.

    ``lonlat`` in degrees; ``radius_m``: how far what it is about may lie from there; ``sections``: heading (empty for the beginning)
    and text of each; ``language`` as in ISO 639; ``source``: where it can be read; ``revision``: which version; ``identity``: unique within its source.
    """

    title: str
    lonlat: tuple[float, float]
    sections: tuple[tuple[str, str], ...]
    language: str
    licence: str
    source: str
    identity: str = ""
    revision: str = ""
    radius_m: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lon, lat = self.lonlat
        if not (-180 <= lon <= 180 and -90 <= lat <= 90):
            raise ValueError(f"lonlat={self.lonlat} of {self.title!r} is not longitude and latitude in degrees")
        if not self.licence:
            raise ValueError(f"licence of {self.title!r} is empty; say under which terms the text may be used")

    @property
    def text(self) -> str:
        """All of it, headings as lines of their own."""
        return "\n\n".join(part for heading, body in self.sections for part in (heading, body) if part)

    @property
    def digest(self) -> str:
        return digest(self.text)


def digest(text: str) -> str:
    """The same for texts that differ in case, punctuation, accents written in another way, or white space alone."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return hashlib.blake2b("".join(c for c in plain if c.isalnum()).encode(), digest_size=16).hexdigest()


def distinct(articles: Iterable[Article]) -> Iterator[Article]:
    """Each text once: the first that comes. Texts without a letter are left out."""
    seen = {digest("")}
    for article in articles:
        if (key := article.digest) not in seen:
            seen.add(key)
            yield article


def save(articles: Iterable[Article], path: str | Path) -> int:
    """Write ``articles`` as lines of JSON (``.jsonl``) or Parquet, whole or not at all; how many there are."""
    path = suffixed(path)
    rows = [{**asdict(article), "digest": article.digest} for article in articles]
    with replacing(path) as partial:
        if path.suffix == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial.write_text("".join(lines), encoding="utf-8")
        else:
            _save_parquet(rows, partial)
    return len(rows)


def grow(path: str | Path, request: str, more: Callable[[Article | None], Iterable[Article]]) -> int:
    """Write what is long in coming: every article at once to a file beside ``path``, which becomes ``path`` at the end; how many there are.

    Args:
        path: of the whole, ``.jsonl`` or ``.parquet``.
        request: what was asked for. What an earlier call began for the same request is gone on with; what it began for another one is deleted.
        more: given the last article that was written, what follows it.
    """
    path = suffixed(path)
    part = path.with_name(f".{path.name}.part")
    done = _begun(part, request)
    with part.open("a", encoding="utf-8") as stream:
        seen = {article.digest for article in done} | {digest("")}
        for article in more(done[-1] if done else None):
            if (key := article.digest) not in seen:
                seen.add(key)
                stream.write(json.dumps(asdict(article), ensure_ascii=False) + "\n")
                stream.flush()
    number = save(_begun(part, request), path)
    part.unlink()
    return number


def _begun(part: Path, request: str) -> list[Article]:
    """What is in a file that grows; a line that was being written when the program was ended is cut off."""
    head = json.dumps({"request": request}) + "\n"
    text = part.read_text(encoding="utf-8") if part.is_file() else ""
    if not text.startswith(head):
        part.write_text(head, encoding="utf-8")
        return []
    if not text.endswith("\n"):
        text = text[: text.rindex("\n") + 1]
        part.write_text(text, encoding="utf-8")
    return [_article(json.loads(line), f"{part}") for line in text[len(head) :].splitlines()]


def suffixed(path: str | Path) -> Path:
    """``path`` if it ends as a file of texts does."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"path={str(path)!r} must end in {' or '.join(SUFFIXES)}")
    return Path(path)


def _save_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    section = pa.struct([("heading", pa.string()), ("text", pa.string())])
    strings = ("title", "language", "licence", "source", "identity", "revision", "facts", "digest")
    fields = [*((name, pa.string()) for name in strings), ("radius_m", pa.float64()), ("sections", pa.list_(section))]
    schema = pa.schema([*fields, ("lon", pa.float64()), ("lat", pa.float64())])
    flat = [
        {
            **row,
            "lon": row["lonlat"][0],
            "lat": row["lonlat"][1],
            "sections": [{"heading": heading, "text": text} for heading, text in row["sections"]],
            "facts": json.dumps(row["facts"], ensure_ascii=False),
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(flat, schema=schema), path)


def load(path: str | Path) -> tuple[Article, ...]:
    """What :func:`save` wrote.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else; the message says where.
    """
    path = suffixed(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _lines(path)
    return tuple(_article(row, f"{path}, entry {number}") for number, row in enumerate(rows, 1))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON ({error}). Collect it again") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for row in pq.read_table(path).to_pylist():
        sections = [(each["heading"], each["text"]) for each in row["sections"]]
        yield {**row, "lonlat": (row["lon"], row["lat"]), "sections": sections, "facts": json.loads(row["facts"])}


def _article(row: Mapping[str, Any], where: str) -> Article:
    try:
        known = {name: row[name] for name in Article.__dataclass_fields__}
        sections = tuple((str(heading), str(text)) for heading, text in row["sections"])
        lon, lat = row["lonlat"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is no text about a place ({error!r}): title, lonlat, sections, licence, ... are needed"
        ) from error
    return Article(**{**known, "lonlat": (float(lon), float(lat)), "sections": sections})


def note(path: str | Path, *, licence: str, source: str, **facts: Any) -> Path:
    """Write ``NAME.source.json`` beside a file: under which licence it may be used, whom to name, and where it comes from."""
    if not licence.strip():
        raise ValueError(f"licence of {path} is empty; say under which terms it may be used, such as ODbL-1.0")
    target = Path(f"{path}.source.json")
    told = {"licence": licence, "source": source, "collected": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
    with replacing(target) as partial:
        partial.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target
