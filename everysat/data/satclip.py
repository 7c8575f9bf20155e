"""S2-100K of SatCLIP: Sentinel-2 Level-2A patches from around the Earth, without labels; tiles of them are places.

Klemmer et al. 2025, SatCLIP: Global, General-Purpose Location Embeddings with Satellite Imagery (AAAI). The repository
github.com/microsoft/satclip (MIT; contains modified Copernicus Sentinel data) has a sample of 23 in the published format:

    **/patch_<number>.tif    uint16 [12, 256, 256] at 10 m in the local UTM zone; bands B01 ... B08, B8A, B09, B11, B12

What the files do not say, and what is done about it:

- The bands have no names. That B08 and B8A are numbers 8 and 9, and that B10 is missing, was read off the spectra of vegetation and
  snow and off the pixel sizes: 20 and 60 m bands are repeated onto the 10 m grid.
- There is no acquisition date, neither in the tags nor in the index; the set was sampled from January 2021 to May 2023. So patches
  are undated unless ``time`` says otherwise.
- Products of the processing baseline 04.00 (from 25 January 2022 on) carry an offset of 1000, and which do is not said. With
  ``baseline="auto"`` it is told by the darkest band: without the offset something in 2.5 x 2.5 km is darker than 0.07.
  Among the 23 samples, the 1st percentile of the darkest band is at most 428 or at least 879.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from everysat import sensors
from everysat.data import published, tiling
from everysat.io import arrays
from everysat.io.dates import Span, span
from everysat.io.read import open_scene
from everysat.io.scene import Scene
from everysat.types import ALWAYS, Batch

LICENCE = "MIT; contains modified Copernicus Sentinel data"
SOURCE = "https://github.com/microsoft/satclip"
SENSOR = "sentinel-2-l2a"
GSD_M = 10.0
DARK = 700
"""Digital number that the 1st percentile of the darkest band stays below when there is no offset."""


@dataclass(frozen=True)
class SatClip:
    """See :func:`build`. ``patches`` are paths below ``root``; ``corners`` first row and column of the tiles of each patch."""

    root: Path
    patches: tuple[str, ...]
    bands: tuple[str, ...]
    shape: tuple[int, int]
    side: int
    corners: tuple[tuple[int, int], ...]
    time: Span
    baseline: str

    def __len__(self) -> int:
        return len(self.patches) * len(self.corners)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} tiles")
        patch, tile = divmod(index, len(self.corners))
        row, column = self.corners[tile]
        path = self.root / self.patches[patch]
        scene = _scene(path, self.bands, self.time, self.baseline)
        if scene.shape != self.shape:
            raise ValueError(
                f"{path} has {scene.shape} pixels, the first patch has {self.shape}; leave it out with hold_out"
            )
        return scene.read((slice(row, row + self.side), slice(column, column + self.side)))

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def build(
    variant: str = "",
    *,
    root: str | Path,
    tile_m: float | None = None,
    stride_m: float | None = None,
    bands: Sequence[str] | None = None,
    time: Any = None,
    baseline: str = "auto",
    patches: Sequence[str] | None = None,
    hold_out: Sequence[str] = (),
    part: str = "",
    shares: Mapping[str, float] | None = None,
    block_m: float = 100_000.0,
    seed: int = 0,
) -> SatClip:
    """Tiles of the patches, with one layer, ``s2``: surface reflectance [1, band, y, x] at 10 m.

    Args:
        root: folder with the patches, in any folders below it.
        tile_m, stride_m: side of a tile, and from one to the next (a side), metres; a whole patch by default.
        bands: these alone, in this order; all 12 by default.
        time: when all patches are taken to be from, as :func:`everysat.io.dates.span` reads it (``"2022-06-15"``), for models
            that need a date; ``("2021-01-01", "2023-05-23")`` is all that is known. Undated by default.
        baseline: ``"00.00"`` or ``"04.00"`` for all patches, or ``"auto"`` to tell for each (see above).
        patches, hold_out: names (``patch_445``) to take alone, and to leave out.
        part, shares, block_m, seed: only the patches of one part (``train``, ``val``, ``test``) of a split by blocks of ground
            of that side, so that patches of different parts are of different regions.

    Raises:
        FileNotFoundError: no patches there. LookupError: an unknown patch, band or variant. ValueError: sizes that do not fit.
    """
    if variant:
        raise LookupError(f"satclip has no variants; got {variant!r}")
    if baseline != "auto" and not baseline.replace(".", "").isdigit():
        raise ValueError(f"baseline={baseline!r} must be 'auto' or a processing baseline such as '04.00'")
    folder = published.folder(root, "satclip", (), SOURCE)
    names = _chosen(folder, patches, hold_out)
    chosen = sensors.get(SENSOR).select(bands or sensors.get(SENSOR).names).names
    when = ALWAYS if time is None else span(tuple(time) if isinstance(time, list) else time)
    opened = _scene(folder / names[0], chosen, when, "00.00")
    side = min(opened.shape) if tile_m is None else tiling.pixels(tile_m, GSD_M, "tile_m")
    stride = side if stride_m is None else tiling.pixels(stride_m, GSD_M, "stride_m")
    corners = tuple(tiling.corners(opened.shape, side, stride))
    if part:
        centres = [_scene(folder / name, chosen, when, "00.00").place.lonlat for name in names]
        kept = tiling.part_of(tiling.on_earth_m(np.array(centres)), part, block_m, shares, seed)
        names = [names[i] for i in kept]
    return SatClip(folder, tuple(names), chosen, opened.shape, side, corners, when, baseline)


def baseline_of(path: str | Path) -> str:
    """``"04.00"`` if the digital numbers of a patch seem to carry the offset of 1000, else ``"00.00"``."""
    numbers, _ = arrays.tiff(path)
    dark = np.where(numbers == 0, np.iinfo(numbers.dtype).max, numbers).min(0)
    return "04.00" if np.percentile(dark, 1) > DARK else "00.00"


def _chosen(folder: Path, patches: Sequence[str] | None, hold_out: Sequence[str]) -> list[str]:
    found = {path.stem: str(path.relative_to(folder)) for path in sorted(folder.rglob("patch_*.tif"))}
    if not found:
        raise published.absent(folder, "patch_*.tif", "satclip", SOURCE)
    for argument, asked in (("patches", patches or ()), ("hold_out", hold_out)):
        for name in asked:
            published.one_of(name, found, argument)
    names = [found[name] for name in found if (patches is None or name in patches) and name not in hold_out]
    if not names:
        raise ValueError("hold_out leaves out every patch that patches asks for")
    return names


@lru_cache(maxsize=4096)
def _scene(path: Path, bands: tuple[str, ...], time: Span, baseline: str) -> Scene:
    """The patch with its bands by name; metadata alone."""
    return open_scene(
        [path],
        sensor=SENSOR,
        order=sensors.get(SENSOR).names,
        bands=bands,
        gsd_m=GSD_M,
        times=time,
        names={f"{SENSOR}-{GSD_M:g}m": "s2"},
        processing_baseline=baseline_of(path) if baseline == "auto" else baseline,
    )
