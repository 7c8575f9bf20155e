"""Maps of places that are larger than memory: overlapping windows in, one map out.

A mapper turns a batch into an image [row, channel, y, x]: class probabilities or features. Its windows begin on multiples of
``align_m``, so that every window cuts tokens and chips where the whole place would, and are read with a halo of ``halo_m``;
with a halo as wide as the mapper's sight, the map by windows is the map in one piece. Finished windows are kept beside the output
until it is complete: after an interruption, the same call goes on with the windows that are missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from everysat.nn.dense import dense_features as dense_features
from everysat.nn.grid import grid_shape, on_grid
from everysat.nn.mappers import Classified as Classified
from everysat.nn.mappers import Dense as Dense
from everysat.nn.mappers import Mapper as Mapper
from everysat.nn.mappers import Stacked as Stacked
from everysat.nn.mappers import Tasked as Tasked
from everysat.nn.mappers import common_multiple
from everysat.progress import Progress
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Place, Raster

NO_CLASS = 255
"""No-data value of class maps and confidence maps."""


def crop(batch: Batch, top_m: float, left_m: float, height_m: float, width_m: float) -> Batch:
    """The rectangle of the places of ``batch`` that begins ``top_m`` south and ``left_m`` east of their corners.

    Raises:
        ValueError: an edge that cuts a pixel of a layer.
    """
    layers = {}
    for name, layer in batch.layers.items():
        if not isinstance(layer, Raster):
            continue
        edges = [v / layer.gsd_m for v in (top_m, left_m, top_m + height_m, left_m + width_m)]
        if any(abs(edge - round(edge)) > 1e-3 for edge in edges[:2]):
            raise ValueError(
                f"top_m={top_m:g}, left_m={left_m:g} cut a pixel of layer {name!r} (gsd_m={layer.gsd_m:g})"
            )
        top, left = round(edges[0]), round(edges[1])
        bottom, right = math.ceil(edges[2] - 1e-3), math.ceil(edges[3] - 1e-3)
        parts = {n: getattr(layer, n)[:, :, top:bottom, left:right] for n in ("values", "valid")}
        layers[name] = replace(layer, **parts, var=None)
    places = tuple(Place(height_m, width_m, lonlat=p.lonlat) for p in batch.places)
    return Batch(places, layers)


@dataclass(frozen=True)
class Window:
    """Pixels [top, bottom) x [left, right) of the map, and those that are read for them, halo included."""

    index: int
    core: tuple[int, int, int, int]
    read: tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """How a map of ``shape`` pixels is cut; sizes in pixels. Windows fade into each other over ``fade`` pixels on both sides of
    their common edge, which must leave enough of the halo as sight; 0 for a clean cut."""

    shape: tuple[int, int]
    gsd_m: float
    window: int
    halo: int
    fade: int = 0

    def windows(self) -> Iterator[Window]:
        height, width = self.shape
        corners = [(y, x) for y in range(0, height, self.window) for x in range(0, width, self.window)]
        for index, (y, x) in enumerate(corners):
            core = y, min(height, y + self.window), x, min(width, x + self.window)
            grown = (core[0] - self.halo, core[1] + self.halo, core[2] - self.halo, core[3] + self.halo)
            read = max(0, grown[0]), min(height, grown[1]), max(0, grown[2]), min(width, grown[3])
            yield Window(index, core, read)

    def weight(self, window: Window) -> np.ndarray:
        """Weight of each pixel that was read; the weights of all windows add up to 1 everywhere."""
        sides = []
        for axis, size in enumerate(self.shape):
            low, high = window.read[2 * axis : 2 * axis + 2]
            at = np.arange(low, high)
            first, last = window.core[2 * axis : 2 * axis + 2]
            if self.fade:
                rise = (at - (first - self.fade) + 0.5) / (2 * self.fade) if first > 0 else np.ones(len(at))
                fall = ((last + self.fade) - at - 0.5) / (2 * self.fade) if last < size else np.ones(len(at))
                sides.append(np.minimum(rise, fall).clip(0, 1))
            else:
                sides.append(((at >= first) & (at < last)).astype(float))
        return (sides[0][:, None] * sides[1][None]).astype(np.float32)


def predict(
    mapper: Mapper,
    scene: Batch | Any,
    out: str | Path,
    *,
    window_m: float = 3840.0,
    halo_m: float | None = None,
    align_m: float | None = None,
    blend: bool = False,
    probabilities: bool = False,
    quiet: bool = False,
) -> dict[str, Path]:
    """Maps a whole scene.

    Args:
        mapper: :class:`Classified`, :class:`Tasked`, :class:`Dense`, or anything like them.
        scene: a batch of one place, or what :func:`everysat.io.read.open_scene` returns: ``geobox`` and ``read(geobox)``.
        out: the GeoTIFF to write. Class probabilities give the code of the most probable class (its position in
            ``mapper.names``, 255 where nothing was observed) and, in ``<out>-confidence.tif``, the probability of that class in per
            cent, calibrated as the mapper's probabilities are. Anything else gives ``out`` with one float band per channel.
        window_m: side of a window, rounded up to multiples of ``align_m``, and to twice the halo when blending.
        halo_m, align_m: instead of the mapper's own.
        blend: windows fade into each other over a halo on both sides of their edges, and read twice the halo; for mappers whose
            sight is wider than a halo can be, such as attention over the whole window.
        probabilities: also write ``<out>-probabilities.tif``.

    Returns:
        Paths by what they hold: ``classes`` and ``confidence`` (and ``probabilities``), or ``features``.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: the folder {out.parent} does not exist; make it first")
    source = _BatchSource(scene, mapper.gsd_m) if isinstance(scene, Batch) else _SceneSource(scene, mapper.gsd_m)
    plan = _plan(mapper, source, window_m, halo_m, align_m, blend)
    parts = _Parts(out.with_name(out.name + ".parts"), plan, _fingerprint(mapper, source))
    windows = list(plan.windows())
    missing = [w for w in windows if not parts.has(w)]
    with Progress(f"Mapping {out.name}", len(windows), done=len(windows) - len(missing), quiet=quiet) as bar:
        for window in missing:
            parts.save(window, _run(mapper, source, plan, window))
            bar.advance()
    made = _write(out, mapper, source, plan, parts, windows, probabilities)
    parts.remove()
    return made


