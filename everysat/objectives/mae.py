"""Masked reconstruction at a resolution that is drawn anew (RAMEN, Houdré et al., CVPR 2026): most cells of all layers are hidden, and
their pixels are to be told, at their own size and for each date.

A step draws ``gsd_m`` and some of the layers. The decoder turns features of shown cells and mask tokens of the others into one vector
per cell; a series gives each of its dates a copy, told apart by a code of the day. A vector becomes values by its product with the
decoder's own vectors of the bands, so that it too reads any sensor. As that is linear, values are made of cells first, and
resampled to pixels after.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.attention import Block
from everysat.nn.draws import uniform
from everysat.nn.gather import global_mean, row_offset
from everysat.nn.position import day_number, grid_sinusoid, sine_cosine
from everysat.nn.ragged import ordinal, side_by_side
from everysat.nn.resample import axis_weights, resample_valid
from everysat.nn.spectral import BandVectors, ScaleExperts
from everysat.objectives.masks import drawn_size, fewer_dates
from everysat.types import Batch, Encoder, Features, Objective, Raster, Tokens


class Decoder(nn.Module):
    """From features of some cells to the values of all pixels."""

    def __init__(
        self, inputs: int, dim: int, depth: int, heads: int, experts: int = 4, unit_nm: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dates, self.dates_norm = Block(dim, heads, eps=eps), nn.LayerNorm(dim, eps=1e-6)
        self.bands, self.scale = BandVectors(dim, unit_nm), ScaleExperts(dim, experts)
        for part in (self.bands.spectral, self.bands.radar, self.bands.terrain):
            nn.init.constant_(part.mlp[-1].weight, dim**-0.5)  # type: ignore[arg-type]  # products near 1, as values are

    def forward(self, shown: Features, tokens: Tokens, keep: Tensor) -> Tensor:
        """A vector [token, dim] for each of ``tokens``, of features of those that ``keep`` marks."""
        rows, dim = len(tokens.places), self.mask_token.shape[-1]
        known = self.embed(shown.mean)
        x = self.mask_token.view(1, dim).to(known.dtype).expand(len(tokens), dim)
        x = x.index_copy(0, torch.nonzero(keep).flatten(), known) if len(known) else x
        x = x + grid_sinusoid(tokens.coords.cells() * tokens.coords.size_m[:, None].double(), dim)
        z, there, slot = side_by_side(x, tokens.coords.row, rows)
        z = torch.cat([self.embed(shown.summary)[:, None], z], 1)
        mask = None if there.all() else F.pad(there, (1, 0), value=True)
        for block in self.blocks:
            z = block(z, None, mask)
        return self.norm(z)[:, 1:].flatten(0, 1)[slot]

    def dated(self, x: Tensor, row: Tensor, raster: Raster, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the vectors ``x`` [token, dim] of a layer, of places ``row``, for each observation of theirs that has ``seen``
        anything: vectors, and which observation and token they are of. Where there is one observation, the vector is as it was."""
        count = torch.bincount(raster.row[seen], minlength=int(raster.row.max()) + 1 if len(raster.row) else 0)
        obs, token = torch.nonzero((raster.row[:, None] == row[None]) & seen[:, None], as_tuple=True)
        y = x[token]
        series = count[raster.row[obs]] > 1
        if series.any():
            day = day_number(raster.time_s[obs[series]], None)
            z, there, slot = side_by_side(y[series] + sine_cosine(day, x.shape[1]), token[series], len(row))
            busy = there.any(1)
            mask = None if there[busy].all() else there[busy]
            done = z.new_zeros(z.shape).index_copy(0, torch.nonzero(busy).flatten(), self.dates(z[busy], None, mask))
            y = y.index_copy(0, torch.nonzero(series).flatten(), self.dates_norm(done).flatten(0, 1)[slot])
        return y, obs, token


