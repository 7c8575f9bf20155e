"""Time and memory of AnySat: against the plain formulation of the same maths, and as places and series grow.

    python -m benchmarks.anysat speed       # writes benchmarks/results/anysat_speed.json
    python -m benchmarks.anysat scaling     # writes benchmarks/results/anysat_scaling.json

Random weights. Each measurement runs in a process of its own, so that its peak memory is its own; figures are ratios within a
run, or exponents of a power law fitted to it; absolute times hold for the machine named in the result.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks import measuring

CASES: dict[str, dict[str, Any]] = {
    "s2, 240 m, patch 40 m, 24 dates": {"layers": ["s2"], "side_m": 240, "patch_m": 40, "dates": 24},
    "s2, 360 m, patch 10 m, 24 dates": {"layers": ["s2"], "side_m": 360, "patch_m": 10, "dates": 24},
    "s2+s1+aerial, 120 m, patch 20 m, 24 dates": {
        "layers": ["s2", "s1", "aerial"],
        "side_m": 120,
        "patch_m": 20,
        "dates": 24,
    },
}
WAYS = ("plain", "everysat", "everysat-bf16")


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds, peak memory and a sample of the output, in this process."""
    import torch

    from benchmarks.plain_anysat import encode
    from everysat.models import anysat
    from everysat.types import Batch, Place, Raster

    torch.set_num_threads(case.get("threads", 1))
    torch.manual_seed(0)
    plain = {n: {**anysat.MODALITIES[n], "origin": "1970-01-01"} for n in case["layers"]}
    for m in plain.values():
        m |= {"mean": (0.0,) * len(m["bands"]), "std": (1.0,) * len(m["bands"])}
    model = anysat.build(case.get("size", "base"), modalities=plain, **anysat.PUBLISHED).eval()
    for name, parameter in model.named_parameters():  # zeros would hide the relative positions and the queries
        if not parameter.any() or "table" in name:
            torch.nn.init.normal_(parameter, std=0.5 if "table" in name else 0.02)
    days = torch.sort(torch.randint(1, 366, (case["dates"],))).values
    images, layers = {}, {}
    for name in case["layers"]:
        wanted = model.inputs[name]
        px = round(case["side_m"] / wanted.gsd_m)
        obs = case["dates"] if wanted.dated else 1
        image = torch.randn(obs, len(wanted.sensor.bands), px, px)
        times = torch.stack([days, days], 1).double() * 86400.0 if wanted.dated else None
        layers[name] = Raster.of(wanted.sensor, image, wanted.gsd_m, time_s=times)
        images[name] = image[None] if wanted.dated else image
    batch = Batch((Place(case["side_m"], case["side_m"]),), layers)
    view = model.at(patch_m=float(case["patch_m"]), window=case.get("window", 0))
    way = case.get("way", "everysat")

    def run() -> Any:
        if way == "plain":
            return encode(view, images, dict.fromkeys(images, days[None]))[0, 1:]
        return view(view.tokenize(batch)).mean.float()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
        out, cost = measuring.timed(run)
    return {**cost, "sample": out[::7, ::5].tolist()}


def scaling() -> dict[str, Any]:
    """Peak memory (over what the process held before, its input included) and time as one size grows."""
    base = {"layers": ["s2"], "size": "base", "dates": 6, "patch_m": 40, "threads": 2}
    tiny = {"layers": ["s2"], "size": "tiny", "dates": 2, "patch_m": 10, "threads": 2}
    sweeps = {
        "base, side of the place, patch 40 m, 6 dates": (
            [{**base, "side_m": s} for s in (80, 160, 320, 640, 1280, 2560)],
            "side_m",
        ),
        "base, number of dates, 240 m, patch 40 m": (
            [{**base, "side_m": 240, "dates": t} for t in (1, 5, 15, 50, 150)],
            "dates",
        ),
        "tiny, side, patch 10 m, fusion of the whole": (
            [{**tiny, "side_m": s} for s in (160, 320, 640, 1280)],
            "side_m",
        ),
        "tiny, side, patch 10 m, fusion in windows of 12": (
            [{**tiny, "side_m": s, "window": 12} for s in (160, 320, 640, 1280, 2560)],
            "side_m",
        ),
    }
    return measuring.scaling("benchmarks.anysat", sweeps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "scaling", "one"])
    parser.add_argument("case", nargs="?", default="{}", help="JSON, for 'one'")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(measure(json.loads(options.case))))
        return
    found = measuring.ratios("benchmarks.anysat", CASES, WAYS, options.rounds) if options.what == "speed" else scaling()
    measuring.save(f"anysat_{options.what}", str(__doc__).split("\n")[0], found)


if __name__ == "__main__":
    main()
