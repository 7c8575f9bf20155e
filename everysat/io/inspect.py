"""What is in files, and whether it fits a model: bands, grids, dates, no-data, values in the file and in physical units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from everysat.io import dates, grid
from everysat.io.assign import Found, Wanted, assign
from everysat.io.calibration import calibration
from everysat.io.plan import contract_sensors, native_gsd
from everysat.io.plane import Plane
from everysat.io.sources import open_planes
from everysat.sensors import Sensor
from everysat.types import ContractError, Input

_PIXELS = 512
"""Rows and columns that are looked at: larger planes are read decimated."""
_BARS = " ▁▂▃▄▅▆▇█"
_FAR = 4.0
_ROWS = 60


@dataclass(frozen=True)
class Values:
    """Distribution of valid values: percentiles 0, 2, 50, 98, 100, mean, std, and a histogram of 12 bins between the 2nd and
    98th percentile."""

    percentiles: tuple[float, float, float, float, float]
    mean: float
    std: float
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, values: np.ndarray) -> Values | None:
        if values.size == 0:
            return None
        values = values.astype(np.float64)
        marks = tuple(float(v) for v in np.percentile(values, (0, 2, 50, 98, 100)))
        low, high = marks[1], marks[3] if marks[3] > marks[1] else marks[1] + 1
        counts, _ = np.histogram(np.clip(values, low, high), bins=12, range=(low, high))
        return cls(marks, float(values.mean()), float(values.std()), tuple(int(c) for c in counts))  # type: ignore[arg-type]

    def bars(self) -> str:
        most = max(self.histogram)
        return "".join(_BARS[math.ceil(8 * count / most)] for count in self.histogram)


@dataclass(frozen=True)
class BandReport:
    """One band of one file at one time. ``sensor`` and ``band`` are None when they cannot be told."""

    file: str
    label: str
    sensor: str | None
    band: str | None
    unit: str | None
    crs: str
    shape: tuple[int, int]
    gsd_m: float
    extent_lonlat: tuple[float, float, float, float]
    date: str
    dtype: str
    nodata: float | None
    missing_share: float | None
    digital: Values | None
    physical: Values | None


@dataclass(frozen=True)
class Report:
    """What :func:`inspect` found. ``problems`` say what does not fit and how to go on; empty when all is well."""

    bands: tuple[BandReport, ...]
    problems: tuple[str, ...]
    contract: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers, strings, lists and dicts, for JSON; what is not finite becomes None."""
        return {"fits": self.fits, **_plain(asdict(self))}

    def __rich__(self) -> Group:
        return Group(_grids(self.bands), _values(self.bands), *_verdict(self))


def inspect(
    files: Any,
    contract: Mapping[str, Input] | Input | None = None,
    *,
    sensor: Wanted = None,
    order: Sequence[str] | None = None,
    stored: str = "auto",
    processing_baseline: str | None = None,
    crs: Any = None,
    nodata: float | None = None,
) -> Report:
    """Look into files, large ones decimated, and compare with the band contract of a model (``encoder.inputs``).

    What cannot be read or told is a problem in the report, not an error. The other arguments are as in :func:`everysat.read`.
    """
    single = isinstance(files, (str, PurePath)) or hasattr(files, "dims")
    inputs = {"input": contract} if isinstance(contract, Input) else dict(contract or {})
    among = contract_sensors(inputs)
    bands: list[BandReport] = []
    problems: list[str] = []
    found: list[Found] = []
    for file in [files] if single else list(files):
        try:
            planes = open_planes(file, crs)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        known = _known(planes, sensor, among, order, problems)
        found += known.values()
        for index, plane in enumerate(planes):
            match = known.get(index)
            bands.append(_look(plane, match, stored, processing_baseline, nodata, problems))
    if inputs and bands:
        problems += _against(inputs, bands, found)
    return Report(tuple(bands), tuple(dict.fromkeys(problems)), tuple(inputs))


def _known(
    planes: list[Plane], sensor: Wanted, among: list[Sensor], order: Sequence[str] | None, problems: list[str]
) -> dict[int, Found]:
    """What each plane is, by its position; planes that are no band are missing."""
    try:
        found = assign(planes, sensor, among, order)
    except (LookupError, ValueError) as error:
        problems.append(str(error).strip('"'))
        return {}
    spots = {_identity(plane): index for index, plane in enumerate(planes)}
    return {spots[_identity(f.plane)]: f for f in found}


def _identity(plane: Plane) -> Any:
    where = plane.pixels
    return (where.index, getattr(where, "variable", ""))


def _look(
    plane: Plane, found: Found | None, stored: str, baseline: str | None, nodata: float | None, problems: list[str]
) -> BandReport:
    shape = (min(_PIXELS, plane.shape[0]), min(_PIXELS, plane.shape[1]))
    digital = physical = missing = None
    convert = None
    if found is not None:
        try:
            convert = calibration(found.plane, found.sensor, found.band, stored, baseline)
        except ContractError as error:
            problems.append(str(error))
    try:
        numbers, valid = plane.read(shape=shape)
        absent = nodata if nodata is not None else (convert.nodata if convert else None)
        valid = valid if absent is None else valid & (numbers != absent)
        missing = float(1 - valid.mean())
        digital = Values.of(numbers[valid])
        if convert is not None:
            physical = Values.of(numbers[valid] * convert.scale + convert.offset)
            convert(numbers, valid)
    except (OSError, ContractError) as error:
        problems.append(str(error))
    if missing == 1.0:
        problems.append(f"{plane.name} has no valid pixel (no-data {plane.nodata}); leave this file out")
    h, w = plane.shape
    lon, lat = grid.to_lonlat(plane.geobox, [0, w, w, 0], [0, 0, h, h])
    return BandReport(
        plane.source, plane.label, found.sensor.name if found else None, found.band.name if found else None,
        found.band.unit if found else None, str(plane.geobox.crs), plane.shape,
        native_gsd(found) if found else grid.gsd_m(plane.geobox),
        tuple(round(float(v), 6) for v in (lon.min(), lat.min(), lon.max(), lat.max())),  # type: ignore[arg-type]
        "undated" if plane.time is None else dates.label(plane.time), plane.dtype, plane.nodata, missing, digital, physical,
    )  # fmt: skip


