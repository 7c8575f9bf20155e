"""Random forests on features: what tables of bands and dates are usually classified with, and a baseline that is hard to beat there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forest:
    """A fitted forest; features that are NaN go their own way in every tree."""

    trees: Any
    classes: tuple[str, ...]
    kind: str

    def probabilities(self, x: Tensor) -> Tensor:
        """[n, dim] -> [n, class]; of several classes at once each by itself. A class that was never seen has probability 0."""
        found = self.trees.predict_proba(x.numpy())
        if self.kind == "labels":
            parts = zip(found if isinstance(found, list) else [found], self._seen(), strict=True)
            return torch.stack([torch.from_numpy(_of_true(p, seen)) for p, seen in parts], 1).float()
        out = torch.zeros(len(x), len(self.classes))
        out[:, torch.from_numpy(self.trees.classes_)] = torch.from_numpy(found).float()
        return out

    def _seen(self) -> list[Any]:
        seen = self.trees.classes_
        return list(seen) if isinstance(seen, list) else [seen]

    def __call__(self, x: Tensor) -> Tensor:
        """[n, dim] -> [n, 1], for values."""
        return torch.from_numpy(self.trees.predict(x.numpy())).float()[:, None]


def _of_true(probabilities: Any, seen: Any) -> Any:
    """The column of the class True, which training may have lacked."""
    where = [i for i, value in enumerate(seen) if value]
    return probabilities[:, where[0]] if where else probabilities[:, 0] * 0


def fit_forest(
    x: Tensor,
    label: Tensor,
    group: Tensor,
    *,
    classes: Sequence[str],
    trees: int = 300,
    seed: int = 0,
    held_out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Forest:
    """A forest of ``trees`` (Breiman 2001) with the settings of scikit-learn, classes balanced; nothing is chosen, so groups and what is
    ``held_out`` are not looked at.

    Args:
        x: float [n, dim]. label: int64 [n], bool [n, class] or float [n], see :class:`everysat.evaluate.Samples`.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("forests need scikit-learn: pip install 'everysat[bench]'") from error
    if not len(x) == len(label) == len(group):
        raise ValueError(f"x, label and group have {len(x)}, {len(label)} and {len(group)} rows")
    threads = torch.get_num_threads()
    if label.is_floating_point():
        fitted = RandomForestRegressor(trees, random_state=seed, n_jobs=threads).fit(x.numpy(), label.numpy())
        return Forest(fitted, tuple(classes), "values")
    kind, target = ("labels", label.bool().numpy()) if label.ndim == 2 else ("classes", label.numpy())
    with warnings.catch_warnings():  # with one label a class there are as many classes as samples, in every tree
        warnings.filterwarnings("ignore", "The number of unique classes")
        fitted = RandomForestClassifier(trees, random_state=seed, class_weight="balanced", n_jobs=threads).fit(
            x.numpy(), target
        )
    return Forest(fitted, tuple(classes), kind)
