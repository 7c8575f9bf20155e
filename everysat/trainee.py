"""What is trained, and on what: the encoder that a recipe describes with its objective, devices and processes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from everysat.data.batches import Dataset, Joined, Subset
from everysat.data.statistics import Summary, band_statistics, spread, summarise
from everysat.find import find
from everysat.models import weights
from everysat.nn.inputs import described
from everysat.nn.spectral import LABEL, listing
from everysat.recipe import Recipe, RecipeError, check_options, explain
from everysat.types import Batch, Encoder, Input, Objective, Raster


def launch(recipe: Recipe) -> Any:
    """Devices, precision and processes. Imported here because it costs a second."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    strategy: Any = "auto"
    if recipe.devices > 1:
        # A modality that no place of a batch has leaves its parameters without gradient.
        strategy = DDPStrategy(find_unused_parameters=True)
    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed"}[recipe.precision]
    fabric = Fabric(accelerator=recipe.accelerator, strategy=strategy, devices=recipe.devices, precision=precision)
    fabric.launch()
    return fabric


class Trainee(nn.Module):
    """Encoder and objective as the one module that is run in parallel: its forward is the whole loss."""

    def __init__(self, encoder: Encoder, objective: Objective) -> None:
        super().__init__()
        self.encoder, self.objective = encoder, objective

    def forward(self, held: Held) -> dict[str, Tensor]:
        return self.objective(self.encoder, held.batch, held.generator)


class Held:
    """A batch in a plain object: Fabric casts every tensor that it finds in arguments to the autocast type, dates included."""

    def __init__(self, batch: Batch, generator: torch.Generator) -> None:
        self.batch, self.generator = batch, generator


def build_encoder(recipe: Recipe, data: Sequence[Dataset]) -> Encoder:
    """The encoder that the recipe's ``model`` describes: fresh, or from a weights file."""
    model = recipe.model
    module, variant = find("models", model.name)
    if model.weights is None:
        check_options(module.build, model.options, f"model {model.name}")
        options = model.options
        if options.get("modalities") == "data":
            options = {**options, "modalities": _modalities(model.name, module, options, data)}
        encoder: Encoder = module.build(variant, **options)
    else:
        encoder = weights.load(weights.located(model.weights), **model.options)
        if find("models", encoder.family)[0] is not module:
            raise RecipeError(
                f"model.weights={model.weights} is of family {encoder.family!r}, model.name says {model.name!r}"
            )
    if model.statistics == "data":
        encoder = with_statistics(encoder, data)
    if model.probabilistic is not False:
        encoder = _probabilistic(encoder, {} if model.probabilistic is True else model.probabilistic)
    return encoder.train()


def _probabilistic(encoder: Encoder, options: Mapping[str, Any]) -> Encoder:
    module, _ = find("models", "prommrs")
    if encoder.family == "prommrs":
        raise RecipeError(
            "model.probabilistic: the model is probabilistic already; leave it out, or change its options"
        )
    try:
        wrapped: Encoder = module.wrap(encoder, **options)
    except ValidationError as error:
        wrong = "; ".join(explain(module.Config, e) for e in error.errors(include_url=False))
        raise RecipeError(f"model.probabilistic: {wrong}") from error
    except ValueError as error:
        raise RecipeError(f"model.probabilistic: {error}") from error
    return wrapped


def with_statistics(encoder: Encoder, datasets: Sequence[Dataset]) -> Encoder:
    """The same encoder whose inputs are normalised by the statistics of ``datasets`` together (1000 places, as many of each).
    Inputs that are nowhere in them stay as they are. An encoder for any sensor that lists none gets all layers that it can read."""
    config = json.loads(json.dumps(encoder.config))
    modalities = config.get("modalities")
    each = max(1, 1000 // len(datasets))
    some = [Subset(d, spread(len(d), each)) for d in datasets]
    if encoder.any_sensor and not encoder.inputs:
        return _rebuilt(encoder, {**config, "modalities": _found_in(datasets)})
    if not isinstance(modalities, dict) or not set(encoder.inputs) <= set(modalities):
        raise RecipeError(
            f"model.statistics=data: the config of {encoder.family} lists no modalities; give means in options"
        )
    found = band_statistics(_Only(Joined(some), encoder.inputs), inputs=encoder.inputs, unseen=True)
    for name, (mean, std) in found.items():
        modalities[name] |= {"mean": list(mean), "std": list(std)}
    return _rebuilt(encoder, config)


def _rebuilt(encoder: Encoder, config: dict[str, Any]) -> Encoder:
    again: Encoder = find("models", encoder.family)[0].from_config(config)
    again.load_state_dict(encoder.state_dict())
    return again


def _modalities(name: str, module: Any, options: Mapping[str, Any], datasets: Sequence[Dataset]) -> dict[str, Any]:
    """``modalities: data``: all layers of the data but those of classes, each as the model's ``layer`` says that it takes it."""
    if not hasattr(module, "layer"):
        raise RecipeError(f"model {name} cannot take modalities: data; list them")
    told = {key: value for key, value in options.items() if key != "modalities"}
    every = _contract(datasets).items()
    found = {
        n: {**described(i), **module.layer(i, **told)} for n, i in every if i.sensor.kind != "classes" and n != LABEL
    }
    if not found:
        raise RecipeError(f"model {name}, modalities: data: the data have no layer to take")
    return found


def _contract(datasets: Sequence[Dataset]) -> dict[str, Input]:
    """Layers of the data (1000 places, as many of each dataset). One that datasets have of one sensor has the bands of all; one of another
    sensor is there too, as ``name (sensor)``."""
    each = max(1, 1000 // len(datasets))
    summaries: dict[str, Summary] = {}
    for name, s in (item for d in datasets for item in summarise(Subset(d, spread(len(d), each))).items()):
        before = summaries.get(name)
        if before is not None and before.sensor.name != s.sensor.name:
            name = f"{name} ({s.sensor.name})"
            before = summaries.get(name)
        summaries[name] = s if before is None else before.joined(s)
    moments = {name: s.pool.moments(name, unseen=True) for name, s in summaries.items()}
    return {name: Input(s.sensor, s.gsd_m, *moments[name], dated=s.dated) for name, s in summaries.items()}


def _found_in(datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Modalities of an encoder for any sensor: all layers of the data that it can read."""
    listed = {name: listing(name, wanted) for name, wanted in _contract(datasets).items()}
    found = {name: entry for name, entry in listed.items() if entry is not None}
    if not found:
        raise RecipeError("model.statistics=data: no layer of the data has bands that a model for any sensor can read")
    return found


class _Only:
    """The named layers of a dataset."""

    def __init__(self, dataset: Dataset, names: Iterable[str]) -> None:
        self.dataset, self.names = dataset, tuple(names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        return self.dataset[index].only(*self.names)


def with_absent_layers(encoder: Encoder, batch: Batch) -> Batch:
    """The batch with an empty raster for every input that only other processes have in theirs: what computes over processes
    must be called by all of them."""
    present: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(present, [name for name in encoder.inputs if name in batch.layers])
    absent = [n for n in encoder.inputs if n not in batch.layers and any(n in names for names in present)]
    return batch.adding(**{name: _empty(encoder.inputs[name], batch) for name in absent})


def _empty(wanted: Input, batch: Batch) -> Raster:
    height, width = (math.ceil(size_m / wanted.gsd_m - 1e-4) for size_m in (batch.height_m, batch.width_m))
    return Raster.of(wanted.sensor, torch.zeros(0, len(wanted.sensor.bands), height, width), wanted.gsd_m)
