"""What lies in a place, as a picture from above can show it: kinds of things by their tags, their number, area, length, position and neighbours.

The table of kinds is a choice of tags of OpenStreetMap (https://wiki.openstreetmap.org/wiki/Map_features) that name what can be seen: "groundable" ones, as
SkyScript (Wang et al. 2024, doi:10.1609/aaai.v38i6.28393) calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import shapely

from everysat.types import Place, Raster, Vector

NEAR_M = 30.0
"""Things that are at most so far apart are next to each other."""
SECTORS = ("east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east")
SHAPES = ("area", "line", "spot")


@dataclass(frozen=True)
class Kind:
    """A sort of things: its ``tags`` (``key=value``, ``key=*``), name for one and for several; ``shape``: of :data:`SHAPES`; ``cover``: whether it
    covers ground as land use or land cover does, so that one speaks of its share, and ``urban`` what that says (1 built, 0 open, None neither)."""

    name: str
    many: str
    shape: str
    tags: tuple[str, ...]
    cover: bool = False
    urban: float | None = None
    mass: bool = False

    @property
    def one(self) -> str:
        """With its article: "a lake", or "forest" of what is not counted."""
        return self.name if self.mass else f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


def _kind(name: str, many: str, shape: str, tags: str, **more: Any) -> Kind:
    return Kind(name, many, shape, tuple(tags.split()), mass=many == "", **more)


KINDS: tuple[Kind, ...] = (
    _kind("forest", "", "area", "landuse=forest natural=wood", cover=True, urban=0.0),
    _kind("farmland", "", "area", "landuse=farmland landuse=farm", cover=True, urban=0.0),
    _kind("grassland", "", "area", "landuse=grass landuse=meadow natural=grassland natural=heath", cover=True, urban=0.0),
    _kind("scrub", "", "area", "natural=scrub", cover=True, urban=0.0),
    _kind("wetland", "", "area", "natural=wetland", cover=True, urban=0.0),
    _kind("bare rock", "", "area", "natural=bare_rock natural=scree", cover=True, urban=0.0),
    _kind("sand", "", "area", "natural=sand natural=dune", cover=True, urban=0.0),
    _kind("water", "", "area", "natural=water water=* waterway=riverbank landuse=reservoir landuse=basin", cover=True, urban=0.0),
    _kind("residential land", "", "area", "landuse=residential", cover=True, urban=1.0),
    _kind("industrial land", "", "area", "landuse=industrial", cover=True, urban=1.0),
    _kind("commercial land", "", "area", "landuse=commercial landuse=retail", cover=True, urban=1.0),
    _kind("orchard", "orchards", "area", "landuse=orchard", cover=True, urban=0.0),
    _kind("vineyard", "vineyards", "area", "landuse=vineyard", cover=True, urban=0.0),
    _kind("quarry", "quarries", "area", "landuse=quarry", cover=True, urban=0.0),
    _kind("construction site", "construction sites", "area", "landuse=construction"),
    _kind("landfill", "landfills", "area", "landuse=landfill"),
    _kind("cemetery", "cemeteries", "area", "landuse=cemetery amenity=grave_yard"),
    _kind("allotment garden", "allotment gardens", "area", "landuse=allotments"),
    _kind("greenhouse", "greenhouses", "area", "building=greenhouse landuse=greenhouse_horticulture"),
    _kind("lake", "lakes", "area", "water=lake"),
    _kind("pond", "ponds", "area", "water=pond"),
    _kind("reservoir", "reservoirs", "area", "water=reservoir landuse=reservoir"),
    _kind("beach", "beaches", "area", "natural=beach"),
    _kind("glacier", "glaciers", "area", "natural=glacier", cover=True, urban=0.0),
    _kind("park", "parks", "area", "leisure=park", cover=True),
    _kind("golf course", "golf courses", "area", "leisure=golf_course", cover=True, urban=0.0),
    _kind("sports pitch", "sports pitches", "area", "leisure=pitch"),
    _kind("running track", "running tracks", "line", "leisure=track"),
    _kind("stadium", "stadiums", "area", "leisure=stadium building=stadium"),
    _kind("swimming pool", "swimming pools", "area", "leisure=swimming_pool"),
    _kind("playground", "playgrounds", "area", "leisure=playground"),
    _kind("marina", "marinas", "area", "leisure=marina"),
    _kind("harbour", "harbours", "area", "landuse=harbour harbour=* landuse=port industrial=port"),
    _kind("school", "schools", "area", "amenity=school building=school"),
    _kind("hospital", "hospitals", "area", "amenity=hospital building=hospital"),
    _kind("place of worship", "places of worship", "area", "amenity=place_of_worship building=church building=mosque building=temple building=cathedral"),
    _kind("car park", "car parks", "area", "amenity=parking"),
    _kind("fuel station", "fuel stations", "area", "amenity=fuel"),
    _kind("building", "buildings", "area", "building=*", urban=1.0),
    _kind("river", "rivers", "line", "waterway=river water=river"),
    _kind("canal", "canals", "line", "waterway=canal water=canal"),
    _kind("stream", "streams", "line", "waterway=stream waterway=ditch"),
    _kind("dam", "dams", "line", "waterway=dam man_made=dam"),
    _kind("bridge", "bridges", "line", "man_made=bridge"),
    _kind("motorway", "motorways", "line", "highway=motorway highway=trunk"),
    _kind("main road", "main roads", "line", "highway=primary highway=secondary"),
    _kind("road", "roads", "line", "highway=primary highway=secondary highway=tertiary highway=residential highway=unclassified highway=motorway highway=trunk"),
    _kind("track", "tracks", "line", "highway=track"),
    _kind("railway", "railways", "line", "railway=rail railway=light_rail railway=narrow_gauge"),
    _kind("tram line", "tram lines", "line", "railway=tram"),
    _kind("runway", "runways", "line", "aeroway=runway"),
    _kind("airfield", "airfields", "area", "aeroway=aerodrome"),
    _kind("pier", "piers", "line", "man_made=pier"),
    _kind("power line", "power lines", "line", "power=line"),
    _kind("power plant", "power plants", "area", "power=plant"),
    _kind("substation", "substations", "area", "power=substation"),
    _kind("solar farm", "solar farms", "area", "plant:source=solar generator:source=solar"),
    _kind("wind turbine", "wind turbines", "spot", "generator:source=wind"),
    _kind("storage tank", "storage tanks", "area", "man_made=storage_tank building=storage_tank"),
    _kind("silo", "silos", "area", "man_made=silo building=silo"),
    _kind("tower", "towers", "spot", "man_made=tower man_made=mast man_made=water_tower man_made=chimney"),
    _kind("wastewater plant", "wastewater plants", "area", "man_made=wastewater_plant"),
    _kind("castle", "castles", "area", "historic=castle"),
    _kind("camp site", "camp sites", "area", "tourism=camp_site"),
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
COVERS = tuple(kind for kind in KINDS if kind.cover)
_BY_TAG: dict[str, tuple[Kind, ...]] = {
    tag: tuple(kind for kind in KINDS if tag in kind.tags)
    for tag in dict.fromkeys(t for kind in KINDS for t in kind.tags)
}
KEY_OF_VALUE = {tag.partition("=")[2]: tag.partition("=")[0] for tag in reversed(_BY_TAG) if not tag.endswith("*")}
"""The key that a value belongs to, for tables that have values alone."""


def kinds_of(tags: Mapping[str, Any]) -> tuple[Kind, ...]:
    """All kinds that a thing with these tags is of, in the order of :data:`KINDS`; none for what cannot be seen from above."""
    told = [(key, str(value)) for key, value in tags.items() if str(value) != "no"]
    found = {
        kind.name for key, value in told for tag in (f"{key}={value}", f"{key}=*") for kind in _BY_TAG.get(tag, ())
    }
    if tags.get("location") == "underground" or tags.get("tunnel") not in (None, "no", "building_passage"):
        return ()
    if found & {"lake", "pond", "reservoir"} or tags.get("water") in ("river", "canal"):
        found.add("water")
    return tuple(kind for kind in KINDS if kind.name in found)


@dataclass(frozen=True)
class Thing:
    """A geometry within the place, metres from its north-west corner, and what it is."""

    shape: Any
    kinds: tuple[Kind, ...]
    tags: Mapping[str, Any]


class Inventory:
    """Things in a rectangle of ``height_m`` x ``width_m``, geometries cut at its edge.

    Args:
        place: its size counts, and that alone.
        things: a :class:`Vector` layer of one place, with tags as attributes.
        smallest_m: what is smaller than this across (areas) or along (lines) is left out, as pixels of half of this do not show it; spots are kept
            when it is at most 5 m.
    """

    def __init__(self, place: Place, things: Vector, *, smallest_m: float = 0.0) -> None:
        self.height_m, self.width_m = place.height_m, place.width_m
        self.area_m2 = self.height_m * self.width_m
        self.smallest_m = smallest_m
        self.things = tuple(self._things(things))

    def _things(self, given: Vector) -> list[Thing]:
        if len(given.row) and int(given.row.max()) > 0:
            raise ValueError("things are of several places; take one, as batch[i].layers[...] does")
        kinds = [kinds_of(tags) for tags in given.attributes]
        told = [i for i, some in enumerate(kinds) if some]
        shapes = np.array([given.geometry[i] for i in told], dtype=object)
        if not len(shapes):
            return []
        bad = ~shapely.is_valid(shapes)
        shapes[bad] = shapely.make_valid(shapes[bad])
        cut = shapely.intersection(shapes, shapely.box(0, 0, self.width_m, self.height_m))
        return [
            Thing(shape, some, given.attributes[i])
            for i, shape in zip(told, cut, strict=True)
            if (some := tuple(kind for kind in kinds[i] if self._shows(shape, kind)))
        ]

    def _shows(self, shape: Any, kind: Kind) -> bool:
        """Whether the geometry fits the kind (a node in a lake is no lake) and is large enough."""
        if kind.shape == "area":
            return shape.area > 0 and shape.area >= self.smallest_m**2
        if kind.shape == "line":
            return max(shape.length, shape.area**0.5) > max(self.smallest_m, 0)
        return not shape.is_empty and self.smallest_m <= 5

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What is there, in the order of the table."""
        there = {kind.name for thing in self.things for kind in thing.kinds}
        return tuple(kind for kind in KINDS if kind.name in there)

    def shapes(self, kind: Kind) -> list[Any]:
        return [thing.shape for thing in self.things if kind in thing.kinds]

    def count(self, kind: Kind) -> int:
        """How many there are: buildings by their footprints, other areas and lines after those that touch were joined."""
        shapes = self.shapes(kind)
        if kind.name == "building" or kind.shape == "spot":
            return len(shapes)
        return len(_islands(self.union(kind)))

    def union(self, kind: Kind) -> Any:
        """Everything of a kind as one geometry."""
        cache = self.__dict__.setdefault("_unions", {})
        if kind.name not in cache:
            cache[kind.name] = shapely.union_all(self.shapes(kind))
        return cache[kind.name]

    def covered_m2(self, kind: Kind) -> float:
        """Ground that a kind covers; what lies twice counts once."""
        return float(self.union(kind).area)

    def share(self, kind: Kind) -> float:
        return self.covered_m2(kind) / self.area_m2

    def length_m(self, kind: Kind) -> float:
        return float(sum(shape.length for shape in self.shapes(kind) if shape.area == 0))

    def distance_m(self, a: Kind, b: Kind) -> float:
        """Between the nearest of each; infinite if one is not there."""
        return float(shapely.distance(self.union(a), self.union(b))) if a in self.kinds and b in self.kinds else np.inf

    def inside(self, a: Kind, b: Kind) -> float:
        """Share of the ground of ``a`` that is ground of ``b`` too; 0 for lines."""
        own = self.covered_m2(a)
        return float(shapely.intersection(self.union(a), self.union(b)).area) / own if own else 0.0

    def sector(self, kind: Kind) -> str:
        """Where in the place a kind lies: a direction, "centre", or empty when it lies all over it."""
        centre = self.union(kind).centroid
        x, y = centre.x / self.width_m - 0.5, centre.y / self.height_m - 0.5
        low_x, low_y, high_x, high_y = self.union(kind).bounds
        if high_x - low_x > 0.6 * self.width_m or high_y - low_y > 0.6 * self.height_m:
            return ""
        return sector(x, y)

    def crosses(self, kind: Kind) -> bool:
        """Whether a line of a kind goes from one edge of the place to another."""
        for part in _islands(self.union(kind)):
            low_x, low_y, high_x, high_y = part.bounds
            touched = (low_x < 1e-3, low_y < 1e-3, high_x > self.width_m - 1e-3, high_y > self.height_m - 1e-3)
            if sum(touched) >= 2:
                return True
        return False

    @property
    def built(self) -> float:
        """Share of ground under buildings and land that is built on, at most 1."""
        shapes = [thing.shape for thing in self.things if any(kind.urban == 1.0 for kind in thing.kinds)]
        return float(shapely.union_all(shapes).area) / self.area_m2

    @property
    def main_cover(self) -> tuple[Kind, float] | None:
        """The kind that covers most ground, and its share."""
        shares = [(kind, self.share(kind)) for kind in COVERS if kind in self.kinds]
        return max(shares, key=lambda pair: pair[1]) if shares else None


