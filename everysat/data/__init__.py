"""Datasets, one file each. ``everysat.data("pastis-hd", root, split="train")`` builds one by its name."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Datasets(ModuleType):
    """This package, which can be called: the function of the catalogue, without loading it before."""

    def __call__(self, name: str, root: Any = None, **options: Any) -> Any:
        from everysat.data.catalogue import dataset

        return dataset(name, root, **options)


sys.modules[__name__].__class__ = _Datasets
