"""Weights on disk: a safetensors file and, beside it, a JSON contract that says what they belong to and what they expect.

``encoder = load("runs/a/weights.safetensors")``. Nothing is unpickled here but by :func:`convert`, and there with PyTorch's
restricted unpickler, which holds tensors and plain containers alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everysat.find import find, suggest
from everysat.io import statistics as moments
from everysat.io.output import replacing
from everysat.types import ContractError, Encoder, Input, Task

FORMAT = "everysat-weights/1"
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did: the file, how many tensors it holds, and why each dropped key was dropped."""

    path: Path
    kept: int
    dropped: Mapping[str, str]

    def __str__(self) -> str:
        reasons = Counter(self.dropped.values())
        left = "".join(f"\n  {count} left out: {reason}" for reason, count in reasons.items())
        return f"{self.path}: {self.kept} tensors{left}"


def save(
    path: str | Path, encoder: Encoder, task: Task | None = None, provenance: Mapping[str, Any] | None = None
) -> Path:
    """Write ``path`` (.safetensors) and ``path``.json.

    ``provenance``: JSON-able facts for the contract, such as ``source``, ``licence``, ``recipe``.

    Raises:
        LookupError: no module of kind models (or tasks) could rebuild it when loading.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={path} must end in .safetensors")
    _, _ = find("models", encoder.family), (task is None or find("tasks", _name_of(task)))
    parts: dict[str, nn.Module] = {"encoder": encoder} if task is None else {"encoder": encoder, "task": task}
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    contract = {
        "format": FORMAT,
        "family": encoder.family,
        "config": encoder.config,
        "inputs": describe(encoder.inputs),
        "quirks": list(encoder.config.get("quirks", ())),
        "task": None if task is None else {"name": _name_of(task), "config": task.config},
        **(provenance or {}),
    }
    text = json.dumps(contract)  # fails here, before anything is written, if something is not JSON
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", "family": encoder.family})
        digest = _sha256(partial)
    with replacing(contract_path(path)) as partial:
        partial.write_text(json.dumps({**json.loads(text), "sha256": digest}, indent=1) + "\n", encoding="utf-8")
    return path


SHIPPED = Path(__file__).parents[1] / "pretrained"
"""Weights that come with the package; its README is their model card."""


def load(
    name_or_path: str | Path, *, statistics: str | Path | Mapping[str, Any] | None = None, **changes: Any
) -> Encoder:
    """An encoder, in eval mode: from a weights file; by the name (``anysat/base``) under which :func:`convert` installed one; or,
    if there is none, a fresh one, which warns that it knows nothing yet. ``changes`` replace entries of the config; ``modalities`` adds to those of the file: a new name with its
    description gets a new projector with random weights, to be trained on top of the rest; a list of names keeps these alone.
    ``statistics``: a file written by ``everysat stats``, or its content, whose mean and deviation then normalise the layers that it
    names; see :func:`normalised`.

    Raises:
        ContractError: the file is not what its contract says, or the statistics do not fit the model. LookupError: no such model.
        FileNotFoundError: no such file.
    """
    path = located(name_or_path)
    if not _is_file(name_or_path) and not path.is_file():
        module, variant = find("models", str(name_or_path))
        warnings.warn(
            f"{name_or_path} is built with random weights: none are installed under that name. Train it, load a weights file, or "
            f"install published ones (everysat convert {name_or_path} FILE)",
            stacklevel=2,
        )
        encoder: Encoder = module.build(variant, **changes)
    else:
        encoder = _encoder(path, *_read(path), changes)
    return (encoder if statistics is None else normalised(encoder, statistics)).eval()


def normalised(encoder: Encoder, statistics: str | Path | Mapping[str, Any]) -> Encoder:
    """The same encoder, its inputs normalised by these statistics: a file written by ``everysat stats``, or its content.

    Layers are matched by name, bands by theirs, in any order; layers that the statistics lack stay as they are. An encoder for any
    sensor also lists those that only the statistics have.

    Raises:
        ContractError: no layer in common, another sensor or unit, a band that is missing; the message says what to do.
    """
    config = json.loads(json.dumps(encoder.config))
    modalities = config.get("modalities")
    if not isinstance(modalities, dict):
        raise ContractError(f"the config of {encoder.family} lists no modalities that statistics could be put into")
    layers = moments.load(statistics)
    shared = [name for name in encoder.inputs if name in layers and name in modalities]
    if encoder.any_sensor:
        modalities |= {name: _described(entry) for name, entry in layers.items() if name not in shared}
    elif not shared:
        raise ContractError(
            f"the statistics are of the layers {', '.join(layers) or 'none'}, the model has {', '.join(encoder.inputs)}: none in "
            "common. Read the data under the model's names (everysat stats --model), or rename the layers in the file"
        )
    for name in shared:
        mean, std = _moments(encoder.inputs[name], layers[name], name)
        modalities[name] |= {"mean": mean, "std": std}
    again: Encoder = find("models", encoder.family)[0].from_config(config)
    again.load_state_dict(encoder.state_dict())
    return again


def load_task(path: str | Path) -> tuple[Encoder, Task]:
    """Encoder and task of a weights file, both in eval mode. ContractError when the file holds no task."""
    path = Path(path)
    state, contract = _read(path)
    if contract.get("task") is None:
        raise ContractError(f"{path} holds an encoder without a task. Load it with load(), or fine-tune it first")
    encoder = _encoder(path, state, contract, {})
    module, _ = find("tasks", contract["task"]["name"])
    task: Task = module.build(encoder=encoder, **contract["task"]["config"])
    load_strictly(task, _part(state, "task"), f"{path}, task {contract['task']['name']}")
    return encoder.eval(), task.eval()


def convert(
    name: str,
    file: str | Path,
    out: str | Path | None = None,
    *,
    prefix: str = "",
    source: str = "",
    licence: str = "",
    **changes: Any,
) -> Conversion:
    """Published weights to a weights file of this package.

    Args:
        name: model and variant whose sizes they have, such as ``omnisat/treesat``.
        file: .pth, .pt or .ckpt (read with ``weights_only=True``), or .safetensors.
        out: where to write it; by default where :func:`load` finds it by ``name``, see :func:`installed`.
        prefix: of the keys to take, which is cut off; the others are listed as dropped.
        source, licence: for the contract. changes: options of the model's ``build``.

    Raises:
        ContractError: keys or shapes do not fit. ValueError: the file cannot be read safely.
    """
    module, variant = find("models", name)
    if not hasattr(module, "convert"):
        raise LookupError(f"model {name} has no published weights to convert (its module defines no convert)")
    encoder = module.build(variant, **{**getattr(module, "PUBLISHED", {}), **changes})
    published = _read_published(Path(file))
    dropped = {key: f"does not begin with {prefix!r}" for key in published if not key.startswith(prefix)}
    state = {key.removeprefix(prefix): tensor for key, tensor in published.items() if key.startswith(prefix)}
    if not state:
        raise ContractError(f"no key of {file} begins with {prefix!r}; keys look like {', '.join(list(published)[:3])}")
    declared: Mapping[str, str] = getattr(module, "DROPPED", {})
    reasons = {key: why for key in state for pattern, why in declared.items() if re.search(pattern, key)}
    kept = {key: tensor for key, tensor in state.items() if key not in reasons}
    mapped = module.convert(kept, encoder.config)
    _refuse_silent_drops(lambda s: module.convert(s, encoder.config), kept, mapped, name)
    load_strictly(encoder, mapped, f"{file}, converted to {name}")
    if out is None:
        out = installed(name)
        out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"source": source or str(file), "licence": licence, "published_sha256": _sha256(Path(file))}
    dropped.update({f"{prefix}{key}": why for key, why in reasons.items()})
    save(out, encoder, provenance={**facts, "dropped": dropped})
    return Conversion(Path(out), len(mapped), dropped)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """``state`` into ``module``; every difference of keys or shapes is an error that sums them up."""
    own = module.state_dict()
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k} is {list(state[k].shape)}, expected {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    lines = [
        f"  {len(keys)} {title}: {_some(keys)}"
        for title, keys in {"missing": missing, "unexpected": unexpected, "of another shape": shapes}.items()
        if keys
    ]
    if missing and unexpected:
        lines.append(f"  {unexpected[0]}: {suggest(unexpected[0], missing)}")
    if lines:
        raise ContractError(f"{what}: the weights do not fit {type(module).__name__}\n" + "\n".join(lines))
    module.load_state_dict(state)


def describe(inputs: Mapping[str, Input]) -> dict[str, Any]:
    """The band contract as plain JSON: bands in order with unit, mean and std, pixel size."""
    return {
        name: {
            "sensor": wanted.sensor.name,
            "gsd_m": wanted.gsd_m,
            "dated": wanted.dated,
            "bands": [
                {"name": band.name, "unit": band.unit, "mean": mean, "std": std}
                for band, mean, std in zip(wanted.sensor.bands, wanted.mean, wanted.std, strict=True)
            ],
        }
        for name, wanted in inputs.items()
    }


def installed(name: str) -> Path:
    """Where weights that are loaded by name lie: below the folder ``EVERYSAT_WEIGHTS``, or ``~/.local/share/everysat``; or among the few that
    come with the package (:data:`SHIPPED`)."""
    folder = Path(os.environ.get("EVERYSAT_WEIGHTS") or Path.home() / ".local" / "share" / "everysat")
    file = f"{name.replace('/', '-')}.safetensors"
    return SHIPPED / file if (SHIPPED / file).is_file() and not (folder / file).is_file() else folder / file


def located(name_or_path: str | Path) -> Path:
    """The file itself if there is one, or else where weights of that name are installed."""
    return Path(name_or_path) if _is_file(name_or_path) else installed(str(name_or_path))


def contract_path(path: str | Path) -> Path:
    """Where the contract of a weights file lies."""
    return Path(f"{path}.json")


def read_contract(path: Path, form: str, pair: str) -> dict[str, Any]:
    """The contract beside ``path``, of the format ``form``; ``pair`` says which two files there should be.

    Raises:
        FileNotFoundError: one of the two is missing. ContractError: it is no such contract.
    """
    for file in (path, contract_path(path)):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}. {pair}")
    try:
        contract = json.loads(contract_path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{contract_path(path)} is not valid JSON: {error}") from error
    if not isinstance(contract, dict) or contract.get("format") != form:
        raise ContractError(f"{contract_path(path)} is no contract of the format {form}")
    return contract


def _encoder(
    path: Path, state: Mapping[str, Tensor], contract: Mapping[str, Any], changes: Mapping[str, Any]
) -> Encoder:
    module, _ = find("models", contract["family"])
    before = contract["config"].get("modalities", {})
    if "modalities" in changes:
        changes = {**changes, "modalities": _modalities(path, before, changes["modalities"])}
    encoder: Encoder = module.from_config({**contract["config"], **changes})
    if not changes:
        _same_inputs(path, contract["inputs"], json.loads(json.dumps(describe(encoder.inputs))))
    saved = _part(state, "encoder")
    gone = tuple(f"projectors.{name}." for name in before if name not in encoder.inputs)
    new = tuple(f"projectors.{name}." for name in encoder.inputs if name not in before) if before else ()
    saved = {key: tensor for key, tensor in saved.items() if not key.startswith(gone)}
    saved |= {key: tensor for key, tensor in encoder.state_dict().items() if new and key.startswith(new)}
    load_strictly(encoder, saved, f"{path}, encoder {contract['family']}")
    return encoder


def _moments(wanted: Input, entry: Mapping[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Mean and std of an entry of a statistics file in the order of the bands of ``wanted``."""
    advice = "compute them of data read as the model wants it: everysat stats --model"
    if entry["sensor"] != wanted.sensor.name:
        raise ContractError(
            f"the statistics of layer {name!r} are of sensor {entry['sensor']}, the model expects {wanted.sensor.name}; {advice}"
        )
    if missing := [band for band in wanted.sensor.names if band not in entry["bands"]]:
        raise ContractError(
            f"the statistics of layer {name!r} are of the bands {', '.join(entry['bands'])} and lack {', '.join(missing)}; {advice}"
        )
    order = [entry["bands"].index(band) for band in wanted.sensor.names]
    for band, index in zip(wanted.sensor.bands, order, strict=True):
        if entry["unit"][index] != band.unit:
            raise ContractError(
                f"the statistics of layer {name!r} band {band.name} are in {entry['unit'][index]}, the model expects {band.unit}; {advice}"
            )
    return [entry["mean"][i] for i in order], [entry["std"][i] for i in order]


