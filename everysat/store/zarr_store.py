"""Pixel embeddings in Zarr 3: one group a CRS, sharded, with the ``geoemb:``, ``proj:`` and ``spatial:`` conventions.

Chunks are first files of their own beside the store, so that processes write different ones at the same time and a killed
run loses only the chunk at hand. :meth:`StoreWriter.finish` joins their bytes to shards, which is all that a shard is, and
renames. So the files do not depend on the order of the windows.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from zarr.codecs import BloscCodec, BytesCodec

from everysat.io import grid
from everysat.io.output import move, remove
from everysat.io.write import empty_dataset
from everysat.store.attributes import GEOEMB, PROJ, SPATIAL, attributes, clearly, period_of, quantiser_of
from everysat.store.quantise import Quantiser, get, measure
from everysat.store.read import Period, PixelStore, Window

_SAMPLE = 4096
"""About as many pixels, evenly spread, tell what the codes cost."""
_NONE = 2**64 - 1


def create(
    path: str | Path,
    geobox: GeoBox,
    dim: int,
    *,
    quantiser: str | Quantiser = "int8-linear/1",
    chunk: int = 256,
    shard: int = 2048,
    period: Period | None = None,
    model: Mapping[str, Any] | None = None,
    source: str | Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    add: bool = False,
    resume: bool = False,
) -> StoreWriter:
    """A store to be filled by windows; it appears at ``path`` when :meth:`StoreWriter.finish` is called.

    Args:
        path: of the folder, such as ``area.zarr``; a store that is there is replaced at the end.
        geobox: the grid, north up and not rotated, in one CRS.
        dim: length of the vectors that will be written.
        quantiser: a name (``get``) or a fitted one (``fit``).
        chunk: rows and columns of a chunk, pixels. A shard has ``shard`` of both, a multiple of it.
        period: start and end, ISO 8601.
        model: ``name``, ``weights`` (hash), ``url`` and more, JSON.
        source: addresses or names of what the model was given.
        facts: anything else, JSON, kept under ``everysat``.
        add: puts the grid as one more zone into the store that is at ``path``.
        resume: goes on with the windows of an unfinished writer of the same settings, if there is one.

    Raises:
        FileExistsError: what is at ``path`` is no store of embeddings.
        ValueError: settings that do not fit, or differ from those of the writer to go on with.
    """
    path = Path(path)
    rule = get(quantiser, dim) if isinstance(quantiser, str) else quantiser
    if rule.dim != dim:
        raise ValueError(f"the quantiser is for vectors of {rule.dim} numbers, dim={dim}")
    if not grid.axis_aligned(geobox) or geobox.affine.e > 0 or geobox.affine.a < 0:
        raise ValueError(
            "the grid is rotated or not north up; a store needs rows from the north along the axes of the CRS"
        )
    if not (1 <= chunk <= shard and shard % chunk == 0):
        raise ValueError(f"chunk={chunk}, shard={shard}: a shard has a whole number of chunks along a side")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    if path.exists() and not is_store(path):
        raise FileExistsError(
            f"{path} exists and is no store of embeddings; choose another path, or remove it yourself"
        )
    if add and not path.exists():
        raise FileNotFoundError(f"add=True, but there is no store {path} yet")
    shard = min(shard, chunk * max(1, -(-max(geobox.shape) // chunk)))
    told = attributes(
        "pixel", rule, gsd_m=grid.gsd_m(geobox), period=period, model=model, source=source, extra=facts
    )  # fmt: skip
    told |= _georeference(geobox)
    writer = StoreWriter(path, geobox, rule, chunk, shard, told, add)
    with clearly(path):
        return replace(writer, resumed=writer._begin(resume))


def is_store(path: Path) -> bool:
    """Whether a folder holds Zarr metadata of embeddings."""
    return "geoemb:type" in _metadata(path).get("attributes", {})


def group_name(geobox: GeoBox) -> str:
    """``utm31`` for zone 31 of either hemisphere, ``epsg3035`` for what is not UTM, ``grid`` for what has no code."""
    code = grid.crs_of(geobox).to_epsg()
    if code and code // 100 in (326, 327) and 1 <= code % 100 <= 60:
        return f"utm{code % 100:02d}"
    return f"epsg{code}" if code else "grid"


@dataclass(frozen=True)
class StoreWriter:
    """The write side of a store, made by :func:`create`. It may be pickled: processes may write chunks of their own."""

    path: Path
    geobox: GeoBox
    quantiser: Quantiser
    chunk: int
    shard: int
    attrs: dict[str, Any] = field(repr=False)
    add: bool = False
    resumed: bool = False
    """Whether windows of an unfinished run are there; where it is false, all of them are to be written."""

    @property
    def part(self) -> Path:
        """The folder beside ``path`` that holds what is written so far."""
        zone = f".{group_name(self.geobox)}" if self.add else ""
        return self.path.with_name(f"{self.path.name}{zone}.part")

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.geobox.shape
        return int(height), int(width)

    def windows(self) -> Iterator[Window]:
        """Rows and columns of one chunk after another."""
        for top, left in itertools.product(*(range(0, n, self.chunk) for n in self.shape)):
            yield (
                slice(top, min(top + self.chunk, self.shape[0])),
                slice(left, min(left + self.chunk, self.shape[1])),
            )

    def write(self, rows: slice, cols: slice, image: np.ndarray) -> None:
        """Vectors float32 [dim, y, x] of a window, NaN where there is no data. Writing a window again replaces it.

        Windows that cut chunks are fine in one process; several processes must keep to whole chunks each.

        Raises:
            ValueError: shape or numbers that do not fit.
            OSError: disk full, or no right to write; what was written before stays and can be resumed.
        """
        image = np.asarray(image, np.float32)
        shape = (self.quantiser.dim, rows.stop - rows.start, cols.stop - cols.start)
        inside = all(0 <= s.start < s.stop <= n for s, n in zip((rows, cols), self.shape, strict=True))
        if image.shape != shape or not inside:
            raise ValueError(f"image has shape {image.shape}; the window is {shape} on a grid of {self.shape}")
        flat = image.reshape(shape[0], -1).T
        codes, scale = self.quantiser.encode(flat)
        with clearly(self.path):
            self._keep_sample(rows, cols, image)
            staged: Any = zarr.open_group(self.part / "staged", mode="r+")
            staged["embeddings"][:, rows, cols] = codes.T.reshape(-1, *shape[1:])
            if scale is not None:
                staged["scale"][rows, cols] = scale.reshape(shape[1:])

    def finish(self) -> Path:
        """Join the chunks to shards, measure what the codes cost, and let the store appear. May be called again if it failed."""
        with clearly(self.path):
            quality = measure(self.quantiser, self._sample())
            name = group_name(self.geobox)
            target = self._arrays(name, quality)
            for array in ("embeddings", "scale")[: 1 + self.quantiser.scaled]:
                self._join(self.part / "staged" / array, target / array)
            if self.add:
                self._insert(target)
            else:
                for folder in ("staged", "samples"):
                    remove(self.part / folder)
                _consolidate(self.part)
                move(self.part, self.path)
            self._settings.unlink(missing_ok=True)
        return self.path

    def abandon(self) -> None:
        """Delete what was written so far."""
        remove(self.part)
        self._settings.unlink(missing_ok=True)

    @property
    def _settings(self) -> Path:
        # Beside the folder, not in it: the folder becomes the store in one step.
        return self.part.with_name(self.part.name + ".json")

    def _begin(self, resume: bool) -> bool:
        """Make the folder for chunks; whether one of the same settings is there to go on with."""
        fitted = {name: values.tolist() for name, values in self.quantiser.arrays().items()}
        settings = json.dumps([self.attrs, self.shape, self.chunk, self.shard, fitted])
        if resume and self._settings.exists() and self.part.exists():
            if self._settings.read_text() != settings:
                raise ValueError(f"{self.part} was begun with other settings; remove it, or go on without resume")
            return True
        self.abandon()
        (self.part / "samples").mkdir(parents=True)
        self._make(zarr.open_group(self.part / "staged", mode="w", zarr_format=3), sharded=False)
        self._settings.write_text(settings)
        return False

    def _make(self, group: Any, sharded: bool) -> None:
        """Empty arrays for codes and factors."""
        edge: dict[str, Any] = {"chunks": (self.chunk,) * 2, "shards": (self.shard,) * 2 if sharded else None}
        rule, height, width = self.quantiser, *self.shape
        options: dict[str, Any] = {"serializer": BytesCodec(endian="little"), "filters": None, "overwrite": True}
        mapped = {"grid_mapping": "spatial_ref", "long_name": "embedding", "units": "1"}
        group.create_array(
            "embeddings", shape=(rule.width, height, width), dtype=rule.dtype, chunks=(rule.width, *edge["chunks"]),
            shards=(rule.width, *edge["shards"]) if edge["shards"] else None, fill_value=rule.nodata,
            dimension_names=("embedding", "y", "x"), attributes=mapped, compressors=_blosc(rule.dtype), **options,
        )  # fmt: skip
        if rule.scaled:
            group.create_array(
                "scale", shape=(height, width), dtype="float32", fill_value=np.nan, dimension_names=("y", "x"), **edge,
                attributes={**mapped, "long_name": "factor of the codes"}, compressors=_blosc("float32"), **options,
            )  # fmt: skip

    def _arrays(self, name: str, quality: dict[str, Any]) -> Path:
        """Metadata, coordinates and empty sharded arrays of the finished store; the folder of its group."""
        attrs = {**self.attrs, "everysat": {**self.attrs["everysat"], "quality": quality}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata")
            empty_dataset(self.geobox).to_zarr(self.part, group=name, mode="a", zarr_format=3, consolidated=False)
        root = zarr.open_group(self.part, mode="a", zarr_format=3)
        root.attrs.put({key: value for key, value in attrs.items() if not key.startswith(("proj:", "spatial:"))})
        group: Any = root[name]
        group.attrs.put({**dict(group.attrs), **attrs, "zarr_conventions": [GEOEMB, PROJ, SPATIAL]})
        if "embeddings" not in group:  # else finishing was interrupted, and some shards are there
            self._make(group, sharded=True)
        for key, value in self.quantiser.arrays().items():
            group.create_array(f"quantiser_{key}", data=np.ascontiguousarray(value), overwrite=True)
        return self.part / name

    def _join(self, staged: Path, target: Path) -> None:
        """Shard files from chunk files: their bytes one after another, then offset and length of each, and a checksum."""
        each = self.shard // self.chunk
        shards = [range(-(-n // self.shard)) for n in self.shape]
        lead = ("0",) if staged.name == "embeddings" else ()
        for y, x in itertools.product(*shards):
            out = target.joinpath("c", *lead, str(y), str(x))
            files = [
                staged.joinpath("c", *lead, str(y * each + i), str(x * each + j))
                for i, j in itertools.product(range(each), range(each))
            ]
            there = [file for file in files if file.exists()]
            if there and not out.exists():
                out.parent.mkdir(parents=True, exist_ok=True)
                _write_shard(files, out)
            for file in there:
                file.unlink()

    def _insert(self, target: Path) -> None:
        """Move a finished group into the store that is there."""
        theirs, mine = _metadata(self.path)["attributes"], _metadata(self.part)["attributes"]
        for key in ("geoemb:model", "geoemb:dimensions", "geoemb:data_type", "geoemb:quantization"):
            if theirs.get(key) != mine.get(key):
                raise ValueError(f"{self.path} has {key} {theirs.get(key)}, the new zone {mine.get(key)}")
        final = self.path / target.name
        there = _metadata(final).get("attributes", {}).get("proj:code")
        if there not in (None, self.attrs.get("proj:code")):  # the same zone of the other hemisphere
            final = self.path / f"{target.name}{'s' if there.startswith('EPSG:326') else 'n'}"
        move(target, final)
        _consolidate(self.path)
        remove(self.part)

    def _keep_sample(self, rows: slice, cols: slice, image: np.ndarray) -> None:
        """The pixels of a window that belong to the sample, as they came, in a file of the window."""
        height, width = self.shape
        step = max(1, int(np.ceil(np.sqrt(height * width / _SAMPLE))))
        y, x = (np.arange(s.start, s.stop) for s in (rows, cols))
        y, x = (v[v % step == step // 2] for v in (y, x))
        if not (len(y) and len(x)):
            return
        vectors = image[:, (y - rows.start)[:, None], x - cols.start].reshape(len(image), -1).T
        index = (y[:, None] * width + x).ravel()
        seen = ~np.isnan(vectors).any(1)
        file = self.part / "samples" / f"{rows.start}_{rows.stop}_{cols.start}_{cols.stop}.npz"
        partial = file.with_name(f"{file.stem}.{os.getpid()}.partial")
        with partial.open("wb") as out:
            np.savez(out, index=index[seen], vectors=vectors[seen])
        os.replace(partial, file)

    def _sample(self) -> np.ndarray:
        parts = [np.load(file) for file in sorted((self.part / "samples").glob("*.npz"))]
        if not parts:
            return np.zeros((0, self.quantiser.dim), np.float32)
        index = np.concatenate([part["index"] for part in parts])
        first = np.unique(index, return_index=True)[1]
        return np.concatenate([part["vectors"] for part in parts])[first]


def _blosc(dtype: str) -> BloscCodec:
    size = np.dtype(dtype).itemsize
    # Measured on real vectors: a higher level saves 2 % for twice the time; bytes of codes compress better in their order.
    return BloscCodec(typesize=size, cname="zstd", clevel=3, shuffle="noshuffle" if size == 1 else "shuffle")


def _write_shard(files: list[Path], out: Path) -> None:
    partial, index, position = out.with_name(out.name + ".partial"), b"", 0
    with partial.open("wb") as file:
        for chunk in files:
            if not chunk.exists():
                index += struct.pack("<QQ", _NONE, _NONE)
                continue
            content = chunk.read_bytes()
            file.write(content)
            index += struct.pack("<QQ", position, len(content))
            position += len(content)
        file.write(index + struct.pack("<I", google_crc32c.value(index)))
    os.replace(partial, out)


def _consolidate(path: Path) -> None:
    """One file with the metadata of all groups: opening a remote store then takes one request."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata")
        zarr.consolidate_metadata(path, zarr_format=3)


