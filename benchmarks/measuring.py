"""What benchmarks share: measurements in processes of their own, exponents of power laws, results on disk."""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``run`` returns, and its seconds, seconds of CPU, and the peak memory of this process before and after, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter(), time.process_time()
    out = run()
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out, {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak, "before_mb": before}


def apart(module: str, case: dict[str, Any]) -> dict[str, Any]:
    """What ``python -m MODULE one CASE`` prints, so that its peak memory is its own."""
    command = [sys.executable, "-m", module, "one", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ratios(module: str, cases: dict[str, dict[str, Any]], ways: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Each case in each way, the ways in turn, the least CPU time of ``rounds``; ratios and differences to the first way. Memory is
    what the process grew by."""
    import torch

    found: dict[str, Any] = {}
    for title, case in cases.items():
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                runs[way].append(apart(module, {**case, "way": way}))
        best = {way: min(some, key=lambda run: run["cpu_seconds"]) for way, some in runs.items()}
        first = best[ways[0]]
        found[title] = {}
        for way, run in best.items():
            ours, theirs = torch.tensor(run["sample"]), torch.tensor(first["sample"])
            grown = [max(r["peak_mb"] - r["before_mb"], 1e-3) for r in (run, first)]
            found[title][way] = {
                "cpu_seconds": run["cpu_seconds"],
                "time_ratio": run["cpu_seconds"] / first["cpu_seconds"],
                "grown_mb": grown[0],
                "memory_ratio": grown[0] / grown[1],
                "largest_difference": float((ours - theirs).abs().max()),
                "largest_value": float(theirs.abs().max()),
                "smallest_cosine": float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min()),
            }
            print(title, way, {k: round(v, 6) for k, v in found[title][way].items()}, flush=True)
    return found


def scaling(module: str, sweeps: dict[str, tuple[list[dict[str, Any]], str]]) -> dict[str, Any]:
    """Time and grown memory of cases of rising size, and exponents between the two largest."""
    found: dict[str, Any] = {}
    for title, (cases, size) in sweeps.items():
        rows = []
        for case in cases:
            run = apart(module, case)
            rows.append({size: case[size], **{k: run[k] for k in ("seconds", "cpu_seconds", "peak_mb", "before_mb")}})
            print(title, {k: round(v, 2) for k, v in rows[-1].items()}, flush=True)
        found[title] = {"rows": rows, "exponents": exponents(rows, size)}
        print(title, found[title]["exponents"], flush=True)
    return found


def exponents(rows: list[dict[str, float]], size: str) -> dict[str, float | None]:
    """Slope of log time, and of log memory above the process's own, over log size, between the two largest sizes. For the side
    of a place, 2 is linear in the area. No memory slope where the peak lay before what is measured."""
    a, b = rows[-2], rows[-1]
    span = math.log(b[size] / a[size])
    grown = [r["peak_mb"] - r["before_mb"] for r in (a, b)]
    return {
        "time": math.log(b["cpu_seconds"] / a["cpu_seconds"]) / span,
        "memory": math.log(grown[1] / grown[0]) / span if min(grown) > 1 else None,
    }


def save(name: str, what: str, results: Any) -> None:
    """Write ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    content = {"what": what, "machine": platform.processor() or platform.machine(), "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
