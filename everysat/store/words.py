"""Text as a query: words as vectors of the model that made a store, so that a search by them is a search by vectors.

What a store of a model that reads text holds is the mean of what is known of each cell (or chip); what a string says of a place is a Gaussian of
the same space (:meth:`everysat.models.georeset.GeoReset.text`), whose mean is the query. A score is their cosine, the part of the model's match
that differs between cells of one store, but for how sure each cell is, which a store does not keep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everysat.models import weights
from everysat.store.search import model_of, several
from everysat.types import ContractError


def vectors(stores: Any, strings: Sequence[str | Sequence[str]], model: str | Path | None = None) -> np.ndarray:
    """Strings as vectors float32 [n, dim] that compare with those of the stores; in place of a string there may be several ways to say the same.

    Args:
        stores: one, or several of one model.
        model: the weights file, or the name of installed weights, that made the stores; by default looked for among what is installed.

    Raises:
        FileNotFoundError: the model is not installed, or the text encoder is not. ContractError: it is another model than the one that
            made the stores, or one that reads no text.
    """
    (store, *_), said = several(stores), list(strings)
    empty = [s for s in said if not (s.strip() if isinstance(s, str) else any(way.strip() for way in s))]
    if empty or not said:
        raise ValueError(f"strings={said!r:.80}: there is nothing to look for in an empty text")
    path = made_by(store) if model is None else _path(model)
    _fits(store, path)
    encoder: Any = weights.load(path)
    if not hasattr(encoder, "text"):
        raise ContractError(
            f"{store.path} was made by {model_of(store)}, a model of family {encoder.family}, which reads no text; search it by --like or "
            "--vector, or embed with a model that reads text, such as georeset"
        )
    if encoder.dim != store.quantiser.dim:
        raise ContractError(
            f"{path} gives vectors of {encoder.dim} numbers, {store.path} was made of such of {store.quantiser.dim}: give the model that made it"
        )
    found: np.ndarray = store.quantiser.reference(encoder.text(said).mean.numpy().astype(np.float32))
    return found


def made_by(store: Any) -> Path:
    """The installed weights that made a store, known by their hash.

    Raises:
        FileNotFoundError: none are, or the store does not tell.
    """
    wanted = store.model.get("weights")
    folder = weights.installed("any").parent
    for contract in (
        sorted(f for place in (folder, weights.SHIPPED) for f in place.glob("*.safetensors.json")) if wanted else ()
    ):
        if _told(contract).get("sha256") == wanted:
            return contract.with_suffix("")
    what = f"{model_of(store)} (in {folder})" if wanted else "any: the store does not tell which weights made it"
    raise FileNotFoundError(
        f"words need the model that made {store.path}, and none of the installed ones is {what}. Give its weights file: --model FILE"
    )


def _path(model: str | Path) -> Path:
    path = weights.located(model)
    if not path.is_file() or not weights.contract_path(path).is_file():
        raise FileNotFoundError(f"--model {model} is neither a weights file nor the name of installed weights")
    return path


def _fits(store: Any, path: Path) -> None:
    wanted, found = store.model.get("weights"), _told(weights.contract_path(path)).get("sha256")
    if wanted and found != wanted:
        raise ContractError(
            f"{store.path} was made by {model_of(store)}, {path} is another model ({found}): words of one model mean nothing in vectors of another. "
            "Give the model that made the store, or embed again with this one"
        )


def _told(contract: Path) -> dict[str, Any]:
    """What a contract says; nothing if there is none."""
    try:
        found = json.loads(contract.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
