"""Words and images: zero-shot classes and retrieval of captions, with a trained GEO-ReSeT, on the valid part of RSICD.

    python -m benchmarks.words runs/georeset_rsicd/weights.safetensors ../shared/data/rsicd

Recall at k, images to sentences: one of an image's five is among the k best of all; sentences to images: its image is. Equal scores count half, since
many sentences are told of several images. Intervals (95 %) resample images 1000 times, with all their sentences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import everysat as es
from everysat.data import rsicd
from everysat.models.georeset import GeoReset
from everysat.nn.gaussian import Gaussian
from everysat.nn.risk import risk_coverage
from everysat.types import Batch

SPELT = {"BareLand": "bare land", "BaseballField": "baseball field", "DenseResidential": "dense residential area",
         "MediumResidential": "medium residential area", "SparseResidential": "sparse residential area", "RailwayStation": "railway station",
         "StorageTanks": "storage tanks", "Center": "center building", "Commercial": "commercial area", "Industrial": "industrial area",
         "Parking": "parking lot", "Port": "port with boats", "Square": "city square"}  # fmt: skip
WAYS = ("{}", "an aerial photograph of a {}", "there is a {} in the image", "a satellite image that shows a {}")


def gaussians(model: GeoReset, data: rsicd.Scenes, at_once: int = 60) -> Gaussian:
    """Of all images."""
    parts = []
    for start in range(0, len(data), at_once):
        batch = Batch.cat([data[i] for i in range(start, min(start + at_once, len(data)))])
        parts.append(model.place(batch.only("rgb")))
    return Gaussian(*(torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "log_var", "observed")))


def hits(scores: Tensor, own: Tensor, k: int) -> Tensor:
    """Whether one of a row's own columns, bool [row, column], is among its k best, [row]; equal scores count half."""
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    ahead = ((scores > best) & ~own).sum(1) + ((scores == best) & ~own).sum(1) / 2
    return (ahead < k).double()


def interval(each: Tensor, draws: int = 1000) -> list[float]:
    """Mean, and 2.5 and 97.5 % of means of resampled images, in %."""
    drawn = each[torch.randint(len(each), (draws, len(each)), generator=torch.Generator().manual_seed(0))].mean(1)
    return [round(100 * float(x), 1) for x in (each.mean(), drawn.quantile(0.025), drawn.quantile(0.975))]


def table(weights: str, root: str) -> dict[str, list[float]]:
    model = es.load(weights)
    assert isinstance(model, GeoReset)
    data = rsicd.build("captions", root=root, split="val")
    images, code = gaussians(model, data), torch.from_numpy(data.codes)
    names = [SPELT.get(name, name.lower()) for name in rsicd.CLASSES]
    prompts = model.text([[way.format(name) for way in WAYS] for name in names])
    by_class = model.match(images, prompts)
    strings = [text for every in data.captions for text in every]
    owner = torch.repeat_interleave(torch.arange(len(data)), torch.tensor([len(every) for every in data.captions]))
    scores, own = model.match(images, model.text(strings)), torch.arange(len(data))[:, None] == owner
    bags = model.match(images, model.text(data.captions))
    counts = torch.bincount(owner).double()
    found = {
        "zero-shot class": interval((by_class.argmax(1) == code).double()),
        "zero-shot class, 5 best": interval((by_class.topk(5).indices == code[:, None]).any(1).double()),
    }
    wrong = (by_class.argmax(1) != code).double()
    margin = by_class.topk(2).values
    for name, sure in (("information", images.information()), ("margin of logits", margin[:, 0] - margin[:, 1])):
        found[f"zero-shot class, surest half by {name}"] = [round(100 - 100 * risk_coverage(sure, wrong).at(0.5), 1)]
    for k in (1, 5, 10):
        found[f"image to text R@{k}"] = interval(hits(scores, own, k))
        each = torch.zeros(len(data)).double().index_add(0, owner, hits(scores.T, own.T, k)) / counts
        found[f"text to image R@{k}"] = interval(each)
        found[f"bag of five to image R@{k}"] = interval(hits(bags.T, torch.eye(len(data)).bool(), k))
    recalls = [found[f"{way} R@{k}"][0] for way in ("image to text", "text to image") for k in (1, 5, 10)]
    kinds = code[:, None] == code[owner]
    found["image to text of its class R@1"] = interval(hits(scores, kinds, 1))
    found["mean recall"] = [round(sum(recalls) / 6, 2)]
    return found


if __name__ == "__main__":
    result = table(*sys.argv[1:3])
    print("\n".join(f"{name:48s} {values}" for name, values in result.items()))
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
