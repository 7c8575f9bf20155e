"""Time and memory of OmniSat on a PASTIS-HD-shaped place, against the plain formulation of the same maths.

    python -m benchmarks.omnisat_pastis            # writes benchmarks/results/omnisat_pastis.json

One place of 1280 m: SPOT 1280 px at 1 m, Sentinel-2 and Sentinel-1 128 px with 50 dates each; batch 1, one thread, random
weights. Each way runs in a process of its own, in turn, so that its peak memory is its own. Figures are ratios to the plain
formulation of the same run; absolute times hold for the machine named in the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WAYS = ("plain", "everysat", "everysat-bf16")


def measure(way: str, grid: int, dates: int) -> dict[str, float | list[float]]:
    """Seconds, peak memory and a sample of the output of one way, in this process."""
    import torch

    from benchmarks.plain_omnisat import encode
    from everysat.models import omnisat
    from everysat.types import Batch, Place, Raster

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = omnisat.build("pastis", grid=grid, quirks=("sequence_grid",)).eval()
    for name, parameter in model.named_parameters():  # zeros would hide the relative positions and the queries
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5 if "table" in name else 0.02)
    px = grid * 4
    shapes = {"spot": (1, 3, px * 10, px * 10), "s2": (1, dates, 10, px, px), "s1-asc": (1, dates, 3, px, px)}
    images = {name: torch.randn(shape) for name, shape in shapes.items()}
    days = {name: torch.sort(torch.randint(0, 400, (1, dates))).values for name in ("s2", "s1-asc")}
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.inference_mode():
        start = time.perf_counter(), time.process_time()
        if way == "plain":
            out = encode(model, images, days)[0, 1:]
        else:
            origin = model.settings.modalities["s2"].origin_s
            layers = {}
            for name, image in images.items():
                stack = image if image.ndim == 4 else image[0]
                times = (
                    None
                    if name not in days
                    else [(origin + 86400.0 * d + 43200.0,) * 2 for d in days[name][0].tolist()]
                )
                if times is not None:
                    times = [(a - 43200.0, b - 43200.0) for a, b in times]
                layers[name] = Raster.of(model.inputs[name].sensor, stack, model.inputs[name].gsd_m, time_s=times)
            with torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
                out = model(model.tokenize(Batch((Place(grid * 40.0, grid * 40.0),), layers))).mean.float()
        seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": peak,
        "before_mb": base,
        "sample": out[::37, ::11].flatten().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process and print JSON")
    parser.add_argument("--grid", type=int, default=32, help="patches along the place (32 = 1280 m)")
    parser.add_argument("--dates", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.grid, options.dates)))
        return
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.omnisat_pastis",
                "--way",
                way,
                "--grid",
                str(options.grid),
                "--dates",
                str(options.dates),
            ]
            runs[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(way, {k: round(v, 2) for k, v in runs[way][-1].items() if k != "sample"}, flush=True)
    best = {way: min(found, key=lambda run: run["cpu_seconds"]) for way, found in runs.items()}
    plain = best["plain"]
    result = {
        "what": __doc__.split("\n")[0],
        "machine": platform.processor() or platform.machine(),
        "rounds": options.rounds,
        "ways": {},
    }
    for way, run in best.items():
        difference = max(abs(a - b) for a, b in zip(run["sample"], plain["sample"], strict=True))
        result["ways"][way] = {
            "cpu_seconds": run["cpu_seconds"],
            "time_ratio": run["cpu_seconds"] / plain["cpu_seconds"],
            "peak_mb": run["peak_mb"],
            "memory_ratio": run["peak_mb"] / plain["peak_mb"],
            "largest_difference": difference,
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "omnisat_pastis.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