def _against(inputs: Mapping[str, Input], bands: list[BandReport], found: list[Found]) -> list[str]:
    problems: list[str] = []
    taken = 0
    for name, wanted in inputs.items():
        mine = [b for b in bands if b.sensor == wanted.sensor.name]
        if not mine:
            continue
        here = {b.band for b in mine}
        absent = [band for band in wanted.sensor.names if band not in here]
        if absent:
            problems.append(
                f"layer {name!r}: {', '.join(absent)} of {wanted.sensor.name} missing; the model takes {', '.join(wanted.sensor.names)}. "
                "Add their files, or leave the layer out"
            )
        taken += not absent
        for band in mine:
            problems += _band_against(name, wanted, band)
        if wanted.dated and any(b.date == "undated" for b in mine):
            problems.append(f"layer {name!r} is a series and some files have no date; give times=[...] when reading")
    if not any(b.sensor == i.sensor.name for b in bands for i in inputs.values()):
        holds = ", ".join(dict.fromkeys(str(b.sensor) for b in bands if b.sensor)) or "no sensor that could be told"
        problems.append(
            f"the files hold {holds}; the model takes {', '.join(dict.fromkeys(i.sensor.name for i in inputs.values()))}"
        )
    return problems


def _band_against(name: str, wanted: Input, band: BandReport) -> list[str]:
    if band.band not in wanted.sensor.names:
        return []
    index = wanted.sensor.names.index(band.band)
    where = f"layer {name!r}, {PurePath(band.file).name} band {band.band}"
    problems = []
    unit = wanted.sensor.bands[index].unit
    if band.unit != unit:
        problems.append(
            f"{where}: is in {band.unit}, the model takes {unit}; read it with the sensor table that fits, or convert the file"
        )
    if abs(band.gsd_m / wanted.gsd_m - 1) > 1e-3 and max(band.gsd_m / wanted.gsd_m, wanted.gsd_m / band.gsd_m) > 6.5:
        problems.append(
            f"{where}: pixels of {band.gsd_m:g} m are far from the {wanted.gsd_m:g} m of the model; resampling will not make detail"
        )
    if band.physical is not None:
        middle, mean, std = band.physical.percentiles[2], wanted.mean[index], wanted.std[index]
        away = (middle - mean) / std
        if abs(away) > _FAR:
            problems.append(
                f"{where}: the median {middle:.4g} is {abs(away):.1f} standard deviations {'above' if away > 0 else 'below'} the mean of the model's "
                f"training data ({mean:.4g} +- {std:.4g}); check scale, processing baseline and no-data"
            )
    return problems


def _grids(bands: Sequence[BandReport]) -> Table:
    """One row for bands of one sensor on one grid, whatever the number of files."""
    table = Table(title="Files", title_justify="left")
    for column in ("files", "sensor", "bands", "grid", "GSD m", "dates", "type"):
        table.add_column(column, justify="right" if column == "GSD m" else "left", overflow="fold")
    groups: dict[Any, list[BandReport]] = {}
    for band in bands:
        groups.setdefault((band.sensor, band.shape, band.crs, band.gsd_m, band.dtype), []).append(band)
    for (sensor, shape, crs, gsd, dtype), members in groups.items():
        files = _listed([PurePath(b.file).name for b in members], 1)
        names = _listed([b.band or b.label or "?" for b in members], 14)
        when = sorted({b.date for b in members})
        span = when[0] if len(when) == 1 else f"{when[0]} to {when[-1]} ({len(when)})"
        table.add_row(files, sensor or "?", names, f"{shape[0]} x {shape[1]} {crs}", f"{gsd:g}", span, dtype)
    return table


def _listed(names: list[str], most: int) -> str:
    different = list(dict.fromkeys(names))
    more = len(different) - most
    return ", ".join(different[:most]) + (f" and {more} more" if more > 0 else "")


def _values(bands: Sequence[BandReport]) -> Table:
    table = Table(title="Values: 2 %, median, 98 %", title_justify="left")
    for column in ("band", "date", "no data", "in the file", "physical", "histogram"):
        table.add_column(column, justify="right" if column == "no data" else "left", overflow="fold")
    for band in bands[:_ROWS]:
        share = "?" if band.missing_share is None else f"{100 * band.missing_share:.1f} %"
        physical = f"{_three(band.physical)} {band.unit}" if band.physical else "?"
        histogram = band.digital.bars() if band.digital else ""
        table.add_row(band.band or band.label or "?", band.date, share, _three(band.digital), physical, histogram)
    if len(bands) > _ROWS:
        table.add_row(f"and {len(bands) - _ROWS} more")
    return table


def _three(values: Values | None) -> str:
    return "" if values is None else ", ".join(f"{v:.4g}" for v in values.percentiles[1:4])


def _verdict(report: Report) -> list[Text]:
    if report.problems:
        return [Text("What does not fit", style="bold red"), *(Text(f"- {problem}") for problem in report.problems)]
    against = f" the contract ({', '.join(report.contract)})" if report.contract else ": nothing found that is wrong"
    return [Text(f"Fits{against}" if report.contract else f"Fine{against}", style="bold green")]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
