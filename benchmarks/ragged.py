"""What padding costs: OmniSat's time-series projector on places with different numbers of dates, ragged against padded.

    python -m benchmarks.ragged                    # writes benchmarks/results/ragged.json

Sixteen synthetic places of 60 m with a number of Sentinel-2 dates drawn between 5 and 100. Ragged: the layer of a
:class:`Batch` as it is. Padded: every place brought to the longest series by repeating dates, which is what a rectangular array
makes a model compute (the result then differs: repeated dates take part in the attention). One thread; ratios of one run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from everysat.models import omnisat
from everysat.types import Batch, Place, Raster

RESULTS = Path(__file__).parent / "results"
DAY_S = 86400.0


def place(encoder: omnisat.OmniSat, dates: int, length: int, generator: torch.Generator) -> Batch:
    """A place with ``dates`` dates, repeated up to ``length``."""
    wanted = encoder.inputs["s2"]
    values = torch.rand(dates, len(wanted.sensor.bands), 6, 6, generator=generator)
    start = (18000 + torch.randperm(365, generator=generator)[:dates]).double() * DAY_S
    index = torch.arange(length) % dates
    times = torch.stack([start, start + DAY_S], 1)[index]
    return Batch((Place(60.0, 60.0),), {"s2": Raster.of(wanted.sensor, values[index], 10.0, time_s=times)})


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    encoder = omnisat.build("treesat").eval()
    dates = torch.randint(5, 101, (16,), generator=generator).tolist()
    ragged = Batch.cat([place(encoder, n, n, generator) for n in dates])
    padded = Batch.cat([place(encoder, n, max(dates), generator) for n in dates])
    seconds: dict[str, list[float]] = {"ragged": [], "padded": []}
    for _ in range(7):
        for name, batch in (("ragged", ragged), ("padded", padded)):
            start = time.process_time()
            with torch.inference_mode():
                encoder.tokenize(batch)
            seconds[name].append(time.process_time() - start)
    best = {name: min(found) for name, found in seconds.items()}
    result = {
        "what": __doc__.split("\n")[0],
        "dates": dates,
        "padding_share": 1 - sum(dates) / (len(dates) * max(dates)),
        "cpu_seconds": best,
        "time_ratio": best["ragged"] / best["padded"],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ragged.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