def _metadata(path: Path) -> dict[str, Any]:
    file = path / "zarr.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _georeference(geobox: GeoBox) -> dict[str, Any]:
    """Attributes of the ``proj:`` and ``spatial:`` conventions."""
    crs, a = grid.crs_of(geobox), geobox.affine
    height, width = geobox.shape
    code = crs.to_epsg()
    layout = "utm_zones" if group_name(geobox).startswith("utm") else "global" if code == 4326 else ""
    return {
        **({"geoemb:spatial_layout": layout} if layout else {}),
        **({"proj:code": f"EPSG:{code}"} if code else {"proj:wkt2": crs.to_wkt()}),
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": [a.a, a.b, a.c, a.d, a.e, a.f],
        "spatial:shape": [height, width],
        "spatial:bbox": [a.c, a.f + height * a.e, a.c + width * a.a, a.f],
        "spatial:registration": "pixel",
    }


@dataclass(frozen=True, eq=False)
class ZarrStore(PixelStore):
    """Reads Zarr groups with ``geoemb:`` attributes, those of other writers among them."""

    arrays: tuple[Any, Any] = (None, None)
    order: tuple[int | str, ...] = ("embedding", "y", "x")

    def _codes(self, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray | None]:
        where = {"y": rows, "x": cols, "embedding": slice(None)}
        codes = self.arrays[0][tuple(where.get(str(axis), 0) for axis in self.order)]
        kept = [axis for axis in self.order if axis in where]
        codes = codes.transpose([kept.index(axis) for axis in ("y", "x", "embedding")])
        if self.arrays[1] is None:
            return codes, None
        axes = [axis for axis in self.order if axis != "embedding"]
        scale = self.arrays[1][tuple(where.get(str(axis), 0) for axis in axes)]
        return codes, scale if axes.index("y") < axes.index("x") else scale.T