class _Source(Protocol):
    shape: tuple[int, int]
    geobox: Any
    steps_m: list[float]

    def read(self, top: int, bottom: int, left: int, right: int) -> Batch: ...

    def facts(self) -> Any:
        """What tells this source from another, for resuming."""


class _BatchSource:
    """A place in memory."""

    def __init__(self, batch: Batch, gsd_m: float) -> None:
        if len(batch) != 1:
            raise ValueError(f"the batch has {len(batch)} places; map one place at a time, batch[i]")
        self.batch, self.gsd_m = batch, gsd_m
        self.shape = grid_shape(batch.places, gsd_m)
        if batch.places[0].geobox is None:
            raise ValueError("the place has no geobox, so a map of it lies nowhere: give its Place a geobox with a CRS")
        self.geobox = _at_gsd(batch.places[0].geobox, gsd_m)
        self.steps_m = [layer.gsd_m for layer in batch.layers.values() if isinstance(layer, Raster)]

    def read(self, top: int, bottom: int, left: int, right: int) -> Batch:
        g, place = self.gsd_m, self.batch.places[0]
        height_m, width_m = min(bottom * g, place.height_m) - top * g, min(right * g, place.width_m) - left * g
        return crop(self.batch, top * g, left * g, height_m, width_m)

    def facts(self) -> Any:
        rasters = {n: layer for n, layer in self.batch.layers.items() if isinstance(layer, Raster)}
        return {n: [_digest(r.values), _digest(r.valid), r.gsd_m, r.sensor.names] for n, r in sorted(rasters.items())}


class _SceneSource:
    """A place on disk (:class:`everysat.io.scene.Scene`), read window by window."""

    def __init__(self, scene: Any, gsd_m: float) -> None:
        self.scene, self.geobox = scene, _at_gsd(scene.geobox, gsd_m)
        self.shape = self.geobox.shape[0], self.geobox.shape[1]
        self.steps_m = [layer.gsd_m for layer in scene.layers.values()]

    def read(self, top: int, bottom: int, left: int, right: int) -> Batch:
        return self.scene.read(self.geobox[top:bottom, left:right])

    def facts(self) -> Any:
        parts = [part for layer in self.scene.layers.values() for some in layer.parts.values() for part in some]
        files = [Path(name) for name in sorted({part.plane.source for part in parts})]
        return [repr(self.scene), [(str(f), f.stat().st_mtime_ns) for f in files if f.exists()]]


