"""``open_store``: whatever kind of store a path holds."""

from __future__ import annotations

from pathlib import Path

from everysat.store.quantise import Quantiser
from everysat.store.read import Store


def open_store(path: str | Path, *, quantiser: str | Quantiser | None = None) -> Store:
    """The store at a path: a Zarr folder (or one group of it, ``area.zarr/utm31``), a GeoParquet table or a GeoTIFF.

    Stores of other writers are read where they say by a known rule how their numbers are to be understood; ``quantiser``
    says it for them.

    Raises:
        FileNotFoundError: nothing is there.
        LookupError: the store was written by a quantiser that is not known.
        ValueError: it is no store of embeddings.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if path.is_dir():
        from everysat.store.zarr_store import open_zarr

        return open_zarr(path, quantiser)
    if suffix in (".parquet", ".geoparquet"):
        from everysat.store.chips import open_chips

        return open_chips(path, quantiser)
    if suffix in (".tif", ".tiff"):
        from everysat.store.cog import open_cog

        return open_cog(path, quantiser)
    raise ValueError(
        f"{path} is no store of embeddings: expected a Zarr folder, .parquet or .tif, got {suffix or 'no suffix'}"
    )
