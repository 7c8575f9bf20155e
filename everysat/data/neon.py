"""Trees of the National Ecological Observatory Network of the United States, seen from an aeroplane.

From the tests of DeepTreeAttention (Weinstein et al.); NEON data products DP3.30010.001 (camera) and DP3.30006.001 (spectrometer). Layout, under ``root``::

    crowns/{Alive,Dead}/*.png                   variant crowns: 500 crowns each, red, green, blue at 0.1 m, of 23 to 198 px
    hsi_species_crops/<tree>_<year>.tif         variant species: 53 crowns, int16 [369 bands, y, x] at 1 m
    hsi_species_crops/annotations.csv           image_path, taxonID, tile_year
    hsi_plot/*image_crop_<year>.tif             variant plot: one place of 10 x 27 m, red, green, blue at 0.1 m
    hsi_plot/*hyperspectral_<year>.tif          and 369 bands at 1 m

What the files do not say, or say wrongly:

- The plot is published as two years. Both files of each sensor are the same, byte for byte: it is one place, and undated.
- ``train.csv`` and ``test.csv`` of the species are one table. There is one tree of each of 15 species, in three or four years: years are
  held out here, so that a score says whether a tree is known again, not whether its species is.
- Crowns are held out by site, of which there are 41. Most of the dead ones were found in whole tiles, most of the others in plots, so
  what differs is not only whether they live.
- The CRS of the spectrometer's plot is that of the photograph. 0 is a reflectance that the correction of the atmosphere cut off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from everysat import sensors
from everysat.data import points, published
from everysat.io import archives, arrays, dates, grid, pictures
from everysat.types import ALWAYS, Batch, Place, Raster

LICENCE = "MIT (github.com/weecology/DeepTreeAttention); NEON open data, CC0"
SOURCE = "https://github.com/weecology/DeepTreeAttention, tests/data"
SPLITS = points.SPLITS
LAYERS = ("hsi", "label")
VARIANTS = {"crowns": ("rgb",), "species": ("hsi",), "plot": ("rgb", "hsi")}
STATES = ("Alive", "Dead")
SPECIES = (
    "ACRU", "CAGL8", "LIST2", "MAGNO", "NYSY", "PICL", "PIEL", "PIPA2", "PITA", "QUGE2", "QUHE2", "QULA2", "QULA3", "QUNI", "QUVI",
)  # fmt: skip
"""Codes of the USDA PLANTS database."""
YEARS = {"train": (2017, 2018), "val": (2019,), "test": (2020, 2021)}
RGB_M, HSI_M, LABEL_M, NODATA = 0.1, 1.0, 20.0, -9999
"""Sides of pixels; a label covers the largest crown, because labels that are joined need one size."""
_SITE = re.compile(r"^(?:\d{4}_)?(?P<site>[A-Z]{4})_")
_YEAR = re.compile(r"_(?P<year>20\d{2})\.tif$")


@dataclass(frozen=True)
class Crowns:
    """See :func:`build`. ``files`` below ``root`` with the class of each."""

    root: Path
    variant: str
    files: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        path = self.root / self.files[index]
        if self.variant == "crowns":
            raster = published.image(sensors.get("rgb-image"), pictures.picture(path), path, RGB_M)
        else:
            raster = _spectra(path, dates.span(str(_year(path))))
        code = np.array([[self.classes.index(self.names[index])]])
        label = published.class_map(f"neon-{self.variant}", code, dict(enumerate(self.classes)), LABEL_M, SOURCE, path)
        height_m, width_m = (pixels * raster.gsd_m for pixels in raster.values.shape[2:])
        return Batch((Place(height_m, width_m),), {VARIANTS[self.variant][0]: raster, "label": label})

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def classes(self) -> tuple[str, ...]:
        return STATES if self.variant == "crowns" else SPECIES

    @property
    def codes(self) -> np.ndarray:
        """The class of each place."""
        return np.array([self.classes.index(name) for name in self.names])

    @property
    def groups(self) -> np.ndarray:
        """The site of each crown, or the year in which a species was seen."""
        found = [_site(Path(f)) if self.variant == "crowns" else str(_year(Path(f))) for f in self.files]
        return np.array(found)


@dataclass(frozen=True)
class Plot:
    """See :func:`build`: one place, from one file of each sensor."""

    root: Path
    rgb: str
    hsi: str
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Batch:
        if index != 0:
            raise IndexError(f"index {index} is outside a dataset of 1 place")
        numbers, geobox = arrays.tiff(self.root / self.rgb)
        if geobox is None:
            raise ValueError(f"{self.root / self.rgb} has no CRS, so where the plot lies is unknown")
        rgb = published.image(sensors.get("rgb-image"), numbers, self.root / self.rgb, RGB_M)
        hsi = _spectra(self.root / self.hsi, ALWAYS)
        if any(
            abs(a * RGB_M - b * HSI_M) > RGB_M for a, b in zip(rgb.values.shape[2:], hsi.values.shape[2:], strict=True)
        ):
            raise ValueError(
                f"{self.root / self.hsi} covers other ground than {self.rgb}: {tuple(hsi.values.shape)} pixels of 1 m"
            )
        both = {"rgb": rgb, "hsi": hsi}
        return Batch((grid.place_of(geobox),), {name: both[name] for name in self.layers})

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def build(
    variant: str = "species",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
) -> Crowns | Plot:
    """Tree crowns with a label of the whole place, or a plot without: ``rgb`` in digital numbers, ``hsi`` reflectance in 369 bands.

    Args:
        variant: ``species``, ``crowns`` (alive or dead) or ``plot``.
        root: the folder of the layout above.
        split: ``train``, ``val``, ``test``: of crowns by site, of species by year; ``all`` is everything. The plot has no parts.
        modalities: of the plot, ``rgb`` or ``hsi`` alone.
        fold, folds, seed: of crowns: which of the folds of sites is the test; the next is ``val``.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    variant = published.one_of(variant or "species", VARIANTS, "variant")
    published.one_of(split, (*SPLITS, points.EVERY), "split")
    layers = published.layers_of(modalities, VARIANTS[variant], VARIANTS[variant])
    if variant == "crowns":
        base = published.folder(root, "neon/crowns", [f"crowns/{state}" for state in STATES], SOURCE)
        files = [(f"crowns/{s}/{p.name}", s) for s in STATES for p in sorted((base / "crowns" / s).glob("*.png"))]
        if not files:
            raise published.absent(base, "crowns/Alive/*.png", "neon/crowns", SOURCE)
        kept = points.held_out([_site(Path(name)) for name, _ in files], split, fold, folds, seed)
        files = [files[i] for i in kept]
    elif variant == "species":
        base, files = _species(root, split)
    else:
        base = published.folder(root, "neon/plot", ("hsi_plot",), SOURCE)
        return Plot(base, _first(base, "*image_crop_20*.tif"), _first(base, "*hyperspectral_20*.tif"), layers)
    return Crowns(base, variant, tuple(name for name, _ in files), tuple(name for _, name in files))