class Mae(Objective):
    """Mean squared error of hidden pixels, summed over layers.

    Args:
        encoder: a RAMEN.
        gsd_m: sizes of cells that a step draws from, metres; a list, or lists by name of the dataset in the recipe.
        mask_ratio: share of the cells of a place, over all its layers, that is hidden.
        subsets: whether a step reads a random part of the layers, and not all.
        date_ratio: share of the dates of series that a step leaves out.
        band_ratio: share of the bands of a layer that a step does not show, though it asks for them (not in the paper). A small
            number of sensors otherwise teaches sets of bands, and not bands.
        dim, depth, heads, eps: of the decoder; eps of its blocks' layer norms.
        targets: values normalised per ``band``, by the encoder's contract, or once more per ``pixel`` over its bands (published;
            of two bands, only which is larger remains, and one band is refused).
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        gsd_m: Sequence[float] | Mapping[str, Sequence[float]] = (),
        mask_ratio: float = 0.75,
        subsets: bool = True,
        date_ratio: float = 0.0,
        band_ratio: float = 0.0,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        eps: float = 1e-5,
        targets: Literal["band", "pixel"] = "band",
    ) -> None:
        super().__init__()
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"mask_ratio={mask_ratio} must be between 0 and 1: something is hidden, something shown")
        for name, ratio in {"date_ratio": date_ratio, "band_ratio": band_ratio}.items():
            if not 0.0 <= ratio < 1.0:
                raise ValueError(f"{name}={ratio} must be in [0, 1): something has to stay")
        if targets not in ("band", "pixel"):
            raise ValueError(f"targets={targets!r} must be 'band' or 'pixel'")
        settings: Any = encoder.settings
        self.gsd_m = gsd_m
        self.mask_ratio, self.subsets, self.date_ratio = mask_ratio, subsets, date_ratio
        self.band_ratio, self.targets = band_ratio, targets
        self.decoder = Decoder(settings.dim, dim, depth, heads, settings.experts, settings.wavelength_unit_nm, eps)

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        gsd_m = drawn_size(self.gsd_m or [encoder.config["gsd_m"]], batch.source, "gsd_m", generator)
        view: Any = encoder.at(gsd_m=gsd_m, output="layer", skip=False)
        first = row_offset(len(batch), next(encoder.parameters()).device)
        batch = view.known(batch)
        names = [n for n in [*view.inputs, *sorted(set(batch.layers) - set(view.inputs))] if n in batch.layers]
        if self.subsets and len(names) > 1:
            bits = int(torch.randint(1, 1 << len(names), (1,), generator=generator))
            names = [name for i, name in enumerate(names) if bits >> i & 1]
        if self.date_ratio:
            batch = fewer_dates(batch, names, self.date_ratio, generator, first)
        batch = batch.only(*names)
        tokens = view.tokenize(self._fewer_bands(batch, generator))
        tokens.memo["asked"].update({name: view.contracted(name, batch.raster(name)) for name in names})
        number = ordinal(tokens.coords.row, len(batch))
        noise = uniform(generator, tokens.coords.row + first, number)
        return {**self.terms(view, tokens, noise), "gsd_m": noise.new_tensor(gsd_m)}

    def _fewer_bands(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Some of the bands of each layer, the same for all places, at least one."""
        if not self.band_ratio:
            return batch
        layers: dict[str, Raster] = {}
        for name in batch.layers:
            raster = batch.raster(name)
            count = len(raster.sensor.bands)
            order = torch.randperm(count, generator=generator)[: max(1, round(count * (1.0 - self.band_ratio)))]
            layers[name] = raster.select(raster.sensor.names[i] for i in sorted(order.tolist()))
        return batch.adding(**layers)

    def terms(self, view: Any, tokens: Tokens, noise: Tensor) -> dict[str, Tensor]:
        """Losses, by layer and in all; the cells of least ``noise`` [token] of each place are shown."""
        keep = self.kept(tokens, noise)
        decoded = self.decoder(view(tokens[keep]), tokens, keep)
        losses = {}
        for group, name in enumerate(tokens.groups):
            mine = tokens.coords.group == group
            values, hidden = self.reconstructed(view, tokens, name, decoded[mine], keep[mine], mine)
            target, known = self._target(view, tokens, name)
            losses[f"{name}"] = global_mean((values - target).square(), (hidden & known).to(values.dtype))
        total = sum(losses.values(), noise.new_zeros(()))
        return {"loss": total, **losses}

    def kept(self, tokens: Tokens, noise: Tensor) -> Tensor:
        """Which tokens are shown, bool [token]: of each place those of least noise."""
        row, rows = tokens.coords.row, len(tokens.places)
        order = torch.argsort(noise.double() + row)
        rank = torch.empty_like(order)
        rank[order] = ordinal(row[order], rows)
        count = torch.bincount(row, minlength=rows)
        return rank < (count * (1.0 - self.mask_ratio)).long()[row]

    def reconstructed(
        self, view: Any, tokens: Tokens, name: str, decoded: Tensor, keep: Tensor, mine: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised values [obs, band, y, x] of a layer as told from its ``decoded`` cells, and which pixels lie in hidden ones."""
        (height, width), (raster, _) = tokens.memo["grid"], tokens.memo["asked"][name]
        row, at = tokens.coords.row[mine], tokens.coords.cells()[mine]
        cell, cells = at[:, 0] * width + at[:, 1], height * width
        vectors, obs, token = self.decoder.dated(decoded, row, raster, tokens.memo["seen"][name].obs)
        ratio = view.settings.gsd_m / raster.gsd_m
        mixing, bias = self.decoder.scale(ratio)
        channels = self.decoder.bands(raster.sensor)
        low = vectors @ (mixing @ channels.T) + channels @ bias
        count, bands, *pixels = raster.values.shape
        slot = obs * cells + cell[token]
        image = low.new_zeros(count * cells, bands).index_copy(0, slot, low).view(count, height, width, bands)
        some = torch.zeros(count * cells, dtype=torch.bool, device=low.device).index_fill(0, slot, True)
        some = some.view(count, 1, height, width).expand(-1, bands, -1, -1)
        stretched = "stretched" in view.settings.quirks
        weights = [axis_weights(n, px, ratio, False, stretched) for n, px in zip((height, width), pixels, strict=True)]
        values, seen = resample_valid(image.permute(0, 3, 1, 2), some, *weights)
        hidden = torch.zeros(len(tokens.places) * cells, dtype=torch.bool, device=low.device)
        hidden = hidden.index_fill(0, (row * cells + cell)[~keep], True).view(-1, height, width)
        index = [
            _nearest(n, px, ratio, stretched).to(low.device) for n, px in zip((height, width), pixels, strict=True)
        ]
        return values, seen & hidden[raster.row][:, index[0]][:, :, index[1]][:, None]

    def _target(self, view: Any, tokens: Tokens, name: str) -> tuple[Tensor, Tensor]:
        raster, wanted = tokens.memo["asked"][name]
        values, valid = wanted.normalise(raster), raster.valid
        if self.targets == "band":
            return values, valid
        if values.shape[1] < 2:
            raise ValueError(
                f"targets='pixel' compares the bands of a pixel, and layer {name!r} has one; use targets='band'"
            )
        values = (values - values.mean(1, keepdim=True)) / (values.var(1, keepdim=True) + 1e-6).sqrt()
        return values, valid.all(1, keepdim=True).expand_as(valid)


def _nearest(cells: int, pixels: int, ratio: float, stretched: bool) -> Tensor:
    """The cell of each pixel along an axis, where a cell is ``ratio`` pixels long."""
    pixel = torch.arange(pixels, dtype=torch.float64)
    at = pixel * cells / pixels if stretched else (pixel + 0.5) / ratio
    return (at + 1e-9).floor().long().clamp(max=cells - 1)


def build(variant: str = "", *, encoder: Encoder, **options: Any) -> Mae:
    """RAMEN's pre-training for that encoder; no variants."""
    if variant:
        raise LookupError(f"objective mae has no variants; got {variant!r}")
    if not hasattr(encoder, "levels"):
        raise ValueError(
            f"objective mae reconstructs at the resolution of a ramen encoder, got one of family {encoder.family!r}"
        )
    return Mae(encoder, **options)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the published decoder, after :func:`everysat.models.ramen.channels`, under the names used here."""
    renames = [
        (r"^decoder_embed\.", "embed."),
        (r"^temporal_block\.", "dates."),
        (r"^temporal_norm\.", "dates_norm."),
    ]
    out = {}
    for key, value in state.items():
        for pattern, new in renames:
            key = re.sub(pattern, new, key)
        out[f"decoder.{key}"] = value
    return out
