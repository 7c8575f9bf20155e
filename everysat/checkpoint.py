"""The state of a training run as one safetensors file: nothing is pickled, and it appears when it is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from everysat.io.output import replacing


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """``tensors`` and JSON-able ``facts``. A checkpoint that stood there before stays whole until this one is."""
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(copies, partial, metadata={"everysat": json.dumps(facts)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # otherwise the rename may survive a power cut that the content does not


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save` wrote. ValueError when the file is something else or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, json.loads((file.metadata() or {})["everysat"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is no checkpoint of a run, or is damaged ({error}); delete it to begin anew"
        ) from error


def tensors_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, as they are (not copies); one that has several names comes under its first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (f"{prefix}{name}", tensor))
    return dict(found.values())


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's tensors, such as ``optimizer.exp_avg:encoder.proj.weight``."""
    return {
        f"optimizer.{key}:{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore(into: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved values into tensors of the same names and shapes; ValueError when they differ."""
    wrong = sorted(set(into) ^ set(saved)) or [n for n in into if into[n].shape != saved[n].shape]
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the model: {len(wrong)} tensors differ, first {wrong[0]!r}. The code or the recipe "
            "has changed since; use another output folder"
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], saved: Mapping[str, Tensor]
) -> None:
    """The reverse of :func:`optimizer_tensors`, through the optimiser's own ``load_state_dict``."""
    states: dict[str, dict[str, Tensor]] = {}
    for label, value in saved.items():
        if label.startswith("optimizer."):
            key, _, name = label.removeprefix("optimizer.").partition(":")
            states.setdefault(name, {})[key] = value
    tree = optimizer.state_dict()
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    tree["state"] = {i: states[name] for i, name in enumerate(order) if name in states}
    optimizer.load_state_dict(tree)
