"""Any task taught to students of one modality each, by the other modalities or by a teacher. At use, a student sees its own modality alone.

Variants, of which all but ``logits`` and ``features`` are for the encoders of :mod:`everysat.models.students`:

- ``discom``: DisCoM-KD (Ienco and Dantas, BMVC 2024). Nobody teaches: what modalities have in common is told apart from what is a modality's own, through a
  head that all share and an adversary that looks for the modality. Places may have all modalities or one.
- ``contrast``: as MDiCo (Mena et al. 2025), which contrasts what modalities have in common at one place in place of the adversary.
- ``logits``, ``features``: plain distillation from a trained model, also to encoders that are no students. What the teacher says needs no labels: places
  without them teach too. ``discom`` and ``contrast`` take a teacher's logits beside their own terms.
- ``alone``: every modality by itself, on the same networks: what the others are compared with.

Losses and their sources are in :mod:`everysat.nn.distill`. ``students`` gives each modality's encoder and task, which are saved and used as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from everysat.find import find, suggest
from everysat.nn.distill import (
    TERMS,
    Disentangling,
    Parts,
    Witness,
    Witnessed,
    feature_distillation,
    logit_distillation,
)
from everysat.nn.draws import uniform
from everysat.nn.gather import global_mean, row_offset
from everysat.nn.heads import PlaceHead
from everysat.types import Batch, Coords, Encoder, Features, Raster, Task

VARIANTS = ("discom", "contrast", "logits", "features", "alone")
WHOLE = "student"
"""What an encoder is called that is not of several modalities."""


@dataclass(frozen=True)
class Predicted(Raster):
    """The mean of what modalities predict, and what ``each`` predicts, by name."""

    each: Mapping[str, Raster] = field(default_factory=dict)


class Distill(Task):
    """See :func:`build`. ``tasks``: of each modality; ``auxiliary``: what all parts share."""

    def __init__(
        self, tasks: Mapping[str, Task], auxiliary: Task | None, terms: Disentangling | None, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.tasks, self.auxiliary, self.terms = nn.ModuleDict(dict(tasks)), auxiliary, terms
        self.config, self.weights = config, {**dict.fromkeys((*TERMS, "distillation"), 1.0), **config["weights"]}
        first = next(iter(tasks.values()))
        self.target, self.sensor = first.target, first.sensor
        self.of_places = isinstance(cast(Any, first).head, PlaceHead)
        self.projections = nn.ModuleDict()
        self.__dict__["teacher"] = None  # its weights are not this task's

    def _task(self, name: str) -> Any:
        return self.tasks[name]

    def students(self, encoder: Encoder) -> dict[str, tuple[Encoder, Task]]:
        """Encoder and task of each modality, sharing the trained weights."""
        several: Any = encoder
        each = {n: several.one(n) if _of_modalities(encoder) else encoder for n in self.tasks}
        return {name: (one, self._task(name)) for name, one in each.items()}

    def _each(self, features: Features) -> Mapping[str, Witness]:
        """What each modality says."""
        if isinstance(features, Witnessed):
            return features.each
        if list(self.tasks) != [WHOLE]:
            raise ValueError(
                f"features do not say what each of {', '.join(self.tasks)} gives: this task is about several students. For maps, take the file of one"
            )
        seen = torch.zeros(len(features.places), dtype=torch.bool, device=features.summary.device)
        seen[features.coords.row] = True
        none = features.summary[:0]
        return {WHOLE: Witness(features, Parts(none, none, none), Parts(none, none, none), seen)}

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The weighted sum of the terms; ``task_<modality>`` is what the labels cost each modality, ``labelled`` how many there were."""
        said = self._each(self.features(encoder, batch))
        costs = {name: self._cost(self._task(name), w.features, batch, generator) for name, w in said.items()}
        found = {name: terms for name, terms in costs.items() if terms is not None}
        terms = {f"task_{name}": loss for name, (loss, _) in found.items()}
        nothing = sum((w.features.summary.sum() * 0 for w in said.values()), next(encoder.parameters()).sum() * 0)
        task = torch.stack([loss for loss, _ in found.values()]).mean() if found else nothing
        total = {"loss": self.weights["task"] * task, "task": task.detach()}
        if self.terms is not None and said:
            total = self._disentangled(said, batch, task, nothing, generator)
        if self.teacher is not None:
            distilled = self._distilled(said, batch, nothing)
            total = {
                **total,
                "loss": total["loss"] + self.weights["distillation"] * distilled,
                "distillation": distilled.detach(),
            }
        elif self.training and self.config["variant"] in ("logits", "features"):
            raise ValueError(
                "this task was loaded from a file, without its teacher: build it with teacher=FILE to train it"
            )
        count = torch.stack([n for _, n in found.values()]).sum() if found else nothing.detach()
        return {**total, **{name: loss.detach() for name, loss in terms.items()}, "labelled": count}

    def _cost(
        self, task: Task, features: Features, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """What labels cost a head on these features, and how many there are; None where there is none."""
        if self.target not in batch.layers:
            return None
        terms = task(cast(Encoder, _Said(features)), batch, generator)
        return (terms["loss"], terms["labelled"]) if terms["labelled"] else None

    def _disentangled(
        self, said: Mapping[str, Witness], batch: Batch, task: Tensor, nothing: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert self.terms is not None
        assert self.auxiliary is not None
        shared = []
        for w in said.values():
            for part in ("invariant", "informative"):
                mean, summary = (getattr(parts, part) for parts in (w.cells, w.places))
                cost = self._cost(self.auxiliary, replace(w.features, mean=mean, summary=summary), batch, generator)
                shared += [] if cost is None else [cost[0]]
        drawn = {name: self._drawn(w, batch, generator) for name, w in said.items()}
        parts = {name: (w.places if self.of_places else w.cells)[drawn[name][0]] for name, w in said.items()}
        same = _same([drawn[name][1] if name in drawn else None for name in self.terms.modalities])
        return self.terms(parts, task, torch.stack(shared).mean() if shared else nothing, same)

    def _drawn(self, w: Witness, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which places (or cells, at most ``cells`` a batch, the same of all modalities) the modality is compared in: their numbers, and what they are
        called, int64 [n, 3] of place, row and column."""
        if self.of_places:
            index = w.observed.nonzero()[:, 0]
            return index, torch.stack([index, 0 * index, 0 * index], 1)
        coords, most = w.features.coords, self.config["cells"]
        keys = _keys(coords)
        row = coords.row + row_offset(len(batch), coords.row.device)
        fixed = torch.Generator().manual_seed(generator.initial_seed())  # alike for all modalities
        noise = uniform(fixed, row.cpu(), (keys[:, 1] * (1 << 24) + keys[:, 2]).cpu()).to(keys.device)
        index = noise.argsort()[:most].sort().values
        return index, keys[index]

    # --- teachers -----------------------------------------------------------------------------------------------------

    def taught_by(self, encoder: Encoder, task: Task) -> None:
        """Learn from this model, which stays as it is.

        Raises:
            ValueError: it predicts something else.
        """
        if task.sensor.names != self.sensor.names:
            raise ValueError(
                f"the teacher predicts {', '.join(task.sensor.names)}, this task {', '.join(self.sensor.names)}: they must be the same, in the same order"
            )
        mine, its = (one.config.get("gsd_m") for one in (self._task(next(iter(self.tasks))), task))
        if mine != its:
            raise ValueError(
                f"the teacher predicts {'places' if its is None else f'pixels of {its:g} m'}, this task {'places' if mine is None else f'pixels of {mine:g} m'}: "
                "give both the same gsd_m"
            )
        self.__dict__["teacher"] = (encoder.eval().requires_grad_(False), task.eval().requires_grad_(False))

    def _distilled(self, said: Mapping[str, Witness], batch: Batch, nothing: Tensor) -> Tensor:
        """What students miss of what the teacher says, which sees all that it knows of the batch."""
        model, its = cast(tuple[Encoder, Task], self.teacher)
        encoder, task = model.to(nothing.device), its.to(nothing.device)
        with torch.no_grad():
            features = task.features(encoder, batch.without(self.target))
            told = task.predict(features, batch) if self.config["variant"] != "features" else None
        each = [
            self._features(self.projections[name], w, features)
            if told is None
            else self._predictions(self._task(name), w, told, batch)
            for name, w in said.items()
        ]
        return torch.stack(each).mean() if each else nothing

    def _predictions(self, task: Any, w: Witness, told: Raster, batch: Batch) -> Tensor:
        values, seen = task.head(w.features, batch)
        height, width = (min(values.shape[axis], told.values.shape[axis]) for axis in (2, 3))
        values, seen, said = (x[..., :height, :width] for x in (values, seen, told.values))
        keep = seen & told.valid[:, 0, :height, :width]
        mine, said = values.movedim(1, -1)[keep], said.movedim(1, -1)[keep]
        if self.sensor.kind != "classes":
            return global_mean((mine - (said - task.mean) / task.std).square())
        multilabel = bool(getattr(task, "multilabel", False))
        said = said.clamp(1e-7, 1 - 1e-7)
        logits = said.logit() if multilabel else said.log()
        return logit_distillation(mine, logits, temperature=self.config["temperature"], multilabel=multilabel)

    def _features(self, projection: nn.Module, w: Witness, teacher: Features) -> Tensor:
        if self.of_places:
            observed = torch.zeros_like(w.observed)
            observed[teacher.coords.row] = True
            keep = w.observed & observed
            return feature_distillation(projection(w.features.summary[keep]), teacher.summary[keep])
        mine, its = w.features.coords, teacher.coords
        if len(mine) and len(its) and not torch.allclose(mine.size_m[:1], its.size_m[:1], rtol=1e-3):
            raise ValueError(
                f"the student's tokens are of {float(mine.size_m[0]):g} m, the teacher's of {float(its.size_m[0]):g} m: distil logits, which have the label's pixels"
            )
        both = _same([_keys(mine), _keys(its)])
        both = both[(both >= 0).all(1)]
        return feature_distillation(projection(w.features.mean[both[:, 0]]), teacher.mean[both[:, 1]])

    # --- predictions --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Predicted:
        """The mean of the predictions of the modalities that observed a place or pixel, and those of each."""
        each = {name: self._task(name).predict(w.features, batch) for name, w in self._each(features).items()}
        if not each:
            raise ValueError(f"no layer of {', '.join(self.tasks)} is there to predict from")
        rasters = list(each.values())
        seen = torch.stack([r.valid for r in rasters])
        total = torch.stack([torch.where(r.valid, r.values, 0.0) for r in rasters]).sum(0)
        first = rasters[0]
        return Predicted(
            first.sensor,
            total / seen.sum(0).clamp(min=1),
            seen.any(0),
            first.time_s,
            first.row,
            first.gsd_m,
            None,
            each,
        )

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions and labels of all modalities, one after the other; the last column of predictions is the number of the modality."""
        each = prediction.each if isinstance(prediction, Predicted) else {next(iter(self.tasks)): prediction}
        found = []
        for number, name in enumerate(self.tasks):
            if name in each:
                said, label = self._task(name).pairs(each[name], batch)
                said = said[:, None] if said.ndim == 1 else said
                found.append((torch.cat([said, torch.full_like(said[:, :1], number)], 1), label))
        said, label = (torch.cat(part) for part in zip(*found, strict=True))
        return said, label

    def metrics(self) -> Mapping[str, Any]:
        """Of each modality, ``<modality>_<metric>``."""
        return {
            f"{name}_{metric}": _OfModality(one, number, self.sensor.kind == "classes")
            for number, name in enumerate(self.tasks)
            for metric, one in self._task(name).metrics().items()
        }


class _Said:
    """In place of an encoder, for a task below: these features."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def tokenize(self, batch: Batch) -> None:
        return None

    def __call__(self, tokens: None) -> Features:
        return self.features


class _Narrow:
    """An encoder as the shared head sees it: one part wide."""

    def __init__(self, encoder: Encoder, dim: int) -> None:
        self._encoder, self.dim = encoder, dim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


class _OfModality:
    """A metric of the predictions of one modality; NaN where it made none."""

    def __init__(self, metric: Any, number: int, classes: bool) -> None:
        self.metric, self.number, self.classes, self.seen = metric, number, classes, 0

    def to(self, device: Any) -> _OfModality:
        self.metric = self.metric.to(device)
        return self

    def update(self, said: Tensor, label: Tensor) -> None:
        mine = said[:, -1] == self.number
        self.seen += int(mine.sum())
        if mine.any():
            self.metric.update(said[mine, :-1] if self.classes else said[mine, 0], label[mine])

    def compute(self) -> Tensor:
        return self.metric.compute() if self.seen else torch.tensor(torch.nan)


def _keys(coords: Coords) -> Tensor:
    return torch.cat([coords.row[:, None], coords.cells()], 1)


def _same(keys: list[Tensor | None]) -> Tensor:
    """Numbers of the samples that have the same key [n, 3], int64 [key, modality]; -1 where a modality has none."""
    there = [(number, key) for number, key in enumerate(keys) if key is not None]
    every, where = torch.unique(torch.cat([key for _, key in there]), dim=0, return_inverse=True)
    slot = torch.full((len(every), len(keys)), -1, device=every.device)
    for (number, key), at in zip(there, where.split([len(key) for _, key in there]), strict=True):
        slot[at, number] = torch.arange(len(key), device=every.device)
    return slot


def build(
    variant: str = "discom",
    *,
    encoder: Encoder,
    task: Mapping[str, Any],
    teacher: str | None = None,
    weights: Mapping[str, float] | None = None,
    temperature: float = 4.0,
    tau: float = 0.1,
    strength: float = 1.0,
    hidden: int = 0,
    adversary: Literal["learned", "solved"] = "learned",
    cells: int = 512,
    released: bool = False,
    teacher_dim: int | None = None,
) -> Distill:
    """A task for students.

    Args:
        variant: one of :data:`VARIANTS`, see the module's text.
        task: ``{"name": "classify/place", "options": {...}}``, what is to be predicted.
        teacher: weights file of a model with a task that predicts the same; it may read other layers and be of any size. For ``logits`` and ``features``, and
            beside the terms of ``discom`` and ``contrast``.
        weights: of the terms ``task``, ``auxiliary``, ``modality``, ``invariance``, ``orthogonality`` and ``distillation``, 1 where not given.
        temperature: of distilled logits. tau: of the contrast.
        adversary: of ``discom``: ``learned`` through a reversed gradient, as published; or ``solved``, the best linear one at each step
            (:func:`everysat.nn.distill.told_apart`), with a weight of ``invariance`` such as 10. After the first, a fresh linear probe still tells modalities apart.
        strength: of the adversary's reversed gradient. hidden: width of a hidden layer of the adversary, 0 for the linear one of the paper. It learns faster than the
            rest with ``lr_scale: {objective.terms.discriminator: 10}`` in the recipe.
        cells: of a batch in which modalities are compared, at most, when pixels are predicted.
        released: losses of the released script of DisCoM-KD, with its defects; for two modalities.
        teacher_dim: width of the teacher's features, in files.

    Raises:
        ValueError, LookupError: the options do not fit together; the message says which.
    """
    variant = variant or "discom"
    _refuse(variant, encoder, task, weights or {}, adversary, released)
    if not temperature > 0 or cells < 2 or hidden < 0:
        raise ValueError(
            f"temperature={temperature} must be above 0, cells={cells} at least 2, hidden={hidden} not negative"
        )
    several: Any = encoder
    students = {n: several.one(n) for n in several.names} if _of_modalities(encoder) else {WHOLE: encoder}
    module, inner = find("tasks", task["name"])
    given = {**({"variant": inner} if inner else {}), **task.get("options", {})}
    tasks = {name: module.build(encoder=student, **given) for name, student in students.items()}
    first: Any = next(iter(tasks.values()))
    if not hasattr(first, "head"):
        raise ValueError(f"task {task['name']} has no head of its own: distil classify or regress")
    terms = auxiliary = None
    if variant in ("discom", "contrast"):
        dim, own = encoder.dim // 2, {name: weight for name, weight in (weights or {}).items() if name in TERMS}
        invariance = "contrastive" if variant == "contrast" else "solved" if adversary == "solved" else "adversarial"
        options: dict[str, Any] = {"tau": tau, "strength": strength, "hidden": hidden, "released": released}
        terms = Disentangling(list(tasks), dim, invariance=invariance, weights=own, **options)  # type: ignore[arg-type]
        narrow = _Narrow(next(iter(students.values())), dim)
        auxiliary = module.build(encoder=narrow, **{**given, "local": ()} if "local" in given else given)
    config = {
        "variant": variant, "task": {"name": task["name"].partition("/")[0], "options": first.config}, "teacher": None, "teacher_dim": teacher_dim,
        "weights": dict(weights or {}), "temperature": temperature, "tau": tau, "strength": strength, "hidden": hidden, "adversary": adversary, "cells": cells, "released": released,
    }  # fmt: skip
    made = Distill(tasks, auxiliary, terms, config)
    _teach(made, {name: student.dim for name, student in students.items()}, teacher, teacher_dim)
    return made


def _of_modalities(encoder: Encoder) -> bool:
    return encoder.family == "students"


def _refuse(
    variant: str,
    encoder: Encoder,
    task: Mapping[str, Any],
    weights: Mapping[str, float],
    adversary: str,
    released: bool,
) -> None:
    if variant not in VARIANTS:
        raise LookupError(f"task distill has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    known = (*TERMS, "distillation")
    for name in weights:
        if name not in known:
            raise LookupError(f"weights name the term {name!r}. {suggest(name, known)}")
    if "name" not in task or set(task) - {"name", "options"}:
        raise ValueError(f"task={dict(task)!r} must say what to predict, as {{name: classify/place, options: {{...}}}}")
    if adversary not in ("learned", "solved"):
        raise LookupError(f"adversary={adversary!r} is unknown. {suggest(adversary, ('learned', 'solved'))}")
    if released and (variant != "discom" or adversary != "learned"):
        raise ValueError(
            f"released=True is for the variant discom with its learned adversary, not for {variant}, adversary={adversary}"
        )
    if not _of_modalities(encoder) and variant not in ("logits", "features"):
        raise ValueError(
            f"distill/{variant} is for encoders of single modalities, {encoder.family} is none: take the model students"
        )


def _teach(task: Distill, dims: Mapping[str, int], teacher: str | None, teacher_dim: int | None) -> None:
    """Give it its teacher, or what is left of it in a file."""
    variant = task.config["variant"]
    if teacher is None and variant == "logits" and not task.config["teacher_dim"]:
        raise ValueError("distill/logits needs teacher: a weights file of a model with a task")
    if teacher is None and variant == "features" and teacher_dim is None:
        raise ValueError("distill/features needs teacher: a weights file of a model with a task")
    if teacher is not None:
        if variant == "alone":
            raise ValueError("distill/alone has no teacher: take logits or features, or leave teacher out")
        # Tasks do not import models, which read weights.
        model, its = find("models", "students")[0].teacher(teacher)
        task.taught_by(model, its)
        teacher_dim = task.config["teacher_dim"] = model.dim
    if variant == "features" and teacher_dim is not None:
        task.projections.update({name: nn.Linear(dim, teacher_dim) for name, dim in dims.items()})
