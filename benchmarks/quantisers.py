"""What each quantiser of embeddings costs and saves on real ones: bytes on disk, round-trip error, recall of the ten nearest.

    python -m benchmarks.quantisers [WEIGHTS]      # writes benchmarks/results/quantisers.json

A dense map of features, one vector every 20 m, of a square of the real Sentinel-2 scene of the demo, by the encoder in WEIGHTS (the demo's own when
omitted: run `everysat demo` first) and by the same network untrained. Vectors are brought to length 1. Recall: of 1000 queries
against all of up to 10,000 vectors spread over it, by cosine, against float32. Bytes: of the store on disk, a pixel.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import RESULTS
from everysat import polygons
from everysat.data import berlin
from everysat.data.augment import crop
from everysat.io import grid
from everysat.models import omnisat, weights
from everysat.store import create, open_store
from everysat.store.quantise import METHODS, Quantiser, _recall, _unit, fit, get, measure
from everysat.types import Encoder

GSD_M, SIDE_M, MOST, SHARES = 10.0, 3840.0, 10_000, (4, 2)
"""PCA and prefixes keep a fourth and a half of the numbers."""


def image(encoder: Encoder) -> tuple[np.ndarray, Any]:
    """Unit vectors [dim, y, x] of a square of the scene, and its grid."""
    batch = crop(berlin.build().scene.read(), 0, 0, SIDE_M, SIDE_M)
    mapper = polygons.dense(encoder, 2 * GSD_M)
    with torch.inference_mode():
        values = mapper(batch)[0].float().numpy()
    values /= np.linalg.norm(values, axis=0)
    return values, grid.at_gsd(batch.places[0].geobox, mapper.gsd_m)


def rules(x: np.ndarray) -> dict[str, Quantiser]:
    dim = x.shape[1]
    found = {name: get(name, dim) for name in METHODS if name not in ("pca-int8/1", "prefix/1")}
    for share in SHARES:
        found[f"pca-int8/1, {dim // share} of {dim}"] = fit("pca-int8/1", x, k=dim // share)
        found[f"prefix/1, {dim // share} of {dim}"] = get("prefix/1", dim, k=dim // share)
    return found


def on_disk(rule: Quantiser, values: np.ndarray, box: Any, folder: Path) -> dict[str, float]:
    """Bytes a pixel of a store, and pixels a second of writing and of reading it whole."""
    writer = create(folder / "store.zarr", box, len(values), quantiser=rule)
    start = time.perf_counter()
    for rows, cols in writer.windows():
        writer.write(rows, cols, values[:, rows, cols])
    path = writer.finish()
    written = time.perf_counter()
    pixels = sum(len(part) for part in open_store(path).points())
    read = time.perf_counter()
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "bytes": size / pixels,
        "written_per_s": pixels / (written - start),
        "read_per_s": pixels / (read - written),
    }


def cells(values: np.ndarray, box: Any) -> dict[str, Any]:
    x = values.reshape(len(values), -1).T
    x = x[np.isfinite(x).all(1)]
    sample = x[:: max(1, -(-len(x) // MOST))]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rule in rules(sample).items():
            found[name] = {**measure(rule, sample, queries=1000), **on_disk(rule, values, box, Path(folder))}
    square = get("int8-square/1", x.shape[1])
    codes = square.encode(sample)[0]
    found["int8-square/1 read as linear, which is wrong"] = _misread(sample, codes)
    return found


def _misread(sample: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    linear = codes.astype(np.float32) / 127.5
    rows = np.unique(np.linspace(0, len(sample) - 1, 1000).astype(int))
    return {
        "cosine": round(float((_unit(sample) * _unit(linear)).sum(1).mean()), 6),
        "recall_at_10": round(_recall(_unit(sample), _unit(linear), rows, 10), 4),
    }


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/pretraining/weights.safetensors")
    trained = weights.load(str(path))
    torch.manual_seed(0)
    untrained = omnisat.from_config(trained.config).eval()
    result: dict[str, Any] = {"what": __doc__.split("\n")[0], "machine": platform.processor() or platform.machine()}
    for name, encoder in (("pre-trained", trained), ("untrained", untrained)):
        values, box = image(encoder)
        result[name] = {"dim": len(values), "pixels": int(np.isfinite(values[0]).sum()), "cells": cells(values, box)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quantisers.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
