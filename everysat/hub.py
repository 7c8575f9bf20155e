"""Drop-in modules for code that was written for published torch.hub entries: same call, same numbers, weights of this package.

    from everysat.hub import AnySat            # instead of torch.hub.load("gastruc/anysat", "anysat", ...)
    model = AnySat.from_pretrained("anysat-base.safetensors")
    features = model({"s2": s2, "s2_dates": dates}, patch_size=20, output="patch")

Inputs are normalised by the caller and dates are day numbers, as there. New code is better served by :func:`everysat.load`,
which checks bands and units, normalises, and takes masks, dates and any extent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everysat.find import suggest
from everysat.models import anysat, weights
from everysat.types import Batch, Place, Raster

DAY_S = 86400.0
COARSE = ("l7", "alos")
Output = Literal["tile", "patch", "dense", "all"]


class AnySat(nn.Module):
    """The call of the published ``AnySat``.

    Beyond it: tiles need not be square nor multiples of the patch (what is added is left out, not cropped), ``<layer>_mask`` is
    taken, and l7, alos and modis work beside other layers. ``raster_order=True`` puts each dense feature where its ground is;
    the published order, which is kept otherwise, mixes the sub-patches of images within patches of more than 10 m.
    """

    def __init__(self, encoder: anysat.AnySat, *, raster_order: bool = False) -> None:
        super().__init__()
        # What arrives is normalised, and days are plain numbers.
        plain = {
            name: {
                **m.model_dump(),
                "mean": (0.0,) * len(m.bands),
                "std": (1.0,) * len(m.bands),
                "origin": "1970-01-01",
            }
            for name, m in encoder.settings.modalities.items()
        }
        self.model = anysat.from_config({**encoder.config, "modalities": plain})
        self.model.load_state_dict(encoder.state_dict())
        self.raster_order = raster_order
        self.eval()

    @classmethod
    def from_pretrained(cls, file: str | Path, *, flash_attn: bool = False, raster_order: bool = False) -> AnySat:
        """From a file that ``everysat convert anysat/base AnySat.pth`` wrote. ``flash_attn``: the numbers that the published code
        gives with it, whose attention then runs across heads; they differ."""
        encoder = weights.load(Path(file))
        if not isinstance(encoder, anysat.AnySat):
            raise ValueError(f"{file} holds a model of family {encoder.family}, not anysat")
        quirks = {*encoder.settings.quirks} | ({"across_heads"} if flash_attn else set())
        if flash_attn:
            twin = anysat.from_config({**encoder.config, "quirks": sorted(quirks)})
            twin.load_state_dict(encoder.state_dict())
            encoder = twin
        return cls(encoder, raster_order=raster_order)

    def forward(
        self, x: dict[str, Tensor], patch_size: int, output: Output = "patch", output_modality: str = ""
    ) -> Tensor:
        """Features of normalised layers.

        Args:
            x: images [batch, band, y, x]; series [batch, date, band, y, x] with ``<layer>_dates`` [batch, date], days of the year;
                optionally ``<layer>_mask`` of the shape of the layer, 0 where invalid.
            patch_size: metres.
            output: ``tile`` [batch, dim], ``patch`` [batch, y, x, dim], ``all`` [batch, 1 + patch, dim] (class token first), or
                ``dense`` [batch, y, x, 2 dim], one feature per sub-patch of ``output_modality`` (by default the first layer).

        Raises:
            ValueError, LookupError: unknown layer or output, dates missing, shapes that do not fit.
        """
        names = [key for key in x if not key.endswith(("_dates", "_mask"))]
        for name in names:
            if name not in self.model.inputs:
                raise LookupError(f"x has the layer {name!r}. {suggest(name, self.model.inputs)}")
        if output not in ("tile", "patch", "dense", "all"):
            raise ValueError(f"output={output!r} must be tile, patch, dense or all")
        # There, a pixel of these layers alone counts as 10 m.
        small = {name: 10.0 for name in names if name in COARSE} if set(names) <= {*COARSE} and patch_size == 10 else {}
        changes: dict[str, Any] = {"patch_m": float(patch_size), "gsd_m": small}
        if output == "dense":
            changes |= {"output": "dense", "dense": output_modality or names[0]}
        model = self.model.at(**changes)
        batch = self._batch(x, names, small)
        features = model(model.tokenize(batch))
        if output == "tile":
            return features.summary
        grid = features.grid().movedim(1, -1)
        if output == "dense":
            return grid if self.raster_order else _published_order(grid, model, changes["dense"])
        return grid if output == "patch" else torch.cat([features.summary[:, None], grid.flatten(1, 2)], 1)

    def _batch(self, x: dict[str, Tensor], names: list[str], small: dict[str, float]) -> Batch:
        layers, extents = {}, []
        count = len(x[names[0]])
        for name in names:
            wanted, values = self.model.inputs[name], x[name]
            gsd_m = small.get(name, wanted.gsd_m)
            rank = 5 if wanted.dated else 4
            if values.ndim != rank or len(values) != count:
                raise ValueError(f"x[{name!r}] has shape {tuple(values.shape)}, expected {rank} axes and batch {count}")
            row = torch.arange(count, device=values.device)
            time_s = torch.zeros(count, 2, dtype=torch.float64, device=values.device)
            mask = x.get(f"{name}_mask")
            valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
            if wanted.dated:
                dates = x.get(f"{name}_dates")
                if dates is None or dates.shape != values.shape[:2]:
                    came = None if dates is None else tuple(dates.shape)
                    raise ValueError(f"x[{name + '_dates'!r}] has shape {came}, expected {tuple(values.shape[:2])}")
                row = row.repeat_interleave(values.shape[1])
                time_s = (dates.flatten().double() * DAY_S)[:, None].expand(-1, 2)
                values, valid = values.flatten(0, 1), valid.flatten(0, 1)
            layers[name] = Raster(wanted.sensor, values, valid, time_s, row, gsd_m)
            extents.append((gsd_m, values.shape[-2] * gsd_m, values.shape[-1] * gsd_m))
        _, height_m, width_m = min(extents)
        return Batch((Place(height_m, width_m),) * count, layers)


def _published_order(grid: Tensor, model: anysat.AnySat, layer: str) -> Tensor:
    """The cells of each patch as the published code lays them out."""
    side = round(model.settings.patch_m / model.settings.modalities[layer].sub_m)
    order = anysat.nested(side, model.settings.modalities[layer].sub_m)
    if order is None or "nested_subpatches" not in model.settings.quirks:
        return grid
    rows, height, width, dim = grid.shape
    cells = grid.view(rows, height // side, side, width // side, side, dim).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
    cells = cells[:, :, :, order.to(grid.device)].unflatten(3, (side, side))
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(rows, height, width, dim)
