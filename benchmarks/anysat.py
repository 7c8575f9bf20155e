"""Time and memory of AnySat: against the plain formulation of the same maths, and as places and series grow.

    python -m benchmarks.anysat speed       # writes benchmarks/results/anysat_speed.json
    python -m benchmarks.anysat scaling     # writes benchmarks/results/anysat_scaling.json

Random weights. Each measurement runs in a process of its own, so that its peak memory is its own; figures are ratios within a
run, or exponents of a power law fitted to it; absolute times hold for the machine named in the result.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    way = case.get("way", "everysat")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
        start = time.perf_counter(), time.process_time()
        if way == "plain":
            out = encode(view, images, dict.fromkeys(images, days[None]))[0, 1:]
        else:
            out = view(view.tokenize(batch)).mean.float()
        seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": peak,
        "before_mb": before,
        "sample": out[::7, ::5].tolist(),
    }


def apart(case: dict[str, Any]) -> dict[str, Any]:
    """The measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.anysat", "one", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def speed(rounds: int) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    for title, case in CASES.items():
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                runs[way].append(apart({**case, "way": way}))
        best = {way: min(some, key=lambda run: run["cpu_seconds"]) for way, some in runs.items()}
        plain = best["plain"]
        found[title] = {}
        for way, run in best.items():
            ours, theirs = torch.tensor(run["sample"]), torch.tensor(plain["sample"])
            found[title][way] = {
                "cpu_seconds": run["cpu_seconds"],
                "time_ratio": run["cpu_seconds"] / plain["cpu_seconds"],
                "peak_mb": run["peak_mb"],
                "largest_difference": float((ours - theirs).abs().max()),
                "smallest_cosine": float(torch.nn.functional.cosine_similarity(ours, theirs).min()),
            }
            print(title, way, {k: round(v, 6) for k, v in found[title][way].items()}, flush=True)
    return found


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
    found: dict[str, Any] = {}
    for title, (cases, size) in sweeps.items():
        rows = []
        for case in cases:
            run = apart(case)
            rows.append({size: case[size], **{k: run[k] for k in ("seconds", "cpu_seconds", "peak_mb", "before_mb")}})
            print(title, {k: round(v, 2) for k, v in rows[-1].items()}, flush=True)
        found[title] = {"rows": rows, "exponents": _exponents(rows, size)}
        print(title, found[title]["exponents"], flush=True)
    return found


def _exponents(rows: list[dict[str, float]], size: str) -> dict[str, float]:
    """Slope of log time, and of log memory above the process's own, over log size, between the two largest sizes. For the side
    of a place, 2 is linear in the area."""
    a, b = rows[-2], rows[-1]
    span = math.log(b[size] / a[size])
    grown = [max(r["peak_mb"] - r["before_mb"], 1e-3) for r in (a, b)]
    return {
        "time": math.log(b["cpu_seconds"] / a["cpu_seconds"]) / span,
        "memory": math.log(grown[1] / grown[0]) / span,
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
    found = speed(options.rounds) if options.what == "speed" else scaling()
    result = {"what": __doc__.split("\n")[0], "machine": platform.processor() or platform.machine(), "results": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"anysat_{options.what}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