def _at_gsd(geobox: Any, gsd_m: float) -> Any:
    from everysat.io.grid import at_gsd

    return at_gsd(geobox, gsd_m)


def _plan(
    mapper: Mapper, source: _Source, window_m: float, halo_m: float | None, align_m: float | None, blend: bool
) -> Plan:
    step_m = common_multiple([mapper.align_m if align_m is None else align_m, mapper.gsd_m, *source.steps_m])
    halo_m = mapper.halo_m if halo_m is None else halo_m
    window_m, halo_m = (math.ceil(size / step_m - 1e-6) * step_m for size in (window_m, halo_m))
    if not window_m > 0:
        raise ValueError(f"window_m={window_m} must be positive (metres)")
    window, halo = round(window_m / mapper.gsd_m), round(halo_m / mapper.gsd_m)
    if blend:
        return Plan(source.shape, mapper.gsd_m, max(window, 2 * halo), 2 * halo, halo)
    return Plan(source.shape, mapper.gsd_m, window, halo)


def _run(mapper: Mapper, source: _Source, plan: Plan, window: Window) -> np.ndarray:
    """The mapper's image of what was read, [channel, y, x]; NaN where no layer was observed. Blending keeps the halo."""
    top, bottom, left, right = window.read
    batch = source.read(*window.read)
    image = mapper(batch)[0, :, : bottom - top, : right - left].detach().float().cpu()
    if image.shape[1:] != (bottom - top, right - left):
        raise ValueError(
            f"the mapper made {tuple(image.shape[1:])} pixels of a window of {(bottom - top, right - left)} "
            f"pixels of {plan.gsd_m:g} m"
        )
    seen = torch.zeros(image.shape[1:], dtype=torch.bool)
    for layer in batch.layers.values():
        if isinstance(layer, Raster):
            seen |= on_grid(layer, 1, plan.gsd_m, *image.shape[1:])[1][0].any(0).cpu()
    known = torch.where(seen, image, torch.nan).numpy()
    return known if plan.fade else _inside(known, window, window.core)


def _inside(image: np.ndarray, window: Window, box: tuple[int, int, int, int]) -> np.ndarray:
    """The part of an image of ``window.read`` that lies in ``box``."""
    top, left = window.read[0], window.read[2]
    return image[..., box[0] - top : box[1] - top, box[2] - left : box[3] - left]


class _Parts:
    """Finished windows on disk, and the plan that they belong to. Each appears when it is complete, under its number."""

    def __init__(self, folder: Path, plan: Plan, fingerprint: str) -> None:
        self.folder, self.plan = folder, plan
        text = json.dumps({"plan": [plan.shape, plan.gsd_m, plan.window, plan.halo, plan.fade], "from": fingerprint})
        note = folder / "plan.json"
        if note.exists() and note.read_text(encoding="utf-8") != text:
            shutil.rmtree(folder)  # windows of another model, scene or cut are of no use
        folder.mkdir(exist_ok=True)
        if not note.exists():
            self._put(note, text.encode())

    def has(self, window: Window) -> bool:
        return self._path(window).exists()

    def save(self, window: Window, image: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, image)
        self._put(self._path(window), buffer.getvalue())

    def load(self, window: Window) -> np.ndarray:
        return np.load(self._path(window), mmap_mode="r", allow_pickle=False)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def core(self, window: Window, windows: list[Window]) -> np.ndarray:
        """The finished image of a window's core: its own, or the weighted mean of all windows that reach into it."""
        if not self.plan.fade:
            return np.asarray(self.load(window))
        total, count = np.zeros(1), np.zeros(1)
        for other in windows:  # always in the same order, so that sums do not depend on which window was done first
            box = _overlap(window.core, other.read)
            if box is None:
                continue
            image = np.asarray(_inside(self.load(other), other, box))
            weight = _inside(self.plan.weight(other), other, box) * np.isfinite(image[:1])
            place = tuple(
                (lo - base, hi - base) for lo, hi, base in zip(box[::2], box[1::2], window.core[::2], strict=True)
            )
            size = [hi - lo for lo, hi in zip(window.core[::2], window.core[1::2], strict=True)]
            pad = ((0, 0), *((lo, n - hi) for (lo, hi), n in zip(place, size, strict=True)))
            total = total + np.pad(np.nan_to_num(image) * weight, pad)
            count = count + np.pad(weight, pad)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(count > 0, total / count, np.nan).astype(np.float32)

    def _path(self, window: Window) -> Path:
        return self.folder / f"{window.index:06d}.npy"

    def _put(self, path: Path, content: bytes) -> None:
        beside = path.with_suffix(".partial")
        beside.write_bytes(content)
        beside.replace(path)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
    box = max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3])
    return box if box[0] < box[1] and box[2] < box[3] else None


