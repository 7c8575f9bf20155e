"""Readers of published datasets against plain reading of the same bytes, and whether the loader keeps a training step fed.

    python -m benchmarks.loader                    # writes benchmarks/results/loader.json; four minutes, on a machine at rest

Made data of the published sizes, in a temporary folder: a place of PASTIS-HD (43 dates of Sentinel-2, twice 70 of Sentinel-1,
SPOT of 1280 px), of TreeSatAI-TS (aerial photograph, HDF5 of a year) and of FLAIR #2 (photograph, label, window of an area of
40 dates). Three ways to read them, each in a process of its own, in turn:

- ``bytes``: numpy.load, rasterio, h5py, and nothing else: arrays as they are stored, no mask, no dates.
- ``float32``: the same, then ``astype(float32)`` and a tensor: what a hand-written loader hands to a model.
- ``everysat``: physical units, validity, dates and ground.

All read from the page cache, where differences show most; for PASTIS ``cold`` reads from the disk.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring
from everysat.data import augment, flair, pastis, treesatai
from everysat.data.batches import Dataset, Plan, prefetch
from everysat.io import arrays, footprint, grid
from everysat.io.plane import HANDLES
from everysat.types import Batch

PLACES, ROUNDS = 8, 5
LEAST_S = 1.5
"""A measurement reads all places again until it has lasted so long."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="everysat-loader-") as folder:
        made = {name: make(Path(folder) / name) for name, (make, _, _) in SETS.items()}
        found: dict[str, Any] = {name: compared(name, Path(folder) / name, cold=False) for name in made}
        found["pastis, cold"] = compared("pastis", Path(folder) / "pastis", cold=True)
        found["bytes_per_place"] = {name: size / PLACES for name, size in made.items()}
        found["workers"] = {
            str(w): measuring.apart("benchmarks.loader", {"what": "workers", "root": folder, "workers": w})
            for w in (0, 1, 2)
        }
        found["fed"] = measuring.apart("benchmarks.loader", {"what": "fed", "root": folder})
        print("workers", found["workers"], "\nfed", found["fed"], flush=True)
    measuring.save("loader", __doc__.split("\n")[0], {"places": PLACES, "rounds": ROUNDS, **found})


def compared(name: str, root: Path, cold: bool) -> dict[str, Any]:
    """The three ways in turn; of each the fastest of the rounds, and its memory."""
    ways: dict[str, list[dict[str, float]]] = {"bytes": [], "float32": [], "everysat": []}
    for _ in range(ROUNDS):
        for way, runs in ways.items():
            case = {"what": "read", "set": name, "root": str(root), "way": way, "cold": cold}
            runs.append(measuring.apart("benchmarks.loader", case))
    found: dict[str, Any] = {}
    for way, runs in ways.items():
        best = min(runs, key=lambda run: run["seconds_per_place"])
        found[way] = {**best, "slowest": max(run["seconds_per_place"] for run in runs)}
        found[way]["places_per_second"] = 1 / best["seconds_per_place"]
    for way in ("bytes", "float32"):
        found[f"times_{way}"] = found["everysat"]["seconds_per_place"] / found[way]["seconds_per_place"]
    print(f"{name}{', cold' if cold else ''}:", json.dumps(found), flush=True)
    return found


