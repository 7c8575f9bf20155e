"""One experiment on one page: what is trained, on what, how. Read from YAML, checked before any work begins."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from everysat.data.augment import Augment
from everysat.data.batches import Tolerant
from everysat.find import find, suggest

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be used. The message names every wrong entry, by its path, and what is expected there."""


class Strict(BaseModel):
    """Fields that cannot be changed, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(Strict):
    """A module by name (see :mod:`everysat.find`) and the options of its ``build``."""

    name: str
    options: dict[str, Any] = {}

    def build(self, kind: str, **more: Any) -> Any:
        """What the named module builds.

        Raises:
            RecipeError: an option that it does not know. LookupError: no such module or variant.
        """
        module, variant = find(kind, self.name)
        check_options(module.build, {**self.options, **more}, f"{kind.rstrip('s')} {self.name}")
        return module.build(variant, **{**self.options, **more})


class Model(Named):
    """``weights``: a file saved by a run or by ``everysat convert`` to begin with; its own sizes then hold, ``name`` must be
    of its family, and ``options`` change its config. ``statistics: data`` normalises inputs by the mean and deviation of the training data instead of those that
    the model brings; for models whose config lists ``modalities`` with ``mean`` and ``std``. ``probabilistic: true`` puts Gaussian heads
    on it, one per modality, and fuses what they say; with options, such as ``{fusion: max_conf}``, see :mod:`everysat.models.prommrs`."""

    weights: str | None = None
    statistics: Literal["model", "data"] = "model"
    probabilistic: bool | dict[str, Any] = False


class Source(Named):
    """A dataset; ``weight`` is the chance of a step to draw from it, relative to the others. ``label`` is what the log and the
    objective call it, by default its name; ``batch_size`` that of its steps, by default the recipe's; ``skip_broken`` the share of its
    places that may be unreadable, see :class:`everysat.data.batches.Tolerant`."""

    weight: float = Field(default=1.0, ge=0)
    label: str = ""
    batch_size: int | None = Field(default=None, ge=1)
    skip_broken: float = Field(default=0.0, ge=0, le=1)

    def build(self, kind: str, **more: Any) -> Any:
        dataset = super().build(kind, **more)
        return Tolerant(dataset, most=self.skip_broken) if self.skip_broken else dataset

    @property
    def called(self) -> str:
        return self.label or self.name


class Tuning(Strict):
    """Which parameters learn. The others stay as they are, to the bit; ``freeze`` holds beside it.

    Attributes:
        how: ``all``; ``head``, those of the task or objective alone; ``projector``, also the encoder's input projections, one per
            modality; ``lora``, also low-rank factors added to linear layers of the encoder (:mod:`everysat.nn.lora`), which the
            finished run writes into its weights.
        rank, alpha: of ``lora``.
        targets: names of the projections (``projector``) or of the linear layers (``lora``), patterns as in ``freeze``; by default
            those that go by the usual names.
    """

    how: Literal["all", "head", "projector", "lora"] = "all"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    targets: list[str] = []

    @model_validator(mode="after")
    def _of_its_kind(self) -> Tuning:
        wrong = (
            self.model_fields_set
            - {"how"}
            - {"lora": {"rank", "alpha", "targets"}, "projector": {"targets"}}.get(self.how, set())
        )
        if any(getattr(self, name) != type(self).model_fields[name].default for name in wrong):
            raise ValueError(f"{', '.join(sorted(wrong))} do nothing with how={self.how}; rank and alpha are of lora")
        return self


class Recipe(Strict):
    """See the fields. Lengths of time are counted in optimiser steps.

    Attributes:
        name: of the run; the default of ``out`` is ``runs/<name>``.
        model, data, validation, objective, task: what is trained on what; either an objective or a task. For several
            sources, each step draws one.
        augment: random changes of training places; ``workers`` threads prepare batches (0: in the loop itself).
        by_length: batches of places with similar numbers of observations, so that little is padded.
        steps, batch_size, accumulate: a step adds up gradients of ``accumulate`` batches of ``batch_size`` places, over all
            devices together.
        lr, weight_decay, betas, eps: of AdamW; weight decay for matrices alone.
        warmup_steps, schedule: linear rise, then half a cosine to 0 or constant.
        lr_scale: factor on ``lr`` for parameters by pattern; ``freeze``: patterns of parameters that stay as they are.
            Names begin with ``encoder.`` or ``objective.`` (also for a task); a pattern is a prefix, or has * and ?.
        train: what learns: ``all``, ``head``, ``projector`` or ``lora``, or these with options, see :class:`Tuning`.
        clip: largest norm of the gradient. ema: decay of an average of the weights, which is then validated and saved.
        precision: fp32, or bf16 for autocast of what tolerates it.
        seed: of every draw. devices, accelerator: how many processes and on what.
        checkpoint_every, validate_every: in steps; 0 for only at the end.
        out: folder. tensorboard: also log there.
    """

    name: str = Field(min_length=1, pattern=r"^[\w.\-]+$")
    model: Model
    data: list[Source] = Field(min_length=1)
    validation: list[Source] = []
    objective: Named | None = None
    task: Named | None = None
    augment: Augment = Augment()
    by_length: bool = False
    steps: int = Field(ge=1)
    batch_size: int = Field(default=16, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_scale: dict[str, Annotated[float, Field(ge=0)]] = {}
    freeze: list[str] = []
    train: Tuning = Tuning()
    clip: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    devices: int = Field(default=1, ge=1)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    workers: int = Field(default=1, ge=0)
    checkpoint_every: int = Field(default=500, ge=0)
    validate_every: int = Field(default=0, ge=0)
    tensorboard: bool = False
    out: str = ""

    @field_validator("train", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return {"how": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if (self.objective is None) == (self.task is None):
            raise ValueError(
                "give either an objective (pre-training) or a task (fine-tuning), not both and not neither"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be fewer than steps={self.steps}")
        if min(self.batch_sizes) < self.devices:
            raise ValueError(f"batch_size={min(self.batch_sizes)} cannot be shared by devices={self.devices}")
        if not sum(source.weight for source in self.data) > 0:
            raise ValueError("data: all weights are 0")
        if self.validate_every and not self.validation:
            raise ValueError("validate_every is set but there is no validation data")
        return self

    @property
    def batch_sizes(self) -> list[int]:
        """Of each source."""
        return [source.batch_size or self.batch_size for source in self.data]

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """A recipe from a YAML file (or the name of one that comes with the package), with ``a.b=c`` overrides.

        Raises:
            RecipeError: the message names each wrong entry. FileNotFoundError: no such file or name.
        """
        tree, where = page(path, SHIPPED, "recipe")
        return cls.parse(tree, overrides, where=where)

    @classmethod
    def parse(cls, tree: Any, overrides: Iterable[str] = (), *, where: str = "recipe") -> Recipe:
        """A recipe from a dict as YAML would give it."""
        if not isinstance(tree, Mapping):
            raise RecipeError(f"{where}: expected keys and values at the top, got {type(tree).__name__}")
        for override in overrides:
            tree = with_override(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            lines = "\n".join(f"  {explain(cls, e)}" for e in error.errors(include_url=False))
            raise RecipeError(f"{where} cannot be used:\n{lines}") from error

    def plain(self) -> dict[str, Any]:
        """All fields as they come back from a JSON file, for comparison."""
        return json.loads(self.model_dump_json())

    def changed(self, **fields: Any) -> Recipe:
        """With these fields replaced, checked again."""
        return Recipe.parse({**self.model_dump(mode="json"), **fields})

    def dump(self, path: str | Path | None = None) -> str:
        """As YAML; fields that have their default value are left out. ``Recipe.load`` of it gives an equal recipe."""
        text = yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
        if path is not None:
            partial = Path(f"{path}.partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        return text


def page(path: str | Path, shipped: Path, what: str) -> tuple[Any, str]:
    """The content of a YAML file, or of one in the folder ``shipped`` by its name, and where it lies.

    Raises:
        FileNotFoundError: no such file or name. RecipeError: it is no YAML.
    """
    file = Path(path)
    if not file.is_file():
        known = [f.stem for f in shipped.glob("*.yaml")]
        if str(path) not in known:
            raise FileNotFoundError(f"no {what} file {path}. {suggest(str(path), known)}")
        file = shipped / f"{path}.yaml"
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=Loader), str(file)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not valid YAML: {error}") from error


def settings(given: Iterable[str]) -> dict[str, Any]:
    """A dict from ``a.b=value`` entries, as on a command line."""
    tree: Any = {}
    for entry in given:
        tree = with_override(tree, entry)
    return dict(tree)


def check_options(build: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Refuse options that ``build`` does not take, or lacks, in words that name the nearest ones."""
    parameters = list(inspect.signature(build).parameters.values())[1:]  # the first is the variant
    named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in named and not takes_any:
            raise RecipeError(f"{what} has no option {option!r}. {suggest(option, named)}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in options]
    if missing:
        raise RecipeError(f"{what} needs the option {missing[0]!r}: give it under options")


class Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4) and a key that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def with_override(tree: Any, override: str) -> Any:
    """A copy of ``tree`` with ``a.b.0.c=value``; the value is YAML. Keys that are missing are made, list entries are not."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r} must look like key.subkey=value")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from error
    return _replaced(tree, path.split("."), value, override)


def _replaced(tree: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    first, rest = keys[0], keys[1:]
    if isinstance(tree, list):
        if not first.isdigit() or int(first) >= len(tree):
            raise RecipeError(f"override {override!r}: {first!r} is no index of a list of {len(tree)} (0 is the first)")
        return [_replaced(e, rest, value, override) if i == int(first) else e for i, e in enumerate(tree)]
    if tree is not None and not isinstance(tree, Mapping):
        raise RecipeError(f"override {override!r}: {first!r} lies below a plain value, {tree!r}")
    below = dict(tree or {})
    if first.isdigit() and int(first) in below:  # class codes and the like
        return {**below, int(first): _replaced(below[int(first)], rest, value, override)}
    return {**below, first: _replaced(below.get(first), rest, value, override)}


def explain(model: type[BaseModel], error: Any) -> str:
    """One line for one error of pydantic, with a suggestion for an unknown key."""
    at = ".".join(map(str, error["loc"])) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        return f"{at}: there is no such key. {suggest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{at}: is missing"
    came = "" if error["type"] == "value_error" else f" (got {error['input']!r:.80})"
    return f"{at}: {error['msg'].removeprefix('Value error, ')}{came}"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the part of a recipe that a path of pydantic leads to."""
    for key in loc:
        if isinstance(key, str) and key in model.model_fields:
            model = next(iter(_models(model.model_fields[key].annotation)), model)
    return list(model.model_fields)


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    """Models that a type annotation mentions: ``Named | None`` and ``list[Source]`` mention one each."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)
