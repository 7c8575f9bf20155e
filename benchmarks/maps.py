"""Maps of large areas: speed of the whole path against the bare network, memory over area, two workers against one.

    python -m benchmarks.maps                  # writes benchmarks/results/maps.json; 20 minutes on a machine at rest
    python -m benchmarks.maps --side 768       # smaller: for a look

A scene of ``side`` x ``side`` pixels of 10 m with four bands of three dates, repeated from the real Sentinel-2 scene over Berlin
(mirrored, so that tiles fit), in compressed tiled GeoTIFFs; where the real scene is not installed, of noise. The network is an
OmniSat with random weights (128 numbers a token and 4 blocks; for the speed also one of 256 and 6, as published), whose tokens of 40 m go into an int8 store. All are pixels of the
scene a second.

- ``bare``: the encoder on chips that lie ready in memory, without reading, cutting, joining or writing: the better of one
  thread for each core on batches of its own, and all threads on each batch.
- ``whole``: ``predict`` from files to a finished store.
- ``workers``: windows by one and by two processes of Ray, from the moment when each has computed its first: their start takes seconds.
- ``memory``: largest resident memory above that of a process that has imported everything, for 1, 4 and 16 times an area, in windows of
  1280 m, so that the smallest has enough of them to fill all queues, and with GDAL's cache of blocks held at 32 MB: it is full (at 256 MB
  by default) only after larger areas.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring

BANDS = ("B02", "B03", "B04", "B08")
DATES = ("20240405", "20240620", "20240908")
CORNER = (600000.0, 5800020.0)
WINDOW_M = 3840.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=2304, help="pixels; a multiple of 384 and of 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where scenes are made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="everysat-maps-", dir=options.folder) as name:
        folder = Path(name)
        side = options.side
        for pixels in {side, side // 2, side // 4}:
            made(folder, pixels)
        found: dict[str, Any] = {
            "side": side,
            "cores": len(os.sched_getaffinity(0)),
            **speed(folder, side, options.rounds),
            "as published": speed(folder, side // 2, options.rounds, dim=256, depth=6),
        }
        found["memory"] = memory(folder, side)
        found["workers"] = workers(folder, side)
    print(json.dumps(found, indent=1))
    measuring.save("maps", __doc__.split("\n")[0], {"processor": processor(), **found})


def processor() -> str:
    """Name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def speed(folder: Path, side: int, rounds: int, **sizes: int) -> dict[str, Any]:
    """Bare and whole in turn, the fastest of each."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for way in ("bare, one thread a batch", "bare, all threads", "whole"):
            run = measuring.apart("benchmarks.maps", {"way": way, "folder": str(folder), "side": side, "sizes": sizes})
            best[way] = max(best.get(way, 0.0), run["pixels_per_s"])
            print(way, round(run["pixels_per_s"]), flush=True)
    bare = max(rate for way, rate in best.items() if way.startswith("bare"))
    return {"pixels_per_s": best, "whole_to_bare": best["whole"] / bare}


def memory(folder: Path, side: int) -> dict[str, Any]:
    grown = {}
    for times, pixels in ((1, side // 4), (4, side // 2), (16, side)):
        run = measuring.apart("benchmarks.maps", {"way": "memory", "folder": str(folder), "side": pixels})
        grown[str(times)] = run["peak_mb"] - run["before_mb"]
        print(f"memory at {times} x the area: {grown[str(times)]:.0f} MB", flush=True)
    return {"grown_mb": grown, "16_to_4": grown["16"] / grown["4"]}


def workers(folder: Path, side: int) -> dict[str, Any]:
    rates = {}
    for count in (1, 2):
        case = {"way": "workers", "folder": str(folder), "side": side, "workers": count}
        rates[str(count)] = measuring.apart("benchmarks.maps", case)["pixels_per_s"]
        print(f"{count} workers", round(rates[str(count)]), flush=True)
    return {"pixels_per_s": rates, "2_to_1": rates["2"] / rates["1"]}


def one(case: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process."""
    folder, side = Path(case["folder"]), case["side"]
    encoder, mapper = network(**case.get("sizes", {}))
    if case["way"].startswith("bare"):
        return {"pixels_per_s": side * side / bare(encoder, folder, side, case["way"])}
    out = folder / f"{case['way']}-{side}.zarr"
    if case["way"] == "workers":
        return {"pixels_per_s": fleet(mapper, folder, side, case["workers"])}
    _import()
    window_m = WINDOW_M
    if case["way"] == "memory":
        os.environ["GDAL_CACHEMAX"], window_m = "32", 1280.0
    whole(mapper, folder, side, folder / "warm.zarr", side=128)
    _, facts = measuring.timed(lambda: whole(mapper, folder, side, out, window_m=window_m))
    return {"pixels_per_s": side * side / facts["seconds"], **facts}


def fleet(mapper: Any, folder: Path, side: int, count: int) -> float:
    """Pixels a second that ``count`` processes of Ray compute once each of them has computed one window."""
    from everysat.mapping.source import open_source
    from everysat.mapping.workers import Work, on_ray
    from everysat.predict import plan_of

    source = open_source(opened(folder, side, mapper.encoder), mapper.gsd_m)
    work = Work(mapper, source, plan_of(mapper, source, WINDOW_M, None, None, False))
    began, done = 0.0, 0
    for number, (window, _) in enumerate(on_ray(work, work.plan.windows(), workers=count, address="local"), 1):
        if number > count:
            done += (window.core[1] - window.core[0]) * (window.core[3] - window.core[2])
        elif number == count:
            began = time.perf_counter()
    return done * (mapper.gsd_m / 10.0) ** 2 / (time.perf_counter() - began)


