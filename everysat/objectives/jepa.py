"""Pre-training of AnySat: predict, from few patches of few dates and sensors, what a teacher says of the others (its section 3.3).

A student sees a part of the patches, of the dates, and of the sensors of each patch; from its features a predictor says what
the teacher, a moving average of the student that sees everything, makes of the hidden patches. Beside it, the tokens of
the sensors of a patch are contrasted before fusion, as in OmniSat. Each step draws one patch size for the dataset at hand.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.attention import Block
from everysat.nn.draws import generator as generator_for
from everysat.nn.draws import uniform
from everysat.nn.gather import gather_rows, global_mean, row_offset
from everysat.nn.position import grid_sinusoid
from everysat.nn.ragged import side_by_side
from everysat.objectives.contrastive import Negatives, mil_nce
from everysat.objectives.masks import BlockMasks, drawn_size, fewer_dates
from everysat.types import Batch, Encoder, Features, Objective, Tokens

Quirk = Literal["shifted_tokens", "shifted_codes", "shifted_queries", "across_heads"]
"""Of the published code, for parity. ``shifted_tokens``: without context tokens, the student sees patch j + 1 - m of sensor m
in place of j. ``shifted_codes``: the predictor gives each patch the position of the one before. ``shifted_queries``: so
does the fusion of the student, with context tokens. ``across_heads``: as in the encoder. (A fourth defect, masks of the
contrastive loss in another order than its tokens, has no switch: here a patch without valid pixels has no token.)"""


@dataclass(frozen=True)
class Draws:
    """The random choices of a step: patches shown, bool [row, cell], and asked for, bool [target, row, cell]; uniform numbers
    [row, group, cell] that say which sensor of a patch is protected (the largest) and which others stay (the smallest)."""

    context: Tensor
    targets: Tensor
    protection: Tensor
    noise: Tensor


class Predictor(nn.Module):
    """From features of shown patches to features of hidden ones, by transformer blocks on both."""

    def __init__(self, dim: int, depth: int, heads: int, *, across_heads: bool = False) -> None:
        super().__init__()
        self.embed, self.project, self.norm = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.class_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, eps=1e-5, across_heads=across_heads) for _ in range(depth))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, shown: Tensor, row: Tensor, code: Tensor, asked: Tensor, asked_code: Tensor, rows: int) -> Tensor:
        """Predictions [asked, dim].

        Args:
            shown, row, code: features [n, dim], the place of each, and its position.
            asked, asked_code: number of the sequence (target x rows + place) of each asked patch, ascending, and its position.
            rows: number of places.
        """
        context, context_there, _ = side_by_side(self.embed(shown) + code, row, rows)
        mask = self.mask_token[0] + asked_code
        sequences = 1 + int(asked.max()) // rows if len(asked) else 1
        targets, targets_there, _ = side_by_side(mask, asked, sequences * rows)
        first = self.class_token.expand(sequences * rows, -1, -1)
        z = torch.cat([first, context.repeat(sequences, 1, 1), targets], 1)
        there = torch.cat([context_there.repeat(sequences, 1), targets_there], 1)
        keep = None if there.all() else F.pad(there, (1, 0), value=True)
        for block in self.blocks:
            z = block(z, None, keep)
        return self.project(self.norm(z[:, 1 + context.shape[1] :][targets_there]))


class Jepa(Objective):
    """Smooth L1 between predictions and the teacher's normalised features, and the contrastive loss.

    Args:
        encoder: an AnySat; the teacher is a copy of it, and what a run saves.
        patch_m: sides of patches that a step draws from; a list, or lists by name of the dataset in the recipe.
        depth, heads: of the predictor. masks: options of :class:`BlockMasks`.
        date_ratio, modality_ratio: shares of the dates, and of the unprotected sensors of shown patches, that are hidden.
        contrastive: weight of the contrastive term (0 leaves it out), with ``tau``, ``negatives`` and ``centred`` of
            :func:`mil_nce`.
        fused: contrast the fused features of all patches too, as one more sensor, with sensors hidden as for the prediction. Not in
            the paper; small models otherwise lose in the fusion what their tokens know.
        targets: the teacher's features are normalised per ``patch`` (layer normalisation, as published), or per feature over the
            ``batch``, which keeps small models from agreeing on a constant.
        momentum: of the teacher at the first step, rising in a line to 1 at the last.
    """

    teacher: Encoder

    def __init__(
        self,
        encoder: Encoder,
        *,
        patch_m: Sequence[float] | Mapping[str, Sequence[float]] = (),
        depth: int = 4,
        heads: int = 16,
        masks: Mapping[str, Any] | None = None,
        date_ratio: float = 0.5,
        modality_ratio: float = 0.5,
        contrastive: float = 1.0,
        tau: float = 0.1,
        negatives: Negatives = "all",
        centred: bool = False,
        fused: bool = False,
        targets: Literal["patch", "batch"] = "patch",
        momentum: float = 0.996,
        quirks: Sequence[Quirk] = (),
    ) -> None:
        super().__init__()
        for name, ratio in {"date_ratio": date_ratio, "modality_ratio": modality_ratio}.items():
            if not 0.0 <= ratio < 1.0:
                raise ValueError(f"{name}={ratio} must be in [0, 1): something has to stay")
        settings: Any = encoder.settings
        if settings.output != "patch":
            raise ValueError(f"output={settings.output!r} of the encoder must be 'patch' in pre-training")
        self.patch_m = patch_m
        spans: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (masks or {}).items()}
        self.masks = BlockMasks(**spans)
        self.date_ratio, self.modality_ratio, self.quirks = date_ratio, modality_ratio, tuple(quirks)
        self.contrastive, self.fused, self.momentum, self.targets = contrastive, fused, momentum, targets
        self.contrast: dict[str, Any] = {"tau": tau, "negatives": negatives, "centred": centred}
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.dim))
        self.predictor = Predictor(settings.dim, depth, heads, across_heads="across_heads" in quirks)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        patch_m = drawn_size(self.patch_m or [encoder.config["patch_m"]], batch.source, "patch_m", generator)
        view, teacher = encoder.at(patch_m=patch_m), self.teacher.at(patch_m=patch_m)
        with torch.no_grad():
            goal = teacher(teacher.tokenize(batch))
        first = row_offset(len(batch), goal.mean.device)
        # In the order of the model's inputs, which all processes share, whatever the order in their part of the batch.
        dated = [name for name, wanted in self.teacher.inputs.items() if wanted.dated]
        tokens = view.tokenize(fewer_dates(batch, dated, self.date_ratio, generator, first))
        draws = self._draws(tokens, patch_m, generator, first)
        return {**self.terms(view, tokens, goal, draws), "patch_m": goal.mean.new_tensor(patch_m)}

    def _draws(self, tokens: Tokens, patch_m: float, generator: torch.Generator, first: int) -> Draws:
        (height, width), places = tokens.memo["grid"], tokens.places
        seed = int(torch.randint(1 << 62, (1,), generator=generator))
        context = torch.zeros(len(places), height, width, dtype=torch.bool)
        targets = torch.zeros(self.masks.targets, len(places), height, width, dtype=torch.bool)
        for row, place in enumerate(places):
            own = math.ceil(place.height_m / patch_m - 1e-4), math.ceil(place.width_m / patch_m - 1e-4)
            drawn = self.masks(own, generator_for(seed, "sizes"), generator_for(seed, "positions", first + row))
            context[row, : own[0], : own[1]], targets[:, row, : own[0], : own[1]] = drawn
        cells, groups = height * width, len(tokens.groups)
        index = torch.arange(groups)[:, None] * cells + torch.arange(cells)
        global_row = (first + torch.arange(len(places)))[:, None, None]
        numbers = [uniform(generator, global_row, index) for _ in range(2)]
        where = (context.flatten(1), targets.flatten(2), *numbers)
        return Draws(*(t.to(tokens.x.device) for t in where))

    def terms(self, view: Encoder, tokens: Tokens, goal: Features, draws: Draws) -> dict[str, Tensor]:
        """Losses for given draws, of the student's ``tokens`` and the teacher's features ``goal``."""
        predicted, wanted = self.predictions(view, tokens, goal, draws)
        losses = {"prediction": global_mean(F.smooth_l1_loss(predicted.float(), wanted.float(), reduction="none"))}
        if self.contrastive:
            losses["contrastive"] = self._contrast(view, tokens, draws)
        return {"loss": losses["prediction"] + self.contrastive * losses.get("contrastive", 0.0), **losses}

    def _contrast(self, view: Encoder, tokens: Tokens, draws: Draws) -> Tensor:
        some = tokens[~_is_context(tokens)]
        x, group, row, cell = some.x, some.coords.group, some.coords.row, _cell(some)
        if self.fused:
            whole: Features = view(tokens, hidden=self._hidden(tokens, draws), mask_token=self.mask_token)
            known = torch.zeros_like(draws.context)
            known[row, cell] = True
            at = _cell_of(whole, tokens.memo["grid"][1])
            keep = known[whole.coords.row, at]  # not what context tokens alone say of a patch
            x = torch.cat([x, whole.mean[keep]])
            group = torch.cat([group, torch.full_like(at[keep], len(tokens.groups))])
            row, cell = torch.cat([row, whole.coords.row[keep]]), torch.cat([cell, at[keep]])
        return mil_nce(x, group, row, cell, **self.contrast)

    def predictions(self, view: Encoder, tokens: Tokens, goal: Features, draws: Draws) -> tuple[Tensor, Tensor]:
        """Predicted and wanted features of the asked patches that the teacher has something to say of, block by block."""
        (height, width), rows = tokens.memo["grid"], len(tokens.places)
        shown = self._shown(view, tokens, draws)
        hidden = self._hidden(shown, draws)
        features: Features = view(shown, hidden=hidden, mask_token=self.mask_token)
        cell = _cell_of(features, width)
        seen = draws.context[features.coords.row, cell]
        row, cell = features.coords.row[seen], cell[seen]
        known = torch.zeros(rows, height * width, dtype=torch.bool, device=cell.device)
        goal_cell = _cell_of(goal, width)
        known[goal.coords.row, goal_cell] = True
        some = torch.bincount(row, minlength=rows) > 0
        block, asked_row, asked = torch.nonzero(draws.targets & known & some[:, None], as_tuple=True)
        table = torch.full((rows, height * width), -1, dtype=torch.long, device=cell.device)
        table[goal.coords.row, goal_cell] = torch.arange(len(goal_cell), device=cell.device)
        code = self._codes(view, height, width).to(features.mean.device)
        predicted = self.predictor(features.mean[seen], row, code[cell], block * rows + asked_row, code[asked], rows)
        return predicted, self._normalised(goal.mean.float())[table[asked_row, asked]]

    def _normalised(self, goal: Tensor) -> Tensor:
        if self.targets == "patch":
            return F.layer_norm(goal, goal.shape[-1:])
        everyone, _ = gather_rows(goal)
        return (goal - everyone.mean(0)) / (everyone.var(0, correction=0) + 1e-6).sqrt()

    def _codes(self, view: Encoder, height: int, width: int) -> Tensor:
        settings: Any = view.settings
        step = settings.patch_m / 10.0 if settings.metric else 1.0
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        code = grid_sinusoid(torch.stack([y, x], -1).reshape(-1, 2) * step, settings.dim)
        return F.pad(code, (0, 0, 1, 0))[:-1] if "shifted_codes" in self.quirks else code

    def _shown(self, view: Encoder, tokens: Tokens, draws: Draws) -> Tokens:
        """Tokens of the shown patches, and all context tokens."""
        coarse = _is_context(tokens)
        if "shifted_tokens" in self.quirks and not coarse.any():
            return self._shifted(view, tokens, draws)
        # Context tokens have no cell on the grid of patches.
        cell = torch.where(coarse, 0, _cell(tokens).clamp(max=draws.context.shape[1] - 1))
        shown = tokens[coarse | draws.context[tokens.coords.row, cell]]
        return replace(shown, memo={**tokens.memo, "shifted_queries": "shifted_queries" in self.quirks})

    def _hidden(self, shown: Tokens, draws: Draws) -> Tensor:
        """Which of the shown tokens the mask token replaces, bool [token]: of each patch one sensor is protected, and of the
        others of a place those of least noise stay."""
        coarse, cell = _is_context(shown), _cell(shown)
        where = (shown.coords.row, shown.coords.group, torch.where(coarse, 0, cell.clamp(max=draws.noise.shape[2] - 1)))
        rows, groups, cells = draws.noise.shape
        there = torch.zeros_like(draws.noise, dtype=torch.bool)
        there[tuple(w[~coarse] for w in where)] = True
        luck = draws.protection.masked_fill(~there, -1.0)
        protected = (luck == luck.max(1, keepdim=True).values) & there
        open_ = (there & ~protected).flatten(1)
        noise = draws.noise.flatten(1).masked_fill(~open_, torch.inf)
        rank = noise.argsort(1).argsort(1)
        stay = rank < (open_.sum(1, keepdim=True) * (1.0 - self.modality_ratio)).long()
        masked = (open_ & ~stay).view(rows, groups, cells)
        return masked[where] & ~coarse

    def after_step(self, encoder: Encoder, step: int, steps: int) -> None:
        momentum = self.momentum + (1.0 - self.momentum) * step / max(1, steps - 1)
        student = dict(encoder.named_parameters())
        names, own = zip(*self.teacher.named_parameters(), strict=True)
        torch._foreach_lerp_(list(own), [student[n].detach() for n in names], 1.0 - momentum)

    def exported(self, encoder: Encoder) -> Encoder:
        """The teacher: the published weights are its own."""
        return self.teacher

    # --- the published code's own way ----------------------------------------------------------------------------------

    def _shifted(self, view: Encoder, tokens: Tokens, draws: Draws) -> Tokens:
        """Tokens as the published student takes them: it drops the first of the list before it picks, so that patch j of sensor m
        becomes j + 1 - m, with the position code of the patch it is, at the place of the one it is not."""
        cells = draws.context.shape[1]
        order = tokens.coords.row * len(tokens.groups) * cells + tokens.coords.group * cells + _cell(tokens)
        table = torch.empty(int(order.max()) + 1, dtype=torch.long).scatter(0, order, torch.arange(len(order)))
        nominal = tokens[draws.context[tokens.coords.row, _cell(tokens)]]
        group, cell = nominal.coords.group, _cell(nominal)
        taken = table[nominal.coords.row * len(tokens.groups) * cells + group * (cells - 1) + cell + 1]
        code = view.positions(tokens)  # type: ignore[operator]
        moved = tokens.x[taken] + code[taken] - view.positions(nominal)  # type: ignore[operator]
        return replace(nominal, x=moved)


def _is_context(tokens: Tokens) -> Tensor:
    return tokens.memo["context"].to(tokens.x.device)[tokens.coords.group]


def _cell(tokens: Tokens) -> Tensor:
    at = tokens.coords.cells()
    return at[:, 0] * tokens.memo["grid"][1] + at[:, 1]


def _cell_of(features: Features, width: int) -> Tensor:
    at = features.coords.cells()
    return at[:, 0] * width + at[:, 1]


def build(variant: str = "", *, encoder: Encoder, **options: Any) -> Jepa:
    """AnySat's pre-training for that encoder; no variants."""
    if variant:
        raise LookupError(f"objective jepa has no variants; got {variant!r}")
    return Jepa(encoder, **options)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the published ``JEPAAnyMulti`` outside its encoders, under the names used here."""
    renames = [
        (r"^masked_token$", "mask_token"),
        (r"^predictor\.cls_token$", "predictor.class_token"),
        (r"^predictor\.predictor_proj\.", "predictor.project."),
        (r"^predictor\.predictor_", "predictor."),
    ]
    out = {}
    for key, value in state.items():
        if not key.startswith("encoder."):
            for pattern, new in renames:
                key = re.sub(pattern, new, key)
            out[key] = value
    return out