def _fingerprint(mapper: Mapper, source: _Source) -> str:
    return hashlib.sha256(json.dumps([_facts(mapper), source.facts()], default=str).encode()).hexdigest()


def _facts(thing: Any) -> Any:
    """What decides the output of a mapper: weights by content, the rest by value."""
    if isinstance(thing, nn.Module):
        weights = {k: _digest(v) for k, v in thing.state_dict().items()}
        return [type(thing).__name__, getattr(thing, "config", None), weights]
    if isinstance(thing, Tensor):
        return _digest(thing)
    if isinstance(thing, tuple | list):
        return [_facts(part) for part in thing]
    if hasattr(thing, "__dict__") and not callable(getattr(thing, "__code__", None)):
        return [type(thing).__name__, {k: _facts(v) for k, v in sorted(vars(thing).items())}]
    return thing if isinstance(thing, str | int | float | bool | None) else type(thing).__name__


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(
        tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def _write(
    out: Path, mapper: Mapper, source: _Source, plan: Plan, parts: _Parts, windows: list[Window], probabilities: bool
) -> dict[str, Path]:
    """All outputs from the finished windows, in the order of the windows."""
    if not mapper.probabilistic:
        outputs = {"features": (out, _as_they_are)}
    else:
        outputs = {"classes": (out, _classes), "confidence": (_beside(out, "confidence"), _confidence)}
        if probabilities:
            outputs["probabilities"] = (_beside(out, "probabilities"), _as_they_are)
    for kind, (path, form) in outputs.items():
        with _writer(path, kind, mapper, source) as writer:
            for window in windows:
                top, bottom, left, right = window.core
                image = form(parts.core(window, windows))
                writer.write(
                    image,
                    slice(top, bottom),
                    slice(left, right),
                    valid=None if image.dtype.kind == "f" else image != NO_CLASS,
                )
    return {kind: path for kind, (path, _) in outputs.items()}


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}-{what}{out.suffix}")


def _as_they_are(image: np.ndarray) -> np.ndarray:
    return image


def _classes(image: np.ndarray) -> np.ndarray:
    seen = np.isfinite(image).all(0)
    return np.where(seen, np.nan_to_num(image).argmax(0), NO_CLASS).astype(np.uint8)[None]


def _confidence(image: np.ndarray) -> np.ndarray:
    seen = np.isfinite(image).all(0)
    return np.where(seen, np.rint(100 * np.nan_to_num(image).max(0)), NO_CLASS).astype(np.uint8)[None]


def _writer(path: Path, kind: str, mapper: Mapper, source: _Source) -> Any:
    from everysat.io.cog import CogWriter

    if kind == "classes":
        band = Band("class", mapper.gsd_m, "class", classes=dict(enumerate(mapper.names)), nodata=NO_CLASS)
        return CogWriter.for_sensor(
            path, source.geobox, Sensor("class-map", "classes", (band,), "predicted by EverySat")
        )
    if kind == "confidence":
        return CogWriter(path, source.geobox, ["confidence"], units="%", dtype="uint8", nodata=NO_CLASS)
    return CogWriter(path, source.geobox, mapper.names, units="probability" if kind == "probabilities" else "")
