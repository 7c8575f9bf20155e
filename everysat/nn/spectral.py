"""What a band measures, as numbers: how encoders for any sensor read bands that they were not trained on.

A band is known by its physics, from the sensor's table: wavelength and width (optical, thermal), polarisation and orbit (radar), or
what of the terrain it is. Its mean and deviation come from the model's contract where the band is listed, or else from the
bands of the contract that measure the same in the same unit, interpolated over wavelength.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from everysat.nn.inputs import described
from everysat.nn.position import sine_cosine
from everysat.sensors import Band, Sensor
from everysat.types import Batch, ContractError, Encoder, Features, Input, Raster, extent

POLARISATIONS, ORBITS, TERRAIN = ("vv", "vh", "hv", "hh"), ("asc", "des"), ("dsm", "dtm", "slope")
LABEL = "label"
"""Name of the layer that holds what is asked for; an encoder that reads all layers leaves it out."""

_WAVELENGTHS = (442.7, 492.7, 559.8, 664.6, 704.1, 740.5, 782.8, 832.8, 864.7, 945.1, 1613.7, 2202.4)
_MEANS = (0.141, 0.154, 0.181, 0.211, 0.245, 0.285, 0.298, 0.309, 0.309, 0.315, 0.265, 0.213)
_STDS = (0.244, 0.237, 0.221, 0.228, 0.229, 0.212, 0.199, 0.199, 0.188, 0.194, 0.181, 0.169)
USUAL: dict[str, tuple[tuple[float, float, float], ...]] = {
    "optical reflectance": tuple(zip(_WAVELENGTHS, _MEANS, _STDS, strict=True)),
    "sar dB co": ((0.0, -12.45, 4.97),),
    "sar dB cross": ((0.0, -19.07, 5.34),),
}
"""(wavelength in nm, mean, deviation) of bands of which a contract lists none: reflectance as measured here over 23 Sentinel-2 patches
from around the world (those of SatCLIP's repository), backscatter over BigEarthNet (the values in Atomizer's repository)."""


@dataclass(frozen=True)
class Physics:
    """What a band measures. ``code``: of the polarisation (radar) or of the quantity (terrain); ``orbit`` is empty if unknown."""

    kind: Literal["optical", "sar", "terrain"]
    wavelength_nm: float = math.nan
    width_nm: float = math.nan
    code: str = ""
    orbit: str = ""


def physics(sensor: Sensor, band: Band) -> Physics | None:
    """The physics of a band, or None if its table does not say enough for a model that was not trained on it."""
    if sensor.kind in ("optical", "thermal") and band.wavelength_um is not None and band.unit not in ("class", "bits"):
        width = math.nan if band.width_um is None else 1000.0 * band.width_um
        return Physics("optical", 1000.0 * band.wavelength_um, width)
    if sensor.kind == "sar" and (band.polarisation or "").lower() in POLARISATIONS:
        return Physics(
            "sar", code=str(band.polarisation).lower(), orbit=(band.orbit or "")[:3].lower().replace("dec", "des")
        )
    if sensor.kind == "terrain":
        labels = [label.lower() for label in (band.name, *band.aliases)]
        codes = {**dict(zip(TERRAIN, TERRAIN, strict=True)), "elevation": "dsm", "dem": "dsm"}
        found = next((codes[label] for label in labels if label in codes), "")
        return Physics("terrain", code=found) if found else None
    return None


class AnySensor(Encoder):
    """An encoder that takes bands by their physics. ``settings.layers`` is ``listed``: it reads the layers that its contract
    names, with whatever bands, pixel size and dates they have; or ``all``: every raster of the batch whose bands have a physics,
    except one called ``label``. Without a contract it reads all."""

    any_sensor = True

    @property
    def reads(self) -> Mapping[str, Input] | None:
        return self.inputs if self.inputs and self.config.get("layers", "listed") == "listed" else None

    def known(self, batch: Batch) -> Batch:
        if self.reads is not None:
            return batch.only(*self.inputs)
        readable = [n for n, r in batch.layers.items() if n != LABEL and isinstance(r, Raster) and self._readable(n, r)]
        return batch.only(*sorted(readable))

    def _readable(self, name: str, raster: Raster) -> bool:
        return name in self.inputs or all(physics(raster.sensor, band) for band in raster.sensor.bands)

    def contracted(self, name: str, raster: Raster) -> tuple[Raster, Input]:
        """The raster with the bands that count, and the contract that holds for it: bands that the contract lists under this name,
        or all bands if it lists none of them, with their moments.

        Raises:
            ContractError: a listed layer without moments, a band without physics, or in a unit of which the contract knows no moments.
        """
        listed = self.inputs.get(name)
        if listed is not None and self.config["modalities"][name].get("mean") is None:
            raise ContractError(
                f"the model has no mean and std for layer {name!r}, and its input must be normalised. Compute them (everysat stats ... "
                "-o stats.json) and load the model with statistics='stats.json'; in a recipe, set model.statistics to data; for "
                "values that are normalised already, give mean 0 and std 1"
            )
        same = listed if listed is not None and listed.sensor.name == raster.sensor.name else None
        chosen = [b for b in raster.sensor.names if same is not None and b in same.sensor] or list(raster.sensor.names)
        raster = raster if chosen == list(raster.sensor.names) else raster.select(chosen)
        known = [self.inputs[n] for n, listing in self.config["modalities"].items() if listing.get("mean") is not None]
        moments = []
        for band in raster.sensor.bands:
            if physics(raster.sensor, band) is None:
                raise ContractError(
                    f"layer {name!r} band {band.name} ({raster.sensor.name}): its table says no wavelength, polarisation or terrain quantity "
                    "that a model for any sensor could know it by. Select the other bands, or complete the sensor's table"
                )
            moments.append(_moments(name, raster.sensor, band, [*([] if same is None else [same]), *known]))
        mean, std = zip(*moments, strict=True)
        dated = bool(torch.isfinite(raster.time_s).all())
        return raster, Input(raster.sensor, raster.gsd_m, mean, std, dated=dated)

    def embed(self, batch: Batch | Raster, **changes: object) -> Features:
        if isinstance(batch, Raster):
            name = next((n for n, i in self.inputs.items() if i.sensor.name == batch.sensor.name), None)
            if name is None:
                name, changes = batch.sensor.name, {"layers": "all", **changes}
            self.contracted(name, batch)  # what cannot be read is refused here, not left out
            batch = Batch((extent(batch),), {name: batch})
        return super().embed(batch, **changes)


def listing(name: str, wanted: Input) -> dict[str, Any] | None:
    """What the config of a model for any sensor says of an input under ``modalities``: the bands that it can read; None without any."""
    bands = [i for i, band in enumerate(wanted.sensor.bands) if physics(wanted.sensor, band)]
    if name == LABEL or not bands:
        return None
    whole = {**described(wanted), "dated": wanted.dated}
    return {**whole, **{key: [whole[key][i] for i in bands] for key in ("bands", "mean", "std")}}


def _moments(name: str, sensor: Sensor, band: Band, inputs: Iterable[Input]) -> tuple[float, float]:
    """Mean and deviation of a band that is not listed: of what is listed, by wavelength, polarisation or quantity."""
    wanted, inputs = physics(sensor, band), list(inputs)
    assert wanted is not None
    for i in inputs:  # the very band, listed under another name
        if i.sensor.name == sensor.name and band.name in i.sensor and i.sensor[band.name].unit == band.unit:
            at = i.sensor.names.index(i.sensor[band.name].name)
            return i.mean[at], i.std[at]
    listed = [
        (key, mean, std)
        for i in inputs
        for other, mean, std in zip(i.sensor.bands, i.mean, i.std, strict=True)
        if other.unit == band.unit and (key := _key(physics(i.sensor, other), wanted)) is not None
    ]
    points = listed or list(USUAL.get(f"{wanted.kind} {band.unit} {_class(wanted)}".strip(), ()))
    if not points:
        raise ContractError(
            f"layer {name!r} band {band.name} ({sensor.name}) is in {band.unit}, and the model has moments of no such band. Compute "
            f"them (everysat stats ... -o stats.json) and load the model with statistics='stats.json'"
        )
    at, mean, std = np.array(sorted(points)).T
    where = wanted.wavelength_nm if wanted.kind == "optical" else 0.0
    return float(np.interp(where, at, mean)), float(np.interp(where, at, std))


def _class(p: Physics) -> str:
    """Bands of one class share their moments if nothing better is known."""
    if p.kind == "sar":
        return "co" if p.code in ("vv", "hh") else "cross"
    return "" if p.kind == "optical" else "height" if p.code in ("dsm", "dtm") else p.code


def _key(other: Physics | None, wanted: Physics) -> float | None:
    """Where a listed band lies on the axis that moments are interpolated on; None if it measures something else."""
    if other is None or other.kind != wanted.kind or _class(other) != _class(wanted):
        return None
    return other.wavelength_nm if wanted.kind == "optical" else 0.0


class Codes(nn.Module):
    """Learned codes by name [code, dim], and the MLP that turns the code of a band into its vector (RAMEN, section 3)."""

    def __init__(self, dim: int, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.names = names
        self.codes = nn.Parameter(torch.randn(len(names), dim) * 0.02) if names else None
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.LayerNorm(dim))

    def code(self, name: str) -> Tensor:
        assert self.codes is not None
        return self.codes[self.names.index(name)]


class BandVectors(nn.Module):
    """A vector [dim] for every band, from its physics: optical bands by the sinusoid of their wavelength in units of ``unit_nm``
    nanometres, radar by a learned code of orbit and polarisation (the mean of both orbits if unknown), terrain by one of its
    quantity."""

    def __init__(self, dim: int, unit_nm: float = 1.0) -> None:
        super().__init__()
        self.dim, self.unit_nm = dim, unit_nm
        self.spectral = Codes(dim)
        self.radar = Codes(dim, tuple(f"{orbit}_{p}" for orbit in ORBITS for p in POLARISATIONS))
        self.terrain = Codes(dim, TERRAIN)

    def forward(self, sensor: Sensor) -> Tensor:
        """Vectors [band, dim] of the bands of a sensor."""
        vectors = []
        for band in sensor.bands:
            found = physics(sensor, band)
            assert found is not None, f"{sensor.name} {band.name} has no physics"
            part: Codes = {"optical": self.spectral, "sar": self.radar, "terrain": self.terrain}[found.kind]
            vectors.append(part.mlp(self._code(found)))
        return torch.stack(vectors)

    def _code(self, found: Physics) -> Tensor:
        if found.kind == "optical":
            device = self.radar.codes.device  # type: ignore[union-attr]
            wavelength = torch.tensor(found.wavelength_nm / self.unit_nm, device=device)
            return sine_cosine(wavelength, self.dim, torch.float32)
        if found.kind == "terrain":
            return self.terrain.code(found.code)
        orbits = [found.orbit] if found.orbit in ORBITS else ORBITS
        return torch.stack([self.radar.code(f"{orbit}_{found.code}") for orbit in orbits]).mean(0)


class ScaleExperts(nn.Module):
    """x + sum of experts x W_k^T + b_k, weighted by the ratio of resolutions, as one matrix: it is linear in x, so that it can be
    joined with what stands before or behind it (RAMEN's resampler)."""

    def __init__(self, dim: int, experts: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(experts))
        self.mlp = nn.Sequential(nn.Linear(dim, dim // 4), nn.GELU(), nn.Linear(dim // 4, experts))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, ratio: float) -> tuple[Tensor, Tensor]:
        """Matrix [dim, dim], to be multiplied from the right, and bias [dim], for that ratio of pixel sizes before and after."""
        code = sine_cosine(torch.tensor(math.log(ratio), device=self.temperature.device), self.dim, torch.float32)
        weight = (self.mlp(code) / self.temperature.clamp(min=1e-3)).softmax(-1)
        matrix = torch.stack([e.weight for e in self.experts])  # type: ignore[misc]
        bias = torch.stack([e.bias for e in self.experts])  # type: ignore[misc]
        mixed = torch.einsum("k,kij->ji", weight, matrix)
        return mixed + torch.eye(self.dim, device=mixed.device), weight @ bias
