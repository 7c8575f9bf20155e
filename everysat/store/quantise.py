"""Quantisers: named, versioned, invertible codes for embedding vectors, and what each of them costs.

A name is ``method/version``. Code that reads a store asks for exactly the name that is written there: the same codes under
another rule are vectors of another direction and length (the signed-square codes of AlphaEarth read as linear ones lose a
third of the nearest neighbours). A row with NaN is no data and stays no data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from everysat.find import suggest

_TOLERANCE = 1e-2
"""By how much the length of a vector may differ from 1 where a method takes unit vectors."""


@dataclass(frozen=True)
class Quantiser(ABC):
    """A rule that turns vectors [n, dim] into codes [n, width], some with a factor for each row, and back.

    Attributes:
        dim: length of the vectors that go in.
        name: method and version, the key by which stores name it.
        dtype: type of the codes.
        scaled: whether each row has a factor of its own (float32, NaN where there is no data).
        nodata: the code of a row without data, in all columns, of a method that has no factors.
    """

    dim: int
    name: ClassVar[str] = ""
    dtype: ClassVar[str] = "float32"
    scaled: ClassVar[bool] = False
    nodata: ClassVar[float] = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim={self.dim}: a vector has at least one number")

    @property
    def width(self) -> int:
        """Numbers that are stored of each vector."""
        return self.dim

    @property
    def out_dim(self) -> int:
        """Length of the vectors that come out."""
        return self.dim

    @property
    def bytes_per_vector(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize + 4 * self.scaled

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes [n, width] and, for methods with factors, one [n] a row, of vectors float [n, dim]; a row with NaN is no data.

        Raises:
            ValueError: vectors of another length, infinite numbers, or numbers that the method cannot hold.
        """
        x = np.asarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {x.shape}; {self.name} expects [n, {self.dim}]")
        if np.isinf(x).any():
            raise ValueError("x has infinite numbers, which are no vectors; mark what is missing by NaN")
        seen = ~np.isnan(x).any(1)
        codes, scale = self._encode(np.where(seen[:, None], x, np.float32(0)), seen)
        codes[~seen] = self.nodata
        if scale is not None:
            scale = np.where(seen, scale, np.float32(np.nan)).astype(np.float32)
        return codes, scale

    def decode(self, codes: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
        """Vectors float32 [n, out_dim] of codes [n, width]; NaN where there is no data."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.width:
            raise ValueError(f"codes has shape {codes.shape}; {self.name} expects [n, {self.width}]")
        if self.scaled and (scale is None or np.shape(scale) != codes.shape[:1]):
            raise ValueError(f"{self.name} needs scale [n], one factor for each of {len(codes)} rows")
        seen = self.valid(codes, scale)
        factor = None if scale is None else np.where(seen, scale, 0).astype(np.float32)
        x = self._decode(codes, factor)
        x[~seen] = np.nan
        return x

    def valid(self, codes: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
        """bool [...]: which of codes [..., width] and scale [...] are data."""
        if scale is not None:
            return np.isfinite(scale)
        if np.dtype(self.dtype).kind == "f":
            return ~np.isnan(codes).any(-1)
        return (codes != self.nodata).all(-1)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """What decoding approximates: the vectors themselves, unless the method keeps a part of them."""
        return x

    def to_dict(self) -> dict[str, Any]:
        """Name and settings for JSON; :meth:`arrays` holds what is too long for it."""
        return {"name": self.name, "dim": self.dim}

    def arrays(self) -> dict[str, np.ndarray]:
        """Fitted arrays by name, which stores keep beside the codes."""
        return {}

    @abstractmethod
    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]: ...

    @abstractmethod
    def _decode(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray: ...


@dataclass(frozen=True)
class Float32(Quantiser):
    """The vectors as they are."""

    name: ClassVar[str] = "float32/1"
    nodata: ClassVar[float] = float("nan")

    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, None]:
        return x.astype(self.dtype), None

    def _decode(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        return codes.astype(np.float32)


@dataclass(frozen=True)
class Float16(Float32):
    """Half precision: relative error below 2^-11, numbers up to 65504."""

    name: ClassVar[str] = "float16/1"
    dtype: ClassVar[str] = "float16"

    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, None]:
        if x.size and np.abs(x).max() > np.finfo(np.float16).max:
            raise ValueError(f"x reaches {np.abs(x).max():g}, float16 ends at 65504; use float32/1 or int8-linear/1")
        return super()._encode(x, seen)


def _linear(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and factors: the largest number of a row becomes 127, so that the error is at most half a factor."""
    scale = np.abs(x).max(1, initial=0).astype(np.float32) / np.float32(127)
    # A factor below the smallest normal number would turn the quotient to infinity or lose its digits.
    scale[scale < np.finfo(np.float32).tiny] = 0
    divisor = np.where(scale > 0, scale, 1)[:, None]
    return np.clip(np.rint(x / divisor), -127, 127).astype(np.int8), scale


@dataclass(frozen=True)
class Int8Linear(Quantiser):
    """int8 with a factor a vector, max|x| / 127: any length and range; the error of a number is at most max|x| / 254."""

    name: ClassVar[str] = "int8-linear/1"
    dtype: ClassVar[str] = "int8"
    scaled: ClassVar[bool] = True

    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _linear(x)

    def _decode(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        return codes.astype(np.float32) * scale[:, None]


@dataclass(frozen=True)
class Int8Square(Quantiser):
    """The rule of AlphaEarth Foundations for unit vectors: x = sign(v) (|v| / 127.5)^2, no data -128 in all channels.

    Source: Brown et al. 2025, arXiv:2507.22291, and the notes of the published annual layers.
    """

    name: ClassVar[str] = "int8-square/1"
    dtype: ClassVar[str] = "int8"
    nodata: ClassVar[float] = -128

    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, None]:
        length = np.linalg.norm(x[seen], axis=1)
        if length.size and np.abs(length - 1).max() > _TOLERANCE:
            raise ValueError(
                f"{self.name} takes unit vectors, these have lengths {length.min():.4g} to {length.max():.4g}; "
                "divide them by their lengths first, or use int8-linear/1"
            )
        codes = np.rint(np.sign(x) * np.sqrt(np.abs(x)) * 127.5)
        return np.clip(codes, -127, 127).astype(np.int8), None

    def _decode(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        v = codes.astype(np.float32) / np.float32(127.5)
        return v * np.abs(v)


@dataclass(frozen=True)
class Binary(Quantiser):
    """One bit a number, its sign, packed eight to a byte; the factor of a row is the mean of |x|, the best in squares.

    Source of the factor: Rastegari et al. 2016, arXiv:1603.05279, section 3.1.
    """

    name: ClassVar[str] = "binary/1"
    dtype: ClassVar[str] = "uint8"
    scaled: ClassVar[bool] = True

    @property
    def width(self) -> int:
        return -(-self.dim // 8)

    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.packbits(x > 0, axis=1), np.abs(x).mean(1, dtype=np.float64).astype(np.float32)

    def _decode(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        bits = np.unpackbits(codes, axis=1, count=self.dim)
        return (2 * bits.astype(np.float32) - 1) * scale[:, None]


@dataclass(frozen=True, eq=False)
class PcaInt8(Quantiser):
    """The first principal components, as int8 with a factor a vector; decoding gives vectors of full length again.

    ``mean`` float32 [dim] and ``components`` float32 [k, dim] (orthonormal rows) come from :func:`fit`. Components keep
    distances, so that a search may compare codes times factors directly.
    """

    mean: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    components: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32), repr=False)
    name: ClassVar[str] = "pca-int8/1"
    dtype: ClassVar[str] = "int8"
    scaled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean.shape != (self.dim,) or self.components.ndim != 2 or self.components.shape[1] != self.dim:
            raise ValueError(
                f"{self.name} is fitted to vectors: fit('{self.name}', vectors, k=64); "
                f"got mean {self.mean.shape} and components {self.components.shape} for dim={self.dim}"
            )

    @property
    def width(self) -> int:
        return len(self.components)

    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _linear((x - self.mean) @ self.components.T)

    def _decode(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        return (codes.astype(np.float32) * scale[:, None]) @ self.components + self.mean

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "k": self.width}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "components": self.components}


@dataclass(frozen=True)
class Prefix(Quantiser):
    """The first k numbers of vectors trained for it (Matryoshka, Kusupati et al. 2022), at length 1, as int8-linear."""

    k: int = 64
    name: ClassVar[str] = "prefix/1"
    dtype: ClassVar[str] = "int8"
    scaled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.dim:
            raise ValueError(f"k={self.k} is not between 1 and the length of the vectors, {self.dim}")

    @property
    def width(self) -> int:
        return self.k

    @property
    def out_dim(self) -> int:
        return self.k

    def reference(self, x: np.ndarray) -> np.ndarray:
        x = x[:, : self.k]
        length = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        return (x / np.where(length > 0, length, 1)).astype(np.float32)

    def _encode(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _linear(self.reference(x))

    def _decode(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        return codes.astype(np.float32) * scale[:, None]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "k": self.k}


METHODS: dict[str, type[Quantiser]] = {
    method.name: method for method in (Float32, Float16, Int8Linear, Int8Square, Binary, PcaInt8, Prefix)
}
"""By name. A rule that changes gets a new version here; the old one stays, for what is stored under it."""


def get(name: str, dim: int, **options: Any) -> Quantiser:
    """The quantiser ``name`` (``method/version``) for vectors of ``dim`` numbers, such as ``get("prefix/1", 768, k=128)``.

    ``prefix/1:128`` says the same as ``k=128``.

    Raises:
        LookupError: no such name; the message lists the known ones.
        ValueError: options that do not fit it.
    """
    name, _, k = name.partition(":")
    if name not in METHODS:
        raise LookupError(
            f"no quantiser is called {name!r}. {suggest(name, METHODS)} Known: {', '.join(sorted(METHODS))}"
        )
    if k:
        options["k"] = int(k) if k.isdigit() else k
    try:
        return METHODS[name](dim, **options)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options: {', '.join(options)}") from error


def from_dict(told: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Quantiser:
    """The quantiser that :meth:`Quantiser.to_dict` and :meth:`Quantiser.arrays` describe."""
    settings = {key: value for key, value in told.items() if key not in ("name", "dim")}
    arrays = {name: np.asarray(value, np.float32) for name, value in (arrays or {}).items()}
    if arrays:
        settings.pop("k", None)
    return get(str(told.get("name", "")), int(told.get("dim", 0)), **settings, **arrays)


def fit(name: str, x: np.ndarray, **options: Any) -> Quantiser:
    """A quantiser fitted to vectors ``x`` float [n, dim] (rows with NaN are left out): ``fit("pca-int8/1", x, k=64)``, or
    ``fit("pca-int8/1:64", x)``.

    Methods that are not fitted are returned as :func:`get` does.
    """
    x = np.asarray(x, np.float32)
    stem, _, k = name.partition(":")
    if stem != PcaInt8.name:
        return get(name, x.shape[1], **options)
    if k and not k.isdigit():
        raise ValueError(f"{name!r}: k={k} is no number of components; expected one as in {stem}:64")
    x = x[np.isfinite(x).all(1)]
    kept = int(k or options.get("k", 64))
    if not 1 <= kept <= min(x.shape):
        raise ValueError(
            f"k={kept} components of {x.shape[0]} vectors of {x.shape[1]} numbers; k is at most the smaller"
        )
    mean = x.mean(0, dtype=np.float64)
    spread = x - mean
    components = np.linalg.eigh(spread.T @ spread)[1][:, ::-1][:, :kept].T
    # The sign of a component is free; the largest number being positive makes it the same everywhere.
    signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1))
    return PcaInt8(x.shape[1], mean.astype(np.float32), (components * signs).astype(np.float32))


def measure(quantiser: Quantiser, x: np.ndarray, neighbours: int = 10, queries: int = 512) -> dict[str, Any]:
    """What encoding and decoding vectors ``x`` float [n, dim] costs.

    Returns:
        ``relative_l2``: root of the summed squared errors over that of the summed squares of what decoding approximates.
        ``cosine``: mean cosine of the two. ``recall_at_10`` (by ``neighbours``): the share of the ten most similar others
        (cosine of the decoded vectors, among all of ``x``) that belongs to the ten most similar by exact float32 vectors,
        over at most ``queries`` evenly spread rows; equally similar ones count alike. None where there are too few rows.
        ``sample``: number of rows.
    """
    x = np.asarray(x, np.float32)
    x = x[np.isfinite(x).all(1)]
    told: dict[str, Any] = {
        "relative_l2": None,
        "cosine": None,
        f"recall_at_{neighbours}": None,
        "sample": len(x),
        "bytes_per_vector": quantiser.bytes_per_vector,
    }
    if not len(x):
        return told
    wanted = quantiser.reference(x).astype(np.float64)
    found = quantiser.decode(*quantiser.encode(x)).astype(np.float64)
    total = np.square(wanted).sum()
    told["relative_l2"] = round(float(np.sqrt(np.square(found - wanted).sum() / total)), 6) if total else 0.0
    told["cosine"] = round(float((_unit(wanted) * _unit(found)).sum(1).mean()), 6)
    if len(x) > neighbours:
        rows = np.unique(np.linspace(0, len(x) - 1, min(queries, len(x))).astype(int))
        told[f"recall_at_{neighbours}"] = round(_recall(_unit(x), _unit(found), rows, neighbours), 4)
    return told


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def _recall(exact: np.ndarray, found: np.ndarray, rows: np.ndarray, k: int) -> float:
    truth, guess = exact[rows] @ exact.T, found[rows] @ found.T
    for likeness in (truth, guess):
        likeness[np.arange(len(rows)), rows] = -np.inf
    least = np.partition(truth, -k, axis=1)[:, -k]
    nearest = np.argpartition(guess, -k, axis=1)[:, -k:]
    return float((np.take_along_axis(truth, nearest, 1) >= least[:, None] - 1e-6).mean())
