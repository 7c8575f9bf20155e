"""A comparison on one page: datasets, models, label fractions, modality subsets. Read from YAML, checked before any work begins."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from everysat.find import suggest
from everysat.recipe import Model, Named, RecipeError, Strict, explain, page, with_override

SHIPPED = Path(__file__).parent / "suites"
HOW = ("probe", "knn", "forest", "finetune")
ALL = "100%"


class Disturbance(Strict):
    """What is wrong with the places that test, see :class:`everysat.data.disturbed.Disturbed`; ``of`` is the title of the modality subset that is disturbed."""

    of: str = "all"
    how: Literal["missing", "noise"]
    share: float = Field(default=0.3, gt=0, le=1)
    deviations: float = Field(default=3.0, gt=0)


class Data(Named):
    """A dataset of a suite.

    Attributes:
        level: labels of a ``place`` or of a ``pixel``. target: the layer that holds them.
        parts: which value of the option ``part_option`` gives the places that train, on which settings are chosen, and that test. Without ``val``,
            settings are chosen on groups left out of training.
        folds: values of the option ``fold_option``, each a split of its own; all are tested. None: one split.
        per_place: pixels of a place that are used at most.
        pairs: layers before and after by the name under which a model is shown either, such as ``{rgb: [before, after]}``: features are how those
            of after differ from those of before, and how much; fine-tuning is that of change.
        modalities: layers that are shown, by title; empty for all.
        disturbed: modality subsets, by titles of their own, that are shown whole while training and disturbed in tests.
        labels: which labels train: ``10%`` of each class, ``5/class``. score: the first is what models are compared by.
        gsd_m: of a dense output. published: figures from papers, ``{model, score, value, source}``, printed beside ours.
        leaks: whether parts may share ground or pixels; by default such a dataset is refused. about: what it is, and how it is split, in a sentence or two.
    """

    level: Literal["place", "pixel"] = "place"
    target: str = "label"
    parts: dict[Literal["train", "val", "test"], str] = {"train": "train", "val": "val", "test": "test"}
    part_option: str = "split"
    folds: list[Any] = [None]
    fold_option: str = "fold"
    per_place: int = Field(default=100, ge=1)
    pairs: dict[str, tuple[str, str]] = {}
    modalities: dict[str, list[str]] = {"all": []}
    disturbed: dict[str, Disturbance] = {}
    labels: list[str] = [ALL]
    score: list[str] = ["macro_f1", "accuracy", "micro_f1", "r2", "rmse"]
    published: list[dict[str, Any]] = []
    leaks: bool = False
    about: str = ""

    @field_validator("labels")
    @classmethod
    def _readable(cls, labels: list[str]) -> list[str]:
        for label in labels:
            amount(label)
        return labels

    @model_validator(mode="after")
    def _disturbs_what_is_there(self) -> Data:
        for title, wrong in self.disturbed.items():
            if wrong.of not in self.modalities or title in self.modalities:
                raise ValueError(
                    f"disturbed.{title}: of={wrong.of!r} must be one of {', '.join(self.modalities)}, and the title a new one"
                )
        return self

    @property
    def titles(self) -> tuple[str, ...]:
        """Of all modality subsets, whole and disturbed."""
        return (*self.modalities, *self.disturbed)

    def shown(self, title: str) -> tuple[str, ...]:
        """Layers of a modality subset; empty for all."""
        return tuple(self.modalities[self.whole(title)])

    def whole(self, title: str) -> str:
        """The modality subset that a title disturbs; itself if it does not."""
        return self.disturbed[title].of if title in self.disturbed else title

    @model_validator(mode="after")
    def _has_parts(self) -> Data:
        if not {"train", "test"} <= set(self.parts):
            raise ValueError(f"parts={self.parts} must have train and test")
        return self


class Contender(Strict):
    """A row of the table: a ``baseline`` (see :mod:`everysat.baselines`) with ``options``, or a ``model``.

    Attributes:
        pretrain: a recipe's fields (objective, steps, ...) by which the model first learns from the training places, without their labels.
        at: settings of the model chosen at the call, such as ``patch_m``. pool: what is taken of a place, the encoder's ``summary``, or ``moments``: mean and
            standard deviation of its tokens over the place. finetune: a recipe's fields for ``how: finetune``. how: in place of the suite's.
        trained_on: title of the modality subset that the encoder is trained on; one model is then tested with every subset. By default each subset has a model of its own.
        only: titles of modality subsets, and ``datasets`` on which the row stands, all by default. note: what a reader should know, such as that the weights may have seen related data.
    """

    baseline: str = ""
    options: dict[str, Any] = {}
    model: Model | None = None
    pretrain: dict[str, Any] | None = None
    at: dict[str, Any] = {}
    pool: Literal["summary", "moments"] = "summary"
    finetune: dict[str, Any] = {}
    how: list[Literal["probe", "knn", "forest", "finetune"]] = []
    only: list[str] = []
    trained_on: str = ""
    datasets: list[str] = []
    note: str = ""

    @model_validator(mode="after")
    def _one_kind(self) -> Contender:
        if bool(self.baseline) == (self.model is not None):
            raise ValueError("give either a baseline or a model")
        if self.baseline and (self.pretrain or self.finetune or "finetune" in self.how):
            raise ValueError("a baseline has nothing to train")
        return self


class Suite(Strict):
    """See the fields.

    Attributes:
        name: the default of ``out`` is ``runs/bench/<name>``. title, about: for the report.
        datasets, models: by title. how: what is put on frozen features, or ``finetune``.
        seeds: draws of labels (and of random initialisations) per fold. steps, lr, batch_size: defaults of fine-tuning.
    """

    name: str = Field(min_length=1, pattern=r"^[\w.\-]+$")
    title: str = ""
    about: str = ""
    datasets: dict[str, Data] = Field(min_length=1)
    models: dict[str, Contender] = Field(min_length=1)
    how: list[Literal["probe", "knn", "forest", "finetune"]] = ["probe"]
    seeds: int = Field(default=5, ge=1)
    finetune: dict[str, Any] = {"steps": 200, "batch_size": 16, "lr": 1e-3}
    out: str = ""

    @model_validator(mode="after")
    def _titles_are_known(self) -> Suite:
        for name, row in self.models.items():
            shown = {title: data for title, data in self.datasets.items() if not row.datasets or title in row.datasets}
            for title in row.datasets:
                if title not in self.datasets:
                    raise ValueError(f"models.{name}.datasets: {suggest(title, self.datasets)}")
            for title, data in shown.items():
                if row.trained_on and row.trained_on not in data.modalities:
                    raise ValueError(
                        f"models.{name}.trained_on={row.trained_on!r} is no modality subset of {title}. {suggest(row.trained_on, data.modalities)}"
                    )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/bench/{self.name}")

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Suite:
        """A suite from a YAML file (or the name of one that comes with the package), with ``a.b=c`` overrides. ``${NAME}`` and ``${NAME:-default}`` in texts are replaced by
        the variable of the environment.

        Raises:
            RecipeError: the message names each wrong entry. FileNotFoundError: no such file or name.
        """
        tree, where = page(path, SHIPPED, "suite")
        return cls.parse(tree, overrides, where=where)

    @classmethod
    def parse(cls, tree: Any, overrides: Iterable[str] = (), *, where: str = "suite") -> Suite:
        """A suite from a dict as YAML would give it."""
        for override in overrides:
            tree = with_override(tree, override)
        try:
            return cls.model_validate(_expanded(tree, where))
        except ValidationError as error:
            lines = "\n".join(f"  {explain(cls, e)}" for e in error.errors(include_url=False))
            raise RecipeError(f"{where} cannot be used:\n{lines}") from error

    def cells(self) -> Iterator[Cell]:
        """Every combination that stands in the table."""
        for title, data in self.datasets.items():
            for name, row in self.models.items():
                if row.datasets and title not in row.datasets:
                    continue
                for shown in data.titles:
                    if row.only and shown not in row.only:
                        continue
                    for how in row.how or self.how:
                        if not (how == "finetune" and row.baseline):
                            yield Cell(title, name, shown, how)


@dataclass(frozen=True)
class Cell:
    """One dataset, model, modality subset and way to evaluate; it holds all label fractions, folds and seeds."""

    dataset: str
    model: str
    modalities: str
    how: str

    def __str__(self) -> str:
        return f"{self.dataset} / {self.model} / {self.modalities} / {self.how}"

    @property
    def file(self) -> str:
        return re.sub(r"[^\w.,+-]+", "_", "__".join((self.dataset, self.model, self.modalities, self.how)))


def amount(labels: str) -> tuple[float, int]:
    """``10%`` -> (0.1, 0), ``5/class`` -> (0, 5).

    Raises:
        ValueError: neither of the two.
    """
    share, shots = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", labels), re.fullmatch(r"(\d+)\s*/\s*class", labels)
    if share and 0 < float(share[1]) <= 100:
        return float(share[1]) / 100, 0
    if shots and int(shots[1]):
        return 0.0, int(shots[1])
    raise ValueError(f"labels={labels!r} must look like 10% or 5/class")


def _expanded(tree: Any, where: str) -> Any:
    """``$NAME`` and ``${NAME:-default}`` in every text."""
    if isinstance(tree, dict):
        return {key: _expanded(value, where) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_expanded(value, where) for value in tree]
    if not isinstance(tree, str):
        return tree

    def value(found: re.Match[str]) -> str:
        name, default = found["name"], found["default"]
        if name not in os.environ and default is None:
            raise RecipeError(f"{where}: set the variable {name} of the environment, which {tree!r} needs")
        return os.environ.get(name, default or "")

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", value, tree)
