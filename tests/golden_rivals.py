"""Inputs of the golden files of Presto and Galileo as a batch, in physical units."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from everysat import sensors
from everysat.nn.monthly import OPTICAL, RADAR, STEP_S
from everysat.types import Batch, Place, Raster

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def weights_of(io: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("w."): value for key, value in io.items() if key.startswith("w.")}


def calendar(begin_s: Tensor) -> Tensor:
    """The months in which times lie, [n, 2] seconds."""
    month = begin_s.long().numpy().astype("datetime64[s]").astype("datetime64[M]")
    ends = [torch.from_numpy((month + i).astype("datetime64[s]").astype("int64")).double() for i in (0, 1)]
    return torch.stack(ends, 1)


def batch_of(io: dict[str, Tensor]) -> Batch:
    """One place per row of the inputs: series [place, step, band, y, x], weather [place, step, 2], terrain [place, 2, y, x]."""
    return Batch.cat([_place(io, number) for number in range(len(io["in.series"]))])


def _place(io: dict[str, Tensor], number: int) -> Batch:
    series, valid = io["in.series"][number], io["in.valid"][number]
    time_s = torch.stack([io["in.begin_s"], io["in.begin_s"] + STEP_S], 1)
    side = series.shape[-1] * 10.0

    def pixels(sensor: str, bands: tuple[str, ...], span: slice) -> Raster:
        table = sensors.get(sensor).select(bands)
        return Raster.of(table, series[:, span], 10.0, valid=valid[:, span], time_s=time_s)

    weather = sensors.get("era5-land-monthly").select(("t2m", "tp"))
    terrain = sensors.get("srtm-terrain").select(("elevation", "slope"))
    known = io["in.has_weather"][number].view(-1, 1, 1, 1).expand(-1, 2, 1, 1)
    layers = {
        "s1": pixels("sentinel-1-grd", RADAR, slice(0, 2)),
        "s2": pixels("sentinel-2-l2a", OPTICAL, slice(2, 12)),
        "era5": Raster.of(
            weather,
            io["in.weather"][number][:, :, None, None],
            side,
            valid=known,
            time_s=calendar(io["in.begin_s"]),
        ),
        "srtm": Raster.of(
            terrain, io["in.terrain"][number][None], 10.0, valid=io["in.has_terrain"][number].expand(1, 2, -1, -1)
        ),
    }
    lon, lat = io["in.lonlat"][number].tolist()
    return Batch((Place(side, side, lonlat=(lon, lat)),), layers)
