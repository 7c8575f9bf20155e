"""Where windows are read from: a place in memory, or files on disk, watched for changes while they are in use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from everysat.io import grid, remote
from everysat.mapping.windows import crop
from everysat.nn.grid import grid_shape
from everysat.types import Batch, Raster

_ENDS = 1 << 16
"""Bytes at either end of a file that are looked at, beside its size and date, to tell it from another."""


class InputChanged(ValueError):
    """A file is no longer what it was when the map was begun."""


class Source(Protocol):
    """A place on a pixel grid. ``steps_m``: pixel sizes of its layers; ``bytes_per_m2``: of all layers in memory."""

    shape: tuple[int, int]
    geobox: Any
    steps_m: list[float]
    bytes_per_m2: float

    def read(self, top: int, bottom: int, left: int, right: int) -> Batch: ...

    def facts(self) -> Any:
        """What tells this source from another, for resuming."""


def open_source(scene: Batch | Any, gsd_m: float) -> Source:
    """The source that a batch of one place, or an opened scene, is on a grid of ``gsd_m``."""
    return BatchSource(scene, gsd_m) if isinstance(scene, Batch) else SceneSource(scene, gsd_m)


class BatchSource:
    """A place in memory."""

    def __init__(self, batch: Batch, gsd_m: float) -> None:
        if len(batch) != 1:
            raise ValueError(f"the batch has {len(batch)} places; map one place at a time, batch[i]")
        self.batch, self.gsd_m = batch, gsd_m
        self.shape = grid_shape(batch.places, gsd_m)
        if batch.places[0].geobox is None:
            raise ValueError("the place has no geobox, so a map of it lies nowhere: give its Place a geobox with a CRS")
        self.geobox = grid.at_gsd(batch.places[0].geobox, gsd_m)
        rasters = [layer for layer in batch.layers.values() if isinstance(layer, Raster)]
        self.steps_m = [layer.gsd_m for layer in rasters]
        self.bytes_per_m2 = sum(_density(len(r.row), len(r.sensor.bands), r.gsd_m) for r in rasters)

    def read(self, top: int, bottom: int, left: int, right: int) -> Batch:
        g, place = self.gsd_m, self.batch.places[0]
        height_m, width_m = min(bottom * g, place.height_m) - top * g, min(right * g, place.width_m) - left * g
        return crop(self.batch, top * g, left * g, height_m, width_m)

    def facts(self) -> Any:
        rasters = {n: layer for n, layer in self.batch.layers.items() if isinstance(layer, Raster)}
        return {
            n: [digest(r.values), digest(r.valid), digest(r.time_s), r.gsd_m, r.sensor.names]
            for n, r in sorted(rasters.items())
        }


class SceneSource:
    """A place on disk (:class:`everysat.io.scene.Scene`), read window by window. After every window, its files must still be
    what they were at the beginning."""

    def __init__(self, scene: Any, gsd_m: float) -> None:
        self.scene, self.geobox = scene, grid.at_gsd(scene.geobox, gsd_m)
        self.shape = self.geobox.shape[0], self.geobox.shape[1]
        layers = list(scene.layers.values())
        self.steps_m = [layer.gsd_m for layer in layers]
        self.bytes_per_m2 = sum(_density(len(v.times), len(v.sensor.bands), v.gsd_m) for v in layers)
        self.names = sorted(set(_sources(scene)))
        self._stamps = {path: _stamp(path) for path in _files(self.names)}

    def read(self, top: int, bottom: int, left: int, right: int) -> Batch:
        try:
            batch: Batch = self.scene.read(self.geobox[top:bottom, left:right])
        finally:
            self._check()  # its error says more than that of a reader who met half a file
        return batch

    def _check(self) -> None:
        for path, before in self._stamps.items():
            try:
                now = _stamp(path)
            except OSError as error:
                raise InputChanged(
                    f"{path} vanished while it was being mapped. Put it back and run the same command again: it goes on "
                    "where it stopped"
                ) from error
            if now != before:
                raise InputChanged(
                    f"{path} changed while it was being mapped, so the map would be of two states. Run the same command "
                    "again when the file is complete: it begins anew"
                )

    def facts(self) -> Any:
        return [repr(self.scene), self.names, [(str(p), *_stamp(p), _ends(p)) for p in _files(self.names)]]


def _density(obs: int, bands: int, gsd_m: float) -> float:
    """Bytes of values and validity on a square metre."""
    return 5 * obs * bands / gsd_m**2


def _sources(scene: Any) -> Iterable[str]:
    for layer in scene.layers.values():
        for parts in layer.parts.values():
            yield from (part.plane.source for part in parts)
        for masks in layer.masks:
            yield from (plane.source for mask in masks for plane in mask.planes)


def _files(names: Iterable[str]) -> list[Path]:
    """The files on disk behind these names: of an archive itself, of a folder all that it holds. Servers are not asked."""
    found: set[Path] = set()
    for name in names:
        if remote.is_remote(name):
            continue
        path = Path("/" + name.split("/", 2)[2].lstrip("/") if name.startswith("/vsi") else name)
        holder = next((p for p in (path, *path.parents) if p.exists()), path)
        if holder.is_dir() and holder == path:
            found |= {p for p in holder.rglob("*") if p.is_file()}
        elif holder.is_file():
            found.add(holder)
    return sorted(found)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _ends(path: Path) -> str:
    """A hash of the beginning and the end of a file, where headers and indices lie."""
    with path.open("rb") as file:
        first = file.read(_ENDS)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _ENDS))
        return hashlib.sha256(first + file.read(_ENDS)).hexdigest()


def facts_of(thing: Any) -> Any:
    """What decides the output of a mapper: weights by content, the rest by value."""
    if isinstance(thing, nn.Module):
        weights = {k: digest(v) for k, v in thing.state_dict().items()}
        return [type(thing).__name__, getattr(thing, "config", None), weights]
    if isinstance(thing, Tensor):
        return digest(thing)
    if isinstance(thing, tuple | list):
        return [facts_of(part) for part in thing]
    if isinstance(thing, dict):
        return {str(k): facts_of(v) for k, v in sorted(thing.items(), key=lambda item: str(item[0]))}
    if hasattr(thing, "__dict__") and not callable(getattr(thing, "__code__", None)):
        return [type(thing).__name__, {k: facts_of(v) for k, v in sorted(vars(thing).items())}]
    return thing if isinstance(thing, str | int | float | bool | None) else type(thing).__name__


def digest(tensor: Tensor) -> str:
    """A hash of the numbers of a tensor."""
    flat = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def modules_of(thing: Any) -> list[nn.Module]:
    """The networks that a mapper holds, however deep."""
    if isinstance(thing, nn.Module):
        return [thing]
    if isinstance(thing, tuple | list):
        return [module for part in thing for module in modules_of(part)]
    if isinstance(thing, dict):
        return modules_of(list(thing.values()))
    if hasattr(thing, "__dict__") and not isinstance(thing, type | Tensor):
        return modules_of(list(vars(thing).values()))
    return []
