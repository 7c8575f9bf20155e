"""BraDD-S1TS: deforestation in the Brazilian Amazon, seen by a series of Sentinel-1 images of 480 m places.

About 25 000 places, half of them with a deforestation alert (Karaman, Sainte Fare Garnot and Wegner 2023, ISPRS Annals X-1/W1,
835-842). Backscatter is in dB. The label says for each pixel whether it was forest that fell until the day of the label.

Layout, under ``root``::

    meta.csv             file, close_set (train, validation, test), ...; the first column is an index
    Samples/<file>.pt    image float [T, 2, 48, 48]: VV, VH; image_dates [T]; label [t, 48, 48]; label_dates [t]

The files are PyTorch dictionaries; only tensors and dates are read from them, never other objects. Against the published loader of
AnySat: dates are dates, not days since the first one; VV/VH has no small number added to VH. As there, the second label map is the
target.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat.data import bands, published
from everysat.io import archives, dates
from everysat.types import Batch, Place, Raster

LICENCE = "as stated at the source (Zenodo record 8060250); Copernicus Sentinel data"
SOURCE = "https://zenodo.org/records/8060250"
SPLITS = ("train", "val", "test")
LAYERS = ("s1", "label")
CLASSES = {0: "not deforested", 1: "deforested"}
SETS = {"train": "train", "val": "validation", "test": "test"}
SIDE_PX, GSD_M, NO_LABEL = 48, 10.0, -1
TARGET = 1
"""Which of the label maps of a file is the target."""


@dataclass(frozen=True)
class BraDD:
    """See :func:`build`. ``files`` are the names of the samples."""

    root: Path
    split: str
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        path = self.root / "Samples" / self.files[index]
        held = archives.tensors(path, ("image", "image_dates", "label", "label_dates"))
        side_m = SIDE_PX * GSD_M
        return Batch((Place(side_m, side_m),), {"s1": _series(held, path), "label": _label(held, path)})

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def _series(held: dict[str, Any], path: Path) -> Raster:
    image = torch.as_tensor(held["image"]).float().numpy()
    if image.ndim != 4 or image.shape[1:] != (2, SIDE_PX, SIDE_PX):
        raise ValueError(f"{path}: image is {image.shape}, expected [date, 2, {SIDE_PX}, {SIDE_PX}]")
    time_s = torch.tensor([_day(day, path) for day in held["image_dates"]], dtype=torch.float64).reshape(-1, 2)
    return bands.series(published.sentinel1("VV", "VH", "ratio"), bands.with_ratio(image), time_s, path, GSD_M)


def _label(held: dict[str, Any], path: Path) -> Raster:
    maps, days = held["label"], held["label_dates"]
    if len(maps) <= TARGET or tuple(maps[TARGET].shape) != (SIDE_PX, SIDE_PX) or len(days) != len(maps):
        raise ValueError(
            f"{path}: {len(maps)} label maps of {[tuple(m.shape) for m in maps][:2]} with {len(days)} dates, expected at least "
            f"{TARGET + 1} of {SIDE_PX} x {SIDE_PX} with a date each"
        )
    codes = torch.as_tensor(maps[TARGET]).long().numpy()
    label = published.class_map(
        "bradd-deforestation", np.where(codes == NO_LABEL, 0, codes), CLASSES, GSD_M, SOURCE, path
    )
    known = torch.from_numpy(codes != NO_LABEL)[None, None]
    time_s = torch.tensor([_day(days[TARGET], path)], dtype=torch.float64)
    return replace(label, valid=label.valid & known, time_s=time_s)


def _day(value: Any, path: Path) -> dates.Span:
    """The UTC day of a date, a time or an ISO 8601 string."""
    if isinstance(value, datetime.datetime):
        value = value.date()
    try:
        return dates.span(value[:10] if isinstance(value, str) else value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def build(
    variant: str = "", *, root: str | Path, split: str = "train", modalities: Sequence[str] | None = None
) -> BraDD:
    """Places of BraDD-S1TS with the layer ``s1`` (VV, VH, VV/VH) and the label; its close split, as in the paper.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    published.layers_of(modalities, LAYERS[:1], LAYERS[:1])
    base = published.folder(root, "BraDD-S1TS", ("meta.csv", "Samples"), SOURCE)
    frame = archives.table(base / "meta.csv", ("file", "close_set"), index_col=0)
    files = tuple(str(name) for name in frame["file"][frame["close_set"] == SETS[split]])
    if not files:
        raise ValueError(f"{base / 'meta.csv'} has no row with close_set={SETS[split]!r}, the split {split!r}")
    return BraDD(base, split, files)


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split."""
    rng = np.random.default_rng(seed)
    (folder / "Samples").mkdir(parents=True, exist_ok=True)
    rows = [",alert_idx,center_idx,date,sampling_type,state,file,close_set"]
    for i, name in enumerate(name for name in SETS.values() for _ in range(places)):
        start = datetime.date(2020, 1, 5) + datetime.timedelta(int(rng.integers(300)))
        days = [start + datetime.timedelta(12 * step) for step in range(int(rng.integers(5, 9)))]
        db = rng.normal(size=(len(days), 2, SIDE_PX, SIDE_PX)) - np.array([7.0, 13.0]).reshape(2, 1, 1)
        fallen = np.cumsum(rng.random((2, SIDE_PX, SIDE_PX)) > 0.9, 0) > 0
        sample = {
            "image": torch.from_numpy(db).float(),
            "image_dates": days,
            "label": torch.from_numpy(fallen.astype(np.int64)),
            "label_dates": [days[0], days[-1]],
        }
        file = f"{i:07d}_{days[-1]}.pt"
        torch.save(sample, folder / "Samples" / file)
        rows.append(f"{i},{i},0,{days[-1]},positive,PA,{file},{name}")
    (folder / "meta.csv").write_text("\n".join(rows) + "\n")
