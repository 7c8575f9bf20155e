"""Time and memory of RAMEN: against the plain formulation of the same maths, and as images, series and the target size change.

    python -m benchmarks.ramen speed       # writes benchmarks/results/ramen_speed.json
    python -m benchmarks.ramen scaling     # writes benchmarks/results/ramen_scaling.json

Random weights of the published size. Each measurement runs in a process of its own with one thread; figures are ratios within
a run, or exponents of a power law; memory is what the process grew by beyond weights and input.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks import measuring

S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
CASES: dict[str, dict[str, Any]] = {
    "512 px, 30 -> 480 m": {"px": 512, "native_m": 30, "gsd_m": 480, "bands": 6},
    "512 px, 0.2 -> 3 m": {"px": 510, "native_m": 0.2, "gsd_m": 3, "bands": 4},
    "128 px, 10 -> 40 m": {"px": 128, "native_m": 10, "gsd_m": 40, "bands": 10},
    "128 px, 10 -> 40 m, 6 dates, optical and radar": {
        "px": 128,
        "native_m": 10,
        "gsd_m": 40,
        "bands": 10,
        "dates": 6,
        "radar": True,
    },
    "decoding, 34 x 34 cells of 3 m -> 510 px of 0.2 m": {
        "decode": True,
        "px": 510,
        "native_m": 0.2,
        "gsd_m": 3,
        "bands": 4,
    },
}
WAYS = ("plain", "everysat")


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds, memory and a sample of the output, in this process."""
    import torch

    from everysat.models import ramen

    torch.set_num_threads(case.get("threads", 1))
    torch.manual_seed(0)
    antialias = case.get("antialias", False)
    model = ramen.build(
        "base", gsd_m=case["gsd_m"], output="layer", antialias=antialias, quirks=("stretched",) * (not antialias)
    )
    run = _decoding(model, case) if case.get("decode") else _encoding(model.eval(), case)
    with torch.inference_mode():
        out, cost = measuring.timed(run)
    return {**cost, "sample": out[..., ::7, ::5].tolist()}


def _encoding(model: Any, case: dict[str, Any]) -> Any:
    import torch

    from benchmarks import plain_ramen
    from everysat import sensors
    from everysat.types import Batch, Place, Raster

    days = torch.sort(torch.randint(1, 366, (case.get("dates", 1),))).values
    times = torch.stack([days - 1, days], 1).double() * 86400.0
    chosen = {"s2": sensors.get("sentinel-2-l2a").select(S2[: case["bands"]])}
    if case.get("radar"):
        chosen["s1"] = sensors.get("sentinel-1-asc").select(["VV", "VH"])
    px, side = case["px"], case["px"] * case["native_m"]
    images = {n: torch.randn(len(days), len(s.bands), px, px) for n, s in chosen.items()}
    model = model.at(layers="all")
    layers = {n: Raster.of(s, images[n], case["native_m"], time_s=times) for n, s in chosen.items()}
    batch = Batch((Place(side, side),), layers)
    ready = {n: model.contracted(n, r)[1].normalise(r)[None] for n, r in layers.items()}
    if case.get("way") == "plain":
        code = days.double()[None]
        return lambda: plain_ramen.encode(
            model, [plain_ramen.tokens_of(model, chosen[n], x, case["native_m"], code) for n, x in ready.items()]
        )[0, 1:]
    return lambda: model(model.tokenize(batch)).mean


def _decoding(model: Any, case: dict[str, Any]) -> Any:
    import torch

    from benchmarks import plain_ramen
    from everysat import sensors
    from everysat.nn.resample import axis_weights, resample
    from everysat.objectives import mae

    decoder = mae.build(encoder=model).decoder
    sensor = sensors.get("sentinel-2-l2a").select(S2[: case["bands"]])
    ratio = case["gsd_m"] / case["native_m"]
    cells = round(case["px"] / ratio)
    z = torch.randn(1, 512, cells, cells)
    if case.get("way") == "plain":
        return lambda: plain_ramen.values(decoder.bands, decoder.scale, sensor, z, ratio, case["px"])
    weight = axis_weights(cells, case["px"], ratio, False, True)

    def folded() -> Any:
        (mixing, bias), channels = decoder.scale(ratio), decoder.bands(sensor)
        low = z.movedim(1, -1) @ (mixing @ channels.T) + channels @ bias
        return resample(low.movedim(-1, 1), weight, weight)

    return folded


def sweeps() -> dict[str, Any]:
    base = {"native_m": 10, "gsd_m": 160, "bands": 10, "px": 256}
    return {
        "side of the input, 10 m pixels, 16 x 16 cells": (
            [{**base, "px": n, "gsd_m": n * 10 / 16} for n in (64, 128, 256, 512, 1024, 2048)],
            "px",
        ),
        "the same, every pixel read (antialias)": (
            [{**base, "px": n, "gsd_m": n * 10 / 16, "antialias": True} for n in (64, 128, 256, 512, 1024, 2048)],
            "px",
        ),
        "number of dates, 128 px to 8 x 8 cells": (
            [{**base, "px": 128, "dates": t} for t in (2, 8, 32, 128)],
            "dates",
        ),
        "target size, 256 px of 10 m": ([{**base, "gsd_m": g} for g in (640, 320, 160, 80, 40)], "gsd_m"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "scaling", "one"])
    parser.add_argument("case", nargs="?", default="{}", help="JSON, for 'one'")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(measure(json.loads(options.case))))
        return
    if options.what == "speed":
        found = measuring.ratios("benchmarks.ramen", CASES, WAYS, options.rounds)
    else:
        found = measuring.scaling("benchmarks.ramen", sweeps())
    measuring.save(f"ramen_{options.what}", str(__doc__).split("\n")[0], found)


if __name__ == "__main__":
    main()
