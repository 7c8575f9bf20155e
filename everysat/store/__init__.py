"""Stores of embeddings: written window by window, read by any tool that knows Zarr, GeoParquet or GeoTIFF.

The public names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Points": "read", "Store": "read", "open_store": "open", "create": "zarr_store", "StoreWriter": "zarr_store",
    "ChipWriter": "chips", "write_chips": "chips", "write_cog": "cog", "stac_item": "stac", "stac_collection": "stac",
    "write_stac": "stac", "warp": "resample", "Quantiser": "quantise",
}  # fmt: skip
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'everysat.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"everysat.store.{_WHERE[name]}"), name)
