"""Mean and standard deviation of the bands of layers as a JSON file: what is computed of a dataset and normalises a model's input.

    {"format": "everysat-statistics/1", "source": {...},
     "layers": {"s2": {"sensor": "sentinel-2-l2a", "gsd_m": 10, "bands": ["B02", ...], "unit": ["reflectance", ...],
                       "mean": [...], "std": [...], "count": [...]}}}

Values are in the bands' units; ``count`` is of valid pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everysat.io.output import replacing

FORMAT = "everysat-statistics/1"
PER_BAND = ("bands", "unit", "mean", "std", "count")
Layers = Mapping[str, Mapping[str, Any]]


def save(path: str | Path, layers: Layers, source: Mapping[str, Any]) -> Path:
    """Write the statistics of ``layers``; ``source`` says in JSON-able words what they are of. The file appears complete."""
    path = Path(path)
    content = {"format": FORMAT, "source": dict(source), "layers": {name: dict(layers[name]) for name in layers}}
    load(content)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def load(source: str | Path | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers of a statistics file, or of its content.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no statistics file, or a number in it cannot be.
    """
    name, content = "statistics", source
    if not isinstance(source, Mapping):
        name, content = str(source), _parsed(Path(source))
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ValueError(f"{name} is no statistics file of the format {FORMAT}; make one with: everysat stats")
    layers: dict[str, dict[str, Any]] = content.get("layers", {})
    for layer, entry in layers.items():
        if problem := _problem(entry):
            raise ValueError(f"{name}: layer {layer!r} {problem}; make the file again with: everysat stats")
    return layers


def _parsed(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no statistics file {path}; make one with: everysat stats ... -o {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error


def _problem(entry: Any) -> str:
    """What is wrong with the entry of a layer, if anything."""
    lacks = [key for key in ("sensor", "gsd_m", *PER_BAND) if not isinstance(entry, Mapping) or key not in entry]
    if lacks:
        return f"lacks {', '.join(lacks)}"
    if len({len(entry[key]) for key in PER_BAND}) > 1:
        return "has lists of different lengths"
    if not all(math.isfinite(value) for value in (*entry["mean"], *entry["std"])) or min(entry["std"], default=1) <= 0:
        return "has a mean or std that is not finite, or a std that is not positive"
    return ""