def _described(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a statistics file as a model for any sensor lists it."""
    return {key: entry[key] for key in ("sensor", "bands", "gsd_m", "mean", "std")}


def _modalities(path: Path, before: Mapping[str, Any], wanted: Any) -> dict[str, Any]:
    """Those of a file with new ones added, or some of them."""
    if isinstance(wanted, Mapping):
        return {**before, **wanted}
    for name in wanted:
        if name not in before:
            raise LookupError(f"{path} has no modality {name!r}. {suggest(name, before)}")
    return {name: before[name] for name in wanted}


def _same_inputs(path: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """What the contract promises must be what the rebuilt encoder does: a sensor table may have changed since."""
    for name in dict.fromkeys([*wanted, *found]):
        if wanted.get(name) != found.get(name):
            raise ContractError(
                f"{path}: input {name!r} is {found.get(name)} when rebuilt, the contract says {wanted.get(name)}. The sensor "
                "table or the contract was changed; use the version of everysat that wrote it, or convert it again"
            )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and contract of a weights file, checked against each other."""
    contract = read_contract(path, FORMAT, "Weights are two files, NAME.safetensors and NAME.safetensors.json")
    if contract.get("sha256") != _sha256(path):
        raise ContractError(
            f"{path} is not the file that its contract describes (sha256 differs): damaged, or mixed up"
        )
    try:
        return load_file(path), contract
    except SafetensorError as error:
        raise ContractError(f"{path} is no safetensors file: {error}") from error


def _read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of somebody else's file, without running what may be in it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        tree: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise ValueError(
            f"{path} cannot be read safely: {str(error).splitlines()[0]}. Ask for a file that holds tensors alone, or save its "
            "state_dict as .safetensors on a machine where you trust it"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
            break
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name, neither at the top nor under {', '.join(WRAPPERS)}")
    return tensors


def _refuse_silent_drops(
    mapping: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    state: dict[str, Tensor],
    mapped: Mapping[str, Tensor],
    name: str,
) -> None:
    """Every published tensor must be in the result or its absence must make a difference to it."""
    used = {id(tensor) for tensor in mapped.values()}
    lost = []
    for key in (key for key, tensor in state.items() if id(tensor) not in used):
        try:
            without = mapping({k: v for k, v in state.items() if k != key})
        except (KeyError, IndexError, ValueError):
            continue
        if without.keys() == mapped.keys():
            lost.append(key)
    if lost:
        raise ContractError(
            f"model {name} has no place for {len(lost)} published tensors and gives no reason in DROPPED: {_some(lost)}"
        )


def _part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}


def _name_of(task: Task) -> str:
    return type(task).__module__.removeprefix("everysat.tasks.")


def _is_file(name_or_path: str | Path) -> bool:
    path = Path(name_or_path)
    return isinstance(name_or_path, Path) or path.suffix == ".safetensors" or path.is_file()


def _some(keys: list[str], count: int = 6) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