def _import() -> None:
    import torch

    import everysat.models.omnisat
    import everysat.predict
    import everysat.store.zarr_store  # noqa: F401

    torch.set_num_threads(1)


def network(dim: int = 128, depth: int = 4) -> tuple[Any, Any]:
    import torch

    from everysat import polygons
    from everysat.models import omnisat

    torch.manual_seed(0)
    bands = {"sensor": "sentinel-2-l2a", "bands": list(BANDS), "gsd_m": 10.0, "projector": "series"}
    encoder = omnisat.build("", patch_m=40.0, grid=8, dim=dim, depth=depth, heads=8, modalities={"s2": bands}).eval()
    return encoder, polygons.dense(encoder, 40.0)


def opened(folder: Path, side: int, encoder: Any) -> Any:
    from everysat.io.read import open_scene

    files = [str(folder / f"S2A_MSIL2A_{date}_{side}.tif") for date in DATES]
    times = [f"{date[:4]}-{date[4:6]}-{date[6:]}" for date in DATES]
    return open_scene(files, sensor="sentinel-2-l2a", times=times, processing_baseline="04.00", inputs=encoder.inputs)


def whole(
    mapper: Any, folder: Path, pixels: int, out: Path, side: int = 0, window_m: float = WINDOW_M, **options: Any
) -> float:
    """Seconds from files to a finished store; of a corner of ``side`` pixels if given."""
    import shutil

    from everysat.predict import predict

    scene = opened(folder, pixels, mapper.encoder)
    if side:
        scene = scene.read((slice(0, side), slice(0, side)))
    began = time.perf_counter()
    made = predict(mapper, scene, out, window_m=window_m, quiet=True, **options)
    seconds = time.perf_counter() - began
    shutil.rmtree(made["features"])
    return seconds


def bare(encoder: Any, folder: Path, side: int, way: str) -> float:
    """Seconds that the encoder takes for all chips of the scene, in the batches in which ``predict`` hands them over."""
    import torch

    from everysat.nn.dense import cut

    chip_m, step = 320.0, round(WINDOW_M / 10)
    scene, batches = opened(folder, side, encoder), []
    for top in range(0, side, step):
        for left in range(0, side, step):
            window = scene.read((slice(top, min(top + step, side)), slice(left, min(left + step, side))))
            n = round(window.places[0].height_m / chip_m), round(window.places[0].width_m / chip_m)
            corners = [(y, x) for y in range(n[0]) for x in range(n[1])]
            batches += [cut(window, corners[i : i + 64], 1, 1, chip_m) for i in range(0, len(corners), 64)]
    alone = "one thread" in way
    torch.set_num_threads(1 if alone else len(os.sched_getaffinity(0)))
    threads = len(os.sched_getaffinity(0)) if alone else 1
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        list(pool.map(encoder.embed, batches[: 2 * threads]))
        began = time.perf_counter()
        list(pool.map(encoder.embed, batches))
        return time.perf_counter() - began


def made(folder: Path, side: int) -> None:
    """The files of a scene, strip by strip."""
    import rasterio
    from affine import Affine

    tile = pixels()
    rng = np.random.default_rng(0)
    for date in DATES:
        profile = {
            "driver": "GTiff", "count": len(BANDS), "dtype": "uint16", "height": side, "width": side, "crs": "EPSG:32633",
            "transform": Affine(10, 0, CORNER[0], 0, -10, CORNER[1]), "nodata": 0, "tiled": True, "blockxsize": 512, "blockysize": 512,
            "compress": "deflate", "predictor": 2,
        }  # fmt: skip
        gain = rng.uniform(0.8, 1.2)
        with rasterio.open(folder / f"S2A_MSIL2A_{date}_{side}.tif", "w", **profile) as file:
            for index, name in enumerate(BANDS, 1):
                file.set_band_description(index, name)
            for top in range(0, side, 512):
                rows = np.arange(top, min(top + 512, side)) % tile.shape[1]
                strip = tile[:, rows][:, :, np.arange(side) % tile.shape[2]]
                file.write((strip * gain).astype(np.uint16) + 1000, window=((top, top + len(rows)), (0, side)))


def pixels() -> np.ndarray:
    """Digital numbers [band, y, x] of the real scene and its mirror images."""
    import rasterio

    from everysat.data import berlin

    try:
        files = berlin.files()
    except (FileNotFoundError, ImportError):
        return np.random.default_rng(1).integers(100, 4000, (len(BANDS), 768, 768)).astype(np.uint16)
    bands = []
    for name in BANDS:
        with rasterio.open(next(f for f in files if f.endswith(f"{name}.jp2"))) as file:
            bands.append(file.read(1))
    once = np.stack(bands)
    wide = np.concatenate([once, once[:, :, ::-1]], 2)
    return np.concatenate([wide, wide[:, ::-1]], 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(json.loads(sys.argv[2]))))
    else:
        main()
