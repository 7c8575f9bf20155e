"""Time and memory of Atomizer: against the plain formulation of the same maths, and as the number of tokens grows.

    python -m benchmarks.atomizer speed       # writes benchmarks/results/atomizer_speed.json
    python -m benchmarks.atomizer scaling     # writes benchmarks/results/atomizer_scaling.json

Random weights of the assumed size of the published model (``bmvc``). Each measurement runs in a process of its own with one thread;
figures are ratios within a run, or exponents of a power law; memory is what the process grew by beyond weights and input. Beyond
``HELD_ELEMENTS``, keys and values are made in parts, with less memory: exponents across that limit are of no one way.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from benchmarks import measuring

CASES: dict[str, dict[str, Any]] = {
    "120 px, 12 bands, 172800 tokens": {"px": 120},
    "120 px, 12 bands, a third invalid": {"px": 120, "invalid": 0.33},
    "60 px, 12 bands, 43200 tokens": {"px": 60},
}
WAYS = ("plain", "everysat", "everysat-bf16")


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds, memory and a sample of the output, in this process."""
    import torch

    from benchmarks import plain_atomizer
    from everysat import sensors
    from everysat.models import atomizer
    from everysat.types import Batch, Place, Raster

    torch.set_num_threads(case.get("threads", 1))
    torch.manual_seed(0)
    model = atomizer.build(case.get("variant", "bmvc"), **case.get("changes", {})).eval()
    sensor = sensors.get("sentinel-2-l2a")
    sensor = sensor.select(atomizer.S2_BANDS)
    px, dates = case["px"], case.get("dates", 1)
    values = torch.rand(dates, len(sensor.bands), px, px)
    valid = torch.ones_like(values, dtype=torch.bool)
    if case.get("invalid"):
        valid[..., : round(px * case["invalid"])] = False
    times = [(1.5e9 + 864000 * d, 1.5e9 + 864000 * d) for d in range(dates)] if dates > 1 else None
    raster = Raster.of(sensor, values, 10.0, valid=valid, time_s=times)
    batch = Batch((Place(px * 10.0, px * 10.0),), {"s2": raster})
    view = model.at(layers="all", budget=case.get("budget", 0))
    way = case.get("way", "everysat")

    def run() -> Any:
        if way == "plain":
            return plain_atomizer.encode(view, batch, "s2")
        return view(view.tokenize(batch)).summary.float()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
        out, cost = measuring.timed(run)
    return {**cost, "sample": out.tolist()}


def sweeps() -> dict[str, tuple[list[dict[str, Any]], str]]:
    sides = (15, 30, 60, 120, 240)
    tiny = {"variant": "tiny", "changes": {"token_m": 100.0}}
    return {
        "bmvc, tokens of one image of 12 bands": ([{"px": px, "tokens": 12 * px * px} for px in sides], "tokens"),
        "tiny with read-out per 100 m and dates, side of the place (the last in parts)": (
            [{**tiny, "px": px, "dates": 2, "tokens": 24 * px * px} for px in sides],
            "tokens",
        ),
        "tiny with read-out, number of dates, 60 px (the last in parts)": (
            [{**tiny, "px": 60, "dates": t, "tokens": 12 * 3600 * t} for t in (1, 4, 16, 32)],
            "tokens",
        ),
        "bmvc, tokens of the budget, 120 px": (
            [{"px": 120, "budget": n} for n in (5400, 21600, 86400, 172800)],
            "budget",
        ),
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
    load = os.getloadavg()[0]
    module = "benchmarks.atomizer"
    if options.what == "speed":
        results = measuring.ratios(module, CASES, WAYS, options.rounds)
    else:
        results = measuring.scaling(module, sweeps())
    summary = (__doc__ or "").split("\n")[0]
    measuring.save(f"atomizer_{options.what}", summary, {"load_before": round(load, 2), **results})


if __name__ == "__main__":
    main()
