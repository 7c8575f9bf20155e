"""BigEarthNet v2 (reBEN): 480 038 places of 1.2 km in ten European countries, 2017-2018, in Sentinel-2 and Sentinel-1, with land cover.

Clasen et al. 2025 (IGARSS, https://arxiv.org/abs/2407.03653). Sentinel-2 is Level-2A of sen2cor 2.11, Sentinel-1 is in dB. The labels are 19 classes of
CORINE Land Cover 2018, for the place as a whole or for each pixel.

Layout, under ``root``; a scene is the name of a patch without its last two parts, for Sentinel-1 the last three::

    metadata.parquet                                                    patch_id, labels, split, country, s1_name, contains_...
    metadata_for_patches_with_snow_cloud_or_shadow.parquet              the same of 69 450 patches that are hard to see
    BigEarthNet-S2/<scene>/<patch_id>/<patch_id>_<band>.tif             12 bands, uint16, each in its own 10, 20 or 60 m
    BigEarthNet-S1/<scene>/<s1_name>/<s1_name>_{VV,VH}.tif              float32, 10 m
    Reference_Maps/<scene>/<patch_id>/<patch_id>_reference_map.tif      codes of CORINE; 999 and 12 of its classes are not labelled

Variant ``native`` keeps the bands of 20 and 60 m as layers of their own; otherwise they are resampled to 10 m, bilinear.

The table of names, labels and parts is that of the published file; bands, units (no offset of baseline 04.00, though the names say N9999) and the
grid agree with the patches that GEO-Bench-2 took over. Taken from published programs alone: the reference maps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from odc.geo.geobox import GeoBox

from everysat import sensors
from everysat.data import bands, published
from everysat.io import arrays, grid
from everysat.io.plane import unreadable
from everysat.types import Batch, Place, Raster

LICENCE = "CDLA-Permissive-1.0; Copernicus data"
SOURCE = "https://zenodo.org/records/10891137 (doi:10.5281/zenodo.10891137)"
SPLITS = ("train", "val", "test")
LAYERS = ("s2", "s1", "label")
VARIANTS = ("", "native")
LABELS = ("scene", "map")
TABLE, HARD = "metadata.parquet", "metadata_for_patches_with_snow_cloud_or_shadow.parquet"
COLUMNS = ("patch_id", "labels", "split", "s1_name")
FILED = {"train": "train", "val": "validation", "test": "test"}
SIDE_PX, GSD_M = 120, 10.0
BANDS = {
    10.0: ("B02", "B03", "B04", "B08"),
    20.0: ("B05", "B06", "B07", "B8A", "B11", "B12"),
    60.0: ("B01", "B09"),
}
S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
S1_BANDS = ("VV", "VH")
CLASSES = (
    "Urban fabric", "Industrial or commercial units", "Arable land", "Permanent crops", "Pastures", "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation", "Agro-forestry areas",
    "Broad-leaved forest", "Coniferous forest", "Mixed forest", "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation", "Transitional woodland, shrub", "Beaches, dunes, sands", "Inland wetlands",
    "Coastal wetlands", "Inland waters", "Marine waters",
)  # fmt: skip
CORINE = {
    0: (111, 112), 1: (121,), 2: (211, 212, 213), 3: (221, 222, 223, 241), 4: (231,), 5: (242,), 6: (243,), 7: (244,), 8: (311,),
    9: (312,), 10: (313,), 11: (321, 333), 12: (322, 323), 13: (324,), 14: (331,), 15: (411, 412), 16: (421, 422), 17: (511, 512),
    18: (521, 522, 523),
}  # fmt: skip
"""Codes of CORINE that make up each class."""
UNLABELLED_CODES = (122, 123, 124, 131, 132, 133, 141, 142, 332, 334, 335, 423, 999)


@dataclass(frozen=True, eq=False)
class BigEarthNet:
    """See :func:`build`. ``present`` has a bit for each class, the first the least."""

    root: Path
    variant: str
    split: str
    patches: tuple[str, ...]
    twins: tuple[str, ...]
    present: np.ndarray
    layers: tuple[str, ...]
    labels: str

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        layers: dict[str, Raster] = {}
        geobox = None
        if "s2" in self.layers:
            optical, geobox = self._s2(self.patches[index])
            layers |= optical
        if "s1" in self.layers:
            layers["s1"], twin_box = self._s1(self.twins[index])
            geobox = geobox or twin_box
        side_m = SIDE_PX * GSD_M
        if self.labels == "map":
            layers["label"] = self._map(self.patches[index])
        else:
            there = [name for bit, name in enumerate(CLASSES) if int(self.present[index]) >> bit & 1]
            layers["label"] = published.presence("bigearthnet-classes", there, CLASSES, side_m, SOURCE)
        return Batch((Place(side_m, side_m) if geobox is None else grid.place_of(geobox),), layers)

    def fingerprint(self) -> str:
        content = hashlib.blake2b("\n".join(self.patches).encode(), digest_size=8)
        content.update(self.present.tobytes() + repr((self.variant, self.split, self.layers, self.labels)).encode())
        return f"bigearthnet:{content.hexdigest()}"

    def _s2(self, patch: str) -> tuple[dict[str, Raster], GeoBox | None]:
        folder = self.root / "BigEarthNet-S2" / _scene(patch, 2) / patch
        time_s = published.days(published.stamps_in([patch], 2, folder), folder)
        found, boxes = {}, {}
        for gsd_m, names in BANDS.items():
            paths = [folder / f"{patch}_{band}.tif" for band in names]
            numbers, boxes[gsd_m] = _stack(paths, round(SIDE_PX * GSD_M / gsd_m))
            sensor = sensors.get("sentinel-2-l2a").select(names)
            found[gsd_m] = bands.series(sensor, numbers[None], time_s, folder, gsd_m)
        if self.variant == "native":
            named = {f"s2-{gsd_m:g}m" if gsd_m > GSD_M else "s2": raster for gsd_m, raster in found.items()}
            return named, boxes[GSD_M]
        whole = found[GSD_M]
        for gsd_m in (20.0, 60.0):
            part = bands.finer(found[gsd_m], SIDE_PX)
            whole = bands.joined(whole, part, (*whole.sensor.names, *part.sensor.names))
        return {"s2": whole.select(S2_BANDS)}, boxes[GSD_M]

    def _s1(self, twin: str) -> tuple[Raster, GeoBox | None]:
        folder = self.root / "BigEarthNet-S1" / _scene(twin, 3) / twin
        numbers, geobox = _stack([folder / f"{twin}_{band}.tif" for band in S1_BANDS], SIDE_PX)
        time_s = published.days(published.stamps_in([twin], 4, folder), folder)
        return bands.series(published.sentinel1(*S1_BANDS), numbers[None], time_s, folder, GSD_M), geobox

    def _map(self, patch: str) -> Raster:
        path = self.root / "Reference_Maps" / _scene(patch, 2) / patch / f"{patch}_reference_map.tif"
        codes = _stack([path], SIDE_PX)[0][0].astype(np.int64)
        ours = np.full(codes.shape, -1)
        for number, theirs in CORINE.items():
            ours[np.isin(codes, theirs)] = number
        known = ours >= 0
        strange = ~known & ~np.isin(codes, UNLABELLED_CODES)
        if strange.any():
            raise ValueError(f"{path} holds the code {codes[strange][0]}, which is none of CORINE Land Cover")
        label = published.class_map(
            "bigearthnet-map", np.where(known, ours, 0), dict(enumerate(CLASSES)), GSD_M, SOURCE, path
        )
        return replace(label, valid=torch.from_numpy(known)[None, None])


def _scene(name: str, parts: int) -> str:
    return "_".join(name.split("_")[:-parts])


def _stack(paths: Iterable[Path], side: int) -> tuple[np.ndarray, GeoBox | None]:
    """[band, y, x] of files of one band each, and the grid of the first."""
    read = [(path, *arrays.tiff(path)) for path in paths]
    for path, numbers, _ in read:
        if numbers.shape != (1, side, side):
            raise ValueError(f"{path} holds {numbers.shape}, expected (1, {side}, {side})")
    return np.concatenate([numbers for _, numbers, _ in read]), read[0][2]


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    labels: str = "scene",
    hard: bool = False,
) -> BigEarthNet:
    """Places of BigEarthNet v2; ``label`` has a band of 0 or 1 for each of 19 classes.

    Args:
        variant: ``""`` for 12 bands of Sentinel-2 at 10 m, ``"native"`` for the layers ``s2`` (10 m), ``s2-20m`` and ``s2-60m``.
        root: the folder that holds the table and the folders of the images.
        modalities: of ``s2`` and ``s1`` (VV, VH); both by default.
        labels: ``"map"`` for the class of each pixel instead, from the reference map.
        hard: with the patches of seasonal snow, cloud or shadow, which the published parts leave out.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, VARIANTS, "variant")
    published.one_of(split, SPLITS, "split")
    published.one_of(labels, LABELS, "labels")
    layers = published.layers_of(modalities, LAYERS[:2], LAYERS[:2])
    folders = {"s2": "BigEarthNet-S2", "s1": "BigEarthNet-S1"}
    needed = [folders[name] for name in layers] + ["Reference_Maps"] * (labels == "map")
    base = published.folder(root, "BigEarthNet v2", (TABLE, *needed, *[HARD] * hard), SOURCE)
    frame = pd.concat([_table(base / name, FILED[split]) for name in (TABLE, *[HARD] * hard)])
    present = np.array([_bits(there, base / TABLE) for there in frame["labels"]], dtype=np.uint32)
    return BigEarthNet(base, variant, split, tuple(frame["patch_id"]), tuple(frame["s1_name"]), present, layers, labels)


