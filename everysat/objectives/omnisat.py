"""Pre-training of OmniSat: contrast between the modalities of a patch, and masked reconstruction of all modalities.

Three quarters of all tokens are replaced by one learned vector; from the fused token of each patch, a decoder per modality
reconstructs its pixels (Astruc et al. 2024, sections 3.2 and 3.3). The contrastive loss acts on the projected tokens, before
positions and fusion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from everysat.nn.dense import shifted
from everysat.nn.draws import uniform
from everysat.nn.gather import gather_rows, global_mean, row_offset
from everysat.nn.patch import PatchDecoder
from everysat.nn.position import sinusoid
from everysat.objectives.contrastive import Negatives, mil_nce
from everysat.types import Batch, Encoder, Features, Objective, Raster, Tokens


class OmniSatPretraining(Objective):
    """The sum of one reconstruction loss per modality and the contrastive loss.

    Args:
        encoder: an OmniSat.
        mask_ratio: share of the tokens of a place that are hidden.
        tau: temperature of the contrastive loss.
        negatives: which pairs it contrasts, see :func:`mil_nce`; ``None`` leaves the loss out.
        reconstruct: whether to reconstruct at all.
        top_dates: share of the dates of a series that are reconstructed, those with the most attention.
        bypass: hand the positions of the image CNN's maxima to the decoder, as published; a leak of detail otherwise.
        normalise: targets are normalised per patch (images) and per date (series), or left as the encoder's input is.
        random_ratio: draw the hidden share of each place between 0 and ``mask_ratio`` (as its square root), so that places
            of which nothing is hidden, as at inference, are seen in training too.
        shift_m: contrast also with a second view of each place, moved by up to this many metres and turned: what is the same
            ground in all modalities and from both views is the positive. The batch is read one patch larger for it. 0: no.
        shift_step_m: moves are multiples of it.
        contrasted: share of the patches, drawn at random, that the contrastive loss looks at.
        texture: number of frozen random filters whose mean responses in each patch are reconstructed too; 0 for none.
        texture_weight: of that term.
        modality_dropout: chance that all tokens of a modality of a place are withheld from the fusion (never the last one).
        drop_last_date: never reconstruct the last date of a series (a defect of the published code; for parity).
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        mask_ratio: float = 0.75,
        tau: float = 0.1,
        negatives: Negatives | None = "all",
        reconstruct: bool = True,
        top_dates: float = 0.25,
        bypass: bool = True,
        normalise: bool = True,
        modality_dropout: float = 0.0,
        drop_last_date: bool = False,
        random_ratio: bool = False,
        shift_m: float = 0.0,
        shift_step_m: float = 0.0,
        contrasted: float = 1.0,
        texture: int = 0,
        texture_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= mask_ratio < 1.0:
            raise ValueError(f"mask_ratio={mask_ratio} must be in [0, 1): some tokens have to stay")
        settings: Any = encoder.settings
        self.settings, self.mask_ratio, self.tau, self.negatives = settings, mask_ratio, tau, negatives
        self.top_dates, self.normalise, self.drop_last_date = top_dates, normalise, drop_last_date
        self.modality_dropout, self.random_ratio, self.contrasted = modality_dropout, random_ratio, contrasted
        self.shifts = ShiftedViews(settings.patch_m, shift_m, shift_step_m or shift_m) if shift_m else None
        self.texture_weight = texture_weight
        self.texture = FrozenTextures(settings, texture) if texture and reconstruct else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.dim))
        self.decoders = nn.ModuleDict()
        for name, modality in settings.modalities.items() if reconstruct else ():
            bands, patch = len(modality.bands), settings.patch(name)
            if modality.projector == "image":
                self.decoders[name] = PatchDecoder(bands, settings.dim, patch, bypass=bypass)
            else:
                self.decoders[name] = nn.Linear(settings.dim, bands * patch * patch)
        self.indices = bypass and reconstruct

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        again: list[Tokens] = []
        if self.shifts is not None:
            batch, second = self.shifts(batch, generator)
            again = [second.original(encoder.tokenize(second.batch))]
        tokens: Tokens = encoder.tokenize(batch, indices=self.indices)  # type: ignore[call-arg]
        cells, inputs = tokens.memo["grid"][0] * tokens.memo["grid"][1], list(encoder.inputs)
        group = torch.tensor([inputs.index(name) for name in tokens.groups], dtype=torch.long)
        row = row_offset(len(batch), tokens.x.device) + torch.arange(len(batch))[:, None]
        draws: dict[str, Tensor] = {}
        draws["noise"] = uniform(generator, row[..., None], group[:, None] * cells + torch.arange(cells))
        if self.modality_dropout:
            draws["dropped"] = uniform(generator, row, group)
        if self.random_ratio:
            draws["ratio"] = self.mask_ratio * uniform(generator, row[:, 0], torch.zeros(1, dtype=torch.long)).sqrt()
        if self.contrasted < 1.0:
            draws["picked"] = uniform(generator, row, torch.arange(cells))
        return self.terms(encoder, tokens, again=again, **{k: v.to(tokens.x.device) for k, v in draws.items()})

    def terms(
        self,
        encoder: Encoder,
        tokens: Tokens,
        noise: Tensor,
        *,
        dropped: Tensor | None = None,
        ratio: Tensor | None = None,
        picked: Tensor | None = None,
        again: Sequence[Tokens] = (),
    ) -> dict[str, Tensor]:
        """Losses for given draws.

        Args:
            noise: [place, group, patch], whose largest values are hidden.
            dropped: [place, group], uniform numbers that decide which modalities are withheld.
            ratio: [place], hidden shares in place of ``mask_ratio``.
            picked: [place, patch], whose smallest values are contrasted.
            again: tokens of further views of the same patches.
        """
        losses: dict[str, Tensor] = {}
        if self.decoders:
            shown = tokens if dropped is None else tokens[self._kept(tokens, dropped)]
            hidden = hide(shown, noise, self.mask_ratio if ratio is None else ratio)
            features: Features = encoder(shown, hidden=hidden, mask_token=self.mask_token)
            losses.update(self._reconstructions(tokens, shown, hidden, features))
        if self.negatives is not None:
            losses["contrastive"] = self._contrast([tokens, *again], picked)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _contrast(self, views: Sequence[Tokens], picked: Tensor | None) -> Tensor:
        x = torch.cat([view.x for view in views])
        group = torch.cat([view.coords.group + i * len(view.groups) for i, view in enumerate(views)])
        row, cell = torch.cat([view.coords.row for view in views]), torch.cat([_cell(view) for view in views])
        if picked is not None:
            rank = picked.argsort(1).argsort(1)
            keep = rank[row, cell] < max(1, round(self.contrasted * picked.shape[1]))
            x, group, row, cell = x[keep], group[keep], row[keep], cell[keep]
        return mil_nce(x, group, row, cell, tau=self.tau, negatives=self.negatives or "all")

    def _kept(self, tokens: Tokens, dropped: Tensor) -> Tensor:
        """Tokens whose modality is not withheld; of the modalities that a place has, the luckiest one always stays."""
        there = torch.zeros_like(dropped, dtype=torch.bool)
        there[tokens.coords.row, tokens.coords.group] = True
        luck = dropped.masked_fill(~there, -1.0)
        stays = (luck >= self.modality_dropout) | (luck == luck.max(1, keepdim=True).values)
        return stays[tokens.coords.row, tokens.coords.group]

    def _reconstructions(self, tokens: Tokens, shown: Tokens, hidden: Tensor, features: Features) -> dict[str, Tensor]:
        cells = tokens.memo["grid"][0] * tokens.memo["grid"][1]
        size = len(tokens.places) * cells
        at = features.coords.cells()
        where = features.coords.row * cells + at[:, 0] * tokens.memo["grid"][1] + at[:, 1]
        mean = features.mean[:, : self.settings.dim]
        fused = mean.new_zeros(size, mean.shape[1]).index_copy(0, where, mean)
        # A modality that was withheld counts as hidden: its reconstruction is what the others must explain.
        slots = len(tokens.groups) * size
        mask = fused.new_zeros(slots).index_fill_(0, _slot(tokens, size), 1.0)
        mask[_slot(shown, size)] = hidden.to(mask.dtype)
        losses = {}
        for group, name in enumerate(tokens.groups):
            kind = self.settings.modalities[name].projector
            loss = self._image_loss if kind == "image" else self._series_loss
            own = mask[group * size : (group + 1) * size].view(len(tokens.places), cells)
            losses[f"{name}_reconstruction"] = loss(name, tokens, fused.view(len(tokens.places), cells, -1), own)
        if self.texture is not None:
            losses["texture"] = self.texture_weight * self.texture(tokens.memo["patches"], fused)
        return losses

    def _image_loss(self, name: str, tokens: Tokens, fused: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over all patches, hidden or not, as published."""
        patches = tokens.memo["patches"][name]
        target, valid = patches.values[patches.seen], patches.valid[patches.seen]
        if self.normalise:
            target = _normalised(target, valid, (1, 2, 3))
        decoded = self.decoders[name](fused.flatten(0, 1)[tokens.memo["series"][name]], tokens.memo["indices"][name])
        return global_mean((decoded.float() - target).square(), valid.to(target.dtype))

    def _series_loss(self, name: str, tokens: Tokens, fused: Tensor, mask: Tensor) -> Tensor:
        """Squared error of the dates with the most attention, averaged over hidden patches (images: over all patches)."""
        patches, modality = tokens.memo["patches"][name], self.settings.modalities[name]
        x = fused[patches.row]
        if modality.projector == "series":
            dates = self._dates(tokens, name)
            patches = type(patches)(*(t[dates] for t in (patches.values, patches.valid, patches.row, patches.day)))
            code = sinusoid(patches.day, fused.shape[-1], modality.period_days).to(fused.dtype)
            x = fused[patches.row] + code[:, None]
        decoded = self.decoders[name](x).float()
        target = patches.values
        if self.normalise:
            target = _normalised(target, patches.valid, (1, 2, 3, 4))
        valid = patches.valid.flatten(2)
        error = ((decoded - target.flatten(2)).square() * valid).sum(-1) / valid.sum(-1).clamp(min=1)
        weight = (1.0 if modality.projector == "texture" else mask[patches.row]) * patches.seen
        return global_mean(error, weight)

    def _dates(self, tokens: Tokens, name: str) -> Tensor:
        """Which observations are reconstructed: of each place, those above the 1 - ``top_dates`` quantile of attention."""
        patches, attention = tokens.memo["patches"][name], tokens.memo["attention"][name].detach().float()
        chosen = torch.zeros_like(patches.row, dtype=torch.bool)
        for row in patches.row.unique():
            mine = torch.nonzero(patches.row == row).flatten()
            if self.drop_last_date:
                mine = mine[: int(torch.nonzero(patches.day[mine]).max())]
            if len(mine) == 1:
                chosen[mine] = True
                continue
            chosen[mine] = attention[mine] > torch.quantile(attention[mine], 1.0 - self.top_dates)
        return chosen


class FrozenTextures(nn.Module):
    """Random filters as targets: the mean positive and negative response of each in a patch, as a logarithm and standardised.

    They carry what a patch looks like rather than where its pixels stand, and need no second network (frozen random
    projections as in OlmoEarth, arXiv 2511.13655; random filters as in Rolf et al. 2021). Half of the filters ignore level.
    """

    def __init__(self, settings: Any, filters: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.names = [n for n, m in settings.modalities.items() if m.projector == "texture" and settings.patch(n) > 1]
        for i, name in enumerate(self.names):
            weight = torch.randn(filters, len(settings.modalities[name].bands), 3, 3, generator=generator)
            weight = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
            weight[::2] -= weight[::2].mean((2, 3), keepdim=True)
            self.register_buffer(f"weight_{i}", weight)
            self.register_buffer(f"bias_{i}", 0.3 * torch.randn(filters, generator=generator))
        self.decoder = nn.Linear(settings.dim, 2 * filters * len(self.names))

    def forward(self, patches: Mapping[str, Any], fused: Tensor) -> Tensor:
        targets, seen = zip(
            *(self._responses(i, patches.get(name), fused) for i, name in enumerate(self.names)), strict=True
        )
        target, weight = torch.cat(targets, 1), torch.cat(seen, 1)
        rows, _ = gather_rows(torch.cat([target, weight], 1))
        every, count = rows.chunk(2, dim=1)
        mean = (every * count).sum(0) / count.sum(0).clamp(min=1)
        std = (((every - mean).square() * count).sum(0) / count.sum(0).clamp(min=1)).sqrt().clamp(min=1e-4)
        target = ((target - mean) / std).clamp(-4, 4)
        return global_mean((self.decoder(fused).float() - target).square(), weight)

    @torch.no_grad()
    def _responses(self, index: int, patches: Any, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Responses and which count, [place x patch, 2 filter]; of the mean of a modality's dates."""
        weight, bias = getattr(self, f"weight_{index}"), getattr(self, f"bias_{index}")
        found = fused.new_zeros(len(fused), 2 * len(bias), dtype=torch.float32)
        count = found.new_zeros(len(fused), 1)
        if patches is not None:
            seen = patches.seen
            series = (patches.row[:, None] * seen.shape[1] + torch.arange(seen.shape[1], device=seen.device))[seen]
            x = nn.functional.pad(patches.values[seen].float(), (1, 1, 1, 1), mode="replicate")
            y = nn.functional.conv2d(x, weight, bias)
            response = torch.cat([y.relu().mean((2, 3)), (-y).relu().mean((2, 3))], 1).float()
            found, count = found.index_add(0, series, response), count.index_add(0, series, torch.ones(len(series), 1))
        return (found / count.clamp(min=1) + 1e-3).log(), (count > 0).float().expand_as(found)


@dataclass(frozen=True)
class Turned:
    """A view that was turned, and the way back from its patches to those of the place."""

    batch: Batch
    turn: Callable[[Tensor], Tensor]

    def original(self, tokens: Tokens) -> Tokens:
        """The same tokens at the coordinates that their ground has in the place."""
        height, width = tokens.memo["grid"]
        came_from = self.turn(torch.arange(height * width).view(1, 1, height, width)).flatten()
        cell = came_from.to(tokens.x.device)[_cell(tokens)]
        at_m = (torch.stack([cell // width, cell % width], -1) + 0.5) * tokens.coords.size_m[:, None]
        return replace(tokens, coords=replace(tokens.coords, at_m=at_m))


class ShiftedViews:
    """Two views of each place, one patch smaller on each side than the batch and moved at random; the second is also turned.
    The moves of a step are the same for all its places, so that processes that share a batch agree."""

    def __init__(self, patch_m: float, shift_m: float, step_m: float) -> None:
        if shift_m >= patch_m:
            raise ValueError(f"shift_m={shift_m:g} must be below patch_m={patch_m:g}, or the views share no ground")
        self.patch_m, self.step_m, self.count = patch_m, step_m, round(shift_m / step_m) + 1

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Batch, Turned]:
        height, width = (round(size / self.patch_m) - 1 for size in (batch.height_m, batch.width_m))
        if min(height, width) < 1:
            raise ValueError(f"places of {batch.height_m:g} x {batch.width_m:g} m are too small to move by a patch")
        a, b, c, d = (torch.randint(self.count, (4,), generator=generator) * self.step_m).tolist()
        quarters, mirrored = torch.randint(4, (2,), generator=generator).tolist()
        quarters = quarters if height == width else quarters // 2 * 2

        def turn(image: Tensor) -> Tensor:
            image = image.rot90(quarters, (2, 3))
            return image.flip(3) if mirrored % 2 else image

        batch = batch.only(*(n for n, layer in batch.layers.items() if isinstance(layer, Raster)))
        first = shifted(batch, a, b, (height, width), self.patch_m)
        second = shifted(batch, c, d, (height, width), self.patch_m)
        rasters = {name: second.raster(name) for name in second.layers}
        layers = {n: replace(r, values=turn(r.values), valid=turn(r.valid)) for n, r in rasters.items()}
        return first, Turned(Batch(second.places, layers), turn)


def hide(tokens: Tokens, noise: Tensor, ratio: float | Tensor) -> Tensor:
    """Bool [token]: all tokens of a place but its int((1 - ratio) n) ones of least ``noise`` [place, group, patch]."""
    own = noise[tokens.coords.row, tokens.coords.group, _cell(tokens)]
    everything = torch.full_like(noise, torch.inf)
    everything[tokens.coords.row, tokens.coords.group, _cell(tokens)] = own
    ordered = everything.flatten(1).sort(dim=1).values
    kept = (torch.bincount(tokens.coords.row, minlength=len(noise)) * (1.0 - ratio)).long()
    threshold = ordered.gather(1, kept[:, None].clamp(max=ordered.shape[1] - 1))[:, 0]
    return own >= threshold[tokens.coords.row]


def _cell(tokens: Tokens) -> Tensor:
    at = tokens.coords.cells()
    return at[:, 0] * tokens.memo["grid"][1] + at[:, 1]


def _slot(tokens: Tokens, size: int) -> Tensor:
    cells = tokens.memo["grid"][0] * tokens.memo["grid"][1]
    return tokens.coords.group * size + tokens.coords.row * cells + _cell(tokens)


def _normalised(x: Tensor, valid: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Less its mean over ``dims``, over its standard deviation, counting valid values alone (variance unbiased, eps 1e-6)."""
    count = valid.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * valid).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * valid).sum(dims, keepdim=True) / (count - 1).clamp(min=1)
    return (x - mean) / (variance + 1e-6).sqrt()


def build(variant: str = "", *, encoder: Encoder, **options: Any) -> OmniSatPretraining:
    """OmniSat's pre-training for that encoder. Variants: none; ``no-index`` decodes images without the index bypass."""
    presets: dict[str, dict[str, Any]] = {"": {}, "no-index": {"bypass": False}}
    if variant not in presets:
        raise LookupError(f"objective omnisat has no variant {variant!r}; it has {', '.join(filter(None, presets))}")
    return OmniSatPretraining(encoder, **{**presets[variant], **options})


DROPPED = {r"\.temp_encoding\.weight$": "date codes are computed, for any day"}
"""Keys of published weights that have no counterpart here, by pattern, and why."""


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the published ``MAEOmni`` outside its encoder, under the names used here."""
    out: dict[str, Tensor] = {}
    lasts = {
        key.split(".")[1]: max(
            int(k.split(".")[3]) for k in state if k.startswith(key[: key.index(".decode.")]) and ".decode." in k
        )
        for key in state
        if ".decode." in key
    }
    for key, value in state.items():
        if key == "masked_token":
            out["mask_token"] = value
        elif found := re.match(r"decoder\.projector_([^.]+)\.decode\.(\d+)\.(.*)$", key):
            name, position, rest = found[1], int(found[2]), found[3]
            last = lasts[f"projector_{name}"]
            stage = "" if last == 0 else "last." if position == last else f"refine.{position // 2}."
            out[f"decoders.{name}.{stage}{rest}"] = value
    return out
