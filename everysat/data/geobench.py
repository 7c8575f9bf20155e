"""GEO-Bench-2: benchmarks of many makers in one form of file, ``.tortilla``. The variant is the benchmark.

Layout, under ``root``: ``<benchmark>.tortilla`` or ``geobench_<benchmark>.tortilla``, also in parts
(``geobench_<benchmark>.0000.part.tortilla``); a member is a place, its members are images. Variants and layers::

    benv2               s2 (12 bands), s1                              classes of land cover in the place
    biomassters         s2, s1-asc, s1-des, 12 months                  biomass, t/ha
    dynamic_earthnet    planet, a day each, s2                         land cover of a month
    flair2              aerial-flair (red, green, blue, NIR, height)   land cover
    m4sar               rgb, sar (both 8 bits)                         objects: outlines, a vector layer
    pastis              s2, s1-asc, s1-des                             crops
    spacenet7           planet (8 bits)                                buildings
    treesatai           aerial, s2                                     genera of trees in the place

What is done about the files:

- Sentinel-1 of ``treesatai`` is refused: decibels, which are negative, were written as uint16, and fractions are gone. That of
  ``dynamic_earthnet``, eight numbers of an unknown matrix, is left out.
- Sentinel-1 of ``benv2`` is VH, VV, and its day is not given (that of Sentinel-2 stands in its place). Its Sentinel-2 file says 60 m; 10 m is
  what its 120 pixels are. Sentinel-2 of ``treesatai`` is 6 x 6 pixels, repeated to 304 x 304.
- ``planet`` of ``dynamic_earthnet`` is blue, green, red, NIR, ``aerial`` of ``treesatai`` NIR, red, green, blue: told by their spectra.
- In ``dynamic_earthnet`` a pixel without any class was written as impervious surface; that cannot be told any more.
- CRS of ``biomassters`` and ``m4sar`` that lead nowhere, and the one of ``spacenet7``, whose rows run from the south, are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapely.geometry import Polygon
from torch import Tensor

from everysat import sensors
from everysat.data import bands, bigearthnet, biomassters, flair, pastis, points, published, spacenet7, treesatai
from everysat.io import dates, grid, tortilla
from everysat.io.tortilla import Member
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, Batch, Layer, Place, Raster, Vector

LICENCE = "Apache-2.0 (the repository); of each benchmark, that of its makers"
SOURCE = "https://github.com/The-AI-Alliance/GEO-Bench-2; https://huggingface.co/aialliance"
SPLITS = points.SPLITS
FILED = {"train": "train", "val": "validation", "test": "test"}
INPUTS = {
    "benv2": ("s2", "s1"), "biomassters": ("s2", "s1-asc", "s1-des"), "dynamic_earthnet": ("planet", "s2"),
    "flair2": ("aerial-flair",), "m4sar": ("rgb", "sar"), "pastis": ("s2", "s1-asc", "s1-des"), "spacenet7": ("planet",),
    "treesatai": ("aerial", "s2"),
}  # fmt: skip
REFUSED = {
    ("treesatai", "s1"): "its negative decibels were written as unsigned numbers: fractions are lost",
    ("dynamic_earthnet", "s1"): "its eight numbers are of an unknown matrix",
}
LAYERS = (*INPUTS["benv2"], "label")
EARTHNET = dict(
    enumerate(
        (
            "impervious surface",
            "agriculture",
            "forest and other vegetation",
            "wetlands",
            "soil",
            "water",
            "snow and ice",
        )
    )
)
OBJECTS = ("bridge", "harbor", "oil tank", "playground", "airport", "wind turbine")
GREY = Sensor(
    "radar-image", "sar", (Band("grey", 10.0, "DN", range=(0, 255), description="stretched to 8 bits"),), SOURCE
)
Parts = Mapping[str, Member]
Layers = dict[str, Callable[[], Layer]]


@dataclass(frozen=True)
class GeoBench:
    """See :func:`build`. ``places`` are number of the file and of its member."""

    files: tuple[Path, ...]
    variant: str
    places: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        file, number = self.places[index]
        sample = _samples(points.state(self.files[file]))[number]
        parts = {str(part.facts["tortilla:id"]): part for part in sample.members()}
        place, readers = _READERS[self.variant](parts, sample)
        target = "objects" if self.variant == "m4sar" else "label"
        layers = {name: readers[name]() for name in (*self.layers, target) if name in readers}
        return Batch((place,), {n: r for n, r in layers.items() if not isinstance(r, Raster) or len(r.row)})

    def fingerprint(self) -> str:
        return published.fingerprint(replace(self, files=tuple(Path(file.name) for file in self.files)))


def build(
    variant: str = "benv2", *, root: str | Path, split: str = "train", modalities: Sequence[str] | None = None
) -> GeoBench:
    """Places of one benchmark, in physical units: reflectance, dB, m; 8-bit images in digital numbers. ``label`` as above.

    Args:
        variant: the benchmark, see above.
        root: the folder that holds its ``.tortilla`` files.
        split: ``train``, ``val`` or ``test`` of the table; or ``all``.
        modalities: some of the layers; all that can be read by default.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown. OSError: a
            file is truncated.
    """
    variant = published.one_of(variant or "benv2", INPUTS, "variant")
    published.one_of(split, (*SPLITS, points.EVERY), "split")
    for name in modalities or ():
        if reason := REFUSED.get((variant, name)):
            raise LookupError(f"modalities={name!r} of {variant} cannot be used: {reason}")
    layers = published.layers_of(modalities, INPUTS[variant], INPUTS[variant])
    base = published.folder(root, f"geobench/{variant}", (), SOURCE)
    names = (f"{variant}.tortilla", f"geobench_{variant}.tortilla", f"geobench_{variant}.*.tortilla")
    files = tuple(next((found for name in names if (found := sorted(base.glob(name)))), ()))
    if not files:
        raise published.absent(base, names[0], f"geobench/{variant}", SOURCE)
    places = []
    for number, file in enumerate(files):
        for row, sample in enumerate(_samples(points.state(file))):
            part = sample.facts.get("tortilla:data_split")
            if part not in FILED.values():
                raise ValueError(f"{sample} is of the split {part!r}, expected {', '.join(FILED.values())}")
            if split == points.EVERY or part == FILED[split]:
                places.append((number, row))
    if not places:
        raise ValueError(f"{files[0]} has no place of split={split!r}")
    return GeoBench(files, variant, tuple(places), layers)


@lru_cache(maxsize=64)
def _samples(files: tuple[tuple[str, int, int], ...]) -> list[Member]:
    return tortilla.members(files[0][0])


# --- what the readers share ------------------------------------------------------------------------------------------


def _part(parts: Parts, name: str, sample: Member) -> Member:
    if name not in parts:
        raise ValueError(f"{sample} has no member {name!r}; it has {', '.join(parts)}")
    return parts[name]


def _plain(shape: Sequence[int], gsd_m: float, sample: Member) -> Place:
    """A place of which the middle alone is known, if that."""
    at = tuple(float(sample.facts.get(name) or math.nan) for name in ("lon", "lat"))
    return Place(shape[-2] * gsd_m, shape[-1] * gsd_m, None, (at[0], at[1]) if all(map(math.isfinite, at)) else None)


def _ground(image: Member, gsd_m: float, sample: Member) -> Place:
    """Where an image lies."""
    numbers, box = image.tiff()
    return _plain(numbers.shape, gsd_m, sample) if box is None else grid.place_of(box)


def _day(member: Member) -> dates.Span:
    """The UTC day of ``stac:time_start``, in seconds since 1970; always where there is none."""
    start = member.facts.get("stac:time_start")
    if start is None or not math.isfinite(start):
        return ALWAYS
    return dates.span(datetime.fromtimestamp(float(start), UTC).date())


def _month(member: Member) -> dates.Span:
    start = _day(member)[0]
    return ALWAYS if math.isinf(start) else dates.span(datetime.fromtimestamp(start, UTC).strftime("%Y-%m"))


def _times(*spans: dates.Span) -> Tensor:
    return torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)


def _dated(raster: Raster, span: dates.Span) -> Raster:
    return replace(raster, time_s=_times(span))


def _image(table: str | Sensor, member: Member, gsd_m: float, span: dates.Span = ALWAYS) -> Raster:
    sensor = sensors.get(table) if isinstance(table, str) else table
    return _dated(published.image(sensor, member.tiff()[0], str(member), gsd_m), span)


def _codes(name: str, member: Member, codes: np.ndarray, classes: Mapping[int, str], gsd_m: float) -> Raster:
    return published.class_map(name, codes, classes, gsd_m, SOURCE, Path(str(member)))


def _named(value: Any) -> list[str]:
    return [str(name) for name in (() if value is None else value)]


# --- one reader a benchmark ------------------------------------------------------------------------------------------


def _benv2(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    s2, s1 = _part(parts, "s2", sample), _part(parts, "s1", sample)
    place = _ground(s1, 10.0, sample)

    def label() -> Raster:
        there = _named(sample.facts.get("labels"))
        if unknown := sorted(set(there) - set(bigearthnet.CLASSES)):
            raise ValueError(f"{sample} has the label {unknown[0]!r}, which is no class of BigEarthNet v2")
        return published.presence("bigearthnet", there, bigearthnet.CLASSES, place.width_m, SOURCE)

    return place, {
        "s2": lambda: _image(sensors.get("sentinel-2-l2a").select(bigearthnet.S2_BANDS), s2, 10.0, _day(s2)),
        "s1": lambda: _image(published.sentinel1("VH", "VV"), s1, 10.0, _day(s1)),
        "label": label,
    }


def _biomassters(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    agbm = [part for part in parts.values() if part.facts.get("modality") == "AGBM"]
    if len(agbm) != 1:
        raise ValueError(f"{sample} has {len(agbm)} images of biomass, expected 1")
    target = agbm[0].tiff()[0].astype(np.float32)
    held = {k: [p for p in parts.values() if p.facts.get("modality") == k] for k in ("S1", "S2")}

    def months(found: Sequence[Member]) -> Tensor:
        """Months of a year that is not published: 2020 is a name for it, as in :mod:`everysat.data.biomassters`."""
        order = [biomassters.MONTHS.index(part.facts["month"]) for part in found]
        return _times(*(dates.span(f"{2020 - (m < 4)}-{(m + 8) % 12 + 1:02d}") for m in order))

    def s2() -> Raster:
        numbers = np.stack([part.tiff()[0][:10] for part in held["S2"]])
        table = sensors.get("sentinel-2-l2a").select(published.S2_BANDS)
        return bands.series(table, numbers, months(held["S2"]), str(sample), 10.0)

    def s1(name: str) -> Raster:
        first, table = biomassters.ORBITS[name]
        pair = np.stack([part.tiff()[0][first : first + 2] for part in held["S1"]])
        pair = np.where(pair == biomassters.NO_DATA, np.nan, pair)
        sensor = sensors.get(table).select(("VV", "VH"))
        raster = published.series(sensor, pair, months(held["S1"]), str(sample))
        return raster.obs(raster.valid.flatten(1).any(1))

    layers: Layers = {"s2": s2} if held["S2"] else {}
    layers |= {"s1-asc": lambda: s1("s1-asc"), "s1-des": lambda: s1("s1-des")} if held["S1"] else {}
    layers["label"] = lambda: Raster.of(biomassters.BIOMASS, torch.from_numpy(target)[None], 10.0)
    return _plain(target.shape, 10.0, sample), layers


def _earthnet(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    label = _part(parts, "label", sample)
    days = sorted((p for n, p in parts.items() if n.startswith("planet_")), key=lambda p: int(p.name.rsplit("_", 1)[1]))
    if not days:
        raise ValueError(f"{sample} has no member planet_0")

    def planet() -> Raster:
        numbers = np.stack([part.tiff()[0] for part in days])
        return bands.series(sensors.get("planetscope-4b"), numbers, _times(*map(_day, days)), str(sample), 3.0)

    def s2() -> Raster:
        table = sensors.get("sentinel-2-l2a").select(treesatai.MONO_BANDS)
        return _image(table, part := _part(parts, "s2", sample), 3.0, _month(part))

    return _ground(label, 3.0, sample), {
        "planet": planet,
        "s2": s2,
        "label": lambda: _codes("dynamic-earthnet", label, label.tiff()[0][0], EARTHNET, 3.0),
    }


def _flair(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    aerial, mask = _part(parts, "aerial", sample), _part(parts, "mask", sample)
    place = _ground(aerial, 0.2, sample)

    def label() -> Raster:
        codes = mask.tiff()[0][0]
        codes = np.where((codes > flair.OTHER) & (codes <= max(flair.CLASSES)), flair.OTHER, codes)
        return _codes("flair-land-cover", mask, codes, flair.MERGED, 0.2)

    return place, {"aerial-flair": lambda: _image("flair-aerial", aerial, 0.2, _day(aerial)), "label": label}


def _m4sar(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    optical, sar, objects = (_part(parts, name, sample) for name in ("optical", "sar", "annotations"))
    shape = optical.tiff()[0].shape

    def grey() -> Raster:
        return published.image(GREY, sar.tiff()[0][:1], str(sar), 10.0)

    def outlines() -> Vector:
        frame = objects.frame()
        corners = frame[[f"{axis}{i}" for i in range(1, 5) for axis in "xy"]].to_numpy(float).reshape(-1, 4, 2)
        kinds = frame["class_id"].astype(int)
        if not kinds.isin(range(len(OBJECTS))).all():
            raise ValueError(f"{objects} has the class {kinds.max()}, expected 0 to {len(OBJECTS) - 1}")
        found = tuple(Polygon(10.0 * corner) for corner in corners)
        named = tuple({"class": OBJECTS[kind], "code": kind} for kind in kinds)
        return Vector(found, named, _times(*[ALWAYS] * len(found)), torch.zeros(len(found), dtype=torch.int64))

    return _plain(shape, 10.0, sample), {
        "rgb": lambda: _image("rgb-image", optical, 10.0),
        "sar": grey,
        "objects": outlines,
    }


def _pastis(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    semantic = _part(parts, "semantic", sample)
    codes = semantic.hdf5()[0]

    def series(name: str, table: Sensor) -> Raster:
        part = _part(parts, name, sample)
        return published.series(table, part.hdf5(), published.days(part.facts["dates"], str(part)), str(part))

    def label() -> Raster:
        return published.without(_codes("pastis-crops", semantic, codes, pastis.CLASSES, 10.0), [pastis.VOID])

    return _plain(codes.shape, 10.0, sample), {
        "s2": lambda: series("s2", pastis.theia()),
        "s1-asc": lambda: series("s1a", pastis.sentinel1()),
        "s1-des": lambda: series("s1d", pastis.sentinel1()),
        "label": label,
    }


def _spacenet7(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    images, mask = _part(parts, "images", sample), _part(parts, "mask", sample)
    numbers = images.tiff()[0]
    gsd_m = float(f"{4.77731426716 * math.cos(math.radians(float(sample.facts['lat']))):.6g}")
    span = _month(images)

    def planet() -> Raster:
        raster = published.image(sensors.get("planet-basemap"), numbers[:3], str(images), gsd_m)
        seen = torch.from_numpy(numbers[3:4] > 0)[None].expand_as(raster.valid)
        return _dated(replace(raster, valid=raster.valid & seen), span)

    def label() -> Raster:
        codes = _codes("spacenet7-buildings", mask, mask.tiff()[0][0], spacenet7.CLASSES, gsd_m)
        return replace(codes, valid=torch.from_numpy(numbers[3:4] > 0)[None])

    return _plain(numbers.shape, gsd_m, sample), {"planet": planet, "label": label}


def _treesatai(parts: Parts, sample: Member) -> tuple[Place, Layers]:
    aerial, s2 = _part(parts, "aerial", sample), _part(parts, "s2", sample)
    table = sensors.get("sentinel-2-l2a").select(treesatai.MONO_BANDS)

    def label() -> Raster:
        return published.presence(
            "treesatai", _named(sample.facts.get("species_labels")), treesatai.GENERA, 60.0, SOURCE
        )

    return _ground(aerial, 0.2, sample), {
        "aerial": lambda: _image("treesatai-aerial", aerial, 0.2),
        "s2": lambda: published.image(table, bands.nearest(s2.tiff()[0], 6), str(s2), 10.0),
        "label": label,
    }


_READERS: dict[str, Callable[[Parts, Member], tuple[Place, Layers]]] = {
    "benv2": _benv2, "biomassters": _biomassters, "dynamic_earthnet": _earthnet, "flair2": _flair, "m4sar": _m4sar, "pastis": _pastis,
    "spacenet7": _spacenet7, "treesatai": _treesatai,
}  # fmt: skip


def fake(folder: Path, *, places: int = 2, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement): ``benv2`` with ``places`` in each split."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, split in enumerate([split for split in FILED.values() for _ in range(places)]):
        there = [bigearthnet.CLASSES[i] for i in sorted(rng.choice(19, 2, replace=False))]
        facts = {
            "tortilla:id": f"sample_{number}", "tortilla:file_format": "TORTILLA", "tortilla:data_split": split, "labels": there,
            "stac:time_start": 1527552000.0 + 864_000 * number, "lon": 9.0, "lat": 45.0,
        }  # fmt: skip
        corner = (500_040.0 + 1200 * number, 5_000_040.0)
        radar = (rng.normal(size=(2, 120, 120)) - np.array([19.0, 12.0]).reshape(2, 1, 1)).astype(np.float32)
        optical = rng.integers(0, 5000, (12, 120, 120)).astype(np.uint16)
        inner = [
            (
                {**facts, "tortilla:id": name, "tortilla:file_format": "GTiff"},
                tortilla.tiff_of(values, "EPSG:32632", corner, gsd_m),
            )
            for name, values, gsd_m in (("s1", radar, 10.0), ("s2", optical, 60.0))
        ]
        samples.append((facts, tortilla.packed(inner)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benv2.tortilla").write_bytes(tortilla.packed(samples))
