"""What a store says of itself: the ``geoemb:`` convention, and what that convention cannot say.

Source: geo-embeddings/embeddings-zarr-convention, version 1 (a proposal). Its gaps: a rule that is neither linear nor a
factor a pixel has no field (here ``everysat`` holds the exact quantiser); the model and the sources must be addresses (a
name becomes ``urn:everysat:...``); nothing says a period; ``utmNN`` does not tell the hemisphere (``proj:code`` does).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from everysat import __version__
from everysat.store.quantise import METHODS, Binary, Float16, Float32, Int8Linear, Quantiser, from_dict

GEOEMB = {
    "schema_url": "https://raw.githubusercontent.com/geo-embeddings/embeddings-zarr-convention/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/geo-embeddings/embeddings-zarr-convention/blob/v1/README.md",
    "uuid": "61c12cc5-0e28-4056-999a-480cf3fb7e4c",
    "name": "geoemb:",
    "description": "Geoembeddings convention for geospatial embedding arrays with model provenance",
}
PROJ = {
    "schema_url": "https://raw.githubusercontent.com/zarr-experimental/geo-proj/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-experimental/geo-proj/blob/v1/README.md",
    "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
    "name": "proj:",
    "description": "Coordinate reference system information for geospatial data",
}
SPATIAL = {
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
    "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
    "name": "spatial:",
    "description": "Spatial coordinate information",
}


def attributes(
    kind: str,
    quantiser: Quantiser,
    *,
    gsd_m: float | None = None,
    period: tuple[str, str] | None = None,
    model: Mapping[str, Any] | None = None,
    source: str | Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``geoemb:`` attributes and, under ``everysat``, quantiser, model and period; everything JSON."""
    sources = [source] if isinstance(source, str) else [str(one) for one in source]
    told: dict[str, Any] = {
        "zarr_conventions": [GEOEMB],
        "geoemb:type": kind,
        "geoemb:dimensions": quantiser.out_dim,
        "geoemb:model": model_address(model or {}),
        "geoemb:source_data": [_address(one, "source") for one in sources] or ["urn:everysat:source:unstated"],
        "geoemb:data_type": quantiser.dtype,
        "geoemb:build_version": f"everysat {__version__}",
        "everysat": {
            "quantiser": quantiser.to_dict(),
            "model": dict(model or {}),
            "period": list(period) if period else None,
            **dict(extra or {}),
        },
    }
    if gsd_m:
        told["geoemb:gsd"] = gsd_m
    if not isinstance(quantiser, Float32) or isinstance(quantiser, Float16):
        told["geoemb:quantization"] = quantization(quantiser)
    return told


def quantization(quantiser: Quantiser) -> dict[str, Any]:
    """The quantization object of the convention; ``method`` is a word of its own only where its meaning is the same."""
    words = {Int8Linear.name: "per_pixel_scale", Binary.name: "binary"}
    told: dict[str, Any] = {
        "method": words.get(quantiser.name, quantiser.name),
        "original_dtype": "float32",
        "quantized_dtype": quantiser.dtype,
    }
    if quantiser.scaled:
        told["scale"] = {"type": "array", "array_name": "scale", "nodata": "NaN"}
    return told


def model_address(model: Mapping[str, Any]) -> str:
    """``url`` of a model where it has one, else a name of its own."""
    if model.get("url"):
        return str(model["url"])
    name, weights = str(model.get("name", "unstated")), model.get("weights")
    return _address(f"{name}@{weights}" if weights else name, "model")


def _address(text: str, what: str) -> str:
    return text if "://" in text or text.startswith("urn:") else f"urn:everysat:{what}:{quote(text, safe='@:.-_')}"


def quantiser_of(attrs: Mapping[str, Any], arrays: Mapping[str, Any], path: Any, width: int, dtype: str) -> Quantiser:
    """The quantiser by which a store says it was written.

    Raises:
        LookupError: it names none that is known here.
    """
    told = attrs.get("everysat", {}).get("quantiser")
    if told:
        try:
            return from_dict(told, arrays)
        except LookupError as error:
            raise LookupError(f"{path} cannot be read: {error.args[0]}. A later version may know it") from error
    method = attrs.get("geoemb:quantization", {}).get("method")
    if method is None and dtype in ("float32", "float64", "float16"):
        return Float32(width)
    if method == "per_pixel_scale" and dtype == "int8":
        return Int8Linear(width)
    raise LookupError(
        f"{path} holds {dtype} codes by the method {method!r}, for which no rule is known here. Give quantiser=..., one of "
        f"{', '.join(sorted(METHODS))}, if you are sure of it"
    )


def period_of(own: Mapping[str, Any]) -> tuple[str, str] | None:
    """The period in what stands under ``everysat``."""
    period = own.get("period")
    return (str(period[0]), str(period[1])) if period else None


@contextmanager
def clearly(path: Path) -> Iterator[None]:
    """Errors of the file system with the path and the next step."""
    hints = {
        errno.ENOSPC: "free space, or write elsewhere; what is finished is kept",
        errno.EDQUOT: "your quota is used up; free space, or write elsewhere",
        errno.EACCES: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in hints:
            raise
        text = f"cannot write {path}: {error.strerror}; {hints[error.errno]}"
        raise type(error)(error.errno, text) from error
