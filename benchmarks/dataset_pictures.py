"""One place of each set of real samples, a picture of every layer and label: docs/datasets_*.png.

    EVERYSAT_DATA=... python -m benchmarks.dataset_pictures

Sets whose imagery may not be redistributed (rsicd, change pairs) are drawn only with ``--all FOLDER``, into that folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

import everysat as es
from everysat.report import stretched
from everysat.types import Batch, Raster

COLUMNS = 6
DOCS = Path(__file__).parents[1] / "docs"
SETS: dict[str, dict[str, Any]] = {
    "chips": {
        "TreeSatAI-TS": ("chips/treesatai", "chips", {}),
        "Sen1Floods11": ("chips/sen1floods11", "chips", {}),
        "CropHarvest": ("chips/cropharvest", "chips", {}),
        "Level-1C, New Zealand": ("chips/s2_nz", "chips", {}),
        "Fields of the World": ("chips/ftw", "chips", {}),
        "GeoLifeCLEF 2022": ("geolifeclef/2022", "geolifeclef", {"split": "all", "folds": 3}),
        "GeoLifeCLEF 2023": ("geolifeclef/2023", "geolifeclef", {"split": "all", "modalities": ["rgbn"]}),
        "NEON": ("neon/plot", "neon_trees", {"split": "all"}),
        "SatCLIP": ("satclip", "satclip_s2", {}),
        "WorldCereal": ("worldcereal/cube", "worldcereal", {"tile_m": 1000.0}),
    },
    "geobench2": {
        name: (f"geobench/{name}", "geobench2_mini", {"split": "all"})
        for name in ("benv2", "biomassters", "dynamic_earthnet", "flair2", "m4sar", "pastis", "spacenet7", "treesatai")
    },
}
RESTRICTED = {
    "restricted": {
        "RSICD": ("rsicd", "rsicd", {}),
        **{
            name: (f"change_pairs/{name}", "change_detection", {"split": "all"})
            for name in ("levir", "dsifn", "beijing")
        },
    }
}


def main() -> None:
    wanted, folder = SETS, DOCS
    if sys.argv[1:2] == ["--all"]:
        wanted, folder = {**SETS, **RESTRICTED}, Path(sys.argv[2])
    for page, sets in wanted.items():
        found = []
        for title, (name, where, options) in sets.items():
            data = es.data(name, Path(os.environ.get("EVERYSAT_DATA", "../shared/data")) / where, **options)
            found += panels(title, data[len(data) // 2])
        draw(found, folder / f"datasets_{page}.png")


def panels(title: str, place: Batch) -> list[tuple[str, str, np.ndarray]]:
    """Of each layer the set, what it is, and the picture; of labels of a whole place, the name of the class."""
    found = []
    for name, layer in place.layers.items():
        if not isinstance(layer, Raster):
            continue
        facts = f"{name}, {len(layer.row)} × {layer.values.shape[1]} × {round(layer.gsd_m, 2):g} m"
        if layer.values[0, 0].numel() == 1:
            facts += f": {said(layer)}"
        found.append((title, facts, picture(layer, len(layer.row) // 2)))
    return found


def said(layer: Raster) -> str:
    values, bands = layer.values[0, :, 0, 0].tolist(), layer.sensor.bands
    if len(bands) > 1:
        return ", ".join(band.name for band, value in zip(bands, values, strict=True) if value)
    return (bands[0].classes or {}).get(int(values[0]), f"{values[0]:.3g}")


def picture(layer: Raster, obs: int) -> np.ndarray:
    """Red, green and blue where there are such, else the first band; class codes by their number; what is not valid stays white."""
    values = np.where(layer.valid[obs].numpy(), layer.values[obs].numpy(), np.nan)
    if layer.sensor.kind == "classes" and len(values) == 1:
        return values[0].astype(np.float64)
    names = {b.name.lower(): i for i, b in enumerate(layer.sensor.bands)}
    for rgb in (("red", "green", "blue"), ("b04", "b03", "b02"), ("b4", "b3", "b2")):
        if set(rgb) <= set(names):
            return stretched(values[[names[n] for n in rgb]])
    if len(values) > 100:
        return stretched(values[[50, 30, 15]])
    return values[0]


def draw(found: list[tuple[str, str, np.ndarray]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(-(-len(found) // COLUMNS), COLUMNS, figsize=(12, 2.45 * -(-len(found) // COLUMNS)))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, facts, image) in zip(axes.flat, found, strict=False):
        if image.size == 1:
            axis.text(0.5, 0.5, "\n".join(wrap(facts, 22)), ha="center", va="center", fontsize=8)
            facts = "of the whole place"
        else:
            colour = {} if image.ndim == 3 else {"cmap": "tab20" if image.dtype == np.float64 else "viridis"}
            axis.imshow(image, interpolation="nearest", **colour)
        axis.set_title(f"{title}\n{facts}", fontsize=7.5, loc="left")
    fig.tight_layout()
    fig.savefig(path, dpi=75)
    plt.close(fig)
    print(path, f"{path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
