"""Pre-training of OmniSat: contrast between the modalities of a patch, and masked reconstruction of all modalities.

Three quarters of all tokens are replaced by one learned vector; from the fused token of each patch, a decoder per modality
reconstructs its pixels (Astruc et al. 2024, sections 3.2 and 3.3). The contrastive loss acts on the projected tokens, before
positions and fusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everysat.nn.draws import uniform
from everysat.nn.gather import global_mean, row_offset
from everysat.nn.patch import PatchDecoder
from everysat.nn.position import sinusoid
from everysat.objectives.contrastive import Negatives, mil_nce
from everysat.types import Batch, Encoder, Features, Objective, Tokens


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
    ) -> None:
        super().__init__()
        if not 0.0 <= mask_ratio < 1.0:
            raise ValueError(f"mask_ratio={mask_ratio} must be in [0, 1): some tokens have to stay")
        settings: Any = encoder.settings
        self.settings, self.mask_ratio, self.tau, self.negatives = settings, mask_ratio, tau, negatives
        self.top_dates, self.normalise, self.drop_last_date = top_dates, normalise, drop_last_date
        self.modality_dropout = modality_dropout
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
        tokens: Tokens = encoder.tokenize(batch, indices=self.indices)  # type: ignore[call-arg]
        cells, inputs = tokens.memo["grid"][0] * tokens.memo["grid"][1], list(encoder.inputs)
        group = torch.tensor([inputs.index(name) for name in tokens.groups], dtype=torch.long)
        row = row_offset(len(batch), tokens.x.device) + torch.arange(len(batch))[:, None]
        dropped = uniform(generator, row, group) if self.modality_dropout else None
        noise = uniform(generator, row[..., None], group[:, None] * cells + torch.arange(cells))
        noise, dropped = (None if t is None else t.to(tokens.x.device) for t in (noise, dropped))
        return self.terms(encoder, tokens, noise, dropped)

    def terms(
        self, encoder: Encoder, tokens: Tokens, noise: Tensor, dropped: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses for given ``noise`` [place, group, patch], whose largest values are hidden, and ``dropped`` [place, group],
        uniform numbers that decide which modalities are withheld."""
        losses: dict[str, Tensor] = {}
        if self.decoders:
            shown = tokens if dropped is None else tokens[self._kept(tokens, dropped)]
            hidden = hide(shown, noise, self.mask_ratio)
            features: Features = encoder(shown, hidden=hidden, mask_token=self.mask_token)
            losses.update(self._reconstructions(tokens, shown, hidden, features))
        if self.negatives is not None:
            at = tokens.coords
            losses["contrastive"] = mil_nce(
                tokens.x, at.group, at.row, _cell(tokens), tau=self.tau, negatives=self.negatives
            )
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

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
        fused = features.mean.new_zeros(size, features.mean.shape[1]).index_copy(0, where, features.mean)
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
        """Squared error of the dates with the most attention, averaged over hidden patches."""
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
        weight = mask[patches.row] * patches.seen
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


def hide(tokens: Tokens, noise: Tensor, ratio: float) -> Tensor:
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
