"""Low-rank adaptation (LoRA, Hu et al. 2022, eq. 3): a matrix W [out, in] stays, and B A alpha / rank is added to it; A [rank, in] and B
[out, rank] alone learn.

The sum is the layer's ``weight``: also code that multiplies by a part of that weight, past the layer's own forward, gets the adapted
one. B begins at zero, so that an adapted model begins as the model it was, to
the bit; merging writes the sum into W and leaves plain layers of the same outputs, to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from everysat.find import suggest

TARGETS = (
    "*attn.qkv", "*attn.proj", "*attn.key", "*attn.value", "*mlp.fc1", "*mlp.fc2",
    "*to_q", "*to_k", "*to_v", "*to_kv", "*to_qkv", "*to_out", "*feed.w1", "*feed.w2",
)  # fmt: skip
"""Names of the linear layers of attention and of the layers behind it in the models of this package."""


class Adapted(nn.Linear):
    """In place of ``layer``, whose weight becomes ``base`` and whose bias stays. A begins as the weight of a linear layer does."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank, self.alpha = layer.in_features, layer.out_features, rank, alpha
        self.base, self.bias = layer.weight, layer.bias
        self.a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.base.requires_grad_(False)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The sum. In the precision of the weights also under autocast: else merged and unmerged weights would differ."""
        with torch.autocast(self.base.device.type, enabled=False):
            return self.base + (self.alpha / self.rank) * (self.b @ self.a)

    def merged(self) -> nn.Linear:
        """A plain layer with the sum as its weight."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            self.base.copy_(self.weight)
        plain.weight, plain.bias = self.base, self.bias
        return plain.train(self.training)


def attach(module: nn.Module, *, rank: int = 8, alpha: float = 16.0, targets: Iterable[str] = ()) -> tuple[str, ...]:
    """Adapt linear layers of ``module`` in place, whose own weights no longer learn. Other parameters are left alone.

    Args:
        rank, alpha: size of the factors, and what their product is scaled by (over ``rank``).
        targets: names of the layers inside ``module``, in which * and ? stand for anything; :data:`TARGETS` by default.

    Returns:
        Names of the adapted layers.

    Raises:
        LookupError: a target that names no linear layer. ValueError: one that is adapted already, or smaller than ``rank``.
    """
    linear = _linear(module)
    chosen = _chosen(linear, tuple(targets))
    for name in chosen:
        if isinstance(linear[name], Adapted):
            raise ValueError(f"the layer {name!r} is adapted already; merge() it before it is adapted again")
        smaller = min(linear[name].weight.shape)
        if not 1 <= rank <= smaller:
            raise ValueError(
                f"rank={rank} must be from 1 to {smaller}, the smaller side of the weight of {name!r}; lower it, or leave the layer "
                "out of targets"
            )
    for name in chosen:
        _put(module, name, Adapted(linear[name], rank, alpha))
    return chosen


def adapted(module: nn.Module) -> dict[str, Adapted]:
    """The adapted layers inside ``module`` by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Adapted)}


def factors(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, ``<layer>.a`` and ``<layer>.b``."""
    return {f"{name}.{side}": getattr(layer, side) for name, layer in adapted(module).items() for side in ("a", "b")}


def merge(module: nn.Module) -> int:
    """Write each sum into the weight it stands for, in place, and take the factors away: names and outputs are then those of the plain
    module. Returns how many layers were adapted."""
    layers = adapted(module)
    for name, layer in layers.items():
        _put(module, name, layer.merged())
    return len(layers)


def save(module: nn.Module, path: str | Path) -> Path:
    """The factors alone, as safetensors: small, and of use only on top of the weights that they were learned on.

    Raises:
        ValueError: nothing in ``module`` is adapted, or not everywhere with one rank and alpha.
    """
    path = Path(path)
    kinds = {(layer.rank, layer.alpha) for layer in adapted(module).values()}
    if len(kinds) != 1:
        raise ValueError(f"{type(module).__name__} has adapted layers of {len(kinds)} kinds, expected 1; attach() them")
    rank, alpha = kinds.pop()
    tensors = {name: p.detach().cpu().contiguous() for name, p in factors(module).items()}
    beside = path.with_name(f".{path.name}.part")
    save_file(tensors, beside, {"lora": json.dumps({"rank": rank, "alpha": alpha})})
    beside.replace(path)
    return path


def load(module: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Adapt ``module`` in place with factors that :func:`save` wrote. Returns the names of the adapted layers.

    Raises:
        ValueError: the file holds something else, or does not fit the module.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["lora"])
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no low-rank factors ({error}); save() writes such files") from error
    linear = _linear(module)
    names = sorted({name.rpartition(".")[0] for name in saved})
    for name in names:
        shape = tuple(saved[f"{name}.b"].shape[:1] + saved[f"{name}.a"].shape[1:])
        if name not in linear or tuple(linear[name].weight.shape) != shape:
            raise ValueError(
                f"{path}: {type(module).__name__} has no linear layer {name!r} of {shape}. {suggest(name, linear)}"
            )
    attach(module, **facts, targets=names)
    with torch.no_grad():
        for name, parameter in factors(module).items():
            parameter.copy_(saved[name])
    return tuple(names)


def _chosen(linear: dict[str, nn.Linear], targets: tuple[str, ...]) -> tuple[str, ...]:
    for target in targets:
        if not any(fnmatchcase(name, target) for name in linear):
            raise LookupError(f"targets: no linear layer is called {target!r}. {suggest(target, linear)}")
    chosen = tuple(name for name in linear if any(fnmatchcase(name, target) for target in targets or TARGETS))
    if not chosen:
        raise LookupError(f"no linear layer has one of the usual names; name some in targets. {suggest('', linear)}")
    return chosen


def _linear(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if name and isinstance(layer, nn.Linear)}


def _put(module: nn.Module, name: str, layer: nn.Linear) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)
