"""What the training loop asks of an optimiser: parameter groups, the learning rate of a step, an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn import lora
from everysat.recipe import Recipe, RecipeError, Tuning

PROJECTORS = ("encoder.projectors", "encoder.projector", "encoder.project", "encoder.bands", "encoder.patch_embed")
"""What input projections are called, one per modality, in the models of this package."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Factor on the learning rate of a step: linear rise over ``warmup_steps``, then the schedule."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return 1.0
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name lies at or below ``pattern``, in which * and ? stand for anything."""
    return any(fnmatchcase(name, p) for p in (pattern, f"{pattern}.*"))


def freeze(module: nn.Module, patterns: Iterable[str]) -> None:
    """No gradients for parameters whose names match.

    Raises:
        RecipeError: a pattern that matches nothing.
    """
    refuse_unmatched(patterns, [n for n, _ in module.named_parameters()], "freeze")
    for name, parameter in module.named_parameters():
        if any(matches(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def adapt(encoder: nn.Module, tuning: Tuning) -> None:
    """Low-rank factors for the encoder's layers, if the recipe asks for them.

    Raises:
        RecipeError: targets that there are not, or a rank that does not fit.
    """
    if tuning.how == "lora":
        targets = [target.removeprefix("encoder.") for target in tuning.targets]
        try:
            lora.attach(encoder, rank=tuning.rank, alpha=tuning.alpha, targets=targets)
        except (LookupError, ValueError) as error:
            raise RecipeError(f"train: {error}") from error


def restrict(trainee: nn.Module, tuning: Tuning) -> None:
    """No gradients for parameters of ``trainee.encoder`` that are not to learn; see :class:`everysat.recipe.Tuning`.

    Raises:
        RecipeError: the encoder has no projections of these names.
    """
    if tuning.how == "all":
        return
    names = [name for name, _ in trainee.named_parameters() if name.startswith("encoder.")]
    learn: set[str] = set()
    if tuning.how == "lora":
        own = {id(parameter) for parameter in lora.factors(trainee).values()}
        learn = {name for name, parameter in trainee.named_parameters() if id(parameter) in own}
    elif tuning.how == "projector":
        refuse_unmatched(tuning.targets, names, "train.targets")
        learn = {n for n in names if any(matches(n, pattern) for pattern in tuning.targets or PROJECTORS)}
        if not learn:
            raise RecipeError(
                f"train: projector: the encoder has none of {', '.join(PROJECTORS)}; name its own in targets"
            )
    for name, parameter in trainee.named_parameters():
        if name.startswith("encoder.") and name not in learn:
            parameter.requires_grad_(False)


def train_mode(module: nn.Module) -> None:
    """Training mode, but parts that are frozen as a whole behave as when they are used: no dropout, no batch statistics."""
    module.train()
    for part in module.modules():
        own = list(part.parameters())
        if own and not any(p.requires_grad for p in own):
            part.eval()


def adamw(recipe: Recipe, module: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """The optimiser of a recipe, fused where there is such a version."""
    fused = device.type in ("cpu", "cuda")
    groups = parameter_groups(recipe, module)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused)


def parameter_groups(recipe: Recipe, module: nn.Module) -> list[dict[str, Any]]:
    """Parameters by factor on the learning rate (``scale``; the last pattern that matches counts) and by whether weight decay
    holds, which it does for what has at least two dimensions of more than one entry (not for biases, norms, single tokens)."""
    refuse_unmatched(recipe.lr_scale, [n for n, _ in module.named_parameters()], "lr_scale")
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = ([1.0] + [s for pattern, s in recipe.lr_scale.items() if matches(name, pattern)])[-1]
            is_matrix = sum(size > 1 for size in parameter.shape) > 1
            groups.setdefault((scale, recipe.weight_decay if is_matrix else 0.0), []).append(parameter)
    if not groups:
        raise RecipeError(f"freeze={recipe.freeze}, train={recipe.train.how} leaves nothing to train")
    return [{"params": found, "scale": scale, "weight_decay": decay} for (scale, decay), found in groups.items()]


def refuse_unmatched(patterns: Iterable[str], names: Collection[str], what: str) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parts = {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)}
            raise RecipeError(f"{what}: no parameter matches {pattern!r}. {suggest(pattern, parts)}")


class Average:
    """Exponential moving average of parameters: ``average = decay * average + (1 - decay) * parameter`` after each step."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.values, self.parameters, 1.0 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their average."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are their average inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