def _table(path: Path, part: str) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise unreadable(str(path), error) from error
    lacking = [column for column in COLUMNS if column not in frame.columns]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}; it has {', '.join(frame.columns)}")
    return frame[frame["split"] == part]


def _bits(there: Iterable[str], path: Path) -> int:
    unknown = set(there) - set(CLASSES)
    if unknown:
        raise ValueError(f"{path} has the class {sorted(unknown)[0]!r}, which is none of the 19")
    return sum(1 << CLASSES.index(name) for name in set(there))


def fake(folder: Path, *, places: int = 2, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split, and one that is hard to see."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, object]] = []
    for i in range(3 * places + 1):
        day, at = f"2018{1 + i % 12:02d}{10 + i}", f"{20 + i}_{50 + i}"
        patch = f"S2A_MSIL2A_{day}T101031_N9999_R022_T33UUP_{at}"
        twin = f"S1A_IW_GRDH_1SDV_{day}T165809_33UUP_{at}"
        classes = sorted(rng.choice(CLASSES, 1 + i % 4, replace=False).tolist())
        _fake_place(folder, patch, twin, (300_000.0 + 1200 * (20 + i), 5_300_000.0 - 1200 * (50 + i)), rng)
        line: dict[str, object] = {"patch_id": patch, "labels": classes, "split": list(FILED.values())[i % 3]}
        lines.append(
            {**line, "country": "Austria", "s1_name": twin, "s2v1_name": patch.replace("_N9999_R022_T33UUP", "")}
        )
    for name, part, hard in ((TABLE, lines[:-1], False), (HARD, lines[-1:], True)):
        seen = {"contains_seasonal_snow": hard, "contains_cloud_or_shadow": False}
        pd.DataFrame([{**line, **seen} for line in part]).to_parquet(folder / name)


def _fake_place(folder: Path, patch: str, twin: str, corner: tuple[float, float], rng: np.random.Generator) -> None:
    def write(path: Path, values: np.ndarray, gsd_m: float) -> None:
        arrays.write_tiff(path, values[None], crs="EPSG:32633", corner=corner, gsd_m=gsd_m)

    for gsd_m, names in BANDS.items():
        side = round(SIDE_PX * GSD_M / gsd_m)
        for band in names:
            numbers = rng.integers(50, 5000, (side, side)).astype(np.uint16)
            write(folder / "BigEarthNet-S2" / _scene(patch, 2) / patch / f"{patch}_{band}.tif", numbers, gsd_m)
    for band, level in zip(S1_BANDS, (-11, -18), strict=True):
        numbers = rng.normal(level, 2, (SIDE_PX, SIDE_PX)).astype(np.float32)
        write(folder / "BigEarthNet-S1" / _scene(twin, 3) / twin / f"{twin}_{band}.tif", numbers, GSD_M)
    codes = rng.choice([code for codes in CORINE.values() for code in codes] + [142, 999], (SIDE_PX, SIDE_PX))
    path = folder / "Reference_Maps" / _scene(patch, 2) / patch / f"{patch}_reference_map.tif"
    write(path, codes.astype(np.uint16), GSD_M)