def _first(base: Path, pattern: str) -> str:
    found = sorted((base / "hsi_plot").glob(pattern))
    if not found:
        raise published.absent(base, f"hsi_plot/{pattern}", "neon/plot", SOURCE)
    return str(found[0].relative_to(base))


def _species(root: str | Path, split: str) -> tuple[Path, list[tuple[str, str]]]:
    """Files of the years of ``split`` with their species."""
    folder = "hsi_species_crops"
    listing = f"{folder}/annotations.csv"
    base = published.folder(root, "neon/species", (listing,), SOURCE)
    taxon = archives.table(base / listing, ("image_path", "taxonID")).set_index("image_path")["taxonID"]
    held = sorted((base / folder).glob("*.tif"))
    if not held:
        raise published.absent(base, f"{folder}/<tree>_<year>.tif", "neon/species", SOURCE)
    files = []
    for path in held:
        if split not in (points.EVERY, *(part for part, years in YEARS.items() if _year(path) in years)):
            continue
        if path.name not in taxon.index or taxon[path.name] not in SPECIES:
            raise ValueError(f"{base / listing} gives {path.name} none of the {len(SPECIES)} species")
        files.append((f"{folder}/{path.name}", str(taxon[path.name])))
    if not files:
        raise ValueError(f"{base / folder} has no crown of split={split!r}, the years {YEARS[split]}")
    return base, files


def _site(path: Path) -> str:
    match = _SITE.match(path.name)
    if match is None:
        raise ValueError(f"{path}: the name does not tell the site; expected [<year>_]<SITE>_...")
    return match["site"]


def _year(path: Path) -> int:
    match = _YEAR.search(path.name)
    if match is None:
        raise ValueError(f"{path}: the name does not tell the year; expected <tree>_<year>.tif")
    return int(match["year"])


def _spectra(path: Path, when: dates.Span) -> Raster:
    numbers, _ = arrays.tiff(path)
    sensor = sensors.get("neon-ais")
    if len(numbers) != len(sensor.bands):
        raise ValueError(f"{path} has {len(numbers)} bands, expected the {len(sensor.bands)} of neon-ais")
    numbers = np.where(np.abs(numbers) < 1e5, numbers, NODATA)
    raster = published.image(sensor, numbers, path, HSI_M)
    return replace(raster, time_s=torch.tensor([when], dtype=torch.float64))


def fake(folder: Path, *, places: int = 3, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement): ``places`` crowns of each state at five sites, five trees, a plot."""
    rng = np.random.default_rng(seed)
    for state in STATES:
        for i, site in enumerate(("OSBS", "WREF", "YELL", "HARV", "NIWO")):
            for number in range(places):
                values = rng.integers(0, 256, (3, *rng.integers(23, 60, 2)), dtype=np.uint8)
                name = f"{site}_00{i}_2019_{number}" if state == "Alive" else f"2018_{site}_2_4000_5000_image_{number}"
                archives.write_png(folder / "crowns" / state / f"{name}.png", values)
    lines = ["image_path,taxonID,tile_year"]
    for taxon in SPECIES[:5]:
        for year in (2017, 2018, 2019, 2021):
            name = f"OSBS_contrib.{SPECIES.index(taxon)}_{year}.tif"
            numbers = rng.integers(0, 5000, (369, *rng.integers(4, 8, 2))).astype(np.int16)
            arrays.write_tiff(folder / "hsi_species_crops" / name, numbers)
            lines.append(f"{name},{taxon},{year}")
    arrays.write_text(folder / "hsi_species_crops" / "annotations.csv", "\n".join([*lines, ""]))
    rgb = rng.integers(0, 256, (3, 60, 40), dtype=np.uint8)
    hsi = rng.integers(0, 5000, (369, 6, 4)).astype(np.float32)
    arrays.write_tiff(
        folder / "hsi_plot" / "HARV_image_crop_2018.tif",
        rgb,
        crs="EPSG:32618",
        corner=(726499.0, 4699073.0),
        gsd_m=RGB_M,
    )
    arrays.write_tiff(folder / "hsi_plot" / "HARV_image_crop_hyperspectral_2018.tif", hsi)