def one(case: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process."""
    import torch

    torch.set_num_threads(1)
    root = Path(case["root"])
    if case["what"] == "workers":
        return workers(root / "pastis", case["workers"])
    if case["what"] == "fed":
        return fed(root / "pastis")
    _, plain, build = SETS[case["set"]]
    data = build(root)
    read: Callable[[int], Any] = data.__getitem__
    if case["way"] != "everysat":
        read = plain(root, data)
    if case["way"] == "float32":
        read = as_float32(read)
    read(0)
    before = peak_mb(anew=True)
    seconds, count, begun = 0.0, 0, time.perf_counter()
    while time.perf_counter() - begun < LEAST_S:
        for index in range(len(data)):
            # As in an epoch over all of a dataset, where no file is still open and no place was seen before.
            HANDLES.forget()
            grid.pixel_m.cache_clear()
            if case["cold"]:
                forget(root)
            start = time.perf_counter()
            item = read(index)
            seconds += time.perf_counter() - start
            count += 1
            del item
    return {"seconds_per_place": seconds / count, "grown_mb": peak_mb() - before}


def as_float32(read: Callable[[int], list[np.ndarray]]) -> Callable[[int], Any]:
    import torch

    return lambda index: [torch.from_numpy(a.astype(np.float32)) for a in read(index)]


def peak_mb(anew: bool = False) -> float:
    """Most memory that this process has had, ``anew`` from now on: importing takes more than reading (Linux)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget(root: Path) -> None:
    """Take the files out of the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def workers(root: Path, count: int) -> dict[str, float]:
    """Batches of two places per second, with so many threads that prepare them."""
    data = pastis.build(root=root)
    steps = list(range(40))
    plan = Plan([len(data)], [1.0], batch_size=2, accumulate=1, steps=len(steps), seed=0)
    start = time.perf_counter()
    for batch in prefetch(lambda step: batch_of(data, plan, step), steps, workers=count):
        del batch
    return {"places_per_second": 2 * len(steps) / (time.perf_counter() - start)}


def fed(root: Path) -> dict[str, float]:
    """A training step of the smallest AnySat on batches of two places, of which it sees 160 m: with a batch that is there already, and with batches that a
    thread reads meanwhile. ``waiting`` is the share of the time that the step waits for its batch."""
    import torch

    from everysat.find import find
    from everysat.trainee import with_statistics

    data = pastis.build(root=root, modalities=["s2", "s1-asc"])
    torch.manual_seed(0)
    module, _ = find("models", "anysat")
    encoder = with_statistics(module.build("tiny", modalities=["s2", "s1-asc"], patch_m=40), [data]).train()
    adam = torch.optim.AdamW(encoder.parameters())
    steps = list(range(8))
    plan = Plan([len(data)], [1.0], batch_size=2, accumulate=1, steps=len(steps), seed=0)

    def cut(at: int) -> Batch:
        places = [data[int(index)].without("label") for index in plan.places(at)[0]]
        return Batch.cat([augment.crop(place, 0.0, 0.0, 160.0, 160.0) for place in places])

    def step(batch: Batch) -> None:
        adam.zero_grad()
        encoder(encoder.tokenize(batch)).mean.square().mean().backward()
        adam.step()

    first = cut(0)
    step(first)
    _, alone = measuring.timed(lambda: [step(first) for _ in steps])
    waited, start = 0.0, time.perf_counter()
    batches = prefetch(cut, steps, workers=1)
    for _ in steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    whole = time.perf_counter() - start
    return {
        "seconds_per_step_alone": alone["seconds"] / len(steps),
        "seconds_per_step_fed": whole / len(steps),
        "waiting": waited / whole,
    }


def batch_of(data: Dataset, plan: Plan, step: int) -> Batch:
    return Batch.cat([data[int(index)].without("label") for index in plan.places(step)[0]])


# --- PASTIS-HD -------------------------------------------------------------------------------------------------------


def make_pastis(root: Path) -> int:
    rng = np.random.default_rng(0)
    places = []
    for number in range(10000, 10000 + PLACES):
        facts: dict[str, Any] = {"Fold": 1, "TILE": "t31tfm", "ID_PATCH": number}
        for prefix, count in (("S2", 43), ("S1A", 70), ("S1D", 70)):
            days = [datetime.date(2018, 9, 1) + datetime.timedelta(5 * i) for i in range(count)]
            facts[f"dates-{prefix}"] = {str(i): int(day.strftime("%Y%m%d")) for i, day in enumerate(days)}
            if prefix == "S2":
                numbers = rng.integers(-200, 9000, (count, 10, 128, 128)).astype(np.int16)
                numbers[0, :, :9] = pastis.NODATA
            else:
                numbers = rng.normal(-12, 3, (count, 3, 128, 128)).astype(np.float16)
            arrays.write_npy(root / f"DATA_{prefix}" / f"{prefix}_{number}.npy", numbers)
        arrays.write_npy(
            root / "ANNOTATIONS" / f"TARGET_{number}.npy", rng.integers(0, 20, (3, 128, 128)).astype(np.uint8)
        )
        arrays.write_tiff(root / pastis.SPOT.format(number), rng.integers(0, 256, (3, 1280, 1280)).astype(np.uint8))
        outline = footprint.outline((640000.0 + 1280 * (number - 10000), 5110000.0), 1280.0, "EPSG:32631", "EPSG:2154")
        places.append({"type": "Feature", "properties": facts, "geometry": outline})
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::2154"}}
    arrays.write_json(root / "metadata.geojson", {"type": "FeatureCollection", "crs": crs, "features": places})
    return size_of(root)


def plain_pastis(root: Path, data: Any) -> Callable[[int], list[np.ndarray]]:
    numbers = [patch.number for patch in data.patches]
    series = [(root / f"DATA_{prefix}", prefix) for prefix in ("S2", "S1A", "S1D")]

    def read(index: int) -> list[np.ndarray]:
        number = numbers[index]
        found = [np.load(folder / f"{prefix}_{number}.npy") for folder, prefix in series]
        return [
            *found,
            pixels(root / pastis.SPOT.format(number)),
            np.load(root / "ANNOTATIONS" / f"TARGET_{number}.npy"),
        ]

    return read


# --- TreeSatAI Time Series -------------------------------------------------------------------------------------------


def make_treesatai(root: Path) -> int:
    treesatai.fake(root, places=3 * PLACES)
    rng = np.random.default_rng(0)
    for path in (root / "sentinel-ts").glob("*.h5"):
        held: dict[str, Any] = {}
        days = [datetime.date(2019, 1, 1) + datetime.timedelta(5 * i) for i in range(73)]
        stamps = [day.strftime("%Y%m%dT102421") for day in days]
        for orbit in ("asc", "des"):
            held[f"sen-1-{orbit}-data"] = rng.gamma(4.0, 0.02, (73, 2, 6, 6)).astype(np.float32)
            held[f"sen-1-{orbit}-products"] = [f"S1A_IW_GRDH_1SDV_{t}_{t}_030639_0382D5_360A" for t in stamps]
        held["sen-2-data"] = rng.integers(100, 12000, (73, 10, 6, 6)).astype(np.float32)
        held["sen-2-masks"] = rng.choice([0.0, 30.0, 100.0], (73, 2, 6, 6)).astype(np.float32)
        held["sen-2-products"] = [f"S2A_MSIL2A_{t}_N0213_R065_T32UNC_{t}" for t in stamps]
        path.unlink()
        arrays.write_hdf5(path, held)
    return size_of(root / "sentinel-ts") // 3 + size_of(root / "aerial") // 3


def plain_treesatai(root: Path, data: Any) -> Callable[[int], list[np.ndarray]]:
    import h5py

    names = [name.removesuffix(".tif") for name in (root / "train_filenames.lst").read_text().split()]
    files = {name: next((root / "sentinel-ts").glob(f"{name}_*.h5")) for name in names}
    keys = ("sen-2-data", "sen-1-asc-data", "sen-1-des-data")
    products = tuple(key.replace("data", "products") for key in keys)

    def read(index: int) -> list[np.ndarray]:
        with h5py.File(files[names[index]], "r") as file:
            found = [file[key][()] for key in keys]
            for key in products:
                file[key][()]
        return [*found, pixels(root / "aerial" / f"{names[index]}.tif")]

    return read


# --- FLAIR #2 --------------------------------------------------------------------------------------------------------


def make_flair(root: Path) -> int:
    """One area of so many photographs."""
    rng = np.random.default_rng(0)
    area = "D006_2020/Z1_NN"
    stem = root / "flair_sen_train" / area / "sen" / f"SEN2_sp_{area.replace('/', '-')}"
    centroids = {}
    for i in range(PLACES):
        name, corner = f"IMG_{i + 1:06d}.tif", (873782.4 + 102.4 * i, 6891028.8)
        place = {"crs": "EPSG:2154", "corner": corner, "gsd_m": flair.GSD_M}
        photo = rng.integers(0, 256, (5, 512, 512)).astype(np.uint8)
        arrays.write_tiff(root / "flair_aerial_train" / area / "img" / name, photo, **place)
        codes = rng.integers(1, 20, (1, 512, 512)).astype(np.uint8)
        arrays.write_tiff(root / "flair_labels_train" / area / "msk" / name.replace("IMG", "MSK"), codes, **place)
        centroids[name] = [60, 20 + 10 * i]
    numbers = rng.integers(100, 9000, (40, 10, 120, 120)).astype(np.uint16)
    arrays.write_npy(stem.with_name(f"{stem.name}_data.npy"), numbers)
    days = [(datetime.date(2021, 1, 1) + datetime.timedelta(9 * i)).strftime("%Y%m%dT105021") for i in range(40)]
    text = "".join(f"S2A_MSIL2A_{day}_N0300_R051_T31UDP_{day}\n" for day in days)
    arrays.write_text(stem.with_name(f"{stem.name}_products.txt"), text)
    arrays.write_json(root / flair.CENTROIDS, centroids)
    return size_of(root / "flair_aerial_train") + size_of(root / "flair_labels_train") + PLACES * 40 * 10 * 100 * 2


def plain_flair(root: Path, data: Any) -> Callable[[int], list[np.ndarray]]:
    def read(index: int) -> list[np.ndarray]:
        domain, area, _, name = data.images[index].split("/")
        folder = root / "flair_sen_train" / domain / area / "sen"
        row, column = data.centroids[index]
        mapped = np.load(folder / f"SEN2_sp_{domain}-{area}_data.npy", mmap_mode="r")
        window = np.array(mapped[:, :, row - 5 : row + 5, column - 5 : column + 5])
        (folder / f"SEN2_sp_{domain}-{area}_products.txt").read_text()
        label = root / "flair_labels_train" / domain / area / "msk" / name.replace("IMG", "MSK")
        return [pixels(root / "flair_aerial_train" / data.images[index]), pixels(label), window]

    return read


def pixels(path: Path) -> np.ndarray:
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path) as file:
            return file.read()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


SETS: dict[str, tuple[Callable[[Path], int], Callable[[Path, Any], Any], Callable[[Path], Any]]] = {
    "pastis": (make_pastis, plain_pastis, lambda root: pastis.build(root=root)),
    "treesatai": (make_treesatai, plain_treesatai, lambda root: treesatai.build(root=root)),
    "flair": (make_flair, plain_flair, lambda root: flair.build(root=root)),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(json.loads(sys.argv[2]))))
    else:
        main()