def open_zarr(path: Path, quantiser: str | Quantiser | None = None) -> ZarrStore:
    """The store in a Zarr folder, or one of its groups by ``path/utm31``; see :func:`everysat.store.open_store`."""
    group = _group(path)
    attrs = {**dict(zarr.open_group(path, mode="r").attrs), **dict(group.attrs)}
    array = group["embeddings"]
    told = attrs.get("geoemb:quantization", {}).get("scale", {})
    if told.get("type") == "scalar":
        told = {}
    scale = group[told.get("array_name", "scale")] if told else None
    order = _order(array, path)
    size = dict(zip(order, array.shape, strict=True))
    named = [axis for axis in order if axis in ("embedding", "y", "x")]
    fitted = {name.removeprefix("quantiser_"): group[name][:] for name in group if name.startswith("quantiser_")}
    if quantiser is None:
        rule = quantiser_of(attrs, fitted, path, size["embedding"], array.dtype.name)
    else:
        rule = get(quantiser, size["embedding"]) if isinstance(quantiser, str) else quantiser
    if rule.width != size["embedding"] or rule.dtype != array.dtype.name:
        raise ValueError(
            f"{path}: {rule.name} has {rule.width} numbers of {rule.dtype} a pixel, the array {size['embedding']} of {array.dtype}"
        )
    chunks = dict(zip(order, array.chunks, strict=True))
    own = attrs.get("everysat", {})
    geobox = _geobox(attrs, (size["y"], size["x"]), path)
    return ZarrStore(
        path, "pixel", str(geobox.crs), geobox, (size["y"], size["x"]), period_of(own), rule,
        dict(own.get("model") or {"url": attrs.get("geoemb:model")}), attrs, (chunks["y"], chunks["x"]),
        arrays=(array, scale), order=tuple(axis if axis in named else 0 for axis in order),
    )  # fmt: skip