def sector(x: float, y: float) -> str:
    """The direction of a point from the centre, ``x`` east and ``y`` south in -0.5 to 0.5."""
    if max(abs(x), abs(y)) < 1 / 6:
        return "centre"
    return SECTORS[round(np.arctan2(y, x) / (np.pi / 4)) % 8]


def _islands(shape: Any) -> list[Any]:
    """Connected parts: lines that touch are one."""
    if shape.is_empty:
        return []
    return list(shapely.get_parts(shape.buffer(0.5) if shape.area == 0 else shape.buffer(0.01)))


@dataclass(frozen=True)
class Shares:
    """What a raster of classes shows: ``names`` of the classes that occur, the share of the valid pixels and the sector of each, largest share first."""

    names: tuple[str, ...]
    share: tuple[float, ...]
    sector: tuple[str, ...]
    borders: tuple[tuple[str, str], ...]


def shares(raster: Raster, names: Mapping[int, str] | None = None) -> Shares:
    """Shares of classes of the first observation of a raster [obs, 1, y, x]; ``names`` by code, by default those of its band.

    Raises:
        ValueError: no names of classes, several bands, or a code without a name.
    """
    band = raster.sensor.bands[0]
    known = dict(names if names is not None else band.classes or {})
    if not known or len(raster.sensor.bands) != 1:
        raise ValueError(
            f"raster {raster.sensor.name} is no map of classes with names; give names={{code: name}} of a raster of one band"
        )
    code, valid = raster.values[0, 0].numpy().round().astype(int), raster.valid[0, 0].numpy()
    present, number = np.unique(code[valid], return_counts=True)
    if unknown := [int(c) for c in present if int(c) not in known]:
        raise ValueError(
            f"raster {raster.sensor.name} holds the codes {unknown}, which have no name; names has {sorted(known)}"
        )
    order = np.argsort(-number, kind="stable")
    rows = [
        (known[int(present[i])], number[i] / number.sum(), _pixel_sector((code == present[i]) & valid)) for i in order
    ]
    names_, share, where = (tuple(row[i] for row in rows) for i in range(3))
    return Shares(names_, tuple(map(float, share)), where, _borders(code, valid, known))


def _pixel_sector(mask: np.ndarray) -> str:
    y, x = np.nonzero(mask)
    spread = max((np.ptp(v) + 1) / n for v, n in zip((y, x), mask.shape, strict=True))
    return (
        "" if spread > 0.6 else sector((x.mean() + 0.5) / mask.shape[1] - 0.5, (y.mean() + 0.5) / mask.shape[0] - 0.5)
    )


def _borders(code: np.ndarray, valid: np.ndarray, names: Mapping[int, str]) -> tuple[tuple[str, str], ...]:
    """Pairs of classes with a side in common, the longest border first."""
    found: dict[tuple[str, str], int] = {}
    for a, b, seen in (
        (code[1:], code[:-1], valid[1:] & valid[:-1]),
        (code[:, 1:], code[:, :-1], valid[:, 1:] & valid[:, :-1]),
    ):
        differ = seen & (a != b)
        for pair, n in zip(
            *np.unique(np.sort(np.stack([a[differ], b[differ]], 1), axis=1), axis=0, return_counts=True), strict=True
        ):
            key = (names[int(pair[0])], names[int(pair[1])])
            found[key] = found.get(key, 0) + int(n)
    return tuple(sorted(found, key=lambda pair: (-found[pair], pair)))
