"""SpaceNet 7: buildings of 60 growing places, 4.9 km each at the equator, in monthly mosaics of Planet over two years.

Van Etten et al. 2021 (CVPR, https://arxiv.org/abs/2102.04420). Images are for the eye, in 8 bits. Their pixels are of Web Mercator: 4.78 m at the equator,
2.7 m at 55 degrees. As in published work they are taken for squares of 4 m; the geobox of the place says where they lie, and ``gsd_m=None`` gives each
place its true size.

Layout, under ``root``; <month> is global_monthly_<year>_<month>_mosaic_<site>::

    train/<site>/images_masked/<month>.tif                       red, green, blue, alpha; 1024 x 1024, clouds are 0
    train/<site>/labels_match_pix/<month>_Buildings.geojson      outlines of buildings in pixels
    train/<site>/UDM_masks/<month>_UDM.tif                       of the months that have clouds
    test_public/<site>/images_masked/<month>.tif                 20 more places, without labels: the split ``public``

Only ``train`` has labels. ``train``, ``val`` and ``test`` are the places that Hafner et al. 2023 (doi:10.3390/rs15215135) and PANGAEA take, 30, 15 and 14.
One of ``train`` and one of ``val`` touch at a corner. Against the published loaders: outlines are read, so that no masks need to be made before;
clouds are invalid in image and label, where PANGAEA leaves out the whole month (``protocol="pangaea"``), and others take black for ground.

The names of folders and files are those that several readers agree on; bands, units and the meaning of the label are those of the real samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from odc.geo.geobox import GeoBox
from shapely.errors import GEOSException
from shapely.geometry import shape

from everysat import sensors
from everysat.data import bands, published
from everysat.io import arrays, dates, grid
from everysat.types import Batch, Place, Raster

LICENCE = "CC-BY-SA-4.0"
SOURCE = "https://spacenet.ai/sn7-challenge (s3://spacenet-dataset/spacenet/SN7_buildings)"
SPLITS = ("train", "val", "test", "public")
UNLABELLED = ("public",)
LAYERS = ("planet", "label")
VARIANTS = ("", "series")
PROTOCOLS = ("", "pangaea", "pangaea-within")
CLASSES = {0: "no building", 1: "building"}
GSD_M, PANGAEA_PX = 4.0, 256
SITES = {
    "train": (
        "0331E-1257N_1327_3160", "0358E-1220N_1433_3310", "0457E-1135N_1831_3648", "0487E-1246N_1950_3207", "0577E-1243N_2309_3217",
        "0586E-1127N_2345_3680", "0595E-1278N_2383_3079", "0632E-0892N_2528_4620", "0683E-1006N_2732_4164", "0924E-1108N_3699_3757",
        "1015E-1062N_4061_3941", "1138E-1216N_4553_3325", "1203E-1203N_4815_3378", "1204E-1202N_4816_3380", "1209E-1113N_4838_3737",
        "1210E-1025N_4840_4088", "1276E-1107N_5105_3761", "1298E-1322N_5193_2903", "1389E-1284N_5557_3054", "1438E-1134N_5753_3655",
        "1439E-1134N_5759_3655", "1481E-1119N_5927_3715", "1538E-1163N_6154_3539", "1615E-1206N_6460_3366", "1669E-1153N_6678_3579",
        "1669E-1160N_6679_3549", "1672E-1207N_6691_3363", "1703E-1219N_6813_3313", "1709E-1112N_6838_3742", "1716E-1211N_6864_3345",
    ),
    "val": (
        "0357E-1223N_1429_3296", "0361E-1300N_1446_2989", "0368E-1245N_1474_3210", "0566E-1185N_2265_3451", "0614E-0946N_2459_4406",
        "0760E-0887N_3041_4643", "1014E-1375N_4056_2688", "1049E-1370N_4196_2710", "1185E-0935N_4742_4450", "1289E-1169N_5156_3514",
        "1296E-1198N_5184_3399", "1615E-1205N_6460_3370", "1617E-1207N_6468_3360", "1669E-1160N_6678_3548", "1748E-1247N_6993_3202",
    ),
    "test": (
        "0387E-1276N_1549_3087", "0434E-1218N_1736_3318", "0506E-1204N_2027_3374", "0544E-1228N_2176_3279", "0977E-1187N_3911_3441",
        "1025E-1366N_4102_2726", "1172E-1306N_4688_2967", "1200E-0847N_4802_4803", "1204E-1204N_4819_3372", "1335E-1166N_5342_3524",
        "1479E-1101N_5916_3785", "1690E-1211N_6763_3346", "1691E-1211N_6764_3347", "1848E-0793N_7394_5018",
    ),
}  # fmt: skip
"""Places of each part, less ``L15-`` and ``_13``."""
_MONTH = re.compile(r"^global_monthly_(\d{4})_(\d{2})_mosaic_")


@dataclass(frozen=True)
class SpaceNet7:
    """See :func:`build`. ``items`` are the images that each item is of, one or all of a place; of its
    ``tiles`` x ``tiles`` tiles those that ``kept`` numbers, row by row, are places."""

    root: Path
    split: str
    items: tuple[tuple[str, ...], ...]
    tile_px: int | None
    tiles: int
    kept: tuple[int, ...]
    gsd_m: float | None

    def __len__(self) -> int:
        return len(self.items) * len(self.kept)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        number, tile = divmod(index, len(self.kept))
        corner = divmod(self.kept[tile], self.tiles)
        paths = [self.root / name for name in self.items[number]]
        read = [_image(path) for path in paths]
        for path, (numbers, _) in zip(paths, read, strict=True):
            if numbers.shape != read[0][0].shape:
                raise ValueError(f"{path} is {numbers.shape[1:]} pixels, {paths[0].name} is {read[0][0].shape[1:]}")
        numbers = np.stack([numbers for numbers, _ in read])
        seen = np.broadcast_to((numbers != 0).any(1, keepdims=True), (len(numbers), 3, *numbers.shape[2:]))
        seen = seen & (numbers[:, 3:] != 0) if numbers.shape[1] == 4 else seen.copy()
        geobox = read[0][1]
        gsd_m = self.gsd_m or (GSD_M if geobox is None else grid.gsd_m(geobox))
        time_s = torch.tensor([_month(path) for path in paths], dtype=torch.float64)
        sensor = sensors.get("planet-basemap")
        planet = bands.series(sensor, numbers[:, :3], time_s, paths[0], gsd_m, seen=torch.from_numpy(seen))
        layers = {"planet": self._cut(planet, corner)}
        if self.split not in UNLABELLED:
            layers["label"] = self._cut(_labels(paths, planet), corner)
        return Batch((self._place(geobox, planet, corner),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _cut(self, raster: Raster, corner: tuple[int, int]) -> Raster:
        """The tile at a row and column of tiles; what is beyond the image is not there."""
        if self.tile_px is None:
            return raster
        rows, columns = (slice(at * self.tile_px, (at + 1) * self.tile_px) for at in corner)
        cut = (..., rows, columns)
        part = replace(raster, values=raster.values[cut].clone(), valid=raster.valid[cut].clone())
        return part._padded(self.tile_px, self.tile_px)

    def _place(self, geobox: GeoBox | None, planet: Raster, corner: tuple[int, int]) -> Place:
        height, width = (self.tile_px or n for n in planet.values.shape[2:])
        if geobox is not None and self.tile_px is not None:
            rows, columns = (slice(at * self.tile_px, (at + 1) * self.tile_px) for at in corner)
            geobox = grid.crop(geobox, rows, columns)
        size = height * planet.gsd_m, width * planet.gsd_m
        if geobox is None:
            return Place(*size)
        lon, lat = grid.to_lonlat(geobox, width / 2, height / 2)
        return Place(*size, geobox, (float(lon), float(lat)))


def _image(path: Path) -> tuple[np.ndarray, GeoBox | None]:
    numbers, geobox = arrays.tiff(path)
    if len(numbers) not in (3, 4) or numbers.dtype != np.uint8:
        raise ValueError(
            f"{path} holds {len(numbers)} bands of {numbers.dtype}, expected red, green, blue and alpha in uint8"
        )
    return numbers, geobox


def _month(path: Path) -> dates.Span:
    match = _MONTH.match(path.name)
    if match is None:
        raise ValueError(
            f"{path}: its name is not global_monthly_<year>_<month>_mosaic_<site>.tif, so its month is unknown"
        )
    return dates.span(f"{match[1]}-{match[2]}")


def _labels(paths: Sequence[Path], planet: Raster) -> Raster:
    """Where buildings are in each of the images, which are in the order of time."""
    size = planet.values.shape[2:]
    codes = np.stack([_buildings(path, (size[0], size[1])) for path in paths])
    maps = [
        published.class_map("spacenet7-buildings", code, CLASSES, planet.gsd_m, SOURCE, path)
        for code, path in zip(codes, paths, strict=True)
    ]
    values = torch.cat([label.values for label in maps])
    return replace(planet, sensor=maps[0].sensor, values=values, valid=planet.valid.any(1, keepdim=True))


def _buildings(image: Path, size: tuple[int, int]) -> np.ndarray:
    path = image.parent.parent / "labels_match_pix" / f"{image.stem}_Buildings.geojson"
    content = arrays.parsed(path)
    try:
        outlines = [shape(feature["geometry"]) for feature in content["features"] if feature.get("geometry")]
    except (KeyError, TypeError, ValueError, GEOSException) as error:
        raise ValueError(f"{path} is no collection of outlines ({error})") from error
    drawn = np.array([outline for outline in outlines if not outline.is_empty], dtype=object)
    if not len(drawn):
        return np.zeros(size, np.uint8)
    west, south, east, north = shapely.total_bounds(drawn)
    if min(west, south) < -2 or east > size[1] + 2 or north > size[0] + 2:
        raise ValueError(
            f"{path}: outlines reach from {west:.1f}, {south:.1f} to {east:.1f}, {north:.1f}, expected pixels of an image of {size}. "
            "The folder labels_match holds degrees; labels_match_pix is the right one"
        )
    return _covered(drawn, size)


def _covered(outlines: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """1 where the centre of a pixel is inside of an outline. Agrees with rasterio.features.rasterize, which for thousands of small
    outlines takes three times as long, and warns of a missing georeference when it runs in threads."""
    bounds = shapely.bounds(outlines)
    first = np.clip(np.ceil(bounds[:, :2] - 0.5).astype(int), 0, size[::-1])
    last = np.clip(np.floor(bounds[:, 2:] - 0.5).astype(int) + 1, 0, size[::-1])
    wide, high = np.maximum(last - first, 0).T
    owner = np.repeat(np.arange(len(outlines)), wide * high)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(wide * high) - wide * high, wide * high)
    columns, rows = first[owner, 0] + step % wide[owner], first[owner, 1] + step // wide[owner]
    shapely.prepare(outlines)
    inside = shapely.contains_xy(outlines[owner], columns + 0.5, rows + 0.5)
    covered = np.zeros(size, np.uint8)
    covered[rows[inside], columns[inside]] = 1
    return covered


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    tile_px: int | None = None,
    cloudy: bool = True,
    gsd_m: float | None = GSD_M,
    protocol: str = "",
) -> SpaceNet7:
    """Places of SpaceNet 7: the layer ``planet`` (red, green, blue, digital numbers) and where buildings are.

    Args:
        variant: ``""`` for a month of a place an item, ``"series"`` for all months of a place, each with its label.
        root: the folder that holds ``train`` and, for the split ``public``, ``test_public``.
        tile_px: side of tiles that images are cut into; PANGAEA takes 256. Whole images by default.
        cloudy: without, months that have a mask of clouds are left out.
        gsd_m: what a pixel is taken for; None for its true size, in which places cannot be joined to batches.
        protocol: ``pangaea`` is PANGAEA's evaluation: tiles of 256 pixels (unless ``tile_px`` says other) of the months without clouds.
            ``pangaea-within`` is the one that it offers beside: of all 59 places the upper three quarters of each image are ``train``, the rest is
            ``val`` in the west and ``test`` in the east.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    published.one_of(variant, VARIANTS, "variant")
    published.one_of(split, SPLITS, "split")
    published.layers_of(modalities, LAYERS[:1], LAYERS[:1])
    within = published.one_of(protocol, PROTOCOLS, "protocol") == "pangaea-within"
    if protocol:
        published.one_of(split, SPLITS[:3], "split")
        tile_px, cloudy = tile_px or PANGAEA_PX, False
    folder = "test_public" if split == "public" else "train"
    base = published.folder(root, "SpaceNet 7", (folder,), SOURCE)
    named = [f"L15-{site}_13" for site in (sum(SITES.values(), ()) if within else SITES.get(split, ()))]
    sites = named or sorted(path.name for path in (base / folder).iterdir() if path.is_dir())
    items: list[tuple[str, ...]] = []
    for site in sites:
        images = sorted((base / folder / site / "images_masked").glob("*.tif"), key=_month)
        if not images:
            raise published.absent(base, f"{folder}/{site}/images_masked/*.tif", "SpaceNet 7", SOURCE)
        names = [str(path.relative_to(base)) for path in images if cloudy or not _has_mask(path)]
        items += [tuple(names)] * bool(names) if variant == "series" else [(name,) for name in names]
    if not items:
        raise published.absent(base, f"{folder}/<site>/images_masked", "SpaceNet 7", SOURCE)
    tiles = 1 if tile_px is None else _tiles(base / items[0][0], tile_px)
    kept = tuple(n for n in range(tiles**2) if not within or _part_of_image(*divmod(n, tiles), tiles) == split)
    return SpaceNet7(base, split, tuple(items), tile_px, tiles, kept, gsd_m)