def _group(path: Path) -> Any:
    """The group with the array ``embeddings``: the folder itself or the only one in it."""
    try:
        root = zarr.open_group(path, mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no Zarr group: {error}") from error
    if "embeddings" in root:
        return root
    found = [name for name, group in root.groups() if "embeddings" in group]
    if len(found) != 1:
        raise ValueError(
            f"{path} has embeddings of {len(found)} grids: {', '.join(sorted(found))}; open one, as {path / sorted(found)[0]}"
            if found
            else f"{path} has no array 'embeddings' with geoemb: attributes, so it is no store of embeddings"
        )
    return root[found[0]]


def _order(array: Any, path: Path) -> tuple[str, ...]:
    """Names of the axes, those of vectors called ``embedding``."""
    names = tuple(array.metadata.dimension_names or ()) or ("embedding", "y", "x")
    axes = tuple("embedding" if n in ("embedding", "band", "bands", "feature", "dim") else str(n) for n in names)
    odd = [a for a, n in zip(axes, array.shape, strict=True) if a not in ("embedding", "y", "x") and n > 1]
    if {"embedding", "y", "x"} - set(axes) or odd:
        raise ValueError(f"{path}: axes {names} of sizes {array.shape}; expected embedding, y and x, others of size 1")
    return axes


def _geobox(attrs: Mapping[str, Any], shape: tuple[int, int], path: Path) -> GeoBox:
    crs, transform = attrs.get("proj:code") or attrs.get("proj:wkt2"), attrs.get("spatial:transform")
    if not crs or not transform:
        raise ValueError(f"{path} has no proj:code (or proj:wkt2) and spatial:transform, so its pixels have no place")
    geobox = GeoBox(shape, Affine(*transform[:6]), CRS(crs))
    if not grid.axis_aligned(geobox) or geobox.affine.e > 0:
        raise ValueError(f"{path} is rotated or south up (spatial:transform {transform}), which is not read")
    return geobox
