"""A joint AnySat on series: a cropland map from few pixels, on the other half of a 1 km cube in Belgium.

    python -m benchmarks.anysat_learning && python -m benchmarks.anysat_cube

The cube has 12 months of Sentinel-2 (9 bands) and Sentinel-1 at 10 m. Its labels are a *product*, cropland as the WorldCereal
model saw it in the same inputs, not ground truth: the scores say how well that map is reproduced. Probes learn from N
pixels of each class of the west half and are tested on the east half, a gap of 50 m between; 5 draws of pixels.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.anysat_learning import DATA, OUT, RESULT
from everysat.baselines import Bands, RandomConvolutions, Statistics
from everysat.data import worldcereal
from everysat.models import anysat, weights
from everysat.nn.mappers import Dense
from everysat.nn.probe import fit_linear
from everysat.nn.scores import confusion_matrix, macro_f1
from everysat.types import Batch, Raster

COUNTS, DRAWS = (5, 20, 100), 5


def whole_series(batch: Batch) -> Tensor:
    """Every band of every month beside each other, missing values as the mean of the band: [channel, y, x]."""
    parts = []
    for raster in batch.layers.values():
        assert isinstance(raster, Raster)
        mean = (raster.values * raster.valid).sum((0, 2, 3)) / raster.valid.sum((0, 2, 3)).clamp(min=1)
        parts.append(torch.where(raster.valid, raster.values, mean[:, None, None]).flatten(0, 1))
    return torch.cat(parts)


def score(x: Tensor, label: Tensor, names: list[str], count: int, seed: int) -> float:
    g = torch.Generator().manual_seed(seed)
    train = []
    for index in range(len(names)):
        at = torch.nonzero(label[:, :47] == index)
        train.append(at[torch.randperm(len(at), generator=g)[:count]])
    at = torch.cat(train)
    known = label[at[:, 0], at[:, 1]]
    probe = fit_linear(
        x[:, at[:, 0], at[:, 1]].T, known, torch.arange(len(at)), classes=tuple(names), seed=seed, weighting="class"
    )
    test = torch.nonzero(label[:, 52:] >= 0) + torch.tensor([0, 52])
    said = probe.probabilities(x[:, test[:, 0], test[:, 1]].T).argmax(1)
    truth = label[test[:, 0], test[:, 1]]
    return float(macro_f1(confusion_matrix(truth, said, len(names), torch.zeros_like(said), 1)[0]))


def main() -> None:
    cube = worldcereal.build("cube", root=DATA / "worldcereal", tile_m=1000.0)[0]
    batch, product = cube.without("label"), cube.raster("label")
    label = torch.where(product.valid, product.values, -1)[0, 0].long()
    codes = product.sensor.bands[0].classes or {}
    names = [codes[code] for code in sorted(codes)]
    trained = weights.load(OUT / "joint" / "weights.safetensors")
    torch.manual_seed(0)
    fresh = anysat.from_config(trained.config).eval()
    g = torch.Generator().manual_seed(0)
    views: dict[str, Any] = {"bands (mean over the year)": Bands(10.0), "image statistics": Statistics(10.0)}
    views["random convolutions"] = RandomConvolutions(10.0, filters=64).fit(batch, g)
    for name, encoder in {"AnySat untrained": fresh, "AnySat pre-trained jointly": trained}.items():
        view = encoder.at(output="dense", dense="s2", patch_m=60.0)
        views[name] = Dense(view, 10.0, 10.0, chip_m=240.0, stride_m=120.0)  # type: ignore[arg-type]
    images = {name: extract(batch)[0].float() for name, extract in views.items()}
    images["all months of all bands"] = whole_series(batch)
    rows = {}
    for name, x in images.items():
        known = torch.isfinite(x).all(0)
        found = {
            n: torch.tensor(
                [score(torch.nan_to_num(x), torch.where(known, label, -1), names, n, s) for s in range(DRAWS)]
            )
            for n in COUNTS
        }
        rows[name] = {f"{n} pixels": [round(float(v.mean()), 4), round(float(v.std()), 4)] for n, v in found.items()}
        print(name, x.shape[0], rows[name], flush=True)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"parts": {}}
    result["cube"] = {"classes": names, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