def _part_of_image(row: int, column: int, tiles: int) -> str:
    """The part that a tile belongs to where each image is divided among all."""
    if tiles % 4:
        raise ValueError(f"an image of {tiles} x {tiles} tiles cannot be divided into quarters; take a smaller tile_px")
    return "train" if 4 * row < 3 * tiles else "val" if 2 * column < tiles else "test"


def _has_mask(image: Path) -> bool:
    return (image.parent.parent / "UDM_masks" / f"{image.stem}_UDM.tif").is_file()


def _tiles(path: Path, tile_px: int) -> int:
    side = max(arrays.tiff(path)[0].shape[1:])
    if tile_px < 1 or side % tile_px:
        raise ValueError(f"tile_px={tile_px} must divide {side}, the side of an image in pixels")
    return side // tile_px


def fake(folder: Path, *, side_px: int = 32, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement): all places, two months of the first of each part."""
    rng = np.random.default_rng(seed)
    parts = {**SITES, "public": ("0369E-1244N_1479_3214",)}
    for part, sites in parts.items():
        for i, site in enumerate(sites):
            base = folder / ("test_public" if part == "public" else "train") / f"L15-{site}_13"
            for month in range(1, 3 if i == 0 else 2):
                _fake_month(
                    base,
                    f"global_monthly_2018_{month:02d}_mosaic_{base.name}",
                    side_px,
                    part != "public",
                    month == 2,
                    rng,
                )


def _fake_month(base: Path, name: str, side: int, labelled: bool, cloudy: bool, rng: np.random.Generator) -> None:
    column, row = (int(n) for n in base.name.split("_")[1:3])
    tile_m = 2 * 20037508.342789244 / 2**13
    place: dict[str, Any] = {"crs": "EPSG:3857", "gsd_m": tile_m / 1024}
    place["corner"] = (column - 2**12) * tile_m, (2**12 - row) * tile_m
    numbers = rng.integers(1, 256, (4, side, side)).astype(np.uint8)
    numbers[3] = 255
    if cloudy:
        numbers[:, :2] = 0
        mask = np.zeros((1, side, side), np.uint8)
        mask[:, :2] = 255
        arrays.write_tiff(base / "UDM_masks" / f"{name}_UDM.tif", mask, **place)
    arrays.write_tiff(base / "images_masked" / f"{name}.tif", numbers, **place)
    if labelled:
        west, north = rng.integers(0, side - 4, 2).tolist()
        ring = [[west, north], [west + 3, north], [west + 3, north + 2], [west, north + 2], [west, north]]
        outline = {"type": "Feature", "properties": {"Id": 1}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
        path = base / "labels_match_pix" / f"{name}_Buildings.geojson"
        arrays.write_json(path, {"type": "FeatureCollection", "features": [outline]})
