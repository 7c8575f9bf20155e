"""Tables that R saved (``.rda``, ``.RData``), as arrays. Needs the package ``rdata`` (MIT), which reads the format without R."""

from __future__ import annotations

import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

from everysat.io.arrays import present
from everysat.io.plane import unreadable

_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"RDX")
_FRAMES = ("data.frame", "tbl", "tbl_df", "sits")
"""Classes of R that are data frames underneath."""


def tables(path: str | Path) -> dict[str, dict[str, Any]]:
    """The data frames and named lists of a file by name, each as its columns by name: arrays, or a list of such tables where
    every row holds one. Dates are days since 1970.

    Raises:
        ImportError: ``rdata`` is not installed. FileNotFoundError: there is no such file. OSError: it is truncated or not R's.
    """
    try:
        import rdata
        from rdata.conversion import DEFAULT_CLASS_MAP
    except ImportError as error:
        raise ImportError(f"reading {path} needs rdata: pip install 'everysat[data]'") from error
    with present(path).open("rb") as file:
        if not file.read(6).startswith(_STARTS):
            raise unreadable(str(path), ValueError("it does not begin as files of R do"))
    constructors: dict[str | bytes, Any] = {**DEFAULT_CLASS_MAP, **dict.fromkeys(_FRAMES, _frame), "Date": _as_it_is}
    try:
        content = rdata.read_rda(str(path), constructor_dict=constructors)
    except (ValueError, LookupError, EOFError, OSError, NotImplementedError, struct.error, zlib.error, lzma.LZMAError) as error:  # fmt: skip
        raise unreadable(str(path), error) from error
    return {str(name): table for name, table in content.items() if isinstance(table, dict)}


def _frame(columns: Any, attributes: Any) -> Any:
    return columns if isinstance(columns, dict) else dict(zip(attributes["names"], columns, strict=True))


def _as_it_is(values: Any, attributes: Any) -> Any:
    return values


def write(path: Path, **content: Any) -> None:
    """A file of named lists of arrays, lists and strings; makes the folders it needs."""
    import rdata

    path.parent.mkdir(parents=True, exist_ok=True)
    rdata.write_rda(path, content)
