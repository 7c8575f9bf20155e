"""The files of a folder that a table describes, by date and band: the other source beside :mod:`everysat.io.stac`."""

from __future__ import annotations

import re
from datetime import datetime

from everysat.io import dates
from everysat.io.catalogue import Catalogue, Collection, Item
from everysat.io.dates import Span

_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_STAMP = r"(?:19|20)\d{2}(?:-?[01]\d(?:-?[0-3]\d(?:T\d{2}:?\d{2}:?\d{2})?)?)?"
_DIRECTIVES = {
    "Y": r"\d{4}",
    "m": r"\d{2}",
    "d": r"\d{2}",
    "j": r"\d{3}",
    "H": r"\d{2}",
    "M": r"\d{2}",
    "S": r"\d{2}",
    "y": r"\d{2}",
}


def items(catalogue: Catalogue, collection: Collection, span: Span | None) -> list[Item]:
    """One item for each file of ``collection`` whose name has a date in ``span`` (or none), its masks included.

    Raises:
        FileNotFoundError: no file is called so.
        ValueError: a pattern is wrong.
    """
    found = _matching(catalogue, collection, collection.files, mask=False)
    if not found:
        raise FileNotFoundError(
            f"{catalogue.given}: no file of collection {collection.name} in {catalogue.folder} is called "
            f"{' or '.join(collection.files)}. Correct files=..., or put the files there"
        )
    if collection.mask is not None:
        found += _matching(catalogue, collection, collection.mask.where, mask=True)
    return [item for item in found if overlap(item.time, span)]


def overlap(time: Span | None, span: Span | None) -> bool:
    """Whether two intervals share a moment; what has no date fits always."""
    return time is None or span is None or (time[0] < span[1] and time[1] > span[0])


def _matching(catalogue: Catalogue, collection: Collection, patterns: tuple[str, ...], *, mask: bool) -> list[Item]:
    assert catalogue.folder is not None
    found = []
    for pattern in patterns:
        expression, form = _expression(pattern, f"{catalogue.given}: collections.{collection.name}")
        for path in sorted(catalogue.folder.glob(_FIELD.sub("*", pattern))):
            match = expression.fullmatch(path.relative_to(catalogue.folder).as_posix())
            if match is None:
                continue
            band = (match["band"],) if "band" in expression.groupindex else collection.bands.get("", ())
            time = _time(match["date"], form) if "date" in expression.groupindex else None
            if time is not None or "date" not in expression.groupindex:
                found.append(Item(path.name, {"": (str(path), () if mask else band)}, time, mask=mask))
    return found


def _expression(pattern: str, where: str) -> tuple[re.Pattern[str], str]:
    """A regular expression for a pattern of paths, and how its date is written (empty: as :func:`everysat.io.dates.span` has it)."""
    out, at, form, seen = "", 0, "", set()
    for match in _FIELD.finditer(pattern):
        name, spec = match[1], match[2] or ""
        if name not in ("date", "band") or (spec and name == "band"):
            raise ValueError(
                f"{where}: {match[0]} in files = {pattern!r} is neither {{date}}, {{date:%Y%m%d}} nor {{band}}"
            )
        out += _wild(pattern[at : match.start()])
        if name in seen:
            out += f"(?P={name})"
        elif name == "band":
            out += r"(?P<band>[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*?)"
        else:
            form = spec
            out += f"(?P<date>{_dated(spec, where) if spec else _STAMP})"
        seen.add(name)
        at = match.end()
    return re.compile(out + _wild(pattern[at:])), form


def _wild(text: str) -> str:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    return "".join({"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(p, re.escape(p)) for p in parts)


def _dated(form: str, where: str) -> str:
    known = re.sub(r"%(\w)", lambda m: _DIRECTIVES.get(m[1], "\0"), re.sub(r"([.+()\[\]])", r"\\\1", form))
    if "\0" in known or "%" not in form:
        raise ValueError(f"{where}: {{date:{form}}} may use %{', %'.join(_DIRECTIVES)} alone")
    return known


def _time(text: str, form: str) -> Span | None:
    """The interval that a date in a file's name stands for; None where its digits are no date."""
    try:
        if not form:
            return dates.span(text)
        if not {"%d", "%j"} & set(re.findall(r"%\w", form)):
            start = datetime.strptime(text, form)
            return dates.span(f"{start:%Y-%m}" if "%m" in form else f"{start:%Y}")
        start = datetime.strptime(text, form)
        return dates.span(start) if "%H" in form else dates.span(start.date())
    except ValueError:
        return None
